//! `tools` and `tool_choice`: flat here, with a `function` inside in chat completions.

use serde_json::{Map, Value, json};

use crate::http::error::{ApiError, Cause, cut};
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
            let param = fields.param("type");
            let message = format!("`{param}` `{}` is not supported: {FUNCTIONS_ONLY}", cut(other));
            return Err(ApiError::at(Cause::UnsupportedParameter, &param, message));
        }
        None => return Err(ApiError::missing(&fields.param("type"))),
    }
    fields.string("name")?.ok_or_else(|| ApiError::missing(&fields.param("name")))?;
    let members = ["name", "description", "parameters", "strict"];
    let inner = members.iter().filter_map(|name| Some(((*name).to_owned(), fields.get(name)?.clone())));
    Ok(json!({"type": "function", "function": Map::from_iter(inner)}))
}

/// `tool_choice` as chat completions have it.
///
/// # Errors
/// 400 at `tool_choice`.
pub(super) fn tool_choice(fields: &Fields<'_>) -> Result<Option<Value>, ApiError> {
    const NAME: &str = "tool_choice";
    let choice = match fields.get(NAME) {
        None => return Ok(None),
        Some(Value::Object(map)) => Fields::nested(map, NAME.to_owned()),
        Some(mode) => return Ok(Some(mode.clone())), // the chat knows the words
    };
    let chat = match choice.string("type")? {
        Some("function") => {
            let name = choice.string("name")?.ok_or_else(|| ApiError::missing("tool_choice.name"))?;
            json!({"type": "function", "function": {"name": name}})
        }
        Some("allowed_tools") => {
            let tools = choice.array("tools")?.ok_or_else(|| ApiError::missing("tool_choice.tools"))?;
            let tools = tools.iter().map(|tool| json!({"type": "function", "function": {"name": tool.get("name")}}));
            let mode = choice.string("mode")?.unwrap_or("auto");
            json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools.collect::<Vec<_>>()}})
        }
        Some(other) => return Err(ApiError::invalid("tool_choice.type", "one of function, allowed_tools", other)),
        None => return Err(ApiError::missing("tool_choice.type")),
    };
    Ok(Some(chat))
}
