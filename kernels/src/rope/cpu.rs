//! The CPU form: rotations sixteen pairs at a time, and the cache's writes by head.

use super::RopeAngles;
use crate::arena::Arena;
use crate::dtype::ArenaDtype;
use crate::kv_cache::{KvLayout, KvSlot};
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
        let offset = slots[t].offset as usize;
        // SAFETY: `rope_store` checked slot and layer, so the places are in the arena; only this unit has this head.
        unsafe {
            match of {
                Of::Queries => {}
                Of::Keys(head) => {
                    let first = block + layout.k_offset(layer, head) + offset;
                    write(s, layout.dtype, cache, row, |d| first + d * layout.k_stride());
                }
                Of::Values(head) => {
                    let first = block + layout.v_offset(layer, head) + offset * layout.v_stride();
                    write(s, layout.dtype, cache, row, |d| first + d);
                    // Whatever lay in the padding may be no number.
                    for d in row.len()..layout.v_stride() {
                        let bytes = layout.dtype.bytes();
                        cache.at((first + d) * bytes).write_bytes(0, bytes);
                    }
                }
            }
        }
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

/// Writes `values` to the cache, element `d` to place `at(d)`.
///
/// # Safety
/// The places must be in the cache, and nobody else's.
#[inline(always)]
unsafe fn write<S: Simd>(s: S, dtype: ArenaDtype, cache: SharedMut<u8>, values: &[f32], at: impl Fn(usize) -> usize) {
    if dtype == ArenaDtype::F32 {
        for (d, value) in values.iter().enumerate() {
            // SAFETY: the caller vouches for the place.
            unsafe { cache.at(4 * at(d)).cast::<f32>().write_unaligned(*value) };
        }
        return;
    }
    let mut halves = [0u16; PIECE];
    for (piece, values) in values.chunks(PIECE).enumerate() {
        for (values, halves) in values.chunks(LANES).zip(halves.chunks_mut(LANES)) {
            // SAFETY: as many values as are loaded; 16 halves.
            unsafe { s.store_f16(halves.as_mut_ptr(), s.load_part(values.as_ptr(), values.len())) };
        }
        for (d, half) in halves.iter().enumerate().take(values.len()) {
            // SAFETY: the caller vouches for the place.
            unsafe { cache.at(2 * at(piece * PIECE + d)).cast::<u16>().write_unaligned(*half) };
        }
    }
}
