//! Activations in 8 bits: 32 neighbours of a row share a scale, the largest magnitude over 127.
//!
//! A sub-block with a NaN or an infinity gets the scale NaN, so what it touches is NaN as in the plain product.

use super::format::SUB;
use super::isa::{Isa, Kernel, Vector};
use crate::parallel::{self, SharedMut};

/// Rows that lie together: a tile of the product takes at most as many.
pub(super) const TILE_ROWS: usize = 16;

/// 32 numbers of a row.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(super) struct Numbers(pub(super) [i8; SUB]);

/// What belongs to 32 numbers of a row.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub(super) struct Scale {
    /// A number times this is the activation.
    pub(super) scale: f32,
    /// The sum of the numbers, times `scale`.
    pub(super) sum: f32,
    /// Minus the sum of the numbers.
    pub(super) minus_sum: i32,
    /// Minus the sum of the first 16 numbers.
    pub(super) minus_first: i32,
}

const NO_NUMBERS: Numbers = Numbers([0; SUB]);
const NO_SCALE: Scale = Scale { scale: 0.0, sum: 0.0, minus_sum: 0, minus_first: 0 };

/// Rows in 8 bits: tile of 16 rows after tile, of a tile sub-block after sub-block, of a sub-block row after row.
#[derive(Default)]
pub(super) struct Activations {
    numbers: Vec<Numbers>,
    scales: Vec<Scale>,
    rows: usize,
    subs: usize,
}

impl Activations {
    /// No rows.
    pub(super) const NONE: Self = Self { numbers: Vec::new(), scales: Vec::new(), rows: 0, subs: 0 };

    /// Takes the rows of `x`, each `subs` sub-blocks. Memory is kept and grows only.
    pub(super) fn fill(&mut self, isa: Isa, x: &[f32], subs: usize) {
        let rows = x.len() / (subs * SUB);
        (self.rows, self.subs) = (rows, subs);
        if self.scales.len() < rows * subs {
            self.numbers.resize(rows * subs, NO_NUMBERS);
            self.scales.resize(rows * subs, NO_SCALE);
        }
        let (numbers, scales) = (SharedMut::new(&mut self.numbers), SharedMut::new(&mut self.scales));
        parallel::for_each(rows.div_ceil(TILE_ROWS), rows * subs * SUB / 4, |tile| {
            let first = tile * TILE_ROWS;
            let rows = (rows - first).min(TILE_ROWS);
            // SAFETY: the sub-blocks of the rows of tile `tile`, which no other unit writes.
            let (numbers, scales) = unsafe {
                let at = first * subs;
                let numbers = std::slice::from_raw_parts_mut(numbers.at(at), rows * subs);
                (numbers, std::slice::from_raw_parts_mut(scales.at(at), rows * subs))
            };
            isa.run(Fill { x: &x[first * subs * SUB..][..rows * subs * SUB], subs, numbers, scales });
        });
    }

    pub(super) const fn rows(&self) -> usize {
        self.rows
    }

    /// The tile whose first row is `first`, a multiple of 16.
    pub(super) fn tile(&self, first: usize) -> RowTile<'_> {
        let rows = (self.rows - first).min(TILE_ROWS);
        let range = first * self.subs..(first + rows) * self.subs;
        RowTile { numbers: &self.numbers[range.clone()], scales: &self.scales[range], rows }
    }
}

/// Some rows: sub-block after sub-block, of a sub-block row after row.
#[derive(Clone, Copy)]
pub(super) struct RowTile<'a> {
    pub(super) numbers: &'a [Numbers],
    pub(super) scales: &'a [Scale],
    pub(super) rows: usize,
}

/// Quantises the rows of one tile.
struct Fill<'a> {
    x: &'a [f32],
    subs: usize,
    numbers: &'a mut [Numbers],
    scales: &'a mut [Scale],
}

impl Kernel for Fill<'_> {
    #[inline(always)]
    fn run<S: Vector>(self, _: S) {
        let rows = self.numbers.len() / self.subs;
        for (row, x) in self.x.chunks_exact(self.subs * SUB).enumerate() {
            for (sub, x) in x.as_chunks::<SUB>().0.iter().enumerate() {
                let at = sub * rows + row;
                (self.numbers[at], self.scales[at]) = quantise(x);
            }
        }
    }
}

/// Plain loops of operations that are the same on every machine; the compiler makes vectors of them.
#[inline(always)]
pub(super) fn quantise(x: &[f32; SUB]) -> (Numbers, Scale) {
    // Magnitudes compare as their bits do, and a NaN is above all of them whatever the order.
    let largest = x.iter().fold(0u32, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return (NO_NUMBERS, Scale { scale: f32::NAN, sum: f32::NAN, ..NO_SCALE });
    }
    let factor = 127.0 / largest;
    if !factor.is_finite() {
        return (NO_NUMBERS, NO_SCALE); // zeros, or as good as
    }
    // Added to a magnitude below 2^22 this leaves the nearest whole number (ties to even) in the low bits.
    const TO_WHOLE: f32 = 12_582_912.0;
    let mut numbers = [0i32; SUB];
    for (number, x) in numbers.iter_mut().zip(x) {
        *number = (x * factor + TO_WHOLE).to_bits().cast_signed() - TO_WHOLE.to_bits().cast_signed();
    }
    let (sum, first) = (numbers.iter().sum::<i32>(), numbers[..SUB / 2].iter().sum::<i32>());
    let scale = largest / 127.0;
    let scale = Scale { scale, sum: scale * sum as f32, minus_sum: -sum, minus_first: -first };
    (Numbers(numbers.map(|number| number as i8)), scale)
}
