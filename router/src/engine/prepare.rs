//! Adapters on their way into the shard's host memory, and the requests that wait for them.

use std::path::PathBuf;

use loramux_proto::{AdapterReport, DropAdapter, PrepareAdapter, Prepared, prepared, to_shard};
use tokio::sync::oneshot;

use super::adapters::{AdapterFailure, PreparedAdapter};
use super::contents::Residency;
use super::run::Engine;
use super::types::{ContentId, Failure, GenerateEvent};
use crate::scheduler::NewRequest;

/// A preparation the shard was asked for.
pub(super) struct Preparing {
    pub(super) dir: PathBuf,
    pub(super) reply: Option<oneshot::Sender<Result<PreparedAdapter, AdapterFailure>>>,
    /// Set when a content that was here before is brought back: nothing else may come out of the directory.
    pub(super) expected: Option<ContentId>,
}

/// A request that waits for adapters to come back into host memory.
pub(super) struct Parked {
    pub(super) new: NewRequest,
}

impl Engine {
    /// Schedules a request, or parks it while its adapters are brought back into host memory.
    pub(super) fn admit(&mut self, new: NewRequest) {
        let mut missing = Vec::new();
        for used in &new.request.adapters {
            self.contents.touch(&used.content);
            match self.contents.get(&used.content).map(|content| content.residency) {
                Some(Residency::Host) => {}
                Some(_) => missing.push(used.content),
                None => {
                    let gone = Failure::AdapterGone(used.content.short(), "it was never prepared".into());
                    return self.deliver(new.id, GenerateEvent::Failed(gone));
                }
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
            self.prepare(dir, None, Some(content));
        }
    }

    pub(super) fn prepare(
        &mut self,
        dir: PathBuf,
        reply: Option<oneshot::Sender<Result<PreparedAdapter, AdapterFailure>>>,
        expected: Option<ContentId>,
    ) {
        self.link.next_prepare += 1;
        let id = self.link.next_prepare;
        self.preparing.insert(id, Preparing { dir, reply, expected });
        self.send_prepare(id);
    }

    /// Sends (or, to a new shard, sends again) one preparation.
    pub(super) fn send_prepare(&mut self, id: u64) {
        let Some(preparing) = self.preparing.get(&id) else { return };
        let dir = preparing.dir.to_string_lossy().into_owned();
        let message = PrepareAdapter { request_id: id, dir, rank_max: self.options.rank_max };
        self.link.send(to_shard::Body::Prepare(message));
    }

    pub(super) fn prepared(&mut self, message: Prepared) {
        let Some(preparing) = self.preparing.remove(&message.request_id) else { return };
        let outcome = match message.outcome {
            Some(prepared::Outcome::Report(report)) => read_report(report),
            Some(prepared::Outcome::Error(error)) => Err(AdapterFailure::new(error.code, error.message)),
            None => Err(malformed()),
        };
        if let Ok(prepared) = &outcome {
            let known = self.contents.get(&prepared.content);
            if known.is_some_and(|known| message.request_id <= known.dropped_after) {
                // Read before the shard was told to drop this content: it may be gone again. Ask once more.
                return self.prepare(preparing.dir, preparing.reply, preparing.expected);
            }
            let new = self.contents.packed(prepared, preparing.dir.clone());
            if let Some(scheduler) = self.scheduler.as_mut().filter(|_| new) {
                scheduler.adapter_ready(prepared.content, prepared.pages_needed);
            }
            self.keep_host_budget(prepared.content);
        }
        if let Some(expected) = preparing.expected
            && outcome.as_ref().map(|prepared| prepared.content) != Ok(expected)
        {
            if self.contents.moved_away(&expected, &preparing.dir) {
                self.bring_back(expected);
            } else {
                let reason = outcome.as_ref().err().map_or("its files changed on disk", |failure| &failure.message);
                self.content_gone(expected, reason.to_owned());
            }
        }
        if let Some(reply) = preparing.reply {
            let _ = reply.send(outcome);
        }
        self.unpark();
    }

    /// A content cannot be read again: whoever needs it fails, alone.
    fn content_gone(&mut self, content: ContentId, reason: String) {
        self.contents.set(&content, Residency::Cold);
        let failure = Failure::AdapterGone(content.short(), reason.clone());
        let uses = |parked: &Parked| parked.new.request.adapters.iter().any(|used| used.content == content);
        let (failed, parked) = std::mem::take(&mut self.parked).into_iter().partition(uses);
        self.parked = parked;
        for Parked { new } in failed {
            self.deliver(new.id, GenerateEvent::Failed(failure.clone()));
        }
        if let Some(scheduler) = &mut self.scheduler {
            scheduler.adapter_gone(content, reason);
            let events = scheduler.take_events();
            self.deliver_all(events);
        }
    }

    /// Moves every parked request whose adapters are back into the scheduler, in order of arrival.
    pub(super) fn unpark(&mut self) {
        for Parked { new } in std::mem::take(&mut self.parked) {
            self.admit(new);
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
    /// what a parked request waits for: two adapters of one request must not push each other out.
    fn keep_host_budget(&mut self, newest: ContentId) {
        let (_, mut bytes) = self.contents.host();
        if bytes <= self.options.host_adapter_bytes {
            return;
        }
        for content in self.contents.oldest_first() {
            if bytes <= self.options.host_adapter_bytes {
                break;
            }
            let wanted = |parked: &Parked| parked.new.request.adapters.iter().any(|used| used.content == content);
            if self.parked.iter().any(wanted) {
                continue;
            }
            let free = |scheduler: &mut crate::scheduler::Scheduler| scheduler.adapter_forget(content).is_ok();
            if content != newest && self.scheduler.as_mut().is_none_or(free) {
                bytes -= self.contents.get(&content).map_or(0, |known| known.host_bytes);
                self.contents.dropped(&content, self.link.next_prepare);
                self.link.send(to_shard::Body::DropAdapter(DropAdapter { content_id: content.0.to_vec() }));
            }
        }
    }
}

fn malformed() -> AdapterFailure {
    AdapterFailure::new("adapter_load_failed", "the shard's answer was malformed")
}

fn read_report(report: AdapterReport) -> Result<PreparedAdapter, AdapterFailure> {
    let content = <[u8; 32]>::try_from(report.content_id.as_slice()).map_err(|_| malformed())?;
    Ok(PreparedAdapter {
        content: ContentId(content),
        pages_needed: report.pages_needed,
        ranks: (report.rank_min, report.rank_max),
        modules: report.modules,
        base_model: report.base_model,
        host_bytes: report.host_bytes,
        rank_blocks: report.rank_blocks,
        features: Vec::new(),
    })
}
