//! `/admin/v1/status`, `/admin/v1/drain` and `/admin/v1/cache/reset`.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use serde_json::{Map, Value, json};

use crate::http::App;
use crate::http::body::json_object;
use crate::http::error::ApiError;
use crate::http::json::Fields;

/// What the server holds and does.
pub(super) async fn status(State(app): State<App>) -> Json<Value> {
    let status = app.engine.status();
    let states: Map<String, Value> =
        app.registry.states().iter().map(|(state, n)| (state.name().to_owned(), json!(n))).collect();
    let waiting_for: Vec<Value> =
        app.registry.waiting_for().into_iter().map(|(name, error)| json!({"name": name, "error": error})).collect();
    let pages = json!({
        "total": status.shard.pages_total,
        "free": status.pages_free,
        "kv": status.pages_kv,
        "adapter": status.pages_adapters,
        "pinned": status.pages_pinned,
        "bytes": status.shard.page_bytes,
    });
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": app.base_name(),
        "ready": status.ready && app.registry.is_ready() && !app.is_draining(),
        "draining": app.is_draining() || status.draining,
        "waiting_for": waiting_for,
        "pages": pages,
        "sequences": {"running": status.running, "waiting": status.waiting},
        "adapters": {
            "states": states,
            "device": status.resident.len(),
            "host": status.host_adapters,
            "host_bytes": status.host_bytes,
            "waiting_for_load": status.waiting_for_load.len(),
        },
        "shard": {"restarts": status.counters.shard_restarts, "replayed_requests": status.counters.replayed},
        "uptime_s": super::super::unix_seconds().saturating_sub(app.started),
    }))
}

/// Empties the prefix cache.
pub(super) async fn reset_cache(State(app): State<App>, request: Request<Body>) -> Result<Json<Value>, ApiError> {
    let (_, body) = json_object(request, &app.config.limits).await?;
    let fields = Fields::new(&body);
    fields.only(&["prefix", "disk"])?;
    if fields.boolean("disk")?.unwrap_or(false) {
        let why = "files of adapters make room by themselves; DELETE an adapter with purge=true to remove its own";
        return Err(ApiError::unsupported("disk", why));
    }
    let prefix = fields.boolean("prefix")?.ok_or_else(|| ApiError::missing("prefix"))?;
    if prefix {
        app.engine.forget_prefixes();
    }
    Ok(Json(json!({"prefix": prefix, "disk": false})))
}

/// From now on no new requests; running ones finish; then the process ends with 0.
pub(super) async fn drain(State(app): State<App>) -> Json<Value> {
    tracing::info!("stopping: the admin API asked for it");
    app.ask_to_stop();
    Json(json!({"draining": true}))
}
