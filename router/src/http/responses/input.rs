//! `input`: a text, or the items of a conversation, as chat messages.

use serde_json::{Map, Value, json};

use crate::http::error::{ApiError, Cause, cut};
use crate::http::json::{Fields, type_name};

const ITEMS_MAX: usize = 4096;
const KINDS: &str = "one of message, function_call, function_call_output, reasoning";

/// The messages, each with its place in the request.
///
/// # Errors
/// 400 that names the place.
pub(super) fn input(fields: &Fields<'_>, instructions: Option<&str>) -> Result<Vec<(String, Value)>, ApiError> {
    let mut messages = Messages::default();
    if let Some(text) = instructions {
        messages.push("instructions".into(), json!({"role": "system", "content": text}));
    }
    match fields.get("input") {
        None => return Err(ApiError::missing("input")),
        Some(Value::String(text)) => messages.push("input".into(), json!({"role": "user", "content": text})),
        Some(Value::Array(items)) if items.is_empty() => {
            return Err(ApiError::invalid("input", "a string or a list of at least one item", "an empty array"));
        }
        Some(Value::Array(items)) if items.len() > ITEMS_MAX => {
            return Err(ApiError::limit("input", items.len(), "items", ITEMS_MAX, None));
        }
        Some(Value::Array(items)) => {
            for (i, item) in items.iter().enumerate() {
                messages.item(item, format!("input[{i}]"))?;
            }
        }
        Some(other) => return Err(ApiError::invalid("input", "a string or an array", type_name(other))),
    }
    Ok(messages.list)
}

#[derive(Default)]
struct Messages {
    list: Vec<(String, Value)>,
}

impl Messages {
    fn push(&mut self, place: String, message: Value) {
        self.list.push((place, message));
    }

    fn item(&mut self, value: &Value, path: String) -> Result<(), ApiError> {
        let Value::Object(map) = value else { return Err(ApiError::invalid(&path, "an object", type_name(value))) };
        let item = Fields::nested(map, path.clone());
        match item.string("type")? {
            None if item.get("role").is_some() => self.message(&item, path),
            None => Err(ApiError::missing(&item.param("type"))),
            Some("message") => self.message(&item, path),
            Some("function_call") => self.call(&item, path),
            Some("function_call_output") => {
                let id = required(&item, "call_id")?;
                let content = content(&item, "output")?;
                self.push(path, json!({"role": "tool", "tool_call_id": id, "content": content}));
                Ok(())
            }
            Some("reasoning") => Ok(()), // what was thought is not read again
            Some("item_reference") => {
                let message = format!("`{path}` names an item by its id: this server keeps no state between requests");
                Err(ApiError::at(Cause::UnsupportedParameter, &path, message))
            }
            Some(other) => Err(ApiError::invalid(&item.param("type"), KINDS, other)),
        }
    }

    fn message(&mut self, item: &Fields<'_>, path: String) -> Result<(), ApiError> {
        let role = required(item, "role")?;
        if !matches!(role, "system" | "developer" | "user" | "assistant") {
            return Err(ApiError::invalid(&item.param("role"), "one of system, developer, user, assistant", role));
        }
        self.push(path, json!({"role": role, "content": content(item, "content")?}));
        Ok(())
    }

    /// Calls belong to the assistant's message in front of them, if there is one.
    fn call(&mut self, item: &Fields<'_>, path: String) -> Result<(), ApiError> {
        let (id, name) = (required(item, "call_id")?, required(item, "name")?);
        let arguments = required(item, "arguments")?;
        let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        if let Some((_, Value::Object(last))) = self.list.last_mut()
            && last.get("role").is_some_and(|role| role == "assistant")
        {
            match last.get_mut("tool_calls") {
                Some(Value::Array(calls)) => calls.push(call),
                _ => drop(last.insert("tool_calls".into(), json!([call]))),
            }
            return Ok(());
        }
        self.push(path, json!({"role": "assistant", "content": null, "tool_calls": [call]}));
        Ok(())
    }
}

fn required<'a>(fields: &Fields<'a>, name: &str) -> Result<&'a str, ApiError> {
    fields.string(name)?.ok_or_else(|| ApiError::missing(&fields.param(name)))
}

/// A string, or parts as chat messages have them.
fn content(fields: &Fields<'_>, name: &str) -> Result<Value, ApiError> {
    let param = fields.param(name);
    match fields.get(name) {
        None => Err(ApiError::missing(&param)),
        Some(Value::String(text)) => Ok(text.as_str().into()),
        Some(Value::Array(parts)) => {
            let parts = parts.iter().enumerate().map(|(i, part)| text_part(part, format!("{param}[{i}]")));
            parts.collect::<Result<Vec<_>, _>>().map(Value::Array)
        }
        Some(other) => Err(ApiError::invalid(&param, "a string or an array of parts", type_name(other))),
    }
}

fn text_part(value: &Value, path: String) -> Result<Value, ApiError> {
    let Value::Object(map) = value else { return Err(ApiError::invalid(&path, "an object", type_name(value))) };
    let fields = Fields::nested(map, path);
    let (kind, member) = match required(&fields, "type")? {
        "input_text" | "output_text" | "text" | "summary_text" => ("text", "text"),
        "refusal" => ("refusal", "refusal"),
        other => {
            let param = fields.param("type");
            let message = format!(
                "`{param}` must be input_text or output_text (this model reads nothing else); got {}",
                cut(other)
            );
            return Err(ApiError::at(Cause::InvalidValue, &param, message));
        }
    };
    let text = required(&fields, member)?;
    Ok(Value::Object(Map::from_iter([("type".into(), kind.into()), (member.into(), text.into())])))
}
