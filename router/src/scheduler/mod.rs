//! Decides what runs: pure and synchronous. No clock, no I/O, no device, no randomness; a seed replays it.
//!
//! [`Scheduler::submit`] and [`Scheduler::cancel`] say what is wanted, [`Scheduler::plan`] makes one [`Step`], and
//! [`Scheduler::commit`] takes its result.
//!
//! Up to `pipeline_depth` steps are in flight; their results come in order. A step that is planned while another one is in
//! flight goes on where that one will have got to: it names the position of a token that is being sampled, whose value
//! only the shard knows. So these hold while a step is in flight:
//!
//! - Nothing that it names is given back, preempted, evicted or written over. A sequence that ends keeps blocks and pins
//!   until no step in flight names it; what such a step computes for it is dropped.
//! - Only what a result has shown counts as computed: blocks are published, siblings fork and suspects are cleared by
//!   [`Scheduler::commit`], never by a plan.
//! - While a suspect is tried, one step is in flight at a time, so a death has one culprit.
//!
//! | file | holds |
//! |---|---|
//! | `pages` | the arena: pages of adapters, pages of KV blocks, cached blocks |
//! | `prefix` | keys of the prefix cache |
//! | `adapters` | contents, device slots, generations, pins |
//! | `sequence` | one sequence and its stages |
//! | `queue` | fairness: who is served next |
//! | `requests` | submit, cancel, deadlines, ends |
//! | `memory` | making room: eviction, preemption, copy-on-write |
//! | `load` | which adapters are brought to the device, and for whom |
//! | `keep` | adapters that are brought there for nobody: pinned, or ahead of need |
//! | `admit` | Waiting -> Running, prefix hits, waiting for a prefix that is being computed, forks of `n` |
//! | `plan`, `commit` | the two halves of a step |
//! | `masks` | grammars: whose next token waits for a mask |
//! | `replay` | death of the shard, and whose fault it was |
//!
//! Every admitted request ends: the sequence that runs longest can take the memory of all others, it fits the arena alone
//! (checked at submit), so it ends; and a waiting one that was passed over `STARVING_PLANS` times is admitted
//! before anybody else.

mod adapters;
mod admit;
mod commit;
mod ids;
mod keep;
mod limits;
mod load;
mod masks;
mod memory;
mod pages;
mod plan;
mod prefix;
mod queue;
mod replay;
mod requests;
mod sequence;
mod stats;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use adapters::AdapterTable;
use ids::{BlockId, SeqKey};
pub use ids::{RequestId, SeqId};
pub use limits::SchedulerLimits;
#[cfg(doc)]
use loramux_proto::Step;
pub use masks::{MaskAsk, MaskStep};
use pages::PagePool;
use queue::FairQueue;
use requests::Request;
use sequence::Sequence;
use stats::Counters;
pub use stats::SchedulerStats;

use crate::engine::{ContentId, GenerateEvent, GenerateRequest};

/// A request as the caller hands it in. Its adapters' contents were reported by [`Scheduler::adapter_ready`].
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Never used before.
    pub id: RequestId,
    /// Range-checked by the HTTP side.
    pub request: GenerateRequest,
    /// On the clock of `now_ms`.
    pub deadline_at_ms: Option<u64>,
}

/// Something that happened to a request.
#[derive(Clone, Debug)]
pub struct SchedulerEvent {
    /// Whose.
    pub request: RequestId,
    /// What; its `index` is the sibling.
    pub event: GenerateEvent,
}

/// An unfinished sequence uses the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an unfinished sequence uses this adapter")]
pub struct InUse;

/// A step whose result is awaited.
struct InFlight {
    id: u64,
    members: Vec<Member>,
    /// The suspect that has the step for itself.
    solo: Option<SeqKey>,
    /// Waiting sequences for which adapters are being uploaded: they share the blame for a death.
    loading: Vec<SeqKey>,
    /// Held until the copies were made.
    copy_sources: Vec<BlockId>,
}

/// A sequence's part of a step: positions `start..start + len`.
#[derive(Clone, Copy, Debug)]
struct Member {
    key: SeqKey,
    start: usize,
    len: usize,
    /// The token that follows is sampled.
    samples: bool,
}

/// A waiting sequence that lacks memory.
#[derive(Clone, Copy, Debug)]
struct Starving {
    key: SeqKey,
    since_plan: u64,
}

/// The state of everything that was submitted. See the module's page.
pub struct Scheduler {
    limits: SchedulerLimits,
    pool: PagePool,
    adapters: AdapterTable,
    queue: FairQueue,
    requests: BTreeMap<RequestId, Request>,
    sequences: Vec<Option<Sequence>>,
    free_sequences: Vec<u32>,
    /// In the order in which they started. The last one is preempted first.
    running: Vec<SeqKey>,
    /// In the order in which they are tried alone.
    suspects: VecDeque<SeqKey>,
    /// Waiting sequences whose adapters are kept on the device for them, first come first.
    claims: Vec<SeqKey>,
    starving: Option<Starving>,
    /// Since which plan a pinned adapter waits for pages.
    pins_wait_since: Option<u64>,
    /// Adapters that somebody expects to be wanted; tried in the next plan.
    hints: VecDeque<ContentId>,
    /// Lost their pin; told with [`Self::take_unpinned`].
    unpinned: Vec<ContentId>,
    deadlines: BTreeSet<(u64, RequestId)>,
    /// Oldest first: the shard executes them in this order.
    in_flight: VecDeque<InFlight>,
    /// Runs that the shard may forget; told with the next step.
    finishes: Vec<u64>,
    events: Vec<SchedulerEvent>,
    /// Told with [`Self::take_mask_asks`].
    mask_asks: Vec<MaskAsk>,
    /// Plans made: the scheduler's only notion of time besides `now_ms`.
    plans: u64,
    next_step: u64,
    next_seq: u64,
    next_arrival: u64,
    last_was_solo: bool,
    queued_requests: usize,
    queued_tokens: u64,
    counters: Counters,
}

impl Scheduler {
    /// An empty scheduler for one shard.
    pub fn new(limits: SchedulerLimits) -> Self {
        Self {
            pool: PagePool::new(limits.pages_total, limits.blocks_per_page),
            adapters: AdapterTable::new(limits.slots_max),
            limits,
            queue: FairQueue::default(),
            requests: BTreeMap::new(),
            sequences: Vec::new(),
            free_sequences: Vec::new(),
            running: Vec::new(),
            suspects: VecDeque::new(),
            claims: Vec::new(),
            starving: None,
            pins_wait_since: None,
            hints: VecDeque::new(),
            unpinned: Vec::new(),
            deadlines: BTreeSet::new(),
            in_flight: VecDeque::new(),
            finishes: Vec::new(),
            events: Vec::new(),
            mask_asks: Vec::new(),
            plans: 0,
            next_step: 1,
            next_seq: 1,
            next_arrival: 0,
            last_was_solo: false,
            queued_requests: 0,
            queued_tokens: 0,
            counters: Counters::default(),
        }
    }

    /// Events made outside [`Self::commit`]: admissions, deadlines, failures.
    pub fn take_events(&mut self) -> Vec<SchedulerEvent> {
        std::mem::take(&mut self.events)
    }

    fn seq(&self, key: SeqKey) -> &Sequence {
        self.sequences[key.0 as usize].as_ref().expect("a key in use names a sequence")
    }

    fn seq_mut(&mut self, key: SeqKey) -> &mut Sequence {
        self.sequences[key.0 as usize].as_mut().expect("a key in use names a sequence")
    }

    fn find_seq(&self, key: SeqKey) -> Option<&Sequence> {
        self.sequences.get(key.0 as usize)?.as_ref()
    }
}
