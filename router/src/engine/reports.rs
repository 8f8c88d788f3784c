//! What the shard says of adapter files, in the engine's words.

use loramux_proto::{AdapterFindings, AdapterReport, prepared};

use super::adapters::{AdapterCheck, AdapterFailure, PreparedAdapter, Refusal};
use super::types::ContentId;

pub(super) fn malformed() -> AdapterFailure {
    AdapterFailure::new("adapter_load_failed", "the shard's answer was malformed")
}

pub(super) fn read_report(report: AdapterReport) -> Result<PreparedAdapter, AdapterFailure> {
    let content = <[u8; 32]>::try_from(report.content_id.as_slice()).map_err(|_| malformed())?;
    Ok(PreparedAdapter {
        content: ContentId(content),
        pages_needed: report.pages_needed,
        rank_blocks: report.rank_blocks,
        ranks: (report.rank_min, report.rank_max),
        modules: report.modules,
        base_model: report.base_model,
        host_bytes: report.host_bytes,
        features: report.features,
    })
}

/// A dry run's findings. An error of the shard is a check that is not ok: the files are at fault.
pub(super) fn read_check(outcome: Option<prepared::Outcome>) -> Result<AdapterCheck, AdapterFailure> {
    let report = match outcome {
        Some(prepared::Outcome::Report(report)) => report,
        Some(prepared::Outcome::Error(error)) => {
            let refusals = vec![Refusal { code: error.code, message: error.message }];
            return Ok(AdapterCheck { refusals, ..AdapterCheck::default() });
        }
        None => return Err(malformed()),
    };
    let AdapterFindings { tensors_matched, tensors_unmatched, base_matches, refusals, warnings } =
        report.findings.ok_or_else(malformed)?;
    Ok(AdapterCheck {
        content: <[u8; 32]>::try_from(report.content_id.as_slice()).ok().map(ContentId),
        base_model: report.base_model,
        base_matches,
        ranks: (report.rank_min, report.rank_max),
        modules: report.modules,
        tensors_matched,
        tensors_unmatched,
        weight_bytes: report.weight_bytes,
        host_bytes: report.host_bytes,
        rank_blocks: report.rank_blocks,
        pages_needed: report.pages_needed,
        features: report.features,
        refusals: refusals.into_iter().map(|e| Refusal { code: e.code, message: e.message }).collect(),
        warnings,
    })
}
