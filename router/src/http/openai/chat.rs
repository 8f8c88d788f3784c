//! `POST /v1/chat/completions`, and what both generation routes do at their ends.

use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::http::request::Parts;
use axum::response::Response;
use serde_json::{Map, Value};

use super::messages::messages;
use super::reply::{Kind, Shape, name_the_source};
use super::resolve::Variant;
use super::run::Run;
use super::stream::StreamContext;
use super::submit::{Asker, Wanted, fit_prompt};
use super::unsupported;
use super::validate::{Bounds, ContextFields, LOGPROBS_MAX, Params, check_sequences, max_tokens, params, small};
use crate::access::Caller;
use crate::http::App;
use crate::http::auth::{Metered, UpstreamToken};
use crate::http::body::json_object;
use crate::http::envelope::RequestId;
use crate::http::error::{ApiError, Cause, shown};
use crate::http::json::Fields;
use crate::http::known_fields;
use crate::http::server::ConnectionAbort;
use crate::text::{ChatPrompt, TemplateChoice};

/// Bytes of `chat_template_kwargs`.
const KWARGS_BYTES_MAX: usize = 16 * 1024;
/// Bytes of rendered prompt per token of context, at most.
const PROMPT_BYTES_PER_TOKEN: usize = 4;
/// A short context still allows templates with a long preamble.
const PROMPT_BYTES_MIN: usize = 64 * 1024;

/// The request beyond what both routes share.
struct ChatRequest {
    params: Params,
    chat: ChatPrompt,
    logprobs: Option<u32>,
}

/// The handler.
pub(crate) async fn chat_completions(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let (parts, body) = json_object(request, &app.config.limits).await?;
    app.chat_completion(&parts, &body).await
}

fn validate(fields: &Fields<'_>, bounds: &Bounds) -> Result<ChatRequest, ApiError> {
    unsupported::check_chat(fields)?;
    let mut params = params(fields, bounds)?;
    let completion = max_tokens(fields, "max_completion_tokens", 1)?;
    params.context_fields = ContextFields {
        prompt: "messages",
        max_tokens: if completion.is_some() { "max_completion_tokens" } else { "max_tokens" },
    };
    params.max_tokens = completion.or(max_tokens(fields, "max_tokens", 1)?);
    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top = small(fields, "top_logprobs", 0, LOGPROBS_MAX)?;
    if !logprobs && top.is_some_and(|top| top > 0) {
        return Err(ApiError::invalid(
            "top_logprobs",
            "absent unless `logprobs` is true",
            &top.unwrap_or(0).to_string(),
        ));
    }
    Ok(ChatRequest { logprobs: logprobs.then_some(top.unwrap_or(0)), chat: chat_prompt(fields, bounds)?, params })
}

/// Reads what the template needs.
///
/// # Errors
/// 400 that names the field.
pub(crate) fn chat_prompt(fields: &Fields<'_>, bounds: &Bounds) -> Result<ChatPrompt, ApiError> {
    let messages = messages(fields)?;
    let add_generation_prompt = fields.boolean("add_generation_prompt")?;
    let continue_final_message = fields.boolean("continue_final_message")?.unwrap_or(false);
    if continue_final_message && add_generation_prompt == Some(true) {
        let message = "`continue_final_message` and `add_generation_prompt` exclude each other";
        return Err(ApiError::at(Cause::InvalidValue, "continue_final_message", message));
    }
    fields.object("chat_template_kwargs")?;
    let kwargs = fields.get("chat_template_kwargs").and_then(|value| value.as_object()).cloned().unwrap_or_default();
    let kwargs_bytes = serde_json::to_string(&kwargs).map_or(0, |text| text.len());
    if kwargs_bytes > KWARGS_BYTES_MAX {
        return Err(ApiError::limit("chat_template_kwargs", kwargs_bytes, "bytes", KWARGS_BYTES_MAX, None));
    }
    Ok(ChatPrompt {
        messages,
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
        kwargs,
        template: request_template(fields, bounds)?,
        output_bytes_max: prompt_bytes_max(bounds.context_tokens),
    })
}

/// The request's own template, where the operator lets it bring one.
fn request_template(fields: &Fields<'_>, bounds: &Bounds) -> Result<TemplateChoice, ApiError> {
    const NAME: &str = "chat_template";
    match fields.string(NAME)? {
        None => Ok(TemplateChoice::Base),
        Some(source) if bounds.trust_request_chat_template => Ok(TemplateChoice::Source(source.to_owned())),
        Some(_) => {
            let why = "templates are programs; only the model's own is run (--trust-request-chat-template)";
            Err(ApiError::unsupported(NAME, why))
        }
    }
}

/// Bytes that a rendered prompt may have.
pub(crate) fn prompt_bytes_max(context_tokens: u32) -> usize {
    (context_tokens as usize * PROMPT_BYTES_PER_TOKEN).max(PROMPT_BYTES_MIN)
}

/// A chat that was handed to the engine. Every route that ends in a chat starts here and writes its own reply.
pub(crate) struct ChatStart {
    pub(crate) shape: Shape,
    pub(crate) runs: Vec<Run>,
    pub(crate) params: Params,
    pub(crate) variants: Vec<Variant>,
}

impl App {
    /// Answers a chat.
    ///
    /// # Errors
    /// Whatever stands in its way.
    pub(crate) async fn chat_completion(&self, parts: &Parts, body: &Map<String, Value>) -> Result<Response, ApiError> {
        let ignored = self.ignored_fields(known_fields::Body::Chat, body)?;
        let chat = self.start_chat(parts, body).await?;
        let mut response = self.answer(chat.shape, chat.runs, &chat.params, &chat.variants, parts).await?;
        ignored.name_in(&mut response);
        Ok(response)
    }

    /// Checks a chat and hands it to the engine. `body` has the fields of `/v1/chat/completions`.
    ///
    /// # Errors
    /// Whatever stands in its way.
    pub(crate) async fn start_chat(&self, parts: &Parts, body: &Map<String, Value>) -> Result<ChatStart, ApiError> {
        let bounds = self.bounds()?;
        let asker = self.asker(parts)?;
        let mut asked = validate(&Fields::new(body), &bounds)?;
        let variants = self.resolve(&asked.params, &asker).await?;
        check_sequences("n", variants.len() * asked.params.n as usize, &bounds.limits)?;
        self.choose_template(&mut asked.chat, &variants).await?;
        let tokens = self.text.encode_chat(asked.chat, asked.params.add_special.unwrap_or(false)).await?;
        let prompt = fit_prompt(tokens, asked.params.max_tokens, None, &asked.params, &bounds)?;
        let mut shape = Shape::new(self, Kind::Chat, &asked.params);
        shape.logprobs = asked.logprobs;
        let wanted = Wanted {
            sequences: asked.params.n,
            logprobs: asked.logprobs,
            prompt_logprobs: asked.params.prompt_logprobs,
        };
        self.forbid_words(&mut asked.params, &bounds).await?;
        let runs = self.submit(vec![prompt], &variants, &asked.params, wanted, asker)?;
        Ok(ChatStart { shape, runs, params: asked.params, variants })
    }

    /// One adapter's own template for a chat under it alone. The request's own wins, and where there are several adapters
    /// they share the base model's.
    async fn choose_template(&self, chat: &mut ChatPrompt, variants: &[Variant]) -> Result<(), ApiError> {
        let [Variant { adapters, .. }] = variants else { return Ok(()) };
        let ([adapter], TemplateChoice::Base, true) = (&**adapters, &chat.template, self.config.use_adapter_templates)
        else {
            return Ok(());
        };
        let Some((identity, dir)) = adapter.local_files() else { return Ok(()) };
        let found = self.text.adapter_template(identity, dir.to_owned()).await;
        let found = found.map_err(|error| {
            let message = format!("adapter `{}`: {error} (--adapter-chat-template)", shown(&adapter.name));
            ApiError::at(Cause::AdapterInvalid, "model", message)
        })?;
        if let Some(template) = found {
            chat.template = TemplateChoice::Compiled(template);
        }
        Ok(())
    }

    /// Who asks, and how long they wait: `x-request-timeout`, but never longer than the server's own limit.
    ///
    /// # Errors
    /// 400 for a header that is no positive number.
    pub(crate) fn asker(&self, parts: &Parts) -> Result<Asker, ApiError> {
        const NAME: &str = "x-request-timeout";
        let sent = match parts.headers.get(NAME) {
            None => None,
            Some(value) => {
                let text = value.to_str().unwrap_or("");
                let seconds = text.trim().parse::<f64>().ok().filter(|s| *s > 0.0 && *s <= 1e9);
                let seconds = seconds.ok_or_else(|| ApiError::invalid(NAME, "a positive number of seconds", text))?;
                Some(Duration::from_secs_f64(seconds))
            }
        };
        let deadline = [sent, self.config.request_timeout].into_iter().flatten().min();
        Ok(Asker {
            caller: parts.extensions.get::<Caller>().cloned().unwrap_or_default(),
            metered: parts.extensions.get::<Metered>().cloned(),
            token: parts.extensions.get::<UpstreamToken>().and_then(|token| token.0.clone()),
            deadline_ms: deadline.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX).max(1)),
        })
    }

    /// Streams, or waits for the whole; either way the reply names what answered.
    pub(crate) async fn answer(
        &self,
        shape: Shape,
        runs: Vec<Run>,
        params: &Params,
        variants: &[Variant],
        parts: &Parts,
    ) -> Result<Response, ApiError> {
        let mut response = match params.stream {
            None => shape.whole(runs).await?,
            Some(options) => {
                let request_id = parts.extensions.get::<RequestId>().map_or_else(String::new, |id| id.0.clone());
                let abort = parts.extensions.get::<ConnectionAbort>().cloned();
                shape.stream(runs, StreamContext { options, request_id, abort }).await?
            }
        };
        name_the_source(&mut response, self, variants);
        Ok(response)
    }
}
