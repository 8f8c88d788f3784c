//! The fields of a Messages request, in those of chat completions.

use serde_json::{Map, Value, json};

use super::messages::messages;
use super::tools::{tool_choice, tools};
use crate::http::error::ApiError;
use crate::http::json::{Fields, type_name};
use crate::http::turn::Translated;

/// Names of chat completions and what they are called here.
pub(super) const NAMES: &[(&str, &str)] = &[
    ("max_completion_tokens", "max_tokens"),
    ("stop", "stop_sequences"),
    ("prompt", "messages"),
    ("response_format.json_schema.schema", "output_config.format.schema"),
    ("response_format", "output_config.format"),
    ("parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
    ("continue_final_message", "messages"),
    ("chat_template_kwargs", "thinking"),
];
/// The same within a name.
pub(super) const INNER_NAMES: &[(&str, &str)] = &[(".function.parameters", ".input_schema"), (".function", "")];

/// What a request may have besides the extras, read or taken on purpose.
#[rustfmt::skip]
pub(in crate::http) const FIELDS: &[&str] = &[
    "cache_control", "container", "max_tokens", "mcp_servers", "messages", "metadata", "model", "output_config", "service_tier",
    "stop_sequences", "stream", "system", "temperature", "thinking", "tool_choice", "tools", "top_p",
];

const THINKING_BUDGET_MIN: i64 = 1024;
const NONE_HERE: &str = "this server has none";

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Reply,
    /// Only the prompt counts.
    Count,
}

/// Reads a request.
///
/// # Errors
/// 400 that names the field.
pub(super) fn translate(fields: &Fields<'_>, purpose: Purpose) -> Result<Translated, ApiError> {
    let mut translated = Translated::with_extras(fields)?;
    refuse(fields)?;
    if fields.string("model")?.is_none() {
        return Err(ApiError::missing("model"));
    }
    translated.copy(fields, "model", "model");
    if purpose == Purpose::Reply {
        sampling(fields, &mut translated)?;
    }
    fields.object("metadata")?; // names a user; nothing is kept by user
    let (messages, continues) = messages(fields)?;
    translated.messages(messages);
    if continues {
        translated.set("continue_final_message", true);
        translated.set("add_generation_prompt", false);
    }
    let tools = tools(fields)?;
    if !tools.is_empty() {
        translated.set("tools", tools);
    }
    tool_choice(fields, &mut translated)?;
    thinking(fields, &mut translated)?;
    output_config(fields, &mut translated)?;
    Ok(translated)
}

/// What runs, or is kept, on the side of the server.
fn refuse(fields: &Fields<'_>) -> Result<(), ApiError> {
    if fields.get("container").is_some() {
        return Err(ApiError::unsupported("container", NONE_HERE));
    }
    if fields.array("mcp_servers")?.is_some_and(|servers| !servers.is_empty()) {
        return Err(ApiError::unsupported("mcp_servers", "this server calls no others"));
    }
    Ok(())
}

fn sampling(fields: &Fields<'_>, translated: &mut Translated) -> Result<(), ApiError> {
    let max_tokens = fields.integer("max_tokens", "an integer >= 1", |n| n >= 1)?;
    translated.set("max_completion_tokens", max_tokens.ok_or_else(|| ApiError::missing("max_tokens"))?);
    fields.number("temperature", "a number in 0..1", |t| (0.0..=1.0).contains(&t))?;
    fields.integer("top_k", "an integer >= 0", |k| k >= 0)?;
    for name in ["temperature", "top_p", "stream"] {
        translated.copy(fields, name, name);
    }
    if let Some(stops) = fields.array("stop_sequences")? {
        if let Some(other) = stops.iter().find(|stop| !stop.is_string()) {
            return Err(ApiError::invalid("stop_sequences", "an array of strings", type_name(other)));
        }
        translated.set("stop", stops.clone());
    }
    Ok(())
}

/// Templates that know the switch obey it. There is no budget but `max_tokens`.
fn thinking(fields: &Fields<'_>, translated: &mut Translated) -> Result<(), ApiError> {
    let Some(thinking) = fields.object("thinking")? else { return Ok(()) };
    let kind = thinking.string("type")?.ok_or_else(|| ApiError::missing("thinking.type"))?;
    let budget = thinking
        .integer("budget_tokens", &format!("an integer >= {THINKING_BUDGET_MIN}"), |n| n >= THINKING_BUDGET_MIN)?;
    let enable = match kind {
        "enabled" if budget.is_none() => return Err(ApiError::missing("thinking.budget_tokens")),
        "enabled" | "adaptive" => true,
        "disabled" => false,
        other => return Err(ApiError::invalid("thinking.type", "one of enabled, adaptive, disabled", other)),
    };
    let kwargs = translated.chat.entry("chat_template_kwargs").or_insert_with(|| json!({}));
    if let Value::Object(kwargs) = kwargs {
        kwargs.entry("enable_thinking").or_insert(enable.into()); // the caller's own word counts more
    }
    if !enable {
        translated.set("include_reasoning", false); // not every template has the switch
    }
    Ok(())
}

fn output_config(fields: &Fields<'_>, translated: &mut Translated) -> Result<(), ApiError> {
    let Some(config) = fields.object("output_config")? else { return Ok(()) };
    match config.string("effort")? {
        None => {}
        Some(effort @ ("low" | "medium" | "high" | "xhigh")) => translated.set("reasoning_effort", effort),
        Some("max") => translated.set("reasoning_effort", "xhigh"),
        Some(other) => {
            return Err(ApiError::invalid("output_config.effort", "one of low, medium, high, xhigh, max", other));
        }
    }
    let Some(format) = config.object("format")? else { return Ok(()) };
    match format.string("type")? {
        Some("json_schema") => {}
        Some(other) => return Err(ApiError::invalid("output_config.format.type", "json_schema", other)),
        None => return Err(ApiError::missing("output_config.format.type")),
    }
    format.object("schema")?.ok_or_else(|| ApiError::missing("output_config.format.schema"))?;
    let mut schema = Map::from_iter([("name".to_owned(), "output".into()), ("strict".to_owned(), true.into())]);
    schema.extend(format.get("schema").map(|value| ("schema".to_owned(), value.clone())));
    translated.set("response_format", json!({"type": "json_schema", "json_schema": schema}));
    Ok(())
}
