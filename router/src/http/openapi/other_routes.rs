//! LoRAX's routes, the tokenizer's, loading adapters as vLLM and SGLang do, and the service routes.

use serde_json::json;
use utoipa::openapi::path::HttpMethod::{Get, Post};

use super::draft::{Access, Draft, Op, Shape};
use super::openai_routes::completion_example;
use super::schemas::chat::{ChatCompletion, ChatCompletionChunk, ChatCompletionRequest};
use super::schemas::completions::{Completion, CompletionChunk, CompletionRequest};
use super::schemas::lorax::{CompatGenerateRequest, GenerateEvent, GenerateReply, GenerateRequest, Info};
use super::schemas::runtime::{LoadLoraRequest, SglangLoaded, UnloadLoraRequest};
use super::schemas::service::{
    DetokenizeRequest, Detokenized, Load, TokenizeChat, TokenizeInputs, TokenizePrompt, TokenizeReply, Version,
};
use super::text;
use crate::http::error::Cause;

/// Tags of these routes.
pub(super) const LORAX: &str = "LoRAX";
pub(super) const TOKENIZER: &str = "Tokenizer";
pub(super) const RUNTIME: &str = "Runtime adapters";
pub(super) const SERVICE: &str = "Service";

/// What stands in the way of loading an adapter.
pub(super) const LOADING: &[Cause] = &[
    Cause::NameIsBaseModel,
    Cause::ModelNotFound,
    Cause::AdapterExists,
    Cause::AdapterInvalid,
    Cause::AdapterUnsupported,
    Cause::AdapterBaseMismatch,
    Cause::AdapterTooLarge,
    Cause::AdapterRankLimit,
    Cause::QuotaExceeded,
    Cause::AdapterLoading,
    Cause::AdapterLoadFailed,
    Cause::AdapterAuthUnavailable,
    Cause::DiskFull,
];

/// LoRAX's report of the work, in milliseconds and counts.
const WORK_HEADERS: [(&str, &str); 13] = [
    ("x-compute-type", "`cpu` or `gpu`."),
    ("x-compute-time", "Milliseconds."),
    ("x-compute-characters", "Of `inputs`."),
    ("x-total-time", "Milliseconds."),
    ("x-prompt-tokens", "Count."),
    ("x-generated-tokens", "Count."),
    ("x-total-tokens", "Count."),
    ("x-validation-time", "Milliseconds."),
    ("x-queue-time", "Milliseconds."),
    ("x-inference-time", "Milliseconds."),
    ("x-time-per-token", "Milliseconds."),
    ("x-time-to-first-token", "Milliseconds."),
    ("x-time-per-output-token", "Milliseconds."),
];

/// Adds them.
pub(super) fn add(draft: &mut Draft<'_>) {
    lorax(draft);
    encoders(draft);
    tokenizer(draft);
    runtime(draft);
    health(draft);
    service(draft);
}

fn with_work<'d, 'a>(op: Op<'d, 'a>) -> Op<'d, 'a> {
    WORK_HEADERS.into_iter().fold(op, |op, (name, meaning)| op.header(200, name, meaning))
}

fn lorax(draft: &mut Draft<'_>) {
    let inputs = json!({"inputs": "Hello!\n", "parameters": {"max_new_tokens": 16, "details": true}});
    let events = "Server-sent events, one for each token; the last has the whole text. There is no `[DONE]`.";
    let op = draft
        .op(Post, "/generate", "generate")
        .tag(LORAX)
        .says("Generate a text", "")
        .shape(Shape::Lorax)
        .body::<GenerateRequest>(inputs.clone())
        .reply::<GenerateReply>(200, "The text.");
    with_work(op).generates().done();
    draft
        .op(Post, "/generate_stream", "generateStream")
        .tag(LORAX)
        .says("Generate a text, token by token", "")
        .shape(Shape::Lorax)
        .body::<GenerateRequest>(inputs.clone())
        .events::<GenerateEvent>(200, events)
        .header(200, "x-compute-type", "`cpu` or `gpu`.")
        .header(200, "x-compute-characters", "Of `inputs`.")
        .generates()
        .done();
    let op = draft
        .op(Post, "/", "compatGenerate")
        .tag(LORAX)
        .says(
            "Generate a text",
            "What clients that know only a base URL call: the reply is a list of one text, or a stream.",
        )
        .shape(Shape::Lorax)
        .body::<CompatGenerateRequest>(inputs)
        .reply_any(200, "A list of one text, or with `stream` server-sent events.", |any| any.list::<GenerateReply>())
        .events::<GenerateEvent>(200, events);
    with_work(op).generates().done();
    let model = draft.facts.model.clone();
    draft
        .op(Post, "/invocations", "invocations")
        .tag(LORAX)
        .says("Generate, by what the body holds", "`inputs` means `POST /`, `messages` a chat, `prompt` completions.")
        .shape(Shape::LoraxOrEnvelope)
        .body_any::<CompatGenerateRequest, ChatCompletionRequest, CompletionRequest>(completion_example(&model))
        .reply_any(200, "As the route that the body means.", |any| {
            any.list::<GenerateReply>();
            any.one::<ChatCompletion>();
            any.one::<Completion>();
        })
        .events_any(200, "As the route that the body means.", |any| {
            any.one::<GenerateEvent>();
            any.one::<ChatCompletionChunk>();
            any.one::<CompletionChunk>();
        })
        .generates()
        .done();
    draft
        .op(Get, "/info", "info")
        .tag(LORAX)
        .says("The server's settings, as LoRAX names them", "")
        .reply::<Info>(200, "What this server does not have is null.")
        .refuses(&[Cause::NotReady, Cause::Draining])
        .done();
}

fn encoders(draft: &mut Draft<'_>) {
    for (path, id) in [("/embed", "embed"), ("/classify", "classify"), ("/classify_batch", "classifyBatch")] {
        let op = draft.op(Post, path, id).tag(LORAX).says(
            "Not served: encoders",
            "Always refused: the served model generates text. It embeds at `/v1/embeddings`.",
        );
        op.shape(Shape::Lorax).refuses(&[Cause::UnsupportedParameter]).done();
    }
}

fn tokenizer(draft: &mut Draft<'_>) {
    let busy = &[Cause::ModelNotFound, Cause::NotReady, Cause::Draining];
    let model = draft.facts.model.clone();
    let example = json!({"model": model, "prompt": "Hello!\n", "return_token_strs": true});
    draft
        .op(Post, "/tokenize", "tokenize")
        .tag(TOKENIZER)
        .says("Tokens of a text or a chat", "`prompt` or `messages` is vLLM's form, `inputs` LoRAX's.")
        .body_any::<TokenizePrompt, TokenizeChat, TokenizeInputs>(example)
        .reply::<TokenizeReply>(200, "In the form of the request.")
        .refuses(busy)
        .done();
    draft
        .op(Post, "/detokenize", "detokenize")
        .tag(TOKENIZER)
        .says("The text of tokens", "")
        .body::<DetokenizeRequest>(json!({"model": model, "tokens": [72, 105]}))
        .reply::<Detokenized>(200, "The text.")
        .refuses(busy)
        .done();
}

fn runtime(draft: &mut Draft<'_>) {
    let only = "Needs `--allow-runtime-adapters` or an admin key on the server.";
    let disabled = &[Cause::RuntimeAdaptersDisabled];
    let load = json!({"lora_name": "sql", "lora_path": "hf://org/sql-lora"});
    let unload = json!({"lora_name": "sql"});
    draft
        .op(Post, "/v1/load_lora_adapter", "loadLoraAdapter")
        .tag(RUNTIME)
        .says("Load an adapter, as vLLM does", only)
        .access(Access::Runtime)
        .shape(Shape::Vllm)
        .body::<LoadLoraRequest>(load.clone())
        .text(200, "text/plain", "The adapter can serve.")
        .refuses(LOADING)
        .refuses(disabled)
        .done();
    draft
        .op(Post, "/v1/unload_lora_adapter", "unloadLoraAdapter")
        .tag(RUNTIME)
        .says("Unload an adapter, as vLLM does", only)
        .access(Access::Runtime)
        .shape(Shape::Vllm)
        .body::<UnloadLoraRequest>(unload.clone())
        .text(200, "text/plain", "No later request has the name.")
        .refuses(&[Cause::ModelNotFound])
        .refuses(disabled)
        .done();
    for (path, id, verb) in [
        ("/load_lora_adapter", "sglangLoadLoraAdapter", "Load an adapter, as SGLang does"),
        ("/unload_lora_adapter", "sglangUnloadLoraAdapter", "Unload an adapter, as SGLang does"),
    ] {
        let op = draft.op(Post, path, id).tag(RUNTIME).says(verb, only).access(Access::Runtime).shape(Shape::Sglang);
        let op = if path.starts_with("/load") {
            op.body::<LoadLoraRequest>(load.clone()).refuses(LOADING)
        } else {
            op.body::<UnloadLoraRequest>(unload.clone()).refuses(&[Cause::ModelNotFound])
        };
        op.reply::<SglangLoaded>(200, "What the caller has loaded now.").refuses(disabled).done();
    }
}

/// Routes that both listeners have.
pub(super) fn health(draft: &mut Draft<'_>) {
    let ready = "200 when a request can be served now. Never runs the model.";
    let not_ready = &[Cause::NotReady, Cause::Draining];
    let mut paths = vec![(Get, "/health", "health"), (Get, "/health/ready", "healthReady")];
    if !draft.facts.is_admin_listener {
        paths.extend([(Get, "/ping", "ping"), (Post, "/ping", "postPing")]);
    }
    for (method, path, id) in paths {
        let op = draft.op(method, path, id).tag(SERVICE).says("Ready?", ready).access(Access::Open);
        op.empty(200, "Ready.").refuses(not_ready).done();
    }
    draft
        .op(Get, "/", "root")
        .tag(SERVICE)
        .says(
            "Ready? Or the console",
            "Browsers (`accept` names `text/html`) get the console, all others what `/health` says.",
        )
        .access(Access::Open)
        .empty(200, "Ready, without a body; or the console as `text/html`.")
        .empty(304, "The browser has the console already.")
        .refuses(not_ready)
        .done();
    draft
        .op(Get, "/health/live", "healthLive")
        .tag(SERVICE)
        .says("Alive?", "200 while the process schedules.")
        .access(Access::Open)
        .empty(200, "Alive.")
        .done();
    draft
        .op(Get, "/metrics", "metrics")
        .tag(SERVICE)
        .says("Metrics", "Prometheus text, version 0.0.4.")
        .access(Access::Metrics)
        .text(200, "text/plain", "The metrics.")
        .refuses(&[Cause::InvalidApiKey, Cause::RateLimited])
        .done();
    let access = if draft.facts.is_admin_listener { Access::Admin } else { Access::Keyed };
    draft
        .op(Get, "/openapi.json", "openapi")
        .tag(SERVICE)
        .says("This document", "Its bounds are this server's own.")
        .access(access)
        .in_header("if-none-match", text().build(), "The `etag` of an earlier answer.")
        .object(200, "The document.")
        .header(200, "etag", "Changes with the document.")
        .empty(304, "Still the same.")
        .done();
    let op = draft.op(Get, "/console", "console").tag(SERVICE).says("The console", "").access(Access::Open);
    op.text(200, "text/html", "The page.").empty(304, "Still the same.").done();
    let op = draft.op(Get, "/console/{file}", "consoleFile").tag(SERVICE).says("A file of the console", "");
    let op = op.access(Access::Open).in_path("file", "Its name.").empty(304, "Still the same.");
    let op = op.text(200, "text/css", "The file.").text(200, "text/javascript", "").text(200, "image/svg+xml", "");
    op.refuses(&[Cause::RouteNotFound]).done();
    for (path, id, media, what) in [
        ("/docs", "docs", "text/html", "The page that shows this document"),
        ("/docs/docs.css", "docsStyle", "text/css", "Its style"),
        ("/docs/docs.js", "docsScript", "text/javascript", "Its script"),
    ] {
        let op = draft.op(Get, path, id).tag(SERVICE).says(what, "").access(Access::Open);
        op.text(200, media, "The file.").done();
    }
}

fn service(draft: &mut Draft<'_>) {
    for (path, id) in [("/health/startup", "healthStartup"), ("/startup", "startup")] {
        let op = draft.op(Get, path, id).tag(SERVICE).says("Started?", "503 until the model was ready once.");
        op.access(Access::Open).empty(200, "Started.").refuses(&[Cause::NotReady]).done();
    }
    draft.op(Get, "/version", "version").tag(SERVICE).says("Version", "").reply::<Version>(200, "The version.").done();
    draft.op(Get, "/load", "load").tag(SERVICE).says("Load", "").reply::<Load>(200, "The load.").done();
}
