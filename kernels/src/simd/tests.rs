use super::*;
use crate::test_support::{Random, bits};

/// Runs `exp` over a slice.
struct Exp<'a>(&'a mut [f32]);

impl Kernel for Exp<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for values in self.0.chunks_exact_mut(LANES) {
            // SAFETY: the chunk has 16 elements.
            unsafe { s.store(values.as_mut_ptr(), exp(s, s.load(values.as_ptr()))) };
        }
    }
}

#[test]
fn exp_is_within_two_units_and_the_same_everywhere() {
    let mut inputs: Vec<f32> = (0..40_000).map(|i| -87.3 + i as f32 * 0.00438).collect();
    inputs.extend([0.0, -0.0, 1.0, -1.0, 1e-8, -1e-8, 88.0, -87.3]);
    inputs.resize(inputs.len().next_multiple_of(LANES), 0.5);
    let mut first = inputs.clone();
    Isa::Portable.run(Exp(&mut first));
    for (x, got) in inputs.iter().zip(&first) {
        let want = f64::from(*x).exp();
        assert!((f64::from(*got) - want).abs() <= 2.4e-7 * want, "exp({x}) = {got}, expected {want}");
    }
    for isa in Isa::available() {
        let mut got = inputs.clone();
        isa.run(Exp(&mut got));
        assert_eq!(bits(&got), bits(&first), "{isa:?}");
    }
}

#[test]
fn exp_is_zero_far_below_and_held_far_above() {
    for isa in Isa::available() {
        let mut values = [f32::NEG_INFINITY, -1e30, -88.0, -87.4, 89.0, 1e30, f32::INFINITY, 0.0].repeat(2);
        isa.run(Exp(&mut values));
        assert_eq!(values[..4], [0.0; 4], "{isa:?}");
        assert!(values[4..7].iter().all(|v| v.is_finite() && *v > 1e38), "{isa:?}: {values:?}");
        assert_eq!(values[7], 1.0);
    }
}

/// Loads parts and pairs of bf16 and adds them up in one array.
struct Loads<'a>(&'a mut Vec<f32>, &'a [f32], &'a Line);

impl Kernel for Loads<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for n in 0..=LANES {
            // SAFETY: both slices have 16 elements and `n` is at most that; a `Line` is 64 bytes.
            unsafe {
                self.0.extend(s.to_array(s.load_part(self.1.as_ptr(), n)));
                let mut part = [9.0; LANES];
                s.store_part(part.as_mut_ptr(), s.load(self.1.as_ptr()), n);
                self.0.extend(part);
            }
        }
        // SAFETY: as above.
        unsafe {
            for half in s.load_pair(self.2) {
                self.0.extend(s.to_array(half));
            }
        }
        self.0.push(s.sum(s.splat(0.1)));
    }
}

struct Narrow<'a>(&'a mut Vec<u16>, &'a [f32; LANES]);

impl Kernel for Narrow<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut out = [0; 2 * LANES];
        // SAFETY: 16 values, and room for twice 16 halves.
        unsafe {
            let values = s.load(self.1.as_ptr());
            s.store_bf16(out.as_mut_ptr(), values);
            s.store_pairs(out.as_mut_ptr().add(LANES), values);
        }
        self.0.extend(out);
    }
}

#[test]
fn every_instruction_set_narrows_alike() {
    let mut values = [0.0f32; LANES];
    let odd = [f32::NAN, -f32::NAN, f32::INFINITY, -1e9, 65520.0, -0.0, 1e-7, 3e-41, -6e-8, 1.000_976_6, 1.003_906_3];
    values[..odd.len()].copy_from_slice(&odd);
    values[odd.len()..].copy_from_slice(&Random::new(9).values(LANES - odd.len()));
    for isa in Isa::available() {
        let mut got = Vec::new();
        isa.run(Narrow(&mut got, &values));
        for (i, value) in values.into_iter().enumerate() {
            let want = half::bf16::from_f32(value);
            for (got, may_be_zero) in [(got[i], false), (got[LANES + i], value.abs() < f32::MIN_POSITIVE)] {
                let got = half::bf16::from_bits(got);
                let same = if value.is_nan() { got.is_nan() } else { got.to_bits() == want.to_bits() };
                assert!(same || (may_be_zero && got.to_f32() == 0.0), "{isa:?} {value}: {got}");
            }
        }
    }
}

#[test]
fn loads_and_stores_agree_on_every_instruction_set() {
    let values = Random::new(3).values(LANES);
    let uppers: Vec<u16> = values.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect();
    let line = Line(std::array::from_fn(|i| u32::from(uppers[i]) | u32::from(uppers[LANES - 1 - i]) << 16));
    let mut first = Vec::new();
    Isa::Portable.run(Loads(&mut first, &values, &line));
    let n = first.len();
    let rounded: Vec<f32> = values.iter().map(|v| crate::Dtype::Bf16.round(*v)).collect();
    assert_eq!(first[n - 33..n - 17], rounded);
    assert_eq!(first[n - 17..n - 1], rounded.iter().rev().copied().collect::<Vec<_>>());
    for isa in Isa::available() {
        let mut got = Vec::new();
        isa.run(Loads(&mut got, &values, &line));
        assert_eq!(bits(&got), bits(&first), "{isa:?}");
    }
}
