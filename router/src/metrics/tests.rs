use super::*;
use std::sync::Arc;

fn start(adapter: Option<&str>) -> RequestStart {
    RequestStart { n: 1, max_tokens: 4, prompt_tokens: 7, adapter: adapter.map(str::to_owned) }
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
    good.admitted();
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
