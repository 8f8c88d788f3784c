//! Answers as people read them.

use std::fmt::Write;

use indicatif::HumanBytes;
use serde_json::Value;

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or("-")
}

/// One line each.
pub(super) fn adapters(list: &Value) -> String {
    let rows: Vec<[String; 7]> = list["data"].as_array().into_iter().flatten().map(row).collect();
    if rows.is_empty() {
        return "no adapters\n".into();
    }
    let head = ["NAME", "STATE", "WHERE", "RANK", "BYTES", "REF", "ERROR"].map(str::to_owned);
    let mut widths = [0; 7];
    for row in std::iter::once(&head).chain(&rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut page = String::new();
    for row in std::iter::once(&head).chain(&rows) {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect::<Vec<_>>();
        let _ = writeln!(page, "{}", cells.join("  ").trim_end());
    }
    page
}

/// What is not known yet is `-`.
fn row(adapter: &Value) -> [String; 7] {
    let namespace = adapter["namespace"].as_str().map_or(String::new(), |namespace| format!("{namespace}:"));
    let (min, max) = (&adapter["rank_min"], &adapter["rank_max"]);
    let is_known = max.as_u64().is_some_and(|max| max > 0);
    let rank = match is_known {
        false => "-".to_owned(),
        true if min == max => max.to_string(),
        true => format!("{min}-{max}"),
    };
    let bytes = adapter["bytes"].as_u64().filter(|_| is_known);
    let pin = if adapter["pinned"] == Value::Bool(true) { " (pinned)" } else { "" };
    [
        format!("{namespace}{}", text(adapter, "name")),
        text(adapter, "state").to_owned(),
        format!("{}{pin}", text(adapter, "residency")),
        rank,
        bytes.map_or_else(|| "-".to_owned(), |bytes| HumanBytes(bytes).to_string()),
        text(adapter, "ref").to_owned(),
        adapter["error"]["message"].as_str().unwrap_or_default().to_owned(),
    ]
}

/// One field a line.
pub(super) fn adapter(adapter: &Value) -> String {
    let mut page = String::new();
    for (name, value) in adapter.as_object().into_iter().flatten() {
        let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let _ = writeln!(page, "{name:<15} {shown}");
    }
    page
}

/// An adapter that is gone.
pub(super) fn unloaded(adapter: &Value) -> String {
    match adapter["running"].as_u64() {
        Some(running) if running > 0 => format!("{} unloaded; {running} requests finish\n", text(adapter, "name")),
        _ => format!("{} unloaded\n", text(adapter, "name")),
    }
}

/// An alias that is gone.
pub(super) fn deleted(alias: &Value) -> String {
    format!("alias {} deleted\n", text(alias, "name"))
}

/// Its versions with their shares.
pub(super) fn alias(alias: &Value) -> String {
    let versions = alias["versions"].as_array().cloned().unwrap_or_default();
    let sum: f64 = versions.iter().filter_map(|version| version["weight"].as_f64()).sum();
    let mut page =
        format!("{} version {}, sticky by {}\n", text(alias, "name"), alias["version"], text(alias, "sticky_by"));
    for version in &versions {
        let share = version["weight"].as_f64().unwrap_or(0.0) / sum.max(f64::MIN_POSITIVE);
        let _ = writeln!(page, "  {:>5.1} %  {}", share * 100.0, text(version, "adapter"));
    }
    page
}

/// All aliases, one below the other.
pub(super) fn aliases(list: &Value) -> String {
    let aliases = list["data"].as_array().cloned().unwrap_or_default();
    if aliases.is_empty() {
        return "no aliases\n".into();
    }
    let one = |entry: &Value| match text(entry, "namespace") {
        "" | "-" => alias(entry),
        namespace => format!("{namespace}: {}", alias(entry)),
    };
    aliases.iter().map(one).collect()
}

/// `8`, `8-16`, or nothing where they are unknown.
fn ranks(of: &Value) -> String {
    match (of[0].as_u64(), of[1].as_u64()) {
        (_, None | Some(0)) => String::new(),
        (Some(min), Some(max)) if min != max => format!("{min}-{max}"),
        (_, Some(max)) => max.to_string(),
    }
}

/// A dry run's report.
pub(super) fn report(report: &Value) -> String {
    let verdict = if report["ok"] == Value::Bool(true) { "can be served" } else { "cannot be served" };
    let mut page = format!("{verdict}\n");
    let strings = |name: &str| {
        let list = report[name].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>();
        list.join(", ")
    };
    let features = report["features"].as_object().into_iter().flatten();
    let features: Vec<_> =
        features.filter(|(_, on)| **on == Value::Bool(true)).map(|(name, _)| name.as_str()).collect();
    let lines = [
        ("content", text(report, "content_id").to_owned()),
        ("base", text(&report["base"], "declared").to_owned()),
        ("ranks", ranks(&report["ranks"])),
        ("modules", strings("modules")),
        ("features", features.join(", ")),
        ("tensors", format!("{} matched", report["tensors_matched"])),
        ("unmatched", strings("tensors_unmatched")),
        ("size", HumanBytes(report["bytes"].as_u64().unwrap_or(0)).to_string()),
        ("pages", report["pages_needed"].as_u64().filter(|pages| *pages > 0).map_or(String::new(), |n| n.to_string())),
    ];
    for (name, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = writeln!(page, "  {name:<10} {value}");
    }
    for refusal in report["refusals"].as_array().into_iter().flatten() {
        let _ = writeln!(page, "  refused    {}: {}", text(refusal, "code"), text(refusal, "message"));
    }
    for warning in report["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let _ = writeln!(page, "  warning    {warning}");
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pages_show_what_matters() {
        let one = json!({"name": "sql", "namespace": "acme", "state": "ready", "residency": "host", "pinned": true,
            "rank_min": 8, "rank_max": 16, "bytes": 2048, "ref": "hf://acme/sql"});
        let page = adapters(&json!({"data": [one]}));
        assert_eq!(page.lines().nth(1).unwrap(), "acme:sql  ready  host (pinned)  8-16  2.00 KiB  hf://acme/sql");
        assert_eq!(adapters(&json!({"data": []})), "no adapters\n");
        let shares = alias(&json!({"name": "a", "version": 3, "sticky_by": "key",
            "versions": [{"adapter": "x", "weight": 3.0}, {"adapter": "y", "weight": 1.0}]}));
        assert!(shares.contains("75.0 %  x") && shares.contains("25.0 %  y"), "{shares}");
        let bad = report(&json!({"ok": false, "refusals": [{"code": "adapter_rank_limit", "message": "too large"}]}));
        assert!(bad.starts_with("cannot be served\n") && bad.contains("adapter_rank_limit: too large"), "{bad}");
    }
}
