//! `GET /v1/models` and `/v1/models/{id}`.

use std::sync::PoisonError;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::access::Caller;
use crate::adapters::AdapterCard;
use crate::http::App;
use crate::http::error::ApiError;

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<Card>,
}

#[derive(Serialize)]
struct Card {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    max_model_len: u32,
    permission: [(); 0],
    #[serde(skip_serializing_if = "Option::is_none")]
    loramux: Option<AdapterFacts>,
}

#[derive(Serialize)]
struct AdapterFacts {
    content_id: String,
    rank: u32,
}

/// All base names, and the adapters that can serve. The body is kept until an adapter comes, changes or goes.
pub(crate) async fn list(State(app): State<App>) -> Result<Response, ApiError> {
    // The card shows the context length, so there is no list before the model is known.
    let context_tokens = app.bounds()?.context_tokens;
    let version = app.registry.version();
    let mut kept = app.models_body.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.as_ref().is_none_or(|(of, _)| *of != version) {
        let (version, cards) = app.registry.cards(&Caller::default());
        let base = app.config.served_names.iter().map(|name| app.base_card(name, context_tokens));
        let data = base.chain(cards.iter().map(|card| app.adapter_card(card, context_tokens))).collect();
        let body = serde_json::to_string(&List { object: "list", data }).unwrap_or_default();
        *kept = Some((version, body));
    }
    let body = kept.as_ref().map_or_else(String::new, |(_, body)| body.clone());
    Ok(json(body))
}

/// One card; `id` is percent-decoded and may hold `/`.
pub(crate) async fn one(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let context_tokens = app.bounds()?.context_tokens;
    let card = if app.is_base(&id) {
        app.base_card(&id, context_tokens)
    } else {
        let found = app.registry.card(&Caller::default(), &id).ok_or_else(|| ApiError::model_not_found(&id))?;
        app.adapter_card(&found, context_tokens)
    };
    Ok(json(serde_json::to_string(&card).unwrap_or_default()))
}

fn json(body: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], Body::from(body)).into_response()
}

impl App {
    fn base_card(&self, name: &str, max_model_len: u32) -> Card {
        Card {
            id: name.to_owned(),
            object: "model",
            created: self.started,
            owned_by: "loramux",
            root: self.config.model_root.clone(),
            parent: None,
            max_model_len,
            permission: [],
            loramux: None,
        }
    }

    fn adapter_card(&self, card: &AdapterCard, max_model_len: u32) -> Card {
        let facts = AdapterFacts { content_id: card.prepared.content.short(), rank: card.prepared.ranks.1 };
        Card {
            id: card.name.clone(),
            object: "model",
            created: card.created,
            owned_by: "loramux",
            root: card.root.clone(),
            parent: Some(self.base_name().to_owned()),
            max_model_len,
            permission: [],
            loramux: Some(facts),
        }
    }

    /// For routes that take `model` and use only the base model's text: base and adapter names are both fine.
    ///
    /// # Errors
    /// 404 for a name that is neither.
    pub(crate) fn check_model(&self, name: &str) -> Result<(), ApiError> {
        let known = name.is_empty() || self.is_base(name) || self.registry.is_candidate(&Caller::default(), name, None);
        if known { Ok(()) } else { Err(ApiError::model_not_found(name)) }
    }
}
