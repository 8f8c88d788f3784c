//! `out[t, k] = (x[t, k] * r) * weight[k]` with `r = 1 / sqrt(mean over k of x[t, k]^2 + eps)` (RMSNorm, arXiv:1910.07467),
//! and the residual addition before it.
//!
//! `x, residual: [rows, width]` f32, `out: [rows, width]` f32 or pairs of bf16 ([`Rows::hold_pairs`]), `weight: [width]`. The sum of squares runs in 16 lanes, element `k` in lane
//! `k % 16`, which are then added by halves. Allocates nothing.

pub(crate) mod check;
pub(crate) mod check_lora;
mod cpu;
pub(crate) mod cuda;
pub(crate) mod cuda_lora;
#[cfg(test)]
mod tests;

use crate::error::{OpError, same};
use crate::rows::Rows;
use crate::simd::Isa;

/// `out = norm(x)`; `out` gets the rows of `x`.
///
/// # Errors
/// [`OpError::Shape`] if the widths differ, [`OpError::Limit`] if `out` has no room.
pub fn rms_norm(out: &mut Rows, x: &Rows, weight: &[f32], eps: f32) -> Result<(), OpError> {
    same("rms_norm", "width of out", out.width(), x.width())?;
    same("rms_norm", "weight", weight.len(), x.width())?;
    out.set_rows(x.rows())?;
    cpu::rms_norm(Isa::best(), out.out(), x.as_f32(), weight, eps);
    Ok(())
}

/// `residual += x`, then `out = norm(residual)`.
///
/// # Errors
/// [`OpError::Shape`] if the widths, or the rows of `residual` and `x`, differ; [`OpError::Limit`] if `out` has no room.
pub fn add_rms_norm(out: &mut Rows, residual: &mut Rows, x: &Rows, weight: &[f32], eps: f32) -> Result<(), OpError> {
    same("rms_norm", "width of out", out.width(), residual.width())?;
    same("rms_norm", "weight", weight.len(), residual.width())?;
    same("add_rms_norm", "width of residual", residual.width(), x.width())?;
    same("add_rms_norm", "rows of residual", residual.rows(), x.rows())?;
    out.set_rows(residual.rows())?;
    cpu::add_rms_norm(Isa::best(), out.out(), residual.as_f32_mut(), x.as_f32(), weight, eps);
    Ok(())
}
