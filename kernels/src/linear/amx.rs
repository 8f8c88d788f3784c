//! Tiles of AMX: 32 rows times two panels, or up to 16 rows times four.

use super::cpu::Product;
use super::input::pair_stride;
use super::pack::{K_TILE, PANEL};
use crate::simd::amx::{Emulated, ROW_BYTES, Shape, TILE_ROWS, Tiles};
use crate::simd::{LANES, Line};
use std::ops::Range;

/// Lines of a panel that one tile holds.
const TILE_LINES: usize = K_TILE / 2;

/// Up to so many rows the next group's weights are fetched ahead.
const ROWS_FETCHED_AHEAD: usize = 64;

/// Rows times panels of a product. `x`: `[rows][pair_stride]`.
pub(super) fn run(product: &Product, x: &[u32], panels: Range<usize>, rows: Range<usize>) {
    #[cfg(target_arch = "x86_64")]
    if product.isa == crate::simd::Isa::Amx && crate::simd::Isa::best() == product.isa {
        // SAFETY: the instruction set was found on this machine.
        return unsafe { Group::<crate::simd::amx::Hardware>::run(product, x, panels, rows) };
    }
    // SAFETY: plain code.
    unsafe { Group::<Emulated>::run(product, x, panels, rows) };
}

struct Group<'a, T> {
    product: &'a Product<'a>,
    x: &'a [u32],
    fetch_ahead: bool,
    lines_of_group: usize,
    kind: std::marker::PhantomData<T>,
}

impl<T: Tiles> Group<'_, T> {
    /// # Safety
    /// The processor must have the tiles `T`.
    unsafe fn run(product: &Product, x: &[u32], panels: Range<usize>, rows: Range<usize>) {
        let lines_of_group = panels.len() * product.w.panel_lines();
        let fetch_ahead = rows.len() <= ROWS_FETCHED_AHEAD;
        let mut group = Group::<T> { product, x, fetch_ahead, lines_of_group, kind: std::marker::PhantomData };
        let mut row = rows.start;
        while row < rows.end {
            let left = rows.end - row;
            // SAFETY: the caller vouches for the instructions; rows and panels are the product's.
            unsafe {
                if left > TILE_ROWS {
                    let count = left.min(2 * TILE_ROWS);
                    for pair in panels.clone().step_by(2) {
                        group.tall(row, count, pair, (panels.end - pair).min(2));
                    }
                    row += count;
                } else {
                    for four in panels.clone().step_by(4) {
                        group.flat(row, left, four, (panels.end - four).min(4));
                    }
                    row += left;
                }
            }
            group.fetch_ahead = false; // once a group is enough
        }
    }

    fn line(&self, panel: usize, tile: usize) -> *const u8 {
        let at = panel * self.product.w.panel_lines() + tile * TILE_LINES;
        self.product.w.lines()[at..][..TILE_LINES].as_ptr().cast()
    }

    fn inputs(&self, row: usize, count: usize, tile: usize) -> (*const u8, usize) {
        let stride = pair_stride(self.product.w.d_in());
        let at = row * stride + tile * TILE_LINES;
        (self.x[at..][..(count - 1) * stride + TILE_LINES].as_ptr().cast(), stride * size_of::<u32>())
    }

    fn fetch(&self, line: *const u8) {
        #[cfg(target_arch = "x86_64")]
        if self.fetch_ahead {
            for i in 0..TILE_LINES {
                let at = line.wrapping_add((self.lines_of_group + i) * size_of::<Line>());
                // SAFETY: a prefetch is a hint; any address will do.
                unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }

    /// 17 to 32 rows, one or two panels.
    /// # Safety
    /// The processor must have the tiles.
    unsafe fn tall(&self, row: usize, count: usize, panel: usize, panels: usize) {
        let second = (count - TILE_ROWS) as u8;
        let shape = Shape([16, 16, second, second, 16, second, 16, 16]);
        let mut sums = [[Line::default(); TILE_ROWS]; 4];
        // SAFETY: the caller vouches for the tiles; memory is checked by the slices.
        unsafe {
            let mut tiles = T::new(&shape);
            tiles.zero::<0>();
            tiles.zero::<1>();
            tiles.zero::<2>();
            tiles.zero::<3>();
            for k in 0..self.product.w.panel_lines() / TILE_LINES {
                let (x, stride) = self.inputs(row, TILE_ROWS, k);
                tiles.load::<4>(x, stride);
                let (x, stride) = self.inputs(row + TILE_ROWS, count - TILE_ROWS, k);
                tiles.load::<5>(x, stride);
                tiles.load::<6>(self.line(panel, k), ROW_BYTES);
                self.fetch(self.line(panel, k));
                tiles.dot::<0, 4, 6>();
                tiles.dot::<2, 5, 6>();
                if panels > 1 {
                    tiles.load::<7>(self.line(panel + 1, k), ROW_BYTES);
                    self.fetch(self.line(panel + 1, k));
                    tiles.dot::<1, 4, 7>();
                    tiles.dot::<3, 5, 7>();
                }
            }
            tiles.store::<0>(sums[0].as_mut_ptr().cast(), ROW_BYTES);
            tiles.store::<1>(sums[1].as_mut_ptr().cast(), ROW_BYTES);
            tiles.store::<2>(sums[2].as_mut_ptr().cast(), ROW_BYTES);
            tiles.store::<3>(sums[3].as_mut_ptr().cast(), ROW_BYTES);
        }
        for p in 0..panels {
            self.write(row, TILE_ROWS, panel + p, &sums[p]);
            self.write(row + TILE_ROWS, count - TILE_ROWS, panel + p, &sums[2 + p]);
        }
    }

    /// Up to 16 rows, one to four panels.
    /// # Safety
    /// The processor must have the tiles.
    unsafe fn flat(&self, row: usize, count: usize, panel: usize, panels: usize) {
        let rows = count as u8;
        let shape = Shape([rows, rows, rows, rows, rows, 0, 16, 16]);
        let mut sums = [[Line::default(); TILE_ROWS]; 4];
        // SAFETY: as in `tall`.
        unsafe {
            let mut tiles = T::new(&shape);
            tiles.zero::<0>();
            tiles.zero::<1>();
            tiles.zero::<2>();
            tiles.zero::<3>();
            for k in 0..self.product.w.panel_lines() / TILE_LINES {
                let (x, stride) = self.inputs(row, count, k);
                tiles.load::<4>(x, stride);
                macro_rules! panel {
                    ($number:literal, $weights:literal) => {
                        if panels > $number {
                            let line = self.line(panel + $number, k);
                            tiles.load::<$weights>(line, ROW_BYTES);
                            self.fetch(line);
                            tiles.dot::<$number, 4, $weights>();
                        }
                    };
                }
                panel!(0, 6);
                panel!(1, 7);
                panel!(2, 6);
                panel!(3, 7);
            }
            tiles.store::<0>(sums[0].as_mut_ptr().cast(), ROW_BYTES);
            tiles.store::<1>(sums[1].as_mut_ptr().cast(), ROW_BYTES);
            tiles.store::<2>(sums[2].as_mut_ptr().cast(), ROW_BYTES);
            tiles.store::<3>(sums[3].as_mut_ptr().cast(), ROW_BYTES);
        }
        for (p, sums) in sums.iter().enumerate().take(panels) {
            self.write(row, count, panel + p, sums);
        }
    }

    fn write(&self, row: usize, count: usize, panel: usize, sums: &[Line; TILE_ROWS]) {
        let Product { y, w, bias, .. } = *self.product;
        let (d_out, column) = (w.d_out(), panel * PANEL);
        let lanes = (d_out - column).min(LANES);
        for (m, line) in sums.iter().enumerate().take(count) {
            // SAFETY: the row and the columns are in `y`, and no other unit has them.
            let y = unsafe { std::slice::from_raw_parts_mut(y.at((row + m) * d_out + column), lanes) };
            for (i, y) in y.iter_mut().enumerate() {
                let sum = f32::from_bits(line.0[i]);
                *y = bias.map_or(sum, |bias| sum + bias[column + i]);
            }
        }
    }
}
