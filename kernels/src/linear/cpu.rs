//! The definition and the panel kernel.

use super::pack::{PANEL, PackedWeight, lines_per_k};
use crate::dtype::Dtype;
use crate::parallel::{self, SharedMut};
use crate::simd::{Isa, Kernel, LANES, Line, Simd};

/// The definition.
#[cfg(test)]
pub(super) fn reference(y: &mut [f32], x: &[f32], w: &PackedWeight, bias: Option<&[f32]>) {
    for (y, x) in y.chunks_mut(w.d_out()).zip(x.chunks(w.d_in())) {
        for (o, y) in y.iter_mut().enumerate() {
            let sum = x.iter().enumerate().fold(0.0f32, |sum, (k, x)| x.mul_add(w.element(o, k), sum));
            *y = bias.map_or(sum, |bias| sum + bias[o]);
        }
    }
}

/// k taken at a time when there are several row tiles: what a panel pair of it needs stays in the second-level cache.
/// Between two runs the sums wait in `y`; storing an f32 does not change it.
const K_BLOCK: usize = 2048;

/// How many k ahead of its use a line is asked for: hardware prefetchers stop at the ends of pages.
const PREFETCH_K: usize = 40;

/// Panels that a tile of at most two rows takes together, for enough independent chains and open streams of memory.
const PANELS_NARROW: usize = 4;

pub(super) fn linear(isa: Isa, y: &mut [f32], x: &[f32], w: &PackedWeight, bias: Option<&[f32]>) {
    if y.is_empty() {
        return;
    }
    let rows = x.len() / w.d_in();
    let chunk = panels_per_unit(w.panels(), rows, parallel::threads());
    let units = w.panels().div_ceil(chunk);
    // About 16 bytes of weights a nanosecond, or 80 GFLOP/s.
    let work_ns = (w.bytes() / 16).max(w.d_in() * w.d_out() * rows / 40);
    let y = SharedMut::new(y);
    parallel::for_each(units, work_ns, |unit| {
        let panels = unit * chunk..((unit + 1) * chunk).min(w.panels());
        isa.run(Panels { y, x, rows, w, bias, first: panels.start, end: panels.end });
    });
}

/// Panels of a unit of work: as many as tiles like, but so that the threads end together.
fn panels_per_unit(panels: usize, rows: usize, threads: usize) -> usize {
    let most = if rows <= 2 { 2 * PANELS_NARROW } else { PANELS_NARROW };
    let rounds = |chunk: usize| panels.div_ceil(chunk).div_ceil(threads) * chunk;
    (1..=most).rev().min_by_key(|&chunk| rounds(chunk)).unwrap_or(1)
}

/// All rows against the panels `first..end`.
struct Panels<'a> {
    y: SharedMut<f32>,
    x: &'a [f32],
    rows: usize,
    w: &'a PackedWeight,
    bias: Option<&'a [f32]>,
    first: usize,
    end: usize,
}

impl Kernel for Panels<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.w.dtype() {
            Dtype::F32 => self.all::<S, false>(s),
            Dtype::Bf16 => self.all::<S, true>(s),
        }
    }
}

impl Panels<'_> {
    #[inline(always)]
    fn all<S: Simd, const BF16: bool>(&self, s: S) {
        let wide = if self.rows <= 2 && S::TILE_ROWS > 3 { PANELS_NARROW } else { S::TILE_ROWS.div_ceil(3) };
        let mut panel = self.first;
        while panel < self.end {
            let count = match self.end - panel {
                left if left >= wide => wide,
                left if left >= 2 && wide > 1 => 2,
                _ => 1,
            };
            self.k_blocks::<S, BF16>(s, panel, count);
            panel += count;
        }
    }

    /// All rows and all k of `count` panels.
    #[inline(always)]
    fn k_blocks<S: Simd, const BF16: bool>(&self, s: S, panel: usize, count: usize) {
        let d_in = self.w.d_in();
        let k_block = if self.rows <= S::TILE_ROWS { d_in } else { K_BLOCK };
        let mut k = 0;
        while k < d_in {
            let end = (k + k_block).min(d_in);
            let mut row = 0;
            while row < self.rows {
                let tile = Tile { panels: self, row, panel, k, end };
                row += self.rows_of(s, &tile, count, BF16);
            }
            k = end;
        }
    }

    /// Runs one tile and returns its rows. The tile's extents become constants here, so that sums live in registers.
    #[inline(always)]
    fn rows_of<S: Simd>(&self, s: S, tile: &Tile, count: usize, bf16: bool) -> usize {
        macro_rules! with {
            ($rows:literal, $count:literal) => {
                if bf16 { tile.run::<S, $rows, $count, true>(s) } else { tile.run::<S, $rows, $count, false>(s) }
            };
        }
        let rows = (self.rows - tile.row).min(S::TILE_ROWS);
        match (rows, count) {
            (1, 4) => with!(1, 4),
            (2, 4) => with!(2, 4),
            (1, 2) => with!(1, 2),
            (2, 2) => with!(2, 2),
            (3, 2) => with!(3, 2),
            (4, 2) => with!(4, 2),
            (5, 2) => with!(5, 2),
            (6, 2) => with!(6, 2),
            (1, _) => with!(1, 1),
            (2, _) => with!(2, 1),
            (3, _) => with!(3, 1),
            (4, _) => with!(4, 1),
            (5, _) => with!(5, 1),
            _ => with!(6, 1),
        }
        rows
    }
}

/// Rows from `row`, panels from `panel`, k in `k..end`.
struct Tile<'a> {
    panels: &'a Panels<'a>,
    row: usize,
    panel: usize,
    k: usize,
    end: usize,
}

impl Tile<'_> {
    #[inline(always)]
    fn run<S: Simd, const M: usize, const P: usize, const BF16: bool>(&self, s: S) {
        if const { M > S::TILE_ROWS } {
            return; // never asked for; spares the compiler the code
        }
        let Self { panels, row, panel, k: k_start, end } = *self;
        let (w, d_in) = (panels.w, panels.w.d_in());
        assert!((row + M) * d_in <= panels.x.len() && end <= d_in && (panel + P) <= w.panels());
        let per_k = lines_per_k(if BF16 { Dtype::Bf16 } else { Dtype::F32 });
        // Through memory once at each end, so that ragged edges stay out of the loop and the sums in registers.
        let mut sums = [[[0.0f32; PANEL]; P]; M];
        if k_start > 0 {
            self.each(&mut sums, |sums, y, _| sums[..y.len()].copy_from_slice(y));
        }
        let mut acc = [[[s.splat(0.0); 2]; P]; M];
        // SAFETY: rows and k are inside `x`, panels and k inside `w`, as asserted; a row of `sums` is two vectors.
        unsafe {
            for (acc, sums) in acc.iter_mut().zip(&sums) {
                for (acc, sums) in acc.iter_mut().zip(sums) {
                    *acc = [s.load(sums.as_ptr()), s.load(sums.as_ptr().add(LANES))];
                }
            }
            let x = panels.x.as_ptr().add(row * d_in);
            let lines: *const Line = w.lines().as_ptr().add(panel * w.panel_lines());
            for k in k_start..end {
                let mut weights = [[s.splat(0.0); 2]; P];
                for (p, weights) in weights.iter_mut().enumerate() {
                    let line = lines.add(p * w.panel_lines() + k * per_k);
                    *weights = load_weights::<S, BF16>(s, line);
                    s.prefetch(line.wrapping_add(PREFETCH_K * per_k).cast());
                }
                for (m, acc) in acc.iter_mut().enumerate() {
                    let x = s.splat(*x.add(m * d_in + k));
                    for (acc, weights) in acc.iter_mut().zip(&weights) {
                        acc[0] = s.fma(x, weights[0], acc[0]);
                        acc[1] = s.fma(x, weights[1], acc[1]);
                    }
                }
            }
            for (acc, sums) in acc.iter().zip(&mut sums) {
                for (acc, sums) in acc.iter().zip(sums) {
                    s.store(sums.as_mut_ptr(), acc[0]);
                    s.store(sums.as_mut_ptr().add(LANES), acc[1]);
                }
            }
        }
        match panels.bias {
            Some(bias) if end == d_in => self.each(&mut sums, |sums, y, column| {
                for ((y, sum), bias) in y.iter_mut().zip(sums).zip(&bias[column..]) {
                    *y = *sum + bias;
                }
            }),
            _ => self.each(&mut sums, |sums, y, _| y.copy_from_slice(&sums[..y.len()])),
        }
    }

    /// Calls `visit(sums, columns of y, first column)` for each row and panel of the tile.
    #[inline(always)]
    fn each<const M: usize, const P: usize>(
        &self,
        sums: &mut [[[f32; PANEL]; P]; M],
        visit: impl Fn(&mut [f32; PANEL], &mut [f32], usize),
    ) {
        let d_out = self.panels.w.d_out();
        for (m, sums) in sums.iter_mut().enumerate() {
            for (p, sums) in sums.iter_mut().enumerate() {
                let column = (self.panel + p) * PANEL;
                // SAFETY: `row + m < rows` and `column < d_out`, and no other unit has this panel.
                let y = unsafe {
                    let at = self.panels.y.at((self.row + m) * d_out + column);
                    std::slice::from_raw_parts_mut(at, (d_out - column).min(PANEL))
                };
                visit(sums, y, column);
            }
        }
    }
}

/// One k of a panel.
///
/// # Safety
/// The panel's lines of this k must be readable at `line`.
#[inline(always)]
unsafe fn load_weights<S: Simd, const BF16: bool>(s: S, line: *const Line) -> [S::V; 2] {
    // SAFETY: the caller vouches for the lines.
    unsafe { if BF16 { s.load_pair(line) } else { [s.load(line.cast()), s.load(line.add(1).cast())] } }
}
