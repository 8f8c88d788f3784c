//! The HTTP front: OpenAI's routes and the service routes on one listener.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod activity;
mod admin;
mod anthropic;
mod auth;
mod backend;
mod bare_error;
mod body;
mod config;
mod console;
mod cors;
mod envelope;
mod error;
mod hints;
mod json;
mod keys;
mod known_fields;
mod leftover;
mod lorax;
mod openai;
mod openapi;
mod rate;
mod responses;
mod runtime;
mod server;
mod service;
#[cfg(test)]
mod tests;
mod tokenize;
mod turn;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use tokio::sync::watch;

pub use admin::report as adapter_report;
pub use backend::{Backend, Events};
pub use config::{HttpLimits, ReasoningParser, RouterConfig};
pub use cors::CorsOrigin;
pub(crate) use error::cut;
pub use error::{ApiError, Cause, Row};
pub use keys::{KeySpec, KeysError, glob_set, keys_of_lines, keys_of_toml};
pub use rate::Meter;
pub use server::{Listener, serve, serve_admin};

use crate::adapters::{AdapterRef, AdapterSettings, Registry};
use crate::metrics::Metrics;
use crate::observe::Observer;
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
    pub(crate) observer: Arc<Observer>,
    keys: RwLock<Arc<keys::KeyRing>>,
    metrics_keys: keys::KeyRing,
    pub(crate) wrong_keys: rate::WrongKeys,
    /// Unix seconds.
    pub(crate) started: u64,
    /// Bodies of `/v1/models`.
    pub(crate) models: openai::models::Bodies,
    pub(crate) documents: openapi::Documents,
    /// What the console plots.
    pub(crate) recorder: console::Recorder,
    draining: AtomicBool,
    stop_asked: watch::Sender<bool>,
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
    pub fn new(config: RouterConfig, text: TextModel, engine: impl Backend) -> Self {
        let engine: Arc<dyn Backend> = Arc::new(engine);
        let settings = AdapterSettings {
            registered: config.adapters.iter().map(|(name, dir)| (name.clone(), AdapterRef::directory(dir))).collect(),
            dirs: config.adapter_dirs.clone(),
            base_names: config.served_names.clone(),
            ..AdapterSettings::default()
        };
        let registry = Registry::new(settings, Arc::clone(&engine));
        Self::with_registry(config, text, engine, registry)
    }

    /// The same around a registry that was opened elsewhere.
    pub fn with_registry(
        mut config: RouterConfig,
        text: TextModel,
        engine: Arc<dyn Backend>,
        registry: Registry,
    ) -> Self {
        if config.served_names.is_empty() {
            config.served_names.push("base".into());
        }
        let model = config.served_names.first().map_or("base", String::as_str);
        let observer = Observer::new(model, config.access_log, config.otlp.take());
        let metrics = Arc::new(Metrics::new(config.adapter_metrics, &config.adapter_metrics_names));
        let inner = AppInner {
            keys: RwLock::new(Arc::new(keys::KeyRing::new(&config.keys, None).requiring(config.requires_key))),
            metrics_keys: keys::KeyRing::new(&config.metrics_keys, None),
            wrong_keys: rate::WrongKeys::default(),
            config,
            text,
            registry,
            engine,
            metrics,
            observer,
            started: unix_seconds(),
            models: Default::default(),
            documents: Default::default(),
            recorder: console::Recorder::default(),
            draining: AtomicBool::new(false),
            stop_asked: watch::Sender::new(false),
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
        let router = Router::new()
            .route("/", get(console::front).post(lorax::compat))
            .merge(console::routes())
            .route("/generate", post(lorax::generate))
            .route("/generate_stream", post(lorax::generate_stream))
            .route("/invocations", post(lorax::invocations))
            .route("/info", get(lorax::info))
            .route("/embed", post(lorax::no_encoder))
            .route("/classify", post(lorax::no_encoder))
            .route("/classify_batch", post(lorax::no_encoder))
            .route("/health", get(service::ready))
            .route("/health/ready", get(service::ready))
            .route("/health/live", get(service::live))
            .route("/health/startup", get(service::startup))
            .route("/startup", get(service::startup))
            .route("/ping", get(service::ready).post(service::ready))
            .route("/metrics", get(service::metrics))
            .route("/server_info", get(service::server_info))
            .route("/version", get(service::version))
            .route("/load", get(service::load))
            .route("/tokenize", post(tokenize::tokenize))
            .route("/detokenize", post(tokenize::detokenize))
            .route("/v1/models", get(openai::models::list))
            .route("/v1/models/{*id}", get(openai::models::one))
            .route("/v1/completions", post(openai::completions::completions))
            .route("/v1/chat/completions", post(openai::chat::chat_completions))
            .route("/v1/responses", post(responses::responses))
            .route("/v1/messages", post(anthropic::messages))
            .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
            .route("/v1/embeddings", post(openai::embeddings::embeddings))
            .route("/v1/load_lora_adapter", post(runtime::load))
            .route("/v1/unload_lora_adapter", post(runtime::unload))
            .route("/load_lora_adapter", post(runtime::sglang_load))
            .route("/unload_lora_adapter", post(runtime::sglang_unload))
            .merge(admin::routes())
            .merge(openapi::routes())
            .fallback(service::no_route)
            .method_not_allowed_fallback(service::no_method)
            .layer(from_fn_with_state((app.clone(), auth::Side::Main), auth::authenticate))
            .layer(from_fn_with_state(app.clone(), envelope::envelope));
        match cors::layer(&self.config.cors_origins) {
            Some(cors) => router.layer(cors).with_state(app),
            None => router.with_state(app),
        }
    }

    /// The operator's own routes with their layers, for a listener that only the operator reaches.
    pub fn admin_router(&self) -> Router {
        let app = self.clone();
        admin::routes()
            .merge(console::routes())
            .route("/", get(console::front))
            .route("/v1/models", get(openai::models::list))
            .route("/v1/completions", post(openai::completions::completions))
            .route("/v1/chat/completions", post(openai::chat::chat_completions))
            .route("/health", get(service::ready))
            .route("/health/ready", get(service::ready))
            .route("/health/live", get(service::live))
            .route("/metrics", get(service::metrics))
            .merge(openapi::routes())
            .route("/server_info", get(service::server_info))
            .fallback(service::no_route)
            .method_not_allowed_fallback(service::no_method)
            .layer(from_fn_with_state((app.clone(), auth::Side::Admin), auth::authenticate))
            .layer(from_fn_with_state(app.clone(), envelope::envelope))
            .with_state(app)
    }

    /// Takes these keys in place of the ones before. Requests that run go on.
    pub fn set_keys(&self, keys: &[KeySpec]) {
        let mut ring = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        *ring = Arc::new(keys::KeyRing::new(keys, Some(&ring)));
    }

    pub(crate) fn key_ring(&self) -> Arc<keys::KeyRing> {
        Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on health says no, and new generation requests get 503 `draining`.
    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.engine.begin_drain();
    }

    /// The same as a signal to stop: [`serve`] drains and returns.
    pub(crate) fn ask_to_stop(&self) {
        self.stop_asked.send_replace(true);
    }

    /// Resolves once somebody asked to stop.
    pub(crate) async fn stop_asked(&self) {
        let mut asked = self.stop_asked.subscribe();
        // The sender lives as long as `self`.
        let _ = asked.wait_for(|asked| *asked).await;
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
            allow_base_fallback: self.config.allow_base_fallback,
            trust_request_chat_template: self.config.trust_request_chat_template,
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
