//! The names that LoRAX's dashboards look for (`--lorax-metrics`): the same numbers, with seconds where LoRAX has seconds.

use std::fmt::Write;
use std::sync::atomic::Ordering;

use super::render::Snapshot;
use super::{Finished, Metrics};

impl Metrics {
    pub(super) fn render_lorax(&self, snapshot: &Snapshot<'_>, out: &mut String) {
        let ended: Vec<(Finished, u64)> =
            Finished::ALL.into_iter().zip(&self.finished).map(|(how, n)| (how, n.load(Ordering::Relaxed))).collect();
        let sum =
            |wanted: fn(Finished) -> bool| ended.iter().filter(|(how, _)| wanted(*how)).map(|(_, n)| n).sum::<u64>();
        let status = snapshot.status;
        let values = [
            ("lorax_request_count", "counter", "Requests that ended.", sum(|_| true)),
            (
                "lorax_request_success",
                "counter",
                "Of these, the ones that ended well.",
                sum(|how| how != Finished::Abort),
            ),
            ("lorax_request_failure", "counter", "Of these, the others.", sum(|how| how == Finished::Abort)),
            ("lorax_queue_length", "gauge", "Sequences that wait.", u64::from(status.waiting)),
            ("lorax_batch_current_size", "gauge", "Sequences in the batch.", u64::from(status.running)),
        ];
        for (name, kind, help, value) in values {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        }
        let histograms = [
            ("lorax_request_duration", "From submission to the end, seconds.", &self.end_to_end),
            ("lorax_request_validation_duration", "From the head to submission, seconds.", &self.validation),
            ("lorax_request_queue_duration", "From submission to admission, seconds.", &self.queue),
            ("lorax_request_inference_duration", "From admission to the end, seconds.", &self.inference),
            (
                "lorax_request_mean_time_per_token_duration",
                "Per token after the first, seconds.",
                &self.per_output_token,
            ),
            ("lorax_request_input_length", "Prompt tokens.", &self.prompt_tokens),
            ("lorax_request_generated_tokens", "Tokens generated.", &self.generation_tokens),
            ("lorax_request_max_new_tokens", "Tokens asked for.", &self.params_max_tokens),
        ];
        for (name, help, histogram) in histograms {
            histogram.render(name, help, "", out);
        }
    }
}
