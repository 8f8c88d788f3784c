use super::fixture::{World, image};
use super::*;
use crate::arena::Arena;
use crate::dtype::Dtype;
use crate::error::OpError;
use crate::test_support::Random;

fn part<'a>(layer: usize, rank: usize, a: &'a [f32], b: &'a [f32]) -> LoraPart<'a> {
    LoraPart { layer, slice: Slice::O, rank, a, b, d_in: a.len() / rank, d_out: b.len() / rank, scale: 0.5 }
}

#[test]
fn blocks_lie_apart_inside_their_pages_and_hold_the_matrices() {
    let mut random = Random::new(1);
    let (rank, d_in, d_out) = (33, 24, 40);
    let (a, b) = (random.values(rank * d_in), random.values(d_out * rank));
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let image = AdapterImage::pack(dtype, 4096, 5, &[part(3, rank, &a, &b)]).unwrap();
        assert_eq!(image.rank_blocks(), 3);
        let a_bytes = (16 * d_in * dtype.bytes()).next_multiple_of(256);
        let b_bytes = (16 * 48 * dtype.bytes()).next_multiple_of(256);
        let mut spans: Vec<(usize, usize)> =
            image.entries.iter().flat_map(|e| [(e.a, a_bytes), (e.b, b_bytes)]).collect();
        spans.sort_unstable();
        assert!(spans.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "{spans:?}");
        assert!(spans.iter().all(|(at, bytes)| at / 4096 == (at + bytes - 1) / 4096 && at % 256 == 0), "{spans:?}");
        let bytes: Vec<u8> = image.pages().flatten().copied().collect();
        for entry in &image.entries {
            let stored_a = &bytes[entry.a..][..16 * d_in * dtype.bytes()];
            let stored_b = &bytes[entry.b..][..16 * 48 * dtype.bytes()];
            for lane in 0..RANK_BLOCK {
                let r = entry.rank_block * RANK_BLOCK + lane;
                let want = |value: Option<&f32>| if r < rank { dtype.round(*value.unwrap()) } else { 0.0 };
                assert!((0..d_in).all(|k| a_at(dtype, stored_a, lane, k) == want(a.get(r * d_in + k))));
                assert!((0..d_out).all(|o| b_at(dtype, stored_b, lane, o) == want(b.get(o * rank + r))));
            }
        }
    }
}

#[test]
fn pages_are_filled() {
    // Llama-3.1-8B, rank 16 on all linears: 32 layers of 2.5 MiB are 40 pages of 2 MiB, without a gap.
    let zeros = vec![0.0f32; 16 * 14336];
    let extents = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)];
    let slices = [Slice::Q, Slice::K, Slice::V, Slice::O, Slice::Gate, Slice::Up, Slice::Down];
    let parts: Vec<LoraPart> = (0..32)
        .flat_map(|layer| {
            std::iter::zip(slices, extents).map(move |(slice, (d_in, d_out))| (layer, slice, d_in, d_out))
        })
        .map(|(layer, slice, d_in, d_out)| {
            let (a, b) = (&zeros[..16 * d_in], &zeros[..16 * d_out]);
            LoraPart { layer, slice, rank: 16, a, b, d_in, d_out, scale: 1.0 }
        })
        .collect();
    assert_eq!(AdapterImage::pack(Dtype::Bf16, 2 << 20, 32, &parts).unwrap().pages_needed(), 40);
}

#[test]
fn malformed_adapters_are_refused() {
    let values = vec![0.0f32; 4 * 64];
    let good = part(0, 4, &values, &values);
    let pack = |parts: &[LoraPart]| AdapterImage::pack(Dtype::F32, 8192, 2, parts);
    pack(&[good]).unwrap();
    assert!(matches!(pack(&[LoraPart { layer: 2, ..good }]), Err(OpError::Limit { .. })));
    assert!(matches!(pack(&[LoraPart { rank: 5, ..good }]), Err(OpError::Shape { .. })));
    assert!(matches!(pack(&[LoraPart { rank: usize::MAX, ..good }]), Err(OpError::Shape { .. })));
    assert!(matches!(pack(&[LoraPart { d_out: 63, ..good }]), Err(OpError::Shape { .. })));
    assert!(matches!(pack(&[good, good]), Err(OpError::Shape { .. })));
    let narrow = AdapterImage::pack(Dtype::F32, 4096 - 256, 2, &[good]);
    assert_eq!(narrow.unwrap_err(), OpError::BlockOverPage { block_bytes: 4096, page_bytes: 3840 });
    let nothing = pack(&[LoraPart { rank: 0, a: &[], b: &[], ..good }]).unwrap();
    assert_eq!((nothing.pages_needed(), nothing.rank_blocks()), (0, 0));
}

#[test]
fn a_stale_generation_is_an_error_and_leaves_no_work() {
    let mut world = World::new(2, Dtype::F32, &[16, 8]);
    let (old, other) = (world.adapters[0].0, world.adapters[1].0);
    let image = image(Dtype::F32, &world.adapters[1].1).unwrap();
    let pages: Vec<u32> = (3000..).take(image.pages_needed()).collect();
    world.table.publish(&mut world.arena, old.slot, old.generation + 1, &image, &pages).unwrap();
    let stale = OpError::Stale { slot: old.slot, generation: old.generation };
    assert_eq!(world.table.check(old.slot, old.generation), Err(stale.clone()));
    let mut work = WorkList::default();
    for rows in [1..3, 1..1] {
        let segments = [Segment { rows: 0..1, adapters: &[other] }, Segment { rows, adapters: &[old] }];
        assert_eq!(work.build(&world.table, segments.into_iter()), Err(stale.clone()));
        assert!(work.is_empty());
    }
    world.table.clear(other.slot);
    assert!(matches!(world.table.check(other.slot, other.generation), Err(OpError::Stale { .. })));
    assert!(matches!(world.table.check(99, 0), Err(OpError::Stale { slot: 99, .. })));
}

#[test]
fn segments_that_overlap_are_refused() {
    let world = World::new(3, Dtype::F32, &[8]);
    let adapters = [world.adapters[0].0];
    let segments = [0..3, 2..4].map(|rows| Segment { rows, adapters: &adapters });
    let mut work = WorkList::default();
    assert!(matches!(work.build(&world.table, segments.into_iter()), Err(OpError::Limit { .. })));
    assert!(work.is_empty());
}

#[test]
fn an_image_goes_only_where_there_is_room_for_it() {
    let world = World::new(4, Dtype::F32, &[16]);
    let image = image(Dtype::F32, &world.adapters[0].1).unwrap();
    let n = image.pages_needed() as u32;
    let (mut table, mut arena) = (AdapterTable::new(1), Arena::new(8192, n as usize).unwrap());
    let pages: Vec<u32> = (0..n).collect();
    let mut publish = |slot, pages: &[u32]| table.publish(&mut arena, slot, 7, &image, pages);
    assert!(matches!(publish(1, &pages), Err(OpError::Limit { .. })));
    assert!(matches!(publish(0, &pages[1..]), Err(OpError::Shape { .. })));
    assert!(matches!(publish(0, &pages.iter().map(|p| p + 1).collect::<Vec<_>>()), Err(OpError::Limit { .. })));
    publish(0, &pages).unwrap();
    table.check(0, 7).unwrap();
}
