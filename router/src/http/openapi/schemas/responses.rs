//! `/v1/responses`.

use serde::Serialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use utoipa::ToSchema;

use super::chat::ChatLogprob;
use super::generation::{AdapterFields, DrawingFields, Stop};

/// A request for a response. Nothing is kept between requests: `previous_response_id`, `conversation`, `prompt` and
/// `background: true` are refused.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ResponseRequest {
    /// A text, or up to 4096 items of a conversation.
    input: ResponseInput,
    #[schema(example = "demo")]
    model: Option<String>,
    /// A system message in front of the conversation.
    instructions: Option<String>,
    /// By default what the context has left.
    #[schema(minimum = 1)]
    max_output_tokens: Option<u32>,
    #[schema(minimum = 0, default = 1)]
    temperature: Option<f64>,
    #[schema(minimum = 0, maximum = 1, default = 1)]
    top_p: Option<f64>,
    #[schema(minimum = -1, extensions(("x-maximum" = json!("vocab"))))]
    top_k: Option<i64>,
    stop: Option<Stop>,
    /// Answer as server-sent events.
    #[schema(default = false)]
    stream: Option<bool>,
    /// `auto` keeps the end of a prompt that is too long.
    truncation: Option<Truncation>,
    /// `message.output_text.logprobs` adds logprobs; the other names say what is there anyway, or never.
    include: Option<Vec<Included>>,
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<u32>,
    reasoning: Option<ReasoningOptions>,
    /// The form of the text.
    text: Option<Map<String, Value>>,
    tools: Option<Vec<ResponseTool>>,
    /// `none`, `auto`, `required`, a function or allowed tools.
    #[schema(required = false, example = "auto")]
    tool_choice: Value,
    #[schema(default = true)]
    parallel_tool_calls: Option<bool>,
    #[schema(minimum = 1)]
    max_tool_calls: Option<u32>,
    #[schema(extensions(("x-maxProperties" = json!("metadata_max"))))]
    metadata: Option<BTreeMap<String, MetadataValue>>,
    /// Accepted; nothing is stored.
    store: Option<bool>,
    user: Option<String>,
    safety_identifier: Option<String>,
    prompt_cache_key: Option<String>,
    #[serde(flatten)]
    drawing: DrawingFields,
    #[serde(flatten)]
    adapter: AdapterFields,
}

#[derive(Serialize, ToSchema)]
#[schema(max_length = 512)]
pub(in crate::http::openapi) struct MetadataValue(String);

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum ResponseInput {
    Text(String),
    Items(ResponseInputItems),
}

/// Messages, calls and their results. Thoughts are not read again.
#[derive(Serialize, ToSchema)]
#[schema(min_items = 1, max_items = 4096)]
pub(in crate::http::openapi) struct ResponseInputItems(Vec<ResponseInputItem>);

/// By its `type`: `message`, `function_call`, `function_call_output` or `reasoning`.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"role": "user", "content": "Hello!"}))]
pub(in crate::http::openapi) struct ResponseInputItem {
    #[schema(rename = "type")]
    kind: Option<InputItemType>,
    role: Option<InputRole>,
    /// A text, or parts of it.
    #[schema(required = false)]
    content: Value,
    call_id: Option<String>,
    name: Option<String>,
    /// JSON as text.
    arguments: Option<String>,
    #[schema(required = false)]
    output: Value,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum InputItemType {
    Message,
    FunctionCall,
    FunctionCallOutput,
    Reasoning,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum InputRole {
    System,
    Developer,
    User,
    Assistant,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum Truncation {
    Auto,
    Disabled,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) enum Included {
    #[serde(rename = "message.output_text.logprobs")]
    Logprobs,
    #[serde(rename = "reasoning.encrypted_content")]
    Reasoning,
    #[serde(rename = "file_search_call.results")]
    FileSearch,
    #[serde(rename = "web_search_call.results")]
    WebSearch,
    #[serde(rename = "web_search_call.action.sources")]
    WebSearchSources,
    #[serde(rename = "code_interpreter_call.outputs")]
    CodeInterpreter,
    #[serde(rename = "computer_call_output.output.image_url")]
    Computer,
    #[serde(rename = "message.input_image.image_url")]
    Image,
}

/// For the model's chat template.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ReasoningOptions {
    effort: Option<String>,
    /// Without effect.
    summary: Option<String>,
}

/// A function that the model may call.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ResponseTool {
    #[schema(rename = "type")]
    kind: super::chat::ToolType,
    name: String,
    description: Option<String>,
    /// A JSON schema.
    parameters: Option<Map<String, Value>>,
    strict: Option<bool>,
}

/// A response, while it is generated or at its end.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ResponseObject {
    #[schema(pattern = "^resp_[0-9a-f]{32}$")]
    id: String,
    object: ResponseObjectName,
    created_at: u64,
    status: ResponseStatus,
    background: bool,
    #[schema(nullable = false)]
    completed_at: Option<u64>,
    #[schema(required = true)]
    error: Option<ResponseError>,
    #[schema(required = true)]
    incomplete_details: Option<IncompleteDetails>,
    #[schema(required = true)]
    instructions: Option<String>,
    #[schema(required = true)]
    max_output_tokens: Option<u64>,
    #[schema(nullable = false)]
    max_tool_calls: Option<u64>,
    metadata: BTreeMap<String, String>,
    model: String,
    output: Vec<OutputItem>,
    parallel_tool_calls: bool,
    /// Always null.
    #[schema(required = true)]
    previous_response_id: Option<String>,
    #[schema(nullable = false)]
    prompt_cache_key: Option<String>,
    reasoning: Map<String, Value>,
    #[schema(nullable = false)]
    safety_identifier: Option<String>,
    service_tier: String,
    /// Always false.
    store: bool,
    temperature: f32,
    text: Map<String, Value>,
    tool_choice: Value,
    tools: Vec<Map<String, Value>>,
    #[schema(nullable = false)]
    top_logprobs: Option<u32>,
    top_p: f32,
    truncation: Truncation,
    /// Null until the end.
    #[schema(required = true)]
    usage: Option<ResponseUsage>,
    #[schema(required = true)]
    user: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum ResponseObjectName {
    Response,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum ResponseStatus {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ResponseError {
    code: String,
    message: String,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct IncompleteDetails {
    reason: String,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ResponseUsage {
    input_tokens: u64,
    input_tokens_details: InputTokensDetails,
    output_tokens: u64,
    output_tokens_details: OutputTokensDetails,
    total_tokens: u64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct InputTokensDetails {
    cache_write_tokens: u64,
    cached_tokens: u64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct OutputTokensDetails {
    reasoning_tokens: u64,
}

/// A thought, a message or a call, by its `type`.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::http::openapi) enum OutputItem {
    Reasoning { id: String, summary: Vec<String>, content: Vec<OutputPart>, status: ResponseStatus },
    Message { id: String, status: ResponseStatus, role: super::chat::AssistantRole, content: Vec<OutputPart> },
    FunctionCall { id: String, call_id: String, name: String, arguments: String, status: ResponseStatus },
}

/// A text, by its `type`.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::http::openapi) enum OutputPart {
    ReasoningText { text: String },
    OutputText { text: String, annotations: Vec<String>, logprobs: Vec<ChatLogprob> },
}

/// One event of a stream. Which members it has depends on its `type`.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ResponseEvent {
    #[schema(rename = "type", pattern = "^(response\\.[a-z_.]+|error)$")]
    kind: String,
    sequence_number: u64,
    #[schema(nullable = false)]
    response: Option<ResponseObject>,
    #[schema(nullable = false)]
    item_id: Option<String>,
    #[schema(nullable = false)]
    output_index: Option<u32>,
    #[schema(nullable = false)]
    content_index: Option<u32>,
    #[schema(nullable = false)]
    item: Option<OutputItem>,
    #[schema(nullable = false)]
    part: Option<OutputPart>,
    #[schema(nullable = false)]
    delta: Option<String>,
    #[schema(nullable = false)]
    text: Option<String>,
    #[schema(nullable = false)]
    logprobs: Option<Vec<ChatLogprob>>,
    #[schema(nullable = false)]
    name: Option<String>,
    #[schema(nullable = false)]
    arguments: Option<String>,
    #[schema(nullable = false)]
    code: Option<String>,
    #[schema(nullable = false)]
    message: Option<String>,
    param: Option<String>,
}
