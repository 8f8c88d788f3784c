//! What requests and replies of the OpenAI routes have in common.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// A token id of the model's vocabulary.
#[derive(Serialize, ToSchema)]
#[schema(minimum = 0)]
pub(in crate::http::openapi) struct TokenId(u32);

/// Which adapter answers, besides `model`. `adapter_id`, `compose` and an adapter in `model` exclude each other.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AdapterFields {
    /// An adapter: an alias, a registered name, or a reference (`hf://org/repo`, `s3://bucket/prefix`, a path).
    adapter_id: Option<String>,
    /// Where `adapter_id` is looked for. A registered name counts only if its own source agrees.
    adapter_source: Option<AdapterSource>,
    /// The caller's own credential for the adapter's source. Never logged, never stored. The header `x-adapter-token` does
    /// the same.
    #[schema(max_length = 4096)]
    api_token: Option<String>,
    /// Multiplies the adapter's own scale for this request.
    #[schema(minimum = -8, maximum = 8, default = 1)]
    adapter_scale: Option<f64>,
    /// Several adapters added up in the running batch: nothing is merged, ranks may differ.
    #[schema(min_items = 1, extensions(("x-maxItems" = json!("composed_max"))))]
    compose: Option<Vec<ComposePart>>,
    /// An adapter that is not in memory: wait for it, answer 503 `adapter_loading` at once while the load goes on, or let
    /// the base model answer (`--allow-base-fallback`).
    adapter_wait: Option<AdapterWait>,
    /// How long to wait for the adapter.
    #[schema(minimum = 0, extensions(("x-maximum" = json!("adapter_load_timeout_ms"))))]
    adapter_load_timeout_ms: Option<u64>,
}

/// Where adapters come from. `pbase` means `s3`.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum AdapterSource {
    Hub,
    S3,
    Gcs,
    Http,
    Local,
    Pbase,
}

/// What to do about an adapter that is not in memory.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum AdapterWait {
    Wait,
    Fail,
    Base,
}

/// One adapter of a sum.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ComposePart {
    adapter: String,
    #[schema(minimum = -8, maximum = 8)]
    weight: f64,
}

/// A name, a name with a scale, or a sum.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum FanOutEntry {
    Name(String),
    Scaled(ScaledAdapter),
    Sum(AdapterSum),
}

/// An adapter with a scale of its own.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ScaledAdapter {
    adapter: String,
    #[schema(minimum = -8, maximum = 8, default = 1)]
    scale: Option<f64>,
}

/// Several adapters added up.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AdapterSum {
    #[schema(min_items = 1, extensions(("x-maxItems" = json!("composed_max"))))]
    compose: Vec<ComposePart>,
}

/// One string, or several.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum Stop {
    One(StopString),
    Several(StopStrings),
}

/// At most 16.
#[derive(Serialize, ToSchema)]
#[schema(max_items = 16)]
pub(in crate::http::openapi) struct StopStrings(Vec<StopString>);

/// 1 to 256 bytes.
#[derive(Serialize, ToSchema)]
#[schema(min_length = 1, max_length = 256)]
pub(in crate::http::openapi) struct StopString(String);

/// Options of a stream.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct StreamOptions {
    /// One more chunk with `usage` before the end.
    #[schema(default = false)]
    include_usage: Option<bool>,
    /// `usage` so far in every chunk.
    #[schema(default = false)]
    continuous_usage_stats: Option<bool>,
}

/// How tokens are drawn, and what the reply shows of them. `generation_config.json` of the model may set other defaults for
/// temperature, top_p, top_k, min_p and repetition_penalty. `adapters`, `adapter_id` and `compose` exclude each other.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct SamplingFields {
    /// The base model, an adapter, an alias, `base:adapter`, or a reference. Absent or empty: the base model.
    #[schema(example = "demo")]
    model: Option<String>,
    /// 0 is greedy.
    #[schema(minimum = 0, default = 1)]
    temperature: Option<f64>,
    /// Draw from the most likely tokens that add up to this. 0 keeps one token.
    #[schema(minimum = 0, maximum = 1, default = 1)]
    top_p: Option<f64>,
    /// Draw from this many tokens; 0 and -1 mean all.
    #[schema(minimum = -1, extensions(("x-maximum" = json!("vocab"))))]
    top_k: Option<i64>,
    /// Choices for each prompt and adapter.
    #[schema(minimum = 1, default = 1, extensions(("x-maximum" = json!("n_max"))))]
    n: Option<u32>,
    /// Texts that end the completion. They are not part of it, unless `include_stop_str_in_output` is set.
    stop: Option<Stop>,
    /// Answer as server-sent events.
    #[schema(default = false)]
    stream: Option<bool>,
    /// Only with `stream`.
    stream_options: Option<StreamOptions>,
    /// Tokens of one chunk of a stream.
    #[schema(minimum = 1, maximum = 1024, default = 1)]
    stream_interval: Option<u32>,
    /// Logprobs of the prompt's tokens, with this many alternatives. Not with `stream`.
    #[schema(minimum = 0, maximum = 20)]
    prompt_logprobs: Option<u32>,
    /// Adds `prompt_token_ids` and `choices[].token_ids`.
    #[schema(default = false)]
    return_token_ids: Option<bool>,
    /// Tokens in logprobs are called `token:<id>`.
    #[schema(default = false)]
    return_tokens_as_token_ids: Option<bool>,
    /// What an alias that is sticky by user goes by.
    #[schema(required = false)]
    user: Value,
    /// Accepted, unused.
    #[schema(required = false)]
    metadata: Value,
    /// Accepted, unused: nothing is stored.
    #[schema(required = false)]
    store: Value,
    /// Accepted, unused.
    #[schema(required = false)]
    service_tier: Value,
    /// One choice (or `n`) for each entry; `choices[].adapter` says which. `base` is the base model.
    #[schema(min_items = 1, max_items = 256)]
    adapters: Option<Vec<FanOutEntry>>,
}

/// How tokens are drawn, on every route that goes on with a chat or a prompt.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct DrawingFields {
    /// Draw from tokens that are at least this likely, as a share of the most likely one.
    #[schema(minimum = 0, maximum = 1, default = 0)]
    min_p: Option<f64>,
    /// Tokens that end the completion.
    #[schema(max_items = 256)]
    stop_token_ids: Option<Vec<TokenId>>,
    /// Go on behind the model's end of text.
    #[schema(default = false)]
    ignore_eos: Option<bool>,
    /// Neither end of text nor stops before this many tokens.
    #[schema(minimum = 0, default = 0, extensions(("x-maximum" = json!("context_tokens"))))]
    min_tokens: Option<u32>,
    /// Subtracted from the logit of every token that was generated.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    presence_penalty: Option<f64>,
    /// Subtracted from the logit of a generated token, times how often it was generated.
    #[schema(minimum = -2, maximum = 2, default = 0)]
    frequency_penalty: Option<f64>,
    /// Divides the logits of tokens of prompt and completion.
    #[schema(exclusive_minimum = 0, maximum = 10, default = 1)]
    repetition_penalty: Option<f64>,
    /// Added to logits: token id to -100..100.
    #[schema(example = json!({"7": -100}), extensions(("x-maxProperties" = json!("logit_bias_max"))))]
    logit_bias: Option<BTreeMap<String, Bias>>,
    /// Texts that are not generated.
    #[schema(max_items = 256)]
    bad_words: Option<Vec<BadWord>>,
    /// Nothing else may be generated.
    #[schema(min_items = 1)]
    allowed_token_ids: Option<Vec<TokenId>>,
    /// The same seed, adapter, version and device give the same text, whatever else runs.
    seed: Option<i64>,
    /// Keep the last so many tokens of the prompt; -1 is what fits.
    #[schema(minimum = -1, extensions(("x-maximum" = json!("context_tokens"))))]
    truncate_prompt_tokens: Option<i64>,
    /// Special tokens are no text.
    #[schema(default = true)]
    skip_special_tokens: Option<bool>,
    /// Without effect: tokenizers here are fast ones.
    spaces_between_special_tokens: Option<bool>,
    /// A stop text is the end of the completion.
    #[schema(default = false)]
    include_stop_str_in_output: Option<bool>,
    /// The tokenizer's own beginning of text: by default for prompts, not for chats.
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
}

/// 1 to 256 bytes, not blank.
#[derive(Serialize, ToSchema)]
#[schema(min_length = 1, max_length = 256)]
pub(in crate::http::openapi) struct BadWord(String);

/// Added to a logit.
#[derive(Serialize, ToSchema)]
#[schema(minimum = -100, maximum = 100)]
pub(in crate::http::openapi) struct Bias(f64);

/// Tokens that were read and written.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
}

/// Parts of `prompt_tokens`.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct PromptTokensDetails {
    /// Tokens whose keys and values were still there.
    cached_tokens: u64,
}

/// The stop text or token that ended a choice; absent if none did.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::http::openapi) enum StopReason {
    Text(String),
    Token(u32),
}

/// What is known of a prompt token at its position.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct PromptLogprob {
    logprob: f32,
    /// 1 is the most likely; absent for the prompt's own token if it is none of the best.
    #[schema(nullable = false, minimum = 1)]
    rank: Option<u32>,
    decoded_token: String,
}

/// Token id to what is known of it; null for the first position.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct PromptPosition(BTreeMap<String, PromptLogprob>);

/// An error: the body of every refusal, and the last event of a stream that failed.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ErrorReply {
    error: ErrorBody,
    /// What is wrong with an adapter that was refused; on admin routes only.
    #[schema(nullable = false)]
    report: Option<super::admin::AdapterReport>,
}

/// What went wrong.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ErrorBody {
    /// What was found, what is accepted, what to change.
    message: String,
    #[schema(rename = "type")]
    kind: String,
    /// The field at fault.
    #[schema(required = true)]
    param: Option<String>,
    /// Stable; see the list of each status.
    code: String,
    /// The same request may succeed later.
    retryable: bool,
    /// As in the header `x-request-id`.
    request_id: String,
}
