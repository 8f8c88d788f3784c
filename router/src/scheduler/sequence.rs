//! One sequence: its tokens, how far its KV is computed, and where it is.
//!
//! ```text
//! Waiting -> Running -> Finished        Running -> Waiting: preempted, or the shard died
//! Waiting -> Finished: cancelled, deadline, its adapter is gone
//! ```
//! Only this file writes `stage`. Phase (prefill or decode), remaining work and need of blocks are derived.

use std::ops::Range;
use std::sync::Arc;

use loramux_proto::AdapterRef;

use super::adapters::AdapterTable;
use super::ids::{BlockId, FairKey, RequestId, SeqId, SlotRef};
use super::pages::PagePool;
use super::prefix::PrefixKey;
use super::queue::Turn;
use crate::engine::{ContentId, GenerateRequest};

/// What all siblings of a request share. Never changes.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) id: RequestId,
    pub(super) request: GenerateRequest,
    /// Its adapters' contents, each once.
    pub(super) contents: Vec<ContentId>,
    pub(super) arrival: u64,
    pub(super) prefix_root: PrefixKey,
}

impl Job {
    /// Blocks for the longest this request's sequences can get. The last token's KV is never computed.
    pub(super) fn positions_max(&self) -> usize {
        self.request.prompt.len() + (self.request.max_tokens.max(1) - 1) as usize
    }
}

/// Why a sequence that waits is not in the fair queue, if it is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// In the fair queue, or in the suspects' order.
    Turn,
    /// For its sibling's prompt, whose blocks it will share.
    Leader,
}

/// What a running sequence holds.
#[derive(Debug)]
pub(super) struct Holding {
    pub(super) seq: SeqId,
    /// Block of each run of positions, from position 0.
    pub(super) blocks: Vec<BlockId>,
    /// One per content of the job.
    pins: Vec<SlotRef>,
    /// The same for the wire: one per adapter of the request, in its order.
    pub(super) adapters: Vec<AdapterRef>,
    /// The shard was told of it.
    pub(super) announced: bool,
    /// Blocks from the front that the shard has in its table of this run.
    pub(super) sent_blocks: usize,
    /// Full blocks that were offered to the prefix index.
    pub(super) published: usize,
}

/// Each stage owns what it needs, so a waiting sequence has no blocks to leak.
#[derive(Debug)]
pub(super) enum Stage {
    Waiting(Wait),
    Running(Holding),
    /// Memory is given back; the entry goes in the same call.
    Finished,
}

/// A sequence that was in a step in which the shard died: it runs alone until it is past that place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Suspect {
    /// `computed` beyond which it is cleared.
    pub(super) until: usize,
    /// Points of blame from steps it was alone in; its part of the request's strikes.
    pub(super) strikes: u32,
}

/// What the next token of a sequence may be. It belongs to the tokens before it, so preemptions and replays keep it.
#[derive(Clone, Debug)]
pub(super) enum Mask {
    /// The request has no grammar, or generates nothing.
    NotNeeded,
    /// The first one, which nobody was asked for yet.
    Unasked,
    /// Somebody works on it.
    Awaited,
    /// Bit t % 32 of word t / 32: token t may come.
    Ready(Arc<[u32]>),
}

/// What the steps in flight add to a sequence once their results come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ahead {
    /// Steps in flight that name it.
    pub(super) steps: u32,
    /// Positions that they compute.
    pub(super) positions: usize,
    /// Tokens that they sample. Their values are not known here.
    pub(super) tokens: usize,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) job: Arc<Job>,
    /// Which sibling.
    pub(super) index: u32,
    pub(super) key: FairKey,
    pub(super) generated: Vec<u32>,
    /// Positions whose KV is in the blocks, as results have shown.
    pub(super) computed: usize,
    pub(super) stage: Stage,
    pub(super) suspect: Option<Suspect>,
    /// Keys of its full blocks, as far as they were needed. Tokens never change, so neither do they.
    pub(super) prefix_keys: Vec<PrefixKey>,
    /// Positions already charged to its pair: work done twice is charged once.
    pub(super) charged: usize,
    pub(super) ahead: Ahead,
    pub(super) mask: Mask,
    /// It ended while in flight: its blocks come back with the result of the last step that names it.
    pub(super) leaving: bool,
}

impl Sequence {
    pub(super) fn new(job: Arc<Job>, index: u32, key: FairKey, wait: Wait) -> Self {
        let draws = job.request.max_tokens > 0;
        let mask = if draws && job.request.grammar.is_some() { Mask::Unasked } else { Mask::NotNeeded };
        Self {
            job,
            index,
            key,
            generated: Vec::new(),
            computed: 0,
            stage: Stage::Waiting(wait),
            suspect: None,
            prefix_keys: Vec::new(),
            charged: 0,
            ahead: Ahead::default(),
            mask,
            leaving: false,
        }
    }

    pub(super) fn prompt_tokens(&self) -> usize {
        self.job.request.prompt.len()
    }

    pub(super) fn len_tokens(&self) -> usize {
        self.prompt_tokens() + self.generated.len()
    }

    pub(super) fn token(&self, position: usize) -> u32 {
        let prompt = &self.job.request.prompt;
        if position < prompt.len() { prompt[position] } else { self.generated[position - prompt.len()] }
    }

    pub(super) fn tokens(&self) -> Vec<u32> {
        self.job.request.prompt.iter().chain(&self.generated).copied().collect()
    }

    /// A step in flight names it: what it holds may not be touched.
    pub(super) fn is_in_flight(&self) -> bool {
        self.ahead.steps > 0
    }

    /// Positions that no step has computed or is computing: one while decoding, more while prefilling. The token at the
    /// last one may still be unknown. Empty for a sequence that ended, or surely ends with a step in flight.
    ///
    /// Under a grammar, the last position waits for the mask of the token that is drawn there, and nothing is foreseen: what
    /// may follow a token is known only once the token is.
    pub(super) fn pending(&self) -> Range<usize> {
        let start = self.computed + self.ahead.positions;
        if self.leaving {
            return start..start;
        }
        let end = match self.mask {
            Mask::NotNeeded => self.end_in_sight(),
            Mask::Ready(_) => self.len_tokens(),
            Mask::Unasked | Mask::Awaited => self.len_tokens() - 1,
        };
        start..end.max(start)
    }

    /// Positions of the tokens it has, and of those that steps in flight sample. A chunk that ends here samples the next.
    pub(super) fn end_in_sight(&self) -> usize {
        (self.len_tokens() + self.ahead.tokens).min(self.job.positions_max())
    }

    /// The words of its mask, as the wire has them.
    pub(super) fn mask_bytes(&self) -> Option<Vec<u8>> {
        let Mask::Ready(words) = &self.mask else { return None };
        let mut bytes = Vec::with_capacity(words.len() * 4);
        words.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        Some(bytes)
    }

    /// A step with this part of the sequence goes into flight.
    pub(super) fn depart(&mut self, positions: usize, samples: bool) {
        self.ahead.steps += 1;
        self.ahead.positions += positions;
        self.ahead.tokens += usize::from(samples);
    }

    /// Its result is here.
    pub(super) fn arrive(&mut self, positions: usize, samples: bool) {
        self.ahead.steps -= 1;
        self.ahead.positions -= positions;
        self.ahead.tokens -= usize::from(samples);
    }

    /// Place in its pair's queue; the same each time it waits.
    pub(super) fn turn(&self, seq: super::ids::SeqKey) -> Turn {
        Turn { priority: self.job.request.priority, arrival: self.job.arrival, index: self.index, seq }
    }

    pub(super) fn holding(&self) -> Option<&Holding> {
        match &self.stage {
            Stage::Running(holding) => Some(holding),
            Stage::Waiting(_) | Stage::Finished => None,
        }
    }

    pub(super) fn holding_mut(&mut self) -> Option<&mut Holding> {
        match &mut self.stage {
            Stage::Running(holding) => Some(holding),
            Stage::Waiting(_) | Stage::Finished => None,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.stage, Stage::Running(_))
    }

    pub(super) fn waits_for_leader(&self) -> bool {
        matches!(self.stage, Stage::Waiting(Wait::Leader))
    }

    /// It need not wait for a sibling any more.
    pub(super) fn may_take_turn(&mut self) {
        if self.waits_for_leader() {
            self.stage = Stage::Waiting(Wait::Turn);
        }
    }

    /// Waiting -> Running. `blocks` are already retained for it and hold its first `computed` positions; the first
    /// `published` of them are in the prefix index.
    pub(super) fn start(
        &mut self,
        seq: SeqId,
        blocks: Vec<BlockId>,
        computed: usize,
        published: usize,
        adapters: &mut AdapterTable,
    ) {
        assert!(matches!(self.stage, Stage::Waiting(_)), "only a waiting sequence starts");
        let pins: Vec<_> = self.job.contents.iter().map(|content| adapters.pin(content)).collect();
        let wire = |used: &crate::engine::AdapterUse| {
            let at = self.job.contents.iter().position(|c| *c == used.content).expect("contents cover the adapters");
            AdapterRef { slot: pins[at].slot, generation: pins[at].generation, scale: used.scale }
        };
        let adapters = self.job.request.adapters.iter().map(wire).collect();
        self.computed = computed;
        self.stage =
            Stage::Running(Holding { seq, blocks, pins, adapters, announced: false, sent_blocks: 0, published });
    }

    /// Gives back blocks and pins and keeps the tokens: the next admission computes them again. Returns the run that
    /// the shard may forget, if it knows it.
    pub(super) fn preempt(&mut self, pool: &mut PagePool, adapters: &mut AdapterTable) -> Option<SeqId> {
        self.leave_running(Stage::Waiting(Wait::Turn), pool, adapters)
    }

    /// The last transition.
    pub(super) fn finish(&mut self, pool: &mut PagePool, adapters: &mut AdapterTable) -> Option<SeqId> {
        self.leave_running(Stage::Finished, pool, adapters)
    }

    fn leave_running(&mut self, next: Stage, pool: &mut PagePool, adapters: &mut AdapterTable) -> Option<SeqId> {
        let Stage::Running(holding) = std::mem::replace(&mut self.stage, next) else { return None };
        self.computed = 0;
        // The tail first: it becomes the older part of the cache, and a prefix is useless without its beginning.
        for block in holding.blocks.into_iter().rev() {
            pool.release(block);
        }
        for pin in holding.pins {
            adapters.unpin(pin);
        }
        holding.announced.then_some(holding.seq)
    }

    /// The shard died with everything in it; the pool and the slots are reset by the caller.
    pub(super) fn lose_shard(&mut self) {
        if self.is_running() {
            self.stage = Stage::Waiting(Wait::Turn);
        }
        self.computed = 0;
        self.ahead = Ahead::default();
    }
}

#[cfg(test)]
impl Holding {
    pub(super) fn pins(&self) -> &[SlotRef] {
        &self.pins
    }
}
