//! Adapters on their way into the shard's host memory, and the requests that wait for them.

use std::path::PathBuf;

use loramux_proto::{Merged, Prepared, prepared, to_shard};

use super::adapters::{AdapterFailure, PinLevel, PreparedAdapter};
use super::asks::{Ask, Reply};
use super::contents::Residency;
use super::reports::{malformed, read_check, read_report};
use super::run::Engine;
use super::types::{ContentId, Failure, GenerateEvent};
use crate::scheduler::{NewRequest, Scheduler};

/// Contents that are remembered; more only while they are needed.
const KNOWN_MAX: usize = 1 << 14;

/// A request that waits for adapters to come back into host memory.
pub(super) struct Parked {
    pub(super) new: NewRequest,
}

impl Parked {
    pub(super) fn uses(&self, content: &ContentId) -> bool {
        self.new.request.adapters.iter().any(|used| used.content == *content)
    }
}

impl Engine {
    /// Takes a new request in; none may name a content that drains.
    pub(super) fn admit(&mut self, new: NewRequest) {
        for used in &new.request.adapters {
            let reason = match self.contents.get(&used.content) {
                None => "it was never prepared, or was unloaded",
                Some(known) if known.draining => "it was unloaded",
                Some(_) => continue,
            };
            let gone = Failure::AdapterGone(used.content.short(), reason.into());
            return self.deliver(new.id, GenerateEvent::Failed(gone));
        }
        self.schedule_or_park(new);
    }

    /// Schedules a request, or parks it while its adapters are brought back into host memory.
    fn schedule_or_park(&mut self, new: NewRequest) {
        let mut missing = Vec::new();
        for used in &new.request.adapters {
            self.contents.touch(&used.content);
            if self.contents.get(&used.content).is_none_or(|content| content.residency != Residency::Host) {
                missing.push(used.content);
            }
        }
        if missing.is_empty() && self.scheduler.is_some() {
            return self.schedule(new);
        }
        for content in missing {
            self.bring_back(content);
        }
        self.parked.push(Parked { new });
    }

    /// Asks the shard to read a cold content again.
    pub(super) fn bring_back(&mut self, content: ContentId) {
        let Some(known) = self.contents.get(&content) else { return };
        if known.residency == Residency::Cold
            && let Some(dir) = known.dirs.last().cloned()
        {
            self.contents.set(&content, Residency::Preparing);
            self.ask(Ask::Prepare { dir, reply: None, expected: Some(content) });
        }
    }

    pub(super) fn ask(&mut self, ask: Ask) {
        self.asks.push(ask);
        self.send_asks();
    }

    /// Hands over what the shard may have now.
    pub(super) fn send_asks(&mut self) {
        while self.link.can_step()
            && let Some(body) = self.asks.next(self.options.rank_max)
        {
            self.link.send(body);
        }
    }

    /// The shard answered a preparation or a check.
    pub(super) fn prepared(&mut self, message: Prepared) {
        let Some(ask) = self.asks.answered(message.request_id) else { return };
        match ask {
            Ask::Prepare { dir, reply, expected } => {
                let outcome = match message.outcome {
                    Some(prepared::Outcome::Report(report)) => read_report(report),
                    Some(prepared::Outcome::Error(error)) => Err(AdapterFailure::new(error.code, error.message)),
                    None => Err(malformed()),
                };
                self.prepare_done(message.request_id, dir, reply, expected, outcome);
            }
            Ask::Check { reply, .. } => drop(reply.send(read_check(message.outcome))),
            merge @ Ask::Merge { .. } => merge.fail(malformed()),
        }
        self.contents.forget_drops(self.asks.oldest());
        self.send_asks();
        self.unpark();
    }

    /// The shard answered a merge.
    pub(super) fn merged(&mut self, message: Merged) {
        let Some(ask) = self.asks.answered(message.request_id) else { return };
        match ask {
            Ask::Merge { reply, .. } => {
                let outcome = message.error.map_or(Ok(()), |e| Err(AdapterFailure::new(e.code, e.message)));
                let _ = reply.send(outcome);
            }
            other => other.fail(malformed()),
        }
        self.send_asks();
    }

    fn prepare_done(
        &mut self,
        id: u64,
        dir: PathBuf,
        reply: Option<Reply<PreparedAdapter>>,
        expected: Option<ContentId>,
        outcome: Result<PreparedAdapter, AdapterFailure>,
    ) {
        // Forgotten while it was brought back, and prepared by nobody since: what the shard has just packed goes again.
        let unwanted = expected.is_some_and(|expected| self.contents.get(&expected).is_none());
        if unwanted {
            if let Ok(prepared) = &outcome
                && self.contents.get(&prepared.content).is_none()
            {
                self.drop_from_host(prepared.content);
            }
            return;
        }
        if let Ok(prepared) = &outcome {
            if self.contents.is_stale(&prepared.content, id) {
                // Read before the shard was told to drop this content: it may be gone again. Ask once more.
                return self.asks.push(Ask::Prepare { dir, reply, expected });
            }
            self.packed(prepared, dir.clone(), expected);
        }
        if let Some(expected) = expected
            && outcome.as_ref().map(|prepared| prepared.content) != Ok(expected)
        {
            if self.contents.moved_away(&expected, &dir) {
                self.bring_back(expected);
            } else {
                let reason = outcome.as_ref().err().map_or("its files changed on disk", |failure| &failure.message);
                self.missing(expected, reason);
            }
        }
        if let Some(reply) = reply {
            let _ = reply.send(outcome);
        }
    }

    /// A content is in host memory.
    fn packed(&mut self, prepared: &PreparedAdapter, dir: PathBuf, expected: Option<ContentId>) {
        let content = prepared.content;
        let is_new = self.contents.packed(prepared, dir);
        // Somebody loads what was being unloaded: it stays.
        let revived = expected.is_none() && self.contents.set_draining(&content, false);
        if let Some(scheduler) = self.scheduler.as_mut().filter(|_| is_new || revived) {
            scheduler.adapter_ready(content, prepared.pages_needed);
            let events = scheduler.take_events();
            self.deliver_all(events);
        }
        if is_new {
            self.keep_pin(content);
        }
        let wanted = self.contents.get_mut(&content).is_some_and(|known| std::mem::take(&mut known.wanted));
        if let Some(scheduler) = self.scheduler.as_mut().filter(|_| wanted) {
            scheduler.adapter_prefetch(content);
        }
        self.keep_host_budget(content);
        let parked = &self.parked;
        self.contents.bound(KNOWN_MAX, |content| parked.iter().any(|parked| parked.uses(content)));
    }

    /// A pinned content came back: it is pinned on the device again, and pins that waited are decided.
    fn keep_pin(&mut self, content: ContentId) {
        let pinned = self.contents.get(&content).and_then(|known| known.pinned);
        if pinned == Some(PinLevel::Device)
            && let Some(Err(refused)) = self.scheduler.as_mut().map(|scheduler| scheduler.adapter_pin(content))
        {
            tracing::warn!(content = content.short(), %refused, "a pinned adapter stays in host memory only");
            self.set_pin(&content, Some(PinLevel::Host));
        }
        let asks = self.contents.get_mut(&content).map(|known| std::mem::take(&mut known.pin_asks));
        for (level, reply) in asks.unwrap_or_default() {
            self.pin(content, Some(level), reply);
        }
    }

    /// No directory holds it any more. Whoever can bring it back is told; until then it counts as being prepared.
    fn missing(&mut self, content: ContentId, reason: &str) {
        match self.shared.missing.get() {
            Some(report) => {
                self.contents.set(&content, Residency::Preparing);
                report(content, reason);
            }
            None => self.content_gone(content, reason),
        }
    }

    /// What was reported missing does not come back.
    pub(super) fn give_up(&mut self, content: ContentId, reason: &str) {
        // Somebody else may have prepared it since.
        if self.contents.get(&content).is_some_and(|known| known.residency == Residency::Preparing) {
            self.content_gone(content, reason);
        }
    }

    /// A content cannot be read again: whoever needs it fails, alone.
    fn content_gone(&mut self, content: ContentId, reason: &str) {
        self.contents.set(&content, Residency::Cold);
        if let Some(known) = self.contents.get_mut(&content) {
            known.wanted = false;
            for (_, reply) in std::mem::take(&mut known.pin_asks) {
                let _ = reply.send(Err(super::adapters::PinRefused::Unknown(content.short())));
            }
        }
        self.fail_users(content, reason);
    }

    /// Ends every request that uses the content, waiting or running.
    pub(super) fn fail_users(&mut self, content: ContentId, reason: &str) {
        let failure = Failure::AdapterGone(content.short(), reason.to_owned());
        let uses = |parked: &Parked| parked.uses(&content);
        let (failed, parked) = std::mem::take(&mut self.parked).into_iter().partition(uses);
        self.parked = parked;
        for Parked { new } in failed {
            self.deliver(new.id, GenerateEvent::Failed(failure.clone()));
        }
        if let Some(scheduler) = &mut self.scheduler {
            scheduler.adapter_gone(content, reason.to_owned());
            let events = scheduler.take_events();
            self.deliver_all(events);
        }
    }

    /// Moves every parked request whose adapters are back into the scheduler, in order of arrival.
    pub(super) fn unpark(&mut self) {
        for Parked { new } in std::mem::take(&mut self.parked) {
            self.schedule_or_park(new);
        }
    }

    pub(super) fn expire_parked(&mut self) {
        let now_ms = self.now_ms();
        let late = |parked: &Parked| parked.new.deadline_at_ms.is_some_and(|at| at <= now_ms);
        if self.parked.iter().any(late) {
            let (expired, parked) = std::mem::take(&mut self.parked).into_iter().partition(late);
            self.parked = parked;
            for Parked { new } in expired {
                self.deliver(new.id, GenerateEvent::Failed(Failure::DeadlineExceeded));
            }
        }
    }

    /// Drops the least recently used contents that nobody needs until the host budget holds. `newest` stays, and so does
    /// what is pinned and what a parked request waits for: two adapters of one request must not push each other out.
    fn keep_host_budget(&mut self, newest: ContentId) {
        let (_, mut bytes) = self.contents.host();
        if bytes <= self.options.host_adapter_bytes {
            return;
        }
        for content in self.contents.oldest_first() {
            if bytes <= self.options.host_adapter_bytes {
                break;
            }
            if self.parked.iter().any(|parked| parked.uses(&content)) {
                continue;
            }
            let free = |scheduler: &mut Scheduler| scheduler.adapter_forget(content).is_ok();
            if content != newest && self.scheduler.as_mut().is_none_or(free) {
                bytes -= self.contents.get(&content).map_or(0, |known| known.host_bytes);
                self.drop_from_host(content);
            }
        }
    }

    /// Tells the shard to drop it. The scheduler does not know it any more.
    pub(super) fn drop_from_host(&mut self, content: ContentId) {
        self.contents.dropped(&content, self.asks.last());
        let dropped = loramux_proto::DropAdapter { content_id: content.0.to_vec() };
        self.link.send(to_shard::Body::DropAdapter(dropped));
    }
}
