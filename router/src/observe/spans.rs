//! The spans of one request: itself, its adapters' loads, and of each run queue, prefill and decode.

use std::time::{Instant, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::record::{Load, RequestRecord, RunTimes, Summary, Told};
use super::traceparent::{TraceIds, new_span_id};

/// Runs of a request that have spans of their own.
const RUNS_MAX: usize = 32;

/// Makes them. `model`: what answers under no adapter.
pub(super) fn of(
    record: &RequestRecord,
    trace: TraceIds,
    told: &Told,
    runs: &[RunTimes],
    summary: &Summary,
    model: &str,
) -> Vec<SpanData> {
    let maker = Maker { trace, started: record.started, started_at: record.started_at };
    let mut spans = Vec::with_capacity(2 + told.loads.len() + runs.len().min(RUNS_MAX) * 3);
    spans.push(maker.request(record, told, runs, summary, model));
    spans.extend(told.loads.iter().map(|load| maker.load(load)));
    for run in runs.iter().take(RUNS_MAX) {
        maker.run(run, summary.ended, &mut spans);
    }
    spans
}

struct Maker {
    trace: TraceIds,
    started: Instant,
    started_at: SystemTime,
}

impl Maker {
    fn request(
        &self,
        record: &RequestRecord,
        told: &Told,
        runs: &[RunTimes],
        summary: &Summary,
        model: &str,
    ) -> SpanData {
        let method = record.method.as_str();
        let mut span = self.child("request", self.started, summary.ended);
        span.span_context = self.identity(self.trace.span);
        span.parent_span_id = self.trace.parent.map_or(SpanId::INVALID, id);
        span.parent_span_is_remote = self.trace.parent.is_some();
        span.span_kind = SpanKind::Server;
        span.attributes = vec![
            KeyValue::new("http.request.method", method.get(..16).unwrap_or(method).to_owned()),
            KeyValue::new("http.response.status_code", i64::from(summary.status)),
            KeyValue::new("loramux.request_id", record.id.clone()),
        ];
        if !record.route.is_empty() {
            span.attributes.push(KeyValue::new("http.route", record.route.clone()));
        }
        if let Some(key) = &told.key {
            span.attributes.push(KeyValue::new("loramux.key", key.to_string()));
        }
        if let Some(operation) = operation(&record.route).filter(|_| !runs.is_empty()) {
            let cached: i64 = runs.iter().map(|run| i64::from(run.cached_tokens)).sum();
            let name = told.adapter.clone().unwrap_or_else(|| model.to_owned());
            span.attributes.extend([
                KeyValue::new("gen_ai.operation.name", operation),
                KeyValue::new("gen_ai.provider.name", "loramux"),
                KeyValue::new("gen_ai.request.model", name),
                KeyValue::new("gen_ai.usage.input_tokens", count(summary.prompt_tokens)),
                KeyValue::new("gen_ai.usage.cache_read.input_tokens", cached),
                KeyValue::new("gen_ai.usage.output_tokens", count(summary.tokens)),
                KeyValue::new("loramux.sequences", count(runs.len() as u64)),
            ]);
        }
        if summary.client_closed {
            span.attributes.push(KeyValue::new("loramux.client_closed", true));
        }
        // A client's own mistake is no error of this server.
        if let Some(code) = summary.code {
            span.attributes.push(KeyValue::new("error.type", code));
        }
        if summary.status >= 500 || (summary.code.is_some() && summary.status < 400) {
            span.status = Status::error(summary.code.unwrap_or("internal_error"));
        }
        span
    }

    fn load(&self, load: &Load) -> SpanData {
        let mut span = self.child("adapter_load", load.started, load.ended);
        let known = [
            ("loramux.adapter.name", load.name.clone()),
            ("loramux.adapter.content_id", load.content.clone()),
            ("loramux.adapter.source", load.source.map(str::to_owned)),
            ("error.type", load.failed.clone()),
        ];
        span.attributes = known.into_iter().filter_map(|(name, value)| Some(KeyValue::new(name, value?))).collect();
        if let Some(code) = &load.failed {
            span.status = Status::error(code.clone());
        }
        span
    }

    /// A phase that has begun and not ended ends with the request.
    fn run(&self, run: &RunTimes, ended: Instant, spans: &mut Vec<SpanData>) {
        let ended = run.ended.unwrap_or(ended);
        let mut queue = self.child("queue", run.submitted, run.admitted.unwrap_or(ended));
        queue.attributes = vec![KeyValue::new("gen_ai.usage.input_tokens", i64::from(run.prompt_tokens))];
        spans.push(queue);
        let Some(admitted) = run.admitted else { return };
        let mut prefill = self.child("prefill", admitted, run.first_token.unwrap_or(ended));
        prefill.attributes = vec![
            KeyValue::new("gen_ai.usage.input_tokens", i64::from(run.prompt_tokens)),
            KeyValue::new("gen_ai.usage.cache_read.input_tokens", i64::from(run.cached_tokens)),
        ];
        spans.push(prefill);
        let Some(first_token) = run.first_token else { return };
        let mut decode = self.child("decode", first_token, ended.max(run.last_token.unwrap_or(ended)));
        decode.attributes = vec![KeyValue::new("gen_ai.usage.output_tokens", i64::from(run.tokens))];
        if let Some(code) = run.failed {
            decode.attributes.push(KeyValue::new("error.type", code));
            decode.status = Status::error(code);
        }
        spans.push(decode);
    }

    /// A span below the request's.
    fn child(&self, name: &'static str, from: Instant, to: Instant) -> SpanData {
        SpanData {
            span_context: self.identity(new_span_id()),
            parent_span_id: id(self.trace.span),
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: name.into(),
            start_time: self.at(from),
            end_time: self.at(to.max(from)),
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::builder("loramux")
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
        }
    }

    /// All moments of a request are counted from one look at the calendar, so that a clock that is set changes no order.
    fn at(&self, moment: Instant) -> SystemTime {
        self.started_at + moment.saturating_duration_since(self.started)
    }

    fn identity(&self, span: u64) -> SpanContext {
        let trace = TraceId::from(self.trace.trace);
        SpanContext::new(trace, id(span), TraceFlags::SAMPLED, false, TraceState::default())
    }
}

fn id(span: u64) -> SpanId {
    SpanId::from(span)
}

fn count(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// `gen_ai.operation.name` of a route that generates.
fn operation(route: &str) -> Option<&'static str> {
    Some(match route {
        "/v1/chat/completions" | "/v1/responses" | "/v1/messages" | "/invocations" => "chat",
        "/v1/embeddings" => "embeddings",
        "/v1/completions" | "/generate" | "/generate_stream" | "/" => "text_completion",
        _ => return None,
    })
}
