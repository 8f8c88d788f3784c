//! `tools`, `tool_choice` and `parallel_tool_calls` of a chat.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::message::ToolRules;
use crate::http::error::{ApiError, Cause};
use crate::http::json::{Fields, type_name};
use crate::text::{Function, ToolFormat};

const TOOLS_MAX: usize = 128;
const NAME_BYTES_MAX: usize = 64;
/// Bytes of one function's `parameters`.
const PARAMETERS_BYTES_MAX: usize = 64 * 1024;
const CHOICES: &str = "none, auto, required, or an object that names a function";

/// Which of the functions the reply may or must call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// None; the model is not told of them.
    None,
    /// The model decides.
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named,
}

impl Choice {
    /// As it is spelled, and counted by `/metrics`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Auto => "auto",
            Self::Required => "required",
            Self::Named => "named",
        }
    }
}

/// The functions of a request.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    /// As the template is to show them.
    pub(crate) shown: Vec<Value>,
    pub(crate) choice: Choice,
    /// The functions that may be called.
    functions: Vec<Function>,
    parallel: bool,
}

impl Tools {
    /// Reads the three fields. `None`: the reply is text.
    ///
    /// # Errors
    /// 400 that names the field.
    pub(crate) fn read(fields: &Fields<'_>) -> Result<Option<Self>, ApiError> {
        let values = fields.array("tools")?.map_or(&[][..], Vec::as_slice);
        if values.len() > TOOLS_MAX {
            return Err(ApiError::limit("tools", values.len(), "tools", TOOLS_MAX, None));
        }
        let mut shown = Vec::with_capacity(values.len());
        let mut functions: Vec<Function> = Vec::with_capacity(values.len());
        for (i, value) in values.iter().enumerate() {
            let (tool, function) = tool(value, format!("tools[{i}]"))?;
            if functions.iter().any(|known| known.name == function.name) {
                let param = format!("tools[{i}].function.name");
                return Err(ApiError::invalid(&param, "a name that no other tool has", &function.name));
            }
            shown.push(tool);
            functions.push(function);
        }
        let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
        let (choice, only) = choice(fields, &functions)?;
        if let Some(only) = only {
            functions.retain(|function| only.contains(&function.name));
        }
        if choice == Choice::None || functions.is_empty() {
            return Ok(None);
        }
        check_no_other_rule(fields, choice)?;
        Ok(Some(Self { shown, choice, functions, parallel }))
    }

    /// The reply has to be a call.
    pub(crate) fn is_forced(&self) -> bool {
        matches!(self.choice, Choice::Required | Choice::Named)
    }

    /// The functions that may be called, and how often.
    pub(crate) fn callable(&self) -> (&[Function], usize) {
        let once = !self.parallel || self.choice == Choice::Named;
        (&self.functions, if once { 1 } else { usize::MAX })
    }

    /// Where the request has the schema of a function.
    pub(crate) fn param_of(&self, name: &str) -> String {
        let is_it = |tool: &Value| tool.pointer("/function/name").and_then(Value::as_str) == Some(name);
        let at = self.shown.iter().position(is_it);
        at.map_or("tools".to_owned(), |i| format!("tools[{i}].function.parameters"))
    }

    /// How the reply is to be read.
    pub(crate) fn rules(&self, format: ToolFormat) -> ToolRules {
        let names: Arc<[String]> = self.functions.iter().map(|function| function.name.clone()).collect();
        let (named, forced) = (self.choice == Choice::Named, self.is_forced());
        ToolRules { format, names, calls_max: self.callable().1, named, forced }
    }
}

fn object(value: &Value, path: String) -> Result<Fields<'_>, ApiError> {
    match value {
        Value::Object(map) => Ok(Fields::nested(map, path)),
        other => Err(ApiError::invalid(&path, "an object", type_name(other))),
    }
}

/// One of `tools`: what the template gets, and what the reply may call.
fn tool(value: &Value, path: String) -> Result<(Value, Function), ApiError> {
    let fields = object(value, path)?;
    match fields.string("type")? {
        Some("function") | None => {}
        Some(other) => return Err(ApiError::invalid(&fields.param("type"), "function", other)),
    }
    let function = fields.object("function")?.ok_or_else(|| ApiError::missing(&fields.param("function")))?;
    let name = name(&function)?;
    let description = function.string("description")?;
    function.boolean("strict")?;
    let parameters = parameters(&function)?;
    let mut shown = Map::new();
    shown.insert("name".into(), name.into());
    if let Some(description) = description {
        shown.insert("description".into(), description.into());
    }
    let given = function.get("parameters").cloned();
    shown.insert("parameters".into(), given.unwrap_or_else(|| parameters.clone()));
    Ok((json!({"type": "function", "function": shown}), Function { name: name.to_owned(), parameters }))
}

fn name<'a>(function: &Fields<'a>) -> Result<&'a str, ApiError> {
    let param = function.param("name");
    let name = function.string("name")?.ok_or_else(|| ApiError::missing(&param))?;
    let known = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(known) {
        return Err(ApiError::invalid(&param, "1..64 letters, digits, `_` or `-`", name));
    }
    Ok(name)
}

/// The schema of a function's arguments: always one of an object. Without one there are no arguments.
fn parameters(function: &Fields<'_>) -> Result<Value, ApiError> {
    let param = function.param("parameters");
    let Some(fields) = function.object("parameters")? else {
        return Ok(json!({"type": "object", "properties": {}, "additionalProperties": false}));
    };
    let given = function.get("parameters").cloned().unwrap_or_default();
    let bytes = given.to_string().len();
    if bytes > PARAMETERS_BYTES_MAX {
        return Err(ApiError::limit(&param, bytes, "bytes", PARAMETERS_BYTES_MAX, None));
    }
    let mut schema = match given {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    match fields.get("type") {
        None => {
            let mut typed = Map::new();
            typed.insert("type".into(), "object".into());
            typed.append(&mut schema);
            schema = typed;
        }
        Some(Value::String(kind)) if kind == "object" => {}
        Some(other) => {
            let got = other.as_str().map_or_else(|| other.to_string(), str::to_owned);
            return Err(ApiError::invalid(&format!("{param}.type"), "object", &got));
        }
    }
    Ok(Value::Object(schema))
}

/// `tool_choice`, and the functions it leaves.
fn choice(fields: &Fields<'_>, functions: &[Function]) -> Result<(Choice, Option<Vec<String>>), ApiError> {
    const NAME: &str = "tool_choice";
    let needs_tools = |choice: Choice| {
        if functions.is_empty() {
            return Err(ApiError::at(Cause::InvalidValue, NAME, "`tool_choice` needs `tools` to choose from"));
        }
        Ok(choice)
    };
    let known = |param: &str, name: &str| {
        if functions.iter().any(|function| function.name == name) {
            return Ok(name.to_owned());
        }
        Err(ApiError::invalid(param, "the name of one of `tools`", name))
    };
    match fields.get(NAME) {
        None => Ok((Choice::Auto, None)),
        Some(Value::String(choice)) => match choice.as_str() {
            "none" => Ok((Choice::None, None)),
            "auto" => Ok((Choice::Auto, None)),
            "required" => Ok((needs_tools(Choice::Required)?, None)),
            other => Err(ApiError::invalid(NAME, CHOICES, other)),
        },
        Some(Value::Object(map)) => {
            let choice = Fields::nested(map, NAME.to_owned());
            needs_tools(Choice::Named)?;
            match choice.string("type")? {
                Some("function") => {
                    let (param, name) = function_name(&choice)?;
                    Ok((Choice::Named, Some(vec![known(&param, &name)?])))
                }
                Some("allowed_tools") => allowed(&choice, &known),
                Some(other) => Err(ApiError::invalid(&choice.param("type"), "function or allowed_tools", other)),
                None => Err(ApiError::missing(&choice.param("type"))),
            }
        }
        Some(other) => Err(ApiError::invalid(NAME, CHOICES, type_name(other))),
    }
}

/// `{"function": {"name": ..}}`, with its place.
fn function_name(fields: &Fields<'_>) -> Result<(String, String), ApiError> {
    let function = fields.object("function")?.ok_or_else(|| ApiError::missing(&fields.param("function")))?;
    let param = function.param("name");
    let name = function.string("name")?.ok_or_else(|| ApiError::missing(&param))?;
    Ok((param, name.to_owned()))
}

/// `{"allowed_tools": {"mode": "auto" | "required", "tools": [..]}}`: the model is told of all tools and may use some.
fn allowed(
    choice: &Fields<'_>,
    known: &dyn Fn(&str, &str) -> Result<String, ApiError>,
) -> Result<(Choice, Option<Vec<String>>), ApiError> {
    let allowed = choice.object("allowed_tools")?.ok_or_else(|| ApiError::missing(&choice.param("allowed_tools")))?;
    let mode = match allowed.string("mode")? {
        Some("auto") => Choice::Auto,
        Some("required") => Choice::Required,
        Some(other) => return Err(ApiError::invalid(&allowed.param("mode"), "auto or required", other)),
        None => return Err(ApiError::missing(&allowed.param("mode"))),
    };
    let param = allowed.param("tools");
    let tools = allowed.array("tools")?.ok_or_else(|| ApiError::missing(&param))?;
    if tools.is_empty() {
        return Err(ApiError::invalid(&param, "a list of at least one tool", "an empty array"));
    }
    let one = |(i, value): (usize, &Value)| {
        let (param, name) = function_name(&object(value, format!("{param}[{i}]"))?)?;
        known(&param, &name)
    };
    Ok((mode, Some(tools.iter().enumerate().map(one).collect::<Result<_, _>>()?)))
}

/// A reply cannot be held to two rules.
fn check_no_other_rule(fields: &Fields<'_>, choice: Choice) -> Result<(), ApiError> {
    let format = fields.get("response_format").is_some_and(|format| format.get("type") != Some(&json!("text")));
    let fields_of_rules = ["structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"];
    let set = |name: &&str| fields.get(name).is_some_and(|value| *value != json!({}) && *value != json!(""));
    let rule = if format { Some("response_format") } else { fields_of_rules.into_iter().find(set) };
    let Some(rule) = rule else { return Ok(()) };
    let shown = match choice {
        Choice::None => return Ok(()),
        Choice::Auto => "auto",
        Choice::Required => "required",
        Choice::Named => "a function",
    };
    let message = format!("`{rule}` and `tools` go together with `tool_choice`: \"none\" only; it is {shown} here");
    Err(ApiError::at(Cause::InvalidValue, rule, message))
}
