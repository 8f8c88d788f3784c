//! The API as an OpenAPI 3.1 document at `/openapi.json`, and a page that shows it at `/docs`.
//!
//! The document is of this server: the vocabulary, the context and the limits of the command line are its bounds, and it
//! says whether a key is needed. Operations are written down in `*_routes.rs`, bodies in `schemas/`; tests hold both to the
//! router and to what the handlers accept and answer.

mod admin_routes;
mod draft;
mod openai_routes;
mod other_routes;
mod page;
mod schemas;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use serde_json::Value;
use utoipa::openapi::schema::{Object, ObjectBuilder, Type};
use utoipa::openapi::{InfoBuilder, License, Tag};

use self::draft::Draft;
use super::App;
use super::auth::Side;
use super::openai::validate::LOGIT_BIAS_MAX;

/// Documents that are kept: a server changes from loading to ready, and its keys can be read again.
const KEPT_MAX: usize = 8;

/// The routes, without a layer; on both listeners.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/openapi.json", get(document))
        .route("/docs", get(page::html))
        .route("/docs/docs.css", get(page::css))
        .route("/docs/docs.js", get(page::js))
}

/// What the document depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    /// The name that examples use.
    model: String,
    /// The operator's own listener.
    is_admin_listener: bool,
    has_keys: bool,
    has_admin: bool,
    has_metrics_key: bool,
    /// The model's and the server's numbers, by the names that `x-maximum` and `x-maxItems` of the schemas use.
    bounds: BTreeMap<&'static str, u64>,
}

/// Documents as they are served.
#[derive(Default)]
pub(crate) struct Documents {
    kept: Mutex<Vec<(Facts, Document)>>,
}

#[derive(Clone)]
struct Document {
    body: Bytes,
    /// In quotes.
    etag: HeaderValue,
}

impl Documents {
    fn get(&self, facts: Facts) -> Document {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, document)) = kept.iter().find(|(known, _)| *known == facts) {
            return document.clone();
        }
        let document = Document::of(&facts);
        if kept.len() >= KEPT_MAX {
            kept.remove(0);
        }
        kept.push((facts, document.clone()));
        document
    }
}

impl Document {
    fn of(facts: &Facts) -> Self {
        let body: Bytes = serde_json::to_vec(&document_of(facts)).unwrap_or_default().into();
        let hash = blake3::hash(&body).to_hex();
        let etag = HeaderValue::from_str(&format!("\"{}\"", hash.get(..16).unwrap_or(""))).ok();
        Self { body, etag: etag.unwrap_or(HeaderValue::from_static("\"\"")) }
    }
}

/// `GET /openapi.json`.
async fn document(State(app): State<App>, Extension(side): Extension<Side>, headers: HeaderMap) -> Response {
    let Document { body, etag } = app.documents.get(app.facts(side));
    let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok()).unwrap_or("");
    let is_known = |tag: &str| tag == "*" || tag.trim_start_matches("W/").as_bytes() == etag.as_bytes();
    let mut response = if known.split(',').map(str::trim).any(is_known) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(header::CONTENT_TYPE, "application/json")], Body::from(body)).into_response()
    };
    let headers = response.headers_mut();
    headers.insert(header::ETAG, etag);
    // It depends on the server's state and may name what a key protects.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    response
}

impl App {
    fn facts(&self, side: Side) -> Facts {
        let (ring, limits, shard) = (self.key_ring(), &self.config.limits, &self.engine.status().shard);
        let context = self.config.max_model_len.map_or(shard.context_tokens, |max| max.min(shard.context_tokens));
        let timeout = u64::try_from(self.config.adapter_load_timeout.as_millis()).unwrap_or(u64::MAX);
        let mut bounds = BTreeMap::from([
            ("logit_bias_max", LOGIT_BIAS_MAX as u64),
            ("metadata_max", 16),
            ("n_max", u64::from(limits.n_max)),
            ("composed_max", limits.composed_max as u64),
            ("native_stops_max", limits.native_stops_max as u64),
            ("adapter_load_timeout_ms", timeout),
        ]);
        // Unknown before the model is.
        if context > 0 && shard.vocab_size > 0 {
            bounds.insert("context_tokens", u64::from(context));
            bounds.insert("vocab", u64::from(shard.vocab_size));
        }
        Facts {
            model: self.base_name().to_owned(),
            is_admin_listener: side == Side::Admin,
            has_keys: ring.has_keys,
            has_admin: ring.has_admin,
            has_metrics_key: self.metrics_keys.has_keys,
            bounds,
        }
    }
}

fn document_of(facts: &Facts) -> Value {
    let mut draft = Draft::new(facts);
    let mut tags = Vec::new();
    if facts.is_admin_listener {
        openai_routes::shared(&mut draft);
        other_routes::health(&mut draft);
        tags.push(openai_routes::TAG);
    } else {
        openai_routes::add(&mut draft);
        other_routes::add(&mut draft);
        tags.extend([
            openai_routes::TAG,
            openai_routes::ANTHROPIC,
            other_routes::LORAX,
            other_routes::TOKENIZER,
            other_routes::RUNTIME,
        ]);
    }
    // On the main listener the admin routes exist where an admin key is set.
    if facts.is_admin_listener || facts.has_admin {
        admin_routes::add(&mut draft);
        tags.push(admin_routes::TAG);
    }
    tags.push(other_routes::SERVICE);
    let license = License::builder().name("Apache-2.0").identifier(Some("Apache-2.0")).build();
    let info = InfoBuilder::new()
        .title("loramux")
        .version(env!("CARGO_PKG_VERSION"))
        .license(Some(license))
        .description(Some(ABOUT))
        .build();
    let mut document = draft.finish(info, tags.into_iter().map(Tag::new).collect());
    set_bounds(&mut document, &facts.bounds);
    if let Some(last) = facts.bounds.get("vocab").and_then(|vocab| vocab.checked_sub(1))
        && let Some(token) = document.pointer_mut("/components/schemas/TokenId").and_then(Value::as_object_mut)
    {
        token.insert("maximum".into(), last.into());
    }
    document
}

/// What holds for every route.
const ABOUT: &str = "One base model and many LoRA adapters in one batch. Null means absent. A field that nobody reads is ignored \
                     and named in the reply's `x-ignored-fields`, or refused with a 400 where the server runs with \
                     `--strict-fields`. Every answer carries `x-request-id`; a `traceparent` of the caller is gone on with. \
                     An answer that is no success has an error with a stable `code`. 429 and 503 say in `retry-after` when to \
                     come back. Closing the connection cancels the request.";

/// Puts numbers in the place of `x-maximum: <name>` and its kin, and keywords where they belong.
fn set_bounds(value: &mut Value, bounds: &BTreeMap<&'static str, u64>) {
    match value {
        Value::Object(map) => {
            for keyword in ["maximum", "maxItems", "maxProperties"] {
                let named = map.remove(&format!("x-{keyword}"));
                if let Some(bound) = named.as_ref().and_then(Value::as_str).and_then(|name| bounds.get(name)) {
                    map.insert(keyword.to_owned(), (*bound).into());
                }
            }
            // JSON Schema has the keyword, the builder has not.
            if let Some(schema) = map.remove("x-contentSchema") {
                map.insert("contentSchema".into(), schema);
            }
            map.values_mut().for_each(|member| set_bounds(member, bounds));
            // Keys are strings in any case; a bound of a map ends up at its keys.
            if let Some(Value::Object(mut keys)) = map.remove("propertyNames") {
                map.extend(keys.remove("maxProperties").map(|most| ("maxProperties".to_owned(), most)));
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|member| set_bounds(member, bounds)),
        _ => {}
    }
}

fn text() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String)
}

fn integer() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::Integer)
}

fn number() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::Number)
}

fn one_of(values: &[&str]) -> Object {
    text().enum_values(Some(values.iter().copied())).build()
}
