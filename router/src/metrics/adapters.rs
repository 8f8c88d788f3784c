//! Counters by adapter. A label is a name that everybody may read, for the life of the process; what has none counts as `other`.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use super::histogram::Histogram;
use super::render::escape;

/// The label of all that have none.
pub(crate) const OTHER: &str = "other";
/// Adapters that get a label of their own; the rest share `other`.
pub(super) const LABELS_MAX: usize = 64;
/// Bytes of the labels together that nobody listed: each stands on several lines of a page that is to stay small.
const LABEL_BYTES_MAX: usize = 768;
/// Of these adapters, the ones that have times of their own: a histogram is many lines.
const TIMED_MAX: usize = 12;
/// Seconds.
const BOUNDS: &[f64] = &[0.1, 0.5, 1.0, 5.0, 30.0];

/// How much is counted by adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdapterMetrics {
    /// Nothing.
    Off,
    /// Requests and tokens.
    #[default]
    Counters,
    /// Queue times and times to the first token too.
    Full,
}

#[derive(Debug, Default)]
pub(super) struct AdapterCounters {
    level: AdapterMetrics,
    labels: HashMap<String, usize>,
    label_bytes: usize,
    /// `[0]` is `other`.
    pub(super) counts: Vec<AdapterCount>,
}

#[derive(Debug, Default)]
pub(super) struct AdapterCount {
    label: String,
    pub(super) outcomes: BTreeMap<&'static str, u64>,
    pub(super) prompt_tokens: u64,
    pub(super) generation_tokens: u64,
    times: Option<Box<AdapterTimes>>,
}

#[derive(Debug)]
struct AdapterTimes {
    queue: Histogram,
    first_token: Histogram,
}

impl AdapterCount {
    fn new(label: &str, is_timed: bool) -> Self {
        let times = || Box::new(AdapterTimes { queue: Histogram::new(BOUNDS), first_token: Histogram::new(BOUNDS) });
        Self { label: label.to_owned(), times: is_timed.then(times), ..Self::default() }
    }
}

impl AdapterCounters {
    /// `names` get their labels now.
    pub(super) fn new(level: AdapterMetrics, names: &[String]) -> Self {
        let mut counters = Self { level, ..Self::default() };
        for name in names.iter().filter(|_| level != AdapterMetrics::Off) {
            counters.index(name);
            counters.label_bytes = 0; // who lists names wants them all
        }
        counters
    }

    /// Where `name` is counted; `None`: nowhere.
    pub(super) fn index(&mut self, name: &str) -> Option<usize> {
        if self.level == AdapterMetrics::Off {
            return None;
        }
        let is_full = self.level == AdapterMetrics::Full;
        if self.counts.is_empty() {
            self.counts.push(AdapterCount::new(OTHER, is_full));
        }
        if name == OTHER {
            return Some(0);
        }
        if let Some(&index) = self.labels.get(name) {
            return Some(index);
        }
        let index = self.counts.len();
        if index > LABELS_MAX || self.label_bytes + name.len() > LABEL_BYTES_MAX {
            return Some(0);
        }
        self.label_bytes += name.len();
        self.labels.insert(name.to_owned(), index);
        self.counts.push(AdapterCount::new(name, is_full && index <= TIMED_MAX));
        Some(index)
    }

    /// Seconds until a request of the adapter at `index` was admitted, and until its first token.
    pub(super) fn observe(&self, index: usize, queue: Option<f64>, first_token: Option<f64>) {
        let own = self.counts.get(index).and_then(|count| count.times.as_deref());
        let Some(times) = own.or_else(|| self.counts.first()?.times.as_deref()) else { return };
        queue.into_iter().for_each(|seconds| times.queue.observe(seconds));
        first_token.into_iter().for_each(|seconds| times.first_token.observe(seconds));
    }

    pub(super) fn render(&self, out: &mut String) {
        if self.level == AdapterMetrics::Off {
            return;
        }
        let name = "loramux_adapter_requests_total";
        head(out, name, "counter", "Requests by adapter and outcome.");
        for count in &self.counts {
            for (outcome, n) in &count.outcomes {
                let _ = writeln!(out, "{name}{{adapter=\"{}\",outcome=\"{outcome}\"}} {n}", escape(&count.label));
            }
        }
        type Read = fn(&AdapterCount) -> u64;
        let tokens: [(&str, &str, Read); 2] = [
            ("loramux_adapter_prompt_tokens_total", "Prompt tokens by adapter.", |count| count.prompt_tokens),
            ("loramux_adapter_generation_tokens_total", "Generated tokens by adapter.", |count| {
                count.generation_tokens
            }),
        ];
        for (name, help, read) in tokens {
            head(out, name, "counter", help);
            for count in &self.counts {
                let _ = writeln!(out, "{name}{{adapter=\"{}\"}} {}", escape(&count.label), read(count));
            }
        }
        if self.level == AdapterMetrics::Full {
            self.render_times(out);
        }
    }

    fn render_times(&self, out: &mut String) {
        type Read = fn(&AdapterTimes) -> &Histogram;
        let families: [(&str, &str, Read); 2] = [
            ("loramux_adapter_ttft_seconds", "From submission to the first token, by adapter.", |t| &t.first_token),
            ("loramux_adapter_queue_seconds", "From submission to admission, by adapter.", |t| &t.queue),
        ];
        for (name, help, read) in families {
            head(out, name, "histogram", help);
            for count in &self.counts {
                let Some(times) = count.times.as_deref() else { continue };
                read(times).series(name, &format!("adapter=\"{}\"", escape(&count.label)), out);
            }
        }
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}
