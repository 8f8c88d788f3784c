//! LoRAX's own routes, for its clients: `POST /`, `/generate`, `/generate_stream`, `/invocations` and `GET /info`.
//!
//! They differ from the OpenAI routes in what they read (`validate`) and what they write (`reply`, `stream`, `error`);
//! between the two is the same machinery: [`Params`](super::openai::validate::Params) in, runs out.

pub(super) mod error;
mod info;
mod merged;
mod reply;
mod stream;
mod token_texts;
mod validate;

use std::time::Instant;

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value};

use self::reply::Shape;
use self::validate::{NativeRequest, native_request};
use super::App;
use super::body::json_object;
use super::envelope::{ErrorShape, RequestId};
use super::error::{ApiError, Cause};
use super::json::Fields;
use super::known_fields;
use super::openai::reply::name_the_source;
use super::openai::resolve::Variant;
use super::openai::run::Run;
use super::openai::submit::{Asker, EncodedPrompt, fit_prompt};
use super::openai::validate::Bounds;
use super::server::ConnectionAbort;
use crate::text::ChatPrompt;

pub(super) use info::info;

/// Which form the reply has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A list of one reply, or a stream if the body asks for one.
    Compat,
    /// One reply.
    Whole,
    /// A stream.
    Stream,
}

/// `POST /`.
pub(super) async fn compat(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let started = Instant::now();
    let (parts, body) = json_object(request, &app.config.limits).await?;
    app.native(Form::Compat, &parts, &body, started).await
}

/// `POST /generate`.
pub(super) async fn generate(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let started = Instant::now();
    let (parts, body) = json_object(request, &app.config.limits).await?;
    app.native(Form::Whole, &parts, &body, started).await
}

/// `POST /generate_stream`.
pub(super) async fn generate_stream(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let started = Instant::now();
    let (parts, body) = json_object(request, &app.config.limits).await?;
    app.native(Form::Stream, &parts, &body, started).await
}

/// `POST /invocations`: the body decides which route this is, and with it how an error looks.
pub(super) async fn invocations(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let started = Instant::now();
    let (parts, body) = json_object(request, &app.config.limits).await?;
    let fields = Fields::new(&body);
    let answer = match (fields.get("inputs"), fields.get("messages"), fields.get("prompt")) {
        (None, Some(_), _) => app.chat_completion(&parts, &body).await,
        (None, None, Some(_)) => app.completion(&parts, &body).await,
        _ => return app.native(Form::Compat, &parts, &body, started).await,
    };
    let mut response = answer.into_response();
    response.extensions_mut().insert(ErrorShape::OpenAi);
    Ok(response)
}

/// `POST /embed`, `/classify` and `/classify_batch`: LoRAX has them for encoders.
pub(super) async fn no_encoder() -> ApiError {
    ApiError::at(
        Cause::UnsupportedParameter,
        "inputs",
        "this model generates text and is no encoder; its embeddings are at `/v1/embeddings`",
    )
}

impl App {
    async fn native(
        &self,
        form: Form,
        parts: &Parts,
        body: &Map<String, Value>,
        started: Instant,
    ) -> Result<Response, ApiError> {
        let bounds = self.bounds()?;
        let asker = self.asker(parts)?;
        let mut asked = native_request(&Fields::new(body), form, &bounds)?;
        asked.params.grammar = self.compile_format(asked.format.take()).await?;
        let ignored = self.ignored_fields(known_fields::Body::Native, body)?;
        let variants = self.native_variants(&asked, &asker).await?;
        let prompt = self.native_prompt(&asked, &bounds).await?;
        let max_tokens = prompt.max_tokens;
        let runs = self.submit(vec![prompt], &variants, &asked.params, asked.wanted(), asker)?;
        let shape = Shape { app: self.clone(), asked, max_tokens, started, validated: Instant::now() };
        let mut response = self.native_answer(form, shape, runs, &variants, parts).await?;
        ignored.name_in(&mut response);
        Ok(response)
    }

    async fn native_variants(&self, asked: &NativeRequest, asker: &Asker) -> Result<Vec<Variant>, ApiError> {
        match &asked.merged {
            None => self.resolve(&asked.params, asker).await,
            Some(merged) => Ok(vec![self.resolve_merged(merged, &asked.params.adapter, asker).await?]),
        }
    }

    async fn native_prompt(&self, asked: &NativeRequest, bounds: &Bounds) -> Result<EncodedPrompt, ApiError> {
        let inputs = asked.inputs.clone();
        let tokens = if asked.apply_chat_template {
            let chat = ChatPrompt {
                messages: vec![serde_json::json!({"role": "user", "content": inputs})],
                add_generation_prompt: true,
                output_bytes_max: super::openai::chat::prompt_bytes_max(bounds.context_tokens),
                ..ChatPrompt::default()
            };
            self.text.encode_chat(chat, false).await?
        } else {
            let least = self.text.tokens_at_least(inputs.len());
            if least > bounds.context_tokens as usize && asked.params.truncate.is_none() {
                // Megabytes take seconds to encode; these cannot fit.
                let wanted = asked.params.max_tokens.unwrap_or(1) as usize;
                return Err(asked.params.context_fields.over(bounds.context_tokens as usize, least, wanted));
            }
            self.text.encode(inputs, true).await?
        };
        fit_prompt(tokens, asked.params.max_tokens, None, &asked.params, bounds)
    }

    async fn native_answer(
        &self,
        form: Form,
        shape: Shape,
        runs: Vec<Run>,
        variants: &[Variant],
        parts: &Parts,
    ) -> Result<Response, ApiError> {
        let mut response = if shape.asked.params.stream.is_some() {
            let request_id = parts.extensions.get::<RequestId>().map_or_else(String::new, |id| id.0.clone());
            shape.stream(runs, request_id, parts.extensions.get::<ConnectionAbort>().cloned()).await?
        } else {
            shape.whole(runs, form == Form::Compat).await?
        };
        name_the_source(&mut response, self, variants);
        Ok(response)
    }
}
