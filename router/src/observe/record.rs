//! What one request did, and the guard that tells it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};

use axum::body::Body;
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderValue, Method};
use axum::response::Response;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use super::access::{self, AccessLog};
use super::export::{OtlpSettings, Tracer};
use super::traceparent::TraceIds;
use super::{spans, timing};

/// Status of a request whose client left before there was a response.
const CLIENT_LEFT: u16 = 499;
/// Runs of a request that are remembered one by one.
const RUNS_MAX: usize = 512;
/// Loads of a request that are remembered.
const LOADS_MAX: usize = 32;

/// When one prompt under one set of adapters got how far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunTimes {
    pub(crate) submitted: Instant,
    /// The engine gave it memory.
    pub(crate) admitted: Option<Instant>,
    pub(crate) first_token: Option<Instant>,
    pub(crate) last_token: Option<Instant>,
    /// All of its sequences ended, or it failed.
    pub(crate) ended: Option<Instant>,
    pub(crate) prompt_tokens: u32,
    /// Of these, the ones whose KV was there already.
    pub(crate) cached_tokens: u32,
    /// Generated, all sequences.
    pub(crate) tokens: u32,
    /// Code of what it failed with.
    pub(crate) failed: Option<&'static str>,
}

impl RunTimes {
    pub(crate) fn new(prompt_tokens: u32) -> Self {
        Self {
            submitted: Instant::now(),
            admitted: None,
            first_token: None,
            last_token: None,
            ended: None,
            prompt_tokens,
            cached_tokens: 0,
            tokens: 0,
            failed: None,
        }
    }
}

/// Written by the run, read when the request is told.
pub(crate) type SharedTimes = Arc<Mutex<RunTimes>>;

/// Locks them.
pub(crate) fn times_of(times: &SharedTimes) -> MutexGuard<'_, RunTimes> {
    times.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How an adapter was made ready for a request.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    /// Its name, if everybody may read it.
    pub(crate) name: Option<String>,
    /// 16 hex digits of its content's hash.
    pub(crate) content: Option<String>,
    pub(crate) source: Option<&'static str>,
    pub(crate) started: Instant,
    pub(crate) ended: Instant,
    /// Code of what it failed with.
    pub(crate) failed: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct RequestRecord {
    pub(crate) id: String,
    pub(super) method: Method,
    /// The matched route; empty where there is none. Never the path: it may hold names.
    pub(super) route: String,
    pub(crate) started: Instant,
    pub(super) started_at: SystemTime,
    pub(crate) trace: Option<TraceIds>,
    told: Mutex<Told>,
}

/// What becomes known on the way.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    /// What the caller's key is called.
    pub(super) key: Option<Arc<str>>,
    /// Metrics label of the adapter; `None` = the base model, or nothing was generated.
    pub(super) adapter: Option<String>,
    pub(super) code: Option<&'static str>,
    pub(super) status: Option<u16>,
    /// The last byte was handed to the connection.
    pub(super) delivered: bool,
    pub(super) runs: Vec<SharedTimes>,
    pub(super) loads: Vec<Load>,
}

impl Told {
    pub(super) fn times(&self) -> Vec<RunTimes> {
        self.runs.iter().map(|run| *times_of(run)).collect()
    }
}

impl RequestRecord {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The caller's key is called this.
    pub(crate) fn asked_by(&self, key: &Arc<str>) {
        if !key.is_empty() {
            self.told().key = Some(Arc::clone(key));
        }
    }

    /// It is answered with error `code`.
    pub(crate) fn failed(&self, code: &'static str) {
        self.told().code = Some(code);
    }

    /// A run was handed to the engine. `adapter`: its metrics label.
    pub(crate) fn runs(&self, times: &SharedTimes, adapter: Option<&str>) {
        let mut told = self.told();
        if told.runs.len() < RUNS_MAX {
            told.runs.push(Arc::clone(times));
        }
        if told.adapter.is_none() {
            told.adapter = adapter.map(str::to_owned);
        }
    }

    /// An adapter was waited for.
    pub(crate) fn loaded(&self, load: Load) {
        let mut told = self.told();
        if told.loads.len() < LOADS_MAX {
            told.loads.push(load);
        }
    }

    /// The trace's id, for the log.
    pub(crate) fn trace_id(&self) -> Option<String> {
        self.trace.as_ref().map(TraceIds::trace_id)
    }
}

/// Where records go.
#[derive(Debug)]
pub(crate) struct Observer {
    /// What answers under no adapter.
    pub(super) model: String,
    access: AccessLog,
    tracer: Option<Tracer>,
}

impl Observer {
    /// `model`: first name of the base model.
    pub(crate) fn new(model: &str, access: AccessLog, otlp: Option<OtlpSettings>) -> Arc<Self> {
        Arc::new(Self { model: model.to_owned(), access, tracer: otlp.map(Tracer::new) })
    }

    /// A request's head is here.
    pub(crate) fn begin(self: &Arc<Self>, request: &Request, id: String) -> Recording {
        let traceparent = request.headers().get("traceparent").and_then(|value| value.to_str().ok());
        let record = RequestRecord {
            id,
            method: request.method().clone(),
            route: request.extensions().get::<MatchedPath>().map_or_else(String::new, |path| path.as_str().to_owned()),
            started: Instant::now(),
            started_at: SystemTime::now(),
            trace: TraceIds::of(traceparent, self.tracer.as_ref().map(Tracer::ratio)),
            told: Mutex::default(),
        };
        Recording { observer: Arc::clone(self), record: Arc::new(record) }
    }

    /// Starts to export spans. Needs a tokio runtime.
    pub(crate) fn start(&self) {
        if let Some(tracer) = &self.tracer {
            tracer.start();
        }
    }

    /// Sends what is left, for a moment at most.
    pub(crate) async fn flush(&self) {
        if let Some(tracer) = &self.tracer {
            tracer.flush().await;
        }
    }

    /// Spans that were exported, and spans that were lost; `None` where none are made.
    pub(crate) fn spans(&self) -> Option<(u64, u64)> {
        self.tracer.as_ref().map(Tracer::counts)
    }

    fn tell(&self, record: &RequestRecord) {
        let told = record.told().clone();
        let (now, times) = (Instant::now(), told.times());
        let summary = Summary::of(&told, &times, now);
        if self.access.wants(record, &summary) {
            access::line(record, &told, &summary, &self.model);
        }
        let sampled = record.trace.filter(|trace| trace.sampled && !access::is_probe(&record.route));
        if let (Some(tracer), Some(trace)) = (&self.tracer, sampled) {
            tracer.give(spans::of(record, trace, &told, &times, &summary, &self.model));
        }
    }
}

/// One request in numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Summary {
    pub(super) ended: Instant,
    pub(super) status: u16,
    pub(super) code: Option<&'static str>,
    /// The client left before the end.
    pub(super) client_closed: bool,
    pub(super) prompt_tokens: u64,
    pub(super) tokens: u64,
}

impl Summary {
    fn of(told: &Told, times: &[RunTimes], now: Instant) -> Self {
        let is_over = !times.is_empty() && times.iter().all(|run| run.ended.is_some());
        Self {
            ended: now,
            status: told.status.unwrap_or(CLIENT_LEFT),
            code: told.code.or_else(|| times.iter().find_map(|run| run.failed)),
            client_closed: !told.delivered && !is_over,
            prompt_tokens: times.iter().map(|run| u64::from(run.prompt_tokens)).sum(),
            tokens: times.iter().map(|run| u64::from(run.tokens)).sum(),
        }
    }
}

/// Tells its request when it is dropped.
#[derive(Debug)]
pub(crate) struct Recording {
    observer: Arc<Observer>,
    record: Arc<RequestRecord>,
}

impl Recording {
    pub(crate) fn record(&self) -> Arc<RequestRecord> {
        Arc::clone(&self.record)
    }

    /// Adds what the client may read of it, and goes on with the body.
    pub(crate) fn hold(self, mut response: Response) -> Response {
        let times = {
            let mut told = self.record.told();
            told.status = Some(response.status().as_u16());
            told.times()
        };
        if response.status().is_success() {
            timing::name_the_times(&mut response, &self.record, &times);
        }
        if let (Some(_), Some(trace)) = (&self.observer.tracer, self.record.trace)
            && let Ok(value) = HeaderValue::from_str(&trace.header())
        {
            response.headers_mut().insert("traceresponse", value);
        }
        response.map(|body| {
            let recorded = RecordedBody { body, recording: self };
            recorded.note_end();
            Body::new(recorded)
        })
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.observer.tell(&self.record);
    }
}

/// A response body that knows whether it was sent to its end.
struct RecordedBody {
    body: Body,
    recording: Recording,
}

impl RecordedBody {
    fn note_end(&self) {
        if self.body.is_end_stream() {
            self.recording.record.told().delivered = true;
        }
    }
}

impl HttpBody for RecordedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(None) => self.recording.record.told().delivered = true,
            Poll::Ready(Some(Ok(_))) => self.note_end(), // nobody asks again behind the last frame of a known length
            _ => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
