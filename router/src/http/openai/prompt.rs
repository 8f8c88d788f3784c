//! The `prompt` of `/v1/completions` and the `input` of `/v1/embeddings`, in their four forms.

use serde_json::Value;

use super::validate::token_id;
use crate::http::error::ApiError;
use crate::http::json::{Fields, type_name};

const PROMPTS_MAX: usize = 256;

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

const FORMS: &str = "a string, an array of strings, an array of token ids, or an array of arrays of token ids";

/// Reads the prompts of field `name`.
///
/// # Errors
/// 400 at `name`.
pub(crate) fn prompts(fields: &Fields<'_>, name: &str, vocab: u32) -> Result<Vec<Prompt>, ApiError> {
    let value = fields.get(name).ok_or_else(|| ApiError::missing(name))?;
    let values = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(values) => values,
        other => return Err(ApiError::invalid(name, FORMS, type_name(other))),
    };
    match values.first() {
        None => Err(ApiError::invalid(name, "at least one prompt", "an empty array")),
        Some(Value::Number(_)) => Ok(vec![tokens(values, name, vocab)?]),
        Some(_) if values.len() > PROMPTS_MAX => Err(ApiError::limit(name, values.len(), "prompts", PROMPTS_MAX, None)),
        Some(Value::String(_)) => values.iter().map(|value| text(value, name)).collect(),
        Some(Value::Array(_)) => values.iter().map(|value| nested(value, name, vocab)).collect(),
        Some(other) => Err(ApiError::invalid(name, FORMS, &format!("an array that holds {}", type_name(other)))),
    }
}

fn text(value: &Value, name: &str) -> Result<Prompt, ApiError> {
    let mixed = || ApiError::invalid(name, FORMS, &format!("strings and {}", type_name(value)));
    value.as_str().map(|text| Prompt::Text(text.to_owned())).ok_or_else(mixed)
}

fn nested(value: &Value, name: &str, vocab: u32) -> Result<Prompt, ApiError> {
    match value {
        Value::Array(ids) if ids.is_empty() => {
            Err(ApiError::invalid(name, "prompts of at least one token", "an empty array"))
        }
        Value::Array(ids) => tokens(ids, name, vocab),
        other => Err(ApiError::invalid(name, FORMS, &format!("arrays and {}", type_name(other)))),
    }
}

fn tokens(ids: &[Value], name: &str, vocab: u32) -> Result<Prompt, ApiError> {
    ids.iter().map(|id| token_id(name, id, vocab)).collect::<Result<_, _>>().map(Prompt::Tokens)
}
