//! Fields that other servers know and this one does not serve (yet): refused by name, never ignored.

use serde_json::Value;

use crate::http::error::ApiError;
use crate::http::json::Fields;

/// When a field counts as set.
#[derive(Clone, Copy)]
enum Set {
    /// Any value but null.
    Present,
    /// Anything but null, `false`, 0, `""`, `[]` and `{}`.
    Truthy,
}

const NEVER: &str = "this server does not have it";
const NOT_YET: &str = "this version does not have it yet";

const COMMON: &[(&str, Set, &str)] = &[
    ("logprob_token_ids", Set::Truthy, "use `logprobs` with up to 20 alternatives"),
    ("merged_adapters", Set::Present, NOT_YET),
    ("use_beam_search", Set::Truthy, NEVER),
    ("prompt_embeds", Set::Present, NEVER),
    ("kv_transfer_params", Set::Present, NEVER),
    ("vllm_xargs", Set::Truthy, NEVER),
];

const COMPLETIONS: &[(&str, Set, &str)] = &[("suffix", Set::Truthy, "this server does not fill in the middle")];

const CHAT: &[(&str, Set, &str)] =
    &[("functions", Set::Truthy, "use `tools`"), ("function_call", Set::Present, "use `tool_choice`")];

/// Refuses what `/v1/completions` cannot do.
pub(crate) fn check_completions(fields: &Fields<'_>) -> Result<(), ApiError> {
    check(fields, COMMON)?;
    check(fields, COMPLETIONS)
}

/// Refuses what `/v1/chat/completions` cannot do.
pub(crate) fn check_chat(fields: &Fields<'_>) -> Result<(), ApiError> {
    check(fields, COMMON)?;
    check(fields, CHAT)
}

fn check(fields: &Fields<'_>, table: &[(&str, Set, &str)]) -> Result<(), ApiError> {
    for (name, when, why) in table {
        let set = fields.get(name).is_some_and(|value| match when {
            Set::Present => true,
            Set::Truthy => truthy(value),
        });
        if set {
            return Err(ApiError::unsupported(name, why));
        }
    }
    Ok(())
}

fn truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(set) => *set,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(values) => !values.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}
