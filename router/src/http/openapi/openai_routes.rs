//! OpenAI's and Anthropic's routes.

use serde_json::{Value, json};
use utoipa::openapi::path::HttpMethod::{Get, Post};

use super::draft::{Draft, Op, Shape};
use super::schemas::anthropic::{Message, MessageEvent, MessageTokenCount, MessagesPrompt, MessagesRequest};
use super::schemas::chat::{ChatCompletion, ChatCompletionChunk, ChatCompletionRequest};
use super::schemas::completions::{Completion, CompletionChunk, CompletionRequest};
use super::schemas::embeddings::{EmbeddingList, EmbeddingRequest};
use super::schemas::models::{Model, ModelList};
use super::schemas::responses::{ResponseEvent, ResponseObject, ResponseRequest};
use super::{number, text};
use crate::http::error::Cause;

/// The tag of these routes.
pub(super) const TAG: &str = "OpenAI";
/// The tag of Anthropic's.
pub(super) const ANTHROPIC: &str = "Anthropic";

/// What stands in the way of generating.
pub(super) const GENERATION: &[Cause] = &[
    Cause::ContextLengthExceeded,
    Cause::InvalidSchema,
    Cause::AdapterAmbiguous,
    Cause::NameIsBaseModel,
    Cause::SourceForbidden,
    Cause::ModelNotFound,
    Cause::AdapterInvalid,
    Cause::AdapterUnsupported,
    Cause::AdapterBaseMismatch,
    Cause::AdapterTooLarge,
    Cause::AdapterRankLimit,
    Cause::QueueFull,
    Cause::QuotaExceeded,
    Cause::ShardFault,
    Cause::AdapterNumerics,
    Cause::AdapterLoading,
    Cause::AdapterLoadFailed,
    Cause::AdapterAuthUnavailable,
    Cause::DiskFull,
    Cause::NotReady,
    Cause::Draining,
    Cause::DeadlineExceeded,
];

/// What a reply says of what answered: name and meaning.
const SOURCE_HEADERS: [(&str, &str); 7] = [
    ("x-ignored-fields", "Fields of the request that nobody reads."),
    ("x-model-id", "The base model."),
    ("x-adapter-id", "The adapter that answered; several are joined by commas."),
    ("x-adapter-source", "Where it came from."),
    ("x-adapter-revision", "Commit or entity tag of its files."),
    ("x-adapter-content-id", "16 hex digits of its content's hash."),
    ("x-adapter-fallback", "`base` where the base model answered because the adapter was not ready."),
];

/// Times in a reply's headers. Of a stream, those up to its admission.
const TIME_HEADERS: [(&str, &str); 8] = [
    ("x-validation-time", "Milliseconds until the request was handed to the engine, adapters' loads included."),
    ("x-queue-time", "Milliseconds from there until it was admitted."),
    ("x-inference-time", "Milliseconds from there to its last token."),
    ("x-total-time", "Milliseconds in all."),
    ("x-time-to-first-token", "Milliseconds."),
    ("x-time-per-token", "Milliseconds."),
    ("x-time-per-output-token", "Milliseconds, the first token left out."),
    ("server-timing", "The same for browsers."),
];

impl Op<'_, '_> {
    /// The headers that say how long what took.
    fn timed(self) -> Self {
        TIME_HEADERS.into_iter().fold(self, |op, (name, meaning)| op.header(200, name, meaning))
    }

    /// What every route that generates has: request headers, reply headers, errors.
    pub(super) fn generates(self) -> Self {
        let timeout = number().exclusive_minimum(Some(0)).build();
        let op = self
            .in_header("x-request-timeout", timeout, "Seconds; never longer than the server's own limit.")
            .in_header(
                "x-adapter-token",
                text().max_length(Some(4096)).build(),
                "The caller's own credential for the adapter's source.",
            )
            .refuses(GENERATION);
        SOURCE_HEADERS.into_iter().fold(op, |op, (name, meaning)| op.header(200, name, meaning))
    }
}

/// Adds them.
pub(super) fn add(draft: &mut Draft<'_>) {
    shared(draft);
    let model = draft.facts.model.clone();
    let events = "The whole, or with `stream` server-sent events, each with its name and a `type`.";
    draft
        .op(Post, "/v1/responses", "createResponse")
        .tag(TAG)
        .says("Response", "OpenAI's Responses, without anything kept between requests.")
        .body::<ResponseRequest>(json!({"model": model, "input": "Hello!", "max_output_tokens": 32}))
        .reply::<ResponseObject>(200, events)
        .events::<ResponseEvent>(200, events)
        .generates()
        .timed()
        .done();
    draft
        .op(Post, "/v1/embeddings", "createEmbedding")
        .tag(TAG)
        .says("Embeddings", "The decoder's final hidden states of each input, pooled. Adapters act on them.")
        .body::<EmbeddingRequest>(json!({"model": model, "input": "Hello!"}))
        .reply::<EmbeddingList>(200, "One embedding for each input.")
        .generates()
        .timed()
        .done();
    anthropic(draft, &model);
}

fn anthropic(draft: &mut Draft<'_>, model: &str) {
    let messages = json!([{"role": "user", "content": "Hello!"}]);
    let prompt = json!({"model": model, "messages": messages});
    let message = json!({"model": model, "messages": messages, "max_tokens": 32});
    let events = "The whole, or with `stream` server-sent events, each with its name and a `type`.";
    draft
        .op(Post, "/v1/messages", "createMessage")
        .tag(ANTHROPIC)
        .says("Message", "The key may come in `x-api-key`.")
        .shape(Shape::Anthropic)
        .body::<MessagesRequest>(message)
        .reply::<Message>(200, events)
        .events::<MessageEvent>(200, events)
        .generates()
        .timed()
        .done();
    draft
        .op(Post, "/v1/messages/count_tokens", "countMessageTokens")
        .tag(ANTHROPIC)
        .says("Count a prompt's tokens", "")
        .shape(Shape::Anthropic)
        .body::<MessagesPrompt>(prompt)
        .reply::<MessageTokenCount>(200, "The tokens.")
        .refuses(&[Cause::ModelNotFound, Cause::NotReady, Cause::Draining])
        .done();
}

/// Routes that the operator's listener has too, for the console.
pub(super) fn shared(draft: &mut Draft<'_>) {
    let model = draft.facts.model.clone();
    let streams = "The whole, or with `stream` server-sent events: `data:` lines that hold one chunk each, `: ping` comments, \
                   `data: [DONE]` at the end. A failure on the way is one event with the error, and no `[DONE]`.";
    draft
        .op(Post, "/v1/completions", "createCompletion")
        .tag(TAG)
        .says("Completion", "One choice for each prompt, adapter and `n`, in this order.")
        .body::<CompletionRequest>(completion_example(&model))
        .reply::<Completion>(200, streams)
        .events::<CompletionChunk>(200, streams)
        .generates()
        .timed()
        .done();
    draft
        .op(Post, "/v1/chat/completions", "createChatCompletion")
        .tag(TAG)
        .says("Chat completion", "The model's chat template makes the prompt.")
        .body::<ChatCompletionRequest>(chat_example(&model))
        .reply::<ChatCompletion>(200, streams)
        .events::<ChatCompletionChunk>(200, streams)
        .generates()
        .timed()
        .done();
    let models = "The base model's names, aliases, and adapters that are registered and usable, also while they are not in memory.";
    draft
        .op(Get, "/v1/models", "listModels")
        .tag(TAG)
        .says("List models", models)
        .reply::<ModelList>(200, "What this key may send as `model`.")
        .refuses(&[Cause::NotReady, Cause::Draining])
        .done();
    if draft.facts.is_admin_listener {
        return;
    }
    draft
        .op(Get, "/v1/models/{id}", "retrieveModel")
        .tag(TAG)
        .says("Show a model", "")
        .in_path("id", "Percent-encoded; may hold `/`.")
        .reply::<Model>(200, "The model.")
        .refuses(&[Cause::ModelNotFound, Cause::NotReady, Cause::Draining])
        .done();
}

pub(super) fn completion_example(model: &str) -> Value {
    json!({"model": model, "prompt": "Hello!\n", "max_tokens": 16, "temperature": 0})
}

pub(super) fn chat_example(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_completion_tokens": 32})
}
