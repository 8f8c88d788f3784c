//! How rough a simulated world is, and what happened in it.

use super::marker::Rng;

/// Counts over a run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    pub(super) steps: u64,
    pub(super) requests: u64,
    pub(super) tokens: u64,
    pub(super) switches: u64,
    pub(super) deaths: u64,
    pub(super) cancels: u64,
    pub(super) deadlines: u64,
    pub(super) numerics: u64,
    pub(super) shard_faults: u64,
    pub(super) refused: u64,
    pub(super) forks: u64,
    pub(super) preemptions: u64,
    pub(super) uploads: u64,
    pub(super) evictions: u64,
    pub(super) prefix_hit_tokens: u64,
    pub(super) wasted_positions: u64,
    /// Steps that were planned while another one was in flight.
    pub(super) ahead: u64,
    pub(super) pins: u64,
    pub(super) unpinned: u64,
    pub(super) drains: u64,
    pub(super) ends_now: u64,
    pub(super) fetched: u64,
    pub(super) masks: u64,
    pub(super) grammar_failures: u64,
}

impl Totals {
    pub(super) fn add(&mut self, o: &Totals) {
        self.steps += o.steps;
        self.requests += o.requests;
        self.tokens += o.tokens;
        self.switches += o.switches;
        self.deaths += o.deaths;
        self.cancels += o.cancels;
        self.deadlines += o.deadlines;
        self.numerics += o.numerics;
        self.shard_faults += o.shard_faults;
        self.refused += o.refused;
        self.forks += o.forks;
        self.preemptions += o.preemptions;
        self.uploads += o.uploads;
        self.evictions += o.evictions;
        self.prefix_hit_tokens += o.prefix_hit_tokens;
        self.wasted_positions += o.wasted_positions;
        self.ahead += o.ahead;
        self.pins += o.pins;
        self.unpinned += o.unpinned;
        self.drains += o.drains;
        self.ends_now += o.ends_now;
        self.fetched += o.fetched;
        self.masks += o.masks;
        self.grammar_failures += o.grammar_failures;
    }
}

/// How rough this world is; per mille per step.
pub(super) struct Weather {
    pub(super) submit: u32,
    pub(super) cancel: u32,
    pub(super) stop: u32,
    pub(super) deadline: u32,
    pub(super) kill: u32,
    pub(super) crash: u32,
    pub(super) poison: u32,
    pub(super) numerics: u32,
    pub(super) forget: u32,
    pub(super) gone: u32,
    pub(super) pin: u32,
    pub(super) drain: u32,
    pub(super) end_now: u32,
    pub(super) fetch: u32,
    pub(super) upload_delay_max: u32,
    pub(super) ready_delay_max: u32,
    pub(super) mask_delay_max: u32,
}

impl Weather {
    pub(super) fn random(rng: &mut Rng) -> Self {
        let mut rough = |often: u32, max: u32| if rng.chance(often) { rng.range(1, max) } else { 0 };
        Self {
            submit: 20 + rough(1000, 400),
            cancel: rough(600, 60),
            stop: rough(500, 60),
            deadline: rough(300, 300),
            kill: rough(300, 20),
            crash: rough(300, 20),
            poison: rough(150, 30),
            numerics: rough(300, 20),
            forget: rough(500, 60),
            gone: rough(300, 200),
            pin: rough(400, 40),
            drain: rough(400, 30),
            end_now: rough(300, 10),
            fetch: rough(400, 100),
            upload_delay_max: rough(400, 4),
            ready_delay_max: rough(500, 30),
            mask_delay_max: rough(500, 5),
        }
    }
}
