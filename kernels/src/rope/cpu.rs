//! The definition, which is also the CPU form: it is elementwise, and a small part of a step.

use super::RopeAngles;
use crate::arena::Arena;
use crate::dtype::{ArenaDtype, to_f16};
use crate::kv_cache::{KvLayout, KvSlot};
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;

/// Rows that one unit of work rotates.
const ROWS_PER_UNIT: usize = 32;

#[expect(clippy::too_many_arguments, reason = "as the op itself")]
pub(super) fn rope_store(
    qkv: &mut Rows,
    heads: usize,
    rope: &RopeAngles,
    arena: &mut Arena,
    layout: &KvLayout,
    layer: usize,
    slots: &[KvSlot],
) {
    let (rows, width, rotated) = (qkv.rows(), qkv.width(), (heads + layout.kv_heads) * layout.head_dim);
    let shared = SharedMut::new(qkv.as_f32_mut());
    parallel::for_each(rows.div_ceil(ROWS_PER_UNIT), rows * rotated / 2, |unit| {
        for t in unit * ROWS_PER_UNIT..((unit + 1) * ROWS_PER_UNIT).min(rows) {
            // SAFETY: row `t`, which is in no other unit.
            let row = unsafe { std::slice::from_raw_parts_mut(shared.at(t * width), width) };
            let (cos, sin) = rope.row(t);
            for head in row[..rotated].chunks_mut(layout.head_dim) {
                rotate(head, cos, sin);
            }
        }
    });
    // By head and not by row: heads lie apart in every block, while two rows of a broken batch might name one slot.
    let cache = SharedMut::new(arena.bytes_mut());
    parallel::for_each(layout.kv_heads, slots.len() * layout.kv_heads * layout.head_dim, |head| {
        for (row, slot) in qkv.as_f32().chunks(width).zip(slots) {
            let k = &row[(heads + head) * layout.head_dim..][..layout.head_dim];
            let v = &row[rotated + head * layout.head_dim..][..layout.head_dim];
            let place = Place { cache, layout, layer, head, slot };
            match layout.dtype {
                // SAFETY: `rope_store` checked slot and layer, so the places are in the arena; only this unit has this head.
                ArenaDtype::F32 => unsafe { place.store(k, v, |value| value) },
                // SAFETY: as above.
                ArenaDtype::F16 => unsafe { place.store(k, v, |value| to_f16(value).to_bits()) },
            }
        }
    });
}

fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let (a, b) = (*low, *high);
        *low = a * cos - b * sin;
        *high = b * cos + a * sin;
    }
}

/// Where one row's K and V of one head go.
struct Place<'a> {
    cache: SharedMut<u8>,
    layout: &'a KvLayout,
    layer: usize,
    head: usize,
    slot: &'a KvSlot,
}

impl Place<'_> {
    /// Writes K and V. The padding of V becomes zero: whatever lay there may be no number.
    ///
    /// # Safety
    /// Slot, layer and head must be in the cache, `T` must be its type, and nobody else may access this head's place.
    unsafe fn store<T: Copy>(&self, k: &[f32], v: &[f32], to: impl Fn(f32) -> T) {
        let Self { cache, layout, layer, head, slot } = *self;
        let (block, offset) = (layout.block_offset(slot.block), slot.offset as usize);
        let k_start = block + layout.k_offset(layer, head) + offset;
        let v_start = block + layout.v_offset(layer, head) + offset * layout.v_stride();
        // SAFETY: the caller vouches for the places; blocks start at multiples of the element.
        unsafe {
            let at = |element: usize| cache.at(element * size_of::<T>()).cast::<T>();
            for (d, &value) in k.iter().enumerate() {
                at(k_start + d * layout.k_stride()).write_unaligned(to(value));
            }
            for d in 0..layout.v_stride() {
                at(v_start + d).write_unaligned(to(v.get(d).copied().unwrap_or(0.0)));
            }
        }
    }
}
