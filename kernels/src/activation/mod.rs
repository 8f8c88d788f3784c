//! `out[t, k] = g / (1 + e^-g) * u` with `g = gate_up[t, k]`, `u = gate_up[t, i + k]`: SwiGLU's gate (arXiv:2002.05202).
//!
//! `gate_up: [rows, 2 i]` f32, `out: [rows, i]` f32 or pairs of bf16 ([`Rows::hold_pairs`]). Elementwise, with the one `exp` of this crate. Allocates nothing.

pub(crate) mod check;
pub(crate) mod check_lora;
pub(crate) mod cuda;
pub(crate) mod cuda_lora;

use crate::error::{OpError, same};
use crate::parallel;
use crate::rows::{Rows, RowsOut};
use crate::simd::{Isa, Kernel, LANES, Simd, exp};

/// `out = silu(gate) * up`; `out` gets the rows of `gate_up`.
///
/// # Errors
/// [`OpError::Shape`] if `gate_up` is not twice as wide as `out`, [`OpError::Limit`] if `out` has no room.
pub fn silu_mul(out: &mut Rows, gate_up: &Rows) -> Result<(), OpError> {
    same("silu_mul", "width of gate_up", gate_up.width(), 2 * out.width())?;
    out.set_rows(gate_up.rows())?;
    run(Isa::best(), out.out(), gate_up.as_f32());
    Ok(())
}

fn run(isa: Isa, out: RowsOut, gate_up: &[f32]) {
    let (rows, width) = (out.rows(), out.width());
    parallel::for_each(rows, rows * width / 2, |row| {
        let (gate, up) = gate_up[2 * row * width..][..2 * width].split_at(width);
        isa.run(SiluMul { out, row, gate, up });
    });
}

/// One row.
struct SiluMul<'a> {
    out: RowsOut,
    row: usize,
    gate: &'a [f32],
    up: &'a [f32],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { out, row, gate, up } = self;
        for (i, (gate, up)) in gate.chunks(LANES).zip(up.chunks(LANES)).enumerate() {
            let count = gate.len();
            // SAFETY: the two chunks have the same length; the row is this unit's alone.
            unsafe {
                let (gate, up) = (s.load_part(gate.as_ptr(), count), s.load_part(up.as_ptr(), count));
                let e = exp(s, s.sub(s.splat(0.0), gate));
                let silu = s.div(gate, s.add(s.splat(1.0), e));
                out.store(s, row, i * LANES, s.mul(silu, up), count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{Random, assert_close, assert_pairs, bits};

    #[test]
    fn every_instruction_set_gives_the_formula_and_the_same_bits() {
        for (seed, (rows, width)) in [(1, 1), (3, 17), (2, 64), (40, 1536)].into_iter().enumerate() {
            let values: Vec<f32> = Random::new(seed as u64).values(2 * rows * width).iter().map(|v| v * 20.0).collect();
            let mut out = Rows::zeros(rows, width);
            let mut run = |isa| {
                out.as_f32_mut().fill(f32::NAN);
                super::run(isa, out.out(), &values);
                out.as_f32().to_vec()
            };
            let first = run(Isa::Portable);
            let mut want = Vec::new();
            for row in values.chunks(2 * width) {
                let (gate, up) = row.split_at(width);
                want.extend(
                    gate.iter().zip(up).map(|(&g, &u)| f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u)),
                );
            }
            assert_close(&first, &want, 1e-6, "silu_mul");
            for isa in Isa::available() {
                assert_eq!(bits(&run(isa)), bits(&first), "{isa:?} {rows} x {width}");
                let mut pairs = Rows::zeros(rows, width);
                assert_pairs(&mut pairs, &first, |out| super::run(isa, out, &values));
            }
        }
    }

    #[test]
    fn the_kernel_agrees_on_the_emulator() {
        crate::device::testing::on_every_schedule(check::check);
    }

    #[test]
    fn the_kernel_with_deltas_agrees_on_the_emulator() {
        crate::device::testing::on_every_schedule(check_lora::check);
    }

    #[test]
    fn far_ends_are_finite() {
        let mut rows = Rows::zeros(1, 4);
        run(Isa::best(), rows.out(), &[-1e30, -100.0, 100.0, 1e30, 1.0, 1.0, 1.0, 1.0]);
        let out = rows.as_f32();
        assert!(out[0].abs() < 1e-7 && out[1].abs() < 1e-7, "{out:?}");
        assert_eq!(out[2..], [100.0, 1e30]);
    }

    #[test]
    fn shapes_that_disagree_are_refused() {
        let gate_up = Rows::zeros(2, 8);
        assert!(matches!(silu_mul(&mut Rows::zeros(2, 5), &gate_up), Err(OpError::Shape { .. })));
        assert!(matches!(silu_mul(&mut Rows::zeros(1, 4), &gate_up), Err(OpError::Limit { .. })));
    }
}
