//! The definition, and how a product is cut into units of work.

use super::input::{Input, pair_stride, takes_pairs, with_pairs};
use super::pack::{PANEL, PackedWeight};
use super::tile;
use crate::dtype::Dtype;
use crate::lora_expand::fused::Fused;
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;
use crate::simd::Isa;
use std::ops::Range;

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

pub(super) fn linear(isa: Isa, y: &mut [f32], x: &Rows, w: &PackedWeight, bias: Option<&[f32]>) {
    if y.is_empty() {
        return;
    }
    let rows = x.rows();
    let mut run = |input: Input| {
        let product = Product::new(isa, y, input, rows, w, bias);
        parallel::for_each(product.units(), product.work_ns(), |unit| product.run(unit));
    };
    if takes_pairs(isa, w) { with_pairs(x, |pairs| run(Input::Pairs(pairs))) } else { run(Input::F32(x.as_f32())) }
}

/// A product, cut into units: the panels of a group times a block of rows.
pub(crate) struct Product<'a> {
    pub(super) isa: Isa,
    pub(super) y: SharedMut<f32>,
    pub(super) x: Input<'a>,
    pub(super) rows: usize,
    pub(super) w: &'a PackedWeight,
    pub(super) bias: Option<&'a [f32]>,
    /// Panels of a tile and of a unit.
    tile_panels: usize,
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
        let tile_panels = sizes.iter().copied().min_by_key(|&size| rounds(size)).unwrap_or(1);
        let groups = w.panels().div_ceil(tile_panels);
        let row_blocks = (threads * UNITS_PER_THREAD).div_ceil(groups).min(rows / ROWS_OF_BLOCK_MIN).max(1);
        assert!(y.len() == rows * w.d_out() && bias.is_none_or(|bias| bias.len() == w.d_out()));
        match x {
            Input::F32(x) => assert!(x.len() >= rows * w.d_in()),
            Input::Pairs(x) => assert!(x.len() >= rows * pair_stride(w.d_in()) && w.dtype() == Dtype::Bf16),
        }
        Self { isa, y: SharedMut::new(y), x, rows, w, bias, tile_panels, groups, row_blocks }
    }

    /// Panels that tiles take together.
    pub(super) const fn group_panels(&self) -> usize {
        self.tile_panels
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
        let (rows, panels) = self.block(unit);
        tile::run(self, panels, rows, None);
    }

    /// As [`Self::run`], and `deltas` too, which must be for this product's form of inputs.
    pub(crate) fn run_with(&self, unit: usize, deltas: &Fused) {
        let (rows, panels) = self.block(unit);
        tile::run(self, panels, rows, Some(deltas));
    }

    /// Whether units can add deltas of bf16 adapters while their sums are in registers.
    pub(crate) fn takes_deltas(&self) -> bool {
        matches!(self.x, Input::Pairs(_)) && self.isa != Isa::Amx && self.tile_panels <= 3
    }

    /// Asks for the first lines of a unit's weights.
    pub(crate) fn fetch(&self, unit: usize) {
        let (_, panels) = self.block(unit);
        tile::fetch(self, panels);
    }

    /// Units of one of `parts` of the columns, and the columns.
    pub(crate) fn part(&self, part: usize, parts: usize) -> (Range<usize>, Range<usize>) {
        let group = |part: usize| self.groups * part / parts;
        let column = |group: usize| (group * self.tile_panels * PANEL).min(self.w.d_out());
        let (first, end) = (group(part), group(part + 1));
        (first * self.row_blocks..end * self.row_blocks, column(first)..column(end))
    }

    /// How many parts of the columns can have work.
    pub(crate) const fn parts_max(&self) -> usize {
        self.groups
    }

    /// The instruction set.
    pub(crate) const fn isa(&self) -> Isa {
        self.isa
    }

    /// Rows and panels of a unit.
    fn block(&self, unit: usize) -> (Range<usize>, Range<usize>) {
        let (group, block) = (unit / self.row_blocks, unit % self.row_blocks);
        let first = group * self.tile_panels;
        let rows = self.rows * block / self.row_blocks..self.rows * (block + 1) / self.row_blocks;
        (rows, first..(first + self.tile_panels).min(self.w.panels()))
    }

    /// `y`.
    pub(crate) const fn output(&self) -> SharedMut<f32> {
        self.y
    }

    /// Rows and columns of `y` that a unit writes.
    pub(crate) fn written(&self, unit: usize) -> (Range<usize>, Range<usize>) {
        let (rows, panels) = self.block(unit);
        (rows, panels.start * PANEL..(panels.end * PANEL).min(self.w.d_out()))
    }

    /// Elements of a row of `y`.
    pub(crate) fn width(&self) -> usize {
        self.w.d_out()
    }
}
