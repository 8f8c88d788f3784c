//! `/v1/completions`.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use super::format::FormatFields;
use super::generation::{AdapterFields, DrawingFields, PromptPosition, SamplingFields, StopReason, TokenId, Usage};

/// A request for completions.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct CompletionRequest {
    /// One prompt or up to 256, as text or as token ids.
    prompt: Prompt,
    /// Tokens to generate at most; 0 only scores the prompt.
    #[schema(minimum = 0, default = 16)]
    max_tokens: Option<u32>,
    /// Logprobs with this many alternatives.
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<u32>,
    /// The prompt's text first; with `logprobs` its logprobs too.
    #[schema(default = false)]
    echo: Option<bool>,
    /// Generate this many and keep the `n` best by mean logprob. At least `n`; not above it in a stream.
    #[schema(minimum = 1, extensions(("x-maximum" = json!("n_max"))))]
    best_of: Option<u32>,
    /// Must be empty: this server does not fill in the middle.
    #[schema(max_length = 0)]
    suffix: Option<String>,
    #[serde(flatten)]
    sampling: SamplingFields,
    #[serde(flatten)]
    drawing: DrawingFields,
    #[serde(flatten)]
    format: FormatFields,
    #[serde(flatten)]
    adapter: AdapterFields,
}

/// Text, texts, token ids, or lists of token ids.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum Prompt {
    Text(String),
    Texts(TextList),
    Tokens(TokenList),
    TokenLists(TokenLists),
}

/// Several prompts.
#[derive(Serialize, ToSchema)]
#[schema(min_items = 1, max_items = 256)]
pub(in crate::http::openapi) struct TextList(Vec<String>);

/// Several prompts as token ids.
#[derive(Serialize, ToSchema)]
#[schema(min_items = 1, max_items = 256)]
pub(in crate::http::openapi) struct TokenLists(Vec<TokenList>);

/// A prompt as token ids.
#[derive(Serialize, ToSchema)]
#[schema(min_items = 1)]
pub(in crate::http::openapi) struct TokenList(Vec<TokenId>);

/// Completions.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Completion {
    #[schema(pattern = "^cmpl-[0-9a-f]{32}$")]
    id: String,
    object: CompletionObject,
    /// Unix seconds.
    created: u64,
    /// As sent; the base model's name if nothing was.
    model: String,
    choices: Vec<CompletionChoice>,
    usage: Usage,
    /// Version of the server and content of the base model.
    system_fingerprint: String,
}

/// A part of a stream: one choice, or none and `usage`.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct CompletionChunk {
    #[schema(pattern = "^cmpl-[0-9a-f]{32}$")]
    id: String,
    object: CompletionObject,
    created: u64,
    model: String,
    choices: Vec<CompletionChunkChoice>,
    /// Null until the last chunk; absent unless it was asked for.
    usage: Option<Usage>,
    system_fingerprint: String,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) enum CompletionObject {
    #[serde(rename = "text_completion")]
    TextCompletion,
}

/// One completion.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct CompletionChoice {
    /// Prompt-major, then adapter, then `n`.
    index: u32,
    text: String,
    #[schema(required = true)]
    logprobs: Option<CompletionLogprobs>,
    finish_reason: CompletionFinish,
    #[schema(nullable = false)]
    stop_reason: Option<StopReason>,
    /// The entry of `adapters` that answered.
    #[schema(nullable = false)]
    adapter: Option<String>,
    #[schema(nullable = false)]
    prompt_logprobs: Option<Vec<Option<PromptPosition>>>,
    #[schema(nullable = false)]
    prompt_token_ids: Option<Vec<u32>>,
    #[schema(nullable = false)]
    token_ids: Option<Vec<u32>>,
}

/// What a chunk adds to a completion.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct CompletionChunkChoice {
    index: u32,
    text: String,
    #[schema(required = true)]
    logprobs: Option<CompletionLogprobs>,
    /// Null until the choice's last chunk.
    #[schema(required = true)]
    finish_reason: Option<CompletionFinish>,
    #[schema(nullable = false)]
    stop_reason: Option<StopReason>,
    #[schema(nullable = false)]
    adapter: Option<String>,
    #[schema(nullable = false)]
    prompt_token_ids: Option<Vec<u32>>,
    #[schema(nullable = false)]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum CompletionFinish {
    Stop,
    Length,
}

/// Four lists of the same length. Of the raw distribution, before temperature and penalties.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct CompletionLogprobs {
    tokens: Vec<String>,
    /// Null for the prompt's first token.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Unicode scalars from the start of `text`.
    text_offset: Vec<u64>,
}
