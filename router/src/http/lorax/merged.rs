//! `merged_adapters`: checked at the edge, so that a mistake is named before anything is loaded.

use crate::adapters::MergeSpec;
use crate::engine::{MajoritySign, MergeStrategy};
use crate::http::error::ApiError;
use crate::http::json::{Fields, type_name};

/// Adapters of one merge.
const PARTS_MAX: usize = 8;
/// A weight beyond this says that something went wrong.
const WEIGHT_MAX: f64 = 1e4;

/// Reads `merged_adapters`.
///
/// # Errors
/// Names the field.
pub(super) fn merged_adapters(fields: &Fields<'_>) -> Result<Option<MergeSpec>, ApiError> {
    let Some(fields) = fields.object("merged_adapters")? else { return Ok(None) };
    let ids = ids(&fields)?;
    let weights = weights(&fields, ids.len())?;
    let strategy = match fields.string("merge_strategy")? {
        None | Some("linear") => MergeStrategy::Linear,
        Some("ties") => MergeStrategy::Ties,
        Some("dare_linear") => MergeStrategy::DareLinear,
        Some("dare_ties") => MergeStrategy::DareTies,
        Some(other) => {
            let param = fields.param("merge_strategy");
            return Err(ApiError::invalid(&param, "one of linear, ties, dare_linear, dare_ties", other));
        }
    };
    let sign = match fields.string("majority_sign_method")? {
        None | Some("total") => MajoritySign::Total,
        Some("frequency") => MajoritySign::Frequency,
        Some(other) => {
            return Err(ApiError::invalid(&fields.param("majority_sign_method"), "one of total, frequency", other));
        }
    };
    let density = density(&fields, strategy)?;
    Ok(Some(MergeSpec { ids, weights, strategy, density, sign }))
}

fn ids(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let param = fields.param("ids");
    let values = fields.array("ids")?.ok_or_else(|| ApiError::missing(&param))?;
    if !(1..=PARTS_MAX).contains(&values.len()) {
        let given = format!("{} ids", values.len());
        return Err(ApiError::invalid(&param, &format!("a list of 1..{PARTS_MAX} adapters"), &given));
    }
    let id = |value: &serde_json::Value| match value.as_str() {
        Some("") => Err(ApiError::invalid(&param, "names of adapters", "an empty string")),
        Some(id) => Ok(id.to_owned()),
        None => Err(ApiError::invalid(&param, "names of adapters", type_name(value))),
    };
    values.iter().map(id).collect()
}

fn weights(fields: &Fields<'_>, len: usize) -> Result<Vec<f64>, ApiError> {
    let param = fields.param("weights");
    let Some(values) = fields.array("weights")? else { return Ok(vec![1.0; len]) };
    if values.len() != len {
        let given = format!("{} weights for {len} ids", values.len());
        return Err(ApiError::invalid(&param, "as many numbers as there are ids", &given));
    }
    let weight = |value: &serde_json::Value| {
        let number = value.as_f64().ok_or_else(|| ApiError::invalid(&param, "numbers", type_name(value)))?;
        if number.abs() <= WEIGHT_MAX {
            return Ok(number);
        }
        Err(ApiError::invalid(&param, &format!("numbers in -{WEIGHT_MAX}..{WEIGHT_MAX}"), &value.to_string()))
    };
    values.iter().map(weight).collect()
}

/// LoRAX's client always sends one; `linear` has no use for it.
fn density(fields: &Fields<'_>, strategy: MergeStrategy) -> Result<Option<f64>, ApiError> {
    let given = fields.number("density", "a number in 0..1", |d| (0.0..=1.0).contains(&d))?;
    if strategy == MergeStrategy::Linear {
        return Ok(None);
    }
    match given {
        Some(density) if density > 0.0 => Ok(Some(density)),
        Some(density) => {
            let rule = "a number > 0 and <= 1 for this merge_strategy";
            Err(ApiError::invalid(&fields.param("density"), rule, &density.to_string()))
        }
        None => Err(ApiError::missing(&fields.param("density"))),
    }
}
