//! The definition and the vector form: plain softmax in three passes over a tile of rows, so that K and V are read once
//! for several rows and no sum is ever rescaled.

use super::{AttnChunk, AttnSpec};
use crate::dtype::{ArenaDtype, Element};
use crate::kv_cache::KvLayout;
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;
use crate::simd::{Isa, Kernel, LANES, Line, Simd, exp};
use half::f16;
use std::cell::RefCell;

/// Query rows (positions times heads of the group) that share one pass over K and V.
const ROWS_PER_UNIT: usize = 24;

/// Tiles of so few positions are bound by memory.
const POSITIONS_FETCHED_AHEAD: usize = 4;

/// Checked arguments of the op.
pub(super) struct Attention<'a> {
    pub(super) qkv: &'a Rows,
    pub(super) arena: &'a [u8],
    pub(super) layout: &'a KvLayout,
    pub(super) layer: usize,
    pub(super) spec: &'a AttnSpec,
    pub(super) chunks: &'a [AttnChunk],
    pub(super) block_table: &'a [u32],
}

impl Attention<'_> {
    /// Heads that share a kv head.
    fn group(&self) -> usize {
        self.spec.heads / self.layout.kv_heads
    }

    /// First position that `position` sees.
    fn window_start(&self, position: usize) -> usize {
        self.spec.window.map_or(0, |window| (position + 1).saturating_sub(window.max(1)))
    }

    /// Offset of a head's K in a block, from the start of the arena, in elements; V's with `v`.
    fn head_offset(&self, block: u32, kv_head: usize, v: bool) -> usize {
        let layout = self.layout;
        let in_block = if v { layout.v_offset(self.layer, kv_head) } else { layout.k_offset(self.layer, kv_head) };
        layout.block_offset(block) + in_block
    }
}

/// The definition.
#[cfg(test)]
pub(super) fn reference(out: &mut [f32], a: &Attention) {
    let (layout, head_dim, width) = (a.layout, a.layout.head_dim, a.qkv.width());
    let element = |offset: usize| match layout.dtype {
        ArenaDtype::F32 => f32::from_ne_bytes(a.arena[4 * offset..][..4].try_into().unwrap()),
        ArenaDtype::F16 => half::f16::from_ne_bytes(a.arena[2 * offset..][..2].try_into().unwrap()).to_f32(),
    };
    for chunk in a.chunks {
        let blocks = &a.block_table[chunk.blocks.clone()];
        for (row, head) in (0..chunk.len).flat_map(|row| (0..a.spec.heads).map(move |head| (row, head))) {
            let position = chunk.start + row;
            let kv_head = head / a.group();
            let q = &a.qkv.as_f32()[(chunk.first_row + row) * width + head * head_dim..][..head_dim];
            let seen = a.window_start(position)..position + 1;
            let at = |j: usize, v| a.head_offset(blocks[j / layout.block_tokens], kv_head, v);
            let scores: Vec<f32> = seen
                .clone()
                .map(|j| {
                    let k = at(j, false) + j % layout.block_tokens;
                    let chain = |sum, d: usize| q[d].mul_add(element(k + d * layout.k_stride()), sum);
                    (0..head_dim).fold(0.0, chain) * a.spec.scale
                })
                .collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<f32> = scores.iter().map(|s| crate::simd::exp_one(s - max)).collect();
            let mut lanes = [0.0f32; LANES];
            for (j, weight) in seen.clone().zip(&weights) {
                lanes[j % layout.block_tokens % LANES] += weight;
            }
            let total = crate::simd::sum_lanes(&lanes);
            for d in 0..head_dim {
                let v = |j: usize| element(at(j, true) + (j % layout.block_tokens) * layout.v_stride() + d);
                let sum = seen.clone().zip(&weights).fold(0.0f32, |sum, (j, weight)| weight.mul_add(v(j), sum));
                out[((chunk.first_row + row) * a.spec.heads + head) * head_dim + d] = sum / total + 0.0;
            }
        }
    }
}

thread_local! {
    /// Scores of a tile; grows to the longest context and stays.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn paged_attention(isa: Isa, out: &mut Rows, attention: &Attention) {
    let positions = (ROWS_PER_UNIT / attention.group()).max(1);
    let tiles = |chunk: &AttnChunk| chunk.len.div_ceil(positions);
    let units = attention.chunks.iter().map(tiles).sum::<usize>() * attention.layout.kv_heads;
    let keys: usize = attention.chunks.iter().map(|chunk| chunk.len * (chunk.start + chunk.len)).sum();
    let work_ns = keys * attention.spec.heads * attention.layout.head_dim / 16;
    let out = SharedMut::new(out.as_f32_mut());
    parallel::for_each(units, work_ns, |unit| {
        let (mut tile, kv_head) = (unit / attention.layout.kv_heads, unit % attention.layout.kv_heads);
        let mut chunks = attention.chunks.iter();
        let chunk = loop {
            let Some(chunk) = chunks.next() else { return };
            if tile < tiles(chunk) {
                break chunk;
            }
            tile -= tiles(chunk);
        };
        let first = tile * positions;
        let count = positions.min(chunk.len - first);
        let unit = Unit { attention, out, chunk, kv_head, first, count };
        let tile = Tile::new(&unit);
        if count <= POSITIONS_FETCHED_AHEAD {
            // What the cache holds of a sequence lies in pieces too short for the processor to guess the next one.
            tile.fetch(isa, kv_head, true);
            tile.fetch(isa, kv_head + 1, false);
        }
        SCORES.with_borrow_mut(|scores| {
            let elements = tile.rows * tile.vectors * LANES;
            if scores.len() < elements {
                scores.resize(elements, 0.0);
            }
            isa.run(Pass { tile: &tile, scores: &mut scores[..elements] });
        });
    });
}

/// `count` positions of a chunk from its row `first` on, all heads of one kv head.
struct Unit<'a> {
    attention: &'a Attention<'a>,
    out: SharedMut<f32>,
    chunk: &'a AttnChunk,
    kv_head: usize,
    first: usize,
    count: usize,
}

/// A tile and room for its scores. The borrow of the scratch stays outside: a closure in the kernel would be a function of
/// its own, without the instruction set.
struct Pass<'a> {
    tile: &'a Tile<'a>,
    scores: &'a mut [f32],
}

impl Kernel for Pass<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.tile.unit.attention.layout.dtype {
            ArenaDtype::F32 => self.tile.all::<S, f32>(s, self.scores),
            ArenaDtype::F16 => self.tile.all::<S, f16>(s, self.scores),
        }
    }
}

/// Memory to ask for.
struct Fetch(*const u8, usize);

impl Kernel for Fetch {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for line in 0..self.1.div_ceil(size_of::<Line>()) {
            s.prefetch_far(self.0.wrapping_add(line * size_of::<Line>()));
        }
    }
}

/// A unit with its extents. Row `r` is position `r / group`, head `r % group` of the group. Scores are `[rows][blocks][k_stride]`.
struct Tile<'a> {
    unit: &'a Unit<'a>,
    group: usize,
    rows: usize,
    /// Position of the first row.
    position: usize,
    /// Blocks that any row sees, and the position the first of them starts at.
    blocks: &'a [u32],
    blocks_start: usize,
    /// Score vectors of a block, and of a row.
    block_vectors: usize,
    vectors: usize,
}

impl<'a> Tile<'a> {
    fn new(unit: &'a Unit<'a>) -> Self {
        let Unit { attention, chunk, first, count, .. } = *unit;
        let (group, block_tokens) = (attention.group(), attention.layout.block_tokens);
        let position = chunk.start + first;
        let first_block = attention.window_start(position) / block_tokens;
        let blocks_end = (position + count).div_ceil(block_tokens);
        let blocks = &attention.block_table[chunk.blocks.clone()][first_block..blocks_end];
        let block_vectors = attention.layout.k_stride() / LANES;
        Self {
            unit,
            group,
            rows: count * group,
            position,
            blocks,
            blocks_start: first_block * block_tokens,
            block_vectors,
            vectors: blocks.len() * block_vectors,
        }
    }

    /// Asks for the V or K of a head in all blocks.
    fn fetch(&self, isa: Isa, kv_head: usize, v: bool) {
        let attention = self.unit.attention;
        let layout = attention.layout;
        if kv_head >= layout.kv_heads {
            return;
        }
        let (rows, stride) =
            if v { (layout.block_tokens, layout.v_stride()) } else { (layout.head_dim, layout.k_stride()) };
        let bytes = rows * stride * layout.dtype.bytes();
        for &block in self.blocks {
            let first = attention.head_offset(block, kv_head, v) * layout.dtype.bytes();
            isa.run(Fetch(attention.arena[first..][..bytes].as_ptr(), bytes));
        }
    }

    #[inline(always)]
    fn all<S: Simd, E: Element>(&self, s: S, scores: &mut [f32]) {
        /// Calls a method with its extents as constants: rows at a time (by the registers there are), then vectors.
        macro_rules! by_rows {
            ($method:ident, $vectors:literal, $rows:expr $(, $arg:expr)*) => {
                match $rows {
                    1 => self.$method::<S, E, 1, $vectors>(s $(, $arg)*),
                    2 => self.$method::<S, E, 2, $vectors>(s $(, $arg)*),
                    3 => self.$method::<S, E, 3, $vectors>(s $(, $arg)*),
                    4 => self.$method::<S, E, 4, $vectors>(s $(, $arg)*),
                    5 => self.$method::<S, E, 5, $vectors>(s $(, $arg)*),
                    _ => self.$method::<S, E, 6, $vectors>(s $(, $arg)*),
                }
            };
        }
        let layout = self.unit.attention.layout;
        let mut row = 0;
        while row < self.rows {
            let rows = (self.rows - row).min(S::TILE_ROWS);
            let mut vector = 0;
            while vector < self.vectors {
                if S::TILE_ROWS > 3 {
                    by_rows!(scores, 4, rows, scores, row, vector);
                    vector += 4;
                } else {
                    by_rows!(scores, 2, rows, scores, row, vector);
                    vector += 2;
                }
            }
            let mut totals = [0.0; 6];
            for (m, total) in totals.iter_mut().enumerate().take(rows) {
                let position = self.position + (row + m) / self.group;
                let scores = &mut scores[(row + m) * self.vectors * LANES..][..self.vectors * LANES];
                self.mask(scores, position);
                *total = softmax(s, scores);
            }
            let mut d = 0;
            while d < layout.head_dim {
                if S::TILE_ROWS > 3 && d + 3 * LANES < layout.head_dim {
                    by_rows!(values, 4, rows, scores, &totals, row, d);
                    d += 4 * LANES;
                } else if d + LANES < layout.head_dim {
                    by_rows!(values, 2, rows, scores, &totals, row, d);
                    d += 2 * LANES;
                } else {
                    by_rows!(values, 1, rows, scores, &totals, row, d);
                    d += LANES;
                }
            }
            row += rows;
        }
    }

    /// Scores of `M` rows against `N` vectors of keys (fewer at the end).
    #[inline(always)]
    fn scores<S: Simd, E: Element, const M: usize, const N: usize>(
        &self,
        s: S,
        scores: &mut [f32],
        row: usize,
        vector: usize,
    ) {
        if const { M > S::TILE_ROWS } {
            return; // never asked for; spares the compiler the code
        }
        let Attention { qkv, arena, layout, .. } = *self.unit.attention;
        let count = (self.vectors - vector).min(N);
        let keys: [usize; N] = std::array::from_fn(|n| {
            let vector = vector + n.min(count - 1); // past the end: the last again, and its result is dropped
            let block = self.blocks[vector / self.block_vectors];
            let in_block = vector % self.block_vectors * LANES;
            self.unit.attention.head_offset(block, self.unit.kv_head, false) + in_block
        });
        let q: [*const f32; M] = std::array::from_fn(|m| {
            let at = (self.batch_row(row + m)) * qkv.width() + self.head(row + m) * layout.head_dim;
            qkv.as_f32()[at..][..layout.head_dim].as_ptr()
        });
        let (head_dim, k_stride) = (layout.head_dim, layout.k_stride());
        let mut acc = [[s.splat(0.0); N]; M];
        for d in 0..head_dim {
            let mut k = [s.splat(0.0); N];
            for (k, at) in k.iter_mut().zip(&keys) {
                // SAFETY: the block is in the arena (`paged_attention` checked), and d < head_dim rows of k_stride are in it.
                *k = unsafe { load::<S, E>(s, arena, at + d * k_stride) };
            }
            for (acc, q) in acc.iter_mut().zip(&q) {
                // SAFETY: `q` has head_dim elements.
                let q = s.splat(unsafe { *q.add(d) });
                for (acc, k) in acc.iter_mut().zip(&k) {
                    *acc = s.fma(q, *k, *acc);
                }
            }
        }
        let scale = s.splat(self.unit.attention.spec.scale);
        for (m, acc) in acc.iter().enumerate() {
            let scores = &mut scores[((row + m) * self.vectors + vector) * LANES..][..count * LANES];
            for (scores, acc) in scores.chunks_exact_mut(LANES).zip(acc) {
                // SAFETY: the chunk has 16 elements.
                unsafe { s.store(scores.as_mut_ptr(), s.mul(*acc, scale)) };
            }
        }
    }

    /// Makes every score that `position` does not see minus infinity: its own future, what the window left, and the lanes
    /// of a block that are no tokens.
    fn mask(&self, scores: &mut [f32], position: usize) {
        let layout = self.unit.attention.layout;
        let (block_tokens, k_stride) = (layout.block_tokens, layout.k_stride());
        let index = |position: usize| {
            let place = position - self.blocks_start;
            place / block_tokens * k_stride + place % block_tokens
        };
        if k_stride > block_tokens {
            for block in scores.chunks_mut(k_stride) {
                block[block_tokens..].fill(f32::NEG_INFINITY);
            }
        }
        let first = self.unit.attention.window_start(position);
        scores[..index(first)].fill(f32::NEG_INFINITY);
        scores[index(position) + 1..].fill(f32::NEG_INFINITY);
    }

    /// `M` rows of weighted sums of V over `N` vectors of dimensions from `d` on, divided by the rows' totals.
    #[inline(always)]
    fn values<S: Simd, E: Element, const M: usize, const N: usize>(
        &self,
        s: S,
        scores: &[f32],
        totals: &[f32; 6],
        row: usize,
        d: usize,
    ) {
        if const { M > S::TILE_ROWS } {
            return; // never asked for; spares the compiler the code
        }
        let Attention { arena, layout, spec, .. } = *self.unit.attention;
        let (head_dim, v_stride, k_stride) = (layout.head_dim, layout.v_stride(), layout.k_stride());
        let positions_end = self.position + self.unit.count;
        let weights: [*const f32; M] =
            std::array::from_fn(|m| scores[(row + m) * self.vectors * LANES..][..self.vectors * LANES].as_ptr());
        let mut acc = [[s.splat(0.0); N]; M];
        for (b, &block) in self.blocks.iter().enumerate() {
            let at = self.unit.attention.head_offset(block, self.unit.kv_head, true) + d;
            let tokens = (positions_end - (self.blocks_start + b * layout.block_tokens)).min(layout.block_tokens);
            for token in 0..tokens {
                let mut v = [s.splat(0.0); N];
                for (n, v) in v.iter_mut().enumerate() {
                    // SAFETY: the block is in the arena; `d + 16 n + 16 <= v_stride`, the padded length of a row of V.
                    *v = unsafe { load::<S, E>(s, arena, at + token * v_stride + n * LANES) };
                }
                for (acc, weights) in acc.iter_mut().zip(&weights) {
                    // SAFETY: a row of scores has k_stride elements for each block.
                    let weight = s.splat(unsafe { *weights.add(b * k_stride + token) });
                    for (acc, v) in acc.iter_mut().zip(&v) {
                        *acc = s.fma(weight, *v, *acc);
                    }
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            let total = s.splat(totals[m]);
            for (n, acc) in acc.iter().enumerate() {
                let column = d + n * LANES;
                let row_start = (self.batch_row(row + m) * spec.heads + self.head(row + m)) * head_dim;
                // Adding zero makes -0 into 0, so that keys masked by weight 0 leave no trace even in a sign.
                let value = s.add(s.div(*acc, total), s.splat(0.0));
                // SAFETY: this head's columns of a row of this chunk: no other unit writes them.
                unsafe { s.store_part(self.unit.out.at(row_start + column), value, head_dim - column) };
            }
        }
    }

    fn batch_row(&self, row: usize) -> usize {
        self.unit.chunk.first_row + self.unit.first + row / self.group
    }

    fn head(&self, row: usize) -> usize {
        self.unit.kv_head * self.group + row % self.group
    }
}

/// Replaces scores by `e^(score - max)` and returns their sum.
#[inline(always)]
fn softmax<S: Simd>(s: S, scores: &mut [f32]) -> f32 {
    let mut max = s.splat(f32::NEG_INFINITY);
    for scores in scores.chunks_exact(LANES) {
        // SAFETY: the chunk has 16 elements.
        max = s.max(max, unsafe { s.load(scores.as_ptr()) });
    }
    let max = s.splat(s.to_array(max).into_iter().fold(f32::NEG_INFINITY, f32::max));
    let mut total = s.splat(0.0);
    for scores in scores.chunks_exact_mut(LANES) {
        // SAFETY: the chunk has 16 elements.
        unsafe {
            let weight = exp(s, s.sub(s.load(scores.as_ptr()), max));
            total = s.add(total, weight);
            s.store(scores.as_mut_ptr(), weight);
        }
    }
    s.sum(total)
}

/// 16 elements of the arena.
///
/// # Safety
/// They must lie in the arena.
#[inline(always)]
unsafe fn load<S: Simd, E: Element>(s: S, arena: &[u8], element: usize) -> S::V {
    debug_assert!((element + LANES) * E::BYTES <= arena.len());
    // SAFETY: the caller vouches for the elements; the arena starts on a 256-byte boundary.
    unsafe { E::load(s, arena.as_ptr().add(element * E::BYTES)) }
}
