//! The `messages` of a chat, checked and in the form that templates expect.

use serde_json::{Map, Value, json};

use crate::http::error::ApiError;
use crate::http::json::{Fields, type_name};

const MESSAGES_MAX: usize = 4096;
const ROLES: &str = "one of system, developer, user, assistant, tool";

/// Reads `messages`.
///
/// # Errors
/// 400 that names the place.
pub(crate) fn messages(fields: &Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let values = fields.array("messages")?.ok_or_else(|| ApiError::missing("messages"))?;
    if values.is_empty() {
        return Err(ApiError::invalid("messages", "a list of at least one message", "an empty array"));
    }
    if values.len() > MESSAGES_MAX {
        return Err(ApiError::limit("messages", values.len(), "messages", MESSAGES_MAX, None));
    }
    values.iter().enumerate().map(|(i, value)| message(value, format!("messages[{i}]"))).collect()
}

fn message(value: &Value, path: String) -> Result<Value, ApiError> {
    let Value::Object(map) = value else { return Err(ApiError::invalid(&path, "an object", type_name(value))) };
    let fields = Fields::nested(map, path);
    let role = fields.string("role")?.ok_or_else(|| ApiError::missing(&fields.param("role")))?;
    if !matches!(role, "system" | "developer" | "user" | "assistant" | "tool") {
        return Err(ApiError::invalid(&fields.param("role"), ROLES, role));
    }
    let mut message = Map::new();
    message.insert("role".into(), role.into());
    let calls = tool_calls(&fields)?.filter(|_| role == "assistant");
    let said_otherwise = role == "assistant" && fields.get("refusal").is_some();
    message.insert("content".into(), content(&fields, calls.is_some() || said_otherwise)?);
    if said_otherwise && let Some(refusal) = fields.string("refusal")? {
        let content = message.entry("content").or_insert(Value::Null);
        if content.is_null() {
            *content = refusal.into();
        }
    }
    if let Some(calls) = calls {
        message.insert("tool_calls".into(), calls);
    }
    if role == "tool" {
        fields.string("tool_call_id")?.ok_or_else(|| ApiError::missing(&fields.param("tool_call_id")))?;
    }
    for extra in ["name", "tool_call_id"] {
        if let Some(text) = fields.string(extra)? {
            message.insert(extra.into(), text.into());
        }
    }
    // A reply has it under both names; templates read the second one.
    if let Some(text) = fields.string("reasoning")?.or(fields.string("reasoning_content")?) {
        message.insert("reasoning_content".into(), text.into());
    }
    Ok(Value::Object(message))
}

fn content(fields: &Fields<'_>, may_be_null: bool) -> Result<Value, ApiError> {
    let param = fields.param("content");
    match fields.get("content") {
        None if may_be_null => Ok(Value::Null),
        None => Err(ApiError::missing(&param)),
        Some(Value::String(text)) => Ok(Value::String(text.clone())),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().enumerate().map(|(i, part)| text_part(part, format!("{param}[{i}]")));
            Ok(Value::String(texts.collect::<Result<Vec<_>, _>>()?.join("\n")))
        }
        Some(other) => Err(ApiError::invalid(&param, "a string or an array of parts", type_name(other))),
    }
}

fn text_part(value: &Value, path: String) -> Result<String, ApiError> {
    let Value::Object(map) = value else { return Err(ApiError::invalid(&path, "an object", type_name(value))) };
    let fields = Fields::nested(map, path);
    let kind = fields.string("type")?.ok_or_else(|| ApiError::missing(&fields.param("type")))?;
    let field = match kind {
        "text" => "text",
        "refusal" => "refusal",
        _ => return Err(ApiError::invalid(&fields.param("type"), "text (this model reads nothing else)", kind)),
    };
    fields.string(field)?.map(str::to_owned).ok_or_else(|| ApiError::missing(&fields.param(field)))
}

/// Calls of an earlier turn. Templates expect `arguments` as a value, clients send it as text.
fn tool_calls(fields: &Fields<'_>) -> Result<Option<Value>, ApiError> {
    let Some(calls) = fields.array("tool_calls")? else { return Ok(None) };
    if calls.is_empty() {
        return Ok(None);
    }
    let call = |(i, value): (usize, &Value)| {
        let path = format!("{}[{i}]", fields.param("tool_calls"));
        let Value::Object(map) = value else { return Err(ApiError::invalid(&path, "an object", type_name(value))) };
        let call = Fields::nested(map, path);
        let function = call.object("function")?.ok_or_else(|| ApiError::missing(&call.param("function")))?;
        let name = function.string("name")?.ok_or_else(|| ApiError::missing(&function.param("name")))?;
        if let Some(other) = call.string("type")?.filter(|kind| *kind != "function") {
            return Err(ApiError::invalid(&call.param("type"), "function", other));
        }
        let arguments = match function.get("arguments") {
            Some(Value::String(text)) if text.trim().is_empty() => json!({}),
            Some(Value::String(text)) => serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.clone())),
            None => json!({}),
            Some(object @ Value::Object(_)) => object.clone(),
            Some(other) => {
                return Err(ApiError::invalid(&function.param("arguments"), "JSON as a string", type_name(other)));
            }
        };
        Ok(json!({
            "id": call.string("id")?.unwrap_or(""),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }))
    };
    calls.iter().enumerate().map(call).collect::<Result<Vec<_>, _>>().map(|calls| Some(Value::Array(calls)))
}
