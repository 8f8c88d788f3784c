//! `tools` and `tool_choice`, as chat completions have them.

use serde_json::{Map, Value, json};

use crate::http::error::{ApiError, Cause, cut};
use crate::http::json::{Fields, type_name};
use crate::http::turn::Translated;

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
    if let Some(kind) = fields.string("type")?.filter(|kind| *kind != "custom") {
        let param = fields.param("type");
        let message = format!("`{param}` `{}` is not supported: this server has no tools of its own", cut(kind));
        return Err(ApiError::at(Cause::UnsupportedParameter, &param, message));
    }
    let name = fields.string("name")?.ok_or_else(|| ApiError::missing(&fields.param("name")))?;
    fields.object("input_schema")?.ok_or_else(|| ApiError::missing(&fields.param("input_schema")))?;
    let mut function = Map::from_iter([("name".to_owned(), name.into())]);
    for (from, to) in [("description", "description"), ("input_schema", "parameters"), ("strict", "strict")] {
        function.extend(fields.get(from).map(|value| (to.to_owned(), value.clone())));
    }
    Ok(json!({"type": "function", "function": function}))
}

/// Reads `tool_choice`.
///
/// # Errors
/// 400 that names the field.
pub(super) fn tool_choice(fields: &Fields<'_>, translated: &mut Translated) -> Result<(), ApiError> {
    let Some(choice) = fields.object("tool_choice")? else { return Ok(()) };
    let name = choice.string("name")?;
    let chat = match choice.string("type")? {
        Some("auto") => "auto".into(),
        Some("any") => "required".into(),
        Some("none") => "none".into(),
        Some("tool") => {
            let name = name.ok_or_else(|| ApiError::missing("tool_choice.name"))?;
            json!({"type": "function", "function": {"name": name}})
        }
        Some(other) => return Err(ApiError::invalid("tool_choice.type", "one of auto, any, tool, none", other)),
        None => return Err(ApiError::missing("tool_choice.type")),
    };
    translated.set("tool_choice", chat);
    if choice.boolean("disable_parallel_tool_use")? == Some(true) {
        translated.set("parallel_tool_calls", false);
    }
    Ok(())
}
