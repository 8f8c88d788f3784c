//! `/metrics`: counters and histograms of the HTTP side beside the engine's own numbers, in Prometheus text 0.0.4.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod histogram;
mod loads;
mod recent;
mod render;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use histogram::Histogram;
pub use loads::{LoadPhase, LoadTimes};
pub(crate) use recent::{Counts, Times};
pub use render::Snapshot;

use crate::http::Meter;

/// The label of all that have none.
pub(crate) const OTHER: &str = "other";
/// Adapters that get a label of their own; the rest share `other`.
const ADAPTER_LABELS_MAX: usize = 64;
/// Bytes of these labels together: each stands on several lines, and a composition's label names all its parts.
const ADAPTER_LABEL_BYTES_MAX: usize = 1536;

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
    adapters: Mutex<AdapterCounters>,
    rendered: Mutex<Option<(Instant, String)>>,
    lora: Mutex<render::LoraSets>,
    /// As `first_token` and `inter_token`, finer.
    pub(crate) recent_first_token: Times,
    pub(crate) recent_inter_token: Times,
}

#[derive(Debug, Default)]
struct AdapterCounters {
    labels: HashMap<String, usize>,
    label_bytes: usize,
    /// `[0]` is `other`.
    counts: Vec<AdapterCount>,
}

#[derive(Clone, Debug, Default)]
struct AdapterCount {
    label: String,
    outcomes: BTreeMap<&'static str, u64>,
    prompt_tokens: u64,
    generation_tokens: u64,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            first_token: Histogram::new(FIRST_TOKEN),
            inter_token: Histogram::new(PER_TOKEN),
            per_output_token: Histogram::new(PER_TOKEN),
            end_to_end: Histogram::new(LATENCY),
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
            adapters: Mutex::default(),
            rendered: Mutex::default(),
            lora: Mutex::default(),
            recent_first_token: Times::default(),
            recent_inter_token: Times::default(),
        }
    }
}

impl Metrics {
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
        let adapter = start.adapter.as_deref().map(|name| self.adapter_index(name));
        if let Some(adapter) = adapter {
            self.with_adapter(adapter, |count| count.prompt_tokens += u64::from(start.prompt_tokens));
        }
        if let Some(meter) = &start.meter {
            meter.charge_tokens(u64::from(start.prompt_tokens));
        }
        let now = Instant::now();
        RequestClock {
            metrics: Arc::clone(self),
            adapter,
            meter: start.meter.clone(),
            submitted: now,
            admitted: None,
            first_token: None,
            last_tokens: vec![None; start.n as usize],
            tokens: 0,
            ended: Finished::Abort,
        }
    }

    fn adapter_index(&self, name: &str) -> usize {
        let mut adapters = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        if adapters.counts.is_empty() {
            adapters.counts.push(AdapterCount { label: OTHER.into(), ..AdapterCount::default() });
        }
        if name == OTHER {
            return 0;
        }
        if let Some(&index) = adapters.labels.get(name) {
            return index;
        }
        let index = adapters.counts.len();
        if index > ADAPTER_LABELS_MAX || adapters.label_bytes + name.len() > ADAPTER_LABEL_BYTES_MAX {
            return 0;
        }
        adapters.label_bytes += name.len();
        adapters.labels.insert(name.to_owned(), index);
        adapters.counts.push(AdapterCount { label: name.to_owned(), ..AdapterCount::default() });
        index
    }

    fn with_adapter(&self, index: usize, change: impl FnOnce(&mut AdapterCount)) {
        let mut adapters = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = adapters.counts.get_mut(index) {
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
}

/// Times one request; when it is dropped, the request is over.
#[derive(Debug)]
pub struct RequestClock {
    metrics: Arc<Metrics>,
    adapter: Option<usize>,
    meter: Option<Arc<Meter>>,
    submitted: Instant,
    admitted: Option<Instant>,
    first_token: Option<Instant>,
    last_tokens: Vec<Option<Instant>>,
    tokens: u32,
    ended: Finished,
}

impl RequestClock {
    /// The engine admitted it.
    pub fn admitted(&mut self) {
        let now = Instant::now();
        self.metrics.queue.observe(seconds(now - self.submitted));
        self.admitted = Some(now);
    }

    /// Sequence `index` got a token.
    pub fn token(&mut self, index: u32) {
        let now = Instant::now();
        self.tokens += 1;
        if let Some(meter) = &self.meter {
            meter.charge_tokens(1);
        }
        if self.first_token.is_none() {
            self.first_token = Some(now);
            self.metrics.first_token.observe(seconds(now - self.submitted));
            self.metrics.recent_first_token.observe(seconds(now - self.submitted));
        }
        if let Some(last) = self.last_tokens.get_mut(index as usize)
            && let Some(before) = last.replace(now)
        {
            self.metrics.inter_token.observe(seconds(now - before));
            self.metrics.recent_inter_token.observe(seconds(now - before));
        }
    }

    /// When the engine admitted it.
    pub fn admitted_at(&self) -> Option<Instant> {
        self.admitted
    }

    /// When its first token came.
    pub fn first_token_at(&self) -> Option<Instant> {
        self.first_token
    }

    /// It ended well; without this call it counts as aborted.
    pub fn finished(&mut self, how: Finished) {
        self.ended = how;
    }
}

impl Drop for RequestClock {
    fn drop(&mut self) {
        let (metrics, now) = (&self.metrics, Instant::now());
        let slot = Finished::ALL.iter().position(|how| *how == self.ended).unwrap_or(0);
        if let Some(counter) = metrics.finished.get(slot) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(adapter) = self.adapter {
            let (outcome, tokens) =
                (if self.ended == Finished::Abort { "error" } else { "ok" }, u64::from(self.tokens));
            metrics.with_adapter(adapter, |count| {
                *count.outcomes.entry(outcome).or_default() += 1;
                count.generation_tokens += tokens;
            });
        }
        let (Some(admitted), true) = (self.admitted, self.ended != Finished::Abort) else { return };
        metrics.end_to_end.observe(seconds(now - self.submitted));
        metrics.inference.observe(seconds(now - admitted));
        metrics.generation_tokens.observe(f64::from(self.tokens));
        if let Some(first) = self.first_token {
            metrics.prefill.observe(seconds(first - admitted));
            metrics.decode.observe(seconds(now - first));
            if self.tokens > 1 {
                metrics.per_output_token.observe(seconds(now - first) / f64::from(self.tokens - 1));
            }
        }
    }
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}
