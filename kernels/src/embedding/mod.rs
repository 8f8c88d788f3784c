//! `out[t, k] = w[tokens[t], k]`: rows of a packed weight, so that a tied head and the embedding are one matrix.
//!
//! `w: [vocab, hidden]` packed, `out: [tokens, hidden]` f32. A gather of one element per cache line, which is nothing beside
//! the products of the same step.

pub(crate) mod check;
pub(crate) mod cuda;

use crate::error::{OpError, at_most, same};
use crate::linear::PackedWeight;
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;

/// Reads row `tokens[t]` of `w` into row `t` of `out`; `out` gets one row per token.
///
/// # Errors
/// [`OpError::Limit`] if a token is not below `w.d_out()` or `out` has no room, [`OpError::Shape`] if the widths differ.
pub fn embedding(out: &mut Rows, w: &PackedWeight, tokens: &[u32]) -> Result<(), OpError> {
    gather(out, w.d_out(), w.d_in(), tokens, |row, k| w.element(row, k))
}

/// As [`embedding`], for a matrix `[d_out, d_in]` whose element `[row, k]` is `element(row, k)`.
///
/// # Errors
/// As [`embedding`].
pub(crate) fn gather(
    out: &mut Rows,
    d_out: usize,
    width: usize,
    tokens: &[u32],
    element: impl Fn(usize, usize) -> f32 + Sync,
) -> Result<(), OpError> {
    same("embedding", "width of out", out.width(), width)?;
    for &token in tokens {
        at_most("embedding", "token id", token as usize, d_out - 1)?;
    }
    out.set_rows(tokens.len())?;
    let rows = SharedMut::new(out.as_f32_mut());
    parallel::for_each(tokens.len(), tokens.len() * width * 8, |t| {
        // SAFETY: row `t` of `out`, which no other unit writes.
        let row = unsafe { std::slice::from_raw_parts_mut(rows.at(t * width), width) };
        for (k, value) in row.iter_mut().enumerate() {
            *value = element(tokens[t] as usize, k);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{Dtype, HostData};
    use crate::linear::WeightPart;
    use crate::test_support::Random;

    #[test]
    fn the_kernel_agrees_on_the_emulator() {
        crate::device::testing::on_every_schedule(check::check);
    }

    #[test]
    fn rows_are_the_weights_rounded_once() {
        let (vocab, hidden) = (71, 37);
        let values = Random::new(1).values(vocab * hidden);
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let part = WeightPart { data: HostData::F32(&values), d_out: vocab, d_in: hidden };
            let w = PackedWeight::pack(dtype, &[part]).unwrap();
            let mut out = Rows::zeros(4, hidden);
            embedding(&mut out, &w, &[70, 0, 31]).unwrap();
            for (t, token) in [70usize, 0, 31].into_iter().enumerate() {
                let want: Vec<f32> = values[token * hidden..][..hidden].iter().map(|&v| dtype.round(v)).collect();
                assert_eq!(out.row(t), want, "{dtype:?} token {token}");
            }
            assert!(matches!(embedding(&mut out, &w, &[71]), Err(OpError::Limit { .. })));
            assert!(matches!(embedding(&mut out, &w, &[0; 5]), Err(OpError::Limit { .. })));
        }
    }
}
