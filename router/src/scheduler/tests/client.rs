//! What a client may see: every event is compared with what the request alone must give.

use super::oracle::{Expected, Oracle};
use crate::engine::{Failure, FinishReason, GenerateEvent, GenerateRequest};

/// A client's view of its request.
pub(super) struct Client {
    pub(super) request: GenerateRequest,
    pub(super) oracles: Vec<Oracle>,
    /// By sibling: no event may come any more.
    pub(super) ended: Vec<bool>,
    pub(super) admitted: bool,
    pub(super) any_token: bool,
    /// Its embedding came.
    pooled: bool,
    pub(super) logprobs_seen: usize,
    pub(super) deadline_at_ms: Option<u64>,
    /// A step that covers this position kills the shard.
    pub(super) poison_at: Option<u32>,
    pub(super) deaths_caused: u32,
    /// Points of deaths in steps it had for itself.
    pub(super) blame: u32,
    pub(super) numerics_due: bool,
}

impl Client {
    pub(super) fn new(
        request: GenerateRequest,
        oracles: Vec<Oracle>,
        deadline_at_ms: Option<u64>,
        poison_at: Option<u32>,
    ) -> Self {
        Self {
            oracles,
            ended: vec![false; request.n as usize],
            request,
            admitted: false,
            any_token: false,
            pooled: false,
            logprobs_seen: 0,
            deadline_at_ms,
            poison_at,
            deaths_caused: 0,
            blame: 0,
            numerics_due: false,
        }
    }

    pub(super) fn check_failure(&self, failure: &Failure, now_ms: u64) {
        match failure {
            Failure::DeadlineExceeded => assert!(self.deadline_at_ms.is_some_and(|at| at <= now_ms)),
            Failure::Numerics(_) => assert!(self.numerics_due),
            Failure::Grammar(_) => assert!(self.oracles.iter().any(|oracle| oracle.broken), "its grammar is sound"),
            Failure::ShardFault => assert!(self.blame >= 4, "a bystander was blamed"),
            other => panic!("unexpected {other:?}"),
        }
    }

    /// True if it was the last event.
    pub(super) fn check_event(&mut self, event: GenerateEvent) -> bool {
        match event {
            GenerateEvent::Admitted { cached_tokens } => {
                assert!(!self.admitted, "admitted twice");
                assert!((cached_tokens as usize) < self.request.prompt.len());
                self.admitted = true;
            }
            GenerateEvent::PromptLogprobs { positions } => {
                assert!(self.admitted && !self.any_token && self.request.sampling.prompt_logprobs.is_some());
                for reported in positions {
                    assert_eq!(reported.position as usize, self.logprobs_seen + 1, "each position once, in order");
                    assert_eq!(reported.logprob, self.oracles[0].prompt_logprobs[self.logprobs_seen]);
                    self.logprobs_seen += 1;
                }
            }
            GenerateEvent::Token { index, token, logprob, .. } => {
                assert!(self.admitted && !self.ended[index as usize], "a token of an ended sequence");
                self.check_logprobs_complete();
                self.any_token = true;
                let Expected { token: want, logprob: want_logprob, then } = self.oracles[index as usize].next();
                assert_eq!((token, logprob), (want, want_logprob), "another token than alone");
                self.oracles[index as usize].pending = then;
            }
            GenerateEvent::Embedding { values } => {
                assert!(self.admitted && !self.pooled, "one embedding");
                let at = self.request.pooling.expect("it was asked for") as usize;
                assert_eq!(values, self.oracles[0].pooled[at], "another embedding than alone");
                self.pooled = true;
            }
            GenerateEvent::Finished { index, reason } => {
                assert_eq!(self.pooled, self.request.pooling.is_some(), "the embedding comes first");
                assert!(!self.ended[index as usize], "finished twice");
                // A grammar that allows no token at all ends a request before its prompt is computed.
                if self.any_token || reason != FinishReason::Stop {
                    self.check_logprobs_complete();
                }
                let scored = self.request.max_tokens == 0 && reason == FinishReason::Length;
                assert!(scored || self.oracles[index as usize].pending == Some(reason), "finished for another reason");
                self.ended[index as usize] = true;
                return self.ended.iter().all(|ended| *ended);
            }
            GenerateEvent::Failed(_) => unreachable!("checked by the caller"),
        }
        false
    }

    fn check_logprobs_complete(&self) {
        let due = if self.request.sampling.prompt_logprobs.is_some() { self.request.prompt.len() - 1 } else { 0 };
        assert_eq!(self.logprobs_seen, due, "all prompt logprobs come first");
    }
}
