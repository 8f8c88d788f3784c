//! The tokenizer's routes and the service routes.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::chat::ChatMessage;
use super::generation::TokenId;

/// A text in vLLM's spelling, a chat, or a text in LoRAX's spelling; the reply has the same form.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum TokenizeRequest {
    Prompt(TokenizePrompt),
    Chat(TokenizeChat),
    Inputs(TokenizeInputs),
}

/// A text.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct TokenizePrompt {
    model: Option<String>,
    prompt: String,
    /// The tokenizer's own beginning of text.
    #[schema(default = true)]
    add_special_tokens: Option<bool>,
    /// Adds `token_strs`.
    #[schema(default = false)]
    return_token_strs: Option<bool>,
}

/// A chat.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct TokenizeChat {
    model: Option<String>,
    #[schema(min_items = 1, max_items = 4096)]
    messages: Vec<ChatMessage>,
    #[schema(default = false)]
    add_special_tokens: Option<bool>,
    #[schema(default = false)]
    return_token_strs: Option<bool>,
    #[schema(default = true)]
    add_generation_prompt: Option<bool>,
    #[schema(default = false)]
    continue_final_message: Option<bool>,
    /// The template shows them.
    #[schema(max_items = 128)]
    tools: Option<Vec<super::chat::Tool>>,
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// A text, as LoRAX spells it.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct TokenizeInputs {
    inputs: String,
    #[schema(default = true)]
    add_special_tokens: Option<bool>,
}

/// By the form of the request.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum TokenizeReply {
    Tokens(Tokenized),
    Placed(Vec<PlacedToken>),
}

/// Tokens of a text or a chat.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Tokenized {
    count: u32,
    max_model_len: u32,
    tokens: Vec<u32>,
    #[schema(nullable = false)]
    token_strs: Option<Vec<String>>,
}

/// A token and the scalars of the text that it stands for.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct PlacedToken {
    id: u32,
    text: String,
    start: u64,
    stop: u64,
}

/// Tokens of a text.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<TokenId>,
}

/// The text.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Detokenized {
    prompt: String,
}

/// The server's version.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Version {
    version: String,
}

/// Sequences that run or wait.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Load {
    server_load: u64,
}
