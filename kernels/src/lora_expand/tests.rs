use super::*;
use crate::dtype::Dtype;
use crate::lora::fixture::{LAYER, Mix, RANKS, World, activations, mixes, sites};
use crate::lora_shrink::lora_shrink;
use crate::test_support::{assert_close, bits};

/// `y` after both halves.
fn delta(world: &World, mix: &Mix, site: &LoraSite, x: &Rows, y: &Rows) -> Rows {
    let (work, mut v, mut y) = (world.work(mix), LoraScratch::default(), y.clone());
    lora_shrink(&mut v, x, &world.arena, &world.table, LAYER, site, &work).unwrap();
    lora_expand(&mut y, &v, &world.arena, &world.table, LAYER, site, &work).unwrap();
    y
}

#[test]
fn every_instruction_set_equals_the_definition() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let world = World::new(1, dtype, &RANKS);
        for mix in mixes() {
            let work = world.work(&mix);
            for site in sites() {
                let (x, y) = activations(2, &mix, &site);
                let mut v = LoraScratch::default();
                lora_shrink(&mut v, &x, &world.arena, &world.table, LAYER, &site, &work).unwrap();
                let expand = cpu::Expand {
                    v: cpu::Halves::done(v.values()),
                    arena: &world.arena,
                    table: &world.table,
                    layer: LAYER,
                    site: &site,
                    work: &work,
                };
                let mut want = y.clone();
                cpu::reference(&mut want, &expand);
                for isa in Isa::available() {
                    let mut got = y.clone();
                    cpu::lora_expand(isa, &mut got, &expand);
                    let what = format!("{isa:?} {dtype:?} {} {:?}", mix.name, site.slices);
                    if dtype == Dtype::Bf16 && isa.takes_pairs() {
                        // The instruction counts subnormal numbers as zero.
                        let want: Vec<f64> = want.as_f32().iter().map(|v| f64::from(*v)).collect();
                        assert_close(got.as_f32(), &want, 1e-6, &what);
                    } else {
                        assert_eq!(bits(got.as_f32()), bits(want.as_f32()), "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn both_halves_add_the_scaled_product_of_a_and_b() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let world = World::new(3, dtype, &RANKS);
        for (mix, site) in mixes().iter().flat_map(|mix| sites().map(|site| (mix, site))) {
            let (x, y) = activations(4, mix, &site);
            let got = delta(&world, mix, &site, &x, &y);
            let mut want: Vec<f64> = y.as_f32().iter().map(|&v| f64::from(v)).collect();
            for (row, want) in want.chunks_mut(y.width()).enumerate() {
                for &(adapter, scale) in mix.adapters_of(row) {
                    for pair in &world.adapters[adapter].1 {
                        let Some(s) = site.slices.iter().position(|slice| *slice == pair.slice) else { continue };
                        let dot =
                            |a: &[f32]| a.iter().zip(x.row(row)).map(|(&a, &x)| f64::from(a) * f64::from(x)).sum();
                        let v: Vec<f64> = pair.a.chunks(site.d_in).map(dot).collect();
                        let (first, d_out) = site.cols[s];
                        for (want, b) in want[first..first + d_out].iter_mut().zip(pair.b.chunks(pair.rank)) {
                            let d: f64 = b.iter().zip(&v).map(|(&b, v)| f64::from(b) * v).sum();
                            *want += f64::from(scale) * f64::from(pair.scale) * d;
                        }
                    }
                }
            }
            let tolerance = if dtype == Dtype::F32 { 2e-5 } else { 3e-2 };
            assert_close(got.as_f32(), &want, tolerance, &format!("{dtype:?} {} {:?}", mix.name, site.slices));
        }
    }
}

#[test]
fn a_row_in_a_mixed_batch_equals_that_row_alone() {
    let world = World::new(5, Dtype::Bf16, &RANKS);
    for (mix, site) in mixes().iter().flat_map(|mix| sites().map(|site| (mix, site))) {
        let (x, y) = activations(6, mix, &site);
        let together = delta(&world, mix, &site, &x, &y);
        for row in 0..mix.rows {
            let segments = vec![(0..1, mix.adapters_of(row).to_vec())];
            let alone = Mix { name: "alone", rows: 1, segments };
            let (mut x1, mut y1) = (Rows::zeros(1, x.width()), Rows::zeros(1, y.width()));
            x1.as_f32_mut().copy_from_slice(x.row(row));
            y1.as_f32_mut().copy_from_slice(y.row(row));
            let got = delta(&world, &alone, &site, &x1, &y1);
            assert_eq!(bits(got.as_f32()), bits(together.row(row)), "{} {:?} row {row}", mix.name, site.slices);
        }
    }
}

#[test]
fn rows_of_the_base_model_keep_their_bits() {
    let world = World::new(7, Dtype::Bf16, &RANKS);
    for (mix, site) in mixes().iter().flat_map(|mix| sites().map(|site| (mix, site))) {
        let (x, y) = activations(8, mix, &site);
        let got = delta(&world, mix, &site, &x, &y);
        for row in (0..mix.rows).filter(|&row| mix.adapters_of(row).is_empty()) {
            assert_eq!(bits(got.row(row)), bits(y.row(row)), "{} row {row}", mix.name);
        }
    }
}

#[test]
fn planes_of_another_site_and_columns_that_are_not_there_are_refused() {
    let world = World::new(9, Dtype::F32, &RANKS);
    let (mix, sites) = (&mixes()[0], sites());
    let work = world.work(mix);
    let (x, mut y) = activations(10, mix, &sites[0]);
    let mut v = LoraScratch::default();
    lora_shrink(&mut v, &x, &world.arena, &world.table, LAYER, &sites[0], &work).unwrap();
    let run = |y: &mut Rows, site: &LoraSite| lora_expand(y, &v, &world.arena, &world.table, LAYER, site, &work);
    assert!(matches!(run(&mut y, &sites[1]), Err(OpError::Shape { .. })));
    assert!(matches!(run(&mut Rows::zeros(mix.rows, 87), &sites[0]), Err(OpError::Limit { .. })));
    let overlapping = LoraSite { cols: vec![(0, 48), (40, 20), (68, 20)], ..sites[0].clone() };
    assert!(matches!(run(&mut y, &overlapping), Err(OpError::Limit { .. })));
    run(&mut y, &sites[0]).unwrap();
}

#[test]
fn the_kernel_agrees_on_the_emulator() {
    crate::device::testing::on_every_schedule(check::check);
}
