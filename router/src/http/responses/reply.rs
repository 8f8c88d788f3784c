//! The response object.

use serde::Serialize;
use serde_json::Value;

use super::items::{Item, Items, Status};
use super::request::Asked;
use crate::http::error::ApiError;
use crate::http::openai::chat::ChatStart;
use crate::http::turn::{TurnStop, TurnUsage, WholeTurn};

/// What every form of the response says about its request.
#[derive(Debug, Default)]
pub(super) struct Echo {
    id: String,
    created_at: u64,
    model: String,
    temperature: f32,
    top_p: f32,
    asked: Asked,
}

/// As OpenAI's clients read it. What is optional there and was not asked for is absent, but for the members that they
/// expect to find.
#[derive(Debug, Serialize)]
pub(super) struct ResponseObject<'a> {
    id: &'a str,
    object: &'static str,
    created_at: u64,
    status: Status,
    background: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_at: Option<u64>,
    error: Option<ResponseError<'a>>,
    incomplete_details: Option<IncompleteDetails>,
    instructions: Option<&'a Value>,
    max_output_tokens: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tool_calls: Option<&'a Value>,
    metadata: &'a Value,
    model: &'a str,
    output: &'a [Item],
    parallel_tool_calls: bool,
    previous_response_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_cache_key: Option<&'a Value>,
    reasoning: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    safety_identifier: Option<&'a Value>,
    service_tier: &'static str,
    store: bool,
    temperature: f32,
    text: &'a Value,
    tool_choice: &'a Value,
    tools: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<i64>,
    top_p: f32,
    truncation: &'static str,
    usage: Option<Usage>,
    user: Option<&'a Value>,
}

/// Why a response failed. Its codes are OpenAI's; the `error` event behind it has ours.
#[derive(Debug, Serialize)]
struct ResponseError<'a> {
    code: &'static str,
    message: &'a str,
}

#[derive(Debug, Serialize)]
struct IncompleteDetails {
    reason: &'static str,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Usage {
    input_tokens: u64,
    input_tokens_details: InputDetails,
    output_tokens: u64,
    output_tokens_details: OutputDetails,
    total_tokens: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct InputDetails {
    cache_write_tokens: u64,
    cached_tokens: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct OutputDetails {
    reasoning_tokens: u64,
}

impl From<TurnUsage> for Usage {
    fn from(usage: TurnUsage) -> Self {
        Self {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputDetails { cache_write_tokens: 0, cached_tokens: usage.cached_tokens },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputDetails { reasoning_tokens: usage.reasoning_tokens },
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
        }
    }
}

impl Echo {
    pub(super) fn new(chat: &ChatStart, asked: Asked) -> Self {
        Self {
            id: format!("resp_{}", uuid::Uuid::new_v4().simple()),
            created_at: chat.shape.created,
            model: chat.shape.model.clone(),
            temperature: chat.params.sampling.temperature,
            top_p: chat.params.sampling.top_p,
            asked,
        }
    }

    /// The response while it is generated.
    pub(super) fn running<'a>(&'a self, output: &'a [Item]) -> ResponseObject<'a> {
        let asked = &self.asked;
        ResponseObject {
            id: &self.id,
            object: "response",
            created_at: self.created_at,
            status: Status::InProgress,
            background: false,
            completed_at: None,
            error: None,
            incomplete_details: None,
            instructions: asked.instructions.as_ref(),
            max_output_tokens: asked.max_output_tokens.as_ref(),
            max_tool_calls: asked.max_tool_calls.as_ref(),
            metadata: &asked.metadata,
            model: &self.model,
            output,
            parallel_tool_calls: asked.parallel_tool_calls,
            previous_response_id: None,
            prompt_cache_key: asked.prompt_cache_key.as_ref(),
            reasoning: &asked.reasoning,
            safety_identifier: asked.safety_identifier.as_ref(),
            service_tier: "default",
            store: false,
            temperature: self.temperature,
            text: &asked.text,
            tool_choice: &asked.tool_choice,
            tools: &asked.tools,
            top_logprobs: asked.top_logprobs,
            top_p: self.top_p,
            truncation: asked.truncation,
            usage: None,
            user: asked.user.as_ref(),
        }
    }

    /// The response at its end.
    pub(super) fn ended<'a>(&'a self, output: &'a [Item], stop: &TurnStop, usage: TurnUsage) -> ResponseObject<'a> {
        let is_cut = *stop == TurnStop::Length;
        ResponseObject {
            status: if is_cut { Status::Incomplete } else { Status::Completed },
            completed_at: (!is_cut).then(crate::http::unix_seconds),
            incomplete_details: is_cut.then_some(IncompleteDetails { reason: "max_output_tokens" }),
            usage: Some(usage.into()),
            ..self.running(output)
        }
    }

    /// The response that came to nothing.
    pub(super) fn failed<'a>(&'a self, output: &'a [Item], error: &'a ApiError) -> ResponseObject<'a> {
        let code = match error.cause.row().kind {
            "rate_limit_error" => "rate_limit_exceeded",
            "invalid_request_error" => "invalid_prompt",
            _ => "server_error",
        };
        let error = Some(ResponseError { code, message: &error.message });
        ResponseObject { status: Status::Failed, error, ..self.running(output) }
    }
}

/// The body of a reply that is not streamed.
pub(super) fn whole(echo: &Echo, turn: WholeTurn) -> Vec<u8> {
    let mut items = Items::default();
    for (delta, logprobs) in turn.deltas {
        items.take(delta, logprobs);
    }
    items.end(&turn.stop);
    let response = echo.ended(&items.list, &turn.stop, turn.usage);
    serde_json::to_vec(&response).unwrap_or_default() // strings and finite numbers: this cannot fail
}
