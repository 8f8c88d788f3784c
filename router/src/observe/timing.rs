//! Times of a request in the headers of its reply, in the names that LoRAX's clients know.

use std::time::Instant;

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::Response;

use super::record::{RequestRecord, RunTimes};

/// Whole milliseconds between two moments.
pub(super) fn ms(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_millis()).unwrap_or(u64::MAX)
}

/// The parts of a request's time, ms. What has not ended is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Phases {
    /// Until the first run was handed to the engine.
    pub(super) validation_ms: Option<u64>,
    /// From there until all were admitted.
    pub(super) queue_ms: Option<u64>,
    /// From the first that was admitted to the last end.
    pub(super) inference_ms: Option<u64>,
    /// From the request's head to the first token.
    pub(super) first_token_ms: Option<u64>,
    /// From the first token to the last end.
    pub(super) decode_ms: Option<u64>,
}

impl Phases {
    pub(super) fn of(started: Instant, runs: &[RunTimes]) -> Self {
        let all = |moment: fn(&RunTimes) -> Option<Instant>| runs.iter().map(moment).collect::<Option<Vec<_>>>();
        let last = |moments: Option<Vec<Instant>>| moments.and_then(|moments| moments.into_iter().max());
        let Some(submitted) = runs.iter().map(|run| run.submitted).min() else { return Self::default() };
        let (admitted, ended) = (runs.iter().filter_map(|run| run.admitted).min(), last(all(|run| run.ended)));
        let first_token = runs.iter().filter_map(|run| run.first_token).min();
        Self {
            validation_ms: Some(ms(started, submitted)),
            queue_ms: last(all(|run| run.admitted)).map(|admitted| ms(submitted, admitted)),
            inference_ms: admitted.zip(ended).map(|(admitted, ended)| ms(admitted, ended)),
            first_token_ms: first_token.map(|first| ms(started, first)),
            decode_ms: first_token.zip(ended).map(|(first, ended)| ms(first, ended)),
        }
    }
}

/// Adds what is known when the head goes out: of a stream, all up to its admission. LoRAX's routes have their own.
pub(super) fn name_the_times(response: &mut Response, record: &RequestRecord, runs: &[RunTimes]) {
    if runs.is_empty() || response.headers().contains_key("x-compute-type") {
        return;
    }
    let phases = Phases::of(record.started, runs);
    let content_type = response.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let is_whole = !content_type.is_some_and(|kind| kind.starts_with(b"text/event-stream"));
    let total_ms = is_whole.then(|| ms(record.started, Instant::now()));
    let tokens: u64 = runs.iter().map(|run| u64::from(run.tokens)).sum();
    let per_token = |ms: Option<u64>, tokens: u64| ms.filter(|_| tokens > 0).map(|ms| ms / tokens);
    let values = [
        ("x-validation-time", phases.validation_ms),
        ("x-queue-time", phases.queue_ms),
        ("x-total-time", total_ms),
        ("x-inference-time", phases.inference_ms.filter(|_| is_whole)),
        ("x-time-to-first-token", phases.first_token_ms.filter(|_| is_whole)),
        ("x-time-per-token", per_token(phases.inference_ms.filter(|_| is_whole), tokens)),
        ("x-time-per-output-token", per_token(phases.decode_ms.filter(|_| is_whole), tokens.saturating_sub(1))),
    ];
    let headers = response.headers_mut();
    for (name, value) in values {
        if let Some(value) = value {
            headers.insert(HeaderName::from_static(name), HeaderValue::from(value));
        }
    }
    let server_timing = [
        ("validation", phases.validation_ms),
        ("queue", phases.queue_ms),
        ("inference", phases.inference_ms.filter(|_| is_whole)),
        ("total", total_ms),
    ];
    let parts = server_timing.iter().filter_map(|(name, ms)| ms.map(|ms| format!("{name};dur={ms}")));
    if let Ok(value) = HeaderValue::from_str(&parts.collect::<Vec<_>>().join(", ")) {
        headers.insert("server-timing", value);
    }
}
