//! From the times of single requests to the figures of a round, and from rounds to their medians.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::client::{Answered, Failure};

/// Points of a distribution, milliseconds; nearest rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Percentiles {
    /// The median.
    pub(crate) p50: f64,
    /// Nine of ten are below it.
    pub(crate) p90: f64,
    /// All but one of a hundred are below it.
    pub(crate) p99: f64,
}

impl Percentiles {
    /// Of any values; `None` of none.
    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let last = values.len().checked_sub(1)?;
        let at = |part: f64| values.get((part * last as f64).round() as usize).copied().map(rounded);
        Some(Self { p50: at(0.5)?, p90: at(0.9)?, p99: at(0.99)? })
    }

    fn median(all: &[Self]) -> Option<Self> {
        let of = |field: fn(&Self) -> f64| median(all.iter().map(field));
        Some(Self { p50: of(|p| p.p50)?, p90: of(|p| p.p90)?, p99: of(|p| p.p99)? })
    }
}

/// What a long prompt among streams did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Intruder {
    /// Its own time to first token, ms.
    pub(crate) ttft_ms: f64,
    /// Gaps between the streams' tokens while it was computed, ms.
    pub(crate) beside_ms: Option<Percentiles>,
    /// The other gaps, ms.
    pub(crate) without_ms: Option<Percentiles>,
}

/// What is measured of a round; of several rounds, the median of each figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// From the first request's start to the last one's end, s.
    pub(crate) wall_s: f64,
    /// Tokens of complete replies a second.
    pub(crate) output_tokens_per_s: f64,
    /// The same with their prompts.
    pub(crate) total_tokens_per_s: f64,
    /// Complete replies a second.
    pub(crate) requests_per_s: f64,
    /// From a request's first byte to its first token.
    pub(crate) ttft_ms: Option<Percentiles>,
    /// Gaps between pieces of a stream that bring tokens.
    pub(crate) itl_ms: Option<Percentiles>,
    /// Time of one output token after the first, of each request.
    pub(crate) tpot_ms: Option<Percentiles>,
    /// From a request's first byte to its last.
    pub(crate) e2e_ms: Option<Percentiles>,
    /// Where a long prompt was sent among the streams.
    pub(crate) intruder: Option<Intruder>,
    /// Processor time of this client, s.
    pub(crate) client_cpu_s: f64,
    /// Processor time of the server's processes, s, where they are known.
    pub(crate) server_cpu_s: Option<f64>,
    /// Resident memory of the server's processes after the round, where they are known.
    pub(crate) server_rss_bytes: Option<f64>,
}

/// Failed requests of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Errors {
    /// `connect`, `http_404`, `timeout`, `closed`, `error_event`, `token_count` or `not_a_stream`.
    pub(crate) kind: String,
    /// How many.
    pub(crate) count: usize,
    /// What the first one said.
    pub(crate) first: String,
}

/// One round of a workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Round {
    /// Complete replies.
    pub(crate) requests: usize,
    /// Requests without one.
    pub(crate) failed: usize,
    /// Tokens of the complete replies.
    pub(crate) output_tokens: usize,
    /// Tokens of their prompts.
    pub(crate) prompt_tokens: usize,
    /// Failures by kind.
    pub(crate) errors: Vec<Errors>,
    /// What was measured.
    #[serde(flatten)]
    pub(crate) figures: Figures,
}

/// Processor time and memory that a round took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    pub(super) client_cpu_s: f64,
    pub(super) server_cpu_s: Option<f64>,
    pub(super) server_rss_bytes: Option<f64>,
}

/// What came of the requests of a round.
#[derive(Debug, Default)]
pub(super) struct Outcomes {
    pub(super) answered: Vec<Answered>,
    pub(super) failures: Vec<Failure>,
    pub(super) intruder: Option<Answered>,
}

impl Outcomes {
    pub(super) fn round(&self, cost: Cost) -> Round {
        let answered = &self.answered;
        // The long prompt is in the figures of its own, and in no other.
        let first = answered.iter().map(|one| one.start_s).fold(f64::INFINITY, f64::min);
        let last = answered.iter().map(|one| one.end_s).fold(0.0, f64::max);
        let wall_s = if answered.is_empty() { 0.0 } else { last - first };
        let per_s = |count: usize| if wall_s > 0.0 { rounded(count as f64 / wall_s) } else { 0.0 };
        let output_tokens = answered.iter().map(|one| one.output_tokens).sum();
        let prompt_tokens = answered.iter().map(|one| one.prompt_tokens).sum();
        let of = |each: fn(&Answered) -> Option<f64>| Percentiles::of(answered.iter().filter_map(each).collect());
        let gaps = answered.iter().flat_map(Answered::gaps).map(|(_, gap_s)| gap_s * 1e3).collect();
        Round {
            requests: answered.len(),
            failed: self.failures.len(),
            output_tokens,
            prompt_tokens,
            errors: errors(&self.failures),
            figures: Figures {
                wall_s: rounded(wall_s),
                output_tokens_per_s: per_s(output_tokens),
                total_tokens_per_s: per_s(output_tokens + prompt_tokens),
                requests_per_s: per_s(answered.len()),
                ttft_ms: of(|one| Some((one.first_token_s()? - one.start_s) * 1e3)),
                itl_ms: Percentiles::of(gaps),
                tpot_ms: of(Answered::tpot_ms),
                e2e_ms: of(|one| Some((one.end_s - one.start_s) * 1e3)),
                intruder: self.intruder.as_ref().and_then(|intruder| beside(intruder, answered)),
                client_cpu_s: rounded(cost.client_cpu_s),
                server_cpu_s: cost.server_cpu_s.map(rounded),
                server_rss_bytes: cost.server_rss_bytes,
            },
        }
    }
}

/// Splits the streams' gaps by whether the long prompt was being computed in them.
fn beside(intruder: &Answered, streams: &[Answered]) -> Option<Intruder> {
    let until_s = intruder.first_token_s()?;
    let (mut beside, mut without) = (Vec::new(), Vec::new());
    for (end_s, gap_s) in streams.iter().flat_map(Answered::gaps) {
        let overlaps = end_s > intruder.start_s && end_s - gap_s < until_s;
        if overlaps { &mut beside } else { &mut without }.push(gap_s * 1e3);
    }
    Some(Intruder {
        ttft_ms: rounded((until_s - intruder.start_s) * 1e3),
        beside_ms: Percentiles::of(beside),
        without_ms: Percentiles::of(without),
    })
}

fn errors(failures: &[Failure]) -> Vec<Errors> {
    let mut kinds: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for failure in failures {
        kinds.entry(&failure.kind).or_insert((0, &failure.message)).0 += 1;
    }
    let one = |(kind, (count, first)): (&str, (usize, &str))| Errors { kind: kind.into(), count, first: first.into() };
    kinds.into_iter().map(one).collect()
}

impl Figures {
    /// The median of each figure over the rounds that have it; `None` of no rounds.
    pub(crate) fn median(rounds: &[&Self]) -> Option<Self> {
        let of = |field: fn(&Self) -> f64| median(rounds.iter().map(|figures| field(figures)));
        let some = |field: fn(&Self) -> Option<f64>| median(rounds.iter().filter_map(|figures| field(figures)));
        let points = |field: fn(&Self) -> Option<Percentiles>| {
            Percentiles::median(&rounds.iter().filter_map(|figures| field(figures)).collect::<Vec<_>>())
        };
        let intruder_ms = some(|figures| figures.intruder.map(|intruder| intruder.ttft_ms));
        Some(Self {
            wall_s: of(|figures| figures.wall_s)?,
            output_tokens_per_s: of(|figures| figures.output_tokens_per_s)?,
            total_tokens_per_s: of(|figures| figures.total_tokens_per_s)?,
            requests_per_s: of(|figures| figures.requests_per_s)?,
            ttft_ms: points(|figures| figures.ttft_ms),
            itl_ms: points(|figures| figures.itl_ms),
            tpot_ms: points(|figures| figures.tpot_ms),
            e2e_ms: points(|figures| figures.e2e_ms),
            intruder: intruder_ms.map(|ttft_ms| Intruder {
                ttft_ms,
                beside_ms: points(|figures| figures.intruder.and_then(|intruder| intruder.beside_ms)),
                without_ms: points(|figures| figures.intruder.and_then(|intruder| intruder.without_ms)),
            }),
            client_cpu_s: of(|figures| figures.client_cpu_s)?,
            server_cpu_s: some(|figures| figures.server_cpu_s),
            server_rss_bytes: some(|figures| figures.server_rss_bytes),
        })
    }
}

/// The middle value, or the mean of the two in the middle; `None` of none.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.get(values.len().checked_sub(1)? / 2)?, values.get(values.len() / 2)?);
    Some(rounded((low + high) / 2.0))
}

/// Four decimals: the clock says no more, and files stay readable.
pub(crate) fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(start_s: f64, arrivals_s: &[f64]) -> Answered {
        let end_s = arrivals_s[arrivals_s.len() - 1];
        Answered { start_s, arrivals_s: arrivals_s.to_vec(), end_s, output_tokens: arrivals_s.len(), prompt_tokens: 10 }
    }

    #[test]
    fn percentiles_and_medians_are_those_of_the_sorted_values() {
        let points = Percentiles::of((1..=101).rev().map(f64::from).collect());
        assert_eq!(points, Some(Percentiles { p50: 51.0, p90: 91.0, p99: 100.0 }));
        let points = Percentiles::of((1..=8).map(f64::from).collect());
        assert_eq!(points, Some(Percentiles { p50: 5.0, p90: 7.0, p99: 8.0 }));
        assert_eq!(Percentiles::of(vec![7.0]), Some(Percentiles { p50: 7.0, p90: 7.0, p99: 7.0 }));
        assert_eq!(Percentiles::of(Vec::new()), None);
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }

    #[test]
    fn a_round_counts_from_the_first_start_to_the_last_end() {
        let outcomes = Outcomes {
            answered: vec![answered(1.0, &[1.5, 2.0, 2.5]), answered(2.0, &[2.1, 2.3, 3.0])],
            ..Outcomes::default()
        };
        let round = outcomes.round(Cost::default());
        assert_eq!((round.requests, round.output_tokens, round.prompt_tokens), (2, 6, 20));
        let figures = round.figures;
        assert_eq!((figures.wall_s, figures.output_tokens_per_s, figures.total_tokens_per_s), (2.0, 3.0, 13.0));
        assert_eq!(figures.requests_per_s, 1.0);
        assert_eq!(figures.ttft_ms.unwrap().p99, 500.0);
        assert_eq!(figures.itl_ms.unwrap().p99, 700.0);
        assert_eq!(figures.tpot_ms.unwrap().p50, 500.0);
        assert_eq!(figures.e2e_ms.unwrap().p50, 1500.0);
    }

    #[test]
    fn gaps_beside_a_long_prompt_are_told_from_the_others() {
        let outcomes = Outcomes {
            answered: vec![answered(0.0, &[1.0, 2.0, 2.75, 6.75, 8.25])],
            intruder: Some(answered(2.5, &[5.5])),
            ..Outcomes::default()
        };
        let intruder = outcomes.round(Cost::default()).figures.intruder.unwrap();
        assert_eq!(intruder.ttft_ms, 3000.0);
        // It ran from 2.5 to 5.5: in the gap from 2 to 2.75 and in that to 6.75, not in the first and the last.
        let (beside, without) = (intruder.beside_ms.unwrap(), intruder.without_ms.unwrap());
        assert_eq!((beside.p50, beside.p99, without.p50, without.p99), (4000.0, 4000.0, 1500.0, 1500.0));
    }

    #[test]
    fn failures_are_counted_by_kind_and_the_first_is_kept() {
        let failure = |kind: &str, message: &str| Failure { kind: kind.into(), message: message.into() };
        let failures = vec![failure("timeout", "a"), failure("connect", "b"), failure("timeout", "c")];
        let round = Outcomes { failures, ..Outcomes::default() }.round(Cost::default());
        assert_eq!((round.failed, round.requests, round.figures.output_tokens_per_s), (3, 0, 0.0));
        let found: Vec<_> = round.errors.iter().map(|e| (e.kind.as_str(), e.count, e.first.as_str())).collect();
        assert_eq!(found, [("connect", 1, "b"), ("timeout", 2, "a")]);
    }

    #[test]
    fn the_median_takes_each_figure_by_itself() {
        let round = |arrivals: &[f64]| {
            Outcomes { answered: vec![answered(0.0, arrivals)], ..Outcomes::default() }.round(Cost::default()).figures
        };
        let rounds = [round(&[1.0, 2.0]), round(&[0.5, 4.0]), round(&[0.2, 1.0])];
        let median = Figures::median(&rounds.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!((median.wall_s, median.ttft_ms.unwrap().p50, median.itl_ms.unwrap().p50), (2.0, 500.0, 1000.0));
        assert_eq!(Figures::median(&[]), None);
    }
}
