//! Fields that nobody reads: OpenAI's clients grow faster than servers, so they are let through and named in a header; a
//! strict server refuses them.

use axum::http::HeaderValue;
use axum::response::Response;
use serde_json::{Map, Value};

use super::error::{ApiError, Cause, cut};
use super::openai::reply::visible_ascii;
use super::{App, anthropic, hints, responses, turn};

/// The header that names them.
pub(crate) const IGNORED_FIELDS: &str = "x-ignored-fields";
/// Names that it holds at most.
const SHOWN_MAX: usize = 16;

/// What both generation routes read, or take and have no use for.
#[rustfmt::skip]
const GENERATION: &[&str] = &[
    "adapter_id", "adapter_load_timeout_ms", "adapter_scale", "adapter_source", "adapter_wait", "adapters",
    "add_special_tokens", "allowed_token_ids", "api_token", "bad_words", "cache_salt", "compose", "frequency_penalty",
    "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json", "guided_regex", "guided_whitespace_pattern",
    "ignore_eos", "ignore_eos_token", "include_stop_str_in_output", "kv_transfer_params", "logit_bias",
    "logprob_token_ids", "logprobs", "max_tokens", "merged_adapters", "metadata", "min_p", "min_tokens", "model", "n",
    "presence_penalty", "priority", "prompt_cache_key", "prompt_embeds", "prompt_logprobs", "repetition_penalty",
    "request_id", "response_format", "return_token_ids", "return_tokens_as_token_ids", "safety_identifier", "seed",
    "service_tier", "skip_special_tokens", "spaces_between_special_tokens", "stop", "stop_token_ids", "store", "stream",
    "stream_interval", "stream_options", "structured_outputs", "temperature", "top_k", "top_p", "truncate_prompt_tokens",
    "use_beam_search", "user", "vllm_xargs",
];

/// Those of `/v1/completions` alone.
const COMPLETIONS: &[&str] = &["best_of", "echo", "prompt", "suffix"];

/// Those of `/v1/chat/completions` alone.
#[rustfmt::skip]
const CHAT: &[&str] = &[
    "add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message", "documents", "echo",
    "function_call", "functions", "include_reasoning", "max_completion_tokens", "messages", "modalities",
    "parallel_tool_calls", "reasoning_effort", "separate_reasoning", "tool_choice", "tools", "top_logprobs", "verbosity",
];

/// Those of `/v1/embeddings`.
#[rustfmt::skip]
const EMBEDDINGS: &[&str] = &[
    "adapter_id", "adapter_load_timeout_ms", "adapter_scale", "adapter_source", "adapter_wait", "adapters",
    "add_special_tokens", "api_token", "cache_salt", "compose", "dimensions", "encoding_format", "input", "metadata",
    "model", "normalize", "pooling", "priority", "request_id", "stream", "truncate_prompt_tokens", "user",
];

/// LoRAX's `parameters`.
#[rustfmt::skip]
const PARAMETERS: &[&str] = &[
    "adapter_id", "adapter_load_timeout_ms", "adapter_scale", "adapter_source", "adapter_wait", "adapters", "api_token",
    "apply_chat_template", "best_of", "compose", "decoder_input_details", "details", "do_sample", "frequency_penalty",
    "grammar", "ignore_eos_token", "max_new_tokens", "merged_adapters", "presence_penalty", "repetition_penalty",
    "response_format", "return_full_text", "return_k_alternatives", "schema", "seed", "stop", "temperature",
    "top_k", "top_n_tokens", "top_p", "truncate", "typical_p", "user", "watermark",
];

/// Members of `stream_options`.
const STREAM_OPTIONS: &[&str] = &["continuous_usage_stats", "include_obfuscation", "include_usage"];
/// Members of `response_format`; those of TGI and LoRAX among them.
const RESPONSE_FORMAT: &[&str] = &["json_schema", "schema", "type", "value"];
const JSON_SCHEMA: &[&str] = &["description", "name", "schema", "strict"];
/// Members of vLLM's `structured_outputs`.
#[rustfmt::skip]
const STRUCTURED_OUTPUTS: &[&str] = &[
    "choice", "disable_additional_properties", "disable_any_whitespace", "disable_fallback", "grammar", "json", "json_object",
    "regex", "structural_tag", "whitespace_pattern",
];
const TOOL: &[&str] = &["function", "type"];
const FUNCTION: &[&str] = &["description", "name", "parameters", "strict"];
/// Members of a chat's message: those that are read, and those that clients send back as they came in a reply.
#[rustfmt::skip]
const MESSAGE: &[&str] = &[
    "annotations", "audio", "content", "function_call", "name", "reasoning", "reasoning_content", "refusal", "role",
    "tool_call_id", "tool_calls",
];

/// Which fields a body may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// Of `/v1/completions`.
    Completion,
    /// Of `/v1/chat/completions`.
    Chat,
    /// Of `/v1/embeddings`.
    Embeddings,
    /// Of LoRAX's routes.
    Native,
    /// Of `/v1/responses`.
    Response,
    /// Of `/v1/messages` and what counts its tokens.
    Message,
}

impl Body {
    /// True if the route reads a field of this name, or takes it on purpose.
    fn knows(self, name: &str) -> bool {
        match self {
            Self::Completion => GENERATION.contains(&name) || COMPLETIONS.contains(&name),
            Self::Chat => GENERATION.contains(&name) || CHAT.contains(&name),
            Self::Embeddings => EMBEDDINGS.contains(&name),
            Self::Native => matches!(name, "inputs" | "parameters" | "stream"),
            Self::Response => turn::EXTRAS.contains(&name) || responses::FIELDS.contains(&name),
            Self::Message => turn::EXTRAS.contains(&name) || anthropic::FIELDS.contains(&name),
        }
    }

    /// Names in `body` that nobody reads, with their place. Those without a value ask for nothing.
    fn unknown(self, body: &Map<String, Value>) -> Vec<String> {
        let own = body.iter().filter(|(name, value)| !value.is_null() && !self.knows(name));
        let mut names: Vec<String> = own.map(|(name, _)| name.clone()).collect();
        match self {
            Self::Completion | Self::Chat => {
                unknown_members(body.get("stream_options"), "stream_options", STREAM_OPTIONS, &mut names);
                unknown_members(body.get("structured_outputs"), "structured_outputs", STRUCTURED_OUTPUTS, &mut names);
                unknown_in_format(body.get("response_format"), "response_format", &mut names);
            }
            Self::Native => {
                let parameters = body.get("parameters");
                unknown_members(parameters, "parameters", PARAMETERS, &mut names);
                let format = parameters.and_then(|parameters| parameters.get("response_format"));
                unknown_in_format(format, "parameters.response_format", &mut names);
            }
            Self::Embeddings | Self::Response | Self::Message => {}
        }
        if self == Self::Chat {
            for (i, tool) in entries(body.get("tools")) {
                unknown_members(Some(tool), &format!("tools[{i}]"), TOOL, &mut names);
                unknown_members(tool.get("function"), &format!("tools[{i}].function"), FUNCTION, &mut names);
            }
            for (i, message) in entries(body.get("messages")) {
                unknown_members(Some(message), &format!("messages[{i}]"), MESSAGE, &mut names);
            }
        }
        names
    }
}

fn entries(list: Option<&Value>) -> impl Iterator<Item = (usize, &Value)> {
    list.and_then(Value::as_array).into_iter().flatten().enumerate()
}

/// Appends the members of the object at `path` that are not `known`. What is no object is refused where it is read.
fn unknown_members(object: Option<&Value>, path: &str, known: &[&str], names: &mut Vec<String>) {
    let members = object.and_then(Value::as_object).into_iter().flatten();
    let unknown = members.filter(|(name, value)| !value.is_null() && !known.contains(&name.as_str()));
    names.extend(unknown.map(|(name, _)| format!("{path}.{name}")));
}

fn unknown_in_format(format: Option<&Value>, path: &str, names: &mut Vec<String>) {
    unknown_members(format, path, RESPONSE_FORMAT, names);
    let schema = format.and_then(|format| format.get("json_schema"));
    unknown_members(schema, &format!("{path}.json_schema"), JSON_SCHEMA, names);
}

/// Names that were ignored, for the reply.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ignored(Option<HeaderValue>);

impl Ignored {
    /// Says so in the reply.
    pub(crate) fn name_in(self, response: &mut Response) {
        if let Some(value) = self.0 {
            response.headers_mut().insert(IGNORED_FIELDS, value);
        }
    }
}

impl App {
    /// Looks for fields that nobody reads.
    ///
    /// # Errors
    /// 400 on a strict server.
    pub(crate) fn ignored_fields(&self, kind: Body, body: &Map<String, Value>) -> Result<Ignored, ApiError> {
        let names = kind.unknown(body);
        let Some(first) = names.first() else { return Ok(Ignored::default()) };
        if let Some((name, hint)) = names.iter().find_map(|name| Some((name, hints::of_field(kind, name)?))) {
            return Err(ApiError::unsupported(name, hint));
        }
        if self.config.strict_fields {
            let message = format!("`{}` is no field of this route (--strict-fields)", cut(first));
            return Err(ApiError::at(Cause::UnsupportedParameter, &cut(first), message));
        }
        let shown: Vec<String> = names.iter().take(SHOWN_MAX).map(|name| cut(name).replace(',', "%2C")).collect();
        Ok(Ignored(HeaderValue::from_str(&visible_ascii(&shown.join(","))).ok()))
    }
}
