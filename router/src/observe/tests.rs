//! A request's spans, and which requests have a line in the log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request;
use opentelemetry::trace::{SpanId, SpanKind, Status, TraceId};
use opentelemetry_sdk::trace::SpanData;

use super::record::{Recording, Summary, Told};
use super::timing::Phases;
use super::*;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn settings() -> OtlpSettings {
    OtlpSettings {
        endpoint: "http://127.0.0.1:9/v1/traces".into(),
        headers: Vec::new(),
        service_name: "loramux".into(),
        sample_ratio: 1.0,
    }
}

fn begun(observer: &Arc<Observer>) -> Recording {
    let request = Request::builder().uri("/v1/x").header("traceparent", PARENT).body(Body::empty()).unwrap();
    observer.begin(&request, "an-id".into())
}

fn run_of(started: Instant, milliseconds: [Option<u64>; 4]) -> RunTimes {
    let at = |ms: Option<u64>| ms.map(|ms| started + Duration::from_millis(ms));
    let [submitted, admitted, first_token, ended] = milliseconds;
    RunTimes {
        submitted: at(submitted).unwrap(),
        admitted: at(admitted),
        first_token: at(first_token),
        last_token: at(first_token),
        ended: at(ended),
        prompt_tokens: 7,
        cached_tokens: 3,
        tokens: 5,
        failed: None,
    }
}

fn summary(record: &RequestRecord, status: u16) -> Summary {
    let ended = record.started + Duration::from_millis(100);
    Summary { ended, status, code: None, client_closed: false, prompt_tokens: 7, tokens: 5 }
}

fn names(spans: &[SpanData]) -> Vec<&str> {
    spans.iter().map(|span| &*span.name).collect()
}

#[test]
fn a_request_s_spans_hang_below_it_and_it_below_the_caller_s() {
    let observer = Observer::new("base", AccessLog::Off, Some(settings()));
    let recording = begun(&observer);
    let record = recording.record();
    let runs = [run_of(record.started, [Some(10), Some(30), Some(50), Some(90)])];
    let load = Load {
        name: None,
        content: Some("0011223344556677".into()),
        source: Some("hub"),
        started: record.started,
        ended: record.started + Duration::from_millis(8),
        failed: None,
    };
    let told = Told { loads: vec![load], adapter: Some("sql".into()), ..Told::default() };
    let spans = spans::of(&record, record.trace.unwrap(), &told, &runs, &summary(&record, 200), "base");
    assert_eq!(names(&spans), ["request", "adapter_load", "queue", "prefill", "decode"]);
    let trace = TraceId::from_hex("4bf92f3577b34da6a3ce929d0e0e4736").unwrap();
    assert!(spans.iter().all(|span| span.span_context.trace_id() == trace));
    let [request, below @ ..] = &spans[..] else { panic!() };
    assert_eq!(request.parent_span_id, SpanId::from_hex("00f067aa0ba902b7").unwrap());
    assert!(request.parent_span_is_remote && request.span_kind == SpanKind::Server);
    assert!(below.iter().all(|span| span.parent_span_id == request.span_context.span_id()));
    let ms = |span: &SpanData| {
        let since = |at: std::time::SystemTime| at.duration_since(record.started_at).unwrap().as_millis();
        (since(span.start_time), since(span.end_time))
    };
    let times: Vec<_> = spans.iter().map(ms).collect();
    assert_eq!(times, [(0, 100), (0, 8), (10, 30), (30, 50), (50, 90)]);
}

#[test]
fn what_has_not_ended_ends_with_its_request_and_what_never_began_has_no_span() {
    let observer = Observer::new("base", AccessLog::Off, Some(settings()));
    let recording = begun(&observer);
    let record = recording.record();
    let made = |run: RunTimes, status| {
        let (told, summary) = (Told::default(), summary(&record, status));
        spans::of(&record, record.trace.unwrap(), &told, &[run], &summary, "base")
    };
    let waiting = made(run_of(record.started, [Some(10), None, None, None]), 499);
    assert_eq!(names(&waiting), ["request", "queue"]);
    assert_eq!(waiting[1].end_time, waiting[0].end_time);
    assert_eq!(waiting[0].status, Status::Unset);
    let failed =
        RunTimes { failed: Some("shard_fault"), ..run_of(record.started, [Some(1), Some(2), Some(3), Some(4)]) };
    let failed = made(failed, 500);
    assert_eq!(names(&failed), ["request", "queue", "prefill", "decode"]);
    assert!(matches!(failed[3].status, Status::Error { .. }) && matches!(failed[0].status, Status::Error { .. }));
}

#[test]
fn a_collector_that_is_away_costs_spans_and_nothing_else() {
    let observer = Observer::new("base", AccessLog::Off, Some(settings()));
    for _ in 0..3000 {
        drop(begun(&observer)); // nobody empties the queue
    }
    assert_eq!(observer.spans(), Some((0, 3000 - 2048)));
    assert_eq!(Observer::new("base", AccessLog::Off, None).spans(), None);
}

#[test]
fn probes_that_went_well_have_no_line() {
    let observer = Observer::new("base", AccessLog::Off, None);
    let recording = begun(&observer);
    let record = recording.record();
    let (good, bad) = (summary(&record, 200), summary(&record, 404));
    let left = Summary { client_closed: true, ..good };
    let wants = |log: AccessLog| [good, bad, left].map(|summary| log.wants(&record, &summary));
    assert_eq!(wants(AccessLog::All), [true, true, true]);
    assert_eq!(wants(AccessLog::Errors), [false, true, true]);
    assert_eq!(wants(AccessLog::Off), [false; 3]);
    for (route, is_probe) in
        [("/health/live", true), ("/metrics", true), ("/v1/models", false), ("/", false), ("", false)]
    {
        assert_eq!(access::is_probe(route), is_probe, "{route}");
    }
}

#[test]
fn phases_of_several_runs_reach_from_the_first_to_the_last() {
    let started = Instant::now();
    let runs = [
        run_of(started, [Some(10), Some(20), Some(40), Some(70)]),
        run_of(started, [Some(10), Some(35), Some(50), Some(90)]),
    ];
    let phases = Phases::of(started, &runs);
    let expected = Phases {
        validation_ms: Some(10),
        queue_ms: Some(25),
        inference_ms: Some(70),
        first_token_ms: Some(40),
        decode_ms: Some(50),
    };
    assert_eq!(phases, expected);
    let open = [runs[0], run_of(started, [Some(10), None, None, None])];
    let phases = Phases::of(started, &open);
    assert_eq!((phases.queue_ms, phases.inference_ms, phases.first_token_ms), (None, None, Some(40)));
    assert_eq!(Phases::of(started, &[]), Phases::default());
}
