//! The CPU form: rotations sixteen pairs at a time, and the cache's writes by head.

use super::RopeAngles;
use crate::arena::Arena;
use crate::dtype::ArenaDtype;
use crate::kv_cache::{KvLayout, KvSlot, WORD_BYTES};
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;
use crate::simd::{Isa, Kernel, LANES, Simd};

/// Rows of queries that one unit of work rotates.
const ROWS_PER_UNIT: usize = 4;

/// Longest head that is rounded in one go.
const PIECE: usize = 256;

pub(super) struct Store<'a> {
    pub(super) heads: usize,
    pub(super) rope: &'a RopeAngles,
    pub(super) layout: &'a KvLayout,
    pub(super) layer: usize,
    pub(super) slots: &'a [KvSlot],
}

pub(super) fn rope_store(isa: Isa, qkv: &mut Rows, arena: &mut Arena, store: &Store) {
    let Store { heads, layout, .. } = *store;
    let (rows, width) = (qkv.rows(), qkv.width());
    let qkv = SharedMut::new(qkv.as_f32_mut());
    let cache = SharedMut::new(arena.bytes_mut());
    let query_units = rows.div_ceil(ROWS_PER_UNIT);
    // Queries by rows; keys and values by head and not by row: heads lie apart in every block, while two rows of a broken
    // batch might name one slot.
    parallel::for_each(2 * layout.kv_heads + query_units, rows * width / 3, |unit| {
        let (of, rows) = match unit.checked_sub(2 * layout.kv_heads) {
            Some(unit) => (Of::Queries, unit * ROWS_PER_UNIT..((unit + 1) * ROWS_PER_UNIT).min(rows)),
            None if unit < layout.kv_heads => (Of::Keys(unit), 0..rows),
            None => (Of::Values(unit - layout.kv_heads), 0..rows),
        };
        let first = match of {
            Of::Queries => 0,
            Of::Keys(head) => (heads + head) * layout.head_dim,
            Of::Values(head) => (heads + layout.kv_heads + head) * layout.head_dim,
        };
        let columns = if matches!(of, Of::Queries) { heads * layout.head_dim } else { layout.head_dim };
        for t in rows {
            // SAFETY: these columns of row `t` are in no other unit.
            let row = unsafe { std::slice::from_raw_parts_mut(qkv.at(t * width + first), columns) };
            isa.run(Row { store, cache, of, t, row });
        }
    });
}

#[derive(Clone, Copy)]
enum Of {
    Queries,
    /// Of a head of the cache.
    Keys(usize),
    Values(usize),
}

/// Some columns of a row.
struct Row<'a> {
    store: &'a Store<'a>,
    cache: SharedMut<u8>,
    of: Of,
    t: usize,
    row: &'a mut [f32],
}

impl Kernel for Row<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { store, cache, of, t, row } = self;
        let Store { rope, layout, layer, slots, .. } = *store;
        if !matches!(of, Of::Values(_)) {
            let (cos, sin) = rope.row(t);
            for head in row.chunks_mut(layout.head_dim) {
                rotate(s, head, cos, sin);
            }
        }
        let block = layout.block_offset(slots[t].block);
        let token = slots[t].offset as usize;
        let (in_block, head_words) = match of {
            Of::Queries => return,
            Of::Keys(head) => (layout.k_offset(layer, head), layout.k_words()),
            Of::Values(head) => (layout.v_offset(layer, head), layout.v_words()),
        };
        // SAFETY: `rope_store` checked slot and layer, so the words are in the arena, on a boundary of 4; only this unit has this head.
        let words = unsafe {
            std::slice::from_raw_parts_mut(cache.at((block + in_block) * WORD_BYTES).cast::<u32>(), head_words)
        };
        match (of, layout.dtype) {
            (Of::Queries, _) => {}
            (Of::Keys(_), ArenaDtype::F32) => {
                for (d, value) in row.iter().enumerate() {
                    words[d * layout.k_stride() + token] = value.to_bits();
                }
            }
            (Of::Values(_), ArenaDtype::F32) => {
                let words = &mut words[token * layout.v_stride()..][..layout.v_stride()];
                words.fill(0); // whatever lay in the padding may be no number
                for (word, value) in words.iter_mut().zip(row.iter()) {
                    *word = value.to_bits();
                }
            }
            (Of::Keys(_), ArenaDtype::Bf16) => in_bf16(s, row, |first, halves| {
                for (i, pair) in halves.as_chunks::<2>().0.iter().enumerate().take((row.len() - first).div_ceil(2)) {
                    let word = u32::from(pair[0]) | u32::from(pair[1]) << 16;
                    words[(first / 2 + i) * layout.k_stride() + token] = word;
                }
            }),
            (Of::Values(_), ArenaDtype::Bf16) => in_bf16(s, row, |first, halves| {
                let words = &mut words[token / 2 * layout.v_stride()..][..layout.v_stride()][first..];
                // The first of a pair clears the second: it is not written yet, and what lay there may be no number.
                let (keep, shift) = if token.is_multiple_of(2) { (0, 0) } else { (0xffff, 16) };
                for (word, half) in words.iter_mut().zip(halves) {
                    *word = *word & keep | u32::from(*half) << shift;
                }
            }),
        }
    }
}

/// Calls `write` with pieces of `values` rounded to bf16, zeros behind their end, and where in `values` each begins.
#[inline(always)]
fn in_bf16<S: Simd>(s: S, values: &[f32], mut write: impl FnMut(usize, &[u16; PIECE])) {
    let mut halves = [0u16; PIECE];
    for (piece, values) in values.chunks(PIECE).enumerate() {
        for (values, halves) in values.chunks(LANES).zip(halves.chunks_mut(LANES)) {
            // SAFETY: as many values as are loaded; 16 halves.
            unsafe { s.store_bf16(halves.as_mut_ptr(), s.load_part(values.as_ptr(), values.len())) };
        }
        write(piece * PIECE, &halves);
    }
}

#[inline(always)]
fn rotate<S: Simd>(s: S, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (low, high) = head.split_at_mut(half);
    let mut i = 0;
    while i < half {
        let count = (half - i).min(LANES);
        // SAFETY: `count` elements from i are in all four.
        unsafe {
            let (cos, sin) = (s.load_part(cos.as_ptr().add(i), count), s.load_part(sin.as_ptr().add(i), count));
            let (a, b) = (s.load_part(low.as_ptr().add(i), count), s.load_part(high.as_ptr().add(i), count));
            s.store_part(low.as_mut_ptr().add(i), s.sub(s.mul(a, cos), s.mul(b, sin)), count);
            s.store_part(high.as_mut_ptr().add(i), s.add(s.mul(b, cos), s.mul(a, sin)), count);
        }
        i += LANES;
    }
}
