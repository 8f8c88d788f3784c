use super::*;
use crate::dtype::Dtype;
use crate::lora::fixture::{LAYER, RANKS, World, activations, mixes, sites};
use crate::test_support::{assert_close, bits};

#[test]
fn every_instruction_set_equals_the_definition() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let world = World::new(1, dtype, &RANKS);
        for mix in mixes() {
            let work = world.work(&mix);
            for site in sites() {
                let (x, _) = activations(2, &mix, &site);
                let shrink = cpu::Shrink {
                    x: &x,
                    pairs: &[],
                    arena: &world.arena,
                    table: &world.table,
                    layer: LAYER,
                    site: &site,
                    work: &work,
                };
                // What an adapter leaves alone must stay as it was: both begin with the same pattern.
                let mut want = vec![-7.0; work.planes * site.slices.len() * 16];
                cpu::reference(&mut want, &shrink);
                for isa in Isa::available() {
                    let mut got = vec![-7.0; want.len()];
                    cpu::lora_shrink(isa, &mut got, &shrink);
                    let what = format!("{isa:?} {dtype:?} {} {:?}", mix.name, site.slices);
                    if dtype == Dtype::Bf16 && isa.takes_pairs() {
                        // The instruction counts subnormal numbers as zero.
                        let want: Vec<f64> = want.iter().map(|v| f64::from(*v)).collect();
                        assert_close(&got, &want, 1e-6, &what);
                    } else {
                        assert_eq!(bits(&got), bits(&want), "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_definition_is_the_formula() {
    let world = World::new(3, Dtype::Bf16, &RANKS);
    for mix in mixes() {
        let work = world.work(&mix);
        let site = &sites()[0];
        let (x, _) = activations(4, &mix, site);
        let mut v = LoraScratch::default();
        lora_shrink(&mut v, &x, &world.arena, &world.table, LAYER, site, &work).unwrap();
        for item in &work.items {
            let (_, pairs) = world.adapters.iter().find(|(slot, _)| slot.slot == item.slot).unwrap();
            for (s, slice) in site.slices.iter().enumerate() {
                let Some(pair) = pairs.iter().find(|pair| pair.slice == *slice) else { continue };
                let first = item.rank_block as usize * 16;
                if first >= pair.rank {
                    continue;
                }
                for t in 0..item.rows as usize {
                    let x = x.row(item.first_row as usize + t);
                    let want: Vec<f64> = (first..first + 16)
                        .map(|r| match pair.a.get(r * site.d_in..(r + 1) * site.d_in) {
                            Some(a) => a.iter().zip(x).map(|(&a, &x)| f64::from(a) * f64::from(x)).sum(),
                            None => 0.0,
                        })
                        .collect();
                    let got = &v.values()[((item.plane as usize + t) * 3 + s) * 16..][..16];
                    assert_close(got, &want, 2e-2, mix.name);
                }
            }
        }
    }
}

#[test]
fn a_slot_that_changed_since_the_list_was_built_is_an_error() {
    let mut world = World::new(5, Dtype::F32, &RANKS);
    let mix = &mixes()[0];
    let (work, site) = (world.work(mix), &sites()[0]);
    let (x, _) = activations(6, mix, site);
    let slot = world.adapters[2].0;
    world.table.clear(slot.slot);
    let mut v = LoraScratch::default();
    let refused = lora_shrink(&mut v, &x, &world.arena, &world.table, LAYER, site, &work);
    assert_eq!(refused, Err(OpError::Stale { slot: slot.slot, generation: slot.generation }));
}

#[test]
fn shapes_that_disagree_are_refused() {
    let world = World::new(7, Dtype::F32, &RANKS);
    let mix = &mixes()[0];
    let (work, site) = (world.work(mix), &sites()[0]);
    let (x, _) = activations(8, mix, site);
    let mut v = LoraScratch::default();
    let mut run =
        |x: &Rows, layer, site: &LoraSite| lora_shrink(&mut v, x, &world.arena, &world.table, layer, site, &work);
    assert!(matches!(run(&x, 2, site), Err(OpError::Limit { .. })));
    assert!(matches!(run(&x, 0, &sites()[1]), Err(OpError::Shape { .. })));
    assert!(matches!(run(&Rows::zeros(3, site.d_in), 0, site), Err(OpError::Limit { .. })));
    let other = LoraSite { d_in: 41, ..site.clone() };
    assert!(matches!(run(&Rows::zeros(mix.rows, 41), 0, &other), Err(OpError::Shape { .. })));
    let wider = LoraSite { cols: vec![(0, 49), (49, 20), (69, 20)], ..site.clone() };
    assert!(matches!(run(&x, 0, &wider), Err(OpError::Shape { .. })));
}

#[test]
fn the_kernel_agrees_on_the_emulator() {
    crate::device::testing::on_every_schedule(check::check);
}
