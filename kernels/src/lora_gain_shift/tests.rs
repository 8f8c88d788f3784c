use super::*;
use crate::dtype::Dtype;
use crate::lora::fixture::{LAYER, World, mixes, sites};
use crate::lora::{AdapterImage, AdapterParts, END_TILE, LoraPart, Segment, Slice, SlotScale, VectorPart, WorkList};
use crate::test_support::{Random, bits};

/// Two adapters with vectors on Q and V (the second not on V), in slots 0 and 1, and one without in slot 2.
fn world() -> (Arena, AdapterTable) {
    let mut random = Random::new(5);
    let (mut arena, mut table) = (Arena::new(8192, 64).unwrap(), AdapterTable::new(3));
    for slot in 0..3u32 {
        let values: Vec<Vec<f32>> = (0..6).map(|_| random.values(48)).collect();
        let pair = LoraPart {
            layer: LAYER,
            slice: Slice::Q,
            rank: 20,
            a: &random.values(20 * 40),
            b: &random.values(48 * 20),
            d_in: 40,
            d_out: 48,
            scale: 1.0,
        };
        let part = |slice, gain: usize, width: usize| VectorPart {
            layer: LAYER,
            slice,
            gain: &values[gain][..width],
            shift: &values[gain + 1][..width],
        };
        let vectors = [part(Slice::Q, 0, 48), part(Slice::V, 2, 20)];
        let parts = AdapterParts { lora: &[pair], vectors: &vectors[..2 - slot as usize], ..Default::default() };
        let image = AdapterImage::pack_parts(Dtype::Bf16, 8192, 2, &parts).unwrap();
        let pages: Vec<u32> = (20 * slot..).take(image.pages_needed()).collect();
        table.publish(&mut arena, slot, 9, &image, &pages).unwrap();
    }
    (arena, table)
}

fn slot(slot: u32, scale: f32) -> SlotScale {
    SlotScale { slot, generation: 9, scale }
}

#[test]
fn every_instruction_set_equals_the_definition_and_other_rows_stay() {
    let (arena, table) = world();
    let site = &sites()[0];
    let (one, two, none) = ([slot(0, 0.5)], [slot(1, -1.0), slot(0, 2.0)], [slot(2, 1.0)]);
    let segments = [(1..4, &one[..]), (4..5, &two[..]), (5..7, &none[..]), (8..9, &one[..])];
    let segments = segments.map(|(rows, adapters)| Segment { rows, adapters });
    let mut work = WorkList::default();
    work.build(&table, segments.into_iter()).unwrap();
    let before = Random::new(3).rows(9, 88);
    let op = cpu::GainShift { arena: &arena, table: &table, layer: LAYER, site, work: &work };
    let mut want = before.clone();
    cpu::reference(&mut want, &op);
    for row in [0, 5, 6, 7] {
        assert_eq!(bits(want.row(row)), bits(before.row(row)), "row {row} has no vectors");
    }
    let k = 48..68;
    assert!(want.row(1)[..48] != before.row(1)[..48] && want.row(1)[k.clone()] == before.row(1)[k]);
    for isa in Isa::available() {
        let mut got = before.clone();
        cpu::lora_gain_shift(isa, &mut got, &op);
        assert_eq!(bits(got.as_f32()), bits(want.as_f32()), "{isa:?}");
    }
    let mut other_layer = before.clone();
    lora_gain_shift(&mut other_layer, &arena, &table, 0, site, &work).unwrap();
    assert_eq!(bits(other_layer.as_f32()), bits(before.as_f32()), "the vectors are of another layer");
}

#[test]
fn adapters_add_up_on_what_the_base_computed() {
    let (arena, table) = world();
    let site = &sites()[0];
    let run = |adapters: &[SlotScale], y: &Rows| {
        let mut work = WorkList::default();
        work.build(&table, std::iter::once(Segment { rows: 0..2, adapters })).unwrap();
        let mut y = y.clone();
        lora_gain_shift(&mut y, &arena, &table, LAYER, site, &work).unwrap();
        y
    };
    let y = Random::new(4).rows(2, 88);
    let (first, second, both) =
        (run(&[slot(0, 0.5)], &y), run(&[slot(1, 2.0)], &y), run(&[slot(0, 0.5), slot(1, 2.0)], &y));
    for (i, &y) in y.as_f32().iter().enumerate() {
        let want = first.as_f32()[i] + second.as_f32()[i] - y;
        assert!((both.as_f32()[i] - want).abs() < 1e-5, "element {i}");
    }
}

#[test]
fn wrong_extents_and_stale_slots_are_refused() {
    let (arena, mut table) = world();
    let adapters = [slot(0, 1.0)];
    let mut work = WorkList::default();
    work.build(&table, std::iter::once(Segment { rows: 0..2, adapters: &adapters })).unwrap();
    let site = sites()[0].clone();
    let mut narrow = site.clone();
    narrow.cols[0].1 = 40;
    let mut y = Rows::zeros(2, 88);
    assert!(matches!(lora_gain_shift(&mut y, &arena, &table, LAYER, &narrow, &work), Err(OpError::Shape { .. })));
    let mut low = Rows::zeros(1, 88);
    assert!(matches!(lora_gain_shift(&mut low, &arena, &table, LAYER, &site, &work), Err(OpError::Limit { .. })));
    table.clear(0);
    assert!(matches!(lora_gain_shift(&mut y, &arena, &table, LAYER, &site, &work), Err(OpError::Stale { .. })));
}

#[test]
fn plain_adapters_have_no_vectors_to_look_up() {
    let world = World::new(1, Dtype::F32, &[16, 8, 33, 1, 64, 8, 16]);
    for mix in mixes() {
        assert!(!world.work(&mix).uses.vectors, "{}", mix.name);
    }
}

#[test]
fn the_heads_vectors_come_in_tiles() {
    let width = END_TILE + 5;
    let values = Random::new(8).values(2 * width);
    let vectors = [VectorPart { layer: 0, slice: Slice::Head, gain: &values[..width], shift: &values[width..] }];
    let one = [0.0f32; 16];
    let pair = LoraPart { layer: 0, slice: Slice::Q, rank: 1, a: &one, b: &one, d_in: 16, d_out: 16, scale: 1.0 };
    let parts = AdapterParts { lora: &[pair], vectors: &vectors, ..Default::default() };
    let image = AdapterImage::pack_parts(Dtype::F32, 128 << 10, 1, &parts).unwrap();
    let (mut arena, mut table) = (Arena::new(128 << 10, 4).unwrap(), AdapterTable::new(1));
    let pages: Vec<u32> = (0..image.pages_needed() as u32).collect();
    table.publish(&mut arena, 0, 9, &image, &pages).unwrap();
    let mut work = WorkList::default();
    let adapters = [slot(0, 1.0)];
    work.build(&table, std::iter::once(Segment { rows: 0..1, adapters: &adapters })).unwrap();
    let mut y = Rows::zeros(1, width);
    y.as_f32_mut().fill(2.0);
    for (tile, cols) in [(0, (0, END_TILE)), (1, (END_TILE, 5))] {
        let site = LoraSite { slices: &[Slice::Head], cols: vec![cols], d_in: 16 };
        lora_gain_shift(&mut y, &arena, &table, tile, &site, &work).unwrap();
    }
    for (o, &y) in y.as_f32().iter().enumerate() {
        assert_eq!(y, 2.0 + values[o].mul_add(2.0, values[width + o]), "output {o}");
    }
}

#[test]
fn the_kernel_agrees_on_the_emulator() {
    crate::device::testing::on_every_schedule(check::check);
}
