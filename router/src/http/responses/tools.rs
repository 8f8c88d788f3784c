//! `tools` and `tool_choice`: flat here, with a `function` inside in chat completions.

use serde_json::{Map, Value, json};

use crate::http::error::ApiError;
use crate::http::json::{Fields, type_name};

const FUNCTIONS_ONLY: &str = "this server has no tools of its own; `function` is the one type it knows";

/// The tools as chat completions have them.
///
/// # Errors
/// 400 that names the tool.
pub(super) fn tools(fields: &Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let Some(values) = fields.array("tools")? else { return Ok(Vec::new()) };
    values.iter().enumerate().map(|(i, value)| tool(value, format!("tools[{i}]"))).collect()
}

fn tool(value: &Value, path: String) -> Result<Value, ApiError> {
    let Value::Object(map) = value else { return Err(ApiError::invalid(&path, "an object", type_name(value))) };
    let fields = Fields::nested(map, path);
    match fields.string("type")? {
        Some("function") => {}
        Some(other) => {
            let message = format!("`{}` {}: {FUNCTIONS_ONLY}", crate::http::error::cut(other), "is not supported");
            return Err(ApiError::at(crate::http::error::Cause::UnsupportedParameter, &fields.param("type"), message));
        }
        None => return Err(ApiError::missing(&fields.param("type"))),
    }
    fields.string("name")?.ok_or_else(|| ApiError::missing(&fields.param("name")))?;
    let members = ["name", "description", "parameters", "strict"];
    let inner = members.iter().filter_map(|name| Some(((*name).to_owned(), fields.get(name)?.clone())));
    Ok(json!({"type": "function", "function": Map::from_iter(inner)}))
}

/// A choice of tools.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// As chat completions have it.
    pub(super) chat: Option<Value>,
    /// If it narrows the tools: the names that are left.
    pub(super) allowed: Option<Vec<String>>,
}

/// Reads `tool_choice`. `tools` are those of the request.
///
/// # Errors
/// 400 at `tool_choice`.
pub(super) fn tool_choice(fields: &Fields<'_>, tools: &[Value]) -> Result<Choice, ApiError> {
    const NAME: &str = "tool_choice";
    const RULE: &str = "none, auto, required, or an object";
    let Some(value) = fields.get(NAME) else { return Ok(Choice::default()) };
    let choice = match value {
        Value::String(mode) if ["none", "auto", "required"].contains(&mode.as_str()) => {
            return Ok(Choice { chat: Some(value.clone()), allowed: None });
        }
        Value::String(other) => return Err(ApiError::invalid(NAME, RULE, other)),
        Value::Object(map) => Fields::nested(map, NAME.to_owned()),
        other => return Err(ApiError::invalid(NAME, RULE, type_name(other))),
    };
    match choice.string("type")? {
        Some("function") => {
            let name = choice.string("name")?.ok_or_else(|| ApiError::missing("tool_choice.name"))?;
            Ok(Choice { chat: Some(json!({"type": "function", "function": {"name": name}})), allowed: None })
        }
        Some("allowed_tools") => allowed(&choice, tools),
        Some(other) => Err(ApiError::invalid("tool_choice.type", "one of function, allowed_tools", other)),
        None => Err(ApiError::missing("tool_choice.type")),
    }
}

/// The model sees the allowed tools alone.
fn allowed(choice: &Fields<'_>, tools: &[Value]) -> Result<Choice, ApiError> {
    let mode = choice.string("mode")?.unwrap_or("auto");
    if !["auto", "required"].contains(&mode) {
        return Err(ApiError::invalid("tool_choice.mode", "one of auto, required", mode));
    }
    let listed = choice.array("tools")?.ok_or_else(|| ApiError::missing("tool_choice.tools"))?;
    let name = |(i, value): (usize, &Value)| {
        let param = format!("tool_choice.tools[{i}].name");
        let name = value.get("name").and_then(Value::as_str).ok_or_else(|| ApiError::missing(&param))?;
        if !tools.iter().any(|tool| tool["function"]["name"] == name) {
            return Err(ApiError::invalid(&param, "the name of one of `tools`", name));
        }
        Ok(name.to_owned())
    };
    let names = listed.iter().enumerate().map(name).collect::<Result<Vec<_>, _>>()?;
    if names.is_empty() {
        return Err(ApiError::invalid("tool_choice.tools", "a list of at least one tool", "an empty array"));
    }
    Ok(Choice { chat: Some(mode.into()), allowed: Some(names) })
}
