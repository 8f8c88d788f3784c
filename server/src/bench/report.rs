//! `loramux bench report`: several runs, of one server or of several, side by side.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::args::ReportArgs;
use super::figures::{Figures, Percentiles, median};
use super::machine::Machine;
use super::plot::{self, Bar};
use super::record::{self, Record, WorkloadResult};
use super::table::number;
use super::workload::Workload;

/// Lines of a document around what this writes.
const BEGIN: &str = "<!-- loramux bench report -->";
const END: &str = "<!-- end of report -->";

pub(super) fn main(args: &ReportArgs) -> anyhow::Result<ExitCode> {
    let records = args.files.iter().map(|path| Record::read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let report = Report::merge(records)?;
    match &args.markdown {
        Some(path) => write_into(path, &report.markdown())?,
        None => print!("{}", report.markdown()),
    }
    if let Some(path) = &args.plot {
        fs::write(path, report.svg()?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The plot of one run.
pub(super) fn svg_of(record: &Record) -> anyhow::Result<String> {
    Report::merge(vec![record.clone()])?.svg()
}

/// Replaces what is between the two lines, or makes a file that has them. A file without them is somebody's text.
fn write_into(path: &Path, markdown: &str) -> anyhow::Result<()> {
    let shown = path.display();
    let written = format!("{BEGIN}\n\n{markdown}\n{END}");
    let text = match fs::read_to_string(path) {
        Ok(old) => {
            let around = old.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
            match around {
                Some((before, after)) => format!("{before}{written}{after}"),
                None if old.trim().is_empty() => written + "\n",
                None => bail!("{shown} is there and has no lines `{BEGIN}` and `{END}` to write between"),
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => written + "\n",
        Err(error) => return Err(error).with_context(|| format!("cannot read {shown}")),
    };
    fs::write(path, text).with_context(|| format!("cannot write {shown}"))
}

/// All runs of one server.
struct Served {
    name: String,
    version: Option<String>,
    results: Vec<WorkloadResult>,
    start_to_ready_s: Vec<f64>,
    ready_rss_bytes: Vec<f64>,
    end_rss_bytes: Vec<f64>,
}

struct Report {
    servers: Vec<Served>,
    machines: Vec<Machine>,
}

impl Report {
    /// Puts the rounds of each server's workloads together.
    fn merge(records: Vec<Record>) -> anyhow::Result<Self> {
        let (mut servers, mut machines): (Vec<Served>, Vec<Machine>) = (Vec::new(), Vec::new());
        for record in records {
            if !machines.contains(&record.machine) {
                machines.push(record.machine);
            }
            let known = servers.iter().position(|served| served.name == record.name);
            let index = known.unwrap_or_else(|| {
                servers.push(Served::new(&record.name));
                servers.len() - 1
            });
            let Some(served) = servers.get_mut(index) else { continue };
            served.version = record.server.version.or(served.version.take());
            let bytes = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
            served.start_to_ready_s.extend(record.server.start_to_ready_s);
            served.ready_rss_bytes.extend(bytes(record.server.ready_rss_bytes));
            served.end_rss_bytes.extend(bytes(record.server.end_rss_bytes));
            for result in record.results {
                served.add(result)?;
            }
        }
        for served in &mut servers {
            record::settle(&mut served.results);
        }
        let report = Self { servers, machines };
        for workload in report.workloads() {
            for result in report.servers.iter().filter_map(|served| served.result(&workload.label)) {
                if !result.workload.is_same_load(workload) {
                    bail!("`{}` is not the same load in all files; use label=.. to tell them apart", workload.label);
                }
            }
        }
        Ok(report)
    }

    /// Each once, in the order of the files.
    fn workloads(&self) -> Vec<&Workload> {
        let mut found: Vec<&Workload> = Vec::new();
        for result in self.servers.iter().flat_map(|served| &served.results) {
            if !found.iter().any(|workload| workload.label == result.workload.label) {
                found.push(&result.workload);
            }
        }
        found
    }

    fn svg(&self) -> anyhow::Result<String> {
        let mut bars = Vec::new();
        for workload in self.workloads() {
            for (server, served) in self.servers.iter().enumerate() {
                if let Some(figures) = served.figures(&workload.label) {
                    bars.push(Bar {
                        workload: workload.label.clone(),
                        server,
                        output_tokens_per_s: figures.output_tokens_per_s,
                        ttft_ms: figures.ttft_ms.map(|points| points.p50),
                    });
                }
            }
        }
        let names: Vec<String> = self.servers.iter().map(|served| served.name.clone()).collect();
        plot::svg(&bars, &names)
    }

    fn markdown(&self) -> String {
        let mut page = String::new();
        // Writing to a String does not fail.
        for machine in &self.machines {
            let _ = writeln!(page, "Machine: {}", machine.summary());
        }
        self.servers_table(&mut page);
        if self.servers.len() > 1 {
            self.ratios(&mut page);
        }
        for workload in self.workloads() {
            self.workload_table(&mut page, workload);
        }
        page
    }

    fn servers_table(&self, page: &mut String) {
        let _ = writeln!(page, "\n| server | version | start to ready | resident when ready | resident at the end |");
        let _ = writeln!(page, "|---|---|---|---|---|");
        for served in &self.servers {
            let of = |values: &[f64], unit: &str, scale: f64| {
                let shown = median(values.iter().copied()).map(|value| format!("{} {unit}", number(value / scale)));
                shown.unwrap_or_else(|| "-".into())
            };
            let mib = f64::from(1 << 20);
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} |",
                cell(&served.name),
                cell(served.version.as_deref().unwrap_or("-")),
                of(&served.start_to_ready_s, "s", 1.0),
                of(&served.ready_rss_bytes, "MiB", mib),
                of(&served.end_rss_bytes, "MiB", mib),
            );
        }
    }

    /// The first server against the best of the others, figure by figure.
    fn ratios(&self, page: &mut String) {
        let Some((first, others)) = self.servers.split_first() else { return };
        let name = cell(&first.name);
        let _ = writeln!(
            page,
            "\n{name} against the best of the others (tokens a second: more is better; times: less is better):\n"
        );
        let _ = writeln!(page, "| workload | output tok/s | TTFT p50 | ITL p50 |\n|---|---|---|---|");
        for workload in self.workloads() {
            let label = &workload.label;
            let ratio = |field: fn(&Figures) -> Option<f64>, is_more_better: bool| {
                let own = first.figures(label).and_then(field)?;
                let found = others.iter().filter_map(|served| Some((served, served.figures(label).and_then(field)?)));
                let sign = if is_more_better { 1.0 } else { -1.0 };
                let (best, value) = found.max_by(|a, b| (sign * a.1).total_cmp(&(sign * b.1)))?;
                (value > 0.0).then(|| format!("{:.2} x {}", own / value, cell(&best.name)))
            };
            let shown = |text: Option<String>| text.unwrap_or_else(|| "-".into());
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} |",
                cell(label),
                shown(ratio(|figures| Some(figures.output_tokens_per_s), true)),
                shown(ratio(|figures| figures.ttft_ms.map(|points| points.p50), false)),
                shown(ratio(|figures| figures.itl_ms.map(|points| points.p50), false)),
            );
        }
    }

    fn workload_table(&self, page: &mut String, workload: &Workload) {
        let _ = writeln!(page, "\n**{}**: {}\n", cell(&workload.label), workload.summary());
        let _ = writeln!(
            page,
            "| server | rounds | output tok/s | total tok/s | req/s | TTFT p50 / p90 / p99 ms | ITL p50 / p90 / p99 ms | \
             e2e p50 / p99 ms | own base | failed |\n|---|---|---|---|---|---|---|---|---|---|"
        );
        for (served, result) in self.servers.iter().filter_map(|served| Some((served, served.result(&workload.label)?)))
        {
            let Some(figures) = &result.median else {
                let (name, rounds, failed) = (cell(&served.name), result.rounds.len(), result.failed());
                let _ = writeln!(page, "| {name} | {rounds} | - | - | - | - | - | - | - | {failed} |");
                continue;
            };
            let base = result.against_base.as_ref().map(|base| format!("{:.2}", base.output_tokens_per_s));
            let points = |points: Option<Percentiles>| {
                points.map_or_else(|| "-".into(), |p| [p.p50, p.p90, p.p99].map(number).join(" / "))
            };
            let e2e = figures.e2e_ms.map_or_else(|| "-".into(), |p| [p.p50, p.p99].map(number).join(" / "));
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} | {} | {} | {e2e} | {} | {} |",
                cell(&served.name),
                result.rounds.len(),
                number(figures.output_tokens_per_s),
                number(figures.total_tokens_per_s),
                number(figures.requests_per_s),
                points(figures.ttft_ms),
                points(figures.itl_ms),
                base.unwrap_or_else(|| "-".into()),
                result.failed(),
            );
        }
        self.intruders(page, workload);
    }

    fn intruders(&self, page: &mut String, workload: &Workload) {
        for served in &self.servers {
            let Some(intruder) = served.figures(&workload.label).and_then(|figures| figures.intruder) else { continue };
            let p99 = |points: Option<Percentiles>| points.map_or_else(|| "-".into(), |points| number(points.p99));
            let _ = writeln!(
                page,
                "\n{}: the long prompt's first token came after {} ms; p99 between the streams' tokens was {} ms beside it and \
                 {} ms without.",
                cell(&served.name),
                number(intruder.ttft_ms),
                p99(intruder.beside_ms),
                p99(intruder.without_ms),
            );
        }
    }
}

impl Served {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            version: None,
            results: Vec::new(),
            start_to_ready_s: Vec::new(),
            ready_rss_bytes: Vec::new(),
            end_rss_bytes: Vec::new(),
        }
    }

    fn add(&mut self, result: WorkloadResult) -> anyhow::Result<()> {
        let known = self.results.iter_mut().find(|known| known.workload.label == result.workload.label);
        match known {
            Some(known) if !known.workload.is_same_load(&result.workload) => {
                bail!("`{}` of {} is not the same load in all files", result.workload.label, self.name);
            }
            Some(known) => known.rounds.extend(result.rounds),
            None => self.results.push(result),
        }
        Ok(())
    }

    fn result(&self, label: &str) -> Option<&WorkloadResult> {
        self.results.iter().find(|result| result.workload.label == label)
    }

    fn figures(&self, label: &str) -> Option<&Figures> {
        self.result(label)?.median.as_ref()
    }
}

/// Text that stays in its cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::super::record::support::{record, result};
    use super::*;

    #[test]
    fn the_first_server_is_held_against_the_best_of_the_others_figure_by_figure() {
        let report = Report::merge(vec![
            record("ours", vec![result("base", &[1.0]), result("one", &[2.0])]),
            record("slow", vec![result("base", &[4.0])]),
            record("quick|er", vec![result("base", &[2.0])]),
        ])
        .unwrap();
        let page = report.markdown();
        // Two tokens in 1 s against two in 2 s; the first of them after 0.5 s against 1 s, and so the gap.
        assert!(page.contains("| base | 2.00 x quick\\|er | 0.50 x quick\\|er | 0.50 x quick\\|er |"), "{page}");
        assert!(page.contains("| one | - | - | - |"), "{page}");
        assert!(page.contains("| ours | 1 | 1.00 | 1.50 |"), "{page}"); // `one`: 2 tokens and a prompt of 1 in 2 s
        assert!(page.contains("| slow | - | 2.00 s | 3.00 MiB | - |"), "{page}");
        let svg = report.svg().unwrap();
        assert!(svg.contains("slow") && svg.contains("quick|er"), "{svg}");
    }

    #[test]
    fn rounds_of_several_files_of_a_server_are_put_together() {
        let files =
            || [1.0, 9.0, 2.0].map(|wall_s| record("ours", vec![result("base", &[wall_s]), result("one", &[4.0])]));
        let report = Report::merge(files().into()).unwrap();
        assert_eq!(report.servers.len(), 1);
        let [base, one] = &report.servers[0].results[..] else { panic!("two workloads") };
        assert_eq!((base.rounds.len(), base.median.as_ref().unwrap().wall_s), (3, 2.0));
        assert_eq!(one.against_base.as_ref().unwrap().output_tokens_per_s, 0.5);
        assert!(!report.markdown().contains("against the best"));
    }

    #[test]
    fn loads_that_differ_under_one_label_are_refused() {
        let files = |name: &str| {
            vec![
                record("ours", vec![result("base:label=x", &[1.0])]),
                record(name, vec![result("base:c=1:label=x", &[1.0])]),
            ]
        };
        for name in ["ours", "theirs"] {
            let error = Report::merge(files(name)).err().unwrap().to_string();
            assert!(error.contains("`x`") && error.contains("not the same load"), "{error}");
        }
    }

    #[test]
    fn only_the_part_between_the_lines_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("page.md");
        let page = format!("{BEGIN}\n\nnew\n\n{END}");
        write_into(&path, "new\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{page}\n"));
        for (old, want) in [
            (format!("a\n{BEGIN}\nold\n{END}\nb\n"), Some(format!("a\n{page}\nb\n"))),
            (" \n".into(), Some(format!("{page}\n"))),
            (format!("a {BEGIN} without an end"), None),
            ("mine".into(), None),
        ] {
            fs::write(&path, &old).unwrap();
            assert_eq!(write_into(&path, "new\n").is_ok(), want.is_some(), "{old}");
            assert_eq!(fs::read_to_string(&path).unwrap(), want.unwrap_or(old));
        }
    }
}
