//! What a reply must look like, in every spelling that clients use: `response_format`, `structured_outputs`, `guided_*`, and
//! `grammar` of TGI.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::engine::Grammar;
use crate::http::App;
use crate::http::error::{ApiError, Cause};
use crate::http::json::{Fields, parse, type_name};
use crate::text::grammar::{GrammarSpec, JsonSpace};

/// Bytes of a regular expression.
const REGEX_BYTES_MAX: usize = 16 * 1024;
/// Texts to choose from.
const CHOICES_MAX: usize = 1024;
const FLAG: Option<&str> = Some("max-grammar-bytes");

/// A rule and the field it came in.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Format {
    pub(crate) spec: GrammarSpec,
    pub(crate) param: String,
}

impl App {
    /// The compiled rule of an OpenAI request.
    ///
    /// # Errors
    /// 400: the fields contradict each other, or the rule is refused (`invalid_schema`).
    pub(crate) async fn reply_grammar(&self, body: &Map<String, Value>) -> Result<Option<Arc<dyn Grammar>>, ApiError> {
        self.compile_format(format(&Fields::new(body))?).await
    }

    /// Compiles what [`format`] or [`native_format`] found.
    ///
    /// # Errors
    /// 400 `invalid_schema` at its field.
    pub(crate) async fn compile_format(&self, format: Option<Format>) -> Result<Option<Arc<dyn Grammar>>, ApiError> {
        let Some(Format { spec, param }) = format else { return Ok(None) };
        check_size(&spec, &param, self.config.limits.grammar_bytes)?;
        let refused = |error: crate::text::grammar::GrammarError| ApiError::at(Cause::InvalidSchema, &param, error.0);
        self.text.compile_grammar(spec).await.map(Some).map_err(refused)
    }
}

fn check_size(spec: &GrammarSpec, param: &str, bytes_max: usize) -> Result<(), ApiError> {
    let json_bytes = |schema: &Value| serde_json::to_string(schema).map_or(0, |text| text.len());
    let (given, unit, limit, flag) = match spec {
        GrammarSpec::JsonObject => return Ok(()),
        GrammarSpec::JsonSchema(schema) | GrammarSpec::JsonSpaced { schema, .. } => {
            (json_bytes(schema), "bytes", bytes_max, FLAG)
        }
        GrammarSpec::Regex(text) => (text.len(), "bytes", REGEX_BYTES_MAX, None),
        GrammarSpec::Lark(text) | GrammarSpec::Gbnf(text) => (text.len(), "bytes", bytes_max, FLAG),
        GrammarSpec::Choice(choices) if choices.len() > CHOICES_MAX => (choices.len(), "choices", CHOICES_MAX, None),
        GrammarSpec::Choice(choices) => (choices.iter().map(String::len).sum(), "bytes", bytes_max, FLAG),
    };
    if given <= limit {
        return Ok(());
    }
    Err(ApiError { cause: Cause::InvalidSchema, ..ApiError::limit(param, given, unit, limit, flag) })
}

/// The rule of a request to one of the OpenAI routes.
///
/// # Errors
/// 400 that names the field; two rules at once.
pub(crate) fn format(fields: &Fields<'_>) -> Result<Option<Format>, ApiError> {
    one_of(vec![response_format(fields)?, structured_outputs(fields)?, guided(fields)?])
}

/// The rule of a request to one of LoRAX's routes, with TGI's spelling; `fields` are the parameters.
///
/// # Errors
/// As [`format`].
pub(crate) fn native_format(fields: &Fields<'_>) -> Result<Option<Format>, ApiError> {
    let schema = match fields.get("schema") {
        None => None,
        Some(value) => Some(found(fields, "schema", GrammarSpec::JsonSchema(schema(value, "schema")?))),
    };
    one_of(vec![response_format(fields)?, tgi_grammar(fields)?, schema])
}

fn one_of(formats: Vec<Option<Format>>) -> Result<Option<Format>, ApiError> {
    let mut formats = formats.into_iter().flatten();
    let first = formats.next();
    match (&first, formats.next()) {
        (Some(first), Some(second)) => {
            let message = format!("`{}` and `{}` exclude each other; send one", first.param, second.param);
            Err(ApiError::at(Cause::InvalidValue, &second.param, message))
        }
        _ => Ok(first),
    }
}

fn found(fields: &Fields<'_>, name: &str, spec: GrammarSpec) -> Format {
    Format { spec, param: fields.param(name) }
}

fn response_format(fields: &Fields<'_>) -> Result<Option<Format>, ApiError> {
    const NAME: &str = "response_format";
    let Some(format) = fields.object(NAME)? else { return Ok(None) };
    let inline = |spec: fn(Value) -> GrammarSpec| match format.get("schema") {
        None => Ok(None),
        Some(value) => {
            schema(value, &format.param("schema")).map(|schema| Some(found(&format, "schema", spec(schema))))
        }
    };
    match format.string("type")? {
        Some("text") => Ok(None),
        // LoRAX's has a schema.
        Some("json_object") => {
            Ok(Some(inline(GrammarSpec::JsonSchema)?.unwrap_or_else(|| found(fields, NAME, GrammarSpec::JsonObject))))
        }
        Some("json_schema") => match format.object("json_schema")? {
            Some(inner) => json_schema(&inner).map(Some),
            None => match inline(GrammarSpec::JsonSchema)? {
                Some(format) => Ok(Some(format)),
                None => Err(ApiError::missing(&format.param("json_schema"))),
            },
        },
        Some("structural_tag") => Err(ApiError::unsupported("response_format.type", "send `tools`, or a grammar")),
        Some(other) => Err(ApiError::invalid("response_format.type", "one of text, json_object, json_schema", other)),
        None => Err(ApiError::missing("response_format.type")),
    }
}

/// `{name, description, schema, strict}`. The schema is held whatever `strict` says.
fn json_schema(fields: &Fields<'_>) -> Result<Format, ApiError> {
    fields.string("name")?;
    fields.string("description")?;
    fields.boolean("strict")?;
    let param = fields.param("schema");
    let value = fields.get("schema").ok_or_else(|| ApiError::missing(&param))?;
    Ok(Format { spec: GrammarSpec::JsonSchema(schema(value, &param)?), param })
}

/// A schema as an object, or as the text of one.
fn schema(value: &Value, param: &str) -> Result<Value, ApiError> {
    match value {
        Value::Object(_) | Value::Bool(true) => Ok(value.clone()),
        Value::String(text) => match parse(text.as_bytes()) {
            Ok(parsed @ (Value::Object(_) | Value::Bool(true))) => Ok(parsed),
            Ok(other) => Err(ApiError::invalid(param, "a JSON schema (an object)", type_name(&other))),
            Err(error) => Err(ApiError::at(Cause::InvalidSchema, param, format!("`{param}`: {}", error.message))),
        },
        other => Err(ApiError::invalid(param, "a JSON schema: an object, or one as text", type_name(other))),
    }
}

fn structured_outputs(fields: &Fields<'_>) -> Result<Option<Format>, ApiError> {
    const NAME: &str = "structured_outputs";
    const RULE: &str = "an object with exactly one of json, regex, choice, grammar, json_object";
    let Some(given) = fields.object(NAME)? else { return Ok(None) };
    for name in ["structural_tag", "disable_additional_properties"] {
        let set = given.get(name).is_some_and(|value| *value != Value::Bool(false));
        if set {
            return Err(ApiError::unsupported(&given.param(name), "say it in the schema or in a grammar"));
        }
    }
    let object = given.boolean("json_object")?.unwrap_or(false);
    let mut rules: Vec<Format> = rules(&given, ["json", "regex", "choice", "grammar"])?;
    rules.extend(object.then(|| found(&given, "json_object", GrammarSpec::JsonObject)));
    given.boolean("disable_fallback")?; // vLLM's choice between its libraries; there is one here
    let space = space(given.boolean("disable_any_whitespace")?, given.string("whitespace_pattern")?);
    let count = rules.len();
    match rules.pop() {
        Some(rule) if count == 1 => Ok(Some(spaced(rule, space))),
        _ => Err(ApiError::invalid(NAME, RULE, &format!("{count} of them"))),
    }
}

/// vLLM's older spelling.
fn guided(fields: &Fields<'_>) -> Result<Option<Format>, ApiError> {
    let rules = rules(fields, ["guided_json", "guided_regex", "guided_choice", "guided_grammar"])?;
    let space = space(None, fields.string("guided_whitespace_pattern")?);
    Ok(one_of(rules.into_iter().map(Some).collect())?.map(|rule| spaced(rule, space)))
}

/// What the four fields say; their order is JSON, regex, choice, grammar.
fn rules(fields: &Fields<'_>, names: [&str; 4]) -> Result<Vec<Format>, ApiError> {
    let [json, regex, choice, grammar] = names;
    let mut rules = Vec::new();
    if let Some(value) = fields.get(json) {
        let param = fields.param(json);
        let schema = schema(value, &param)?;
        if schema.as_object().is_some_and(Map::is_empty) {
            return Err(ApiError::invalid(&param, "a JSON schema that says something", "an empty one"));
        }
        rules.push(Format { spec: GrammarSpec::JsonSchema(schema), param });
    }
    if let Some(text) = text(fields, regex)? {
        rules.push(found(fields, regex, GrammarSpec::Regex(text)));
    }
    if let Some(values) = fields.array(choice)? {
        rules.push(found(fields, choice, GrammarSpec::Choice(choices(values, &fields.param(choice))?)));
    }
    if let Some(text) = text(fields, grammar)? {
        rules.push(found(fields, grammar, GrammarSpec::grammar(&text)));
    }
    Ok(rules)
}

fn text(fields: &Fields<'_>, name: &str) -> Result<Option<String>, ApiError> {
    match fields.string(name)? {
        Some(text) if text.trim().is_empty() => {
            Err(ApiError::invalid(&fields.param(name), "a text that is not empty", "an empty one"))
        }
        text => Ok(text.map(str::to_owned)),
    }
}

fn choices(values: &[Value], param: &str) -> Result<Vec<String>, ApiError> {
    let rule = "an array of at least one text, none of them empty";
    let one = |value: &Value| match value {
        Value::String(text) if !text.is_empty() => Ok(text.clone()),
        Value::String(_) => Err(ApiError::invalid(param, rule, "an empty one")),
        other => Err(ApiError::invalid(param, rule, type_name(other))),
    };
    if values.is_empty() {
        return Err(ApiError::invalid(param, rule, "an empty array"));
    }
    values.iter().map(one).collect()
}

/// Free white space is an explicit wish: `disable_any_whitespace: false`, or a pattern.
fn space(disabled: Option<bool>, pattern: Option<&str>) -> JsonSpace {
    match (disabled, pattern) {
        (_, Some(pattern)) => JsonSpace::Pattern(pattern.to_owned()),
        (Some(false), None) => JsonSpace::Free,
        (Some(true) | None, None) => JsonSpace::Fixed,
    }
}

fn spaced(rule: Format, space: JsonSpace) -> Format {
    let spec = match (rule.spec, space) {
        (spec, JsonSpace::Fixed) => spec,
        (GrammarSpec::JsonSchema(schema), space) => GrammarSpec::JsonSpaced { schema, space },
        (GrammarSpec::JsonObject, space) => {
            GrammarSpec::JsonSpaced { schema: serde_json::json!({"type": "object"}), space }
        }
        (spec, _) => spec,
    };
    Format { spec, ..rule }
}

fn tgi_grammar(fields: &Fields<'_>) -> Result<Option<Format>, ApiError> {
    let Some(given) = fields.object("grammar")? else { return Ok(None) };
    let param = given.param("value");
    let value = given.get("value").ok_or_else(|| ApiError::missing(&param))?;
    let spec = match given.string("type")? {
        Some("json") => GrammarSpec::JsonSchema(schema(value, &param)?),
        Some("json_schema") => match given.object("value")? {
            Some(inner) if inner.get("schema").is_some() => return json_schema(&inner).map(Some),
            _ => GrammarSpec::JsonSchema(schema(value, &param)?),
        },
        Some("regex") => match text(&given, "value")? {
            Some(text) => GrammarSpec::Regex(text),
            None => return Err(ApiError::missing(&param)),
        },
        Some(other) => return Err(ApiError::invalid("grammar.type", "one of json, json_schema, regex", other)),
        None => return Err(ApiError::missing("grammar.type")),
    };
    Ok(Some(Format { spec, param }))
}
