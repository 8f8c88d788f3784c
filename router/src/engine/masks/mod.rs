//! Where each sequence stands in its grammar.
//!
//! When the scheduler wants a mask, the sequence's state goes to a worker with the token that was drawn; the answer comes
//! back through the engine's inbox, state and mask together. So a state is in one place at a time and needs no lock. The
//! engine waits for answers only where a wait of at most [`WAIT_MAX`] spares a sequence a step.

mod workers;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

pub(super) use workers::Answer;
use workers::{Job, Ticket, Work, Workers};

use super::run::{Engine, EngineError, Message};
use super::types::{Allowed, GrammarFailure, GrammarState};
use crate::metrics::EngineMeters;
use crate::scheduler::{MaskAsk, MaskStep, RequestId, Scheduler};

/// A call that takes longer fails its request. Grammars have limits of their own far below.
pub(super) const CALL_MAX: Duration = Duration::from_secs(1);
/// An ask that no worker takes for so long fails its request: all of them are stuck.
const QUEUED_MAX: Duration = Duration::from_secs(10);
/// Before it plans, the engine waits so long for a mask at most, counted from its ask.
const WAIT_MAX: Duration = Duration::from_millis(2);
/// It waits so long even if steps are short.
const WAIT_MIN: Duration = Duration::from_micros(250);
/// Otherwise the wait is this part of the last step at most: what others lose.
const WAIT_PART: u32 = 4;
/// Clocks are looked at this often while an answer is due.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(20);

/// An answer for [`crate::scheduler::Scheduler::set_mask`].
pub(super) struct MaskFor {
    pub(super) request: RequestId,
    pub(super) index: u32,
    pub(super) generated: usize,
    pub(super) answer: Result<Allowed, GrammarFailure>,
}

/// States of all sequences with a grammar, and the workers.
pub(super) struct Masks {
    workers: Workers,
    seqs: HashMap<(RequestId, u32), Place>,
    out: HashMap<Ticket, Out>,
    next_ticket: u64,
    watched: Instant,
    meters: Arc<EngineMeters>,
}

/// Where a sequence's state is.
enum Place {
    Here(Box<dyn GrammarState>),
    Out(Ticket),
}

/// An ask that was not answered.
struct Out {
    request: RequestId,
    index: u32,
    generated: usize,
    asked: Instant,
}

impl Masks {
    pub(super) fn new(inbox: Sender<Message>, meters: Arc<EngineMeters>) -> Self {
        Self {
            workers: Workers::new(inbox),
            seqs: HashMap::new(),
            out: HashMap::new(),
            next_ticket: 0,
            watched: Instant::now(),
            meters,
        }
    }

    /// Sends a sequence's state to a worker. `vocab`: tokens of the model.
    pub(super) fn ask(&mut self, ask: MaskAsk, vocab: u32) {
        let MaskAsk { request, index, generated, step } = ask;
        let work = match (step, self.seqs.remove(&(request, index))) {
            (MaskStep::Start(grammar), _) => Work::Start(grammar),
            (MaskStep::Accept(token), Some(Place::Here(state))) => Work::Accept(state, token),
            (MaskStep::Accept(_), _) => return, // the sequence was forgotten
        };
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.out.insert(ticket, Out { request, index, generated, asked: Instant::now() });
        self.seqs.insert((request, index), Place::Out(ticket));
        self.workers.give(Job { ticket, work, vocab });
    }

    /// Takes a worker's answer in. None if its sequence has ended meanwhile.
    pub(super) fn answered(&mut self, answer: Answer) -> Option<MaskFor> {
        let Answer { ticket, state, outcome } = answer;
        let Some(Out { request, index, generated, asked }) = self.out.remove(&ticket) else {
            self.free(ticket, state);
            return None;
        };
        match &outcome {
            Ok(_) => self.meters.mask(asked.elapsed()),
            Err(_) => self.meters.grammar_given_up(),
        }
        match state {
            Some(state) => drop(self.seqs.insert((request, index), Place::Here(state))),
            None => drop(self.seqs.remove(&(request, index))),
        }
        Some(MaskFor { request, index, generated, answer: outcome })
    }

    /// The sequence has ended.
    pub(super) fn forget(&mut self, request: RequestId, index: u32) {
        match self.seqs.remove(&(request, index)) {
            None => {}
            Some(Place::Here(state)) => {
                let ticket = Ticket(self.next_ticket);
                self.next_ticket += 1;
                self.free(ticket, Some(state));
            }
            Some(Place::Out(ticket)) => {
                self.out.remove(&ticket);
                self.workers.withdraw(ticket);
            }
        }
    }

    fn free(&self, ticket: Ticket, state: Option<Box<dyn GrammarState>>) {
        if let Some(state) = state {
            self.workers.give(Job { ticket, work: Work::Drop(state), vocab: 0 });
        }
    }

    /// No sequence has a grammar.
    pub(super) fn is_empty(&self) -> bool {
        self.seqs.is_empty()
    }

    /// An answer is due.
    pub(super) fn are_out(&self) -> bool {
        !self.out.is_empty()
    }

    /// Looks after the workers. Asks that took too long are given up: these are their answers.
    pub(super) fn watch(&mut self) -> Vec<MaskFor> {
        if self.out.is_empty() || self.watched.elapsed() < LOOK_EVERY {
            return Vec::new();
        }
        self.watched = Instant::now();
        let mut late = self.workers.watch(CALL_MAX);
        late.retain(|ticket| self.out.contains_key(ticket));
        let forgotten = self.out.iter().filter(|(_, out)| out.asked.elapsed() > QUEUED_MAX).map(|(ticket, _)| *ticket);
        late.extend(forgotten);
        late.sort_unstable();
        late.dedup();
        let mut answers = Vec::with_capacity(late.len());
        for ticket in late {
            let Some(Out { request, index, generated, .. }) = self.out.remove(&ticket) else { continue };
            self.seqs.remove(&(request, index));
            self.workers.withdraw(ticket);
            self.meters.grammar_given_up();
            let reason = GrammarFailure(format!("one token took longer than {} s", CALL_MAX.as_secs()));
            answers.push(MaskFor { request, index, generated, answer: Err(reason) });
        }
        answers
    }

    /// How long a plan should still wait for an answer, if it should. `last_step`: what the shard took for one.
    pub(super) fn worth_waiting(&self, last_step: Duration) -> Option<Duration> {
        let limit = (last_step / WAIT_PART).clamp(WAIT_MIN, WAIT_MAX);
        let left = |out: &Out| limit.checked_sub(out.asked.elapsed()).filter(|left| !left.is_zero());
        self.out.values().filter_map(left).max()
    }
}

impl Engine {
    /// Asks for the masks that the scheduler wants.
    pub(super) fn send_mask_asks(&mut self) {
        let Some(scheduler) = &mut self.scheduler else { return };
        for ask in scheduler.take_mask_asks() {
            if self.clients.get(&ask.request).is_some_and(|client| client.is_open(ask.index)) {
                self.masks.ask(ask, self.info.vocab_size);
            }
        }
    }

    /// A worker has answered.
    pub(super) fn masked(&mut self, answer: Answer) {
        if let Some(answer) = self.masks.answered(answer) {
            self.take_mask(answer);
        }
    }

    fn take_mask(&mut self, answer: MaskFor) {
        let MaskFor { request, index, generated, answer } = answer;
        if let Some(scheduler) = &mut self.scheduler {
            scheduler.set_mask(request, index, generated, answer);
        }
    }

    /// Gives up what took too long.
    pub(super) fn watch_masks(&mut self) {
        for given_up in self.masks.watch() {
            tracing::warn!(request = given_up.request.0, "a grammar took too long; its request fails");
            self.take_mask(given_up);
        }
    }

    /// Sends asks, and waits a moment for their answers if a step could be planned now: a sequence whose mask comes a
    /// little later would miss the whole step. False when the thread should end.
    pub(super) fn wait_for_masks(&mut self) -> Result<bool, EngineError> {
        self.send_mask_asks();
        let since = Instant::now();
        while self.link.can_step() && self.scheduler.as_ref().is_some_and(Scheduler::can_send) {
            let waited = since.elapsed();
            let left = self.masks.worth_waiting(self.last_step).filter(|_| waited < WAIT_MAX);
            let Some(left) = left else { break };
            self.outbox.send();
            match self.inbox.recv_timeout(left.min(WAIT_MAX - waited)) {
                Ok(message) => {
                    if !self.handle(message)? {
                        return Ok(false);
                    }
                    self.send_mask_asks();
                }
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return Ok(false),
            }
        }
        Ok(true)
    }
}
