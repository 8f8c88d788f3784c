//! Activations in 8 bits: 32 neighbours of a row share a scale, the largest magnitude over 127.
//!
//! A sub-block with a NaN or an infinity gets the scale NaN, so what it touches is NaN as in the plain product.

use super::format::SUB;
use super::isa::{Isa, Kernel, Vector};
use crate::parallel::{self, SharedMut};

/// Rows that lie together: a tile of the product takes at most as many.
pub(super) const TILE_ROWS: usize = 16;

/// 32 neighbours of a row: one cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Numbers {
    /// At most 127 either way.
    pub(super) numbers: [i8; SUB],
    /// A number times this is the activation.
    pub(super) scale: f32,
    /// The sum of the numbers, times `scale`.
    pub(super) sum: f32,
    /// Minus the sum of the numbers, times 8, 16 and 128: what the centers of formats take off the products.
    pub(super) off: [i32; 3],
    /// Minus the sum of each half of the numbers, times 32.
    pub(super) off_halves: [i32; 2],
}

const ZEROS: Numbers = Numbers { numbers: [0; SUB], scale: 0.0, sum: 0.0, off: [0; 3], off_halves: [0; 2] };

/// Rows in 8 bits: tile of 16 rows after tile, of a tile sub-block after sub-block, of a sub-block row after row.
#[derive(Default)]
pub(super) struct Activations {
    numbers: Vec<Numbers>,
    rows: usize,
    subs: usize,
}

impl Activations {
    /// No rows.
    pub(super) const NONE: Self = Self { numbers: Vec::new(), rows: 0, subs: 0 };

    /// Takes the rows of `x`, each `subs` sub-blocks. Memory is kept and grows only.
    pub(super) fn fill(&mut self, isa: Isa, x: &[f32], subs: usize) {
        let rows = x.len() / (subs * SUB);
        (self.rows, self.subs) = (rows, subs);
        if self.numbers.len() < rows * subs {
            self.numbers.resize(rows * subs, ZEROS);
        }
        let numbers = SharedMut::new(&mut self.numbers);
        parallel::for_each(rows.div_ceil(TILE_ROWS), rows * subs * SUB / 4, |tile| {
            let first = tile * TILE_ROWS;
            let rows = (rows - first).min(TILE_ROWS);
            // SAFETY: the rows of tile `tile`, which no other unit writes.
            let numbers = unsafe { std::slice::from_raw_parts_mut(numbers.at(first * subs), rows * subs) };
            isa.run(Fill { x: &x[first * subs * SUB..][..rows * subs * SUB], subs, numbers });
        });
    }

    pub(super) const fn rows(&self) -> usize {
        self.rows
    }

    /// The tile whose first row is `first`, a multiple of 16.
    pub(super) fn tile(&self, first: usize) -> RowTile<'_> {
        let rows = (self.rows - first).min(TILE_ROWS);
        RowTile { numbers: &self.numbers[first * self.subs..(first + rows) * self.subs], rows }
    }
}

/// Some rows: sub-block after sub-block, of a sub-block row after row.
#[derive(Clone, Copy)]
pub(super) struct RowTile<'a> {
    pub(super) numbers: &'a [Numbers],
    pub(super) rows: usize,
}

/// Quantises the rows of one tile.
struct Fill<'a> {
    x: &'a [f32],
    subs: usize,
    numbers: &'a mut [Numbers],
}

impl Kernel for Fill<'_> {
    #[inline(always)]
    fn run<S: Vector>(self, _: S) {
        let rows = self.numbers.len() / self.subs;
        for (row, x) in self.x.chunks_exact(self.subs * SUB).enumerate() {
            for (sub, x) in x.as_chunks::<SUB>().0.iter().enumerate() {
                self.numbers[sub * rows + row] = quantise(x);
            }
        }
    }
}

/// Plain loops of operations that are the same on every machine; the compiler makes vectors of them.
#[inline(always)]
pub(super) fn quantise(x: &[f32; SUB]) -> Numbers {
    // Magnitudes compare as their bits do, and a NaN is above all of them whatever the order.
    let largest = x.iter().fold(0u32, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return Numbers { scale: f32::NAN, sum: f32::NAN, ..ZEROS };
    }
    let factor = 127.0 / largest;
    if !factor.is_finite() {
        return ZEROS; // zeros, or as good as
    }
    // Added to a magnitude below 2^22 this leaves the nearest whole number (ties to even) in the low bits.
    const TO_WHOLE: f32 = 12_582_912.0;
    let mut numbers = [0i32; SUB];
    for (number, x) in numbers.iter_mut().zip(x) {
        *number = (x * factor + TO_WHOLE).to_bits().cast_signed() - TO_WHOLE.to_bits().cast_signed();
    }
    let (sum, first) = (numbers.iter().sum::<i32>(), numbers[..SUB / 2].iter().sum::<i32>());
    let scale = largest / 127.0;
    Numbers {
        numbers: numbers.map(|number| number as i8),
        scale,
        sum: scale * sum as f32,
        off: [8, 16, 128].map(|center| -sum * center),
        off_halves: [first, sum - first].map(|sum| -sum * 32),
    }
}
