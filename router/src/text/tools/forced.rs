//! Grammars that make a model write calls, in the format it would use by itself.

use std::fmt::Write;

use serde_json::Value as Json;

use super::{Function, ToolFormat};
use crate::text::reasoning::{THINK_END, THINK_START};

/// Behind a thought, models write one empty line.
const GAP: &str = "(\"\\n\" | \"\\n\\n\")?";

/// Whether a thought comes before the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thought {
    /// No.
    Never,
    /// The model may write one.
    Possible,
    /// The prompt has begun it.
    Begun,
}

/// A grammar in llguidance's Lark notation. `special` gives the id of a text that is a special token: no text can spell it.
pub(crate) fn grammar(
    format: ToolFormat,
    functions: &[Function],
    calls_max: usize,
    thought: Thought,
    special: &dyn Fn(&str) -> Option<u32>,
) -> String {
    let writer = Writer { special };
    let mark = |text: &str| writer.mark(text);
    let more = |separator: &str| if calls_max == 1 { String::new() } else { format!(" ({separator} call)*") };
    let calls = match format {
        ToolFormat::Hermes => format!("call{}", more(&literal("\n"))),
        ToolFormat::LlamaJson => format!("call{}", more(&literal("; "))),
        ToolFormat::Mistral => {
            let (open, close) = (literal("["), literal("]"));
            format!("{} \" \"? {open} call{} {close}", mark(ToolFormat::MISTRAL_START), more(&literal(", ")))
        }
        ToolFormat::MistralArgs => format!("call{}", more("")),
    };
    let mut out = match thought {
        Thought::Never => format!("start: {calls}\n"),
        Thought::Possible => format!("start: ({} thought)? {calls}\n", mark(THINK_START)),
        Thought::Begun => format!("start: thought {calls}\n"),
    };
    if thought != Thought::Never {
        match (writer.special)(THINK_END) {
            Some(id) => writeln!(out, "thought: /(?s:.*)/ <[{id}]> {GAP}"),
            None => writeln!(out, "thought: thinking {GAP}\nthinking[lazy]: /(?s:.*)<\\/think>/"),
        }
        .ok();
    }
    let each: Vec<String> = (0..functions.len()).map(|i| format!("call_{i}")).collect();
    let call = match format {
        ToolFormat::Hermes => format!(
            "{} {} ({}) {} {}",
            mark(ToolFormat::HERMES_START),
            literal("\n"),
            each.join(" | "),
            literal("\n"),
            mark(ToolFormat::HERMES_END)
        ),
        _ => each.join(" | "),
    };
    writeln!(out, "call: {call}").ok();
    for (i, function) in functions.iter().enumerate() {
        let name = Json::from(function.name.as_str());
        let key = if format == ToolFormat::LlamaJson { "parameters" } else { "arguments" };
        let (front, back) = match format {
            ToolFormat::MistralArgs => {
                let mark = mark(ToolFormat::MISTRAL_START);
                (format!("{mark} {} {}", literal(&function.name), writer.mark(ToolFormat::MISTRAL_ARGS)), String::new())
            }
            _ => (literal(&format!("{{\"name\": {name}, \"{key}\": ")), literal("}")),
        };
        writeln!(out, "call_{i}: {front} arguments_{i} {back}").ok();
        writeln!(out, "arguments_{i}: %json {}", closed(&function.parameters)).ok();
    }
    out
}

struct Writer<'a> {
    special: &'a dyn Fn(&str) -> Option<u32>,
}

impl Writer<'_> {
    fn mark(&self, text: &str) -> String {
        (self.special)(text).map_or_else(|| literal(text), |id| format!("<[{id}]>"))
    }
}

fn literal(text: &str) -> String {
    Json::from(text).to_string()
}

/// Arguments that the schema does not name are no use to the function: unless it says otherwise they must not come.
pub(super) fn closed(parameters: &Json) -> Json {
    let mut schema = parameters.clone();
    let open =
        ["additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf", "unevaluatedProperties"];
    if let Json::Object(members) = &mut schema
        && members.contains_key("properties")
        && !open.iter().any(|name| members.contains_key(*name))
    {
        members.insert("additionalProperties".into(), Json::Bool(false));
    }
    schema
}
