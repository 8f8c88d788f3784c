//! Adapter files that are looked at or merged, and not kept.

use std::path::{Path, PathBuf};

use loramux_models::adapter::{self, MergeSpec, MergeStrategy, Refusal, Report};
use loramux_proto::{
    AdapterError, AdapterFindings, AdapterReport, MergeAdapters, Merged, PrepareAdapter, Prepared, merge_adapters,
    prepared,
};

use super::slab::{Slab, limits, saturating};

impl Slab {
    /// Everything that can be said about one directory. Its image is made, measured and dropped.
    pub(super) fn check(&self, request: &PrepareAdapter) -> Prepared {
        let mut found = adapter::check(Path::new(&request.dir), &self.spec, &limits(request.rank_max));
        let mut report = AdapterReport::default();
        if let Some(read) = found.adapter.take() {
            report.rank_min = saturating(read.rank_min);
            report.rank_max = saturating(read.rank_max);
            report.modules.clone_from(&read.module_names);
            match self.pack(&read) {
                Ok(image) => {
                    report.pages_needed = saturating(image.pages_needed());
                    report.rank_blocks = saturating(image.rank_blocks());
                    report.host_bytes = image.bytes() as u64;
                }
                Err(error) => found.refusals.push(Refusal::from(&error)),
            }
        }
        let Report { content_id, base_model, features, weight_bytes, .. } = found;
        report.content_id = content_id.map(Vec::from).unwrap_or_default();
        report.base_model = base_model;
        report.features = features.into_iter().map(str::to_owned).collect();
        report.weight_bytes = weight_bytes;
        report.findings = Some(AdapterFindings {
            tensors_matched: saturating(found.tensors_matched),
            tensors_unmatched: found.tensors_unmatched,
            base_matches: found.base_matches,
            refusals: found.refusals.into_iter().map(wire).collect(),
            warnings: found.warnings,
        });
        Prepared { request_id: request.request_id, outcome: Some(prepared::Outcome::Report(report)) }
    }

    /// Writes a merged adapter's directory.
    pub(super) fn merge(&self, ask: &MergeAdapters) -> Merged {
        use merge_adapters::Strategy;
        let strategy = match ask.strategy() {
            Strategy::Linear => MergeStrategy::Linear,
            Strategy::Ties => MergeStrategy::Ties,
            Strategy::DareLinear => MergeStrategy::DareLinear,
            Strategy::DareTies => MergeStrategy::DareTies,
        };
        let spec = MergeSpec {
            weights: ask.weights.clone(),
            strategy,
            density: ask.density,
            sign_by_frequency: ask.sign_by_frequency,
            seed: ask.seed,
        };
        let dirs: Vec<PathBuf> = ask.dirs.iter().map(PathBuf::from).collect();
        let merged = adapter::merge(&dirs, &spec, Path::new(&ask.out_dir), &self.spec, &limits(ask.rank_max));
        let error = merged.err().map(|e| AdapterError { code: e.code().to_owned(), message: e.to_string() });
        Merged { request_id: ask.request_id, error }
    }
}

fn wire(refusal: Refusal) -> AdapterError {
    AdapterError { code: refusal.code.to_owned(), message: refusal.message }
}
