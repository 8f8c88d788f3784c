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

#[cfg(test)]
mod tests {
    use super::*;
    use loramux_kernels::Dtype;
    use loramux_models::{BaseFiles, DecoderSpec, LoadFormat, LoadOptions};

    fn demo(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo").join(path)
    }

    fn slab() -> Slab {
        let config = std::fs::read_to_string(demo("base/config.json")).expect("the demo's config");
        let spec = DecoderSpec::from_config(&config).expect("it is served");
        let options = LoadOptions { dtype: None, format: LoadFormat::Auto, seed: 0 };
        Slab::new(spec, Dtype::Bf16, 1 << 20, BaseFiles::new(&demo("base"), &options, [0; 32]))
    }

    fn ask(dir: &Path) -> PrepareAdapter {
        PrepareAdapter { request_id: 3, dir: dir.display().to_string(), rank_max: 0, check_only: false }
    }

    fn report(prepared: Prepared) -> AdapterReport {
        match prepared.outcome {
            Some(prepared::Outcome::Report(report)) => report,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_check_says_what_loading_would_and_keeps_nothing() {
        let (slab, dir) = (slab(), demo("adapters/sql"));
        let checked = report(slab.check(&ask(&dir)));
        assert!(slab.get(&checked.content_id).is_none(), "it was kept");
        let findings = checked.findings.clone().expect("a check has findings");
        assert!(findings.refusals.is_empty() && findings.base_matches && findings.tensors_matched > 0, "{findings:?}");
        let loaded = report(slab.prepare(&ask(&dir)));
        let (findings, weight_bytes) = (checked.findings.clone(), checked.weight_bytes);
        assert_eq!(AdapterReport { findings, weight_bytes, ..loaded }, checked);
        let absent = report(slab.check(&ask(&demo("adapters/absent")))).findings.expect("findings");
        assert_eq!(absent.refusals[0].code, "model_not_found");
    }

    #[test]
    fn what_was_merged_loads() {
        let (slab, out) = (slab(), tempfile::tempdir().expect("a folder"));
        let ask_merge = |weights: Vec<f32>| MergeAdapters {
            request_id: 4,
            dirs: ["sql", "haiku"].map(|name| demo("adapters").join(name).display().to_string()).to_vec(),
            weights,
            strategy: merge_adapters::Strategy::DareTies.into(),
            density: Some(0.5),
            out_dir: out.path().join("merged").display().to_string(),
            ..MergeAdapters::default()
        };
        assert_eq!(slab.merge(&ask_merge(vec![1.0])).error.expect("one weight for two").code, "adapter_invalid");
        assert_eq!(slab.merge(&ask_merge(vec![1.0, 0.5])), Merged { request_id: 4, error: None });
        let loaded = report(slab.prepare(&ask(&out.path().join("merged"))));
        assert!(loaded.pages_needed > 0 && slab.get(&loaded.content_id).is_some());
    }
}
