//! Tools for chat templates that know nothing of them: the functions are described in the system message, and calls and
//! their results in the history become text.

use serde_json::{Map, Value as Json, json};

use super::ToolFormat;
use crate::text::member;

/// `messages` without anything but texts of system, user and assistant.
pub(crate) fn messages(messages: &[Json], format: ToolFormat) -> Vec<Json> {
    let mut out: Vec<Json> = Vec::with_capacity(messages.len() + 1);
    for message in messages {
        match member(message, "role").as_str() {
            Some("tool") => result(message, &mut out),
            Some("assistant") if member(message, "tool_calls").is_array() => out.push(with_calls(message, format)),
            _ => out.push(message.clone()),
        }
    }
    out
}

/// Results of one turn stand in one message, as the user's: every template knows that role.
fn result(message: &Json, out: &mut Vec<Json>) {
    const FIELD: &str = "tool_results";
    let content = text(member(message, "content"));
    let block = format!("<tool_response>\n{content}\n</tool_response>");
    if let Some(Json::Object(last)) = out.last_mut()
        && last.contains_key(FIELD)
        && let Some(Json::String(all)) = last.get_mut("content")
    {
        all.push('\n');
        all.push_str(&block);
        return;
    }
    out.push(json!({"role": "user", "content": block, FIELD: true}));
}

fn with_calls(message: &Json, format: ToolFormat) -> Json {
    let calls = member(message, "tool_calls").as_array().map_or(&[][..], Vec::as_slice);
    let written = format.write(calls.iter().map(|call| {
        let function = member(call, "function");
        (text(member(function, "name")), python_json(member(function, "arguments")))
    }));
    let content = text(member(message, "content"));
    let content = if content.is_empty() { written } else { format!("{content}\n{written}") };
    json!({"role": "assistant", "content": content})
}

fn text(value: &Json) -> String {
    value.as_str().unwrap_or("").to_owned()
}

/// Describes `tools` in the first system message, or in one of their own.
pub(crate) fn describe(messages: &mut Vec<Json>, tools: &[Json], format: ToolFormat) {
    let list: Vec<String> = tools.iter().map(python_json).collect();
    let example = format.write(std::iter::once(("NAME".to_owned(), "{\"ARGUMENT\": \"VALUE\"}".to_owned())));
    let preamble = format!(
        "You can call these functions. Each line describes one, with the JSON schema of its arguments:\n<tools>\n{}\n\
         </tools>\n\nTo call a function, answer with its name and its arguments as JSON in this form, and nothing \
         else:\n{example}",
        list.join("\n")
    );
    let is_system = |message: &Json| matches!(member(message, "role").as_str(), Some("system" | "developer"));
    match messages.first_mut().filter(|message| is_system(message)) {
        Some(Json::Object(system)) => add(system, &preamble),
        _ => messages.insert(0, json!({"role": "system", "content": preamble})),
    }
}

fn add(system: &mut Map<String, Json>, preamble: &str) {
    let content = system.get("content").map(text).unwrap_or_default();
    let content = if content.is_empty() { preamble.to_owned() } else { format!("{content}\n\n{preamble}") };
    system.insert("content".into(), content.into());
}

/// JSON with a space behind `,` and `:`, as models know it.
fn python_json(value: &Json) -> String {
    match value {
        Json::Object(map) => {
            let members =
                map.iter().map(|(key, value)| format!("{}: {}", Json::from(key.as_str()), python_json(value)));
            format!("{{{}}}", members.collect::<Vec<_>>().join(", "))
        }
        Json::Array(values) => format!("[{}]", values.iter().map(python_json).collect::<Vec<_>>().join(", ")),
        other => other.to_string(),
    }
}
