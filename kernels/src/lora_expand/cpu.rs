//! The definition and the vector form: lanes are outputs.

use crate::arena::Arena;
use crate::dtype::Dtype;
use crate::linear::tile::{Operands, Pairs, Single};
use crate::lora::{AdapterTable, LoraSite, RANK_BLOCK, Run, WorkList, b_elements};
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;
use crate::simd::{Isa, Kernel, LANES, Line, Simd};
use std::ops::Range;

/// Columns of a slice that one unit of work takes: with few runs so few that all threads have some, with many runs a whole
/// slice mostly, because each beginning waits for memory.
const COLUMNS_PER_UNIT: usize = 512;
const COLUMNS_PER_UNIT_OF_MANY: usize = 4096;
const MANY_RUNS: usize = 8;
/// Rows of a run that one unit of work takes.
const ROWS_PER_UNIT: usize = 96;
/// Rows of a tile at most.
const TILE_ROWS: usize = 6;

/// How far ahead of its use B is asked for, in lines; as much of the next run's B is asked for at the start of one.
const LINES_AHEAD: usize = 64;

/// Checked arguments of the op.
#[derive(Clone, Copy)]
pub(crate) struct Expand<'a> {
    pub(crate) v: &'a [f32],
    pub(crate) arena: &'a Arena,
    pub(crate) table: &'a AdapterTable,
    pub(crate) layer: usize,
    pub(crate) site: &'a LoraSite,
    pub(crate) work: &'a WorkList,
}

impl Expand<'_> {
    /// Type, B block and scale of one item and slice; `None` if the adapter leaves the matrix alone.
    fn b_block(&self, item: usize, slice: usize) -> Option<(Dtype, &[u8], f32)> {
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
            for t in 0..item.rows as usize {
                let v = &expand.v[((item.plane as usize + t) * slices + slice) * RANK_BLOCK..][..RANK_BLOCK];
                for o in 0..d_out {
                    let weight = |r: usize| crate::lora::b_at(dtype, b, r, o);
                    let d = match dtype {
                        Dtype::F32 => (0..RANK_BLOCK).fold(0.0f32, |sum, r| v[r].mul_add(weight(r), sum)),
                        Dtype::Bf16 => (0..RANK_BLOCK).step_by(2).fold(0.0f32, |sum, r| {
                            let odd = dtype.round(v[r + 1]).mul_add(weight(r + 1), sum);
                            dtype.round(v[r]).mul_add(weight(r), odd)
                        }),
                    };
                    let y = &mut y.as_f32_mut()[(item.first_row as usize + t) * width + first + o];
                    *y = scale.mul_add(d, *y);
                }
            }
        }
    }
}

pub(crate) fn lora_expand(isa: Isa, y: &mut Rows, expand: &Expand) {
    let Expand { site, work, .. } = expand;
    let columns_per_unit = if work.runs.len() < MANY_RUNS { COLUMNS_PER_UNIT } else { COLUMNS_PER_UNIT_OF_MANY };
    let column_parts: usize = site.cols.iter().map(|(_, d_out)| d_out.div_ceil(columns_per_unit)).sum();
    let row_parts = work.runs.iter().map(|run| run.rows.len().div_ceil(ROWS_PER_UNIT)).max().unwrap_or(0);
    let columns: usize = site.cols.iter().map(|(_, d_out)| d_out).sum();
    let width = y.width();
    let y = SharedMut::new(y.as_f32_mut());
    parallel::for_each(work.runs.len() * column_parts * row_parts, work.planes * columns / 3, |unit| {
        let run = &work.runs[unit / (column_parts * row_parts)];
        let row_part = unit / column_parts % row_parts;
        let rows = row_part * ROWS_PER_UNIT..((row_part + 1) * ROWS_PER_UNIT).min(run.rows.len());
        let mut part = unit % column_parts;
        for (slice, &(_, d_out)) in site.cols.iter().enumerate() {
            let count = d_out.div_ceil(columns_per_unit);
            if part < count {
                let first = part * columns_per_unit;
                let columns = first..(first + columns_per_unit).min(d_out);
                return isa.run(Unit { expand, y, width, run, rows, slice, columns });
            }
            part -= count;
        }
    });
}

/// What one item adds to one slice, looked up.
#[derive(Clone, Copy)]
pub(crate) struct Found<'a> {
    run: usize,
    item: usize,
    slice: usize,
    dtype: Dtype,
    b: &'a [u8],
    scale: f32,
}

impl<'a> Expand<'a> {
    /// All deltas of the site, run after run and each in the order in which its items are added.
    pub(crate) fn found(&'a self) -> Vec<Found<'a>> {
        let slices = self.site.slices.len();
        let runs = self.work.runs.iter().enumerate();
        let all =
            runs.flat_map(|(run, of)| of.items.clone().flat_map(move |item| (0..slices).map(move |s| (run, item, s))));
        all.filter_map(|(run, item, slice)| {
            let (dtype, b, scale) = self.b_block(item, slice)?;
            Some(Found { run, item, slice, dtype, b, scale })
        })
        .collect()
    }

    /// Whether the slices begin where panels of 16 columns do, as [`Self::add_block`] needs it.
    pub(crate) fn is_in_panels(&self) -> bool {
        self.site.cols.iter().all(|(first, _)| first.is_multiple_of(LANES))
    }

    /// Adds the deltas to a block of `y`, whose columns begin at a multiple of 16 and end at one or with `y`.
    ///
    /// # Safety
    /// Rows and columns must be in `y`, `[rows][width]`, and nobody else's.
    #[expect(clippy::too_many_arguments, reason = "a place in y; a struct would only rename them")]
    pub(crate) unsafe fn add_block(
        &self,
        isa: Isa,
        y: SharedMut<f32>,
        width: usize,
        rows: Range<usize>,
        columns: Range<usize>,
        found: &[Found],
    ) {
        isa.run(Block { expand: self, y, width, rows, columns, found });
    }
}

/// A block of y.
struct Block<'a> {
    expand: &'a Expand<'a>,
    y: SharedMut<f32>,
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    found: &'a [Found<'a>],
}

impl Kernel for Block<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { expand, y, width, ref rows, ref columns, found } = self;
        for delta in found {
            let run = &expand.work.runs[delta.run];
            let (first, d_out) = expand.site.cols[delta.slice];
            let (top, bottom) = (rows.start.max(run.rows.start), rows.end.min(run.rows.end));
            let (left, right) = (columns.start.max(first), columns.end.min(first + d_out));
            if top >= bottom || left >= right {
                continue;
            }
            let (rows, columns) = (top - run.rows.start..bottom - run.rows.start, left - first..right - first);
            let unit = Unit { expand, y, width, run, rows, slice: delta.slice, columns };
            let dtype = delta.dtype;
            let delta = Delta { unit: &unit, item: delta.item, b: delta.b, scale: delta.scale };
            match dtype {
                Dtype::F32 => delta.rows::<S, Single>(s),
                Dtype::Bf16 => delta.rows::<S, Pairs>(s),
            }
        }
    }
}

/// Columns of one slice for rows of a run (counted from its first), all its items.
struct Unit<'a> {
    expand: &'a Expand<'a>,
    y: SharedMut<f32>,
    width: usize,
    run: &'a Run,
    rows: Range<usize>,
    slice: usize,
    columns: Range<usize>,
}

impl Kernel for Unit<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.rows.len() == 1
            && let Some((_, b, _)) = self.next_block()
        {
            for line in 0..LINES_AHEAD {
                s.prefetch_far(b.as_ptr().wrapping_add(line * size_of::<Line>()));
            }
        }
        for item in self.run.items.clone() {
            let Some((dtype, b, scale)) = self.expand.b_block(item, self.slice) else { continue };
            let delta = Delta { unit: &self, item, b, scale };
            match dtype {
                Dtype::F32 => delta.rows::<S, Single>(s),
                Dtype::Bf16 => delta.rows::<S, Pairs>(s),
            }
        }
    }
}

impl Unit<'_> {
    /// The B that a thread most likely needs after this unit: of the next slice, or of the next run's first.
    fn next_block(&self) -> Option<(Dtype, &[u8], f32)> {
        let item = self.run.items.start;
        match self.slice + 1 < self.expand.site.cols.len() {
            true => self.expand.b_block(item, self.slice + 1),
            false if self.run.items.end < self.expand.work.items.len() => self.expand.b_block(self.run.items.end, 0),
            false => None,
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

/// The v of a tile's rows as [`Operands`] read them.
type Inputs = [[u32; RANK_BLOCK]; TILE_ROWS];

impl Delta<'_> {
    #[inline(always)]
    fn rows<S: Simd, O: Operands>(&self, s: S) {
        let rows_max = if S::TILE_ROWS > 3 { TILE_ROWS } else { S::TILE_ROWS };
        let mut row = self.unit.rows.start;
        while row < self.unit.rows.end {
            let rows = (self.unit.rows.end - row).min(rows_max);
            let mut v: Inputs = [[0; RANK_BLOCK]; TILE_ROWS];
            for (t, v) in v.iter_mut().enumerate().take(rows) {
                self.inputs::<S, O>(s, row + t, v);
            }
            match rows {
                1 => self.columns::<S, O, 1>(s, row, &v),
                2 => self.columns::<S, O, 2>(s, row, &v),
                3 => self.columns::<S, O, 3>(s, row, &v),
                4 => self.columns::<S, O, 4>(s, row, &v),
                5 => self.columns::<S, O, 5>(s, row, &v),
                _ => self.columns::<S, O, 6>(s, row, &v),
            }
            row += rows;
        }
    }

    #[inline(always)]
    fn inputs<S: Simd, O: Operands>(&self, s: S, row: usize, out: &mut [u32; RANK_BLOCK]) {
        let Unit { expand, slice, .. } = *self.unit;
        let plane = expand.work.items[self.item].plane as usize + row;
        let v = &expand.v[(plane * expand.site.slices.len() + slice) * RANK_BLOCK..][..RANK_BLOCK];
        // SAFETY: 16 f32 are read, and 16 f32 or bf16 are written.
        unsafe {
            let values = s.load(v.as_ptr());
            if O::PER_WORD == 1 {
                s.store(out.as_mut_ptr().cast(), values);
            } else {
                s.store_bf16(out.as_mut_ptr().cast(), values);
            }
        }
    }

    #[inline(always)]
    fn columns<S: Simd, O: Operands, const M: usize>(&self, s: S, row: usize, v: &Inputs) {
        let Range { start: mut column, end } = self.unit.columns;
        while column < end {
            if S::TILE_ROWS > 3 && column + 4 * LANES <= end {
                self.tile::<S, O, M, 4>(s, row, column, v);
                column += 4 * LANES;
            } else if column + 2 * LANES <= end {
                self.tile::<S, O, M, 2>(s, row, column, v);
                column += 2 * LANES;
            } else {
                self.tile::<S, O, M, 1>(s, row, column, v);
                column += LANES;
            }
        }
    }

    /// `M` rows, `N` vectors of columns.
    #[inline(always)]
    fn tile<S: Simd, O: Operands, const M: usize, const N: usize>(&self, s: S, row: usize, column: usize, v: &Inputs) {
        if const { M > S::TILE_ROWS } {
            return; // never asked for; spares the compiler the code
        }
        let Unit { expand, y, width, run, slice, ref columns, .. } = *self.unit;
        let (first, d_out) = expand.site.cols[slice];
        let lines = RANK_BLOCK / O::INPUTS;
        let bytes = lines * size_of::<Line>();
        assert!(self.b.len() >= d_out.div_ceil(LANES) * bytes && column + (N - 1) * LANES < d_out);
        // SAFETY: `column` starts a panel, and `column + 16 n` is below d_out: all lines of these panels are in the block.
        let b: *const Line = unsafe { self.b.as_ptr().add(column / LANES * bytes) }.cast();
        let mut acc = [[s.splat(0.0); N]; M];
        for line in 0..lines {
            // SAFETY: as above; a prefetch may go anywhere.
            let weights: [O::W<S>; N] = std::array::from_fn(|n| unsafe {
                let at = b.add(n * lines + line);
                if M == 1 {
                    s.prefetch(at.wrapping_add(LINES_AHEAD).cast());
                }
                O::weights(s, at)
            });
            for (acc, v) in acc.iter_mut().zip(v) {
                // SAFETY: the line's inputs are among the 16 ranks.
                let v = unsafe { O::inputs(s, v.as_ptr().add(line * O::INPUTS / O::PER_WORD)) };
                for (acc, weights) in acc.iter_mut().zip(&weights) {
                    *acc = O::add(s, *acc, v, *weights);
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
