//! The engine thread: its loop, its messages, its clients.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use loramux_proto::{FromShard, Info, Loading};
use tokio::sync::mpsc::UnboundedSender;

use super::adapters::{AdapterCheck, ForgetMode, MergeAsk, PinLevel, PreparedAdapter};
use super::asks::{Ask, Asks, Reply};
use super::contents::{Contents, PinReply};
use super::handle::{EngineHandle, Shared, queue_tokens};
use super::masks::{self, Masks};
use super::outbox::Outbox;
use super::prepare::Parked;
use super::shard::{ShardExit, ShardLauncher};
use super::status::{ContentsView, EngineCounters, EngineStatus};
use super::supervise::Link;
use super::types::{ContentId, Failure, GenerateEvent, GenerateRequest};
use crate::metrics::EngineMeters;
use crate::scheduler::{NewRequest, RequestId, Scheduler, SchedulerEvent};

/// How often the snapshot is renewed while steps run.
pub(super) const PUBLISH_EVERY: Duration = Duration::from_millis(50);
/// The loop looks at clocks at least this often.
const TICK_MAX: Duration = Duration::from_millis(250);

/// What the engine is told. Every sender is bounded by something else: requests by the queue limit, reports by the
/// steps in flight and the preparations asked for.
pub(super) enum Message {
    Submit { id: RequestId, request: Box<GenerateRequest>, events: UnboundedSender<GenerateEvent> },
    FinishSequence { id: RequestId, index: u32 },
    Cancel { id: RequestId },
    Prepare { dir: PathBuf, reply: Reply<PreparedAdapter> },
    Check { dir: PathBuf, reply: Reply<AdapterCheck> },
    Merge { ask: Box<MergeAsk>, reply: Reply<()> },
    Pin { content: ContentId, level: Option<PinLevel>, reply: PinReply },
    Forget { content: ContentId, mode: ForgetMode },
    Prefetch { content: ContentId },
    ForgetPrefixes,
    GiveUp { content: ContentId, reason: String },
    Wake,
    ShutDown,
    Shard { incarnation: u64, message: Box<FromShard> },
    ShardGone { incarnation: u64, exit: ShardExit },
    Masked(Box<masks::Answer>),
}

/// Settings of the engine.
pub struct EngineOptions {
    /// Requests that may wait (429 beyond).
    pub queued_requests_max: usize,
    /// Prompt tokens that may wait; `None` = four times what the arena holds.
    pub queued_tokens_max: Option<u64>,
    /// Sequences in one step.
    pub running_max: u32,
    /// Token positions in one step.
    pub step_tokens: u32,
    /// Keep KV of finished prompts for the same tenant's next request.
    pub prefix_caching: bool,
    /// Key of the prefix cache's hashes: random per process.
    pub prefix_key: [u8; 32],
    /// Bytes of adapters the shard may keep in host memory.
    pub host_adapter_bytes: u64,
    /// Admission limit on the rank.
    pub rank_max: u32,
    /// A step that takes longer means a hung shard: it is killed and replaced.
    pub step_watchdog: Duration,
    /// Told about the progress of loading the base weights.
    pub progress: Box<dyn Fn(&Loading) + Send>,
}

/// Why the engine thread ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// The first shard never became ready: a wrong model path, too little memory.
    #[error("{0}")]
    Start(String),
    /// Restarting does not help.
    #[error("the shard died {restarts} times in a row without finishing a step; last: {last}")]
    Restarts {
        /// How many.
        restarts: u32,
        /// The last reason.
        last: String,
    },
}

/// Resolves once the first shard is ready, or cannot be.
pub type Started = Receiver<Result<Info, EngineError>>;

/// The engine's handle, what it says once, and its thread.
pub type Spawned = (EngineHandle, Started, JoinHandle<Result<(), EngineError>>);

/// One request's reader.
pub(super) struct Client {
    events: UnboundedSender<GenerateEvent>,
    /// What it still adds to the queue's bounds; taken when it is admitted or ends.
    queued_tokens: Option<u64>,
    prompt_tokens: u64,
    /// Sequences that have not ended, by index.
    open: Vec<bool>,
}

impl Client {
    pub(super) fn is_open(&self, index: u32) -> bool {
        self.open.get(index as usize).copied().unwrap_or(false)
    }
}

pub(super) struct Engine {
    pub(super) inbox: Receiver<Message>,
    pub(super) inbox_sender: Sender<Message>,
    pub(super) shared: Arc<Shared>,
    pub(super) options: EngineOptions,
    pub(super) launcher: Box<dyn ShardLauncher>,
    pub(super) started: Option<Sender<Result<Info, EngineError>>>,
    pub(super) link: Link,
    pub(super) info: Info,
    /// None until the first shard told its limits.
    pub(super) scheduler: Option<Scheduler>,
    pub(super) clients: HashMap<RequestId, Client>,
    pub(super) contents: Contents,
    pub(super) parked: Vec<Parked>,
    pub(super) asks: Asks,
    pub(super) masks: Masks,
    pub(super) outbox: Outbox,
    /// What the shard took for its last step.
    pub(super) last_step: Duration,
    contents_view: ContentsView,
    pub(super) counters: EngineCounters,
    pub(super) meters: Arc<EngineMeters>,
    pub(super) epoch: Instant,
    published: Instant,
}

/// Starts the thread and the first shard.
///
/// # Errors
/// [`std::io::Error`] if no thread can be started.
pub fn spawn(launcher: Box<dyn ShardLauncher>, options: EngineOptions) -> std::io::Result<Spawned> {
    let (inbox_sender, inbox) = mpsc::channel();
    let (started_sender, started) = mpsc::channel();
    let shared = Arc::new(Shared {
        status: RwLock::new(Arc::new(EngineStatus::default())),
        queued_requests: AtomicUsize::new(0),
        queued_tokens: AtomicU64::new(0),
        queued_requests_max: options.queued_requests_max,
        queued_tokens_max: AtomicU64::new(options.queued_tokens_max.unwrap_or(u64::MAX)),
        draining: AtomicBool::new(false),
        next_id: AtomicU64::new(1),
        missing: std::sync::OnceLock::new(),
        carrier: Arc::default(),
    });
    let handle = EngineHandle { shared: Arc::clone(&shared), inbox: inbox_sender.clone() };
    let (now, meters) = (Instant::now(), Arc::<EngineMeters>::default());
    let engine = Engine {
        inbox,
        masks: Masks::new(inbox_sender.clone(), Arc::clone(&meters)),
        outbox: Outbox::new(Arc::clone(&shared.carrier)),
        last_step: Duration::ZERO,
        inbox_sender,
        shared,
        options,
        launcher,
        started: Some(started_sender),
        link: Link::default(),
        info: Info::default(),
        scheduler: None,
        clients: HashMap::new(),
        contents: Contents::default(),
        parked: Vec::new(),
        asks: Asks::default(),
        contents_view: ContentsView::default(),
        counters: EngineCounters::default(),
        meters,
        epoch: now,
        published: now,
    };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || engine.run())?;
    Ok((handle, started, thread))
}

impl Engine {
    fn run(mut self) -> Result<(), EngineError> {
        let ended = self.run_until_told();
        self.shared.draining.store(true, Ordering::Relaxed);
        for (_, client) in self.clients.drain() {
            self.outbox.push(&client.events, GenerateEvent::Failed(Failure::Draining));
        }
        self.outbox.send();
        self.link.end();
        self.publish();
        if let (Err(error), Some(started)) = (&ended, self.started.take()) {
            let _ = started.send(Err(error.clone()));
        }
        ended
    }

    fn run_until_told(&mut self) -> Result<(), EngineError> {
        self.launch()?;
        loop {
            match self.inbox.recv_timeout(self.wait()) {
                Ok(message) => {
                    if !self.handle(message)? {
                        return Ok(());
                    }
                    while let Ok(message) = self.inbox.try_recv() {
                        if !self.handle(message)? {
                            return Ok(());
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            self.watch()?;
            self.expire_parked();
            self.watch_masks();
            if !self.wait_for_masks()? {
                return Ok(());
            }
            self.step();
            self.outbox.send(); // behind the step: the shard works while the events travel
            self.settle_drains();
            if self.published.elapsed() >= PUBLISH_EVERY || self.link.in_flight.is_empty() {
                self.publish();
            }
        }
    }

    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn wait(&self) -> Duration {
        let deadline = self.scheduler.as_ref().and_then(Scheduler::next_deadline_ms);
        let until = deadline.map_or(TICK_MAX, |at| Duration::from_millis(at.saturating_sub(self.now_ms())));
        let most = if self.masks.are_out() { masks::LOOK_EVERY } else { TICK_MAX };
        until.clamp(Duration::from_millis(1), most)
    }

    /// False when the thread should end.
    pub(super) fn handle(&mut self, message: Message) -> Result<bool, EngineError> {
        match message {
            Message::Submit { id, request, events } => self.submit(id, *request, events),
            Message::FinishSequence { id, index } => {
                if let Some(scheduler) = &mut self.scheduler {
                    scheduler.finish_sequence(id, index);
                }
                self.sequence_ended(id, index);
            }
            Message::Cancel { id } => {
                if let Some(scheduler) = &mut self.scheduler {
                    scheduler.cancel(id);
                }
                self.parked.retain(|parked| parked.new.id != id);
                self.client_ended(id);
            }
            Message::Prepare { dir, reply } => self.ask(Ask::Prepare { dir, reply: Some(reply), expected: None }),
            Message::Check { dir, reply } => self.ask(Ask::Check { dir, reply }),
            Message::Merge { ask, reply } => self.ask(Ask::Merge { ask: *ask, reply }),
            Message::Pin { content, level, reply } => self.pin(content, level, reply),
            Message::Forget { content, mode } => self.forget(content, mode),
            Message::Prefetch { content } => self.prefetch(content),
            Message::GiveUp { content, reason } => self.give_up(content, &reason),
            Message::ForgetPrefixes => self.forget_prefixes(),
            Message::Masked(answer) => self.masked(*answer),
            Message::Wake => {}
            Message::ShutDown => return Ok(false),
            Message::Shard { incarnation, message } if incarnation == self.link.incarnation => self.report(*message)?,
            Message::ShardGone { incarnation, exit } if incarnation == self.link.incarnation => self.lost(&exit)?,
            Message::Shard { .. } | Message::ShardGone { .. } => {} // of a shard that was replaced
        }
        Ok(true)
    }

    fn submit(&mut self, id: RequestId, request: GenerateRequest, events: UnboundedSender<GenerateEvent>) {
        let client = Client {
            events,
            queued_tokens: Some(queue_tokens(&request)),
            prompt_tokens: request.prompt.len() as u64,
            open: vec![true; request.n as usize],
        };
        self.clients.insert(id, client);
        let deadline_at_ms = request.deadline_ms.map(|ms| self.now_ms().saturating_add(ms));
        self.admit(NewRequest { id, request, deadline_at_ms });
    }

    /// Hands a request whose adapters are all in host memory to the scheduler.
    pub(super) fn schedule(&mut self, new: NewRequest) {
        let (id, now_ms) = (new.id, self.now_ms());
        let Some(scheduler) = &mut self.scheduler else { return };
        if let Err(failure) = scheduler.submit(now_ms, new) {
            self.deliver(id, GenerateEvent::Failed(failure));
        }
    }

    fn step(&mut self) {
        let now_ms = self.now_ms();
        if let Some(scheduler) = &mut self.scheduler {
            scheduler.expire(now_ms); // deadlines go on while no shard takes steps
            while self.link.can_step()
                && let Some(step) = scheduler.plan(now_ms)
            {
                self.link.send_step(step);
            }
            let events = scheduler.take_events();
            self.deliver_all(events);
            self.send_mask_asks();
        }
    }

    pub(super) fn deliver_all(&mut self, events: Vec<SchedulerEvent>) {
        for SchedulerEvent { request, event } in events {
            self.deliver(request, event);
        }
    }

    pub(super) fn deliver(&mut self, id: RequestId, event: GenerateEvent) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let (mut failed, mut finished) = (false, None);
        match &event {
            GenerateEvent::Admitted { .. } => {
                self.counters.prompt_tokens += client.prompt_tokens;
                release_queue(&self.shared, client);
            }
            GenerateEvent::Token { .. } => self.counters.generation_tokens += 1,
            GenerateEvent::Finished { index, .. } => finished = Some(*index),
            GenerateEvent::Failed(_) => failed = true,
            GenerateEvent::PromptLogprobs { .. } | GenerateEvent::Embedding { .. } => {}
        }
        self.outbox.push(&client.events, event);
        if failed {
            self.client_ended(id);
        } else if let Some(index) = finished {
            self.sequence_ended(id, index);
        }
    }

    fn sequence_ended(&mut self, id: RequestId, index: u32) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if let Some(open) = client.open.get_mut(index as usize) {
            *open = false;
        }
        self.masks.forget(id, index);
        if client.open.iter().all(|open| !open) {
            self.client_ended(id);
        }
    }

    fn client_ended(&mut self, id: RequestId) {
        if let Some(mut client) = self.clients.remove(&id) {
            release_queue(&self.shared, &mut client);
            let sequences = if self.masks.is_empty() { 0 } else { client.open.len() as u32 };
            (0..sequences).for_each(|index| self.masks.forget(id, index));
        }
    }

    fn publish(&mut self) {
        self.published = Instant::now();
        let mut counters = self.counters;
        let mut status = EngineStatus {
            ready: self.link.is_healthy() && !self.shared.draining.load(Ordering::Relaxed),
            started: self.scheduler.is_some(),
            draining: self.shared.draining.load(Ordering::Relaxed),
            shard: self.info.clone(),
            meters: Arc::clone(&self.meters),
            ..EngineStatus::default()
        };
        (status.host_adapters, status.host_bytes) = self.contents.host();
        status.host_bytes_max = self.options.host_adapter_bytes;
        (status.contents, status.batch) = self.contents_view.get(&self.contents, &self.parked, self.scheduler.as_ref());
        if let Some(scheduler) = &self.scheduler {
            let stats = scheduler.stats();
            counters.preemptions = stats.preemptions;
            counters.wasted_positions = stats.wasted_positions;
            counters.prefix_queries = stats.prefix_queries_tokens;
            counters.prefix_hits = stats.prefix_hit_tokens;
            counters.adapter_uploads = stats.adapter_uploads;
            counters.adapter_prefetches = stats.adapter_prefetches;
            counters.adapter_upload_pages = stats.adapter_upload_pages;
            counters.adapter_evictions = stats.adapter_evictions;
            status.running = stats.running;
            status.waiting = stats.waiting + u32::try_from(self.parked.len()).unwrap_or(u32::MAX);
            status.pages_free = stats.pages_free;
            status.pages_kv = stats.pages_kv;
            status.pages_pinned = stats.pages_pinned;
            status.pages_adapters = stats.pages_adapters;
            status.blocks_used = stats.blocks_used;
            status.blocks_cached = stats.blocks_cached;
            status.blocks_total = stats.blocks_total;
            status.resident = stats.resident;
            status.waiting_for_load = stats.waiting_for_adapter;
        }
        status.counters = counters;
        *self.shared.status.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(status);
    }
}

fn release_queue(shared: &Shared, client: &mut Client) {
    if let Some(tokens) = client.queued_tokens.take() {
        shared.queued_requests.fetch_sub(1, Ordering::Relaxed);
        shared.queued_tokens.fetch_sub(tokens, Ordering::Relaxed);
    }
}
