use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::*;
use crate::adapters::{AdapterSettings, Registry};
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
    for name_bytes in [4, 24, 257, 4000] {
        let metrics = Arc::new(Metrics::default());
        for cause in crate::http::Cause::ALL {
            metrics.rejected(cause.row().code);
        }
        for i in 0..200 {
            for ended in [Finished::Stop, Finished::Abort] {
                let long = RequestStart { prompt_tokens: u32::MAX, ..start(Some(&format!("{i:0>name_bytes$}"))) };
                metrics.request(&long).finished(ended);
            }
        }
        let page =
            metrics.render(&Snapshot { model: &"m".repeat(24), status: &status, registry: &registry, spans: None });
        assert!(page.len() < 64 * 1024, "{} bytes with names of {name_bytes}", page.len());
        let requests: f64 = page
            .lines()
            .filter(|line| line.starts_with("loramux_adapter_requests_total{"))
            .map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
            .sum();
        assert_eq!(requests, 400.0, "nothing is lost");
    }
}
