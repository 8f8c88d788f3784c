//! `/admin/v1/aliases`: names that stand for weighted versions.

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::Request;
use serde::Deserialize;
use serde_json::{Value, json};

use super::adapters::{Which, checked_namespace, refused, refused_in, unknown};
use super::query::Asked;
use crate::adapters::{AliasAsk, AliasView, StickyBy, Weighted};
use crate::http::App;
use crate::http::body::json_object;
use crate::http::error::ApiError;
use crate::http::json::{Fields, type_name};

/// Versions of one alias.
const VERSIONS_MAX: usize = 16;
const WEIGHT_MAX: f64 = 1e9;

/// All of them.
pub(super) async fn list(State(app): State<App>) -> Json<Value> {
    Json(json!({"data": app.registry.aliases()}))
}

/// One alias.
pub(super) async fn one(
    State(app): State<App>,
    Path(name): Path<String>,
    Asked(which): Asked<Which>,
) -> Result<Json<AliasView>, ApiError> {
    let namespace = which.namespace()?;
    app.registry.alias(&namespace, &name).map(Json).ok_or_else(|| unknown("alias", &namespace, &name))
}

/// Makes or changes one, all versions in one step.
pub(super) async fn put(
    State(app): State<App>,
    Path(name): Path<String>,
    Asked(which): Asked<Which>,
    request: Request<Body>,
) -> Result<Json<AliasView>, ApiError> {
    let (_, body) = json_object(request, &app.config.limits).await?;
    let fields = Fields::new(&body);
    fields.only(&["versions", "sticky_by", "expected_version"])?;
    let listed = fields.array("versions")?.ok_or_else(|| ApiError::missing("versions"))?;
    if !(1..=VERSIONS_MAX).contains(&listed.len()) {
        let given = format!("{} entries", listed.len());
        return Err(ApiError::invalid("versions", &format!("a list of 1..{VERSIONS_MAX} versions"), &given));
    }
    let versions = listed.iter().enumerate().map(|(i, value)| version(i, value)).collect::<Result<_, _>>()?;
    let sticky_by = match fields.string("sticky_by")? {
        None | Some("none") => StickyBy::None,
        Some("key") => StickyBy::Key,
        Some("user") => StickyBy::User,
        Some(other) => return Err(ApiError::invalid("sticky_by", "one of key, user, none", other)),
    };
    let ask = AliasAsk {
        namespace: which.namespace()?,
        versions,
        sticky_by,
        expected_version: fields.integer("expected_version", "at least 0", |n| n >= 0)?.map(i64::unsigned_abs),
        name,
    };
    let name = ask.name.clone();
    app.registry.set_alias(ask).await.map(Json).map_err(|failure| of_alias(refused(&name, &failure)))
}

fn version(i: usize, value: &Value) -> Result<Weighted, ApiError> {
    let path = format!("versions[{i}]");
    let Value::Object(map) = value else { return Err(ApiError::invalid(&path, "an object", type_name(value))) };
    let fields = Fields::nested(map, path.clone());
    fields.only(&["adapter", "weight"])?;
    let adapter = fields.string("adapter")?.ok_or_else(|| ApiError::missing(&format!("{path}.adapter")))?;
    let in_range = |weight: f64| weight > 0.0 && weight <= WEIGHT_MAX;
    let weight = fields.number("weight", "a number above 0", in_range)?.unwrap_or(1.0);
    Ok(Weighted { adapter: adapter.to_owned(), weight })
}

/// The failure is about an alias, whatever [`refused`] calls it.
fn of_alias(error: ApiError) -> ApiError {
    match error.message.strip_prefix("adapter `") {
        Some(rest) => ApiError { message: format!("alias `{rest}"), ..error },
        None => error,
    }
}

/// Query parameters of a deletion.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeleteQuery {
    namespace: Option<String>,
    expected_version: Option<String>,
}

/// Takes one away.
pub(super) async fn delete(
    State(app): State<App>,
    Path(name): Path<String>,
    Asked(query): Asked<DeleteQuery>,
) -> Result<Json<AliasView>, ApiError> {
    let number = |text: &String| {
        text.parse::<u64>().map_err(|_| ApiError::invalid("expected_version", "an integer of at least 0", text))
    };
    let expected = query.expected_version.as_ref().map(number).transpose()?;
    let namespace = checked_namespace(query.namespace.unwrap_or_default())?;
    let gone = app.registry.delete_alias(&namespace, &name, expected).await;
    gone.map(Json).map_err(|failure| of_alias(refused_in("alias", &namespace, &name, &failure)))
}

/// The versions before the last change come back.
pub(super) async fn rollback(
    State(app): State<App>,
    Path(name): Path<String>,
    Asked(which): Asked<Which>,
) -> Result<Json<AliasView>, ApiError> {
    let namespace = which.namespace()?;
    let back = app.registry.rollback_alias(&namespace, &name).await;
    back.map(Json).map_err(|failure| of_alias(refused_in("alias", &namespace, &name, &failure)))
}
