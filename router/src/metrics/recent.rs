//! Times of the last minute, finer than the buckets of `/metrics`: for people who look at one server now.

use std::sync::atomic::{AtomicU32, Ordering};

/// Upper end of the first bucket, seconds.
const FIRST: f64 = 50e-6;
/// Buckets for each doubling: a quantile is right within 5 %.
const PER_DOUBLING: f64 = 8.0;
/// Up to 800 s; what is longer counts as that.
const BUCKETS: usize = 192;

/// Counts times, from many threads.
#[derive(Debug)]
pub(crate) struct Times {
    counts: [AtomicU32; BUCKETS],
}

impl Default for Times {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU32::new(0)) }
    }
}

impl Times {
    pub(super) fn observe(&self, seconds: f64) {
        // A float that is no index saturates: 0 for NaN and what is shorter than the first bucket.
        let bucket = ((seconds / FIRST).log2() * PER_DOUBLING).ceil() as usize;
        if let Some(count) = self.counts.get(bucket.min(BUCKETS - 1)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// All so far.
    pub(crate) fn counts(&self) -> Counts {
        Counts(self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect())
    }
}

/// How many times fell into each bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts(Vec<u32>);

impl Counts {
    /// What came after `earlier`, which is of the same [`Times`].
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        Self(self.0.iter().zip(&earlier.0).map(|(now, then)| now.wrapping_sub(*then)).collect())
    }

    pub(crate) fn total(&self) -> u64 {
        self.0.iter().map(|count| u64::from(*count)).sum()
    }

    /// The time in seconds that `share` of all stay below; `None` where there are none.
    pub(crate) fn quantile(&self, share: f64) -> Option<f64> {
        let total = self.total();
        let rank = ((total as f64 * share).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        let bucket = self.0.iter().position(|count| {
            seen += u64::from(*count);
            seen >= rank
        })?;
        // The middle of the bucket, on the same scale.
        Some(FIRST * ((bucket as f64 - 0.5) / PER_DOUBLING).exp2())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_five_percent_and_only_of_what_is_new() {
        let times = Times::default();
        for _ in 0..1000 {
            times.observe(5.0);
        }
        let before = times.counts();
        assert_eq!(times.counts().since(&before).quantile(0.5), None);
        for i in 1..=1000 {
            times.observe(f64::from(i) * 1e-3);
        }
        let new = times.counts().since(&before);
        assert_eq!(new.total(), 1000);
        for (share, expected) in [(0.5, 0.5), (0.99, 0.99), (0.001, 0.001), (1.0, 1.0)] {
            let found = new.quantile(share).unwrap();
            assert!((found / expected - 1.0).abs() < 0.05, "{share}: {found}");
        }
    }

    #[test]
    fn times_beyond_all_buckets_count_too() {
        let times = Times::default();
        for seconds in [0.0, -1.0, f64::NAN, 1e-9, 1e9, f64::INFINITY] {
            times.observe(seconds);
        }
        assert_eq!(times.counts().total(), 6);
    }
}
