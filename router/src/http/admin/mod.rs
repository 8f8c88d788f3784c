//! The admin API: adapters, aliases, status, drain. On its own listener, and on the main port where an admin key is set.

mod adapters;
mod aliases;
mod query;
mod report;
mod status;

use axum::Router;
use axum::routing::{get, post};

pub use report::report;

use super::App;
use super::auth::UpstreamToken;
use super::error::{ApiError, Cause};
use crate::access::Caller;
use crate::adapters::{AdapterRef, Credential, SourceKind};

/// The routes, without a layer.
pub(crate) fn routes() -> Router<App> {
    Router::new()
        .route("/admin/v1/adapters", get(adapters::list))
        .route("/admin/v1/adapters/validate", post(adapters::validate))
        .route("/admin/v1/adapters/{name}", get(adapters::one).put(adapters::put).delete(adapters::delete))
        .route("/admin/v1/adapters/{name}/pin", post(adapters::pin))
        .route("/admin/v1/adapters/{name}/unpin", post(adapters::unpin))
        .route("/admin/v1/aliases", get(aliases::list))
        .route("/admin/v1/aliases/{name}", get(aliases::one).put(aliases::put).delete(aliases::delete))
        .route("/admin/v1/aliases/{name}/rollback", post(aliases::rollback))
        .route("/admin/v1/live", get(super::console::live))
        .route("/admin/v1/status", get(status::status))
        .route("/admin/v1/drain", post(status::drain))
        .route("/admin/v1/cache/reset", post(status::reset_cache))
}

/// Reads a reference, with the revision that was sent beside it.
///
/// # Errors
/// 400 at `param`.
pub(crate) fn reference(param: &str, text: &str, revision: Option<&str>) -> Result<AdapterRef, ApiError> {
    let refuse = |rule: &str, got: &str| ApiError::invalid(param, rule, got);
    let parsed =
        AdapterRef::parse(text).map_err(|error| ApiError::at(Cause::InvalidValue, param, error.to_string()))?;
    let Some(revision) = revision.filter(|revision| !revision.is_empty()) else { return Ok(parsed) };
    if parsed.source != SourceKind::Hub {
        return Err(refuse("a hub reference where `revision` is set", parsed.source.name()));
    }
    match parsed.revision.as_deref() {
        Some(other) if other != revision => Err(refuse("without another revision where `revision` is set", other)),
        // Read again, so that the revision is checked like any other.
        _ => AdapterRef::parse(&format!("hf://{}@{revision}", parsed.locator))
            .map_err(|error| ApiError::at(Cause::InvalidValue, "revision", error.to_string())),
    }
}

/// In whose name an adapter is fetched that an admin names: with the token that came along, else in the server's.
fn credential(token: &UpstreamToken) -> Credential {
    token.0.clone().map_or(Credential::Server, Credential::Token)
}

/// The same for a caller of the main port: a key with a namespace, a list or a quota gets nobody's credential in place of
/// the server's.
pub(crate) fn load_credential(caller: &Caller, token: &UpstreamToken) -> Credential {
    match credential(token) {
        Credential::Server if caller.is_restricted() => Credential::Anonymous,
        credential => credential,
    }
}
