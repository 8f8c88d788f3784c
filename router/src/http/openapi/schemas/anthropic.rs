//! `/v1/messages` and `/v1/messages/count_tokens`.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::generation::{AdapterFields, DrawingFields, StopString};

/// A request for a message. `container` and `mcp_servers` are refused.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct MessagesRequest {
    #[serde(flatten)]
    prompt: MessagesPrompt,
    /// Tokens to generate at most.
    #[schema(minimum = 1)]
    max_tokens: u32,
    #[schema(minimum = 0, maximum = 1, default = 1)]
    temperature: Option<f64>,
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    #[schema(minimum = 0, extensions(("x-maximum" = json!("vocab"))))]
    top_k: Option<u32>,
    /// Answer as server-sent events.
    #[schema(default = false)]
    stream: Option<bool>,
    #[schema(max_items = 16)]
    stop_sequences: Option<Vec<StopString>>,
    #[serde(flatten)]
    drawing: DrawingFields,
    #[serde(flatten)]
    adapter: AdapterFields,
}

/// What makes the prompt.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct MessagesPrompt {
    #[schema(example = "demo")]
    model: String,
    #[schema(min_items = 1, max_items = 4096)]
    messages: Vec<MessageParam>,
    /// A text or blocks of text.
    #[schema(required = false, example = "Be brief.")]
    system: Value,
    metadata: Option<Map<String, Value>>,
    tools: Option<Vec<MessageTool>>,
    tool_choice: Option<MessageToolChoice>,
    thinking: Option<Thinking>,
    output_config: Option<Map<String, Value>>,
}

/// A message. The last one may be the beginning of the assistant's.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct MessageParam {
    role: MessageRole,
    content: MessageContent,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum MessageRole {
    User,
    Assistant,
    System,
}

/// A text, or blocks: `text`, `tool_use`, `tool_result`, `thinking`.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum MessageContent {
    Text(String),
    Blocks(Vec<ContentBlockParam>),
}

/// By its `type`.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ContentBlockParam {
    #[schema(rename = "type")]
    kind: String,
    text: Option<String>,
    id: Option<String>,
    name: Option<String>,
    input: Option<Map<String, Value>>,
    tool_use_id: Option<String>,
    #[schema(required = false)]
    content: Value,
    is_error: Option<bool>,
    thinking: Option<String>,
}

/// A function that the model may call.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct MessageTool {
    name: String,
    description: Option<String>,
    /// A JSON schema.
    input_schema: Map<String, Value>,
    strict: Option<bool>,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct MessageToolChoice {
    #[schema(rename = "type")]
    kind: MessageToolChoiceType,
    /// With `tool`.
    name: Option<String>,
    disable_parallel_tool_use: Option<bool>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum MessageToolChoiceType {
    Auto,
    Any,
    Tool,
    None,
}

/// For templates that know the switch.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"type": "disabled"}))]
pub(in crate::http::openapi) struct Thinking {
    #[schema(rename = "type")]
    kind: ThinkingType,
    /// Needed where it is enabled; there is no budget but `max_tokens`.
    #[schema(minimum = 1024)]
    budget_tokens: Option<u64>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum ThinkingType {
    Enabled,
    Adaptive,
    Disabled,
}

/// Tokens of the prompt.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct MessageTokenCount {
    input_tokens: u64,
}

/// A message.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Message {
    #[schema(pattern = "^msg_[0-9a-f]{32}$")]
    id: String,
    #[schema(rename = "type")]
    kind: MessageType,
    role: super::chat::AssistantRole,
    model: String,
    content: Vec<ContentBlock>,
    /// Null while it goes on.
    #[schema(required = true)]
    stop_reason: Option<MessageStop>,
    #[schema(required = true)]
    stop_sequence: Option<String>,
    usage: MessageUsage,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum MessageType {
    Message,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum MessageStop {
    EndTurn,
    MaxTokens,
    StopSequence,
    ToolUse,
}

/// Cached tokens are not among `input_tokens`.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct MessageUsage {
    input_tokens: u64,
    cache_creation_input_tokens: u64,
    cache_read_input_tokens: u64,
    output_tokens: u64,
}

/// By its `type`.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::http::openapi) enum ContentBlock {
    Thinking { thinking: String, signature: String },
    Text { text: String },
    ToolUse { id: String, name: String, input: Map<String, Value> },
}

/// One event of a stream, by its `type`.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::http::openapi) enum MessageEvent {
    MessageStart { message: Message },
    Ping,
    ContentBlockStart { index: u32, content_block: ContentBlock },
    ContentBlockDelta { index: u32, delta: BlockDelta },
    ContentBlockStop { index: u32 },
    MessageDelta { delta: MessageEnd, usage: MessageUsage },
    MessageStop,
}

/// By its `type`.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[expect(clippy::enum_variant_names, reason = "the names of the wire")]
pub(in crate::http::openapi) enum BlockDelta {
    ThinkingDelta { thinking: String },
    TextDelta { text: String },
    InputJsonDelta { partial_json: String },
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct MessageEnd {
    #[schema(required = true)]
    stop_reason: Option<MessageStop>,
    #[schema(required = true)]
    stop_sequence: Option<String>,
}

/// An error in Anthropic's form.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AnthropicError {
    #[schema(rename = "type")]
    kind: AnthropicErrorName,
    error: AnthropicErrorBody,
    request_id: String,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum AnthropicErrorName {
    Error,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AnthropicErrorBody {
    #[schema(rename = "type")]
    kind: String,
    message: String,
    /// The stable code behind Anthropic's types.
    code: String,
    #[schema(required = true)]
    param: Option<String>,
}
