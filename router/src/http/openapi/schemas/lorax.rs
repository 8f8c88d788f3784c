//! LoRAX's own routes.

use serde::Serialize;
use utoipa::ToSchema;

use super::format::{JsonSchema, ResponseFormat, TgiGrammar};
use super::generation::AdapterSource;

/// A text to go on with, and how.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct GenerateRequest {
    #[schema(min_length = 1)]
    inputs: String,
    parameters: Option<GenerateParameters>,
}

/// The same; `stream` decides the form of the reply.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct CompatGenerateRequest {
    #[schema(min_length = 1)]
    inputs: String,
    parameters: Option<GenerateParameters>,
    #[schema(default = false)]
    stream: Option<bool>,
}

/// Tokens are drawn if `do_sample` or any of `temperature`, `top_k` and `top_p` is set; else the likeliest are taken.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct GenerateParameters {
    /// An adapter: an alias, a registered name, or a reference.
    adapter_id: Option<String>,
    adapter_source: Option<AdapterSource>,
    /// Several adapters merged into one. Not with `adapter_id`.
    merged_adapters: Option<MergedAdapters>,
    /// The caller's own credential for the adapter's source.
    #[schema(max_length = 4096)]
    api_token: Option<String>,
    /// Generate this many, show the best. Above 1: with sampling, without `seed`, not in a stream.
    #[schema(minimum = 1, default = 1, extensions(("x-maximum" = json!("n_max"))))]
    best_of: Option<u32>,
    #[schema(minimum = 0)]
    temperature: Option<f64>,
    #[schema(exclusive_minimum = 0)]
    repetition_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f64>,
    #[schema(minimum = 1)]
    top_k: Option<i64>,
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    #[schema(default = false)]
    do_sample: Option<bool>,
    /// Tokens to generate at most; by default what the context has left.
    #[schema(minimum = 1)]
    max_new_tokens: Option<u32>,
    #[schema(default = false)]
    ignore_eos_token: Option<bool>,
    /// The text begins with `inputs`.
    #[schema(default = false)]
    return_full_text: Option<bool>,
    /// Texts that end the generation; they are part of the text.
    #[schema(extensions(("x-maxItems" = json!("native_stops_max"))))]
    stop: Option<Vec<super::generation::StopString>>,
    /// Keep the last so many tokens of the prompt.
    #[schema(minimum = 1, extensions(("x-maximum" = json!("context_tokens"))))]
    truncate: Option<u32>,
    /// Adds `details`.
    #[schema(default = false)]
    details: Option<bool>,
    /// Adds the prompt's tokens to `details`. Not in a stream.
    #[schema(default = false)]
    decoder_input_details: Option<bool>,
    /// Alternatives for each token.
    #[schema(minimum = 1, maximum = 20)]
    return_k_alternatives: Option<u32>,
    /// The same, in `top_tokens`.
    #[schema(minimum = 0, maximum = 20)]
    top_n_tokens: Option<u32>,
    /// `inputs` is a user's message.
    #[schema(default = false)]
    apply_chat_template: Option<bool>,
    #[schema(minimum = 0)]
    seed: Option<u64>,
    /// At most one of `response_format`, `schema` and `grammar`.
    response_format: Option<ResponseFormat>,
    schema: Option<JsonSchema>,
    grammar: Option<TgiGrammar>,
}

/// How several adapters become one.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct MergedAdapters {
    #[schema(min_items = 1, max_items = 8)]
    ids: Vec<String>,
    /// As many as there are ids; 1 for each by default.
    weights: Option<Vec<f64>>,
    merge_strategy: Option<MergeStrategy>,
    /// The share that is kept; above 0 and needed for every strategy but `linear`.
    #[schema(minimum = 0, maximum = 1)]
    density: Option<f64>,
    majority_sign_method: Option<MajoritySign>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum MergeStrategy {
    Linear,
    Ties,
    DareLinear,
    DareTies,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum MajoritySign {
    Total,
    Frequency,
}

/// A generated text.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct GenerateReply {
    generated_text: String,
    #[schema(nullable = false)]
    details: Option<GenerateDetails>,
}

/// With `details`.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct GenerateDetails {
    finish_reason: GenerateFinish,
    prompt_tokens: u32,
    generated_tokens: u32,
    skipped_tokens: u32,
    #[schema(required = true)]
    seed: Option<u64>,
    prefill: Vec<PrefillToken>,
    tokens: Vec<GeneratedToken>,
    #[schema(nullable = false)]
    top_tokens: Option<Vec<Vec<AlternativeToken>>>,
    #[schema(nullable = false)]
    best_of_sequences: Option<Vec<BestOfSequence>>,
}

/// A sequence that was not the best.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct BestOfSequence {
    generated_text: String,
    finish_reason: GenerateFinish,
    generated_tokens: u32,
    skipped_tokens: u32,
    #[schema(required = true)]
    seed: Option<u64>,
    prefill: Vec<PrefillToken>,
    tokens: Vec<GeneratedToken>,
    #[schema(nullable = false)]
    top_tokens: Option<Vec<Vec<AlternativeToken>>>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum GenerateFinish {
    Length,
    EosToken,
    StopSequence,
}

/// A token of the prompt.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct PrefillToken {
    id: u32,
    text: String,
    /// Null for the first.
    #[schema(required = true)]
    logprob: Option<f32>,
}

/// A generated token.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct GeneratedToken {
    id: u32,
    text: String,
    logprob: f32,
    special: bool,
    /// Always false: there is no speculation here.
    skipped: bool,
    #[schema(nullable = false)]
    alternative_tokens: Option<Vec<AlternativeToken>>,
}

/// A token that could have been generated.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AlternativeToken {
    id: u32,
    text: String,
    logprob: f32,
    special: bool,
}

/// One event of a stream: a token.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct GenerateEvent {
    token: GeneratedToken,
    #[schema(nullable = false)]
    top_tokens: Option<Vec<AlternativeToken>>,
    /// Null but in the last event.
    #[schema(required = true)]
    generated_text: Option<String>,
    /// Null but in the last event.
    #[schema(required = true)]
    details: Option<GenerateEventDetails>,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct GenerateEventDetails {
    finish_reason: GenerateFinish,
    prompt_tokens: u32,
    generated_tokens: u32,
    skipped_tokens: u32,
    #[schema(required = true)]
    seed: Option<u64>,
}

/// An error in LoRAX's form.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LoraxError {
    error: String,
    error_type: LoraxErrorType,
    /// The stable code behind LoRAX's few types.
    code: String,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum LoraxErrorType {
    Validation,
    TemplateError,
    Generation,
    Overloaded,
    IncompleteGeneration,
    Healthcheck,
    Authentication,
    Permission,
}

/// The server's settings as LoRAX names them; null is what this server does not have.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Info {
    model_id: String,
    #[schema(required = true)]
    model_sha: Option<String>,
    model_dtype: String,
    model_device_type: String,
    model_pipeline_tag: String,
    max_concurrent_requests: u64,
    max_best_of: u32,
    max_stop_sequences: u32,
    max_input_length: u32,
    max_input_tokens: u32,
    max_total_tokens: u32,
    waiting_served_ratio: f32,
    max_batch_total_tokens: u64,
    max_waiting_tokens: u32,
    validation_workers: u32,
    #[schema(required = true)]
    eager_prefill: Option<bool>,
    version: String,
    #[schema(required = true)]
    sha: Option<String>,
    #[schema(required = true)]
    docker_label: Option<String>,
    #[schema(required = true)]
    request_logger_url: Option<String>,
}
