//! Embeddings: what of a prompt's final hidden states is reported, gathered over the steps that compute it.
//!
//! The sum is taken position by position in f64, so it does not depend on how a prompt was cut into chunks.

use loramux_proto::{Pooled, Pooling};

use super::run::ShardFault;

/// Gathers one sequence's embedding.
#[derive(Clone, Debug)]
pub(super) struct Pooler {
    pooling: Pooling,
    sum: Vec<f64>,
    /// Positions seen; a mean takes each once, in order.
    positions: u32,
}

impl Pooler {
    /// `None`: no embedding is wanted.
    pub(super) fn new(pooling: Pooling) -> Option<Self> {
        (pooling != Pooling::None).then(|| Self { pooling, sum: Vec::new(), positions: 0 })
    }

    /// Which of a chunk's `len` rows count.
    pub(super) fn rows(&self, len: u32) -> std::ops::Range<u32> {
        if self.pooling == Pooling::Mean { 0..len } else { len.saturating_sub(1)..len }
    }

    /// Takes a chunk whose rows ([`Self::rows`] of it) are `states`, `hidden` values each.
    ///
    /// # Errors
    /// The chunk does not begin where the one before ended.
    pub(super) fn add(&mut self, start: u32, len: u32, hidden: usize, states: &[f32]) -> Result<(), ShardFault> {
        match self.pooling {
            Pooling::Mean if start != self.positions => {
                let reason = format!("an embedding's chunk begins at {start}, not at {}", self.positions);
                return Err(ShardFault::Malformed(reason));
            }
            Pooling::Mean => self.sum.resize(hidden, 0.0),
            Pooling::Last | Pooling::None => {
                self.sum.clear();
                self.sum.resize(hidden, 0.0);
            }
        }
        for row in states.chunks_exact(hidden) {
            for (sum, value) in self.sum.iter_mut().zip(row) {
                *sum += f64::from(*value);
            }
        }
        self.positions = start + len;
        Ok(())
    }

    /// The embedding.
    pub(super) fn report(&self, seq: u64) -> Pooled {
        let count = if self.pooling == Pooling::Mean { f64::from(self.positions.max(1)) } else { 1.0 };
        Pooled { seq, values: self.sum.iter().map(|sum| (sum / count) as f32).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_does_not_depend_on_how_the_prompt_was_cut() {
        let states: Vec<f32> = (0..30).map(|i| (i as f32 * 0.77).sin() * 1e3).collect();
        let hidden = 3;
        let means = (0..=10).map(|cut| {
            let mut pooler = Pooler::new(Pooling::Mean).unwrap();
            let (head, tail) = states.split_at(cut * hidden);
            if !head.is_empty() {
                pooler.add(0, cut as u32, hidden, head).unwrap();
            }
            if !tail.is_empty() {
                pooler.add(cut as u32, 10 - cut as u32, hidden, tail).unwrap();
            }
            pooler.report(7).values
        });
        let means: Vec<_> = means.collect();
        assert!(means.iter().all(|mean| *mean == means[0]), "{means:?}");
        let sum: f64 = states.iter().step_by(3).map(|value| f64::from(*value)).sum();
        assert_eq!(means[0][0], (sum / 10.0) as f32);
    }

    #[test]
    fn the_last_position_is_reported_as_it_is_and_gaps_of_a_mean_are_faults() {
        let mut last = Pooler::new(Pooling::Last).unwrap();
        assert_eq!(last.rows(5), 4..5);
        last.add(4, 5, 2, &[1.0, 2.0]).unwrap();
        last.add(9, 1, 2, &[3.0, 4.0]).unwrap();
        assert_eq!(last.report(1), Pooled { seq: 1, values: vec![3.0, 4.0] });
        let mut mean = Pooler::new(Pooling::Mean).unwrap();
        assert_eq!(mean.rows(5), 0..5);
        assert!(matches!(mean.add(1, 1, 2, &[1.0, 2.0]), Err(ShardFault::Malformed(_))));
        assert!(Pooler::new(Pooling::None).is_none());
    }
}
