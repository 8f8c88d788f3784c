//! What a run leaves: a JSON file that says what was measured, where, and how to measure it again.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::figures::{Figures, Round, rounded};
use super::machine::Machine;
use super::workload::Workload;

/// Name of this form of the file. A change that old readers cannot read gets another number.
pub(super) const SCHEMA: &str = "loramux-bench/1";
/// Largest file to read.
const BYTES_MAX: u64 = 256 << 20;

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// `loramux-bench/1`.
    pub(crate) schema: String,
    /// What reports call the server.
    pub(crate) name: String,
    /// Version of this client.
    pub(crate) client_version: String,
    /// When it began, s since 1970.
    pub(crate) started_unix_s: u64,
    /// What was typed, secrets covered.
    pub(crate) command: Vec<String>,
    /// Prompts, lengths, popularity and arrivals are drawn from it.
    pub(crate) seed: u64,
    /// Rounds that were asked for.
    pub(crate) repeats: usize,
    /// Where the client ran.
    pub(crate) machine: Machine,
    /// What was measured.
    pub(crate) server: Server,
    /// One for each workload.
    pub(crate) results: Vec<WorkloadResult>,
    /// Why it ended before its end, if it did.
    pub(crate) stopped: Option<String>,
}

/// The server of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Server {
    /// Where it listens.
    pub(crate) url: String,
    /// What it says its version is.
    pub(crate) version: Option<String>,
    /// Its source revision, if that was typed.
    pub(crate) commit: Option<String>,
    /// Its base model.
    pub(crate) base_model: String,
    /// Adapters that the requests were spread over.
    pub(crate) adapters: usize,
    /// How it was started, if this run did that; secrets covered.
    pub(crate) command: Option<Vec<String>>,
    /// From the start of the process to the first good answer of its health check, s.
    pub(crate) start_to_ready_s: Option<f64>,
    /// Resident memory of its processes when it was ready, bytes.
    pub(crate) ready_rss_bytes: Option<u64>,
    /// The same at the end of the run.
    pub(crate) end_rss_bytes: Option<u64>,
}

/// A workload's rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct WorkloadResult {
    /// What was sent.
    pub(crate) workload: Workload,
    /// Each round.
    pub(crate) rounds: Vec<Round>,
    /// The median of each figure over the rounds with complete replies.
    pub(crate) median: Option<Figures>,
    /// Against the same load without adapters, if it was in the run.
    pub(crate) against_base: Option<AgainstBase>,
}

/// What the adapters of a workload cost: 1 = nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct AgainstBase {
    /// The workload that it is held against.
    pub(crate) label: String,
    /// Output tokens a second, divided by the base's.
    pub(crate) output_tokens_per_s: f64,
    /// Median time to first token, divided by the base's.
    pub(crate) ttft_p50: Option<f64>,
    /// Median gap between tokens, divided by the base's.
    pub(crate) itl_p50: Option<f64>,
}

impl WorkloadResult {
    pub(super) fn new(workload: Workload) -> Self {
        Self { workload, rounds: Vec::new(), median: None, against_base: None }
    }

    /// Requests that failed, over all rounds.
    pub(crate) fn failed(&self) -> usize {
        self.rounds.iter().map(|round| round.failed).sum()
    }

    /// Computes the medians from the rounds.
    pub(super) fn settle(&mut self) {
        let whole: Vec<&Figures> =
            self.rounds.iter().filter(|round| round.requests > 0).map(|round| &round.figures).collect();
        self.median = Figures::median(&whole);
    }
}

/// Computes the medians of all workloads and what each costs against its base.
pub(super) fn settle(results: &mut [WorkloadResult]) {
    for result in results.iter_mut() {
        result.settle();
    }
    let bases: Vec<(Workload, Figures)> = results
        .iter()
        .filter(|result| !result.workload.uses_adapters())
        .filter_map(|result| Some((result.workload.clone(), result.median.clone()?)))
        .collect();
    for result in results.iter_mut().filter(|result| result.workload.uses_adapters()) {
        let base = bases.iter().find(|(base, _)| base.is_same_load(&result.workload));
        result.against_base = base.and_then(|(base, figures)| against(&base.label, figures, result.median.as_ref()?));
    }
}

fn against(label: &str, base: &Figures, figures: &Figures) -> Option<AgainstBase> {
    let ratio = |a: f64, b: f64| (b > 0.0).then(|| rounded(a / b));
    let p50 = |field: fn(&Figures) -> Option<f64>| ratio(field(figures)?, field(base)?);
    Some(AgainstBase {
        label: label.to_owned(),
        output_tokens_per_s: ratio(figures.output_tokens_per_s, base.output_tokens_per_s)?,
        ttft_p50: p50(|figures| figures.ttft_ms.map(|points| points.p50)),
        itl_p50: p50(|figures| figures.itl_ms.map(|points| points.p50)),
    })
}

impl Record {
    /// Writes it, for people to read too.
    pub(super) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self).context("cannot write the record")?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads one that this or an older version wrote.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let bytes = fs::metadata(path).with_context(|| format!("cannot read {shown}"))?.len();
        if bytes > BYTES_MAX {
            bail!("{shown}: {bytes} bytes; a record has at most {BYTES_MAX}");
        }
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
        let record: Self =
            serde_json::from_str(&text).with_context(|| format!("{shown}: not a record of `loramux bench --json`"))?;
        if record.schema != SCHEMA {
            bail!("{shown}: its schema is `{}`; this version reads `{SCHEMA}`", record.schema);
        }
        Ok(record)
    }
}

/// What was typed, with `***` in the place of every secret.
pub(super) fn covered<'a>(typed: impl Iterator<Item = &'a str>) -> Vec<String> {
    const SECRET: [&str; 5] = ["key", "token-value", "header", "secret", "password"];
    let is_secret = |flag: &str| flag.starts_with("--") && SECRET.iter().any(|word| flag.contains(word));
    let mut covers_next = false;
    let mut cover = |text: &str| {
        if std::mem::take(&mut covers_next) {
            return "***".to_owned();
        }
        let (flag, value) = text.split_once('=').map_or((text, None), |(flag, value)| (flag, Some(value)));
        if is_secret(flag) && value.is_some() {
            return format!("{flag}=***");
        }
        covers_next = is_secret(flag);
        text.to_owned()
    };
    typed.map(&mut cover).collect()
}

/// Records whose figures can be checked by hand.
#[cfg(test)]
pub(super) mod support {
    use super::super::client::Answered;
    use super::super::figures::{Cost, Outcomes};
    use super::super::workload::Overrides;
    use super::*;

    /// A round for each of `walls_s`, of one request that got two tokens: in the middle and at the end.
    pub(in super::super) fn result(typed: &str, walls_s: &[f64]) -> WorkloadResult {
        let mut result = WorkloadResult::new(Workload::parse(typed, &Overrides::default()).unwrap());
        for wall_s in walls_s {
            let arrivals_s = vec![wall_s / 2.0, *wall_s];
            let answered =
                vec![Answered { start_s: 0.0, arrivals_s, end_s: *wall_s, output_tokens: 2, prompt_tokens: 1 }];
            result.rounds.push(Outcomes { answered, ..Outcomes::default() }.round(Cost::default()));
        }
        result
    }

    /// A run of a server called `name`.
    pub(in super::super) fn record(name: &str, mut results: Vec<WorkloadResult>) -> Record {
        settle(&mut results);
        Record {
            schema: SCHEMA.to_owned(),
            name: name.to_owned(),
            client_version: "0".into(),
            started_unix_s: 0,
            command: Vec::new(),
            seed: 0,
            repeats: 1,
            machine: Machine::default(),
            server: Server { start_to_ready_s: Some(2.0), ready_rss_bytes: Some(3 << 20), ..Server::default() },
            results,
            stopped: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::{Cost, Outcomes};
    use super::support::result;
    use super::*;

    #[test]
    fn adapters_are_held_against_the_base_of_the_same_load() {
        let mut results = vec![
            result("distinct", &[4.0, 4.0]),
            result("base:c=1", &[100.0]),
            result("base", &[1.0, 3.0, 2.0]),
            result("one:output=1", &[1.0]),
        ];
        results[2].rounds.push(Outcomes::default().round(Cost::default())); // all failed: not in the median
        settle(&mut results);
        let against = results[0].against_base.as_ref().unwrap();
        assert_eq!((against.label.as_str(), against.output_tokens_per_s), ("base", 0.5));
        assert_eq!((against.ttft_p50, against.itl_p50), (Some(2.0), Some(2.0)));
        assert!(results[1..].iter().all(|result| result.against_base.is_none()));
    }

    #[test]
    fn secrets_of_the_command_are_covered() {
        let typed =
            ["bench", "--api-key", "s3cret", "--url", "http://x", "--admin-key=s3cret", "--", "--key-file", "f"];
        let shown = covered(typed.into_iter()).join(" ");
        assert_eq!(shown, "bench --api-key *** --url http://x --admin-key=*** -- --key-file ***");
    }
}
