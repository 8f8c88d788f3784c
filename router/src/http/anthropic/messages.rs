//! `system` and `messages`: strings or blocks, as chat messages.

use serde_json::{Map, Value, json};

use crate::http::error::{ApiError, Cause, cut};
use crate::http::json::{Fields, type_name};

const MESSAGES_MAX: usize = 4096;

/// A message and its place in the request.
type Placed = (String, Value);

/// The messages, and whether the last one is the beginning of the reply.
///
/// # Errors
/// 400 that names the place.
pub(super) fn messages(fields: &Fields<'_>) -> Result<(Vec<Placed>, bool), ApiError> {
    let mut out = Vec::new();
    if let Some(system) = fields.get("system") {
        out.push(("system".into(), json!({"role": "system", "content": texts(system, "system")?})));
    }
    let values = fields.array("messages")?.ok_or_else(|| ApiError::missing("messages"))?;
    if values.is_empty() {
        return Err(ApiError::invalid("messages", "a list of at least one message", "an empty array"));
    }
    if values.len() > MESSAGES_MAX {
        return Err(ApiError::limit("messages", values.len(), "messages", MESSAGES_MAX, None));
    }
    for (i, value) in values.iter().enumerate() {
        message(value, format!("messages[{i}]"), &mut out)?;
    }
    let out = joined(out);
    let last = out.last().map(|(_, message)| message);
    let continues = last.is_some_and(|last| last["role"] == "assistant" && last.get("tool_calls").is_none());
    Ok((out, continues))
}

fn message(value: &Value, path: String, out: &mut Vec<Placed>) -> Result<(), ApiError> {
    let Value::Object(map) = value else { return Err(ApiError::invalid(&path, "an object", type_name(value))) };
    let fields = Fields::nested(map, path.clone());
    let param = fields.param("content");
    let content = fields.get("content").ok_or_else(|| ApiError::missing(&param))?;
    match fields.string("role")? {
        Some("user") => user(content, &param, path, out),
        Some("assistant") => assistant(content, &param).map(|message| out.push((path, message))),
        Some("system") => {
            out.push((path, json!({"role": "system", "content": texts(content, &param)?})));
            Ok(())
        }
        Some(other) => Err(ApiError::invalid(&fields.param("role"), "one of user, assistant, system", other)),
        None => Err(ApiError::missing(&fields.param("role"))),
    }
}

/// The blocks of a content. A string is one block of text.
fn blocks<'a>(content: &'a Value, param: &str) -> Result<Vec<(Fields<'a>, &'a str)>, ApiError> {
    let Value::Array(values) = content else {
        return Err(ApiError::invalid(param, "a string or an array of blocks", type_name(content)));
    };
    let block = |(i, value): (usize, &'a Value)| {
        let path = format!("{param}[{i}]");
        let Value::Object(map) = value else { return Err(ApiError::invalid(&path, "an object", type_name(value))) };
        let fields = Fields::nested(map, path);
        let kind = fields.string("type")?.ok_or_else(|| ApiError::missing(&fields.param("type")))?;
        Ok((fields, kind))
    };
    values.iter().enumerate().map(block).collect()
}

fn text_part(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

fn required<'a>(fields: &Fields<'a>, name: &str) -> Result<&'a str, ApiError> {
    fields.string(name)?.ok_or_else(|| ApiError::missing(&fields.param(name)))
}

fn unreadable(block: &Fields<'_>, kind: &str, rule: &str) -> ApiError {
    let param = block.param("type");
    let message = match kind {
        "image" | "document" | "search_result" | "container_upload" => {
            format!("`{param}` must be {rule}; this model does not read {}s", kind.replace('_', " "))
        }
        _ => format!("`{param}` must be {rule}; got {}", cut(kind)),
    };
    ApiError::at(Cause::InvalidValue, &param, message)
}

/// A string, or nothing but blocks of text.
fn texts(content: &Value, param: &str) -> Result<Value, ApiError> {
    if let Value::String(text) = content {
        return Ok(json!([text_part(text)]));
    }
    let block = |(block, kind): (Fields<'_>, &str)| match kind {
        "text" => Ok(text_part(required(&block, "text")?)),
        _ => Err(unreadable(&block, kind, "text")),
    };
    blocks(content, param)?.into_iter().map(block).collect::<Result<Vec<_>, _>>().map(Value::Array)
}

/// Results of tools are messages of their own.
fn user(content: &Value, param: &str, path: String, out: &mut Vec<Placed>) -> Result<(), ApiError> {
    if content.is_string() {
        out.push((path, json!({"role": "user", "content": texts(content, param)?})));
        return Ok(());
    }
    for (block, kind) in blocks(content, param)? {
        let message = match kind {
            "text" => json!({"role": "user", "content": [text_part(required(&block, "text")?)]}),
            "tool_result" => tool_result(&block)?,
            _ => return Err(unreadable(&block, kind, "one of text, tool_result")),
        };
        out.push((path.clone(), message));
    }
    Ok(())
}

fn tool_result(block: &Fields<'_>) -> Result<Value, ApiError> {
    let id = required(block, "tool_use_id")?;
    let mut content = match block.get("content") {
        None => json!([]),
        Some(content) => texts(content, &block.param("content"))?,
    };
    if block.boolean("is_error")? == Some(true)
        && let Value::Array(parts) = &mut content
    {
        parts.insert(0, text_part("Error:")); // chat messages have no other way to say it
    }
    if content == json!([]) {
        content = "".into();
    }
    Ok(json!({"role": "tool", "tool_call_id": id, "content": content}))
}

fn assistant(content: &Value, param: &str) -> Result<Value, ApiError> {
    if content.is_string() {
        return Ok(json!({"role": "assistant", "content": texts(content, param)?}));
    }
    let (mut parts, mut calls, mut thoughts) = (Vec::new(), Vec::new(), Vec::new());
    for (block, kind) in blocks(content, param)? {
        match kind {
            "text" => parts.push(text_part(required(&block, "text")?)),
            "thinking" => thoughts.push(required(&block, "thinking")?.to_owned()),
            "redacted_thinking" => {}
            "tool_use" => {
                block.object("input")?;
                let input = block.get("input").map_or_else(|| "{}".to_owned(), Value::to_string);
                let function = json!({"name": required(&block, "name")?, "arguments": input});
                calls.push(json!({"id": required(&block, "id")?, "type": "function", "function": function}));
            }
            _ => return Err(unreadable(&block, kind, "one of text, thinking, redacted_thinking, tool_use")),
        }
    }
    let mut message = Map::from_iter([("role".to_owned(), Value::from("assistant"))]);
    let content = if parts.is_empty() && !calls.is_empty() { Value::Null } else { parts.into() };
    message.insert("content".into(), content);
    if !calls.is_empty() {
        message.insert("tool_calls".into(), calls.into());
    }
    if !thoughts.is_empty() {
        message.insert("reasoning_content".into(), thoughts.join("\n").into());
    }
    Ok(message.into())
}

/// Texts of one role in a row are one message: templates want turns to alternate.
fn joined(messages: Vec<Placed>) -> Vec<Placed> {
    let mut out: Vec<Placed> = Vec::with_capacity(messages.len());
    for (place, mut message) in messages {
        if let Some((_, last)) = out.last_mut()
            && last.get("role") == message.get("role")
            && message.get("role").is_none_or(|role| role != "tool")
            && last.get("tool_calls").is_none()
            && message.get("reasoning_content").is_none()
            && let (Some(Value::Array(parts)), Some(Value::Array(more))) =
                (last.get_mut("content"), message.get_mut("content"))
        {
            parts.append(more);
            if let (Some(last), Some(calls)) = (last.as_object_mut(), message.get("tool_calls")) {
                last.insert("tool_calls".into(), calls.clone());
            }
            continue;
        }
        out.push((place, message));
    }
    out
}
