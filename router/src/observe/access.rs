//! The access log: one line for each request, when it is over.

use super::record::{RequestRecord, RunTimes, Summary, Told};
use super::timing::{Phases, ms};

/// Which requests have a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessLog {
    /// None.
    Off,
    /// Those that failed, or whose client left.
    Errors,
    /// All but probes that went well.
    #[default]
    All,
}

/// Routes that programs ask all the time: of health, of metrics, and the pages of the console.
pub(super) fn is_probe(route: &str) -> bool {
    let first = route.trim_start_matches('/').split('/').next().unwrap_or("");
    matches!(first, "health" | "ping" | "startup" | "metrics" | "console" | "docs") || route == "/admin/v1/live"
}

impl AccessLog {
    pub(super) fn wants(self, record: &RequestRecord, summary: &Summary) -> bool {
        let went_wrong = summary.status >= 400 || summary.code.is_some() || summary.client_closed;
        match self {
            Self::Off => false,
            Self::Errors => went_wrong,
            Self::All => went_wrong || !is_probe(&record.route),
        }
    }
}

/// Writes it. No field holds what a client typed, but for the id of the request, whose form is checked.
pub(super) fn line(record: &RequestRecord, told: &Told, summary: &Summary, model: &str) {
    let times = told.times();
    let has_runs = !times.is_empty();
    let phases = Phases::of(record.started, &times);
    tracing::info!(
        target: "access",
        request_id = record.id,
        trace_id = record.trace_id(),
        method = record.method.as_str().get(..16).unwrap_or(record.method.as_str()),
        route = if record.route.is_empty() { "none" } else { &record.route },
        status = summary.status,
        ms = ms(record.started, summary.ended),
        key = told.key.as_deref(),
        model = has_runs.then(|| told.adapter.as_deref().unwrap_or(model)),
        prompt_tokens = has_runs.then_some(summary.prompt_tokens),
        completion_tokens = has_runs.then_some(summary.tokens),
        cached_tokens = has_runs.then(|| times.iter().map(|run: &RunTimes| u64::from(run.cached_tokens)).sum::<u64>()),
        queue_ms = phases.queue_ms,
        ttft_ms = phases.first_token_ms,
        code = summary.code,
        client_closed = summary.client_closed.then_some(true),
        "request"
    );
}
