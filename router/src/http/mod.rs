//! The HTTP front: OpenAI's routes and the service routes on one listener.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod activity;
mod auth;
mod backend;
mod body;
mod config;
mod envelope;
mod error;
mod json;
mod leftover;
mod openai;
mod server;
mod service;
#[cfg(test)]
mod tests;
mod tokenize;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use tokio::sync::watch;

pub use backend::{Backend, Events};
pub use config::{HttpLimits, RouterConfig};
pub use error::{ApiError, Cause, Row};
pub use server::serve;

use crate::adapters::{AdapterRef, AdapterSettings, Registry};
use crate::metrics::Metrics;
use crate::text::TextModel;
use openai::validate::Bounds;

/// Everything a handler needs. Cheap to clone.
#[derive(Clone)]
pub struct App {
    inner: Arc<AppInner>,
}

/// See [`App`].
pub struct AppInner {
    pub(crate) config: RouterConfig,
    pub(crate) text: TextModel,
    pub(crate) engine: Arc<dyn Backend>,
    pub(crate) registry: Registry,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) keys: auth::Keys,
    /// Unix seconds.
    pub(crate) started: u64,
    /// Version of the registry's cards and the body of `/v1/models` made from them.
    pub(crate) models_body: Mutex<Option<(u64, String)>>,
    draining: AtomicBool,
    /// True: requests that still run end now.
    ending: watch::Sender<bool>,
}

impl std::ops::Deref for App {
    type Target = AppInner;
    fn deref(&self) -> &AppInner {
        &self.inner
    }
}

impl App {
    /// Puts the parts together. Adapters of the configuration are prepared by [`serve`] (or [`Self::preload`]).
    pub fn new(mut config: RouterConfig, text: TextModel, engine: impl Backend) -> Self {
        if config.served_names.is_empty() {
            config.served_names.push("base".into());
        }
        let engine: Arc<dyn Backend> = Arc::new(engine);
        let settings = AdapterSettings {
            registered: config.adapters.iter().map(|(name, dir)| (name.clone(), AdapterRef::directory(dir))).collect(),
            dirs: config.adapter_dirs.clone(),
            base_names: config.served_names.clone(),
            ..AdapterSettings::default()
        };
        let inner = AppInner {
            keys: auth::Keys::new(&config.api_keys),
            config,
            text,
            registry: Registry::new(settings, Arc::clone(&engine)),
            engine,
            metrics: Arc::default(),
            started: unix_seconds(),
            models_body: Mutex::default(),
            draining: AtomicBool::new(false),
            ending: watch::Sender::new(false),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Starts to prepare the adapters that the configuration names. Needs a tokio runtime.
    pub fn preload(&self) {
        self.registry.preload();
    }

    /// All routes with their layers, without a listener.
    pub fn router(&self) -> Router {
        let app = self.clone();
        Router::new()
            .route("/", get(service::ready))
            .route("/health", get(service::ready))
            .route("/health/ready", get(service::ready))
            .route("/health/live", get(service::live))
            .route("/health/startup", get(service::startup))
            .route("/startup", get(service::startup))
            .route("/ping", get(service::ready).post(service::ready))
            .route("/metrics", get(service::metrics))
            .route("/version", get(service::version))
            .route("/load", get(service::load))
            .route("/tokenize", post(tokenize::tokenize))
            .route("/detokenize", post(tokenize::detokenize))
            .route("/v1/models", get(openai::models::list))
            .route("/v1/models/{*id}", get(openai::models::one))
            .route("/v1/completions", post(openai::completions::completions))
            .route("/v1/chat/completions", post(openai::chat::chat_completions))
            .route("/v1/embeddings", post(service::no_embeddings))
            .fallback(service::no_route)
            .method_not_allowed_fallback(service::no_method)
            .layer(from_fn_with_state(app.clone(), auth::authenticate))
            .layer(from_fn_with_state(app.clone(), envelope::envelope))
            .with_state(app)
    }

    /// From now on health says no, and new generation requests get 503 `draining`.
    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.engine.begin_drain();
    }

    /// Requests that still run end now with an error.
    pub fn end_requests(&self) {
        self.ending.send_replace(true);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Resolves when running requests have to end.
    pub(crate) fn ending(&self) -> watch::Receiver<bool> {
        self.ending.subscribe()
    }

    /// The first served name.
    pub(crate) fn base_name(&self) -> &str {
        self.config.served_names.first().map_or("", String::as_str)
    }

    /// What requests are checked against.
    ///
    /// # Errors
    /// 503 `not_ready` before the shard has said what it serves; 503 `draining`.
    pub(crate) fn bounds(&self) -> Result<Bounds, ApiError> {
        let status = self.engine.status();
        if self.is_draining() {
            return Err(ApiError::new(Cause::Draining, "the server is shutting down"));
        }
        if status.shard.vocab_size == 0 || status.shard.context_tokens == 0 {
            return Err(ApiError::new(Cause::NotReady, "the model is still loading"));
        }
        let context = status.shard.context_tokens;
        Ok(Bounds {
            vocab: status.shard.vocab_size,
            context_tokens: self.config.max_model_len.map_or(context, |max| max.min(context)),
            limits: self.config.limits,
            defaults: if self.config.use_generation_config { self.text.defaults() } else { Default::default() },
            adapter_load_timeout: self.config.adapter_load_timeout,
        })
    }

    /// `loramux-<version>-<8 hex of the base's content id>`.
    pub(crate) fn fingerprint(&self) -> String {
        let status = self.engine.status();
        let id: String = status.shard.base_content_id.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        format!("loramux-{}-{id:0>8}", env!("CARGO_PKG_VERSION"))
    }

    /// The text of one token alone; bytes that are no whole scalar become U+FFFD.
    pub(crate) fn token_text(&self, token: u32) -> String {
        String::from_utf8_lossy(&self.text.token_bytes(token)).into_owned()
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
