use super::*;
use crate::dtype::{Dtype, HostData};
use crate::linear::{WeightPart, linear};
use crate::lora::fixture::{LAYER, RANKS, World, activations, mixes, sites};
use crate::lora_expand::lora_expand;
use crate::lora_shrink::lora_shrink;
use crate::test_support::{Random, bits};

#[test]
fn the_bits_are_those_of_the_four_ops() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let world = World::new(1, dtype, &RANKS);
        for (mix, site) in mixes().iter().flat_map(|mix| sites().map(|site| (mix, site))) {
            let (x, old) = activations(2, mix, &site);
            let mut random = Random::new(3);
            let (values, bias) = (random.values(old.width() * site.d_in), random.values(old.width()));
            let part = WeightPart { data: HostData::F32(&values), d_out: old.width(), d_in: site.d_in };
            let w = PackedWeight::pack(dtype, &[part]).unwrap();
            let work = world.work(mix);
            let (mut want, mut v) = (old.clone(), LoraScratch::default());
            linear(&mut want, &x, &w, Some(&bias)).unwrap();
            lora_shrink(&mut v, &x, &world.arena, &world.table, LAYER, &site, &work).unwrap();
            lora_expand(&mut want, &v, &world.arena, &world.table, LAYER, &site, &work).unwrap();
            let (mut got, mut v) = (old, LoraScratch::default());
            let (arena, table) = (&world.arena, &world.table);
            let adapters = Adapters { v: &mut v, arena, table, layer: LAYER, site: &site, work: &work };
            project(&mut got, &x, &w, Some(&bias), adapters).unwrap();
            assert_eq!(bits(got.as_f32()), bits(want.as_f32()), "{dtype:?} {} {:?}", mix.name, site.slices);
        }
    }
}

#[test]
fn what_disagrees_is_refused() {
    let world = World::new(4, Dtype::F32, &RANKS);
    let (mix, site) = (&mixes()[0], &sites()[0]);
    let (x, mut y) = activations(5, mix, site);
    let values = vec![0.0; y.width() * site.d_in];
    let part = WeightPart { data: HostData::F32(&values), d_out: y.width(), d_in: site.d_in };
    let w = PackedWeight::pack(Dtype::F32, &[part]).unwrap();
    let work = world.work(mix);
    let mut run = |x: &Rows, layer, site: &LoraSite| {
        let mut v = LoraScratch::default();
        let adapters = Adapters { v: &mut v, arena: &world.arena, table: &world.table, layer, site, work: &work };
        project(&mut y, x, &w, None, adapters)
    };
    assert!(matches!(run(&x, 2, site), Err(OpError::Limit { .. })));
    assert!(matches!(run(&x, LAYER, &sites()[1]), Err(OpError::Shape { .. })));
    assert!(matches!(run(&Rows::zeros(x.rows(), 3), LAYER, site), Err(OpError::Shape { .. })));
    let outside = LoraSite { cols: vec![(0, 48), (48, 20), (90, 20)], ..site.clone() };
    assert!(matches!(run(&x, LAYER, &outside), Err(OpError::Limit { .. })));
    run(&x, LAYER, site).unwrap();
}
