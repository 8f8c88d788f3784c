//! What the engine thread measures itself: its steps, and the masks of grammars.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::histogram::Histogram;

/// Seconds of a step.
const SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5];
/// Seconds of a mask.
const MASK_SECONDS: &[f64] = &[0.0001, 0.0005, 0.002, 0.01, 0.1, 1.0];
/// Positions of a step.
const POSITIONS: &[f64] = &[1.0, 4.0, 16.0, 64.0, 256.0, 512.0, 1024.0, 2048.0, 8192.0];

/// What a step computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StepKind {
    /// Pieces of prompts.
    Prefill,
    /// One position of each of its sequences.
    Decode,
    /// Both.
    Mixed,
}

impl StepKind {
    const ALL: [Self; 3] = [Self::Prefill, Self::Decode, Self::Mixed];

    /// `chunks`: positions of each sequence in the step.
    pub(crate) fn of(chunks: impl Iterator<Item = u32>) -> Self {
        let (mut single, mut longer) = (false, false);
        for positions in chunks {
            *(if positions > 1 { &mut longer } else { &mut single }) = true;
        }
        match (single, longer) {
            (true, true) => Self::Mixed,
            (false, true) => Self::Prefill,
            _ => Self::Decode,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Mixed => "mixed",
        }
    }
}

/// Written by the engine thread, read by `/metrics`.
#[derive(Debug)]
pub struct EngineMeters {
    step_seconds: [Histogram; 3],
    step_tokens: Histogram,
    masks: Histogram,
    grammars_given_up: AtomicU64,
}

impl Default for EngineMeters {
    fn default() -> Self {
        Self {
            step_seconds: std::array::from_fn(|_| Histogram::new(SECONDS)),
            step_tokens: Histogram::new(POSITIONS),
            masks: Histogram::new(MASK_SECONDS),
            grammars_given_up: AtomicU64::new(0),
        }
    }
}

impl EngineMeters {
    /// A step is done. `compute`: what the shard took for it.
    pub(crate) fn step(&self, kind: StepKind, positions: u64, compute: Duration) {
        let kinds = StepKind::ALL.iter().zip(&self.step_seconds);
        for (_, histogram) in kinds.filter(|(known, _)| **known == kind) {
            histogram.observe(compute.as_secs_f64());
        }
        self.step_tokens.observe(positions as f64);
    }

    /// A mask was made, `took` after it was asked for.
    pub(crate) fn mask(&self, took: Duration) {
        self.masks.observe(took.as_secs_f64());
    }

    /// A grammar failed, or took too long: so does its request.
    pub(crate) fn grammar_given_up(&self) {
        self.grammars_given_up.fetch_add(1, Ordering::Relaxed);
    }

    /// vLLM's name for the positions of a step. `labels` without braces.
    pub(super) fn render_vllm(&self, labels: &str, out: &mut String) {
        self.step_tokens.render("vllm:iteration_tokens_total", "Positions computed in a step.", labels, out);
    }

    pub(super) fn render(&self, out: &mut String) {
        let name = "loramux_step_seconds";
        let _ = writeln!(out, "# HELP {name} Time the shard took for a step.\n# TYPE {name} histogram");
        for (kind, histogram) in StepKind::ALL.iter().zip(&self.step_seconds) {
            histogram.series(name, &format!("kind=\"{}\"", kind.name()), out);
        }
        self.step_tokens.render("loramux_step_tokens", "Positions computed in a step.", "", out);
        let help = "From asking for the mask of a token to having it.";
        self.masks.render("loramux_grammar_mask_seconds", help, "", out);
        let (name, n) = ("loramux_grammar_failures_total", self.grammars_given_up.load(Ordering::Relaxed));
        let _ = writeln!(
            out,
            "# HELP {name} Sequences whose grammar failed on the way.\n# TYPE {name} counter\n{name} {n}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_counts_under_its_kind() {
        assert_eq!(StepKind::of([1, 1].into_iter()), StepKind::Decode);
        assert_eq!(StepKind::of([5, 9].into_iter()), StepKind::Prefill);
        assert_eq!(StepKind::of([1, 9].into_iter()), StepKind::Mixed);
        let meters = EngineMeters::default();
        meters.step(StepKind::Mixed, 10, Duration::from_millis(3));
        meters.mask(Duration::from_micros(700));
        let mut page = String::new();
        meters.render(&mut page);
        for line in [
            "loramux_step_seconds_bucket{kind=\"mixed\",le=\"0.0025\"} 0",
            "loramux_step_seconds_bucket{kind=\"mixed\",le=\"0.005\"} 1",
            "loramux_step_seconds_count{kind=\"decode\"} 0",
            "loramux_step_tokens_bucket{le=\"4\"} 0",
            "loramux_step_tokens_bucket{le=\"16\"} 1",
            "loramux_step_tokens_sum 10",
            "loramux_grammar_mask_seconds_count 1",
            "loramux_grammar_failures_total 0",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is missing in\n{page}");
        }
    }
}
