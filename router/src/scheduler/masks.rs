//! Grammars: which sequence's next token waits for a mask.
//!
//! The scheduler knows no grammar. It asks for one mask at a time and sequence, with [`Scheduler::take_mask_asks`], and is
//! answered by [`Scheduler::set_mask`]. Until then the sequence keeps its place and its memory and only its sampling
//! position is left out of the plans. A mask belongs to the tokens before it: it stays good over a preemption and over the
//! death of a shard, and nothing is asked twice.

use std::sync::Arc;

use super::Scheduler;
use super::ids::{RequestId, SeqKey};
use super::sequence::Mask;
use crate::engine::{Allowed, Failure, FinishReason, Grammar, GrammarFailure};

/// What one sequence's next token may be is wanted.
#[derive(Clone, Debug)]
pub struct MaskAsk {
    /// Whose.
    pub request: RequestId,
    /// Which sibling.
    pub index: u32,
    /// Tokens that it has generated; the answer says the same number.
    pub generated: usize,
    /// What happened since the sequence's last ask.
    pub step: MaskStep,
}

/// How the grammar's state moves before the mask is computed.
#[derive(Clone, Debug)]
pub enum MaskStep {
    /// The sequence's first ask: a state in front of the first token.
    Start(Arc<dyn Grammar>),
    /// This token was drawn.
    Accept(u32),
}

impl Scheduler {
    /// Masks that are wanted since the last call. Some may be of requests that have ended meanwhile.
    pub fn take_mask_asks(&mut self) -> Vec<MaskAsk> {
        std::mem::take(&mut self.mask_asks)
    }

    /// The answer to the ask with these three. One that nobody waits for (any more) changes nothing.
    ///
    /// What follows (an end, a failure) is in [`Self::take_events`].
    pub fn set_mask(
        &mut self,
        request: RequestId,
        index: u32,
        generated: usize,
        answer: Result<Allowed, GrammarFailure>,
    ) {
        let sequences = self.requests.get(&request).map(|known| &known.sequences);
        let Some(key) = sequences.and_then(|all| all.get(index as usize).copied().flatten()) else { return };
        let seq = self.seq_mut(key);
        if !matches!(seq.mask, Mask::Awaited) || seq.generated.len() != generated {
            return;
        }
        match answer {
            Ok(Allowed::Tokens(words)) => seq.mask = Mask::Ready(words),
            Ok(Allowed::End) => {
                // Nobody may hear of the end of what was never admitted.
                self.note_admitted(request, 0);
                self.finish_index(request, index, FinishReason::Stop);
            }
            Err(failure) => self.fail_request(request, Failure::Grammar(failure.0)),
        }
    }

    /// Another step may be sent before a result has come.
    pub fn can_send(&self) -> bool {
        self.in_flight.len() < self.limits.depth()
    }

    /// The sequence starts, or will soon.
    pub(super) fn ask_first_mask(&mut self, key: SeqKey) {
        let seq = self.seq_mut(key);
        let Mask::Unasked = seq.mask else { return };
        if let Some(grammar) = seq.job.request.grammar.clone() {
            self.ask_mask(key, MaskStep::Start(grammar));
        }
    }

    /// `token` was appended, and another one is to follow.
    pub(super) fn ask_next_mask(&mut self, key: SeqKey, token: u32) {
        if !matches!(self.seq(key).mask, Mask::NotNeeded) {
            self.ask_mask(key, MaskStep::Accept(token));
        }
    }

    fn ask_mask(&mut self, key: SeqKey, step: MaskStep) {
        let seq = self.seq_mut(key);
        seq.mask = Mask::Awaited;
        let ask = MaskAsk { request: seq.job.id, index: seq.index, generated: seq.generated.len(), step };
        self.mask_asks.push(ask);
    }
}
