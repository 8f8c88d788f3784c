//! The definition and the vector form: lanes are ranks, and the matrices of a site share each read of x.

use crate::arena::Arena;
use crate::dtype::{ArenaDtype, Element};
use crate::lora::{AdapterTable, LoraSite, RANK_BLOCK, WorkList};
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;
use crate::simd::{Isa, Kernel, Simd};
use half::f16;

/// Rows of an item that one unit of work takes.
const ROWS_PER_UNIT: usize = 48;
/// Matrices that share a pass over x; more go in further passes.
const SLICES_PER_PASS: usize = 3;

/// How far ahead of its use A is asked for.
const PREFETCH_BYTES: usize = 2048;

/// Checked arguments of the op.
pub(super) struct Shrink<'a> {
    pub(super) x: &'a Rows,
    pub(super) arena: &'a Arena,
    pub(super) table: &'a AdapterTable,
    pub(super) layer: usize,
    pub(super) site: &'a LoraSite,
    pub(super) work: &'a WorkList,
}

impl Shrink<'_> {
    /// The A block of one item and slice, `[d_in][16]`, and its type; `None` if the adapter leaves the matrix alone.
    fn a_block(&self, item: usize, slice: usize) -> Option<(ArenaDtype, &[u8])> {
        let found = self.table.desc(&self.work.items[item], self.layer, self.site.slices[slice]);
        let (dtype, desc) = found.ok().flatten()?;
        Some((dtype, self.arena.at_unit(desc.a_unit, RANK_BLOCK * self.site.d_in * dtype.bytes())))
    }
}

/// The definition.
#[cfg(test)]
pub(super) fn reference(v: &mut [f32], shrink: &Shrink) {
    let slices = shrink.site.slices.len();
    for (index, item) in shrink.work.items.iter().enumerate() {
        for slice in 0..slices {
            let Some((dtype, a)) = shrink.a_block(index, slice) else { continue };
            let a = crate::test_support::decode(dtype, a);
            for t in 0..item.rows as usize {
                let x = shrink.x.row(item.first_row as usize + t);
                for r in 0..RANK_BLOCK {
                    let chain = |sum, (k, x): (usize, &f32)| x.mul_add(a[k * RANK_BLOCK + r], sum);
                    let v = &mut v[((item.plane as usize + t) * slices + slice) * RANK_BLOCK + r];
                    *v = x.iter().enumerate().fold(0.0f32, chain);
                }
            }
        }
    }
}

pub(super) fn lora_shrink(isa: Isa, v: &mut [f32], shrink: &Shrink) {
    let Shrink { site, work, .. } = shrink;
    let parts = work.items.iter().map(|item| (item.rows as usize).div_ceil(ROWS_PER_UNIT)).max().unwrap_or(0);
    let work_ns = work.planes * site.d_in * site.slices.len() / 3;
    let v = SharedMut::new(v);
    parallel::for_each(work.items.len() * parts, work_ns, |unit| {
        let (item, part) = (unit / parts, unit % parts);
        let rows = work.items[item].rows as usize;
        let (first, end) = (part * ROWS_PER_UNIT, ((part + 1) * ROWS_PER_UNIT).min(rows));
        if first < end {
            isa.run(Unit { shrink, v, item, first, end });
        }
    });
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
        let (mut count, mut dtype) = (0, ArenaDtype::F32);
        for slice in 0..slices {
            if let Some((stored, a)) = self.shrink.a_block(self.item, slice) {
                dtype = stored;
                found[count] = (slice, a);
                count += 1;
            }
            if count == SLICES_PER_PASS || (slice + 1 == slices && count > 0) {
                self.rows(s, dtype, &found[..count]);
                count = 0;
            }
        }
    }
}

impl Unit<'_> {
    #[inline(always)]
    fn rows<S: Simd>(&self, s: S, dtype: ArenaDtype, blocks: &[(usize, &[u8])]) {
        macro_rules! with {
            ($rows:literal, $row:expr) => {
                match (dtype, blocks.len()) {
                    (ArenaDtype::F16, 3) => self.tile::<S, f16, $rows, 3>(s, $row, blocks),
                    (ArenaDtype::F16, 2) => self.tile::<S, f16, $rows, 2>(s, $row, blocks),
                    (ArenaDtype::F16, _) => self.tile::<S, f16, $rows, 1>(s, $row, blocks),
                    (ArenaDtype::F32, 3) => self.tile::<S, f32, $rows, 3>(s, $row, blocks),
                    (ArenaDtype::F32, 2) => self.tile::<S, f32, $rows, 2>(s, $row, blocks),
                    (ArenaDtype::F32, _) => self.tile::<S, f32, $rows, 1>(s, $row, blocks),
                }
            };
        }
        let mut row = self.first;
        while row < self.end {
            let rows = (self.end - row).min(S::TILE_ROWS);
            match rows {
                1 => with!(1, row),
                2 => with!(2, row),
                3 => with!(3, row),
                4 => with!(4, row),
                5 => with!(5, row),
                _ => with!(6, row),
            }
            row += rows;
        }
    }

    /// `M` rows against `N` A blocks.
    #[inline(always)]
    fn tile<S: Simd, E: Element, const M: usize, const N: usize>(&self, s: S, row: usize, blocks: &[(usize, &[u8])]) {
        if const { M > S::TILE_ROWS } {
            return; // never asked for; spares the compiler the code
        }
        let Shrink { x, site, work, .. } = *self.shrink;
        let item = &work.items[self.item];
        let element_bytes = E::BYTES;
        let a: [*const u8; N] = std::array::from_fn(|n| {
            assert!(blocks[n].1.len() >= RANK_BLOCK * site.d_in * element_bytes);
            blocks[n].1.as_ptr()
        });
        let x: [*const f32; M] = std::array::from_fn(|m| x.row(item.first_row as usize + row + m).as_ptr());
        let mut acc = [[s.splat(0.0); N]; M];
        for k in 0..site.d_in {
            let mut weights = [s.splat(0.0); N];
            for (weights, a) in weights.iter_mut().zip(&a) {
                // SAFETY: a block has 16 elements for each k < d_in, as asserted.
                unsafe {
                    let at = a.add(k * RANK_BLOCK * element_bytes);
                    if M <= 2 {
                        s.prefetch(at.wrapping_add(PREFETCH_BYTES));
                    }
                    *weights = E::load(s, at);
                }
            }
            for (acc, x) in acc.iter_mut().zip(&x) {
                // SAFETY: a row of x has d_in elements.
                let x = s.splat(unsafe { *x.add(k) });
                for (acc, weights) in acc.iter_mut().zip(&weights) {
                    *acc = s.fma(x, *weights, *acc);
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                let at = (item.plane as usize + row + m) * site.slices.len() + blocks[n].0;
                // SAFETY: `v` has 16 elements for each row of an item and slice; no other unit has this row.
                unsafe { s.store(self.v.at(at * RANK_BLOCK), *acc) };
            }
        }
    }
}
