//! `/metrics`: counters and histograms of the HTTP side beside the engine's own numbers, in Prometheus text 0.0.4.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod adapters;
mod engine;
mod histogram;
mod loads;
mod lorax;
mod recent;
mod render;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use adapters::AdapterMetrics;
#[cfg(test)]
use adapters::LABELS_MAX as ADAPTER_LABELS_MAX;
pub(crate) use adapters::OTHER;
use adapters::{AdapterCount, AdapterCounters};
pub use engine::EngineMeters;
pub(crate) use engine::StepKind;
use histogram::Histogram;
pub use loads::{LoadPhase, LoadTimes};
pub(crate) use recent::{Counts, Times};
pub use render::Snapshot;

use crate::http::Meter;
use crate::observe::{RequestRecord, RunTimes, SharedTimes, times_of};

const LATENCY: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const PER_TOKEN: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0, 200_000.0,
];
const SMALL_COUNTS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// Why a request ended, as the label of `vllm:request_success_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finished {
    /// End token or stop string.
    Stop,
    /// `max_tokens`.
    Length,
    /// The client left, or the request failed.
    Abort,
}

impl Finished {
    const ALL: [Self; 3] = [Self::Stop, Self::Length, Self::Abort];

    fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }
}

/// Everything the HTTP side counts.
#[derive(Debug)]
pub struct Metrics {
    first_token: Histogram,
    inter_token: Histogram,
    per_output_token: Histogram,
    end_to_end: Histogram,
    validation: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    params_n: Histogram,
    params_max_tokens: Histogram,
    finished: [AtomicU64; 3],
    stream_stalls: AtomicU64,
    rejected: Mutex<BTreeMap<&'static str, u64>>,
    /// Requests held to a rule, by the kind of rule.
    structured: Mutex<BTreeMap<&'static str, u64>>,
    /// Chats with tools, by `tool_choice`.
    tools: Mutex<BTreeMap<&'static str, u64>>,
    adapters: Mutex<AdapterCounters>,
    rendered: Mutex<Option<(Instant, String)>>,
    lora: Mutex<render::LoraSets>,
    /// As `first_token` and `inter_token`, finer.
    pub(crate) recent_first_token: Times,
    pub(crate) recent_inter_token: Times,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            first_token: Histogram::new(FIRST_TOKEN),
            inter_token: Histogram::new(PER_TOKEN),
            per_output_token: Histogram::new(PER_TOKEN),
            end_to_end: Histogram::new(LATENCY),
            validation: Histogram::new(FIRST_TOKEN),
            queue: Histogram::new(LATENCY),
            inference: Histogram::new(LATENCY),
            prefill: Histogram::new(LATENCY),
            decode: Histogram::new(LATENCY),
            prompt_tokens: Histogram::new(TOKENS),
            generation_tokens: Histogram::new(TOKENS),
            params_n: Histogram::new(SMALL_COUNTS),
            params_max_tokens: Histogram::new(TOKENS),
            finished: Default::default(),
            stream_stalls: AtomicU64::new(0),
            rejected: Mutex::default(),
            structured: Mutex::default(),
            tools: Mutex::default(),
            adapters: Mutex::default(),
            rendered: Mutex::default(),
            lora: Mutex::default(),
            recent_first_token: Times::default(),
            recent_inter_token: Times::default(),
        }
    }
}

impl Metrics {
    /// Counts by adapter as `level` says; `names` have labels from the start.
    pub fn new(level: AdapterMetrics, names: &[String]) -> Self {
        Self { adapters: Mutex::new(AdapterCounters::new(level, names)), ..Self::default() }
    }

    /// A reply is held to a rule of this kind.
    pub(crate) fn structured(&self, kind: &'static str) {
        *self.structured.lock().unwrap_or_else(PoisonError::into_inner).entry(kind).or_default() += 1;
    }

    /// A chat has tools and this `tool_choice`.
    pub(crate) fn tools(&self, choice: &'static str) {
        *self.tools.lock().unwrap_or_else(PoisonError::into_inner).entry(choice).or_default() += 1;
    }

    /// A request was answered with error `code` (a stable code of the API).
    pub fn rejected(&self, code: &'static str) {
        *self.rejected.lock().unwrap_or_else(PoisonError::into_inner).entry(code).or_default() += 1;
    }

    /// A stream was cut because its client stopped reading.
    pub fn stream_stalled(&self) {
        self.stream_stalls.fetch_add(1, Ordering::Relaxed);
    }

    /// A clock for one request that goes to the engine. `adapter` is its label, `None` for the base model.
    pub fn request(self: &Arc<Self>, start: &RequestStart) -> RequestClock {
        self.params_n.observe(f64::from(start.n));
        self.params_max_tokens.observe(f64::from(start.max_tokens));
        self.prompt_tokens.observe(f64::from(start.prompt_tokens));
        let adapter = start.adapter.as_deref().and_then(|name| self.adapters().index(name));
        if let Some(adapter) = adapter {
            self.with_adapter(adapter, |count| count.prompt_tokens += u64::from(start.prompt_tokens));
        }
        if let Some(meter) = &start.meter {
            meter.charge_tokens(u64::from(start.prompt_tokens));
        }
        let times = Arc::new(Mutex::new(RunTimes::new(start.prompt_tokens)));
        if let Some(record) = &start.record {
            self.validation.observe(seconds(record.started.elapsed()));
            record.runs(&times, start.adapter.as_deref());
        }
        RequestClock {
            metrics: Arc::clone(self),
            adapter,
            meter: start.meter.clone(),
            times,
            last_tokens: vec![None; start.n as usize],
            ended: Finished::Abort,
        }
    }

    fn adapters(&self) -> MutexGuard<'_, AdapterCounters> {
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_adapter(&self, index: usize, change: impl FnOnce(&mut AdapterCount)) {
        if let Some(count) = self.adapters().counts.get_mut(index) {
            change(count);
        }
    }
}

/// What is known of a request when it is handed to the engine.
#[derive(Clone, Debug)]
pub struct RequestStart {
    /// Sequences.
    pub n: u32,
    /// Tokens each may generate.
    pub max_tokens: u32,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Name of its adapter.
    pub adapter: Option<String>,
    /// Where its tokens are charged.
    pub meter: Option<Arc<Meter>>,
    /// The record of the request that it belongs to.
    pub(crate) record: Option<Arc<RequestRecord>>,
}

/// Times one request; when it is dropped, the request is over.
#[derive(Debug)]
pub struct RequestClock {
    metrics: Arc<Metrics>,
    adapter: Option<usize>,
    meter: Option<Arc<Meter>>,
    times: SharedTimes,
    last_tokens: Vec<Option<Instant>>,
    ended: Finished,
}

impl RequestClock {
    /// The engine admitted it; `cached_tokens` of its prompt were computed before.
    pub fn admitted(&mut self, cached_tokens: u32) {
        let now = Instant::now();
        let mut times = times_of(&self.times);
        self.metrics.queue.observe(seconds(now - times.submitted));
        (times.admitted, times.cached_tokens) = (Some(now), cached_tokens);
    }

    /// Sequence `index` got a token.
    pub fn token(&mut self, index: u32) {
        let now = Instant::now();
        if let Some(meter) = &self.meter {
            meter.charge_tokens(1);
        }
        let mut times = times_of(&self.times);
        times.tokens += 1;
        times.last_token = Some(now);
        if times.first_token.is_none() {
            times.first_token = Some(now);
            self.metrics.first_token.observe(seconds(now - times.submitted));
            self.metrics.recent_first_token.observe(seconds(now - times.submitted));
        }
        drop(times);
        if let Some(last) = self.last_tokens.get_mut(index as usize)
            && let Some(before) = last.replace(now)
        {
            self.metrics.inter_token.observe(seconds(now - before));
            self.metrics.recent_inter_token.observe(seconds(now - before));
        }
    }

    /// When the engine admitted it.
    pub fn admitted_at(&self) -> Option<Instant> {
        times_of(&self.times).admitted
    }

    /// When its first token came.
    pub fn first_token_at(&self) -> Option<Instant> {
        times_of(&self.times).first_token
    }

    /// It ended well; without this call it counts as aborted.
    pub fn finished(&mut self, how: Finished) {
        self.ended = how;
        times_of(&self.times).ended = Some(Instant::now());
    }

    /// It failed with error `code`.
    pub(crate) fn failed(&mut self, code: &'static str) {
        let mut times = times_of(&self.times);
        (times.failed, times.ended) = (Some(code), Some(Instant::now()));
    }
}

impl Drop for RequestClock {
    fn drop(&mut self) {
        let (metrics, now, times) = (&self.metrics, Instant::now(), *times_of(&self.times));
        let slot = Finished::ALL.iter().position(|how| *how == self.ended).unwrap_or(0);
        if let Some(counter) = metrics.finished.get(slot) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        let since = |moment: Option<Instant>| moment.map(|moment| seconds(moment - times.submitted));
        if let Some(adapter) = self.adapter {
            let outcome = if self.ended == Finished::Abort { "error" } else { "ok" };
            metrics.with_adapter(adapter, |count| {
                *count.outcomes.entry(outcome).or_default() += 1;
                count.generation_tokens += u64::from(times.tokens);
            });
            metrics.adapters().observe(adapter, since(times.admitted), since(times.first_token));
        }
        let (Some(admitted), true) = (times.admitted, self.ended != Finished::Abort) else { return };
        metrics.end_to_end.observe(seconds(now - times.submitted));
        metrics.inference.observe(seconds(now - admitted));
        metrics.generation_tokens.observe(f64::from(times.tokens));
        if let Some(first) = times.first_token {
            metrics.prefill.observe(seconds(first - admitted));
            metrics.decode.observe(seconds(now - first));
            if times.tokens > 1 {
                metrics.per_output_token.observe(seconds(now - first) / f64::from(times.tokens - 1));
            }
        }
    }
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}
