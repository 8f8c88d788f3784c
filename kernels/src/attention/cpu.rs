//! The vector form: plain softmax in three passes over a tile of rows, so that K and V are read once
//! for several rows and no sum is ever rescaled.

use super::{AttnChunk, AttnSpec};
use crate::dtype::ArenaDtype;
use crate::kv_cache::{KvLayout, WORD_BYTES};
use crate::parallel;
use crate::rows::{Rows, RowsOut};
use crate::simd::{Isa, Kernel, LANES, Line, Simd, exp};
use std::cell::RefCell;

/// Query rows (positions times heads of the group) that share one pass over K and V.
const ROWS_PER_UNIT: usize = 24;

/// Rows that are computed at once, at most: those of the widest tile of any instruction set.
const ROWS_TOGETHER: usize = 6;

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
    #[inline(always)]
    fn group(&self) -> usize {
        self.spec.heads / self.layout.kv_heads
    }

    /// Positions that a unit has at most.
    fn positions_of_unit(&self) -> usize {
        (ROWS_PER_UNIT / self.group()).max(1)
    }

    /// First position that `position` sees.
    #[inline(always)]
    fn window_start(&self, position: usize) -> usize {
        self.spec.window.map_or(0, |window| (position + 1).saturating_sub(window.max(1)))
    }
}

thread_local! {
    /// Grows to the longest context and stays.
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { starts: Vec::new(), words: Vec::new() }) };
}

struct Scratch {
    /// Of a tile's blocks.
    starts: Vec<usize>,
    /// Queries and scores of some rows.
    words: Vec<u32>,
}

/// How a word of the cache holds elements and multiplies.
trait Words {
    /// Elements of a word.
    const PER: usize;
    /// `acc` plus the products of the elements of `x` with those of each lane of `w`.
    fn add<S: Simd>(s: S, acc: S::V, x: u32, w: S::V) -> S::V;
    /// Stores 16 elements, `at` of them after `p`.
    /// # Safety
    /// They must be writable.
    unsafe fn store<S: Simd>(s: S, p: *mut u32, at: usize, values: S::V);
}

/// A word is an f32.
struct Singles;

impl Words for Singles {
    const PER: usize = 1;
    #[inline(always)]
    fn add<S: Simd>(s: S, acc: S::V, x: u32, w: S::V) -> S::V {
        s.fma(s.splat(f32::from_bits(x)), w, acc)
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, p: *mut u32, at: usize, values: S::V) {
        // SAFETY: the caller vouches for 16 words.
        unsafe { s.store(p.add(at).cast(), values) }
    }
}

/// A word is two bf16.
struct Pairs;

impl Words for Pairs {
    const PER: usize = 2;
    #[inline(always)]
    fn add<S: Simd>(s: S, acc: S::V, x: u32, w: S::V) -> S::V {
        s.dot(acc, x, w)
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, p: *mut u32, at: usize, values: S::V) {
        // SAFETY: the caller vouches for 8 words.
        unsafe { s.store_pairs(p.cast::<u16>().add(at), values) }
    }
}

pub(super) fn paged_attention(isa: Isa, out: &mut Rows, attention: &Attention) {
    let positions = attention.positions_of_unit();
    let tiles = |chunk: &AttnChunk| chunk.len.div_ceil(positions);
    let units = attention.chunks.iter().map(tiles).sum::<usize>() * attention.layout.kv_heads;
    let keys: usize = attention.chunks.iter().map(|chunk| chunk.len * (chunk.start + chunk.len)).sum();
    let work_ns = keys * attention.spec.heads * attention.layout.head_dim / 16;
    let out = out.out();
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
        unit.fetch_queries_of_next(isa);
        SCRATCH.with_borrow_mut(|Scratch { starts, words }| {
            let tile = Tile::new(&unit, starts);
            if count <= POSITIONS_FETCHED_AHEAD {
                // What the cache holds of a sequence lies in pieces too short for the processor to guess the next one.
                tile.fetch(isa);
            }
            let words_needed = ROWS_TOGETHER * (tile.query_words + tile.vectors * LANES);
            if words.len() < words_needed {
                words.resize(words_needed, 0);
            }
            let (queries, scores) = words[..words_needed].split_at_mut(ROWS_TOGETHER * tile.query_words);
            isa.run(Pass { tile: &tile, queries, scores });
        });
    });
}

/// `count` positions of a chunk from its row `first` on, all heads of one kv head.
struct Unit<'a> {
    attention: &'a Attention<'a>,
    out: RowsOut,
    chunk: &'a AttnChunk,
    kv_head: usize,
    first: usize,
    count: usize,
}

impl Unit<'_> {
    /// Asks for the queries of the unit that this thread likely has next.
    fn fetch_queries_of_next(&self, isa: Isa) {
        let Attention { qkv, layout, .. } = *self.attention;
        let positions = self.attention.positions_of_unit();
        let next = self.first / positions * layout.kv_heads + self.kv_head + 1;
        let (first, kv_head) = (next / layout.kv_heads * positions, next % layout.kv_heads);
        let bytes = self.attention.group() * layout.head_dim * size_of::<f32>();
        for row in first..self.chunk.len.min(first + positions) {
            let at = (self.chunk.first_row + row) * qkv.width() + kv_head * self.attention.group() * layout.head_dim;
            isa.run(Fetch(qkv.as_f32().as_ptr().wrapping_add(at).cast(), bytes));
        }
    }
}

/// A tile and room for the queries and scores of [`ROWS_TOGETHER`] rows. The borrow of the scratch stays outside: a closure in
/// the kernel would be a function of its own, without the instruction set.
struct Pass<'a> {
    tile: &'a Tile<'a>,
    queries: &'a mut [u32],
    scores: &'a mut [u32],
}

impl Kernel for Pass<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.tile.unit.attention.layout.dtype {
            ArenaDtype::F32 => self.tile.all::<S, Singles>(s, self.queries, self.scores),
            ArenaDtype::Bf16 => self.tile.all::<S, Pairs>(s, self.queries, self.scores),
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

/// A unit with its extents. Row `r` is position `r / group`, head `r % group` of the group.
struct Tile<'a> {
    unit: &'a Unit<'a>,
    group: usize,
    rows: usize,
    /// Position of the first row.
    position: usize,
    /// Where the head's K begins in each block that any row sees, in words of the arena, and how far behind is its V.
    starts: &'a [usize],
    v_behind: usize,
    /// Position the first of the blocks starts at.
    blocks_start: usize,
    /// Score vectors of a block, and of a row.
    block_vectors: usize,
    vectors: usize,
    /// Words of a row's query: whole vectors.
    query_words: usize,
}

impl<'a> Tile<'a> {
    fn new(unit: &'a Unit<'a>, starts: &'a mut Vec<usize>) -> Self {
        let Unit { attention, chunk, kv_head, first, count, .. } = *unit;
        let Attention { layout, layer, block_table, .. } = *attention;
        let (group, block_tokens) = (attention.group(), layout.block_tokens);
        let position = chunk.start + first;
        let first_block = attention.window_start(position) / block_tokens;
        let blocks_end = (position + count).div_ceil(block_tokens);
        let k_offset = layout.k_offset(layer, kv_head);
        let blocks = &block_table[chunk.blocks.clone()][first_block..blocks_end];
        starts.clear();
        starts.extend(blocks.iter().map(|&block| layout.block_offset(block) + k_offset));
        let block_vectors = layout.k_stride() / LANES;
        Self {
            unit,
            group,
            rows: count * group,
            position,
            vectors: starts.len() * block_vectors,
            starts,
            v_behind: layout.v_offset(layer, kv_head) - k_offset,
            blocks_start: first_block * block_tokens,
            block_vectors,
            query_words: layout.v_stride(),
        }
    }

    /// Asks for the V of all blocks, and the K of the next head.
    fn fetch(&self, isa: Isa) {
        let Unit { attention: Attention { layout, arena, .. }, kv_head, .. } = *self.unit;
        for start in self.starts {
            let fetch = |first: usize, words: usize| {
                let (first, bytes) = (first * WORD_BYTES, words * WORD_BYTES);
                isa.run(Fetch(arena[first..][..bytes].as_ptr(), bytes));
            };
            fetch(start + self.v_behind, layout.v_words());
            if kv_head + 1 < layout.kv_heads {
                fetch(start + layout.k_words(), layout.k_words());
            }
        }
    }

    #[inline(always)]
    fn all<S: Simd, W: Words>(&self, s: S, queries: &mut [u32], scores: &mut [u32]) {
        /// Calls a method with its extents as constants: rows at a time (by the registers there are), then vectors.
        macro_rules! by_rows {
            ($method:ident, $vectors:literal, $rows:expr $(, $arg:expr)*) => {
                match $rows {
                    1 => self.$method::<S, W, 1, $vectors>(s $(, $arg)*),
                    2 => self.$method::<S, W, 2, $vectors>(s $(, $arg)*),
                    3 => self.$method::<S, W, 3, $vectors>(s $(, $arg)*),
                    4 => self.$method::<S, W, 4, $vectors>(s $(, $arg)*),
                    5 => self.$method::<S, W, 5, $vectors>(s $(, $arg)*),
                    _ => self.$method::<S, W, 6, $vectors>(s $(, $arg)*),
                }
            };
        }
        let layout = self.unit.attention.layout;
        let width = self.vectors * LANES;
        let mut row = 0;
        while row < self.rows {
            let rows = (self.rows - row).min(S::TILE_ROWS);
            for m in 0..rows {
                self.query::<S, W>(s, &mut queries[m * self.query_words..][..self.query_words], row + m);
            }
            let mut vector = 0;
            while vector < self.vectors {
                if S::TILE_ROWS > 3 && vector + 2 < self.vectors {
                    by_rows!(scores, 4, rows, queries, scores, vector);
                    vector += 4;
                } else {
                    by_rows!(scores, 2, rows, queries, scores, vector);
                    vector += 2;
                }
            }
            let mut totals = [0.0; ROWS_TOGETHER];
            for (m, total) in totals.iter_mut().enumerate().take(rows) {
                let scores = &mut scores[m * width..][..width];
                self.mask(scores, self.position + (row + m) / self.group);
                *total = softmax::<S, W>(s, scores);
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

    /// Query of a row as words, zeros behind its end.
    #[inline(always)]
    fn query<S: Simd, W: Words>(&self, s: S, query: &mut [u32], row: usize) {
        let Attention { qkv, layout, .. } = *self.unit.attention;
        let first = self.batch_row(row) * qkv.width() + self.head(row) * layout.head_dim;
        for (i, values) in qkv.as_f32()[first..][..layout.head_dim].chunks(LANES).enumerate() {
            // SAFETY: as many values as are loaded; `query` has head_dim rounded up to 16 words.
            unsafe { W::store(s, query.as_mut_ptr(), i * LANES, s.load_part(values.as_ptr(), values.len())) };
        }
    }

    /// Scores of the `M` queries against `N` vectors of keys (fewer at the end).
    #[inline(always)]
    fn scores<S: Simd, W: Words, const M: usize, const N: usize>(
        &self,
        s: S,
        queries: &[u32],
        scores: &mut [u32],
        vector: usize,
    ) {
        if const { M > S::TILE_ROWS } {
            return; // never asked for; spares the compiler the code
        }
        let Attention { arena, layout, .. } = *self.unit.attention;
        let count = (self.vectors - vector).min(N);
        let keys: [usize; N] = std::array::from_fn(|n| {
            let vector = vector + n.min(count - 1); // past the end: the last again, and its result is dropped
            self.starts[vector / self.block_vectors] + vector % self.block_vectors * LANES
        });
        let q: [*const u32; M] = std::array::from_fn(|m| queries[m * self.query_words..][..self.query_words].as_ptr());
        let (words, k_stride) = (layout.head_dim.div_ceil(W::PER), layout.k_stride());
        let mut acc = [[s.splat(0.0); N]; M];
        for i in 0..words {
            let mut k = [s.splat(0.0); N];
            for (k, at) in k.iter_mut().zip(&keys) {
                // SAFETY: the block is in the arena (`paged_attention` checked), and its K has `words` rows of k_stride.
                *k = unsafe { load(s, arena, at + i * k_stride) };
            }
            for (acc, q) in acc.iter_mut().zip(&q) {
                // SAFETY: `q` has head_dim words or more.
                let q = unsafe { *q.add(i) };
                for (acc, k) in acc.iter_mut().zip(&k) {
                    *acc = W::add(s, *acc, q, *k);
                }
            }
        }
        let scale = s.splat(self.unit.attention.spec.scale);
        for (m, acc) in acc.iter().enumerate() {
            let scores = &mut scores[(m * self.vectors + vector) * LANES..][..count * LANES];
            for (scores, acc) in scores.chunks_exact_mut(LANES).zip(acc) {
                // SAFETY: the chunk has 16 words.
                unsafe { s.store(scores.as_mut_ptr().cast(), s.mul(*acc, scale)) };
            }
        }
    }

    /// Makes every score that `position` does not see minus infinity: its own future, what the window left, and the lanes
    /// of a block that are no tokens.
    #[inline(always)]
    fn mask(&self, scores: &mut [u32], position: usize) {
        const HIDDEN: u32 = f32::NEG_INFINITY.to_bits();
        let layout = self.unit.attention.layout;
        let (block_tokens, k_stride) = (layout.block_tokens, layout.k_stride());
        let index = |position: usize| {
            let place = position - self.blocks_start;
            place / block_tokens * k_stride + place % block_tokens
        };
        if k_stride > block_tokens {
            for block in scores.chunks_mut(k_stride) {
                block[block_tokens..].fill(HIDDEN);
            }
        }
        let first = self.unit.attention.window_start(position);
        scores[..index(first)].fill(HIDDEN);
        scores[index(position) + 1..].fill(HIDDEN);
    }

    /// `M` rows of weighted sums of V over `N` vectors of dimensions from `d` on, divided by the rows' totals.
    #[inline(always)]
    fn values<S: Simd, W: Words, const M: usize, const N: usize>(
        &self,
        s: S,
        weights: &[u32],
        totals: &[f32; ROWS_TOGETHER],
        row: usize,
        d: usize,
    ) {
        if const { M > S::TILE_ROWS } {
            return; // never asked for; spares the compiler the code
        }
        let Attention { arena, layout, .. } = *self.unit.attention;
        let (head_dim, v_stride, k_stride) = (layout.head_dim, layout.v_stride(), layout.k_stride());
        let positions_end = self.position + self.unit.count;
        let width = self.vectors * LANES;
        let weights: [*const u32; M] = std::array::from_fn(|m| weights[m * width..][..width].as_ptr());
        let mut acc = [[s.splat(0.0); N]; M];
        for (b, start) in self.starts.iter().enumerate() {
            let at = start + self.v_behind + d;
            let tokens = (positions_end - (self.blocks_start + b * layout.block_tokens)).min(layout.block_tokens);
            for word in 0..tokens.div_ceil(W::PER) {
                let mut v = [s.splat(0.0); N];
                for (n, v) in v.iter_mut().enumerate() {
                    // SAFETY: the block is in the arena; `d + 16 n + 16 <= v_stride`, the padded length of a row of V.
                    *v = unsafe { load(s, arena, at + word * v_stride + n * LANES) };
                }
                for (acc, weights) in acc.iter_mut().zip(&weights) {
                    // SAFETY: a row of weights has k_stride elements for each block, which is a multiple of 16.
                    let weight = unsafe { *weights.add(b * k_stride / W::PER + word) };
                    for (acc, v) in acc.iter_mut().zip(&v) {
                        *acc = W::add(s, *acc, weight, *v);
                    }
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            let total = s.splat(totals[m]);
            for (n, acc) in acc.iter().enumerate() {
                let column = d + n * LANES;
                // Adding zero makes -0 into 0, so that keys masked by weight 0 leave no trace even in a sign.
                let value = s.add(s.div(*acc, total), s.splat(0.0));
                let (at, count) = (self.head(row + m) * head_dim + column, (head_dim - column).min(LANES));
                // SAFETY: this head's columns of a row of this chunk: no other unit writes them.
                unsafe { self.unit.out.store(s, self.batch_row(row + m), at, value, count) };
            }
        }
    }

    #[inline(always)]
    fn batch_row(&self, row: usize) -> usize {
        self.unit.chunk.first_row + self.unit.first + row / self.group
    }

    #[inline(always)]
    fn head(&self, row: usize) -> usize {
        self.unit.kv_head * self.group + row % self.group
    }
}

/// Replaces scores by `e^(score - max)` as words from the beginning, and returns the sum of what was to be rounded.
#[inline(always)]
fn softmax<S: Simd, W: Words>(s: S, scores: &mut [u32]) -> f32 {
    let mut max = s.splat(f32::NEG_INFINITY);
    for scores in scores.chunks_exact(LANES) {
        // SAFETY: the chunk has 16 words.
        max = s.max(max, unsafe { s.load(scores.as_ptr().cast()) });
    }
    let max = s.splat(s.to_array(max).into_iter().fold(f32::NEG_INFINITY, f32::max));
    let mut total = s.splat(0.0);
    let p = scores.as_mut_ptr();
    for at in (0..scores.len()).step_by(LANES) {
        // SAFETY: the row is whole vectors; words are written behind the score that was read, never before it.
        unsafe {
            let weight = exp(s, s.sub(s.load(p.add(at).cast()), max));
            total = s.add(total, weight);
            W::store(s, p, at, weight);
        }
    }
    s.sum(total)
}

/// 16 words of the arena.
///
/// # Safety
/// They must lie in the arena.
#[inline(always)]
unsafe fn load<S: Simd>(s: S, arena: &[u8], word: usize) -> S::V {
    debug_assert!((word + LANES) * WORD_BYTES <= arena.len());
    // SAFETY: the caller vouches for the words.
    unsafe { s.load(arena.as_ptr().add(word * WORD_BYTES).cast()) }
}
