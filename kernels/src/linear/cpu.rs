//! The definition, and how a product is cut into units of work.

use super::pack::{K_TILE, PackedWeight};
use super::tile;
use crate::dtype::Dtype;
use crate::parallel::{self, SharedMut};
use crate::simd::{Isa, Kernel, LANES, Simd};
use std::cell::RefCell;

/// The definition for inputs as they are.
#[cfg(test)]
pub(super) fn reference(y: &mut [f32], x: &[f32], w: &PackedWeight, bias: Option<&[f32]>) {
    for (y, x) in y.chunks_mut(w.d_out()).zip(x.chunks(w.d_in())) {
        for (o, y) in y.iter_mut().enumerate() {
            let sum = x.iter().enumerate().fold(0.0f32, |sum, (k, x)| x.mul_add(w.element(o, k), sum));
            *y = bias.map_or(sum, |bias| sum + bias[o]);
        }
    }
}

/// Rounding that is worth handing out, in elements.
const ROUND_ALONE: usize = 1 << 16;

thread_local! {
    /// Rounded inputs of the product under way; grows to the largest and stays.
    static ROUNDED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn linear(isa: Isa, y: &mut [f32], x: &[f32], w: &PackedWeight, bias: Option<&[f32]>) {
    if y.is_empty() {
        return;
    }
    let rows = x.len() / w.d_in();
    with_input(isa, x, w, |input| {
        let product = Product::new(isa, y, input, rows, w, bias);
        parallel::for_each(product.units(), product.work_ns(), |unit| product.run(unit));
    });
}

/// Calls `body` with `x` as the product with `w` reads it on this instruction set.
pub(crate) fn with_input<R>(isa: Isa, x: &[f32], w: &PackedWeight, body: impl FnOnce(Input) -> R) -> R {
    if w.dtype() == Dtype::F32 || !isa.takes_pairs() {
        return body(Input::F32(x));
    }
    ROUNDED.with_borrow_mut(|pairs| {
        let d_in = w.d_in();
        let (rows, stride) = (x.len() / d_in, pair_stride(d_in));
        if pairs.len() < rows * stride {
            pairs.resize(rows * stride, 0);
        }
        let pairs = &mut pairs[..rows * stride];
        let work_ns = if x.len() < ROUND_ALONE { 0 } else { x.len() / 8 };
        parallel::for_each_chunk(pairs, stride, work_ns, |row, pairs| {
            // The same bits on every instruction set.
            Isa::best().run(Round { x: &x[row * d_in..][..d_in], pairs });
        });
        body(Input::Pairs(pairs))
    })
}

/// u32 of a row of rounded inputs.
pub(crate) const fn pair_stride(d_in: usize) -> usize {
    d_in.next_multiple_of(K_TILE) / 2
}

/// A row as pairs of bf16, zeros behind its end.
struct Round<'a> {
    x: &'a [f32],
    pairs: &'a mut [u32],
}

impl Kernel for Round<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, pairs } = self;
        assert!(pairs.len() * 2 >= x.len().next_multiple_of(LANES));
        let out: *mut u16 = pairs.as_mut_ptr().cast();
        let mut k = 0;
        while k < x.len() {
            let count = (x.len() - k).min(LANES);
            // SAFETY: `count` elements of x from k, and 16 of `pairs`, as asserted.
            unsafe { s.store_bf16(out.add(k), s.load_part(x.as_ptr().add(k), count)) };
            k += LANES;
        }
        pairs[k / 2..].fill(0);
    }
}

/// Inputs as a product reads them.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a> {
    /// `[rows][d_in]`
    F32(&'a [f32]),
    /// `[rows][pair_stride(d_in)]`, two bf16 each, the first in the low half.
    Pairs(&'a [u32]),
}

/// A product, cut into units: the panels of a group times a block of rows.
pub(crate) struct Product<'a> {
    pub(super) isa: Isa,
    pub(super) y: SharedMut<f32>,
    pub(super) x: Input<'a>,
    pub(super) rows: usize,
    pub(super) w: &'a PackedWeight,
    pub(super) bias: Option<&'a [f32]>,
    /// Panels of a unit.
    group: usize,
    groups: usize,
    /// Blocks of rows of a group.
    row_blocks: usize,
}

/// Rows below which a group is not cut.
const ROWS_OF_BLOCK_MIN: usize = 32;
/// Units a thread should get at least, where rows can be cut.
const UNITS_PER_THREAD: usize = 3;

impl<'a> Product<'a> {
    /// `y` is `[rows, d_out]`.
    pub(crate) fn new(
        isa: Isa,
        y: &mut [f32],
        x: Input<'a>,
        rows: usize,
        w: &'a PackedWeight,
        bias: Option<&'a [f32]>,
    ) -> Self {
        let threads = parallel::threads();
        let sizes = tile::group_sizes(isa, rows, matches!(x, Input::Pairs(_)));
        let rounds = |size: usize| w.panels().div_ceil(size).div_ceil(threads) * size;
        let group = sizes.iter().copied().min_by_key(|&size| rounds(size)).unwrap_or(1);
        let groups = w.panels().div_ceil(group);
        let row_blocks = (threads * UNITS_PER_THREAD).div_ceil(groups).min(rows / ROWS_OF_BLOCK_MIN).max(1);
        assert!(y.len() == rows * w.d_out() && bias.is_none_or(|bias| bias.len() == w.d_out()));
        match x {
            Input::F32(x) => assert!(x.len() >= rows * w.d_in()),
            Input::Pairs(x) => assert!(x.len() >= rows * pair_stride(w.d_in()) && w.dtype() == Dtype::Bf16),
        }
        Self { isa, y: SharedMut::new(y), x, rows, w, bias, group, groups, row_blocks }
    }

    pub(crate) const fn units(&self) -> usize {
        self.groups * self.row_blocks
    }

    /// A guess on one core: 20 bytes of weights a nanosecond, or 100 GFLOP/s and more with pairs.
    pub(crate) fn work_ns(&self) -> usize {
        let speed = if matches!(self.x, Input::Pairs(_)) { 150 } else { 50 };
        (self.w.bytes() / 20).max(self.w.d_in() * self.w.d_out() * self.rows / speed)
    }

    pub(crate) fn run(&self, unit: usize) {
        let (group, block) = (unit / self.row_blocks, unit % self.row_blocks);
        let first = group * self.group;
        let panels = first..(first + self.group).min(self.w.panels());
        let rows = self.rows * block / self.row_blocks..self.rows * (block + 1) / self.row_blocks;
        tile::run(self, panels, rows);
    }
}
