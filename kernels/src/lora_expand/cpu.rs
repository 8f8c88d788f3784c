//! The definition and the vector form: lanes are outputs.

use crate::arena::Arena;
use crate::dtype::Dtype;
use crate::linear::tile::{Operands, Pairs, Single};
use crate::lora::{AdapterTable, LoraSite, RANK_BLOCK, Run, WorkList, b_elements};
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;
use crate::simd::{Isa, Kernel, LANES, Line, Simd};
use std::marker::PhantomData;
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

/// Up to so many rows, B's way from memory is the work.
const ROWS_FETCHED_AHEAD: usize = 4;
/// How far ahead of its use B is asked for where nothing else comes next, in lines.
const LINES_AHEAD: usize = 64;

/// Checked arguments of the op.
#[derive(Clone, Copy)]
pub(crate) struct Expand<'a> {
    pub(crate) v: Halves<'a>,
    pub(crate) arena: &'a Arena,
    pub(crate) table: &'a AdapterTable,
    pub(crate) layer: usize,
    pub(crate) site: &'a LoraSite,
    pub(crate) work: &'a WorkList,
}

/// `v: [planes][slices][16]`, whose rows other threads may write while a row that is done is read.
#[derive(Clone, Copy)]
pub(crate) struct Halves<'a> {
    values: SharedMut<f32>,
    count: usize,
    of: PhantomData<&'a [f32]>,
}

impl<'a> Halves<'a> {
    /// Of values that are being written.
    pub(crate) fn new(values: &'a mut [f32]) -> Self {
        Self { values: SharedMut::new(values), count: values.len() / RANK_BLOCK, of: PhantomData }
    }

    /// Of values that are all written.
    pub(crate) fn done(values: &'a [f32]) -> Self {
        Self { values: SharedMut::of_read(values), count: values.len() / RANK_BLOCK, of: PhantomData }
    }

    /// Where they are written.
    pub(crate) const fn values(self) -> SharedMut<f32> {
        self.values
    }

    /// The 16 ranks of a plane's slice. Nobody may write them any more.
    #[inline(always)]
    pub(crate) fn of(&self, index: usize) -> &'a [f32; RANK_BLOCK] {
        assert!(index < self.count);
        // SAFETY: inside the slice this was made from; who reads has waited until these are written.
        unsafe { &*self.values.at(index * RANK_BLOCK).cast() }
    }
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
                let v = expand.v.of((item.plane as usize + t) * slices + slice);
                for o in 0..d_out {
                    let weight = |r: usize| crate::lora::b_at(dtype, b, r, o);
                    let v = |r: usize| dtype.round(scale * v[r]);
                    let y = &mut y.as_f32_mut()[(item.first_row as usize + t) * width + first + o];
                    *y = match dtype {
                        Dtype::F32 => (0..RANK_BLOCK).fold(*y, |sum, r| v(r).mul_add(weight(r), sum)),
                        Dtype::Bf16 => (0..RANK_BLOCK)
                            .step_by(2)
                            .fold(*y, |sum, r| v(r).mul_add(weight(r), v(r + 1).mul_add(weight(r + 1), sum))),
                    };
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
    pub(super) run: usize,
    pub(super) item: usize,
    pub(super) slice: usize,
    pub(super) dtype: Dtype,
    pub(super) b: &'a [u8],
    pub(super) scale: f32,
}

impl<'a> Expand<'a> {
    /// What the first half made of a row of an item.
    #[inline(always)]
    pub(super) fn v_of(&self, item: usize, slice: usize, row: usize) -> &'a [f32; RANK_BLOCK] {
        let plane = self.work.items[item].plane as usize + row;
        self.v.of(plane * self.site.slices.len() + slice)
    }

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

    /// Whether [`Fused`](super::fused::Fused) is for it.
    pub(crate) fn is_long(&self, found: &Found) -> bool {
        super::fused::is_long(&self.work.runs[found.run].rows)
    }

    /// Asks for what [`Self::add_block`] will read.
    pub(crate) fn fetch_block(&self, isa: Isa, rows: &Range<usize>, columns: &Range<usize>, found: &[Found]) {
        isa.run(FetchBlock { expand: self, rows, columns, found });
    }

    /// Adds all deltas of a run to columns of `y` that begin at a multiple of 16 and end at one or with `y`.
    ///
    /// # Safety
    /// Rows and columns must be in `y`, `[rows][width]`, and nobody else's; the run's v must be done.
    pub(crate) unsafe fn add_columns(
        &self,
        isa: Isa,
        y: SharedMut<f32>,
        width: usize,
        run: usize,
        columns: &Range<usize>,
    ) {
        for slice in 0..self.site.slices.len() {
            let rows = self.work.runs[run].rows.clone();
            if let Some((rows, columns)) = self.meet(run, slice, &rows, columns) {
                isa.run(Unit { expand: self, y, width, run: &self.work.runs[run], rows, slice, columns });
            }
        }
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

/// Asks for B of a block of y.
struct FetchBlock<'a> {
    expand: &'a Expand<'a>,
    rows: &'a Range<usize>,
    columns: &'a Range<usize>,
    found: &'a [Found<'a>],
}

impl Kernel for FetchBlock<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for found in self.found {
            let Some((_, columns)) = self.expand.meet(found.run, found.slice, self.rows, self.columns) else {
                continue;
            };
            let column_bytes = RANK_BLOCK * found.dtype.bytes();
            for at in (columns.start * column_bytes..columns.end * column_bytes).step_by(size_of::<Line>()) {
                s.prefetch_far(found.b.as_ptr().wrapping_add(at));
            }
        }
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
        for &Found { run, item, slice, dtype, b, scale } in found {
            let Some((rows, columns)) = expand.meet(run, slice, rows, columns) else { continue };
            let (row, column) = (expand.work.runs[run].rows.start, expand.site.cols[slice].0);
            let to = Target { y, width, row, column, scale };
            Delta { expand, item, slice, rows, columns, b, ahead: further(b) }.run(s, dtype, to);
        }
    }
}

impl Expand<'_> {
    /// What a block of y has of a run's rows and a slice's columns, counted from their firsts.
    #[inline(always)]
    fn meet(
        &self,
        run: usize,
        slice: usize,
        rows: &Range<usize>,
        columns: &Range<usize>,
    ) -> Option<(Range<usize>, Range<usize>)> {
        let run = &self.work.runs[run].rows;
        let (first, d_out) = self.site.cols[slice];
        let (top, bottom) = (rows.start.max(run.start), rows.end.min(run.end));
        let (left, right) = (columns.start.max(first), columns.end.min(first + d_out));
        (top < bottom && left < right).then(|| (top - run.start..bottom - run.start, left - first..right - first))
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
        let Self { expand, y, width, run, slice, .. } = self;
        for item in run.items.clone() {
            let Some((dtype, b, scale)) = expand.b_block(item, slice) else { continue };
            let to = Target { y, width, row: run.rows.start, column: expand.site.cols[slice].0, scale };
            let (rows, columns) = (self.rows.clone(), self.columns.clone());
            let next = (item + 1 < expand.work.items.len()).then(|| expand.b_block(item + 1, slice)).flatten();
            let ahead = next.map_or_else(|| further(b), |(_, b, _)| b.as_ptr());
            Delta { expand, item, slice, rows, columns, b, ahead }.run(s, dtype, to);
        }
    }
}

/// Where sums go on: `y: [rows][width]`.
#[derive(Clone, Copy)]
struct Target {
    y: SharedMut<f32>,
    width: usize,
    /// First row of the item and first column of the slice.
    row: usize,
    column: usize,
    scale: f32,
}

/// The sums of one item and slice: rows counted from the item's first, columns from the slice's.
struct Delta<'a> {
    expand: &'a Expand<'a>,
    item: usize,
    slice: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    b: &'a [u8],
    /// What is asked for while B is read: as much of it.
    ahead: *const u8,
}

/// What to ask for where nothing else comes next.
fn further(b: &[u8]) -> *const u8 {
    b.as_ptr().wrapping_add(LINES_AHEAD * size_of::<Line>())
}

/// The v of a tile's rows as [`Operands`] read them.
type Inputs = [[u32; RANK_BLOCK]; TILE_ROWS];

impl Delta<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, dtype: Dtype, to: Target) {
        match dtype {
            Dtype::F32 => self.all::<S, Single>(s, &to),
            Dtype::Bf16 => self.all::<S, Pairs>(s, &to),
        }
    }

    #[inline(always)]
    fn all<S: Simd, O: Operands>(&self, s: S, to: &Target) {
        let rows_max = if S::TILE_ROWS > 3 { TILE_ROWS } else { S::TILE_ROWS };
        let mut row = self.rows.start;
        while row < self.rows.end {
            let rows = (self.rows.end - row).min(rows_max);
            let mut v: Inputs = [[0; RANK_BLOCK]; TILE_ROWS];
            for (t, v) in v.iter_mut().enumerate().take(rows) {
                self.inputs::<S, O>(s, row + t, to.scale, v);
            }
            match rows {
                1 => self.tiles::<S, O, 1>(s, to, row, &v),
                2 => self.tiles::<S, O, 2>(s, to, row, &v),
                3 => self.tiles::<S, O, 3>(s, to, row, &v),
                4 => self.tiles::<S, O, 4>(s, to, row, &v),
                5 => self.tiles::<S, O, 5>(s, to, row, &v),
                _ => self.tiles::<S, O, 6>(s, to, row, &v),
            }
            row += rows;
        }
    }

    #[inline(always)]
    fn inputs<S: Simd, O: Operands>(&self, s: S, row: usize, scale: f32, out: &mut [u32; RANK_BLOCK]) {
        let v = self.expand.v_of(self.item, self.slice, row);
        // SAFETY: 16 f32 are read, and 16 f32 or bf16 are written.
        unsafe {
            let values = s.mul(s.splat(scale), s.load(v.as_ptr()));
            if O::PER_WORD == 1 {
                s.store(out.as_mut_ptr().cast(), values);
            } else {
                s.store_bf16(out.as_mut_ptr().cast(), values);
            }
        }
    }

    #[inline(always)]
    fn tiles<S: Simd, O: Operands, const M: usize>(&self, s: S, to: &Target, row: usize, v: &Inputs) {
        let Range { start: mut column, end } = self.columns;
        while column < end {
            if S::TILE_ROWS > 3 && column + 4 * LANES <= end {
                self.tile::<S, O, M, 4>(s, to, row, column, v);
                column += 4 * LANES;
            } else if S::TILE_ROWS > 3 && column + 3 * LANES <= end {
                self.tile::<S, O, M, 3>(s, to, row, column, v);
                column += 3 * LANES;
            } else if column + 2 * LANES <= end {
                self.tile::<S, O, M, 2>(s, to, row, column, v);
                column += 2 * LANES;
            } else {
                self.tile::<S, O, M, 1>(s, to, row, column, v);
                column += LANES;
            }
        }
    }

    /// `M` rows, `N` vectors of columns.
    #[inline(always)]
    fn tile<S: Simd, O: Operands, const M: usize, const N: usize>(
        &self,
        s: S,
        to: &Target,
        row: usize,
        column: usize,
        v: &Inputs,
    ) {
        if const { M > S::TILE_ROWS } {
            return; // never asked for; spares the compiler the code
        }
        let d_out = self.expand.site.cols[self.slice].1;
        let lines = RANK_BLOCK / O::INPUTS;
        let bytes = lines * size_of::<Line>();
        assert!(self.b.len() >= d_out.div_ceil(LANES) * bytes && column + (N - 1) * LANES < d_out);
        // SAFETY: `column` starts a panel, and `column + 16 n` is below d_out: all lines of these panels are in the block.
        let b: *const Line = unsafe { self.b.as_ptr().add(column / LANES * bytes) }.cast();
        let ahead: *const Line = self.ahead.wrapping_add(column / LANES * bytes).cast();
        // SAFETY: row and columns are in `y` (`lora_expand` checked), and only this unit has them.
        let at =
            |m: usize, n: usize| unsafe { to.y.at((to.row + row + m) * to.width + to.column + column + n * LANES) };
        let lanes = |n: usize| (self.columns.end - column - n * LANES).min(LANES);
        // SAFETY: as above.
        let mut acc: [[S::V; N]; M] =
            std::array::from_fn(|m| std::array::from_fn(|n| unsafe { s.load_part(at(m, n), lanes(n)) }));
        for line in 0..lines {
            // SAFETY: as above; a prefetch may go anywhere.
            let weights: [O::W<S>; N] = std::array::from_fn(|n| unsafe {
                if M <= ROWS_FETCHED_AHEAD {
                    s.prefetch_far(ahead.wrapping_add(n * lines + line).cast());
                }
                O::weights(s, b.add(n * lines + line))
            });
            for (acc, v) in acc.iter_mut().zip(v) {
                // SAFETY: the line's inputs are among the 16 ranks.
                let v = unsafe { O::inputs(s, v.as_ptr().add(line * O::INPUTS / O::PER_WORD)) };
                for (acc, weights) in acc.iter_mut().zip(&weights) {
                    *acc = O::add(s, *acc, v, *weights);
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                // SAFETY: as above.
                unsafe { s.store_part(at(m, n), *acc, lanes(n)) };
            }
        }
    }
}
