//! `POST /v1/responses`: OpenAI's Responses, over the machinery of chat completions. Nothing is kept between requests, so
//! whatever names an earlier response or a conversation is refused by name.

mod events;
mod input;
mod items;
mod reply;
mod request;
#[cfg(test)]
mod tests;
mod tools;

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;

use self::events::Events;
use self::reply::{Echo, whole};
pub(super) use self::request::FIELDS;
use self::request::{INNER_NAMES, NAMES, translate};
use super::App;
use super::body::json_object;
use super::error::ApiError;
use super::json::Fields;
use super::known_fields;
use super::turn::json_reply;

/// The handler.
pub(super) async fn responses(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let (parts, body) = json_object(request, &app.config.limits).await?;
    let ignored = app.ignored_fields(known_fields::Body::Response, &body)?;
    let asked = translate(&Fields::new(&body))?;
    let chat = app.start_chat(&parts, &asked.translated.chat).await;
    let chat = chat.map_err(|error| asked.translated.renamed(error, NAMES, INNER_NAMES))?;
    let echo = Echo::new(&chat, asked);
    let mut response = if chat.params.stream.is_some() {
        app.stream_turn(chat, Events::new(echo), &parts).await?
    } else {
        let variants = chat.variants.clone();
        let reply = whole(&echo, app.whole_turn(chat).await?);
        json_reply(&app, reply, &variants)
    };
    ignored.name_in(&mut response);
    Ok(response)
}
