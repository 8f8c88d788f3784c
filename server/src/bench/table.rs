//! The table that a run prints: at most 100 columns.

use std::fmt::Write;

use super::figures::Percentiles;
use super::record::{Record, WorkloadResult};

/// Label of a workload at most; longer ones are cut.
const LABEL: usize = 26;

/// All of a run, for people.
pub(super) fn page(record: &Record) -> String {
    let mut page = String::new();
    let server = &record.server;
    let version = server.version.as_deref().map(|version| format!(" {version}")).unwrap_or_default();
    let adapters = match server.adapters {
        0 => String::new(),
        1 => ", 1 adapter".to_owned(),
        n => format!(", {n} adapters"),
    };
    // Writing to a String does not fail.
    let _ = writeln!(page, "\n{}{version}: {}{adapters}, {}", record.name, server.base_model, server.url);
    let _ = writeln!(page, "{}", record.machine.summary());
    if let Some(line) = costs(record) {
        let _ = writeln!(page, "{line}");
    }
    let _ = writeln!(
        page,
        "\n{:LABEL$} {:>9} {:>6} {:>7} {:>8} {:>8} {:>7} {:>7} {:>8} {:>5}",
        "workload", "out tok/s", "base", "req/s", "TTFT p50", "p99 ms", "ITL p50", "p99 ms", "e2e p50", "fail"
    );
    for result in &record.results {
        row(&mut page, result);
    }
    notes(&mut page, record);
    page
}

fn costs(record: &Record) -> Option<String> {
    let server = &record.server;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut parts = Vec::new();
    parts.extend(server.start_to_ready_s.map(|seconds| format!("start to ready {seconds:.2} s")));
    if let Some(bytes) = server.ready_rss_bytes {
        let end = server.end_rss_bytes.map(|bytes| format!(", {:.0} MiB at the end", mib(bytes))).unwrap_or_default();
        parts.push(format!("resident {:.0} MiB when ready{end}", mib(bytes)));
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

fn row(page: &mut String, result: &WorkloadResult) {
    let label: String = result.workload.label.chars().take(LABEL).collect();
    let failed = result.failed();
    let Some(figures) = &result.median else {
        let _ = writeln!(page, "{label:LABEL$} {:>9} {:>61}", "-", failed);
        return;
    };
    let ms = |points: Option<Percentiles>, field: fn(&Percentiles) -> f64| {
        points.map_or_else(|| "-".to_owned(), |points| number(field(&points)))
    };
    let base =
        result.against_base.as_ref().map_or_else(|| "-".to_owned(), |base| format!("{:.2}", base.output_tokens_per_s));
    let _ = writeln!(
        page,
        "{label:LABEL$} {:>9} {base:>6} {:>7} {:>8} {:>8} {:>7} {:>7} {:>8} {failed:>5}",
        number(figures.output_tokens_per_s),
        number(figures.requests_per_s),
        ms(figures.ttft_ms, |p| p.p50),
        ms(figures.ttft_ms, |p| p.p99),
        ms(figures.itl_ms, |p| p.p50),
        ms(figures.itl_ms, |p| p.p99),
        ms(figures.e2e_ms, |p| p.p50),
    );
    if let Some(intruder) = &figures.intruder {
        let _ = writeln!(
            page,
            "  long prompt: first token after {} ms; p99 between tokens of the streams {} ms beside it, {} ms without",
            number(intruder.ttft_ms),
            ms(intruder.beside_ms, |p| p.p99),
            ms(intruder.without_ms, |p| p.p99),
        );
    }
}

fn notes(page: &mut String, record: &Record) {
    let rounds = record.results.iter().map(|result| result.rounds.len()).max().unwrap_or_default();
    let of = |field: fn(&super::figures::Figures) -> f64| -> f64 {
        record.results.iter().flat_map(|result| &result.rounds).map(|round| field(&round.figures)).sum()
    };
    let (wall_s, cpu_s) = (of(|figures| figures.wall_s), of(|figures| figures.client_cpu_s));
    if wall_s > 0.0 {
        let percent = 100.0 * cpu_s / wall_s;
        let _ = writeln!(
            page,
            "\nMedians of {rounds} rounds, alternating. The client used {percent:.1} % of one processor."
        );
    }
    for result in &record.results {
        for error in result.rounds.iter().flat_map(|round| &round.errors).take(3) {
            let label = &result.workload.label;
            let _ = writeln!(page, "{label}: {} failed ({}): {}", error.count, error.kind, error.first);
        }
    }
    if let Some(reason) = &record.stopped {
        let _ = writeln!(page, "Stopped before the end: {reason}");
    }
}

/// Three or more digits, no more than are known.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
