//! What a reply must look like, in each spelling.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// A rule that the reply keeps to; at most one of them all. A rule that cannot be compiled is a 400 `invalid_schema`.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct FormatFields {
    response_format: Option<ResponseFormat>,
    structured_outputs: Option<StructuredOutputs>,
    /// As `structured_outputs.json`.
    guided_json: Option<JsonSchema>,
    /// As `structured_outputs.regex`.
    guided_regex: Option<GrammarText>,
    /// As `structured_outputs.choice`.
    #[schema(min_items = 1)]
    guided_choice: Option<Vec<GrammarText>>,
    /// As `structured_outputs.grammar`.
    guided_grammar: Option<LarkText>,
    /// Where white space may stand in JSON.
    guided_whitespace_pattern: Option<String>,
}

/// Not empty.
#[derive(Serialize, ToSchema)]
#[schema(min_length = 1, example = "[a-z]+")]
pub(in crate::http::openapi) struct GrammarText(String);

/// Lark, or GBNF.
#[derive(Serialize, ToSchema)]
#[schema(min_length = 1, example = "start: /[a-z]+/")]
pub(in crate::http::openapi) struct LarkText(String);

/// As an object, or as the text of one.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum JsonSchema {
    Object(SchemaObject),
    Text(SchemaText),
}

#[derive(Serialize, ToSchema)]
#[schema(example = json!({"type": "integer"}))]
pub(in crate::http::openapi) struct SchemaObject(Map<String, Value>);

#[derive(Serialize, ToSchema)]
#[schema(example = "{\"type\": \"integer\"}")]
pub(in crate::http::openapi) struct SchemaText(String);

/// OpenAI's spelling, and LoRAX's `schema` beside `json_object`.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ResponseFormat {
    #[schema(rename = "type")]
    kind: ResponseFormatType,
    /// With `json_schema`.
    json_schema: Option<NamedSchema>,
    schema: Option<JsonSchema>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum ResponseFormatType {
    Text,
    JsonObject,
    JsonSchema,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct NamedSchema {
    name: Option<String>,
    description: Option<String>,
    schema: JsonSchema,
    /// The schema is held either way.
    strict: Option<bool>,
}

/// vLLM's spelling: exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"regex": "[a-z]+"}))]
pub(in crate::http::openapi) struct StructuredOutputs {
    json: Option<JsonSchema>,
    /// 16 KiB at most.
    regex: Option<GrammarText>,
    /// 1024 at most.
    #[schema(min_items = 1)]
    choice: Option<Vec<GrammarText>>,
    grammar: Option<LarkText>,
    json_object: Option<bool>,
    /// False: white space may stand wherever JSON allows it. By default it stands where models put it.
    disable_any_whitespace: Option<bool>,
    /// Where white space may stand in JSON.
    whitespace_pattern: Option<String>,
}

/// TGI's spelling.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"type": "regex", "value": "[a-z]+"}))]
pub(in crate::http::openapi) struct TgiGrammar {
    #[schema(rename = "type")]
    kind: TgiGrammarType,
    /// A schema, or a regular expression.
    value: Value,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum TgiGrammarType {
    Json,
    JsonSchema,
    Regex,
}
