//! The definition, which is also the CPU form: it is a thousandth of a step.

use super::RopeAngles;
use crate::arena::Arena;
use crate::dtype::Dtype;
use crate::kv_cache::{KvLayout, KvSlot};
use crate::rows::Rows;
use half::bf16;

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
    let width = qkv.width();
    for (t, (row, slot)) in qkv.as_f32_mut().chunks_mut(width).zip(slots).enumerate() {
        let (qk, v) = row.split_at_mut((heads + layout.kv_heads) * layout.head_dim);
        let (cos, sin) = rope.row(t);
        for head in qk.chunks_mut(layout.head_dim) {
            rotate(head, cos, sin);
        }
        let k = &qk[heads * layout.head_dim..];
        store(arena, layout, layer, slot, k, v);
    }
}

fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let (a, b) = (*low, *high);
        *low = a * cos - b * sin;
        *high = b * cos + a * sin;
    }
}

/// Writes one row's keys and values. The padding of V becomes zero: whatever lay there may be no number.
fn store(arena: &mut Arena, layout: &KvLayout, layer: usize, slot: &KvSlot, k: &[f32], v: &[f32]) {
    let (head_dim, offset) = (layout.head_dim, slot.offset as usize);
    for head in 0..layout.kv_heads {
        let block = layout.block_offset(slot.block);
        let k_start = block + layout.k_offset(layer, head) + offset;
        let v_start = block + layout.v_offset(layer, head) + offset * layout.v_stride();
        let (k, v) = (&k[head * head_dim..][..head_dim], &v[head * head_dim..][..head_dim]);
        let padded = v.iter().copied().chain(std::iter::repeat_n(0.0, layout.v_stride() - head_dim));
        match layout.dtype {
            Dtype::F32 => {
                let cache = bytes_as::<f32>(arena.bytes_mut());
                write(cache, k_start, layout.k_stride(), k.iter().copied());
                write(cache, v_start, 1, padded);
            }
            Dtype::Bf16 => {
                let cache = bytes_as::<u16>(arena.bytes_mut());
                let round = |value| bf16::from_f32(value).to_bits();
                write(cache, k_start, layout.k_stride(), k.iter().copied().map(round));
                write(cache, v_start, 1, padded.map(round));
            }
        }
    }
}

fn write<T>(cache: &mut [T], start: usize, stride: usize, values: impl Iterator<Item = T>) {
    for (cache, value) in cache[start..].iter_mut().step_by(stride).zip(values) {
        *cache = value;
    }
}

/// The arena's bytes as elements.
fn bytes_as<T: Element>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: any bits are a value of an `Element`, and the arena starts at a multiple of 256 bytes.
    let (before, elements, _) = unsafe { bytes.align_to_mut::<T>() };
    debug_assert!(before.is_empty());
    elements
}

trait Element {}
impl Element for f32 {}
impl Element for u16 {}
