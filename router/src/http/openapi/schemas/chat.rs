//! `/v1/chat/completions`.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::format::FormatFields;
use super::generation::{AdapterFields, DrawingFields, PromptPosition, SamplingFields, StopReason, Usage};

/// A request for the next message of a chat.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ChatCompletionRequest {
    /// The chat so far, the oldest message first.
    #[schema(min_items = 1, max_items = 4096)]
    messages: Vec<ChatMessage>,
    /// Tokens to generate at most, at least 1; by default what the context has left.
    #[schema(minimum = 1)]
    max_completion_tokens: Option<u32>,
    /// The older name of `max_completion_tokens`, which wins.
    #[schema(minimum = 1)]
    max_tokens: Option<u32>,
    /// Logprobs of the generated tokens.
    #[schema(default = false)]
    logprobs: Option<bool>,
    /// Alternatives for each token; needs `logprobs`.
    #[schema(minimum = 0, maximum = 20, default = 0)]
    top_logprobs: Option<u32>,
    /// End the prompt where the assistant's turn begins.
    #[schema(default = true)]
    add_generation_prompt: Option<bool>,
    /// The last message is the start of the reply. Not with `add_generation_prompt`.
    #[schema(default = false)]
    continue_final_message: Option<bool>,
    /// Functions that the model may call.
    #[schema(max_items = 128)]
    tools: Option<Vec<Tool>>,
    tool_choice: Option<ToolChoice>,
    /// False: one call at most.
    #[schema(default = true)]
    parallel_tool_calls: Option<bool>,
    /// The last message first, if it is the assistant's.
    #[schema(default = false)]
    echo: Option<bool>,
    /// For the model's chat template.
    reasoning_effort: Option<ReasoningEffort>,
    /// Thoughts are part of the reply.
    #[schema(default = true)]
    include_reasoning: Option<bool>,
    /// For the model's chat template: objects, mostly with `title` and `text`.
    documents: Option<Vec<Map<String, Value>>>,
    /// A template in the place of the model's own; needs `--trust-request-chat-template`.
    chat_template: Option<String>,
    /// Variables for the model's chat template, 16 KiB at most.
    chat_template_kwargs: Option<Map<String, Value>>,
    #[serde(flatten)]
    sampling: SamplingFields,
    #[serde(flatten)]
    drawing: DrawingFields,
    #[serde(flatten)]
    format: FormatFields,
    #[serde(flatten)]
    adapter: AdapterFields,
}

/// A function that the model may call.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Tool {
    #[schema(rename = "type")]
    kind: Option<ToolType>,
    function: ToolFunction,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ToolFunction {
    #[schema(pattern = "^[A-Za-z0-9_-]{1,64}$", example = "get_weather")]
    name: String,
    description: Option<String>,
    /// A JSON schema of an object, 64 KiB at most.
    parameters: Option<Map<String, Value>>,
    strict: Option<bool>,
}

/// Whether the reply may or must call a function, or which.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum ToolChoice {
    Mode(ToolChoiceMode),
    Function(NamedToolChoice),
    Allowed(AllowedToolChoice),
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum ToolChoiceMode {
    None,
    Auto,
    Required,
}

/// This function is called.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct NamedToolChoice {
    #[schema(rename = "type")]
    kind: ToolType,
    function: FunctionName,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct FunctionName {
    name: String,
}

/// Only these functions may be called.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AllowedToolChoice {
    #[schema(rename = "type")]
    kind: AllowedTools,
    allowed_tools: AllowedToolList,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum AllowedTools {
    AllowedTools,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AllowedToolList {
    mode: AllowedMode,
    #[schema(min_items = 1)]
    tools: Vec<AllowedTool>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum AllowedMode {
    Auto,
    Required,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AllowedTool {
    function: FunctionName,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum ReasoningEffort {
    None,
    Minimal,
    Low,
    Medium,
    High,
    Xhigh,
}

/// A message of a chat.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({"role": "user", "content": "Hello!"}))]
pub(in crate::http::openapi) struct ChatMessage {
    role: Role,
    /// Text; null only from an assistant that called tools.
    content: Option<Content>,
    name: Option<String>,
    /// Calls of an assistant's earlier turn.
    tool_calls: Option<Vec<ToolCallRequest>>,
    /// Which call a tool's message answers; needed there.
    tool_call_id: Option<String>,
    refusal: Option<String>,
    reasoning: Option<String>,
    /// The same under its older name.
    reasoning_content: Option<String>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

/// Text, or parts of it.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

/// A part of a message.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum ContentPart {
    Text(TextPart),
    Refusal(RefusalPart),
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct TextPart {
    #[schema(rename = "type")]
    kind: TextPartType,
    text: String,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum TextPartType {
    Text,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct RefusalPart {
    #[schema(rename = "type")]
    kind: RefusalPartType,
    refusal: String,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum RefusalPartType {
    Refusal,
}

/// A call that an assistant made.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ToolCallRequest {
    id: Option<String>,
    function: FunctionCallRequest,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct FunctionCallRequest {
    name: String,
    /// JSON as text, or the value itself.
    #[schema(required = false, example = json!("{\"city\":\"Oslo\"}"))]
    arguments: Value,
}

/// The next message of a chat.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ChatCompletion {
    #[schema(pattern = "^chatcmpl-[0-9a-f]{32}$")]
    id: String,
    object: ChatObject,
    /// Unix seconds.
    created: u64,
    /// As sent; the base model's name if nothing was.
    model: String,
    choices: Vec<ChatChoice>,
    usage: Usage,
    /// Version of the server and content of the base model.
    system_fingerprint: String,
    #[schema(nullable = false)]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) enum ChatObject {
    #[serde(rename = "chat.completion")]
    ChatCompletion,
}

/// One reply.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ChatChoice {
    index: u32,
    message: ChatReplyMessage,
    #[schema(required = true)]
    logprobs: Option<ChatLogprobs>,
    finish_reason: ChatFinish,
    #[schema(nullable = false)]
    stop_reason: Option<StopReason>,
    /// The entry of `adapters` that answered.
    #[schema(nullable = false)]
    adapter: Option<String>,
    #[schema(nullable = false)]
    prompt_logprobs: Option<Vec<Option<PromptPosition>>>,
    #[schema(nullable = false)]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum ChatFinish {
    Stop,
    Length,
    ToolCalls,
}

/// The assistant's message.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ChatReplyMessage {
    role: AssistantRole,
    #[schema(required = true)]
    content: Option<String>,
    /// Always null: this server does not refuse by text.
    #[schema(required = true)]
    refusal: Option<String>,
    /// What the model thought before it answered.
    #[schema(nullable = false)]
    reasoning: Option<String>,
    /// The same under its older name.
    #[schema(nullable = false)]
    reasoning_content: Option<String>,
    #[schema(nullable = false, min_items = 1)]
    tool_calls: Option<Vec<ToolCall>>,
}

/// A call of a function.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ToolCall {
    id: String,
    #[schema(rename = "type")]
    kind: ToolType,
    function: FunctionCall,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum ToolType {
    Function,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct FunctionCall {
    name: String,
    /// JSON as text.
    arguments: String,
}

/// A part of a call: `id`, `type` and `name` come once, `arguments` in pieces.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ToolCallDelta {
    index: u32,
    #[schema(nullable = false)]
    id: Option<String>,
    #[schema(rename = "type", nullable = false)]
    kind: Option<ToolType>,
    function: FunctionCallDelta,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct FunctionCallDelta {
    #[schema(nullable = false)]
    name: Option<String>,
    arguments: String,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum AssistantRole {
    Assistant,
}

/// A part of a stream: one choice, or none and `usage`.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ChatCompletionChunk {
    #[schema(pattern = "^chatcmpl-[0-9a-f]{32}$")]
    id: String,
    object: ChatChunkObject,
    created: u64,
    model: String,
    choices: Vec<ChatChunkChoice>,
    /// Null until the last chunk; absent unless it was asked for.
    usage: Option<Usage>,
    system_fingerprint: String,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) enum ChatChunkObject {
    #[serde(rename = "chat.completion.chunk")]
    ChatCompletionChunk,
}

/// What a chunk adds to a choice.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ChatChunkChoice {
    index: u32,
    delta: ChatDelta,
    #[schema(required = true)]
    logprobs: Option<ChatLogprobs>,
    /// Null until the choice's last chunk.
    #[schema(required = true)]
    finish_reason: Option<ChatFinish>,
    #[schema(nullable = false)]
    stop_reason: Option<StopReason>,
    #[schema(nullable = false)]
    adapter: Option<String>,
    #[schema(nullable = false)]
    token_ids: Option<Vec<u32>>,
}

/// `role` in the first chunk, then text; empty in the last.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ChatDelta {
    #[schema(nullable = false)]
    role: Option<AssistantRole>,
    #[schema(nullable = false)]
    content: Option<String>,
    #[schema(nullable = false)]
    reasoning: Option<String>,
    #[schema(nullable = false)]
    reasoning_content: Option<String>,
    #[schema(nullable = false, min_items = 1)]
    tool_calls: Option<Vec<ToolCallDelta>>,
}

/// Of the raw distribution, before temperature and penalties.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ChatLogprobs {
    content: Vec<ChatLogprob>,
    #[schema(required = true)]
    refusal: Option<Vec<ChatLogprob>>,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ChatLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<TokenLogprob>,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct TokenLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}
