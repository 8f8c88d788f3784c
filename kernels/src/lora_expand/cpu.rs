//! The definition and the vector form: lanes are outputs.

use crate::arena::Arena;
use crate::dtype::{ArenaDtype, Element};
use crate::lora::{AdapterTable, LoraSite, RANK_BLOCK, Run, WorkList, b_elements, b_index};
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;
use crate::simd::{Isa, Kernel, LANES, Simd};
use half::f16;
use std::ops::Range;

/// Columns of a slice that one unit of work takes.
const COLUMNS_PER_UNIT: usize = 512;

/// How far ahead of its use B is asked for.
const PREFETCH_BYTES: usize = 4096;

/// Checked arguments of the op.
pub(super) struct Expand<'a> {
    pub(super) v: &'a [f32],
    pub(super) arena: &'a Arena,
    pub(super) table: &'a AdapterTable,
    pub(super) layer: usize,
    pub(super) site: &'a LoraSite,
    pub(super) work: &'a WorkList,
}

impl Expand<'_> {
    /// Type, B block and scale of one item and slice; `None` if the adapter leaves the matrix alone.
    fn b_block(&self, item: usize, slice: usize) -> Option<(ArenaDtype, &[u8], f32)> {
        let item = &self.work.items[item];
        let (dtype, desc) = self.table.desc(item, self.layer, self.site.slices[slice]).ok().flatten()?;
        let bytes = b_elements(self.site.cols[slice].1) * dtype.bytes();
        Some((dtype, self.arena.at_unit(desc.b_unit, bytes), item.scale * desc.scale))
    }
}

/// The definition.
#[cfg(test)]
pub(super) fn reference(y: &mut Rows, expand: &Expand) {
    let (slices, width) = (expand.site.slices.len(), y.width());
    for (index, item) in expand.work.items.iter().enumerate() {
        for (slice, &(first, d_out)) in expand.site.cols.iter().enumerate() {
            let Some((dtype, b, scale)) = expand.b_block(index, slice) else { continue };
            let b = crate::test_support::decode(dtype, b);
            for t in 0..item.rows as usize {
                let v = &expand.v[((item.plane as usize + t) * slices + slice) * RANK_BLOCK..][..RANK_BLOCK];
                for o in 0..d_out {
                    let chain = |sum, (r, v): (usize, &f32)| v.mul_add(b[b_index(r, o)], sum);
                    let d = v.iter().enumerate().fold(0.0f32, chain);
                    let y = &mut y.as_f32_mut()[(item.first_row as usize + t) * width + first + o];
                    *y = scale.mul_add(d, *y);
                }
            }
        }
    }
}

pub(super) fn lora_expand(isa: Isa, y: &mut Rows, expand: &Expand) {
    let Expand { site, work, .. } = expand;
    let parts: usize = site.cols.iter().map(|(_, d_out)| d_out.div_ceil(COLUMNS_PER_UNIT)).sum();
    let columns: usize = site.cols.iter().map(|(_, d_out)| d_out).sum();
    let width = y.width();
    let y = SharedMut::new(y.as_f32_mut());
    parallel::for_each(work.runs.len() * parts, work.planes * columns / 3, |unit| {
        let run = &work.runs[unit / parts];
        let mut part = unit % parts;
        for (slice, &(_, d_out)) in site.cols.iter().enumerate() {
            let count = d_out.div_ceil(COLUMNS_PER_UNIT);
            if part < count {
                let first = part * COLUMNS_PER_UNIT;
                let columns = first..(first + COLUMNS_PER_UNIT).min(d_out);
                return isa.run(Unit { expand, y, width, run, slice, columns });
            }
            part -= count;
        }
    });
}

/// Columns of one slice for a run of rows, all its items.
struct Unit<'a> {
    expand: &'a Expand<'a>,
    y: SharedMut<f32>,
    width: usize,
    run: &'a Run,
    slice: usize,
    columns: Range<usize>,
}

impl Kernel for Unit<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for item in self.run.items.clone() {
            let Some((dtype, b, scale)) = self.expand.b_block(item, self.slice) else { continue };
            let delta = Delta { unit: &self, item, b, scale };
            match dtype {
                ArenaDtype::F32 => delta.columns::<S, f32>(s),
                ArenaDtype::F16 => delta.columns::<S, f16>(s),
            }
        }
    }
}

/// What one item adds to a unit.
struct Delta<'a> {
    unit: &'a Unit<'a>,
    item: usize,
    b: &'a [u8],
    scale: f32,
}

impl Delta<'_> {
    #[inline(always)]
    fn columns<S: Simd, E: Element>(&self, s: S) {
        macro_rules! rows {
            ($vectors:literal, $column:expr) => {{
                let mut row = 0;
                while row < self.unit.run.rows.len() {
                    let rows = (self.unit.run.rows.len() - row).min(S::TILE_ROWS).min(4);
                    match rows {
                        1 => self.tile::<S, E, 1, $vectors>(s, row, $column),
                        2 => self.tile::<S, E, 2, $vectors>(s, row, $column),
                        3 => self.tile::<S, E, 3, $vectors>(s, row, $column),
                        _ => self.tile::<S, E, 4, $vectors>(s, row, $column),
                    }
                    row += rows;
                }
            }};
        }
        let Range { start: mut column, end } = self.unit.columns;
        while column < end {
            if S::TILE_ROWS > 3 && column + 4 * LANES <= end {
                rows!(4, column);
                column += 4 * LANES;
            } else if column + 2 * LANES <= end {
                rows!(2, column);
                column += 2 * LANES;
            } else {
                rows!(1, column);
                column += LANES;
            }
        }
    }

    /// `M` rows, `N` vectors of columns.
    #[inline(always)]
    fn tile<S: Simd, E: Element, const M: usize, const N: usize>(&self, s: S, row: usize, column: usize) {
        if const { M > S::TILE_ROWS } {
            return; // never asked for; spares the compiler the code
        }
        let Unit { expand, y, width, run, slice, ref columns } = *self.unit;
        let item = &expand.work.items[self.item];
        let (first, d_out) = expand.site.cols[slice];
        let element_bytes = E::BYTES;
        assert!(self.b.len() >= b_elements(d_out) * element_bytes && column + (N - 1) * LANES < d_out);
        let slices = expand.site.slices.len();
        let v: [&[f32]; M] = std::array::from_fn(|m| {
            &expand.v[((item.plane as usize + row + m) * slices + slice) * RANK_BLOCK..][..RANK_BLOCK]
        });
        let mut acc = [[s.splat(0.0); N]; M];
        for r in 0..RANK_BLOCK {
            let mut weights = [s.splat(0.0); N];
            for (n, weights) in weights.iter_mut().enumerate() {
                // SAFETY: `column` starts a panel, and `column + 16 n` is below d_out: 16 outputs of rank r are in the block.
                unsafe {
                    let at = self.b.as_ptr().add(b_index(r, column + n * LANES) * element_bytes);
                    if M == 1 {
                        s.prefetch(at.wrapping_add(PREFETCH_BYTES));
                    }
                    *weights = E::load(s, at);
                }
            }
            for (acc, v) in acc.iter_mut().zip(&v) {
                let v = s.splat(v[r]);
                for (acc, weights) in acc.iter_mut().zip(&weights) {
                    *acc = s.fma(v, *weights, *acc);
                }
            }
        }
        let scale = s.splat(self.scale);
        for (m, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                let column = column + n * LANES;
                let count = (columns.end - column).min(LANES);
                // SAFETY: row and columns are in `y` (`lora_expand` checked), and only this unit has them.
                unsafe {
                    let at = y.at((run.rows.start + row + m) * width + first + column);
                    s.store_part(at, s.fma(scale, *acc, s.load_part(at, count)), count);
                }
            }
        }
    }
}
