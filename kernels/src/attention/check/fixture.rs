//! A paged cache with sequences in it, and attention over it by its plain formula.

use crate::attention::AttnSpec;
use crate::attention::cuda::HeadShape;
use crate::device::Elem;
use crate::device::check::{CheckError, Random, expect};
use crate::device::step::{BLOCK_TOKENS, KvShape};

const LAYERS: usize = 2;

/// Entry of the block table for positions that left the window: a kernel that follows it leaves the arena.
const NOBODY: u32 = u32::MAX;

/// The layer that holds something.
pub(super) const LAYER: usize = 1;

/// Positions `first..end` of a sequence are in the cache. The places of all others, and blocks of nobody, hold NaN.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    /// First entry in the block table.
    pub blocks: usize,
    pub first: usize,
    pub end: usize,
    /// `[position][kv_head][head_dim]`.
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// The cache.
#[derive(Debug)]
pub(super) struct Fixture {
    pub elem: Elem,
    pub shape: HeadShape,
    pub kv: KvShape,
    pub arena: Vec<u16>,
    pub block_table: Vec<u32>,
    pub sequences: Vec<Sequence>,
}

impl Fixture {
    /// Sequences with `first..end` of their positions in the cache, in blocks that lie anywhere.
    pub(super) fn new(elem: Elem, shape: HeadShape, spans: &[(usize, usize)], random: &mut Random) -> Self {
        let per_page = 1 + random.below(3);
        let block_bytes = LAYERS * shape.layer_bytes();
        let kv = KvShape {
            page_bytes: (per_page * block_bytes + 256) as u64,
            block_bytes: block_bytes as u32,
            per_page: per_page as u32,
            kv_heads: shape.kv_heads as u32,
            reserved: 0,
        };
        let used: usize = spans.iter().map(|(first, end)| end.div_ceil(BLOCK_TOKENS) - first / BLOCK_TOKENS).sum();
        let mut free: Vec<u32> = (1..=(used + 2) as u32).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, random.below(i + 1));
        }
        let pages = (free.len() + 1).div_ceil(per_page);
        let mut fixture = Self {
            elem,
            shape,
            kv,
            arena: vec![0xffff; pages * kv.page_bytes as usize / 2],
            block_table: vec![0; 3], // block 0 is nobody's
            sequences: Vec::new(),
        };
        for &(first, end) in spans {
            let blocks = fixture.block_table.len();
            fixture.block_table.extend(
                (0..end.div_ceil(BLOCK_TOKENS))
                    .map(|block| if block < first / BLOCK_TOKENS { NOBODY } else { free.pop().unwrap_or(0) }),
            );
            fixture.block_table.push(0);
            let elements = end * shape.kv_heads * shape.head_dim;
            let mut values = |scale: f32| -> Vec<f32> {
                random.elems(elem, elements, scale).into_iter().map(|bits| elem.from_bits(bits)).collect()
            };
            let sequence = Sequence { blocks, first, end, keys: values(2.0), values: values(1.0) };
            fixture.store(&sequence);
            fixture.sequences.push(sequence);
        }
        fixture
    }

    fn store(&mut self, sequence: &Sequence) {
        let HeadShape { kv_heads, head_dim, .. } = self.shape;
        let per_page = self.kv.per_page as usize;
        for position in sequence.first..sequence.end {
            let block = self.block_table[sequence.blocks + position / BLOCK_TOKENS] as usize;
            let start =
                block / per_page * self.kv.page_bytes as usize + block % per_page * self.kv.block_bytes as usize;
            let (layer, offset) = (start / 2 + LAYER * self.shape.layer_bytes() / 2, position % BLOCK_TOKENS);
            for kv_head in 0..kv_heads {
                let key = layer + kv_head * BLOCK_TOKENS * head_dim;
                let value = key + kv_heads * BLOCK_TOKENS * head_dim;
                for d in 0..head_dim {
                    let at = (position * kv_heads + kv_head) * head_dim + d;
                    self.arena[key + offset * head_dim + d] = self.elem.to_bits(sequence.keys[at]);
                    self.arena[value + d * BLOCK_TOKENS + offset] = self.elem.to_bits(sequence.values[at]);
                }
            }
        }
    }

    /// A batch's qkv row with random q; its k and v are NaN, since attention takes them from the cache.
    pub(super) fn qkv_row(&self, random: &mut Random) -> Vec<u16> {
        let mut row = random.elems(self.elem, self.shape.heads * self.shape.head_dim, 2.0);
        row.resize(self.shape.qkv_width(), 0xffff);
        row
    }

    /// Compares the output of a row at `position` with the formula; returns the largest error in units of the type's
    /// epsilon of the sum of |p v|. Half a unit is the rounding of p, and half that of the output.
    pub(super) fn compare(
        &self,
        sequence: &Sequence,
        position: usize,
        spec: &AttnSpec,
        qkv: &[u16],
        got: &[u16],
    ) -> Result<f64, CheckError> {
        let HeadShape { kv_heads, head_dim, .. } = self.shape;
        let seen = spec.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1;
        let mut worst = 0.0f64;
        for head in 0..self.shape.heads {
            let q: Vec<f64> =
                qkv[head * head_dim..][..head_dim].iter().map(|&b| f64::from(self.elem.from_bits(b))).collect();
            let at = |position: usize| (position * kv_heads + head / self.shape.group()) * head_dim;
            let scores: Vec<f64> = seen
                .clone()
                .map(|j| {
                    let dot: f64 = q.iter().zip(&sequence.keys[at(j)..]).map(|(q, &k)| q * f64::from(k)).sum();
                    dot * f64::from(spec.scale)
                })
                .collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for d in 0..head_dim {
                let term = |(w, j): (&f64, usize)| w / sum * f64::from(sequence.values[at(j) + d]);
                let want: f64 = weights.iter().zip(seen.clone()).map(term).sum();
                let terms: f64 = weights.iter().zip(seen.clone()).map(|pair| term(pair).abs()).sum();
                let got = f64::from(self.elem.from_bits(got[head * head_dim + d]));
                let error = (got - want).abs() / (terms + 1e-3) / self.elem.epsilon();
                expect(error <= 1.0, || {
                    format!(
                        "attention {:?} {:?} {spec:?} position {position} head {head} element {d}: got {got}, want {want}",
                        self.elem, self.shape
                    )
                })?;
                worst = worst.max(error);
            }
        }
        Ok(worst)
    }
}
