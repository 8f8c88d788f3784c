//! The definition and the vector form.

use crate::parallel::{self, SharedMut};
use crate::rows::RowsOut;
use crate::simd::{Isa, Kernel, LANES, Simd};

/// Rows of a unit of work.
const ROWS_PER_UNIT: usize = 4;

/// The definition.
#[cfg(test)]
pub(super) fn reference(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    for (out, x) in out.chunks_mut(width).zip(x.chunks(width)) {
        let mut lanes = [0.0f32; LANES];
        for (k, x) in x.iter().enumerate() {
            lanes[k % LANES] = x.mul_add(*x, lanes[k % LANES]);
        }
        let r = 1.0 / (crate::simd::sum_lanes(&lanes) / width as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = (x * r) * weight;
        }
    }
}

pub(super) fn rms_norm(isa: Isa, out: RowsOut, x: &[f32], weight: &[f32], eps: f32) {
    let (rows, width) = (out.rows(), out.width());
    parallel::for_each(rows.div_ceil(ROWS_PER_UNIT), x.len() / 4, |unit| {
        for row in unit * ROWS_PER_UNIT..((unit + 1) * ROWS_PER_UNIT).min(rows) {
            isa.run(Norm { out, row, x: &x[row * width..][..width], weight, eps });
        }
    });
}

pub(super) fn add_rms_norm(isa: Isa, out: RowsOut, residual: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let (rows, width) = (out.rows(), out.width());
    let residual = SharedMut::new(residual);
    parallel::for_each(rows.div_ceil(ROWS_PER_UNIT), x.len() / 3, |unit| {
        for row in unit * ROWS_PER_UNIT..((unit + 1) * ROWS_PER_UNIT).min(rows) {
            // SAFETY: row `row` of the residual, which is as long as `x`; no other unit has it.
            let residual = unsafe { std::slice::from_raw_parts_mut(residual.at(row * width), width) };
            isa.run(Add { residual, x: &x[row * width..][..width] });
            isa.run(Norm { out, row, x: residual, weight, eps });
        }
    });
}

/// `residual += x`, one row.
struct Add<'a> {
    residual: &'a mut [f32],
    x: &'a [f32],
}

impl Kernel for Add<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (residual, x) in self.residual.chunks_mut(LANES).zip(self.x.chunks(LANES)) {
            // SAFETY: the two chunks have the same length.
            unsafe {
                let sum = s.add(s.load_part(residual.as_ptr(), x.len()), s.load_part(x.as_ptr(), x.len()));
                s.store_part(residual.as_mut_ptr(), sum, x.len());
            }
        }
    }
}

/// One row.
struct Norm<'a> {
    out: RowsOut,
    row: usize,
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Kernel for Norm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { out, row, x, weight, eps } = self;
        let mut sum = s.splat(0.0);
        for x in x.chunks(LANES) {
            // SAFETY: the chunk has this many elements. Lanes after it are zero, and adding 0 * 0 changes no sum of squares.
            let x = unsafe { s.load_part(x.as_ptr(), x.len()) };
            sum = s.fma(x, x, sum);
        }
        let r = s.splat(1.0 / (s.sum(sum) / x.len() as f32 + eps).sqrt());
        for (i, (x, weight)) in x.chunks(LANES).zip(weight.chunks(LANES)).enumerate() {
            let count = x.len();
            // SAFETY: the two chunks have the same length; the row is this unit's alone.
            unsafe {
                let (x, weight) = (s.load_part(x.as_ptr(), count), s.load_part(weight.as_ptr(), count));
                out.store(s, row, i * LANES, s.mul(s.mul(x, r), weight), count);
            }
        }
    }
}
