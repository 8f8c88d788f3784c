//! Anthropic's Messages over the machinery of chat completions: `POST /v1/messages` and `/v1/messages/count_tokens`, with
//! Anthropic's own error body.

pub(super) mod error;
mod events;
mod messages;
mod reply;
mod request;
#[cfg(test)]
mod tests;
mod tools;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Request};
use axum::response::{IntoResponse, Response};

use self::events::Events;
use self::reply::{Head, TokenCount, whole};
pub(super) use self::request::FIELDS;
use self::request::{INNER_NAMES, NAMES, Purpose, translate};
use super::App;
use super::body::json_object;
use super::envelope::RequestId;
use super::error::ApiError;
use super::json::Fields;
use super::known_fields;
use super::openai::chat::chat_prompt;
use super::turn::json_reply;
use crate::access::Caller;

/// Where these routes are.
const ROUTE: &str = "/v1/messages";

/// True for these routes and whatever lies below: their clients read Anthropic's errors and send Anthropic's header.
pub(super) fn is_here(path: &str) -> bool {
    path.strip_prefix(ROUTE).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The key as Anthropic's clients send it.
pub(super) fn key(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get("x-api-key").map(|value| value.as_bytes().trim_ascii())
}

/// `POST /v1/messages`.
pub(super) async fn messages(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let (parts, body) = json_object(request, &app.config.limits).await?;
    let ignored = app.ignored_fields(known_fields::Body::Message, &body)?;
    let translated = translate(&Fields::new(&body), Purpose::Reply)?;
    let chat = app.start_chat(&parts, &translated.chat).await;
    let chat = chat.map_err(|error| translated.renamed(error, NAMES, INNER_NAMES))?;
    let head = Head::new(chat.shape.model.clone());
    let mut response = if chat.params.stream.is_some() {
        app.stream_turn(chat, Events::new(head), &parts).await?
    } else {
        let variants = chat.variants.clone();
        let reply = whole(&head, app.whole_turn(chat).await?);
        json_reply(&app, reply, &variants)
    };
    ignored.name_in(&mut response);
    Ok(with_request_id(response, &parts))
}

/// `POST /v1/messages/count_tokens`: the tokens that the same message would have as a prompt.
pub(super) async fn count_tokens(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let (parts, body) = json_object(request, &app.config.limits).await?;
    app.ignored_fields(known_fields::Body::Message, &body)?;
    let translated = translate(&Fields::new(&body), Purpose::Count)?;
    let count = count(&app, &parts, &Fields::new(&translated.chat)).await;
    let input_tokens = count.map_err(|error| translated.renamed(error, NAMES, INNER_NAMES))?;
    Ok(with_request_id(Json(TokenCount { input_tokens }).into_response(), &parts))
}

async fn count(app: &App, parts: &Parts, chat: &Fields<'_>) -> Result<usize, ApiError> {
    let caller = parts.extensions.get::<Caller>().cloned().unwrap_or_default();
    app.check_model(&caller, chat.string("model")?.unwrap_or(""))?;
    let mut prompt = chat_prompt(chat, &app.bounds()?)?;
    prompt.tool_format = app.config.tool_call_parser;
    let add_special = chat.boolean("add_special_tokens")?.unwrap_or(false);
    Ok(app.text.encode_chat(prompt, add_special).await?.len())
}

/// The header that Anthropic's clients look for.
fn with_request_id(mut response: Response, parts: &Parts) -> Response {
    let id = parts.extensions.get::<RequestId>().and_then(|id| HeaderValue::from_str(&id.0).ok());
    response.headers_mut().extend(id.map(|id| (error::REQUEST_ID, id)));
    response
}
