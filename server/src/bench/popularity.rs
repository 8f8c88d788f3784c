//! Which adapter each request of a workload uses.

use serde::{Deserialize, Serialize};

use super::rng::Rng;

/// Exponent of `zipf`.
const ZIPF_EXPONENT: f64 = 1.0;
/// Part of the requests of `skewed` that use the first adapter.
const SKEWED_FIRST: f64 = 0.8;

/// How requests spread over the adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Popularity {
    /// No adapter.
    Base,
    /// The first adapter.
    One,
    /// They take turns.
    Distinct,
    /// Each request draws one, all as likely.
    Uniform,
    /// Each request draws one, the k-th with a weight of 1/k.
    Zipf,
    /// All requests of a round use the same one, another in each round.
    Identical,
    /// Four of five requests use the first, the others draw one of the rest.
    Skewed,
}

impl Popularity {
    /// All of them, by name.
    pub(super) const NAMES: [(&'static str, Self); 7] = [
        ("base", Self::Base),
        ("one", Self::One),
        ("distinct", Self::Distinct),
        ("uniform", Self::Uniform),
        ("zipf", Self::Zipf),
        ("identical", Self::Identical),
        ("skewed", Self::Skewed),
    ];

    pub(super) fn parse(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, popularity)| *popularity)
    }

    /// The adapter of each of `requests` requests, as an index below `adapters`; `None` for the base model.
    pub(super) fn draw(self, requests: usize, adapters: usize, round: usize, rng: &mut Rng) -> Vec<Option<usize>> {
        let weights: Vec<f64> = (1..=adapters).map(|rank| (rank as f64).powf(-ZIPF_EXPONENT)).collect();
        let total: f64 = weights.iter().sum();
        let mut one = |i: usize| match self {
            Self::Base => None,
            Self::One => Some(0),
            Self::Distinct => Some(i % adapters),
            Self::Uniform => Some(rng.below(adapters)),
            Self::Zipf => Some(weighted(&weights, rng.unit() * total)),
            Self::Identical => Some(round % adapters),
            Self::Skewed if adapters == 1 || rng.unit() < SKEWED_FIRST => Some(0),
            Self::Skewed => Some(1 + rng.below(adapters - 1)),
        };
        if adapters == 0 { vec![None; requests] } else { (0..requests).map(&mut one).collect() }
    }
}

/// The index whose share of the sum of `weights` holds `at`.
fn weighted(weights: &[f64], mut at: f64) -> usize {
    for (index, weight) in weights.iter().enumerate() {
        if at < *weight {
            return index;
        }
        at -= weight;
    }
    weights.len().saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(popularity: Popularity, requests: usize, adapters: usize, round: usize) -> Vec<usize> {
        let mut counts = vec![0; adapters];
        for drawn in popularity.draw(requests, adapters, round, &mut Rng::new(&[5])) {
            counts[drawn.unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn each_popularity_spreads_as_its_name_says() {
        assert_eq!(counts(Popularity::One, 8, 4, 1), [8, 0, 0, 0]);
        assert_eq!(counts(Popularity::Distinct, 10, 4, 1), [3, 3, 2, 2]);
        assert_eq!(counts(Popularity::Identical, 8, 4, 6), [0, 0, 8, 0]);
        assert!(counts(Popularity::Uniform, 40_000, 4, 0).iter().all(|n| n.abs_diff(10_000) < 400));
        let zipf = counts(Popularity::Zipf, 25_000, 4, 0); // weights 12, 6, 4, 3 of 25
        assert!(zipf.iter().zip([12_000, 6_000, 4_000, 3_000]).all(|(n, want)| n.abs_diff(want) < 400), "{zipf:?}");
        let skewed = counts(Popularity::Skewed, 30_000, 4, 0);
        assert!(skewed.iter().zip([24_000, 2_000, 2_000, 2_000]).all(|(n, w)| n.abs_diff(w) < 300), "{skewed:?}");
    }

    #[test]
    fn the_base_and_no_adapters_draw_none() {
        assert_eq!(Popularity::Base.draw(2, 4, 0, &mut Rng::new(&[1])), [None, None]);
        for (_, popularity) in Popularity::NAMES {
            assert_eq!(popularity.draw(2, 0, 0, &mut Rng::new(&[1])), [None, None]);
            assert_eq!(popularity.draw(3, 1, 2, &mut Rng::new(&[1])).len(), 3);
        }
    }
}
