//! The definition and the panel kernel.

use super::activations::{Activations, Numbers, RowTile, TILE_ROWS};
use super::format::{QuantFormat, SUB, SUBS_OF_K};
use super::isa::{Groups, Isa, Kernel, Vector};
use super::pack::{GROUPS, PANEL, QuantWeight, Segment, Words, lines_of_sub};
use crate::parallel::{self, SharedMut};
use std::cell::Cell;

/// The definition.
#[cfg(test)]
pub(super) fn reference(y: &mut [f32], x: &[f32], w: &QuantWeight, bias: Option<&[f32]>) {
    for (y, x) in y.chunks_mut(w.d_out()).zip(x.chunks(w.d_in())) {
        let x: Vec<_> = x.as_chunks::<SUB>().0.iter().map(super::activations::quantise).collect();
        for (o, y) in y.iter_mut().enumerate() {
            let (segment, o_in) = w.segment(o);
            let mut sum = 0.0f32;
            for (sub, x) in x.iter().enumerate() {
                let term = |k: usize| segment.number(o_in, sub * SUB + k) * i32::from(x.numbers[k]);
                let whole = |range: std::ops::Range<usize>| range.map(term).sum::<i32>() as f32 * x.scale;
                let [first, second] = segment.factors(o_in, sub);
                if segment.format.has_halves() {
                    sum = whole(0..SUB / 2).mul_add(first, sum);
                    sum = whole(SUB / 2..SUB).mul_add(second, sum);
                } else {
                    sum = whole(0..SUB).mul_add(first, sum);
                    if segment.format.has_min() {
                        sum = x.sum.mul_add(second, sum);
                    }
                }
            }
            *y = bias.map_or(sum, |bias| sum + bias[o]);
        }
    }
}

/// Bytes of weights that a unit of work takes against all rows: they stay in the second-level cache.
const UNIT_BYTES: usize = 256 << 10;
/// Panels of a unit, at most.
const UNIT_PANELS: usize = 16;
/// How many lines ahead of their use are asked for: hardware prefetchers stop at the ends of pages.
const PREFETCH_LINES: usize = 128;

thread_local! {
    /// Activations of the last call, so that serving allocates nothing. Taken out while in use: a thread that waits for
    /// others may begin another product.
    static ACTIVATIONS: Cell<Activations> = const { Cell::new(Activations::NONE) };
}

pub(super) fn linear(isa: Isa, y: &mut [f32], x: &[f32], w: &QuantWeight, bias: Option<&[f32]>) {
    if y.is_empty() {
        return;
    }
    let mut activations = ACTIVATIONS.take();
    activations.fill(isa, x, w.d_in() / SUB);
    let panels = w.panels();
    let chunk = panels_per_unit(panels, w.bytes(), parallel::threads());
    // About 16 bytes of weights a nanosecond, or 200 GFLOP/s.
    let work_ns = (w.bytes() / 16).max(w.d_in() * w.d_out() / 100 * activations.rows());
    let y = SharedMut::new(y);
    parallel::for_each(panels.div_ceil(chunk), work_ns, |unit| {
        let (first, end) = (unit * chunk, ((unit + 1) * chunk).min(panels));
        isa.run(Panels { y, x: &activations, w, bias, first, end });
    });
    ACTIVATIONS.set(activations);
}

/// Panels of a unit of work: few enough for the cache, and so that the threads end together.
fn panels_per_unit(panels: usize, bytes: usize, threads: usize) -> usize {
    let most = (UNIT_BYTES * panels / bytes.max(1)).clamp(1, UNIT_PANELS);
    let rounds = |chunk: usize| panels.div_ceil(chunk).div_ceil(threads) * chunk;
    (1..=most).rev().min_by_key(|&chunk| rounds(chunk)).unwrap_or(1)
}

/// All rows against the panels `first..end`, counted through the segments.
struct Panels<'a> {
    y: SharedMut<f32>,
    x: &'a Activations,
    w: &'a QuantWeight,
    bias: Option<&'a [f32]>,
    first: usize,
    end: usize,
}

impl Kernel for Panels<'_> {
    #[inline(always)]
    fn run<S: Vector>(self, s: S) {
        for first_row in (0..self.x.rows()).step_by(TILE_ROWS) {
            let tile = self.x.tile(first_row);
            let mut before = 0;
            for segment in self.w.segments() {
                let count = segment.panels();
                for panel in self.first.max(before)..self.end.min(before + count) {
                    self.panel(s, segment, panel - before, first_row, &tile);
                }
                before += count;
            }
        }
    }
}

impl Panels<'_> {
    /// All rows of a tile against one panel.
    #[inline(always)]
    fn panel<S: Vector>(&self, s: S, segment: &Segment, panel: usize, first_row: usize, tile: &RowTile) {
        let rows = PanelRows { panels: self, segment, panel, first_row, tile };
        match segment.format {
            QuantFormat::Q4_0 => rows.rows::<S, form::Q4_0>(s),
            QuantFormat::Q4_1 => rows.rows::<S, form::Q4_1>(s),
            QuantFormat::Q5_0 => rows.rows::<S, form::Q5_0>(s),
            QuantFormat::Q5_1 => rows.rows::<S, form::Q5_1>(s),
            QuantFormat::Q8_0 => rows.rows::<S, form::Q8_0>(s),
            QuantFormat::Q4_K => rows.rows::<S, form::Q4_K>(s),
            QuantFormat::Q5_K => rows.rows::<S, form::Q5_K>(s),
            QuantFormat::Q6_K => rows.rows::<S, form::Q6_K>(s),
        }
    }
}

/// A format at compile time.
trait Form {
    const FORMAT: QuantFormat;
}

/// One type for each format.
#[allow(non_camel_case_types, reason = "the names of the formats")]
mod form {
    use super::{Form, QuantFormat};

    macro_rules! forms {
        ($($name:ident)*) => {$(
            pub(super) struct $name;
            impl Form for $name {
                const FORMAT: QuantFormat = QuantFormat::$name;
            }
        )*};
    }
    forms!(Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K);
}

/// The rows of a tile against one panel.
struct PanelRows<'a> {
    panels: &'a Panels<'a>,
    segment: &'a Segment,
    panel: usize,
    first_row: usize,
    tile: &'a RowTile<'a>,
}

/// A sub-block of a panel, ready for products: numbers, and the one or two factors that [`Form::FORMAT`] has.
struct Sub<S: Vector> {
    groups: Groups<S>,
    first: S::F,
    second: S::F,
}

impl PanelRows<'_> {
    #[inline(always)]
    fn rows<S: Vector, F: Form>(&self, s: S) {
        let mut row = 0;
        while row < self.tile.rows {
            row += match self.tile.rows - row {
                // Two factors and two products at once leave no registers for the sums of 16 rows.
                16.. if S::ROWS >= 16 && !F::FORMAT.has_halves() => self.run::<S, F, 16>(s, row),
                8.. if S::ROWS >= 8 => self.run::<S, F, 8>(s, row),
                4.. if S::ROWS >= 4 => self.run::<S, F, 4>(s, row),
                2.. => self.run::<S, F, 2>(s, row),
                _ => self.run::<S, F, 1>(s, row),
            };
        }
    }

    /// Rows `row..row + M` of the tile; returns `M`.
    #[inline(always)]
    fn run<S: Vector, F: Form, const M: usize>(&self, s: S, row: usize) -> usize {
        if const { M > S::ROWS } {
            return M; // never asked for; spares the compiler the code
        }
        let Self { segment, tile, .. } = *self;
        let subs = segment.subs;
        assert!(row + M <= tile.rows && tile.numbers.len() == subs * tile.rows);
        let (lines, words) = (segment.panel_lines(self.panel), segment.panel_words(self.panel));
        let supers = segment.panel_supers(self.panel);
        let mut sums = [s.zero(); M];
        for sub in 0..subs {
            // SAFETY: `sub` is below the sub-blocks of a row, so its lines and factors are in the panel's slices.
            let w = unsafe {
                let lines = lines.as_ptr().add(sub * lines_of_sub(F::FORMAT));
                for line in 0..lines_of_sub(F::FORMAT) {
                    s.prefetch(lines.wrapping_add(PREFETCH_LINES + line));
                }
                let words = words.as_ptr().add(sub * F::FORMAT.words());
                let supers = supers.as_ptr().wrapping_add(sub / SUBS_OF_K * F::FORMAT.super_words());
                let (first, second) = factors::<S, F>(s, words, supers);
                Sub { groups: groups::<S, F>(s, lines), first, second }
            };
            // SAFETY: `row + m < tile.rows`, so the rows are in the tile, as asserted.
            let x = unsafe { tile.numbers.as_ptr().add(sub * tile.rows + row) };
            // Written out, so that the sums stay in registers.
            macro_rules! rows {
                ($($m:literal)*) => {$(
                    if $m < M {
                        // SAFETY: as above.
                        sums[$m] = add_sub::<S, F>(s, sums[$m], &w, unsafe { &*x.add($m) });
                    }
                )*};
            }
            rows!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        }
        for (m, sum) in sums.into_iter().enumerate() {
            self.store(s.to_array(sum), self.first_row + row + m);
        }
        M
    }

    #[inline(always)]
    fn store(&self, sums: [f32; PANEL], row: usize) {
        let Panels { y, w, bias, .. } = self.panels;
        let count = (self.segment.d_out - self.panel * PANEL).min(PANEL);
        let column = self.segment.first + self.panel * PANEL;
        // SAFETY: the columns are those of this panel, which no other unit has, in a row of `y`.
        let y = unsafe { std::slice::from_raw_parts_mut(y.at(row * w.d_out() + column), count) };
        match bias {
            Some(bias) => {
                for ((y, sum), bias) in y.iter_mut().zip(sums).zip(&bias[column..]) {
                    *y = sum + bias;
                }
            }
            None => y.copy_from_slice(&sums[..count]),
        }
    }
}

/// The numbers of a sub-block, one vector for each group of four elements.
///
/// # Safety
/// The lines of the sub-block must be readable at `lines`.
#[inline(always)]
unsafe fn groups<S: Vector, F: Form>(s: S, lines: *const super::pack::Line) -> Groups<S> {
    // SAFETY: the caller vouches for as many lines as the format has bits.
    let line = |i: usize| unsafe { s.load_line(lines.add(i)) };
    if F::FORMAT.bits() == 8 {
        return [line(0), line(1), line(2), line(3), line(4), line(5), line(6), line(7)];
    }
    let nibbles = [line(0), line(1), line(2), line(3)];
    let mut groups = [nibbles[0]; GROUPS];
    for i in 0..4 {
        (groups[i], groups[i + 4]) = (s.low_nibbles(nibbles[i]), s.high_nibbles(nibbles[i]));
    }
    // The bits above the nibble, by the places that `pack` gave them.
    if F::FORMAT.bits() == 5 {
        let high = line(4);
        for (g, group) in groups.iter_mut().enumerate() {
            *group = s.with_bits(*group, high, 4 - g as i32, 0x10);
        }
    }
    if F::FORMAT.bits() == 6 {
        let high = [line(4), line(5)];
        for (g, group) in groups.iter_mut().enumerate() {
            *group = s.with_bits(*group, high[g / 4], 4 - 2 * (g % 4) as i32, 0x30);
        }
    }
    groups
}

/// What a number is multiplied by, and the addend of an element or the factor of the second half.
///
/// # Safety
/// The factors of the sub-block must be readable at `words`, those of its K-block at `supers`.
#[inline(always)]
unsafe fn factors<S: Vector, F: Form>(s: S, words: *const Words, supers: *const Words) -> (S::F, S::F) {
    // SAFETY: the caller vouches for the factors that the format has.
    unsafe {
        if !F::FORMAT.is_k() {
            let second = if F::FORMAT.has_min() { s.load_f16(words.add(1).cast()) } else { s.zero() };
            return (s.load_f16(words.cast()), second);
        }
        let (bytes, d) = (s.load_u16(words.cast()), s.load_f16(supers.cast()));
        if F::FORMAT.has_halves() {
            let (first, second) = (s.low_signed(bytes), s.low_signed(s.high_byte(bytes)));
            return (s.mul(d, s.to_f32(first)), s.mul(d, s.to_f32(second)));
        }
        let dmin = s.load_f16(supers.add(1).cast());
        let min = s.mul(dmin, s.to_f32(s.high_byte(bytes)));
        (s.mul(d, s.to_f32(s.low_byte(bytes))), s.mul(min, s.splat(-1.0)))
    }
}

/// `sum` and the products of one sub-block with one row of `x`.
#[inline(always)]
fn add_sub<S: Vector, F: Form>(s: S, sum: S::F, w: &Sub<S>, x: &Numbers) -> S::F {
    let center = F::FORMAT.center() - if F::FORMAT.bits() == 8 { S::DOT_CENTER } else { 0 };
    // What the numbers of `w` are stored too high, times those of `x`.
    let off = match center {
        0 => 0,
        8 => x.off[0],
        16 => x.off[1],
        _ => x.off[2],
    };
    let scale = s.splat(x.scale);
    let p = x.numbers.as_ptr();
    macro_rules! dot {
        ($off:expr, $groups:expr, $first:expr) => {{
            // SAFETY: the 32 numbers at `p` are those of eight groups, the first or the last 16 those of four; `quantise`
            // makes none below -127.
            let whole = unsafe {
                match F::FORMAT.bits() {
                    4 => s.dot::<4>(s.splat_i32($off), $groups, p.add($first)),
                    5 => s.dot::<5>(s.splat_i32($off), $groups, p.add($first)),
                    6 => s.dot::<6>(s.splat_i32($off), $groups, p.add($first)),
                    _ => s.dot::<8>(s.splat_i32($off), $groups, p.add($first)),
                }
            };
            s.mul(s.to_f32(whole), scale)
        }};
    }
    if F::FORMAT.has_halves() {
        let (first, last) = w.groups.split_at(GROUPS / 2);
        let sum = s.fma(dot!(x.off_halves[0], first, 0), w.first, sum);
        return s.fma(dot!(x.off_halves[1], last, SUB / 2), w.second, sum);
    }
    let sum = s.fma(dot!(off, &w.groups, 0), w.first, sum);
    if F::FORMAT.has_min() { s.fma(s.splat(x.sum), w.second, sum) } else { sum }
}
