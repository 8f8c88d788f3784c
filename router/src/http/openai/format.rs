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

    /// Compiles what [`format()`] or [`native_format`] found.
    ///
    /// # Errors
    /// 400 `invalid_schema` at its field; 429 `queue_full` where rules of others take all the room there is for this.
    pub(crate) async fn compile_format(&self, format: Option<Format>) -> Result<Option<Arc<dyn Grammar>>, ApiError> {
        let Some(Format { spec, param }) = format else { return Ok(None) };
        check_size(&spec, &param, self.config.limits.grammar_bytes)?;
        let kind = kind_of(&spec);
        let grammar = self.text.compile_grammar(spec).await.map_err(|error| ApiError::grammar(&param, &error))?;
        self.metrics.structured(kind);
        Ok(Some(grammar))
    }
}

/// As `/metrics` counts it.
fn kind_of(spec: &GrammarSpec) -> &'static str {
    match spec {
        GrammarSpec::JsonObject => "json_object",
        GrammarSpec::JsonSchema(_) | GrammarSpec::JsonSpaced { .. } => "json_schema",
        GrammarSpec::Regex(_) => "regex",
        GrammarSpec::Choice(_) => "choice",
        GrammarSpec::Lark(_) | GrammarSpec::Gbnf(_) => "grammar",
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
/// As [`format()`].
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
    // LoRAX's `json_object` has a `schema`; huggingface_hub sends the same as `value`.
    let inline = ["schema", "value"].into_iter().find_map(|name| Some((name, format.get(name)?)));
    let inline = |spec: fn(Value) -> GrammarSpec| match inline {
        None => Ok(None),
        Some((name, value)) => {
            schema(value, &format.param(name)).map(|schema| Some(found(&format, name, spec(schema))))
        }
    };
    match format.string("type")? {
        Some("text") => Ok(None),
        // LoRAX's has a schema, which may be empty.
        Some("json_object") => {
            let empty = GrammarSpec::JsonSchema(Value::Object(Map::new()));
            let schema = inline(GrammarSpec::JsonSchema)?.filter(|format| format.spec != empty);
            Ok(Some(schema.unwrap_or_else(|| found(fields, NAME, GrammarSpec::JsonObject))))
        }
        Some("json_schema") => match format.object("json_schema")? {
            Some(inner) => json_schema(&inner).map(Some),
            None => match inline(GrammarSpec::JsonSchema)? {
                Some(format) => Ok(Some(format)),
                None => Err(ApiError::missing(&format.param("json_schema"))),
            },
        },
        Some("json" | "regex") => tgi_rule(&format).map(Some),
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
        None => {
            let first = fields.get(NAME).and_then(Value::as_object).and_then(|members| members.keys().next());
            let got = first.map_or_else(|| "none of them".to_owned(), |name| format!("only `{name}`"));
            Err(ApiError::invalid(NAME, RULE, &got))
        }
        Some(_) => Err(ApiError::invalid(NAME, RULE, &format!("{count} of them"))),
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
    fields.object("grammar")?.map(|given| tgi_rule(&given)).transpose()
}

/// `{type, value}`, which TGI takes as `grammar` and as `response_format`.
fn tgi_rule(given: &Fields<'_>) -> Result<Format, ApiError> {
    let param = given.param("value");
    let value = given.get("value").ok_or_else(|| ApiError::missing(&param))?;
    let spec = match given.string("type")? {
        Some("json") => GrammarSpec::JsonSchema(schema(value, &param)?),
        Some("json_schema") => match given.object("value")? {
            Some(inner) if inner.get("schema").is_some() => return json_schema(&inner),
            _ => GrammarSpec::JsonSchema(schema(value, &param)?),
        },
        Some("regex") => match text(given, "value")? {
            Some(text) => GrammarSpec::Regex(text),
            None => return Err(ApiError::missing(&param)),
        },
        Some(other) => return Err(ApiError::invalid(&given.param("type"), "one of json, json_schema, regex", other)),
        None => return Err(ApiError::missing(&given.param("type"))),
    };
    Ok(Format { spec, param })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: Value, native: bool) -> Result<Option<Format>, (Cause, String)> {
        let map = body.as_object().unwrap();
        let fields = Fields::new(map);
        let found = if native { native_format(&fields) } else { format(&fields) };
        found.map_err(|error| (error.cause, error.param.unwrap_or_default()))
    }

    #[test]
    fn each_spelling_is_read_with_its_field() {
        let schema = json!({"type": "integer"});
        let json = || GrammarSpec::JsonSchema(json!({"type": "integer"}));
        let spaced = |space| GrammarSpec::JsonSpaced { schema: json!({"type": "integer"}), space };
        let cases = [
            (json!({"response_format": {"type": "json_object"}}), GrammarSpec::JsonObject, "response_format"),
            (
                json!({"response_format": {"type": "json_object", "schema": {}}}),
                GrammarSpec::JsonObject,
                "response_format",
            ),
            (json!({"response_format": {"type": "json_object", "schema": schema}}), json(), "response_format.schema"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}),
                json(),
                "response_format.json_schema.schema",
            ),
            (json!({"structured_outputs": {"json": schema, "regex": null}}), json(), "structured_outputs.json"),
            (json!({"structured_outputs": {"json": schema.to_string()}}), json(), "structured_outputs.json"),
            (
                json!({"structured_outputs": {"json_object": true}}),
                GrammarSpec::JsonObject,
                "structured_outputs.json_object",
            ),
            (json!({"structured_outputs": {"regex": "a"}}), GrammarSpec::Regex("a".into()), "structured_outputs.regex"),
            (
                json!({"structured_outputs": {"choice": ["a", "b"]}}),
                GrammarSpec::Choice(vec!["a".into(), "b".into()]),
                "structured_outputs.choice",
            ),
            (
                json!({"structured_outputs": {"grammar": "start: \"a\""}}),
                GrammarSpec::Lark("start: \"a\"".into()),
                "structured_outputs.grammar",
            ),
            (json!({"guided_grammar": "root ::= \"a\""}), GrammarSpec::Gbnf("root ::= \"a\"".into()), "guided_grammar"),
            (json!({"guided_json": schema}), json(), "guided_json"),
            (
                json!({"structured_outputs": {"json": schema, "disable_any_whitespace": false}}),
                spaced(JsonSpace::Free),
                "structured_outputs.json",
            ),
            (
                json!({"guided_json": schema, "guided_whitespace_pattern": "[ ]?"}),
                spaced(JsonSpace::Pattern("[ ]?".into())),
                "guided_json",
            ),
        ];
        for (body, spec, param) in cases {
            assert_eq!(read(body.clone(), false), Ok(Some(Format { spec, param: param.into() })), "{body}");
        }
        for nothing in [json!({}), json!({"response_format": {"type": "text"}}), json!({"structured_outputs": null})] {
            assert_eq!(read(nothing, false), Ok(None));
        }
    }

    #[test]
    fn native_routes_have_their_own_spellings() {
        let schema = json!({"type": "integer"});
        let json = || GrammarSpec::JsonSchema(json!({"type": "integer"}));
        let cases = [
            (json!({"schema": schema.to_string()}), json(), "schema"),
            (json!({"grammar": {"type": "json", "value": schema}}), json(), "grammar.value"),
            (json!({"grammar": {"type": "json_schema", "value": {"schema": schema}}}), json(), "grammar.value.schema"),
            (json!({"grammar": {"type": "json_schema", "value": schema}}), json(), "grammar.value"),
            (json!({"grammar": {"type": "regex", "value": "a"}}), GrammarSpec::Regex("a".into()), "grammar.value"),
        ];
        for (body, spec, param) in cases {
            assert_eq!(read(body.clone(), true), Ok(Some(Format { spec, param: param.into() })), "{body}");
        }
        for bad in [json!({"grammar": {}}), json!({"grammar": {"type": "x", "value": 1}}), json!({"schema": "[]"})] {
            assert!(read(bad, true).is_err());
        }
        assert_eq!(read(json!({"grammar": {"type": "json", "value": schema}}), false), Ok(None), "not OpenAI's");
    }

    #[test]
    fn two_rules_or_empty_ones_are_refused() {
        let cases = [
            (json!({"structured_outputs": {}}), "structured_outputs"),
            (json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}), "structured_outputs"),
            (json!({"structured_outputs": {"json": {}}}), "structured_outputs.json"),
            (json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice"),
            (json!({"guided_regex": ""}), "guided_regex"),
            (json!({"guided_regex": "a", "guided_choice": ["b"]}), "guided_choice"),
            (json!({"guided_regex": "a", "response_format": {"type": "json_object"}}), "guided_regex"),
        ];
        for (body, param) in cases {
            assert_eq!(read(body.clone(), false), Err((Cause::InvalidValue, param.to_owned())), "{body}");
        }
    }

    #[test]
    fn a_rule_that_is_too_large_says_which_flag_allows_more() {
        let error = check_size(&GrammarSpec::Lark("x".repeat(11)), "guided_grammar", 10).unwrap_err();
        assert_eq!(error.cause, Cause::InvalidSchema);
        assert_eq!(error.message, "`guided_grammar` has 11 bytes; this server allows 10 (--max-grammar-bytes)");
        assert!(check_size(&GrammarSpec::Regex("x".repeat(REGEX_BYTES_MAX)), "r", 10).is_ok());
        assert!(check_size(&GrammarSpec::Choice(vec!["x".into(); CHOICES_MAX + 1]), "c", 1 << 20).is_err());
    }
}
