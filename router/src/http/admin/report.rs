//! What a dry run found, as the API spells it.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::engine::AdapterCheck;

/// PEFT features that the report always has an answer for.
const FEATURES: [&str; 6] = ["rslora", "dora", "bias", "lm_head", "embed_tokens", "modules_to_save"];

#[derive(Serialize)]
struct Report<'a> {
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<&'a str>,
    base: Value,
    ranks: [u32; 2],
    modules: &'a [String],
    tensors_matched: u32,
    tensors_unmatched: &'a [String],
    bytes: u64,
    host_bytes: u64,
    rank_blocks: u32,
    pages_needed: u32,
    features: Map<String, Value>,
    refusals: Vec<Value>,
    warnings: &'a [String],
}

/// The report of `POST /admin/v1/adapters/validate`.
/// `revision` is what the source calls the files.
pub fn report(revision: Option<&str>, check: &AdapterCheck) -> Value {
    let mut features: Map<String, Value> =
        FEATURES.iter().map(|name| ((*name).to_owned(), Value::Bool(false))).collect();
    features.extend(check.features.iter().map(|name| (name.clone(), Value::Bool(true))));
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let report = Report {
        ok: check.is_ok(),
        content_id: check.content.map(|id| hex(&id.0)),
        revision,
        base: json!({"declared": check.base_model, "matches": check.base_matches}),
        ranks: [check.ranks.0, check.ranks.1],
        modules: &check.modules,
        tensors_matched: check.tensors_matched,
        tensors_unmatched: &check.tensors_unmatched,
        bytes: check.weight_bytes,
        host_bytes: check.host_bytes,
        rank_blocks: check.rank_blocks,
        pages_needed: check.pages_needed,
        features,
        refusals: check
            .refusals
            .iter()
            .map(|refusal| json!({"code": refusal.code, "message": refusal.message}))
            .collect(),
        warnings: &check.warnings,
    };
    serde_json::to_value(report).unwrap_or_default() // plain data: this cannot fail
}
