use super::*;
use crate::test_support::{Random, assert_close, assert_pairs, bits};

#[test]
fn the_kernel_agrees_on_the_emulator() {
    crate::device::testing::on_every_schedule(check::check);
}

#[test]
fn every_instruction_set_equals_the_definition() {
    for isa in Isa::available() {
        for (seed, (rows, width)) in [(1, 1), (2, 15), (3, 16), (17, 33), (200, 576), (1, 2048)].into_iter().enumerate()
        {
            let mut random = Random::new(seed as u64);
            let (x, weight) = (random.values(rows * width), random.values(width));
            let (mut want, mut got) = (vec![0.0; rows * width], Rows::zeros(rows, width));
            cpu::reference(&mut want, &x, &weight, 1e-5);
            got.as_f32_mut().fill(f32::NAN);
            cpu::rms_norm(isa, got.out(), &x, &weight, 1e-5);
            assert_eq!(bits(got.as_f32()), bits(&want), "{isa:?} {rows} x {width}");
            assert_pairs(&mut got, &want, |out| cpu::rms_norm(isa, out, &x, &weight, 1e-5));
        }
    }
}

#[test]
fn the_definition_is_the_formula() {
    let (rows, width) = (5, 577);
    let mut random = Random::new(7);
    let (x, weight) = (random.values(rows * width), random.values(width));
    let mut got = vec![0.0; rows * width];
    cpu::reference(&mut got, &x, &weight, 1e-5);
    let mut want = Vec::new();
    for x in x.chunks(width) {
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
        let r = 1.0 / (mean + 1e-5).sqrt();
        want.extend(x.iter().zip(&weight).map(|(&x, &w)| f64::from(x) * r * f64::from(w)));
    }
    assert_close(&got, &want, 1e-6, "rms_norm");
}

#[test]
fn the_residual_is_added_before_the_norm() {
    let mut random = Random::new(9);
    let (x, before, weight) = (random.rows(3, 40), random.rows(3, 40), random.values(40));
    let (mut out, mut residual, mut want) = (Rows::zeros(8, 40), before.clone(), Rows::zeros(3, 40));
    add_rms_norm(&mut out, &mut residual, &x, &weight, 1e-6).unwrap();
    let sums: Vec<f32> = before.as_f32().iter().zip(x.as_f32()).map(|(a, b)| a + b).collect();
    assert_eq!(residual.as_f32(), sums);
    rms_norm(&mut want, &residual, &weight, 1e-6).unwrap();
    assert_eq!((out.rows(), bits(out.as_f32())), (3, bits(want.as_f32())));
}

#[test]
fn shapes_that_disagree_are_refused() {
    let x = Rows::zeros(2, 8);
    assert!(matches!(rms_norm(&mut Rows::zeros(2, 9), &x, &[1.0; 8], 0.0), Err(OpError::Shape { .. })));
    assert!(matches!(rms_norm(&mut Rows::zeros(2, 8), &x, &[1.0; 7], 0.0), Err(OpError::Shape { .. })));
    assert!(matches!(rms_norm(&mut Rows::zeros(1, 8), &x, &[1.0; 8], 0.0), Err(OpError::Limit { .. })));
    let refused = add_rms_norm(&mut Rows::zeros(2, 8), &mut Rows::zeros(1, 8), &x, &[1.0; 8], 0.0);
    assert!(matches!(refused, Err(OpError::Shape { .. })));
}

#[test]
fn the_kernel_with_deltas_agrees_on_the_emulator() {
    crate::device::testing::on_every_schedule(check_lora::check);
}
