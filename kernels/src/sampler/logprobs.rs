//! Log-probabilities of the model's own distribution.

use crate::simd::{Isa, Kernel, LANES, Simd, exp};

/// What turns a logit into a log-probability: `logit - max - ln_sum`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogSoftmax {
    /// The largest logit.
    pub max: f32,
    /// Logarithm of the sum of `e^(logit - max)`.
    pub ln_sum: f32,
}

impl LogSoftmax {
    /// Log-probability of a logit.
    #[must_use]
    pub fn of(self, logit: f32) -> f32 {
        logit - self.max - self.ln_sum
    }
}

/// Sums a row. Sums run in 16 lanes, a logit's by its index, over stretches of 4096 that are then added in f64.
#[must_use]
pub fn log_softmax_stats(logits: &[f32]) -> LogSoftmax {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0f64;
    for stretch in logits.chunks(4096) {
        Isa::best().run(SumExp { logits: stretch, max, sum: &mut sum });
    }
    LogSoftmax { max, ln_sum: sum.ln() as f32 }
}

/// Adds the sum of `e^(logit - max)`.
struct SumExp<'a> {
    logits: &'a [f32],
    max: f32,
    sum: &'a mut f64,
}

impl Kernel for SumExp<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (max, mut sum) = (s.splat(self.max), s.splat(0.0));
        let (whole, rest) = self.logits.as_chunks::<LANES>();
        for logits in whole {
            // SAFETY: the chunk has 16 elements.
            sum = s.add(sum, exp(s, s.sub(unsafe { s.load(logits.as_ptr()) }, max)));
        }
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        // SAFETY: `last` has 16 elements.
        sum = s.add(sum, exp(s, s.sub(unsafe { s.load(last.as_ptr()) }, max)));
        *self.sum += f64::from(s.sum(sum));
    }
}

/// Log-probability of one token; minus infinity for a token that is not there.
#[must_use]
pub fn logprob_of(logits: &[f32], token: u32) -> f32 {
    logits.get(token as usize).map_or(f32::NEG_INFINITY, |&logit| log_softmax_stats(logits).of(logit))
}

/// The `k` likeliest tokens and their log-probabilities, likeliest first, the lower id first among equals.
#[must_use]
pub fn top_logprobs(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    if k == 0 {
        return Vec::new();
    }
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let k = k.min(logits.len());
    // Twice the room, cut back to the best half when full: each token is looked at once and few are kept.
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(2 * k);
    let mut least = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate() {
        if logit < least || (logit == least && best.len() >= k) {
            continue;
        }
        best.push((token as u32, logit));
        if best.len() == 2 * k {
            best.select_nth_unstable_by(k - 1, order);
            least = best[k - 1].1;
            best.truncate(k);
        }
    }
    best.sort_unstable_by(order);
    best.truncate(k);
    let stats = log_softmax_stats(logits);
    for (_, logit) in &mut best {
        *logit = stats.of(*logit);
    }
    best
}
