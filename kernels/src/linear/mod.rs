//! `y[t, o] = sum over k of x[t, k] * w[o, k] (+ bias[o])`, one chain per output in the order of k, then the bias.
//!
//! `x: [rows, d_in]` f32, `w: [d_out, d_in]` packed in f32 or bf16, `y: [rows, d_out]` f32. With bf16 weights and
//! instructions for pairs of bf16 (AVX-512-BF16, AMX), x is rounded to bf16, unless it is so already ([`Rows::hold_pairs`]); elsewhere it is taken as it is. Allocates nothing
//! once it has seen the largest x.

mod amx;
pub(crate) mod cpu;
pub(crate) mod input;
mod pack;
#[cfg(test)]
mod tests;
pub(crate) mod tile;

pub use pack::{PackedWeight, WeightPart};

use crate::error::{OpError, same};
use crate::rows::{Rows, in_f32};
use crate::simd::Isa;

/// `y = x W^T (+ bias)`; `y` gets the rows of `x`.
///
/// # Errors
/// [`OpError::Shape`] if `x.width() != w.d_in()`, `y.width() != w.d_out()` or the bias has another length, or if `x` holds pairs
/// and `w` takes none;
/// [`OpError::Limit`] if `y` has no room for the rows.
pub fn linear(y: &mut Rows, x: &Rows, w: &PackedWeight, bias: Option<&[f32]>) -> Result<(), OpError> {
    check_linear(y, x, w, bias)?;
    cpu::linear(Isa::best(), y.as_f32_mut(), x, w, bias);
    Ok(())
}

/// Checks the extents and gives `y` its rows.
pub(crate) fn check_linear(y: &mut Rows, x: &Rows, w: &PackedWeight, bias: Option<&[f32]>) -> Result<(), OpError> {
    same("linear", "width of x", x.width(), w.d_in())?;
    same("linear", "width of y", y.width(), w.d_out())?;
    same("linear", "bias", bias.map_or(w.d_out(), <[f32]>::len), w.d_out())?;
    if !w.takes_pairs() {
        in_f32("linear", x)?;
    }
    y.set_rows(x.rows())
}
