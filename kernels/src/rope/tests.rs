use super::*;
use crate::dtype::ArenaDtype;
use crate::kv_cache::WORD_BYTES;
use crate::test_support::{Random, assert_close};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;

fn layout(head_dim: usize, dtype: ArenaDtype) -> KvLayout {
    KvLayout { layers: 3, kv_heads: KV_HEADS, head_dim, block_tokens: 16, dtype, page_bytes: 256 << 10 }
}

fn inv_freq(rotary_dim: usize) -> Vec<f32> {
    (0..rotary_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rotary_dim as f32)).collect()
}

/// One element of a head, `words` from the start of the block.
fn stored(arena: &Arena, layout: &KvLayout, block: u32, words: usize, element: usize) -> f32 {
    let bytes = layout.dtype.bytes();
    let at = (layout.block_offset(block) + words) * WORD_BYTES + element * bytes;
    crate::test_support::decode(layout.dtype, &arena.bytes()[at..][..bytes])[0]
}

#[test]
fn heads_turn_by_their_positions_and_keys_and_values_are_stored() {
    for (dtype, head_dim, rotary_dim) in
        [(ArenaDtype::F32, 32, 32), (ArenaDtype::Bf16, 21, 20), (ArenaDtype::Bf16, 64, 16), (ArenaDtype::Bf16, 300, 16)]
    {
        let layout = layout(head_dim, dtype);
        let mut arena = Arena::new(layout.page_bytes, 4).unwrap();
        arena.bytes_mut().fill(0xff); // NaN in either type
        let (width, positions) = ((HEADS + 2 * KV_HEADS) * head_dim, [0u32, 7, 3000]);
        let before = Random::new(5).rows(3, width);
        let mut qkv = before.clone();
        let mut rope = RopeAngles::new(inv_freq(rotary_dim), 1.0, 8);
        rope.fill(&positions).unwrap();
        let slots = [(0u32, 3u32), (5, 15), (2, 0)].map(|(block, offset)| KvSlot { block, offset });
        rope_store(&mut qkv, HEADS, &rope, &mut arena, &layout, 1, &slots).unwrap();

        for (t, &position) in positions.iter().enumerate() {
            let mut want: Vec<f64> = before.row(t).iter().map(|&v| f64::from(v)).collect();
            for head in want.chunks_mut(head_dim).take(HEADS + KV_HEADS) {
                for (i, inv_freq) in inv_freq(rotary_dim).into_iter().enumerate() {
                    let (sin, cos) = f64::from(position as f32 * inv_freq).sin_cos();
                    let (a, b) = (head[i], head[i + rotary_dim / 2]);
                    head[i] = a * cos - b * sin;
                    head[i + rotary_dim / 2] = b * cos + a * sin;
                }
            }
            assert_close(qkv.row(t), &want, 1e-6, "rotated");
            for (head, d) in (0..KV_HEADS).flat_map(|head| (0..head_dim).map(move |d| (head, d))) {
                let k = qkv.row(t)[(HEADS + head) * head_dim + d];
                let v = before.row(t)[(HEADS + KV_HEADS + head) * head_dim + d];
                let KvSlot { block, offset } = slots[t];
                let (k_at, v_at) = (layout.k_element(d, offset as usize), layout.v_element(d, offset as usize));
                assert_eq!(stored(&arena, &layout, block, layout.k_offset(1, head), k_at), dtype.round(k));
                assert_eq!(stored(&arena, &layout, block, layout.v_offset(1, head), v_at), dtype.round(v));
            }
        }
        let written = arena.bytes().chunks(dtype.bytes()).filter(|b| b.iter().any(|&b| b != 0xff)).count();
        let k_elements = head_dim.next_multiple_of(dtype.per_word()); // an odd one's pair is zero
        let v_rows: usize = slots.iter().map(|slot| if slot.offset % 2 == 0 { dtype.per_word() } else { 1 }).sum();
        let v_elements = v_rows * layout.v_stride(); // the first of a pair of tokens clears the second
        assert_eq!(written, KV_HEADS * (3 * k_elements + v_elements), "nothing else was written");
    }
}

#[test]
fn angles_are_scaled_and_equal_positions_share_them() {
    let mut rope = RopeAngles::new(vec![1.0, 0.5], 2.0, 3);
    rope.fill(&[4, 4, 2]).unwrap();
    assert_eq!(rope.row(0), rope.row(1));
    assert_eq!(rope.row(2).0, [2.0 * 2f64.cos() as f32, 2.0 * 1f64.cos() as f32]);
    assert!(matches!(rope.fill(&[0; 4]), Err(OpError::Limit { .. })));
}

#[test]
fn slots_outside_the_cache_are_refused_and_nothing_is_written() {
    let layout = layout(16, ArenaDtype::F32);
    let mut arena = Arena::new(layout.page_bytes, 1).unwrap();
    let mut qkv = Random::new(6).rows(1, (HEADS + 2 * KV_HEADS) * 16);
    let before = qkv.clone();
    let mut rope = RopeAngles::new(inv_freq(16), 1.0, 1);
    rope.fill(&[1]).unwrap();
    let blocks = layout.blocks_per_page() as u32;
    for (layer, block, offset) in [(3, 0, 0), (0, blocks, 0), (0, 0, 16)] {
        let slots = [KvSlot { block, offset }];
        let refused = rope_store(&mut qkv, HEADS, &rope, &mut arena, &layout, layer, &slots);
        assert!(matches!(refused, Err(OpError::Limit { .. })), "{layer} {block} {offset}");
    }
    let refused = rope_store(&mut qkv, HEADS, &rope, &mut arena, &layout, 0, &[]);
    assert!(matches!(refused, Err(OpError::Shape { .. })));
    assert_eq!(qkv.as_f32(), before.as_f32());
    assert!(arena.bytes().iter().all(|&b| b == 0));
}

#[test]
fn the_kernel_agrees_on_the_emulator() {
    crate::device::testing::on_every_schedule(super::check::check);
}

#[test]
fn the_kernel_with_deltas_agrees_on_the_emulator() {
    crate::device::testing::on_every_schedule(super::check_lora::check);
}
