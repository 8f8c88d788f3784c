//! Health, metrics, version, load.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::App;
use super::error::{ApiError, Cause};
use crate::metrics::Snapshot;

/// 200 when a request can be served now. Looks at a snapshot, never at the model.
pub(crate) async fn ready(State(app): State<App>) -> Result<Response, ApiError> {
    let status = app.engine.status();
    if app.is_draining() || status.draining {
        return Err(ApiError::new(Cause::Draining, "the server is shutting down"));
    }
    if !status.ready {
        return Err(ApiError::new(Cause::NotReady, "the model is not ready"));
    }
    if !app.registry.is_ready() {
        // Whose they are is nobody's business here; the admin API names them.
        return Err(ApiError::new(Cause::NotReady, "adapters that must be usable first are still loading"));
    }
    Ok(().into_response())
}

/// The process schedules.
pub(crate) async fn live() {}

/// 200 once the model was ready for the first time.
pub(crate) async fn startup(State(app): State<App>) -> Result<Response, ApiError> {
    if app.engine.status().started {
        return Ok(().into_response());
    }
    Err(ApiError::new(Cause::NotReady, "the model is still loading"))
}

/// Prometheus text 0.0.4.
pub(crate) async fn metrics(State(app): State<App>) -> Response {
    let status = app.engine.status();
    let snapshot = Snapshot {
        model: app.base_name(),
        status: &status,
        registry: &app.registry,
        spans: app.observer.spans(),
        lorax_names: app.config.lorax_metrics,
    };
    let text = app.metrics.render(&snapshot);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// What every flag came to. Secrets are `***`.
pub(crate) async fn server_info(State(app): State<App>) -> Json<serde_json::Value> {
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "served_names": app.config.served_names,
        "settings": app.config.settings,
    }))
}

/// `{"version": ".."}`.
pub(crate) async fn version() -> Json<serde_json::Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `{"server_load": running + waiting}`.
pub(crate) async fn load(State(app): State<App>) -> Json<serde_json::Value> {
    let status = app.engine.status();
    Json(json!({"server_load": status.running + status.waiting}))
}

/// Unknown paths.
pub(crate) async fn no_route(uri: axum::http::Uri) -> ApiError {
    unknown_route(uri.path())
}

/// 404 `route_not_found`.
pub(crate) fn unknown_route(path: &str) -> ApiError {
    let hint = super::hints::of_path(path);
    ApiError::new(Cause::RouteNotFound, format!("no route `{}`{hint}", super::error::cut(path)))
}

/// Known paths, other methods.
pub(crate) async fn no_method(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    let (method, path) = (super::error::cut(method.as_str()), super::error::cut(uri.path()));
    ApiError::new(Cause::MethodNotAllowed, format!("`{path}` does not answer {method}"))
}
