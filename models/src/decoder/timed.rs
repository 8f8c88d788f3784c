//! Where the time of a step goes.

use super::stack::{DecoderOps, NormAt, Site};
use std::time::{Duration, Instant};

/// Time of each kind of op of a step, on the thread that runs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpTimes {
    /// Embedding and rotary angles.
    pub embed: Duration,
    /// All norms, with the additions before them.
    pub norms: Duration,
    /// The projections of all layers, by [`Site::ALL`], with their adapters.
    pub sites: [Duration; 4],
    /// Rotations, and storing keys and values.
    pub rope_store: Duration,
    /// Attention.
    pub attention: Duration,
    /// The gate of the MLP.
    pub activation: Duration,
}

/// The ops, timed.
pub(super) struct Timed<'a, O> {
    pub(super) ops: O,
    pub(super) times: &'a mut OpTimes,
}

fn timed<T>(total: &mut Duration, op: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let outcome = op();
    *total += started.elapsed();
    outcome
}

impl<O: DecoderOps> DecoderOps for Timed<'_, O> {
    type Error = O::Error;

    fn embed(&mut self) -> Result<(), O::Error> {
        timed(&mut self.times.embed, || self.ops.embed())
    }

    fn norm(&mut self, at: NormAt) -> Result<(), O::Error> {
        timed(&mut self.times.norms, || self.ops.norm(at))
    }

    fn add_norm(&mut self, at: NormAt) -> Result<(), O::Error> {
        timed(&mut self.times.norms, || self.ops.add_norm(at))
    }

    fn project(&mut self, layer: usize, site: Site) -> Result<(), O::Error> {
        timed(&mut self.times.sites[site as usize], || self.ops.project(layer, site))
    }

    fn rope_store(&mut self, layer: usize) -> Result<(), O::Error> {
        timed(&mut self.times.rope_store, || self.ops.rope_store(layer))
    }

    fn attention(&mut self, layer: usize) -> Result<(), O::Error> {
        timed(&mut self.times.attention, || self.ops.attention(layer))
    }

    fn activate(&mut self) -> Result<(), O::Error> {
        timed(&mut self.times.activation, || self.ops.activate())
    }
}
