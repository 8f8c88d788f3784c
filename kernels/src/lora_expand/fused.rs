//! Deltas that a product adds while its sums are in registers: one more piece of the same chains.

use crate::dtype::Dtype;
use crate::lora::RANK_BLOCK;
use crate::lora_expand::cpu::{Expand, Found};
use crate::simd::{LANES, Line, Simd};
use std::ops::Range;

/// Lines of a panel of a block of B: one for each pair of ranks.
const LINES: usize = RANK_BLOCK / 2;

/// Runs of fewer rows are left to [`Expand::add_block`]: tiles that end where adapters change would be too small.
const ROWS_MIN: usize = 8;

/// Whether the deltas of a run are for a product to add.
pub(crate) fn is_long(rows: &Range<usize>) -> bool {
    rows.len() >= ROWS_MIN
}

/// Deltas of long runs and the columns of one slice.
pub(crate) struct Fused<'a> {
    expand: &'a Expand<'a>,
    found: &'a [Found<'a>],
    slice: usize,
}

/// Those of one run's rows.
#[derive(Clone, Copy)]
pub(crate) struct OfRun<'a> {
    all: &'a Fused<'a>,
    found: &'a [Found<'a>],
    first_row: usize,
}

impl<'a> Fused<'a> {
    /// Of columns that lie in one slice, and of adapters in bf16 alone; otherwise `None`. `found` is what
    /// [`Expand::found`] gave of long runs.
    pub(crate) fn of(expand: &'a Expand<'a>, found: &'a [Found<'a>], columns: &Range<usize>) -> Option<Self> {
        let is_inside = |&(first, d_out): &(usize, usize)| first <= columns.start && columns.end <= first + d_out;
        let slice = expand.site.cols.iter().position(is_inside)?;
        found.iter().all(|found| found.dtype == Dtype::Bf16).then_some(Self { expand, found, slice })
    }

    /// Where the first rows of `rows` end that have the same adapters, and these, if they have some.
    pub(crate) fn span(&self, rows: &Range<usize>) -> (usize, Option<OfRun<'_>>) {
        let run_of = |found: &Found| self.expand.work.runs[found.run].rows.clone();
        let first = self.found.partition_point(|found| run_of(found).end <= rows.start);
        let Some(run) = self.found.get(first).map(run_of).filter(|run| run.start < rows.end) else {
            return (rows.end, None);
        };
        if run.start > rows.start {
            return (run.start, None);
        }
        let count = self.found[first..].partition_point(|found| run_of(found) == run);
        let of = OfRun { all: self, found: &self.found[first..first + count], first_row: run.start };
        (run.end.min(rows.end), Some(of))
    }
}

impl OfRun<'_> {
    /// Adds to the sums of rows from `row` and panels from `column` on, which lie in the slice.
    #[inline(always)]
    pub(crate) fn add<S: Simd, const M: usize, const P: usize>(
        &self,
        s: S,
        acc: &mut [[S::V; P]; M],
        row: usize,
        column: usize,
    ) {
        let Fused { expand, slice, .. } = *self.all;
        let (first, d_out) = expand.site.cols[slice];
        let panel = (column - first) / LANES;
        assert!(panel + P <= d_out.div_ceil(LANES));
        for found in self.found.iter().filter(|found| found.slice == slice) {
            let mut v = [[0u32; LINES]; M];
            for (m, v) in v.iter_mut().enumerate() {
                let values = expand.v_of(found.item, slice, row - self.first_row + m);
                // SAFETY: 16 f32 are read and 16 bf16 written.
                unsafe { s.store_bf16(v.as_mut_ptr().cast(), s.mul(s.splat(found.scale), s.load(values.as_ptr()))) };
            }
            assert!(found.b.len() >= d_out.div_ceil(LANES) * LINES * size_of::<Line>());
            // SAFETY: these panels are in the block, as asserted.
            let b: *const Line = unsafe { found.b.as_ptr().cast::<Line>().add(panel * LINES) };
            for line in 0..LINES {
                // SAFETY: as above.
                let weights: [S::V; P] = std::array::from_fn(|p| unsafe { s.load(b.add(p * LINES + line).cast()) });
                for (acc, v) in acc.iter_mut().zip(&v) {
                    for (acc, weights) in acc.iter_mut().zip(&weights) {
                        *acc = s.dot(*acc, v[line], *weights);
                    }
                }
            }
        }
    }
}
