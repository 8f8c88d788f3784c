//! `GET /v1/models` and `/v1/models/{id}`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Extension;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;

use crate::access::{Caller, KeyPolicy};
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

/// Bodies that are kept. Beyond it they are made anew.
const BODIES_MAX: usize = 64;

/// Ready-made bodies, one for each view of the registry.
#[derive(Default)]
pub(crate) struct Bodies {
    by_view: Mutex<HashMap<View, Kept>>,
}

/// Callers for whom the list is the same: those without a list of adapters of their own share their namespace's.
#[derive(Clone, PartialEq, Eq, Hash)]
struct View {
    namespace: Arc<str>,
    /// Of the key, if it sees less than its namespace.
    tenant: Option<u64>,
}

struct Kept {
    version: u64,
    context_tokens: u32,
    /// A reload may give the same key another policy; as long as this one is held, its address is not used again.
    policy: Arc<KeyPolicy>,
    body: Bytes,
}

impl Bodies {
    fn get(&self, caller: &Caller, version: u64, context_tokens: u32, make: impl FnOnce() -> (u64, Bytes)) -> Bytes {
        let restricted = caller.policy.adapters.is_some();
        let view = View { namespace: Arc::clone(&caller.namespace), tenant: restricted.then_some(caller.tenant) };
        let fresh = |kept: &&Kept| {
            let same_policy = !restricted || Arc::ptr_eq(&kept.policy, &caller.policy);
            kept.version == version && kept.context_tokens == context_tokens && same_policy
        };
        if let Some(kept) = self.lock().get(&view).filter(fresh) {
            return kept.body.clone();
        }
        // Outside the lock: a long list does not hold up callers whose body is there.
        let (version, body) = make();
        let mut by_view = self.lock();
        if by_view.len() >= BODIES_MAX && !by_view.contains_key(&view) {
            by_view.clear();
        }
        let policy = Arc::clone(&caller.policy);
        by_view.insert(view, Kept { version, context_tokens, policy, body: body.clone() });
        body
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<View, Kept>> {
        self.by_view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All base names, and the adapters of this caller that can serve.
pub(crate) async fn list(State(app): State<App>, Extension(caller): Extension<Caller>) -> Result<Response, ApiError> {
    // The card shows the context length, so there is no list before the model is known.
    let context_tokens = app.bounds()?.context_tokens;
    let body = app.models.get(&caller, app.registry.version(), context_tokens, || {
        let (version, cards) = app.registry.cards(&caller);
        let base = app.config.served_names.iter().map(|name| app.base_card(name, context_tokens));
        let data = base.chain(cards.iter().map(|card| app.adapter_card(card, context_tokens))).collect();
        (version, serde_json::to_vec(&List { object: "list", data }).unwrap_or_default().into())
    });
    Ok(json(body))
}

/// One card; `id` is percent-decoded and may hold `/`.
pub(crate) async fn one(
    State(app): State<App>,
    Path(id): Path<String>,
    Extension(caller): Extension<Caller>,
) -> Result<Response, ApiError> {
    let context_tokens = app.bounds()?.context_tokens;
    let card = if app.is_base(&id) {
        app.base_card(&id, context_tokens)
    } else {
        let card = app.registry.card(&caller, &id).ok_or_else(|| ApiError::model_not_found(&id))?;
        app.adapter_card(&card, context_tokens)
    };
    Ok(json(serde_json::to_vec(&card).unwrap_or_default().into()))
}

fn json(body: Bytes) -> Response {
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
}
