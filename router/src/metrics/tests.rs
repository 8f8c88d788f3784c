use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::*;
use crate::adapters::{AdapterRef, AdapterSettings, Registry};
use crate::engine::{
    AdapterCheck, AdapterFailure, ContentId, EngineStatus, Failure, ForgetMode, GenerateRequest, MergeAsk, PinLevel,
    PinRefused, PreparedAdapter,
};
use crate::http::{Backend, Events};

fn start(adapter: Option<&str>) -> RequestStart {
    RequestStart {
        n: 1,
        max_tokens: 4,
        prompt_tokens: 7,
        adapter: adapter.map(str::to_owned),
        meter: None,
        record: None,
    }
}

#[test]
fn a_million_adapter_names_make_65_labels_at_most() {
    let metrics = Arc::new(Metrics::default());
    for i in 0..2000 {
        metrics.request(&start(Some(&format!("adapter-{i}")))).finished(Finished::Stop);
    }
    let adapters = metrics.adapters.lock().unwrap();
    assert_eq!(adapters.counts.len(), ADAPTER_LABELS_MAX + 1);
    let total: u64 = adapters.counts.iter().map(|count| count.prompt_tokens).sum();
    assert_eq!(total, 2000 * 7, "nothing is lost");
    assert_eq!(adapters.counts[0].prompt_tokens, (2000 - 64) * 7);
}

#[test]
fn a_request_that_is_dropped_counts_as_aborted() {
    let metrics = Arc::new(Metrics::default());
    drop(metrics.request(&start(None)));
    let mut good = metrics.request(&start(None));
    good.admitted(0);
    good.token(0);
    good.token(0);
    good.finished(Finished::Length);
    drop(good);
    let counts: Vec<u64> = metrics.finished.iter().map(|n| n.load(Ordering::Relaxed)).collect();
    assert_eq!(counts, [0, 1, 1]);
    let mut page = String::new();
    metrics.generation_tokens.render("x", "help", "m=\"b\"", &mut page);
    assert!(page.contains("x_bucket{m=\"b\",le=\"2\"} 1\n"), "{page}");
    assert!(page.contains("x_bucket{m=\"b\",le=\"1\"} 0\n"), "{page}");
    assert!(page.ends_with("x_sum{m=\"b\"} 2\nx_count{m=\"b\"} 1\n"), "{page}");
}

/// An engine that is only there to be asked for nothing.
struct NoEngine;

impl Backend for NoEngine {
    fn submit(&self, _: GenerateRequest) -> Result<Box<dyn Events>, Failure> {
        Err(Failure::Draining)
    }

    fn prepare_adapter(&self, _: PathBuf) -> BoxFuture<'static, Result<PreparedAdapter, AdapterFailure>> {
        Box::pin(async { Err(AdapterFailure::new("adapter_invalid", "")) })
    }

    fn check_adapter(&self, _: PathBuf) -> BoxFuture<'static, Result<AdapterCheck, AdapterFailure>> {
        Box::pin(async { Err(AdapterFailure::new("adapter_invalid", "")) })
    }

    fn merge_adapters(&self, _: MergeAsk) -> BoxFuture<'static, Result<(), AdapterFailure>> {
        Box::pin(async { Err(AdapterFailure::new("adapter_invalid", "")) })
    }

    fn pin_adapter(&self, _: ContentId, _: Option<PinLevel>) -> BoxFuture<'static, Result<(), PinRefused>> {
        Box::pin(async { Err(PinRefused::Draining) })
    }

    fn forget_adapter(&self, _: ContentId, _: ForgetMode) {}

    fn prefetch_adapter(&self, _: ContentId) {}

    fn status(&self) -> Arc<EngineStatus> {
        Arc::default()
    }

    fn begin_drain(&self) {}
}

#[test]
fn the_page_stays_below_64_kib_whatever_the_adapters_are_called() {
    let contents: Vec<_> = (0..1000u32)
        .map(|i| {
            let mut id = [0xAB; 32];
            id[..4].copy_from_slice(&i.to_le_bytes());
            ContentId(id)
        })
        .collect();
    let status = EngineStatus { resident: contents.clone(), waiting_for_load: contents, ..EngineStatus::default() };
    let registry = Registry::new(AdapterSettings::default(), Arc::new(NoEngine));
    let levels = [AdapterMetrics::Counters, AdapterMetrics::Full];
    for (name_bytes, level) in [4, 12, 24, 257, 4000].into_iter().flat_map(|bytes| levels.map(|level| (bytes, level))) {
        let metrics = busy(name_bytes, level);
        let model = "m".repeat(24);
        let page = metrics.render(&Snapshot {
            model: &model,
            status: &status,
            registry: &registry,
            spans: Some((1, 2)),
            lorax_names: level == AdapterMetrics::Full,
        });
        // Who asks for more gets more.
        let limit = if level == AdapterMetrics::Full { 96 } else { 64 } * 1024;
        assert!(page.len() < limit, "{} bytes with names of {name_bytes}, {level:?}", page.len());
        let requests: f64 = page
            .lines()
            .filter(|line| line.starts_with("loramux_adapter_requests_total{"))
            .map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
            .sum();
        assert_eq!(requests, 400.0, "nothing is lost");
    }
}

/// Metrics after every kind of error, and two requests for each of 200 adapters.
fn busy(name_bytes: usize, level: AdapterMetrics) -> Arc<Metrics> {
    let metrics = Arc::new(Metrics::new(level, &[]));
    for cause in crate::http::Cause::ALL {
        metrics.rejected(cause.row().code);
    }
    for kind in ["json_object", "json_schema", "regex", "choice", "grammar"] {
        metrics.structured(kind);
    }
    for choice in ["auto", "required", "named"] {
        metrics.tools(choice);
    }
    for i in 0..200 {
        for ended in [Finished::Stop, Finished::Abort] {
            let long = RequestStart { prompt_tokens: u32::MAX, ..start(Some(&format!("{i:0>name_bytes$}"))) };
            let mut clock = metrics.request(&long);
            clock.admitted(0);
            clock.token(0);
            clock.finished(ended);
        }
    }
    metrics
}

#[test]
fn ten_thousand_adapters_cost_no_time_at_a_scrape() {
    let registered = (0..10_000).map(|i| (format!("adapter-{i}"), AdapterRef::directory(&PathBuf::from("/nowhere"))));
    let settings = AdapterSettings { registered: registered.collect(), ..AdapterSettings::default() };
    let registry = Registry::new(settings, Arc::new(NoEngine));
    let (metrics, status) = (busy(24, AdapterMetrics::Counters), EngineStatus::default());
    let snapshot = Snapshot { model: "base", status: &status, registry: &registry, spans: None, lorax_names: false };
    let time = |_| {
        let begin = Instant::now();
        assert!(metrics.render_now(&snapshot).contains("loramux_adapters{state=\"registered\"} 10000\n"));
        begin.elapsed()
    };
    let best = (0..50).map(time).min().unwrap();
    // The bound is 250 us; five times of it says nothing of a busy machine, and all of a list that is walked through.
    println!("{best:?}");
    assert!(best < Duration::from_micros(1250), "{best:?}");
}

#[test]
fn names_that_are_listed_have_their_labels_from_the_start_and_off_counts_nothing() {
    let metrics = Arc::new(Metrics::new(AdapterMetrics::Counters, &["listed".to_owned()]));
    for i in 0..100 {
        metrics.request(&start(Some(&format!("adapter-{i}")))).finished(Finished::Stop);
    }
    metrics.request(&start(Some("listed"))).finished(Finished::Stop);
    let mut page = String::new();
    metrics.adapters().render(&mut page);
    assert!(page.contains("loramux_adapter_requests_total{adapter=\"listed\",outcome=\"ok\"} 1\n"), "{page}");
    assert!(page.contains("{adapter=\"other\",outcome=\"ok\"} 37\n"), "{page}");
    assert!(!page.contains("ttft"));
    let off = Arc::new(Metrics::new(AdapterMetrics::Off, &["listed".to_owned()]));
    off.request(&start(Some("x"))).finished(Finished::Stop);
    let mut page = String::new();
    off.adapters().render(&mut page);
    assert_eq!(page, "");
}

#[test]
fn times_by_adapter_lose_nothing_to_the_bound_on_their_number() {
    let metrics = busy(24, AdapterMetrics::Full);
    let mut page = String::new();
    metrics.adapters().render(&mut page);
    let counted = |name: &str| {
        let lines = page.lines().filter_map(|line| line.strip_prefix(name));
        let values: Vec<u64> = lines.map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap()).collect();
        (values.len(), values.iter().sum::<u64>())
    };
    assert_eq!(counted("loramux_adapter_ttft_seconds_count"), (13, 400));
    assert_eq!(counted("loramux_adapter_queue_seconds_count"), (13, 400));
}
