//! The definition and the vector form: lanes are outputs.

use crate::arena::Arena;
use crate::lora::{AdapterTable, LoraSite, Run, WorkList};
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;
use crate::simd::{Isa, Kernel, LANES, Simd};
use std::ops::Range;

/// Columns of a slice that one unit of work takes, and what it keeps of a row as it came in.
const COLUMNS_PER_UNIT: usize = 512;

/// Checked arguments of the op.
pub(super) struct GainShift<'a> {
    pub(super) arena: &'a Arena,
    pub(super) table: &'a AdapterTable,
    pub(super) layer: usize,
    pub(super) site: &'a LoraSite,
    pub(super) work: &'a WorkList,
}

impl GainShift<'_> {
    /// Gains then shifts of an item's adapter, as bytes of f32, and the request's factor. An adapter has one item for each of
    /// its rank blocks, and one set of vectors: the first item stands for all.
    fn vectors(&self, item: usize, slice: usize) -> Option<(&[u8], f32)> {
        let item = &self.work.items[item];
        if item.rank_block != 0 {
            return None;
        }
        let vectors = self.table.vectors(item, self.layer, self.site.slices[slice]).ok().flatten()?;
        Some((self.arena.at_unit(vectors.unit, 2 * vectors.width as usize * size_of::<f32>()), item.scale))
    }
}

/// The definition.
#[cfg(test)]
pub(super) fn reference(y: &mut Rows, op: &GainShift) {
    let width = y.width();
    for run in &op.work.runs {
        for (slice, &(first, d_out)) in op.site.cols.iter().enumerate() {
            for row in run.rows.clone() {
                let y = &mut y.as_f32_mut()[row * width + first..][..d_out];
                let before = y.to_vec();
                for item in run.items.clone() {
                    let Some((bytes, factor)) = op.vectors(item, slice) else { continue };
                    let values = crate::test_support::decode(crate::ArenaDtype::F32, bytes);
                    for o in 0..d_out {
                        y[o] = factor.mul_add(values[o].mul_add(before[o], values[d_out + o]), y[o]);
                    }
                }
            }
        }
    }
}

pub(super) fn lora_gain_shift(isa: Isa, y: &mut Rows, op: &GainShift) {
    let GainShift { site, work, .. } = op;
    let parts: usize = site.cols.iter().map(|(_, d_out)| d_out.div_ceil(COLUMNS_PER_UNIT)).sum();
    let columns: usize = site.cols.iter().map(|(_, d_out)| d_out).sum();
    let rows: usize = work.runs.iter().map(|run| run.rows.len()).sum();
    let width = y.width();
    let y = SharedMut::new(y.as_f32_mut());
    parallel::for_each(work.runs.len() * parts, rows * columns / 8, |unit| {
        let run = &work.runs[unit / parts];
        let mut part = unit % parts;
        for (slice, &(_, d_out)) in site.cols.iter().enumerate() {
            let count = d_out.div_ceil(COLUMNS_PER_UNIT);
            if part < count {
                let first = part * COLUMNS_PER_UNIT;
                let columns = first..(first + COLUMNS_PER_UNIT).min(d_out);
                return isa.run(Unit { op, y, width, run, slice, columns });
            }
            part -= count;
        }
    });
}

/// Columns of one slice for a run of rows.
struct Unit<'a> {
    op: &'a GainShift<'a>,
    y: SharedMut<f32>,
    width: usize,
    run: &'a Run,
    slice: usize,
    columns: Range<usize>,
}

impl Kernel for Unit<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { op, run, slice, ref columns, .. } = self;
        if run.items.clone().all(|item| op.vectors(item, slice).is_none()) {
            return;
        }
        let (first, d_out) = op.site.cols[slice];
        for row in run.rows.clone() {
            let mut before = [0.0f32; COLUMNS_PER_UNIT];
            // SAFETY: row and columns are in `y` (the op checked), and only this unit has them.
            let y = unsafe {
                let at = self.y.at(row * self.width + first + columns.start);
                std::slice::from_raw_parts_mut(at, columns.len())
            };
            before[..y.len()].copy_from_slice(y);
            for item in run.items.clone() {
                let Some((values, factor)) = op.vectors(item, slice) else { continue };
                assert!(values.len() == 2 * d_out * size_of::<f32>());
                let factor = s.splat(factor);
                for at in (0..y.len()).step_by(LANES) {
                    let (column, count) = (columns.start + at, (y.len() - at).min(LANES));
                    // SAFETY: `count` columns from `column` on are below d_out, so gains and shifts have them, as y has.
                    unsafe {
                        let gains = values.as_ptr().cast::<f32>();
                        let (gain, shift) =
                            (s.load_part(gains.add(column), count), s.load_part(gains.add(d_out + column), count));
                        let delta = s.fma(gain, s.load_part(before.as_ptr().add(at), count), shift);
                        let y = y.as_mut_ptr().add(at);
                        s.store_part(y, s.fma(factor, delta, s.load_part(y, count)), count);
                    }
                }
            }
        }
    }
}
