//! Tiles of the product in registers: some rows times some panels, all sums of f32 in one chain in the order of k.

use super::amx;
use super::cpu::Product;
use super::input::{Input, pair_stride};
use super::pack::PANEL;
use crate::dtype::Dtype;
use crate::lora_expand::fused::{Fused, OfRun};
use crate::simd::{Isa, Kernel, LANES, Line, Simd};
use std::ops::Range;

/// Inputs taken at a time when there are several tiles of rows: what a unit needs of the weights stays in the second-level
/// cache. Between two runs the sums wait in `y`; storing an f32 does not change it.
const K_BLOCK: usize = 4096;

/// With so many rows the weights are asked for ahead of their use. With fewer, nothing is in the way of the processor's own
/// guesses, which are better; with more, arithmetic takes far longer than memory.
const ROWS_FETCHED_AHEAD: std::ops::RangeInclusive<usize> = 5..=64;

/// Tiles of a unit whose weights are asked for ahead, at least: each asks for one of three panels, evenly over the unit's time.
const TILES_FETCHED_AHEAD: usize = 3;

/// How many panels may form a group, best first. Few rows take many, for enough independent sums and streams of memory.
pub(super) const fn group_sizes(isa: Isa, rows: usize, pairs: bool) -> &'static [usize] {
    match (isa, rows) {
        (Isa::Amx, _) if pairs => &[4, 2],
        (Isa::Portable | Isa::Avx2, 1) => &[4, 2],
        (Isa::Portable | Isa::Avx2, _) => &[2],
        (_, 1 | 2) => &[8, 6, 4, 3],
        (_, 3 | 4) if pairs => &[6, 4, 3],
        _ => &[3],
    }
}

/// Rows times panels of a product, and what adapters add to them; `None` unless [`Product::takes_deltas`].
pub(super) fn run(product: &Product, panels: Range<usize>, rows: Range<usize>, deltas: Option<&Fused>) {
    match (product.x, product.isa) {
        (Input::Pairs(x), Isa::Amx) => amx::run(product, x, panels, rows),
        _ => product.isa.run(Group { product, panels, rows, deltas }),
    }
}

/// Lines of a panel that [`fetch`] asks for.
const LINES_FETCHED: usize = 32;

/// Asks for the first lines of each panel.
pub(super) fn fetch(product: &Product, panels: Range<usize>) {
    product.isa.run(Fetch { product, panels });
}

struct Fetch<'a> {
    product: &'a Product<'a>,
    panels: Range<usize>,
}

impl Kernel for Fetch<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let w = self.product.w;
        for panel in self.panels {
            for line in w.lines()[panel * w.panel_lines()..].iter().take(LINES_FETCHED.min(w.panel_lines())) {
                s.prefetch_far(std::ptr::from_ref(line).cast());
            }
        }
    }
}

struct Group<'a> {
    product: &'a Product<'a>,
    panels: Range<usize>,
    rows: Range<usize>,
    deltas: Option<&'a Fused<'a>>,
}

impl Kernel for Group<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match (self.product.x, self.product.w.dtype()) {
            (Input::F32(x), Dtype::F32) => self.all::<S, Single>(s, x.as_ptr().cast()),
            (Input::F32(x), Dtype::Bf16) => self.all::<S, Widened>(s, x.as_ptr().cast()),
            (Input::Pairs(x), _) => self.all::<S, Pairs>(s, x.as_ptr().cast()),
        }
    }
}

impl Group<'_> {
    #[inline(always)]
    fn all<S: Simd, O: Operands>(&self, s: S, x: *const u32) {
        let w = self.product.w;
        let rows_max = O::rows_max::<S>();
        let is_fetched_ahead = ROWS_FETCHED_AHEAD.contains(&self.rows.len());
        let tiles_of = |rows: &Range<usize>| {
            let is_all = is_fetched_ahead && rows.len() == self.rows.len();
            rows.len().div_ceil(rows_max).max(if is_all { TILES_FETCHED_AHEAD } else { 1 })
        };
        let tiles: usize = self.spans().map(|(rows, _)| tiles_of(&rows)).sum();
        let steps = w.d_in() / O::INPUTS;
        let most = if tiles == 1 { steps } else { K_BLOCK / O::INPUTS };
        let block = steps.div_ceil(steps.div_ceil(most.max(1)).max(1)).max(1);
        let group = self.product.group_panels();
        let mut first = 0;
        while first < steps.max(1) {
            let end = (first + block).min(steps);
            let mut number = 0;
            for (rows, deltas) in self.spans() {
                let count = tiles_of(&rows);
                for tile in 0..count {
                    // Tiles of nearly equal height: one of a single row would wait for its own sums.
                    let row = |tile: usize| rows.start + rows.len() * tile / count;
                    let (row, next) = (row(tile), row(tile + 1));
                    let ahead = if is_fetched_ahead { (number, tiles) } else { (0, 0) };
                    let part = Part { group: self, x, row, first, end, ahead, deltas };
                    part.panels::<S, O>(s, next - row, group);
                    number += 1;
                }
            }
            first = end.max(1);
        }
    }

    /// The rows, cut where adapters change, if they are added here.
    fn spans(&self) -> impl Iterator<Item = (Range<usize>, Option<OfRun<'_>>)> {
        let mut at = self.rows.start;
        std::iter::from_fn(move || {
            let left = at..self.rows.end;
            if left.is_empty() {
                return None;
            }
            let (end, deltas) = self.deltas.map_or((left.end, None), |deltas| deltas.span(&left));
            at = end;
            Some((left.start..end, deltas))
        })
    }
}

/// How inputs and weights meet.
pub(crate) trait Operands {
    /// Inputs of a line.
    const INPUTS: usize;
    /// Inputs that one u32 of x holds.
    const PER_WORD: usize;
    /// u32 of a row of x.
    fn stride(d_in: usize) -> usize;
    /// Rows of a tile at most.
    fn rows_max<S: Simd>() -> usize;
    /// Whether tiles add deltas of adapters: for one form only, the most used one, since each is code of its own.
    const TAKES_DELTAS: bool = false;
    /// Whether the sums of so many rows and panels have a form of their own.
    fn group_fits(rows: usize, panels: usize) -> bool {
        match panels {
            4 | 6 | 8 => rows <= 2,
            2 | 3 => true,
            _ => false,
        }
    }
    /// The line's weights.
    type W<S: Simd>: Copy;
    /// # Safety
    /// The line must be readable.
    unsafe fn weights<S: Simd>(s: S, line: *const Line) -> Self::W<S>;
    /// The inputs of a row that meet a line.
    type X<S: Simd>: Copy;
    /// # Safety
    /// [`Self::INPUTS`] inputs must be readable at `x`.
    unsafe fn inputs<S: Simd>(s: S, x: *const u32) -> Self::X<S>;
    /// The last input, if they are no whole lines.
    /// # Safety
    /// One input must be readable at `x`.
    unsafe fn last<S: Simd>(s: S, x: *const u32) -> Self::X<S>;
    fn add<S: Simd>(s: S, sum: S::V, x: Self::X<S>, w: Self::W<S>) -> S::V;
}

/// f32 times f32.
pub(crate) struct Single;

impl Operands for Single {
    const INPUTS: usize = 1;
    const PER_WORD: usize = 1;
    fn stride(d_in: usize) -> usize {
        d_in
    }
    fn rows_max<S: Simd>() -> usize {
        S::TILE_ROWS
    }
    type W<S: Simd> = S::V;
    #[inline(always)]
    unsafe fn weights<S: Simd>(s: S, line: *const Line) -> S::V {
        // SAFETY: the caller vouches for the line.
        unsafe { s.load(line.cast()) }
    }
    type X<S: Simd> = S::V;
    #[inline(always)]
    unsafe fn inputs<S: Simd>(s: S, x: *const u32) -> S::V {
        // SAFETY: the caller vouches for the input.
        s.splat(f32::from_bits(unsafe { *x }))
    }
    #[inline(always)]
    unsafe fn last<S: Simd>(s: S, _: *const u32) -> S::V {
        s.splat(0.0)
    }
    #[inline(always)]
    fn add<S: Simd>(s: S, sum: S::V, x: S::V, w: S::V) -> S::V {
        s.fma(x, w, sum)
    }
}

/// f32 times bf16 made f32.
struct Widened;

impl Operands for Widened {
    const INPUTS: usize = 2;
    const PER_WORD: usize = 1;
    fn stride(d_in: usize) -> usize {
        d_in
    }
    fn rows_max<S: Simd>() -> usize {
        S::TILE_ROWS
    }
    type W<S: Simd> = [S::V; 2];
    #[inline(always)]
    unsafe fn weights<S: Simd>(s: S, line: *const Line) -> [S::V; 2] {
        // SAFETY: the caller vouches for the line.
        unsafe { s.load_pair(line) }
    }
    type X<S: Simd> = [S::V; 2];
    #[inline(always)]
    unsafe fn inputs<S: Simd>(s: S, x: *const u32) -> [S::V; 2] {
        // SAFETY: the caller vouches for two inputs.
        unsafe { [s.splat(f32::from_bits(*x)), s.splat(f32::from_bits(*x.add(1)))] }
    }
    #[inline(always)]
    unsafe fn last<S: Simd>(s: S, x: *const u32) -> [S::V; 2] {
        // SAFETY: the caller vouches for one input.
        unsafe { [s.splat(f32::from_bits(*x)), s.splat(0.0)] }
    }
    #[inline(always)]
    fn add<S: Simd>(s: S, sum: S::V, x: [S::V; 2], w: [S::V; 2]) -> S::V {
        s.fma(x[1], w[1], s.fma(x[0], w[0], sum))
    }
}

/// Pairs of bf16 in one instruction.
pub(crate) struct Pairs;

impl Operands for Pairs {
    const INPUTS: usize = 2;
    const PER_WORD: usize = 2;
    const TAKES_DELTAS: bool = true;
    fn stride(d_in: usize) -> usize {
        pair_stride(d_in)
    }
    fn rows_max<S: Simd>() -> usize {
        if S::DOT { 7 } else { S::TILE_ROWS }
    }
    fn group_fits(rows: usize, panels: usize) -> bool {
        match panels {
            4 | 6 => rows <= 4,
            8 => rows <= 2,
            2 | 3 => true,
            _ => false,
        }
    }
    type W<S: Simd> = S::V;
    #[inline(always)]
    unsafe fn weights<S: Simd>(s: S, line: *const Line) -> S::V {
        // SAFETY: the caller vouches for the line.
        unsafe { s.load(line.cast()) }
    }
    type X<S: Simd> = u32;
    #[inline(always)]
    unsafe fn inputs<S: Simd>(_: S, x: *const u32) -> u32 {
        // SAFETY: the caller vouches for the pair.
        unsafe { *x }
    }
    #[inline(always)]
    unsafe fn last<S: Simd>(_: S, x: *const u32) -> u32 {
        // SAFETY: the caller vouches for the pair, which is filled up with a zero.
        unsafe { *x }
    }
    #[inline(always)]
    fn add<S: Simd>(s: S, sum: S::V, x: u32, w: S::V) -> S::V {
        s.dot(sum, x, w)
    }
}

/// Rows from `row` on, lines `first..end` of each panel.
struct Part<'a> {
    group: &'a Group<'a>,
    x: *const u32,
    row: usize,
    first: usize,
    end: usize,
    /// This tile's number among those that share the next group's fetching.
    ahead: (usize, usize),
    /// What is added to these rows.
    deltas: Option<OfRun<'a>>,
}

impl Part<'_> {
    /// All panels of the unit.
    #[inline(always)]
    fn panels<S: Simd, O: Operands>(&self, s: S, rows: usize, group: usize) {
        let Range { start: mut panel, end } = self.group.panels;
        while panel < end {
            let count = if end - panel >= group && O::group_fits(rows, group) { group } else { 1 };
            self.rows::<S, O>(s, rows, panel, count);
            panel += count;
        }
    }

    /// The extents become constants here, so that sums live in registers.
    #[inline(always)]
    fn rows<S: Simd, O: Operands>(&self, s: S, rows: usize, panel: usize, count: usize) {
        macro_rules! with {
            ($rows:literal) => {
                match count {
                    3 => self.tile::<S, O, $rows, 3>(s, panel),
                    2 => self.tile::<S, O, $rows, 2>(s, panel),
                    _ => self.tile::<S, O, $rows, 1>(s, panel),
                }
            };
            ($rows:literal, wide) => {
                match count {
                    8 => self.tile::<S, O, $rows, 8>(s, panel),
                    6 => self.tile::<S, O, $rows, 6>(s, panel),
                    4 => self.tile::<S, O, $rows, 4>(s, panel),
                    _ => with!($rows),
                }
            };
        }
        match rows {
            1 => with!(1, wide),
            2 => with!(2, wide),
            3 => match count {
                6 => self.tile::<S, O, 3, 6>(s, panel),
                4 => self.tile::<S, O, 3, 4>(s, panel),
                _ => with!(3),
            },
            4 => match count {
                6 => self.tile::<S, O, 4, 6>(s, panel),
                4 => self.tile::<S, O, 4, 4>(s, panel),
                _ => with!(4),
            },
            5 => with!(5),
            6 => with!(6),
            7 => with!(7),
            _ => with!(8),
        }
    }

    #[inline(always)]
    fn tile<S: Simd, O: Operands, const M: usize, const P: usize>(&self, s: S, panel: usize) {
        if const { M > 8 } || M > O::rows_max::<S>() || !(P == 1 || O::group_fits(M, P)) {
            return; // never asked for; spares the compiler the code
        }
        let Product { y, w, rows, .. } = *self.group.product;
        let (d_in, d_out, panel_lines) = (w.d_in(), w.d_out(), w.panel_lines());
        let (stride, steps) = (O::stride(d_in), d_in / O::INPUTS);
        assert!(self.row + M <= rows && self.end <= steps && panel + P <= w.panels());
        let mut acc = [[s.splat(0.0); P]; M];
        let column = |p: usize| (panel + p) * PANEL;
        let lanes = |p: usize| (d_out - column(p)).min(LANES);
        // SAFETY: the row and the columns are in `y`, and no other unit has them.
        let at = |m: usize, p: usize| unsafe { y.at((self.row + m) * d_out + column(p)) };
        if self.first > 0 {
            for (m, acc) in acc.iter_mut().enumerate() {
                for (p, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: as above.
                    *acc = unsafe { s.load_part(at(m, p), lanes(p)) };
                }
            }
        }
        let lines: *const Line = w.lines()[panel * panel_lines..].as_ptr();
        let (fetched, far) = self.fetched::<P>();
        // SAFETY: rows and inputs are in x (`Product::new` checked), panels and lines in w; a prefetch may go anywhere.
        unsafe {
            let x = self.x.add(self.row * stride);
            let mut line = lines.add(self.first);
            for step in self.first..self.end {
                let weights: [O::W<S>; P] = std::array::from_fn(|p| O::weights(s, line.add(p * panel_lines)));
                for p in fetched.clone() {
                    s.prefetch_far(line.wrapping_add(far + p * panel_lines).cast());
                }
                for (m, acc) in acc.iter_mut().enumerate() {
                    let x = O::inputs(s, x.add(m * stride + step * O::INPUTS / O::PER_WORD));
                    for (acc, weights) in acc.iter_mut().zip(&weights) {
                        *acc = O::add(s, *acc, x, *weights);
                    }
                }
                line = line.add(1);
            }
            if self.end == steps && steps * O::INPUTS < d_in {
                for (p, line) in (0..P).map(|p| (p, lines.add(p * panel_lines + steps))) {
                    let weights = O::weights(s, line);
                    for (m, acc) in acc.iter_mut().enumerate() {
                        let x = O::last(s, x.add(m * stride + steps * O::INPUTS / O::PER_WORD));
                        acc[p] = O::add(s, acc[p], x, weights);
                    }
                }
            }
        }
        if self.end == steps {
            self.add_rest::<S, O, M, P>(s, &mut acc, panel);
        }
        for (m, acc) in acc.iter().enumerate() {
            for (p, acc) in acc.iter().enumerate() {
                // SAFETY: as above.
                unsafe { s.store_part(at(m, p), *acc, lanes(p)) };
            }
        }
    }

    /// What comes on top of the whole sums.
    #[inline(always)]
    fn add_rest<S: Simd, O: Operands, const M: usize, const P: usize>(
        &self,
        s: S,
        acc: &mut [[S::V; P]; M],
        panel: usize,
    ) {
        if let Some(bias) = self.group.product.bias {
            for (p, bias) in bias[panel * PANEL..].chunks(PANEL).take(P).enumerate() {
                // SAFETY: a chunk has so many elements.
                let bias = unsafe { s.load_part(bias.as_ptr(), bias.len()) };
                for acc in acc.iter_mut() {
                    acc[p] = s.add(acc[p], bias);
                }
            }
        }
        if O::TAKES_DELTAS
            && const { P <= 3 }
            && let Some(deltas) = &self.deltas
        {
            deltas.add(s, acc, self.row, panel * PANEL);
        }
    }

    /// Which panels of the next group this tile asks for as it goes, and how many lines on they are: the tiles of a group
    /// share the next one's, so that memory is busy all the time.
    #[inline(always)]
    fn fetched<const P: usize>(&self) -> (Range<usize>, usize) {
        let (tile, tiles) = self.ahead;
        if tiles == 0 {
            return (0..0, 0);
        }
        (P * tile / tiles..P * (tile + 1) / tiles, self.group.panels.len() * self.group.product.w.panel_lines())
    }
}
