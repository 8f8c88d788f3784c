//! `y[t, o] = sum over k of x[t, k] * w[o, k] (+ bias[o])` with weights that stay as a GGUF file has them, in 4 to 8 bits.
//!
//! The rows of `x` are rounded to 8 bits, 32 neighbours to a scale, once for the call. The products of a sub-block of 32
//! are added as whole numbers, which is exact; then `sum = fma(whole * x's scale, w's factor, sum)`, and for formats with an
//! addend `sum = fma(the sum of x, addend, sum)`, sub-block after sub-block, then the bias. So a row gets the same bits in
//! any batch and on every instruction set.
//!
//! `x: [rows, d_in]` f32, `w: [d_out, d_in]`, `y: [rows, d_out]` f32. Allocates only when there are more rows than ever
//! before on the calling thread.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod cpu;
mod format;
mod isa;
mod matrix;
mod pack;
mod portable;
#[cfg(test)]
mod tests;

pub use format::QuantFormat;
pub use matrix::Matrix;
pub use pack::{QuantPart, QuantWeight};

use crate::error::{OpError, same};
use crate::rows::{Rows, in_f32};
use isa::Isa;

/// `y = x W^T (+ bias)`; `y` gets the rows of `x`.
///
/// # Errors
/// [`OpError::Shape`] if `x.width() != w.d_in()`, `y.width() != w.d_out()` or the bias has another length;
/// [`OpError::Limit`] if `y` has no room for the rows.
pub fn quant_linear(y: &mut Rows, x: &Rows, w: &QuantWeight, bias: Option<&[f32]>) -> Result<(), OpError> {
    same("quant_linear", "width of x", x.width(), w.d_in())?;
    same("quant_linear", "width of y", y.width(), w.d_out())?;
    same("quant_linear", "bias", bias.map_or(w.d_out(), <[f32]>::len), w.d_out())?;
    in_f32("quant_linear", x)?;
    y.set_rows(x.rows())?;
    cpu::linear(Isa::best(), y.as_f32_mut(), x.as_f32(), w, bias);
    Ok(())
}
