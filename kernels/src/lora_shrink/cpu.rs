//! The definition and the vector form: lanes are ranks, and the matrices of a site share each read of x.

use crate::arena::Arena;
use crate::dtype::Dtype;
use crate::linear::input::{pair_stride, with_pairs};
use crate::linear::tile::{Operands, Pairs, Single};
use crate::lora::{AdapterTable, LoraSite, RANK_BLOCK, WorkList, a_bytes};
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;
use crate::simd::{Isa, Kernel, Line, Simd};
use std::ops::Range;

/// Rows of an item that one unit of work takes: at most, and at least where items are few.
const ROWS_PER_UNIT: usize = 48;
const ROWS_PER_UNIT_MIN: usize = 8;
/// Units a thread should get, where rows can be cut.
const UNITS_PER_THREAD: usize = 2;
/// Matrices that share a pass over x; more go in further passes.
const SLICES_PER_PASS: usize = 3;
/// Chains of a sum, taken in turn: one alone would wait for itself when a row has an adapter of its own.
const CHAINS: usize = 2;

/// Checked arguments of the op.
#[derive(Clone, Copy)]
pub(crate) struct Shrink<'a> {
    pub(crate) x: &'a Rows,
    /// x as pairs, where an adapter takes them.
    pub(crate) pairs: &'a [u32],
    pub(crate) arena: &'a Arena,
    pub(crate) table: &'a AdapterTable,
    pub(crate) layer: usize,
    pub(crate) site: &'a LoraSite,
    pub(crate) work: &'a WorkList,
}

impl Shrink<'_> {
    /// Type and A block of one item and slice; `None` if the adapter leaves the matrix alone.
    fn a_block(&self, item: usize, slice: usize) -> Option<(Dtype, &[u8])> {
        let found = self.table.desc(&self.work.items[item], self.layer, self.site.slices[slice]);
        let (dtype, desc) = found.ok().flatten()?;
        Some((dtype, self.arena.at_unit(desc.a_unit, a_bytes(dtype, self.site.d_in))))
    }

    /// How the work is cut.
    pub(crate) fn cut(&self) -> Cut {
        let items = self.work.items.len();
        let most = self.work.items.iter().map(|item| item.rows as usize).max().unwrap_or(0);
        let wanted = (parallel::threads() * UNITS_PER_THREAD).div_ceil(items.max(1));
        let rows = most.div_ceil(wanted).clamp(ROWS_PER_UNIT_MIN, ROWS_PER_UNIT);
        let parts = most.div_ceil(rows);
        Cut { rows, parts, units: items * parts }
    }

    /// Item and rows of it (counted from its first) of a unit; maybe none.
    pub(crate) fn block(&self, cut: Cut, unit: usize) -> (usize, Range<usize>) {
        let (item, part) = (unit / cut.parts, unit % cut.parts);
        let rows = self.work.items[item].rows as usize;
        (item, (part * cut.rows).min(rows)..((part + 1) * cut.rows).min(rows))
    }

    /// A guess on one core.
    pub(crate) fn work_ns(&self) -> usize {
        self.work.planes * self.site.d_in * self.site.slices.len() / 3
    }

    pub(crate) fn run(&self, isa: Isa, v: SharedMut<f32>, cut: Cut, unit: usize) {
        let (item, Range { start: first, end }) = self.block(cut, unit);
        if first < end {
            isa.run(Unit { shrink: self, v, item, first, end });
        }
    }
}

/// How the work is cut into units: an item's rows into `parts` of `rows`.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    rows: usize,
    parts: usize,
    pub(crate) units: usize,
}

/// The definition.
#[cfg(test)]
pub(super) fn reference(v: &mut [f32], shrink: &Shrink) {
    let slices = shrink.site.slices.len();
    for (index, item) in shrink.work.items.iter().enumerate() {
        for slice in 0..slices {
            let Some((dtype, a)) = shrink.a_block(index, slice) else { continue };
            for t in 0..item.rows as usize {
                let x = shrink.x.row(item.first_row as usize + t);
                for r in 0..RANK_BLOCK {
                    let weight = |k: usize| crate::lora::a_at(dtype, a, r, k);
                    let mut chains = [0.0f32; CHAINS];
                    match dtype {
                        Dtype::F32 => {
                            for (k, x) in x.iter().enumerate() {
                                chains[k % 2] = x.mul_add(weight(k), chains[k % 2]);
                            }
                        }
                        Dtype::Bf16 => {
                            for pair in 0..x.len().div_ceil(2) {
                                let x = |k: usize| dtype.round(x.get(k).copied().unwrap_or(0.0));
                                let odd = x(2 * pair + 1).mul_add(weight(2 * pair + 1), chains[pair % 2]);
                                chains[pair % 2] = x(2 * pair).mul_add(weight(2 * pair), odd);
                            }
                        }
                    }
                    v[((item.plane as usize + t) * slices + slice) * RANK_BLOCK + r] = chains[0] + chains[1];
                }
            }
        }
    }
}

pub(super) fn lora_shrink(isa: Isa, v: &mut [f32], shrink: &Shrink) {
    let v = SharedMut::new(v);
    let run = |shrink: &Shrink| {
        let cut = shrink.cut();
        parallel::for_each(cut.units, shrink.work_ns(), |unit| shrink.run(isa, v, cut, unit));
    };
    if shrink.table.takes_pairs(shrink.work) {
        with_pairs(shrink.x, |pairs| run(&Shrink { pairs, ..*shrink }));
    } else {
        run(shrink);
    }
}

/// Rows `first..end` of an item, all matrices of the site.
struct Unit<'a> {
    shrink: &'a Shrink<'a>,
    v: SharedMut<f32>,
    item: usize,
    first: usize,
    end: usize,
}

impl Kernel for Unit<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let slices = self.shrink.site.slices.len();
        let mut found: [(usize, &[u8]); SLICES_PER_PASS] = [(0, &[]); SLICES_PER_PASS];
        let (mut count, mut dtype) = (0, Dtype::F32);
        for slice in 0..slices {
            if let Some((stored, a)) = self.shrink.a_block(self.item, slice) {
                dtype = stored;
                found[count] = (slice, a);
                count += 1;
            }
            if count == SLICES_PER_PASS || (slice + 1 == slices && count > 0) {
                match dtype {
                    Dtype::F32 => {
                        let x: *const u32 = self.shrink.x.as_f32().as_ptr().cast();
                        self.rows::<S, Single>(s, x, self.shrink.site.d_in, &found[..count]);
                    }
                    Dtype::Bf16 => {
                        let stride = pair_stride(self.shrink.site.d_in);
                        assert!(self.shrink.pairs.len() >= self.shrink.x.rows() * stride);
                        self.rows::<S, Pairs>(s, self.shrink.pairs.as_ptr(), stride, &found[..count]);
                    }
                }
                count = 0;
            }
        }
    }
}

impl Unit<'_> {
    #[inline(always)]
    fn rows<S: Simd, O: Operands>(&self, s: S, x: *const u32, stride: usize, blocks: &[(usize, &[u8])]) {
        macro_rules! with {
            ($rows:literal, $row:expr) => {
                match blocks.len() {
                    3 => self.tile::<S, O, $rows, 3>(s, x, stride, $row, blocks),
                    2 => self.tile::<S, O, $rows, 2>(s, x, stride, $row, blocks),
                    _ => self.tile::<S, O, $rows, 1>(s, x, stride, $row, blocks),
                }
            };
        }
        let rows_max = rows_max::<S>(blocks.len());
        let mut row = self.first;
        while row < self.end {
            let rows = (self.end - row).min(rows_max);
            match rows {
                1 => with!(1, row),
                2 => with!(2, row),
                3 => with!(3, row),
                4 => with!(4, row),
                5 => with!(5, row),
                6 => with!(6, row),
                _ => with!(7, row),
            }
            row += rows;
        }
    }

    /// `M` rows against `N` A blocks.
    #[inline(always)]
    fn tile<S: Simd, O: Operands, const M: usize, const N: usize>(
        &self,
        s: S,
        x: *const u32,
        stride: usize,
        row: usize,
        blocks: &[(usize, &[u8])],
    ) {
        if M > rows_max::<S>(N) {
            return; // never asked for; spares the compiler the code
        }
        let Shrink { x: rows, site, work, .. } = *self.shrink;
        let item = &work.items[self.item];
        let lines = site.d_in.div_ceil(O::INPUTS);
        let first_row = item.first_row as usize + row;
        assert!(first_row + M <= rows.rows());
        let a: [*const Line; N] = std::array::from_fn(|n| {
            assert!(blocks[n].1.len() >= lines * size_of::<Line>());
            blocks[n].1.as_ptr().cast()
        });
        let mut acc = [[[s.splat(0.0); CHAINS]; N]; M];
        // SAFETY: a block has a line for each step, as asserted, and a row of x `INPUTS` inputs for it: d_in of them, filled up
        // with zeros where they come in pairs.
        unsafe {
            let x = x.add(first_row * stride);
            let mut step = 0;
            while step + 1 < lines {
                self.line::<S, O, M, N, 0>(s, x, stride, &a, step, &mut acc);
                self.line::<S, O, M, N, 1>(s, x, stride, &a, step + 1, &mut acc);
                step += CHAINS;
            }
            if step < lines {
                self.line::<S, O, M, N, 0>(s, x, stride, &a, step, &mut acc);
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                let at = (item.plane as usize + row + m) * site.slices.len() + blocks[n].0;
                // SAFETY: `v` has 16 elements for each row of an item and slice; no other unit has this row.
                unsafe { s.store(self.v.at(at * RANK_BLOCK), s.add(acc[0], acc[1])) };
            }
        }
    }

    /// One line of each block, for chain `C`.
    ///
    /// # Safety
    /// Line `step` of the blocks, and its inputs of `M` rows from `x` on, must be readable.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "the registers of the loop")]
    unsafe fn line<S: Simd, O: Operands, const M: usize, const N: usize, const C: usize>(
        &self,
        s: S,
        x: *const u32,
        stride: usize,
        a: &[*const Line; N],
        step: usize,
        acc: &mut [[[S::V; CHAINS]; N]; M],
    ) {
        // SAFETY: the caller vouches for lines and inputs; a prefetch may go anywhere.
        unsafe {
            let weights: [O::W<S>; N] = std::array::from_fn(|n| O::weights(s, a[n].add(step)));
            for (m, acc) in acc.iter_mut().enumerate() {
                let x = O::inputs(s, x.add(m * stride + step));
                for (acc, weights) in acc.iter_mut().zip(&weights) {
                    acc[C] = O::add(s, acc[C], x, *weights);
                }
            }
        }
    }
}

/// Rows of a tile, so that its sums fit the registers.
const fn rows_max<S: Simd>(blocks: usize) -> usize {
    let sums = if S::TILE_ROWS > 3 { 24 } else { 6 };
    let rows = sums / (CHAINS * blocks);
    if rows < 1 {
        1
    } else if rows > 7 {
        7
    } else {
        rows
    }
}
