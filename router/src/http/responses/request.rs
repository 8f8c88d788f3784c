//! The fields of a Responses request, in those of chat completions.

use serde_json::{Map, Value, json};

use super::input::input;
use super::tools::{tool_choice, tools};
use crate::http::error::ApiError;
use crate::http::json::{Fields, type_name};
use crate::http::turn::Translated;

/// Names of chat completions and what they are called here.
pub(super) const NAMES: &[(&str, &str)] = &[
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("messages", "input"),
    ("prompt", "input"),
    ("reasoning_effort", "reasoning.effort"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("logprobs", "include"),
];
/// The same within a name.
pub(super) const INNER_NAMES: &[(&str, &str)] = &[(".function", ""), ("tool_choice.allowed_tools", "tool_choice")];

/// What a request may have besides the extras, read or taken on purpose.
#[rustfmt::skip]
pub(in crate::http) const FIELDS: &[&str] = &[
    "background", "conversation", "include", "input", "instructions", "max_output_tokens", "max_tool_calls", "metadata", "model",
    "parallel_tool_calls", "previous_response_id", "prompt", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "reasoning", "safety_identifier", "service_tier", "store", "stream", "stream_options", "temperature", "text", "tool_choice",
    "tools", "top_logprobs", "top_p", "truncation", "user",
];

const NO_STATE: &str = "this server keeps no state between requests; send the whole conversation in `input`";
/// Fields that name something kept from before.
const STATEFUL: &[&str] = &["previous_response_id", "conversation", "prompt"];
/// What `include` may list. All but the first are about things that are never left out, or tools that are not there.
const INCLUDABLE: &[&str] = &[
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "message.input_image.image_url",
];
const LOGPROBS: &str = "message.output_text.logprobs";
const METADATA_MAX: usize = 16;
const METADATA_KEY_CHARS_MAX: usize = 64;
const METADATA_VALUE_CHARS_MAX: usize = 512;

/// A request, and what of it the reply repeats.
#[derive(Debug, Default)]
pub(super) struct Asked {
    pub(super) translated: Translated,
    pub(super) instructions: Option<Value>,
    pub(super) max_output_tokens: Option<Value>,
    pub(super) max_tool_calls: Option<Value>,
    pub(super) metadata: Value,
    pub(super) parallel_tool_calls: bool,
    pub(super) reasoning: Value,
    pub(super) safety_identifier: Option<Value>,
    pub(super) prompt_cache_key: Option<Value>,
    pub(super) text: Value,
    pub(super) tool_choice: Value,
    pub(super) tools: Value,
    pub(super) top_logprobs: Option<i64>,
    pub(super) truncation: &'static str,
    pub(super) user: Option<Value>,
}

/// Reads a request.
///
/// # Errors
/// 400 that names the field.
pub(super) fn translate(fields: &Fields<'_>) -> Result<Asked, ApiError> {
    refuse_state(fields)?;
    let mut translated = Translated::with_extras(fields)?;
    translated.copy(fields, "model", "model");
    translated.copy(fields, "temperature", "temperature");
    translated.copy(fields, "top_p", "top_p");
    translated.copy(fields, "stream", "stream");
    translated.copy(fields, "max_output_tokens", "max_completion_tokens");
    translated.copy(fields, "parallel_tool_calls", "parallel_tool_calls");
    fields.object("stream_options")?; // OpenAI's only option is about padding against eavesdroppers
    let instructions = fields.string("instructions")?;
    translated.messages(input(fields, instructions)?);
    let truncation = truncation(fields)?;
    if truncation == "auto" {
        translated.set("truncate_prompt_tokens", -1);
    }
    let tools = tools(fields)?;
    if !tools.is_empty() {
        translated.set("tools", tools);
    }
    if let Some(choice) = tool_choice(fields)? {
        translated.set("tool_choice", choice);
    }
    let top_logprobs = logprobs(fields, &mut translated)?;
    Ok(Asked {
        instructions: instructions.map(Value::from),
        max_output_tokens: fields.get("max_output_tokens").cloned(),
        max_tool_calls: fields.integer("max_tool_calls", "an integer >= 1", |n| n >= 1)?.map(Value::from),
        metadata: metadata(fields)?,
        parallel_tool_calls: fields.boolean("parallel_tool_calls")?.unwrap_or(true),
        reasoning: reasoning(fields, &mut translated)?,
        safety_identifier: fields.string("safety_identifier")?.map(Value::from),
        prompt_cache_key: fields.string("prompt_cache_key")?.map(Value::from),
        text: text(fields, &mut translated)?,
        tool_choice: fields.get("tool_choice").cloned().unwrap_or_else(|| "auto".into()),
        tools: fields.get("tools").cloned().unwrap_or_else(|| json!([])),
        top_logprobs,
        truncation,
        user: fields.string("user")?.map(Value::from),
        translated,
    })
}

fn refuse_state(fields: &Fields<'_>) -> Result<(), ApiError> {
    if let Some(name) = STATEFUL.iter().find(|name| fields.get(name).is_some()) {
        return Err(ApiError::unsupported(name, NO_STATE));
    }
    if fields.boolean("background")? == Some(true) {
        return Err(ApiError::unsupported("background", "this server keeps no state between requests; use `stream`"));
    }
    fields.boolean("store")?; // accepted either way: the reply says that nothing is stored
    Ok(())
}

/// `auto` keeps the end of the prompt that fits.
fn truncation(fields: &Fields<'_>) -> Result<&'static str, ApiError> {
    match fields.string("truncation")? {
        None | Some("disabled") => Ok("disabled"),
        Some("auto") => Ok("auto"),
        Some(other) => Err(ApiError::invalid("truncation", "one of auto, disabled", other)),
    }
}

/// `top_logprobs` counts only where `include` asks for logprobs.
fn logprobs(fields: &Fields<'_>, translated: &mut Translated) -> Result<Option<i64>, ApiError> {
    let top = fields.integer("top_logprobs", "0..20", |n| (0..=20).contains(&n))?;
    let Some(included) = fields.array("include")? else { return Ok(top) };
    for (i, value) in included.iter().enumerate() {
        let param = format!("include[{i}]");
        let Value::String(name) = value else { return Err(ApiError::invalid(&param, "a string", type_name(value))) };
        if !INCLUDABLE.contains(&name.as_str()) {
            return Err(ApiError::invalid(&param, &format!("one of {}", INCLUDABLE.join(", ")), name));
        }
        if name == LOGPROBS {
            translated.set("logprobs", true);
            translated.set("top_logprobs", top.unwrap_or(0));
        }
    }
    Ok(top)
}

fn metadata(fields: &Fields<'_>) -> Result<Value, ApiError> {
    const NAME: &str = "metadata";
    let Some(value) = fields.get(NAME) else { return Ok(json!({})) };
    let Value::Object(map) = value else { return Err(ApiError::invalid(NAME, "an object", type_name(value))) };
    if map.len() > METADATA_MAX {
        return Err(ApiError::limit(NAME, map.len(), "pairs", METADATA_MAX, None));
    }
    for (key, value) in map {
        let Value::String(text) = value else {
            return Err(ApiError::invalid(NAME, "a map to strings", type_name(value)));
        };
        if key.chars().count() > METADATA_KEY_CHARS_MAX || text.chars().count() > METADATA_VALUE_CHARS_MAX {
            let rule = format!(
                "keys of at most {METADATA_KEY_CHARS_MAX} and values of at most {METADATA_VALUE_CHARS_MAX} characters"
            );
            return Err(ApiError::invalid(NAME, &rule, key));
        }
    }
    Ok(value.clone())
}

/// Only the effort changes anything; there are no summaries.
fn reasoning(fields: &Fields<'_>, translated: &mut Translated) -> Result<Value, ApiError> {
    let mut shown = Map::from_iter([("effort".to_owned(), Value::Null), ("summary".to_owned(), Value::Null)]);
    if let Some(reasoning) = fields.object("reasoning")? {
        if let Some(effort) = reasoning.string("effort")? {
            translated.set("reasoning_effort", effort);
            shown.insert("effort".into(), effort.into());
        }
        for name in ["summary", "generate_summary"] {
            reasoning.string(name)?;
        }
    }
    Ok(Value::Object(shown))
}

fn text(fields: &Fields<'_>, translated: &mut Translated) -> Result<Value, ApiError> {
    let mut shown = Map::from_iter([("format".to_owned(), json!({"type": "text"}))]);
    let Some(text) = fields.object("text")? else { return Ok(Value::Object(shown)) };
    if let Some(verbosity) = text.string("verbosity")? {
        if !["low", "medium", "high"].contains(&verbosity) {
            return Err(ApiError::invalid("text.verbosity", "one of low, medium, high", verbosity));
        }
        shown.insert("verbosity".into(), verbosity.into());
    }
    let Some(format) = text.object("format")? else { return Ok(Value::Object(shown)) };
    let kind = format.string("type")?.ok_or_else(|| ApiError::missing("text.format.type"))?;
    let response_format = match kind {
        "text" | "json_object" => json!({"type": kind}),
        "json_schema" => {
            format.string("name")?.ok_or_else(|| ApiError::missing("text.format.name"))?;
            format.object("schema")?.ok_or_else(|| ApiError::missing("text.format.schema"))?;
            let members = ["name", "description", "schema", "strict"];
            let inner = members.iter().filter_map(|name| Some(((*name).to_owned(), format.get(name)?.clone())));
            json!({"type": kind, "json_schema": Map::from_iter(inner)})
        }
        other => return Err(ApiError::invalid("text.format.type", "one of text, json_object, json_schema", other)),
    };
    translated.set("response_format", response_format);
    let given = fields.get("text").and_then(|text| text.get("format")).cloned();
    shown.extend(given.map(|format| ("format".to_owned(), format)));
    Ok(Value::Object(shown))
}
