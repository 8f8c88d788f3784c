//! The engine's link to its shard: launch, steps in flight, heart-beat, watchdog, and what happens when it dies.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use loramux_proto::{FromShard, Info, Ping, Shutdown, Step, StepResult, ToShard, from_shard, to_shard};

use super::adapters::AdapterFailure;
use super::run::{Engine, EngineError};
use super::shard::{Reports, Shard, ShardExit};
use crate::metrics::StepKind;
use crate::scheduler::{Scheduler, SchedulerLimits};

/// Silence longer than this means not ready.
const HEARTBEAT_MAX: Duration = Duration::from_secs(2);
const PING_EVERY: Duration = Duration::from_millis(500);
/// Restarts in a row without one finished step after which the process gives up.
const RESTARTS_MAX: u32 = 5;
/// A shard that was up for this long, even without work, was healthy: what ends it is a new story.
const SETTLED_AFTER: Duration = Duration::from_secs(10);
/// Blame of the sequences in flight (see `Scheduler::shard_lost`).
const BLAME_CRASH: u32 = 2;
const BLAME_KILLED: u32 = 1;

/// A step whose result is awaited.
pub(super) struct InFlight {
    id: u64,
    /// When the shard could begin with it: it was sent, and the one before was done.
    since: Instant,
    positions: u64,
    kind: StepKind,
}

/// The current shard, if any.
pub(super) struct Link {
    pub(super) incarnation: u64,
    shard: Option<Box<dyn Shard>>,
    /// It told its limits and takes steps.
    up: bool,
    /// Oldest first, in which order the shard executes them.
    pub(super) in_flight: VecDeque<InFlight>,
    heard: Instant,
    pinged: Instant,
    restarts: u32,
    /// When the current shard became ready.
    up_since: Instant,
}

impl Default for Link {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            incarnation: 0,
            shard: None,
            up: false,
            in_flight: VecDeque::new(),
            heard: now,
            pinged: now,
            restarts: 0,
            up_since: now,
        }
    }
}

impl Link {
    /// Sends if the shard is up. A failed send is not handled here: the shard's end is reported by its launcher.
    pub(super) fn send(&mut self, body: to_shard::Body) {
        if let Some(shard) = self.shard.as_mut().filter(|_| self.up) {
            let _ = shard.send(ToShard { body: Some(body) });
        }
    }

    /// The shard takes steps; how many at a time is the scheduler's to know.
    pub(super) fn can_step(&self) -> bool {
        self.up
    }

    pub(super) fn send_step(&mut self, step: Step) {
        let positions = step.chunks.iter().map(|chunk| u64::from(chunk.len)).sum();
        let kind = StepKind::of(step.chunks.iter().map(|chunk| chunk.len));
        self.in_flight.push_back(InFlight { id: step.id, since: Instant::now(), positions, kind });
        self.send(to_shard::Body::Step(step));
    }

    /// Takes the step out of flight if it is the one whose result is due; the next one's time begins.
    fn step_done(&mut self, id: u64) -> Option<InFlight> {
        let done = self.in_flight.pop_front_if(|step| step.id == id)?;
        if let Some(next) = self.in_flight.front_mut() {
            next.since = Instant::now();
        }
        Some(done)
    }

    /// Up, and heard of lately.
    pub(super) fn is_healthy(&self) -> bool {
        self.up && self.heard.elapsed() < HEARTBEAT_MAX
    }

    pub(super) fn end(&mut self) {
        self.send(to_shard::Body::Shutdown(Shutdown {}));
        if let Some(mut shard) = self.shard.take() {
            shard.kill();
        }
        self.up = false;
    }
}

impl Engine {
    pub(super) fn launch(&mut self) -> Result<(), EngineError> {
        self.link.incarnation += 1;
        self.link.heard = Instant::now();
        let reports = Reports { incarnation: self.link.incarnation, inbox: self.inbox_sender.clone() };
        let shard = self.launcher.launch(reports).map_err(EngineError::Start)?;
        self.link.shard = Some(shard);
        Ok(())
    }

    pub(super) fn report(&mut self, message: FromShard) -> Result<(), EngineError> {
        self.link.heard = Instant::now();
        match message.body {
            Some(from_shard::Body::Loading(loading)) => (self.options.progress)(&loading),
            Some(from_shard::Body::Info(info)) => self.shard_up(info)?,
            Some(from_shard::Body::Prepared(prepared)) => self.prepared(prepared),
            Some(from_shard::Body::Step(result)) => self.step_done(result),
            Some(from_shard::Body::Fatal(fatal)) => {
                // It exits now; what it said is the reason people should read.
                if let Some(mut shard) = self.link.shard.take() {
                    shard.kill();
                }
                self.lost(&ShardExit { reason: fatal.message, killed_from_outside: false })?;
            }
            Some(from_shard::Body::Merged(merged)) => self.merged(merged),
            Some(from_shard::Body::Pong(_)) | None => {}
        }
        Ok(())
    }

    fn step_done(&mut self, result: StepResult) {
        let Some(in_flight) = self.link.step_done(result.id) else { return };
        self.link.restarts = 0;
        self.counters.steps += 1;
        self.counters.step_tokens += in_flight.positions;
        self.counters.step_us += result.compute_us;
        self.last_step = Duration::from_micros(result.compute_us);
        self.meters.step(in_flight.kind, in_flight.positions, self.last_step);
        let now_ms = self.now_ms();
        if let Some(scheduler) = &mut self.scheduler {
            let events = scheduler.commit(now_ms, result);
            self.deliver_all(events);
        }
    }

    fn shard_up(&mut self, info: Info) -> Result<(), EngineError> {
        let geometry = |i: &Info| (i.pages_total, i.page_bytes, i.blocks_per_page, i.block_tokens, i.vocab_size);
        if self.scheduler.is_none() {
            let limits = self.limits(&info);
            let arena_tokens =
                u64::from(info.pages_total) * u64::from(info.blocks_per_page) * u64::from(info.block_tokens);
            if self.options.queued_tokens_max.is_none() {
                let bound = arena_tokens.saturating_mul(4);
                self.shared.queued_tokens_max.store(bound, std::sync::atomic::Ordering::Relaxed);
            }
            self.scheduler = Some(Scheduler::new(limits));
        } else if geometry(&self.info) != geometry(&info) {
            let last = format!("its memory plan changed: {:?}, before {:?}", geometry(&info), geometry(&self.info));
            return Err(EngineError::Restarts { restarts: self.link.restarts, last });
        }
        self.info = info;
        self.link.up = true;
        self.link.up_since = Instant::now();
        for content in self.scheduler.as_ref().map(Scheduler::contents_needed).unwrap_or_default() {
            self.bring_back(content);
        }
        for content in self.contents.wanted() {
            self.bring_back(content);
        }
        self.send_asks();
        self.unpark();
        if let Some(started) = self.started.take() {
            let _ = started.send(Ok(self.info.clone()));
        }
        Ok(())
    }

    fn limits(&self, info: &Info) -> SchedulerLimits {
        SchedulerLimits {
            pages_total: info.pages_total,
            blocks_per_page: info.blocks_per_page,
            block_tokens: info.block_tokens,
            slots_max: info.slots_max,
            step_tokens: self.options.step_tokens.min(info.step_tokens_max),
            prefill_tokens_beside: match info.prefill_tokens_beside {
                0 => info.step_tokens_max,
                tokens => tokens,
            },
            running_max: self.options.running_max.min(info.seqs_max),
            // The handle counts requests before they get here and refuses; these only back it up.
            queued_requests_max: self.options.queued_requests_max.saturating_mul(2),
            queued_tokens_max: u64::MAX,
            context_tokens: info.context_tokens,
            pipeline_depth: info.pipeline_depth,
            prefix_caching: self.options.prefix_caching,
            prefix_key: self.options.prefix_key,
        }
    }

    /// Heart-beat and step watchdog.
    ///
    /// A shard answers pings on a thread of its own, so silence means hung while it loads as well as later.
    pub(super) fn watch(&mut self) -> Result<(), EngineError> {
        let Some(shard) = &mut self.link.shard else { return Ok(()) };
        if self.link.pinged.elapsed() >= PING_EVERY {
            self.link.pinged = Instant::now();
            let ping = to_shard::Body::Ping(Ping { nonce: self.link.incarnation });
            let _ = shard.send(ToShard { body: Some(ping) });
        }
        let limit = self.options.step_watchdog;
        let hung = self.link.in_flight.front().is_some_and(|step| step.since.elapsed() > limit);
        let silent = self.link.heard.elapsed() > limit;
        if hung || silent {
            if let Some(mut shard) = self.link.shard.take() {
                shard.kill();
            }
            let what = if hung { "a step took" } else { "it was silent for" };
            let reason = format!("{what} longer than {} s (--step-watchdog)", limit.as_secs_f32());
            self.lost(&ShardExit { reason, killed_from_outside: false })?;
        }
        Ok(())
    }

    /// The shard died. Running requests keep their tokens and go on on the next one.
    pub(super) fn lost(&mut self, exit: &ShardExit) -> Result<(), EngineError> {
        if self.link.up && self.link.up_since.elapsed() > SETTLED_AFTER {
            self.link.restarts = 0;
        }
        self.link.up = false;
        self.link.in_flight.clear();
        if let Some(mut shard) = self.link.shard.take() {
            shard.kill();
        }
        let Some(scheduler) = &mut self.scheduler else {
            return Err(EngineError::Start(exit.reason.clone()));
        };
        self.link.restarts += 1;
        self.counters.shard_restarts += 1;
        let running = scheduler.stats().running;
        self.counters.replayed += u64::from(running);
        tracing::warn!(reason = exit.reason, running, "the shard died; its requests go on on a new one");
        if self.link.restarts > RESTARTS_MAX {
            return Err(EngineError::Restarts { restarts: self.link.restarts, last: exit.reason.clone() });
        }
        scheduler.shard_lost(if exit.killed_from_outside { BLAME_KILLED } else { BLAME_CRASH });
        let events = scheduler.take_events();
        self.contents.all_cold();
        self.note_lost_pins();
        for ask in self.asks.shard_lost() {
            ask.fail(AdapterFailure::new(
                "adapter_load_failed",
                "the model process died each time these files were read",
            ));
        }
        self.deliver_all(events);
        self.launch()
    }
}
