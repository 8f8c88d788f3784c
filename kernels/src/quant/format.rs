//! The blocks of GGUF files, as the GGUF specification and ggml's quantisation formats define them.
//!
//! Every format is read as sub-blocks of 32 elements: whole numbers without a sign in 4, 5, 6 or 8 bits, and the factors
//! that make weights of them. A K-block is eight sub-blocks under one or two further factors.

/// Elements of a sub-block: what one scale of an activation covers.
pub(super) const SUB: usize = 32;
/// Sub-blocks of a K-block.
pub(super) const SUBS_OF_K: usize = 8;

/// How a file stores a weight. `d`, `m`, `dmin` are half-precision factors, `s` and `t` whole numbers for each sub-block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(non_camel_case_types, reason = "the names that files and tools use")]
pub enum QuantFormat {
    /// 4 bits: `(q - 8) d`.
    Q4_0,
    /// 4 bits: `q d + m`.
    Q4_1,
    /// 5 bits: `(q - 16) d`.
    Q5_0,
    /// 5 bits: `q d + m`.
    Q5_1,
    /// 8 bits: `q d`.
    Q8_0,
    /// 4 bits: `q (d s) - dmin t`.
    Q4_K,
    /// 5 bits: `q (d s) - dmin t`.
    Q5_K,
    /// 6 bits: `(q - 32) (d s)`, with an `s` for each 16 elements.
    Q6_K,
}

impl QuantFormat {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q8_0, Self::Q4_K, Self::Q5_K, Self::Q6_K];

    /// Its name in small letters, `q4_k`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q4_K => "q4_k",
            Self::Q5_K => "q5_k",
            Self::Q6_K => "q6_k",
        }
    }

    /// Elements of a block in the file; a row is whole blocks.
    #[must_use]
    pub const fn block_len(self) -> usize {
        if self.is_k() { SUB * SUBS_OF_K } else { SUB }
    }

    /// Bytes of a block in the file.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    pub(super) const fn is_k(self) -> bool {
        matches!(self, Self::Q4_K | Self::Q5_K | Self::Q6_K)
    }

    /// Whether the elements of a sub-block share an addend.
    pub(super) const fn has_min(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1 | Self::Q4_K | Self::Q5_K)
    }

    /// Whether each half of a sub-block has its own factor.
    pub(super) const fn has_halves(self) -> bool {
        matches!(self, Self::Q6_K)
    }

    /// Bits of a stored number.
    pub(super) const fn bits(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q4_K => 4,
            Self::Q5_0 | Self::Q5_1 | Self::Q5_K => 5,
            Self::Q6_K => 6,
            Self::Q8_0 => 8,
        }
    }

    /// What is taken off a stored number: half its range, or nothing where there is an addend.
    pub(super) const fn center(self) -> i32 {
        if self.has_min() { 0 } else { 1 << (self.bits() - 1) }
    }

    /// Half-words of factors for each sub-block and output.
    pub(super) const fn words(self) -> usize {
        if self.has_min() && !self.is_k() { 2 } else { 1 }
    }

    /// Half-words of factors for each K-block and output.
    pub(super) const fn super_words(self) -> usize {
        match (self.is_k(), self.has_min()) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => 2,
        }
    }
}

/// 32 elements of a row.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct SubBlock {
    /// The stored numbers. A sign is taken away by adding half the range.
    pub(super) q: [u8; SUB],
    /// `d` and `m` in half precision; or, in the first, two bytes: `s` and `t`, or the `s` of both halves.
    pub(super) words: [u16; 2],
}

/// Sub-block `sub` of a block of the file.
///
/// # Panics
/// If `block` is shorter than [`QuantFormat::block_bytes`].
pub(super) fn sub_block(format: QuantFormat, block: &[u8], sub: usize) -> SubBlock {
    let mut out = SubBlock::default();
    match format {
        QuantFormat::Q4_0 | QuantFormat::Q4_1 | QuantFormat::Q5_0 | QuantFormat::Q5_1 => {
            for (word, out) in out.words.iter_mut().take(format.words()).enumerate() {
                *out = half_word(block, 2 * word);
            }
            let nibbles = &block[format.block_bytes() - SUB / 2..];
            for (j, q) in out.q.iter_mut().enumerate() {
                *q = nibbles[j % 16] >> (4 * (j / 16)) & 15;
            }
            if format.bits() == 5 {
                let high = &block[2 * format.words()..];
                for (j, q) in out.q.iter_mut().enumerate() {
                    *q |= (high[j / 8] >> (j % 8) & 1) << 4;
                }
            }
        }
        QuantFormat::Q8_0 => {
            out.words[0] = half_word(block, 0);
            for (out, q) in out.q.iter_mut().zip(&block[2..]) {
                *out = q ^ 0x80;
            }
        }
        QuantFormat::Q4_K | QuantFormat::Q5_K => {
            let (s, t) = scale_and_min(&block[4..16], sub);
            out.words[0] = u16::from_le_bytes([s, t]);
            let nibbles = &block[format.block_bytes() - 128 + sub / 2 * SUB..];
            for (q, nibbles) in out.q.iter_mut().zip(nibbles) {
                *q = nibbles >> (4 * (sub % 2)) & 15;
            }
            if format == QuantFormat::Q5_K {
                for (q, high) in out.q.iter_mut().zip(&block[16..]) {
                    *q |= (high >> sub & 1) << 4;
                }
            }
        }
        QuantFormat::Q6_K => {
            out.words[0] = half_word(block, 192 + 2 * sub);
            // Each half of a K-block is 64 bytes of low bits and 32 bytes of high bits for its four sub-blocks.
            let (half, part) = (sub / 4, sub % 4);
            let (low, high) = (&block[64 * half + part % 2 * SUB..], &block[128 + 32 * half..]);
            for ((q, low), high) in out.q.iter_mut().zip(low).zip(high) {
                *q = low >> (4 * (part / 2)) & 15 | (high >> (2 * part) & 3) << 4;
            }
        }
    }
    out
}

/// `d` and `dmin` of a K-block.
pub(super) fn super_words(format: QuantFormat, block: &[u8]) -> [u16; 2] {
    match format.super_words() {
        0 => [0; 2],
        1 => [half_word(block, 208), 0],
        _ => [half_word(block, 0), half_word(block, 2)],
    }
}

fn half_word(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// The 6-bit `s` and `t` of a sub-block, from the twelve bytes that hold eight of each.
fn scale_and_min(packed: &[u8], sub: usize) -> (u8, u8) {
    if sub < 4 {
        return (packed[sub] & 63, packed[sub + 4] & 63);
    }
    let low = packed[sub + 4];
    (low & 15 | packed[sub - 4] >> 6 << 4, low >> 4 | packed[sub] >> 6 << 4)
}
