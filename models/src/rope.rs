//! Rotary frequencies: `inv_freq[i] = theta^(-2i / rotary_dim)`, stretched as the spec says.
//!
//! Computed in f64 and rounded once. Sources: arXiv:2104.09864; transformers `modeling_rope_utils.py` for `linear` and
//! `llama3`; llama.cpp for `rope_freqs.weight` (a divisor per frequency).

use crate::spec::{RopeScaling, RopeSpec};
use std::f64::consts::TAU;

/// The `rotary_dim / 2` frequencies in radians per position.
pub fn inv_freq(rope: &RopeSpec) -> Vec<f32> {
    let base = |i: usize| f64::from(rope.theta).powf(-((2 * i) as f64) / rope.rotary_dim as f64);
    let count = rope.rotary_dim / 2;
    match &rope.scaling {
        RopeScaling::None => (0..count).map(|i| base(i) as f32).collect(),
        RopeScaling::Linear { factor } => (0..count).map(|i| (base(i) / f64::from(*factor)) as f32).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let (factor, low, high) = (f64::from(*factor), f64::from(*low_freq_factor), f64::from(*high_freq_factor));
            let blend = |frequency: f64| {
                // Turns of this frequency within the original context: few = long wave.
                let turns = *original_context as f64 * frequency / TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - kept) * frequency / factor + kept * frequency
            };
            (0..count).map(|i| blend(base(i)) as f32).collect()
        }
        RopeScaling::Factors(factors) => {
            (0..count).zip(factors).map(|(i, factor)| (base(i) / f64::from(*factor)) as f32).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: &[f32], want: &[f64]) {
        assert_eq!(found.len(), want.len());
        for (i, (found, want)) in found.iter().zip(want).enumerate() {
            assert!((f64::from(*found) / want - 1.0).abs() < 1e-6, "frequency {i}: {found} instead of {want}");
        }
    }

    /// The same number by another road: exp and ln instead of powf.
    fn plain(theta: f64, dim: usize) -> Vec<f64> {
        (0..dim).step_by(2).map(|j| (-(j as f64) / dim as f64 * theta.ln()).exp()).collect()
    }

    #[test]
    fn unscaled_frequencies_are_powers_of_theta() {
        let rope = RopeSpec { theta: 10_000.0, scaling: RopeScaling::None, rotary_dim: 8 };
        close(&inv_freq(&rope), &[1.0, 0.1, 0.01, 0.001]);
        let rope = RopeSpec { theta: 500_000.0, scaling: RopeScaling::None, rotary_dim: 128 };
        close(&inv_freq(&rope), &plain(500_000.0, 128));
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let rope = RopeSpec { theta: 10_000.0, scaling: RopeScaling::Linear { factor: 4.0 }, rotary_dim: 8 };
        close(&inv_freq(&rope), &[0.25, 0.025, 0.0025, 0.00025]);
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_divides_long_ones_and_blends_between() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let rope = RopeSpec { theta: 500_000.0, scaling, rotary_dim: 128 };
        // Written after the three cases of Meta's reference (`apply_scaling`), by wavelength.
        let want: Vec<f64> = plain(500_000.0, 128)
            .into_iter()
            .map(|frequency| {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength < 8192.0 / 4.0 {
                    frequency
                } else if wavelength > 8192.0 / 1.0 {
                    frequency / 8.0
                } else {
                    let smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
                    (1.0 - smooth) * frequency / 8.0 + smooth * frequency
                }
            })
            .collect();
        let found = inv_freq(&rope);
        close(&found, &want);
        let plain = plain(500_000.0, 128);
        let divided = |i: usize| f64::from(found[i]) / plain[i];
        assert!((divided(0) - 1.0).abs() < 1e-6 && (divided(63) - 0.125).abs() < 1e-6);
        assert!((20..50).any(|i| divided(i) > 0.13 && divided(i) < 0.99), "no frequency was blended");
    }

    #[test]
    fn factors_divide_one_frequency_each() {
        let factors = RopeScaling::Factors(vec![1.0, 2.0, 4.0, 8.0]);
        let rope = RopeSpec { theta: 10_000.0, scaling: factors, rotary_dim: 8 };
        close(&inv_freq(&rope), &[1.0, 0.05, 0.0025, 0.000_125]);
    }
}
