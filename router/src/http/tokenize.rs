//! `/tokenize` and `/detokenize`.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;

use super::App;
use super::body::json_object;
use super::error::ApiError;
use super::json::Fields;
use super::openai::chat::chat_prompt;
use super::openai::validate::token_id;
use crate::access::Caller;
use crate::text::PlacedToken;

#[derive(Serialize)]
struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<Vec<String>>,
}

/// vLLM's form (`prompt` or `messages`) or LoRAX's (`inputs`); the body decides.
pub(crate) async fn tokenize(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let (parts, body) = json_object(request, &app.config.limits).await?;
    let fields = Fields::new(&body);
    if let Some(inputs) = fields.string("inputs")? {
        return placed(&app, &fields, inputs).await;
    }
    app.check_model(&caller(&parts), fields.string("model")?.unwrap_or(""))?;
    let add_special = fields.boolean("add_special_tokens")?;
    let bounds = app.bounds()?;
    let tokens = match fields.string("prompt")? {
        Some(prompt) => app.text.encode(prompt.to_owned(), add_special.unwrap_or(true)).await?,
        None if fields.get("messages").is_some() => {
            let chat = chat_prompt(&fields, &bounds)?;
            app.text.encode_chat(chat, add_special.unwrap_or(false)).await?
        }
        None => return Err(ApiError::missing("prompt")),
    };
    let with_texts = fields.boolean("return_token_strs")?.unwrap_or(false);
    let token_strs = with_texts.then(|| tokens.iter().map(|&token| app.token_text(token)).collect());
    let reply = Tokenized { count: tokens.len(), max_model_len: bounds.context_tokens, tokens, token_strs };
    Ok(Json(reply).into_response())
}

fn caller(parts: &Parts) -> Caller {
    parts.extensions.get::<Caller>().cloned().unwrap_or_default()
}

async fn placed(app: &App, fields: &Fields<'_>, inputs: &str) -> Result<Response, ApiError> {
    let add_special = fields.boolean("add_special_tokens")?.unwrap_or(true);
    let tokens = app.text.encode_placed(inputs.to_owned(), add_special).await?;
    let show = |token: &PlacedToken| {
        let PlacedToken { id, start, stop } = *token;
        json!({"id": id, "text": app.token_text(id), "start": start, "stop": stop})
    };
    Ok(Json(tokens.iter().map(show).collect::<Vec<_>>()).into_response())
}

/// `{model, tokens}` -> `{prompt}`.
pub(crate) async fn detokenize(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let (parts, body) = json_object(request, &app.config.limits).await?;
    let fields = Fields::new(&body);
    app.check_model(&caller(&parts), fields.string("model")?.unwrap_or(""))?;
    let bounds = app.bounds()?;
    let values = fields.array("tokens")?.ok_or_else(|| ApiError::missing("tokens"))?;
    let tokens = values.iter().map(|value| token_id("tokens", value, bounds.vocab)).collect::<Result<Vec<_>, _>>()?;
    if tokens.len() > bounds.context_tokens as usize {
        let given = format!("{} tokens", tokens.len());
        return Err(ApiError::invalid("tokens", &format!("at most {} tokens", bounds.context_tokens), &given));
    }
    Ok(Json(json!({"prompt": app.text.decode_all(tokens).await?})).into_response())
}
