//! `/v1/embeddings`.

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::completions::Prompt;
use super::generation::AdapterFields;

/// A request for embeddings.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct EmbeddingRequest {
    /// One input or up to 256, as text or as token ids.
    input: Prompt,
    /// The base model, an adapter, an alias, `base:adapter`, or a reference. Absent or empty: the base model.
    #[schema(example = "demo")]
    model: Option<String>,
    /// `base64`: the little-endian bytes of 32-bit floats.
    encoding_format: Option<EncodingFormat>,
    /// Only the first so many values, before they are normalised.
    #[schema(minimum = 1)]
    dimensions: Option<u32>,
    /// What of the final hidden states is the embedding. Default: as the server is set up (`--pooling`).
    pooling: Option<PoolingKind>,
    /// Scale to length one.
    #[schema(default = true)]
    normalize: Option<bool>,
    /// Keep the last so many tokens of each input; -1 is what fits.
    #[schema(minimum = -1, extensions(("x-maximum" = json!("context_tokens"))))]
    truncate_prompt_tokens: Option<i64>,
    /// The tokenizer's own beginning of text.
    #[schema(default = true)]
    add_special_tokens: Option<bool>,
    /// Only requests with the same salt share cached prompts.
    #[schema(min_length = 1, max_length = 256)]
    cache_salt: Option<String>,
    /// Among the caller's own waiting requests, lower goes first.
    #[schema(minimum = -100, maximum = 100, default = 0)]
    priority: Option<i32>,
    /// A label.
    #[schema(max_length = 128)]
    request_id: Option<String>,
    /// What an alias that is sticky by user goes by.
    #[schema(required = false)]
    user: Value,
    #[serde(flatten)]
    adapter: AdapterFields,
}

/// How values are written.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum EncodingFormat {
    Float,
    Base64,
}

/// Which hidden states count.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum PoolingKind {
    Mean,
    Last,
}

/// Embeddings, in the order of the inputs.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct EmbeddingList {
    object: ListObject,
    data: Vec<Embedding>,
    /// As sent; the base model's name if nothing was.
    model: String,
    usage: EmbeddingUsage,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum ListObject {
    List,
}

/// One input's embedding.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Embedding {
    object: EmbeddingObject,
    index: usize,
    embedding: EmbeddingValues,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum EmbeddingObject {
    Embedding,
}

/// Numbers, or their bytes in base64.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum EmbeddingValues {
    Floats(Vec<f32>),
    Base64(String),
}

/// Tokens that were read.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct EmbeddingUsage {
    prompt_tokens: u64,
    total_tokens: u64,
}
