//! The HTTP side's end of the engine: submit, prepare, watch. Nothing here waits for the device.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::task::{Context, Poll};

use tokio::sync::{mpsc, oneshot};

use super::adapters::{AdapterCheck, AdapterFailure, ForgetMode, MergeAsk, PinLevel, PinRefused, PreparedAdapter};
use super::outbox::Carrier;
use super::run::Message;
use super::status::EngineStatus;
use super::types::{ContentId, Failure, GenerateEvent, GenerateRequest};
use crate::scheduler::RequestId;

/// Told, on the engine's thread, which content is missing and what was found instead. Must not wait.
pub type MissingReport = Box<dyn Fn(ContentId, &str) + Send + Sync>;

/// What handles and the engine thread share.
pub(super) struct Shared {
    pub(super) status: RwLock<Arc<EngineStatus>>,
    /// Requests handed in and not yet admitted or ended: the bound of the inbox.
    pub(super) queued_requests: AtomicUsize,
    pub(super) queued_tokens: AtomicU64,
    pub(super) queued_requests_max: usize,
    pub(super) queued_tokens_max: AtomicU64,
    pub(super) draining: AtomicBool,
    pub(super) next_id: AtomicU64,
    pub(super) missing: OnceLock<MissingReport>,
    pub(super) carrier: Arc<Carrier>,
}

/// A cheap, cloneable way to reach the engine thread.
#[derive(Clone)]
pub struct EngineHandle {
    pub(super) shared: Arc<Shared>,
    pub(super) inbox: Sender<Message>,
}

impl EngineHandle {
    /// Hands one request over. Never waits.
    ///
    /// # Errors
    /// [`Failure::QueueFull`] and [`Failure::Draining`] at once; what the scheduler finds later comes as
    /// [`GenerateEvent::Failed`], always before [`GenerateEvent::Admitted`].
    pub fn submit(&self, request: GenerateRequest) -> Result<Generation, Failure> {
        let shared = &self.shared;
        if shared.draining.load(Ordering::Relaxed) {
            return Err(Failure::Draining);
        }
        let tokens = queue_tokens(&request);
        let waiting = shared.queued_requests.fetch_add(1, Ordering::Relaxed);
        let waiting_tokens = shared.queued_tokens.fetch_add(tokens, Ordering::Relaxed);
        let limit = shared.queued_requests_max;
        if waiting >= limit
            || (waiting > 0 && waiting_tokens + tokens > shared.queued_tokens_max.load(Ordering::Relaxed))
        {
            shared.queued_requests.fetch_sub(1, Ordering::Relaxed);
            shared.queued_tokens.fetch_sub(tokens, Ordering::Relaxed);
            return Err(Failure::QueueFull { waiting, limit });
        }
        let id = RequestId(shared.next_id.fetch_add(1, Ordering::Relaxed));
        // Bounded by what was asked for: n * max_tokens events and a few; a reader that stalls is the HTTP side's to cut.
        let (events, receiver) = mpsc::unbounded_channel();
        self.inbox.send(Message::Submit { id, request: Box::new(request), events }).map_err(|_| Failure::Draining)?;
        Ok(Generation { id, events: receiver, inbox: self.inbox.clone(), ended: false })
    }

    /// Has the shard read, validate and pack one adapter directory into its host memory. Runs beside the steps.
    ///
    /// # Errors
    /// [`AdapterFailure`] with the exact reason; `adapter_load_failed` when no shard could answer.
    pub async fn prepare_adapter(&self, dir: PathBuf) -> Result<PreparedAdapter, AdapterFailure> {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Message::Prepare { dir, reply }).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Has the shard read and validate one adapter directory and say everything it finds. Nothing is kept.
    ///
    /// # Errors
    /// [`AdapterFailure`] only when no shard could answer: a bad adapter is a check that is not ok.
    pub async fn check_adapter(&self, dir: PathBuf) -> Result<AdapterCheck, AdapterFailure> {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Message::Check { dir, reply }).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Has the shard merge several adapters into a new directory.
    ///
    /// # Errors
    /// [`AdapterFailure`] with the exact reason; then nothing was written under the names of an adapter's files.
    pub async fn merge_adapters(&self, ask: MergeAsk) -> Result<(), AdapterFailure> {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Message::Merge { ask: Box::new(ask), reply }).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Pins a content, or unpins it with `None`. A cold one is read first. Answers when the pin is decided; the upload of a
    /// device pin may come a moment later, and comes again after a shard's death.
    ///
    /// # Errors
    /// [`PinRefused`]; nothing changed.
    pub async fn pin_adapter(&self, content: ContentId, level: Option<PinLevel>) -> Result<(), PinRefused> {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Message::Pin { content, level, reply }).map_err(|_| PinRefused::Draining)?;
        answer.await.map_err(|_| PinRefused::Draining)?
    }

    /// No new request may use the content, and its memory on device and host is given back: once its requests ended, or by
    /// ending them. It is unknown then, until it is prepared again. Its files must stay until it has left
    /// [`EngineStatus::contents`]: running requests may need them after a shard's death.
    pub fn forget_adapter(&self, content: ContentId, mode: ForgetMode) {
        // Fails only when the engine has ended, and with it everything that could be forgotten.
        let _ = self.inbox.send(Message::Forget { content, mode });
    }

    /// A request for the content is expected: brings it back into host memory, and to the device if pages are free.
    pub fn prefetch_adapter(&self, content: ContentId) {
        let _ = self.inbox.send(Message::Prefetch { content });
    }

    /// Empties the prefix cache: the next prompts are computed from their beginning. Running requests go on.
    pub fn forget_prefixes(&self) {
        let _ = self.inbox.send(Message::ForgetPrefixes);
    }

    /// From now on `report` is told of contents that are needed and no directory holds any more. Who needs one waits, within
    /// its deadline, until it is prepared again or [`Self::give_up_adapter`] says that it will not be. Without a report they
    /// fail at once. Only the first call counts.
    pub fn on_missing(&self, report: MissingReport) {
        let _ = self.shared.missing.set(report);
    }

    /// From now on a task of the current tokio runtime passes events on to their readers, so that the engine's thread wakes
    /// one task for each step and not one for each stream. The runtime should outlive the readers. Only the first call
    /// counts.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn carry_events_here(&self) {
        self.shared.carrier.start();
    }

    /// A content that was reported missing does not come back: who needs it fails.
    pub fn give_up_adapter(&self, content: ContentId, reason: String) {
        let _ = self.inbox.send(Message::GiveUp { content, reason });
    }

    /// The latest snapshot.
    pub fn status(&self) -> Arc<EngineStatus> {
        Arc::clone(&self.shared.status.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on [`Self::submit`] answers [`Failure::Draining`]; what runs goes on.
    pub fn begin_drain(&self) {
        self.shared.draining.store(true, Ordering::Relaxed);
        let _ = self.inbox.send(Message::Wake);
    }

    /// Fails everything that still runs and ends the shard and the thread.
    pub fn shut_down(&self) {
        self.begin_drain();
        let _ = self.inbox.send(Message::ShutDown);
    }
}

fn gone() -> AdapterFailure {
    AdapterFailure::new("adapter_load_failed", "service unavailable: the server is shutting down")
}

/// What a request adds to the queue's token bound.
pub(super) fn queue_tokens(request: &GenerateRequest) -> u64 {
    request.prompt.len() as u64 * u64::from(request.n.max(1))
}

/// The events of one request. Dropping it cancels what is not finished: the memory is free within one step.
pub struct Generation {
    id: RequestId,
    events: mpsc::UnboundedReceiver<GenerateEvent>,
    inbox: Sender<Message>,
    ended: bool,
}

impl Generation {
    /// The next event; `None` after the last.
    pub async fn recv(&mut self) -> Option<GenerateEvent> {
        std::future::poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// [`Self::recv`] for those who poll themselves.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<GenerateEvent>> {
        let polled = self.events.poll_recv(cx);
        self.ended |= matches!(polled, Poll::Ready(None));
        polled
    }

    /// Events that wait to be read.
    pub fn backlog(&self) -> usize {
        self.events.len()
    }

    /// Ends one sequence from this side: its stop string was found. No further event of it matters.
    pub fn finish(&mut self, index: u32) {
        let _ = self.inbox.send(Message::FinishSequence { id: self.id, index });
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.inbox.send(Message::Cancel { id: self.id });
        }
    }
}
