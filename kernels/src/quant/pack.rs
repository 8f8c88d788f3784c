//! How a quantised matrix lies in memory.

use super::format::{self, QuantFormat, SUB, SUBS_OF_K, SubBlock};
use crate::error::{OpError, same};
use crate::pages::Lines;
use crate::parallel::{self, SharedMut};
use half::f16;

/// Outputs of a panel.
pub(super) const PANEL: usize = 16;
/// k that one line of 8-bit numbers holds.
const GROUP: usize = 4;
/// Groups of a sub-block.
pub(super) const GROUPS: usize = SUB / GROUP;

/// A cache line of stored numbers: byte `4 o + i` is output `o` and element `i` of a group of four.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; PANEL * GROUP]);

/// A half-word for each output of a panel.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(super) struct Words(pub(super) [u16; PANEL]);

/// A piece of a quantised matrix, row-major `[d_out, d_in]`, as the file holds it.
#[derive(Clone, Copy, Debug)]
pub struct QuantPart<'a> {
    /// `d_out` rows of `d_in / block_len` blocks.
    pub data: &'a [u8],
    /// How they are stored.
    pub format: QuantFormat,
    /// Outputs.
    pub d_out: usize,
    /// Inputs.
    pub d_in: usize,
}

/// A weight matrix `[d_out, d_in]` in the bits its file has, repacked for integer dot products.
///
/// Parts of different formats lie one after the other. Each is panels of 16 outputs; of a panel, sub-block after sub-block
/// of 32 elements: lines of low nibbles (line `i` has the groups `i` and, in the high nibble, `i + 4`) and of the bits above
/// them, or lines of bytes. Factors lie in arrays of their own, so that lines stay whole cache lines.
#[derive(Debug)]
pub struct QuantWeight {
    segments: Vec<Segment>,
    d_out: usize,
    d_in: usize,
}

/// Outputs of one format.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) format: QuantFormat,
    /// Output of the matrix that is its first.
    pub(super) first: usize,
    pub(super) d_out: usize,
    /// Sub-blocks of a row.
    pub(super) subs: usize,
    lines: Lines,
    words: Lines,
    supers: Lines,
}

impl QuantWeight {
    /// Packs `parts`, concatenated along `d_out` (q, k, v; gate, up).
    ///
    /// # Errors
    /// [`OpError::Shape`] if the parts differ in `d_in`, a part's rows are no whole blocks or its data has another length than
    /// its shape says, or nothing is left; [`OpError::OutOfMemory`].
    pub fn pack(parts: &[QuantPart]) -> Result<Self, OpError> {
        let d_in = parts.first().map_or(0, |part| part.d_in);
        let (mut segments, mut d_out) = (Vec::new(), 0);
        for part in parts {
            same("pack", "d_in", part.d_in, d_in)?;
            let blocks = part.d_in / part.format.block_len();
            same("pack", "d_in in whole blocks", part.d_in, blocks * part.format.block_len())?;
            let bytes = part.d_out.saturating_mul(blocks).saturating_mul(part.format.block_bytes());
            same("pack", "bytes", part.data.len(), bytes)?;
            if bytes == 0 {
                return Err(OpError::Shape { op: "pack", what: "elements", got: 0, want: 1 });
            }
            segments.push(Segment::pack(part, d_out)?);
            d_out += part.d_out;
        }
        same("pack", "parts", segments.len().max(1), segments.len())?;
        Ok(Self { segments, d_out, d_in })
    }

    /// Outputs.
    #[must_use]
    pub const fn d_out(&self) -> usize {
        self.d_out
    }

    /// Inputs.
    #[must_use]
    pub const fn d_in(&self) -> usize {
        self.d_in
    }

    /// Memory in bytes, padding included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let bytes = |s: &Segment| size_of_val(&s.lines[..]) + size_of_val(&s.words[..]) + size_of_val(&s.supers[..]);
        self.segments.iter().map(bytes).sum()
    }

    /// Element `[output, k]`: the number that dequantising the file gives, bit for bit.
    ///
    /// # Panics
    /// If either is out of range.
    #[must_use]
    pub fn element(&self, output: usize, k: usize) -> f32 {
        assert!(output < self.d_out && k < self.d_in, "element [{output}, {k}] of [{}, {}]", self.d_out, self.d_in);
        let (segment, output) = self.segment(output);
        segment.element(output, k)
    }

    /// The segment of an output, and the output's place there.
    pub(super) fn segment(&self, output: usize) -> (&Segment, usize) {
        let after = self.segments.partition_point(|segment| segment.first <= output);
        let segment = &self.segments[after - 1];
        (segment, output - segment.first)
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Panels of all segments.
    pub(super) fn panels(&self) -> usize {
        self.segments.iter().map(Segment::panels).sum()
    }
}

/// Lines of a sub-block of a panel.
pub(super) const fn lines_of_sub(format: QuantFormat) -> usize {
    format.bits()
}

impl Segment {
    pub(super) const fn panels(&self) -> usize {
        self.d_out.div_ceil(PANEL)
    }

    /// K-blocks of a row; 0 if the format has none.
    const fn blocks(&self) -> usize {
        if self.format.is_k() { self.subs / SUBS_OF_K } else { 0 }
    }

    /// Lines of panel `panel`.
    pub(super) fn panel_lines(&self, panel: usize) -> &[Line] {
        let count = self.subs * lines_of_sub(self.format);
        &as_lines(&self.lines)[panel * count..][..count]
    }

    /// Factors of the sub-blocks of panel `panel`.
    pub(super) fn panel_words(&self, panel: usize) -> &[Words] {
        let count = self.subs * self.format.words();
        &as_words(&self.words)[panel * count..][..count]
    }

    /// Factors of the K-blocks of panel `panel`.
    pub(super) fn panel_supers(&self, panel: usize) -> &[Words] {
        let count = self.blocks() * self.format.super_words();
        &as_words(&self.supers)[panel * count..][..count]
    }

    fn pack(part: &QuantPart, first: usize) -> Result<Self, OpError> {
        let (format, d_out) = (part.format, part.d_out);
        let (subs, panels) = (part.d_in / SUB, d_out.div_ceil(PANEL));
        let (lines, words) = (subs * lines_of_sub(format), subs * format.words());
        let supers = part.d_in / format.block_len() * format.super_words();
        let of_words = |count: usize| Lines::new((panels * count * size_of::<Words>()).div_ceil(size_of::<Line>()));
        let mut out = Self {
            format,
            first,
            d_out,
            subs,
            lines: Lines::new(panels * lines)?,
            words: of_words(words)?,
            supers: of_words(supers)?,
        };
        let shared = (pointer(&mut out.lines), pointer(&mut out.words), pointer(&mut out.supers));
        parallel::for_each(panels, panels * lines * 64, |panel| {
            // SAFETY: what belongs to panel `panel` of each array, which no other unit writes; any bytes are numbers and words.
            let mut target = unsafe {
                PanelMut {
                    format,
                    lines: std::slice::from_raw_parts_mut(shared.0.at(panel * lines * size_of::<Line>()).cast(), lines),
                    words: std::slice::from_raw_parts_mut(
                        shared.1.at(panel * words * size_of::<Words>()).cast(),
                        words,
                    ),
                    supers: std::slice::from_raw_parts_mut(
                        shared.2.at(panel * supers * size_of::<Words>()).cast(),
                        supers,
                    ),
                }
            };
            let row_bytes = part.d_in / format.block_len() * format.block_bytes();
            for (lane, row) in part.data.chunks_exact(row_bytes).skip(panel * PANEL).take(PANEL).enumerate() {
                target.pack_row(lane, row);
            }
        });
        Ok(out)
    }

    fn element(&self, output: usize, k: usize) -> f32 {
        let (q, [first, second]) = (self.number(output, k) as f32, self.factors(output, k / SUB));
        match self.format {
            _ if self.format.has_min() => q * first + second,
            _ if self.format.has_halves() && k % SUB >= SUB / 2 => q * second,
            _ => q * first,
        }
    }

    /// The whole number of an element.
    pub(super) fn number(&self, output: usize, k: usize) -> i32 {
        let lines = &self.panel_lines(output / PANEL)[k / SUB * lines_of_sub(self.format)..];
        i32::from(stored(self.format, lines, output % PANEL, k % SUB)) - self.format.center()
    }

    /// The factor of a sub-block's numbers; its addend, or the factor of its second half, or 0.
    pub(super) fn factors(&self, output: usize, sub: usize) -> [f32; 2] {
        let (format, panel, lane) = (self.format, output / PANEL, output % PANEL);
        let word = |i: usize| self.panel_words(panel)[sub * format.words() + i].0[lane];
        let above = |i: usize| half(self.panel_supers(panel)[sub / SUBS_OF_K * format.super_words() + i].0[lane]);
        let [low, high] = word(0).to_le_bytes();
        match (format.is_k(), format.has_min()) {
            (false, false) => [half(word(0)), 0.0],
            (false, true) => [half(word(0)), half(word(1))],
            (true, true) => [above(0) * f32::from(low), -(above(1) * f32::from(high))],
            (true, false) => [low, high].map(|scale| above(0) * f32::from(scale.cast_signed())),
        }
    }
}

fn half(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

fn as_lines(lines: &Lines) -> &[Line] {
    // SAFETY: the same memory and alignment; any bytes are numbers.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len()) }
}

fn as_words(lines: &Lines) -> &[Words] {
    const WORDS: usize = size_of::<Line>() / size_of::<Words>();
    // SAFETY: the same memory, aligned for more than that; any bytes are words.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * WORDS) }
}

fn pointer(lines: &mut Lines) -> SharedMut<u8> {
    let lines = lines.as_mut();
    // SAFETY: the same memory as bytes.
    SharedMut::new(unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), size_of_val(lines)) })
}

/// A panel of zeros that is being filled.
struct PanelMut<'a> {
    format: QuantFormat,
    lines: &'a mut [Line],
    words: &'a mut [Words],
    supers: &'a mut [Words],
}

impl PanelMut<'_> {
    /// Writes a row of the file into lane `lane`.
    fn pack_row(&mut self, lane: usize, row: &[u8]) {
        let format = self.format;
        let subs = format.block_len() / SUB;
        for (b, block) in row.chunks_exact(format.block_bytes()).enumerate() {
            for (i, word) in format::super_words(format, block).into_iter().take(format.super_words()).enumerate() {
                self.supers[b * format.super_words() + i].0[lane] = word;
            }
            for sub in 0..subs {
                let SubBlock { q, words } = format::sub_block(format, block, sub);
                let at = b * subs + sub;
                for (i, word) in words.into_iter().take(format.words()).enumerate() {
                    self.words[at * format.words() + i].0[lane] = word;
                }
                let lines = &mut self.lines[at * lines_of_sub(format)..][..lines_of_sub(format)];
                for (k, q) in q.into_iter().enumerate() {
                    store(format, lines, lane, k, q);
                }
            }
        }
    }
}

/// Where the bits of a group above the nibble lie: line behind those of nibbles, lowest bit, number of bits.
const fn high_bits(format: QuantFormat, group: usize) -> (usize, usize, usize) {
    match format.bits() {
        5 => (0, group, 1),
        6 => (group / 4, group % 4 * 2, 2),
        _ => (0, 0, 0),
    }
}

/// Adds `q`, element `k` of a sub-block, to lines of zeros.
fn store(format: QuantFormat, lines: &mut [Line], lane: usize, k: usize, q: u8) {
    let (group, byte) = (k / GROUP, lane * GROUP + k % GROUP);
    if format.bits() == 8 {
        lines[group].0[byte] = q;
        return;
    }
    lines[group % 4].0[byte] |= (q & 15) << (4 * (group / 4));
    let (line, shift, bits) = high_bits(format, group);
    if bits > 0 {
        lines[4 + line].0[byte] |= q >> 4 << shift;
    }
}

/// What [`store`] stored.
fn stored(format: QuantFormat, lines: &[Line], lane: usize, k: usize) -> u8 {
    let (group, byte) = (k / GROUP, lane * GROUP + k % GROUP);
    if format.bits() == 8 {
        return lines[group].0[byte];
    }
    let low = lines[group % 4].0[byte] >> (4 * (group / 4)) & 15;
    let (line, shift, bits) = high_bits(format, group);
    if bits == 0 {
        return low;
    }
    let mask = (1u8 << bits) - 1;
    low | (lines[4 + line].0[byte] >> shift & mask) << 4
}
