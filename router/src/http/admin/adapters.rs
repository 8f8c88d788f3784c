//! `/admin/v1/adapters`: list, inspect, load, validate, pin, unload.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Value, json};

use super::query::Asked;
use super::{credential, reference, report};
use crate::adapters::{
    AdapterState, AdapterView, ListFilter, LoadAsk, RankBy, RankedFilter, UnloadAsk, Wait, is_valid_name,
};
use crate::engine::{AdapterFailure, ForgetMode, PinLevel};
use crate::http::App;
use crate::http::auth::UpstreamToken;
use crate::http::body::json_object;
use crate::http::error::{ApiError, Cause, adapter_cause, shown};
use crate::http::json::Fields;
use crate::http::keys::is_namespace;

/// Entries of one page.
const LIMIT_MAX: usize = 1000;
/// Longest `wait` of a load.
const WAIT_MAX: Duration = Duration::from_secs(600);
const SCALE_MAX: f64 = 8.0;

/// Query parameters of `GET /admin/v1/adapters`, as sent.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    state: Option<String>,
    prefix: Option<String>,
    namespace: Option<String>,
    limit: Option<String>,
    after: Option<String>,
    contains: Option<String>,
    sort: Option<String>,
    offset: Option<String>,
}

/// One page: by name after another one, or as people look for it (`contains`, `sort`, `offset`).
pub(super) async fn list(State(app): State<App>, Asked(query): Asked<ListQuery>) -> Result<Json<Value>, ApiError> {
    let state = match query.state.as_deref().filter(|state| !state.is_empty()) {
        None => None,
        Some(name) => Some(AdapterState::parse(name).ok_or_else(|| {
            let rule = AdapterState::ALL.map(AdapterState::name).join(", ");
            ApiError::invalid("state", &format!("one of {rule}"), name)
        })?),
    };
    let limit = match query.limit.as_deref() {
        None => 100,
        Some(text) => text
            .parse()
            .ok()
            .filter(|limit| (1..=LIMIT_MAX).contains(limit))
            .ok_or_else(|| ApiError::invalid("limit", &format!("1..{LIMIT_MAX}"), text))?,
    };
    let namespace = query.namespace.map(checked_namespace).transpose()?;
    if query.contains.is_some() || query.sort.is_some() || query.offset.is_some() {
        if query.after.is_some() || query.prefix.is_some() {
            let message = "`contains`, `sort` and `offset` cannot be combined with `after` and `prefix`";
            return Err(ApiError::at(Cause::InvalidValue, "sort", message));
        }
        let (by, descending) = query.sort.as_deref().map_or(Ok((RankBy::Name, false)), order)?;
        let offset = query.offset.as_deref().unwrap_or("0");
        let offset = offset.parse().map_err(|_| ApiError::invalid("offset", "an integer of at least 0", offset))?;
        let contains = query.contains.unwrap_or_default();
        let filter = RankedFilter { namespace, state, contains, by, descending, offset, limit };
        let (data, total) = app.registry.ranked(&filter);
        return Ok(Json(json!({"data": data, "total": total})));
    }
    let filter = ListFilter {
        namespace,
        state,
        prefix: query.prefix.filter(|prefix| !prefix.is_empty()),
        limit,
        after: query.after.filter(|after| !after.is_empty()),
    };
    let (data, next) = app.registry.list(&filter);
    let mut page = json!({"data": data});
    if let (Some(page), Some(next)) = (page.as_object_mut(), next) {
        page.insert("next".into(), Value::String(next));
    }
    Ok(Json(page))
}

/// Reads `sort`: a name of [`RankBy`], behind a `-` for the largest first.
fn order(text: &str) -> Result<(RankBy, bool), ApiError> {
    let (name, descending) = text.strip_prefix('-').map_or((text, false), |name| (name, true));
    let by = RankBy::parse(name).ok_or_else(|| {
        let rule = RankBy::ALL.map(|(name, _)| name).join(", ");
        ApiError::invalid("sort", &format!("one of {rule}, with `-` in front for the largest first"), text)
    })?;
    Ok((by, descending))
}

/// Whose name is meant.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    namespace: Option<String>,
}

impl Which {
    pub(super) fn namespace(self) -> Result<String, ApiError> {
        checked_namespace(self.namespace.unwrap_or_default())
    }
}

pub(super) fn checked_namespace(text: String) -> Result<String, ApiError> {
    if is_namespace(&text) {
        return Ok(text);
    }
    Err(ApiError::invalid("namespace", "letters, digits, `.`, `_`, `-`", &text))
}

/// A failure of the registry, about the adapter called `name`, as operators read it.
pub(super) fn refused(name: &str, failure: &AdapterFailure) -> ApiError {
    let error = ApiError::adapter(name, failure);
    let why = failure.for_operators();
    let why = why.strip_prefix("service unavailable: ").unwrap_or(why);
    let error = ApiError { message: format!("adapter `{}`: {why}", shown(name)), ..error };
    let param = match error.cause {
        Cause::ModelNotFound | Cause::NameIsBaseModel | Cause::AdapterExists => "name",
        Cause::PreconditionFailed | Cause::InvalidValue => return ApiError { param: None, ..error },
        _ => "ref",
    };
    ApiError { param: Some(param.into()), ..error }
}

/// One adapter.
pub(super) async fn one(
    State(app): State<App>,
    Path(name): Path<String>,
    Asked(which): Asked<Which>,
) -> Result<Json<AdapterView>, ApiError> {
    let namespace = which.namespace()?;
    app.registry.get(&namespace, &name).map(Json).ok_or_else(|| unknown("adapter", &namespace, &name))
}

/// Nothing of this `kind` (adapter, alias) is registered under the name.
pub(super) fn unknown(kind: &str, namespace: &str, name: &str) -> ApiError {
    let place = match namespace {
        "" => "among those shared by all keys (those of a namespace: `namespace`)".to_owned(),
        namespace => format!("in namespace `{namespace}`"),
    };
    ApiError::at(Cause::ModelNotFound, "name", format!("no {kind} `{}` is registered {place}", shown(name)))
}

/// The same, unless the failure is another one.
pub(super) fn refused_in(kind: &str, namespace: &str, name: &str, failure: &AdapterFailure) -> ApiError {
    match adapter_cause(&failure.code) {
        Cause::ModelNotFound => unknown(kind, namespace, name),
        _ => refused(name, failure),
    }
}

/// Query parameters of a load.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PutQuery {
    wait: Option<String>,
}

/// Registers and loads; a name that exists gets the new content once it is ready.
pub(super) async fn put(
    State(app): State<App>,
    Path(name): Path<String>,
    Asked(query): Asked<PutQuery>,
    Extension(token): Extension<UpstreamToken>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let (_, body) = json_object(request, &app.config.limits).await?;
    let fields = Fields::new(&body);
    fields.only(&["ref", "revision", "scale", "pinned", "namespace", "if_content_id", "if_generation"])?;
    check_name(&name)?;
    let text = fields.string("ref")?.ok_or_else(|| ApiError::missing("ref"))?;
    let wait = query.wait.as_deref().map(parse_wait).transpose()?.unwrap_or(app.config.adapter_load_timeout);
    let ask = LoadAsk {
        namespace: checked_namespace(fields.string("namespace")?.unwrap_or_default().to_owned())?,
        scale: fields
            .number("scale", "a number in -8..8", |s| (-SCALE_MAX..=SCALE_MAX).contains(&s))?
            .map(|s| s as f32)
            .or(Some(1.0)), // a PUT is the whole registration
        pinned: fields.boolean("pinned")?,
        in_place: true,
        if_content_id: fields.string("if_content_id")?.map(str::to_owned),
        if_generation: fields.integer("if_generation", "at least 0", |n| n >= 0)?.map(i64::unsigned_abs),
        credential: credential(&token),
        keep: true,
        ..LoadAsk::new(name.as_str(), reference("ref", text, fields.string("revision")?)?, Wait::Until(wait))
    };
    let (namespace, asked, credential) = (ask.namespace.clone(), ask.reference.clone(), ask.credential.clone());
    let failure = match app.load(ask).await {
        Ok(view) => return Ok(Json(view).into_response()),
        Err(failure) => failure,
    };
    if adapter_cause(&failure.code) == Cause::AdapterLoading
        && let Some(view) = app.registry.get(&namespace, &name)
    {
        return Ok((StatusCode::ACCEPTED, Json(view)).into_response());
    }
    let error = refused(&name, &failure);
    if error.status() != StatusCode::UNPROCESSABLE_ENTITY {
        return Err(error);
    }
    let checked = app.registry.validate(&asked, credential).await.ok().filter(|(_, check)| !check.is_ok());
    Err(ApiError { report: checked.map(|(revision, check)| Box::new(report(Some(&revision), &check))), ..error })
}

fn check_name(name: &str) -> Result<(), ApiError> {
    if is_valid_name(name) {
        return Ok(());
    }
    let rule = "letters, digits, `.`, `_`, `-`, at most 128 of them, with at most one `/`";
    Err(ApiError::invalid("name", rule, name))
}

/// `30`, `0.5`, `30s`, `500ms`; at most [`WAIT_MAX`].
fn parse_wait(text: &str) -> Result<Duration, ApiError> {
    let (number, scale) = match text.strip_suffix("ms") {
        Some(number) => (number, 0.001),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let seconds = number.parse::<f64>().ok().map(|number| number * scale);
    let wait = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).filter(|wait| *wait <= WAIT_MAX);
    wait.ok_or_else(|| ApiError::invalid("wait", "a duration up to 600s, such as 30s or 500ms", text))
}

/// A dry run. A bad adapter is a report, not an error.
pub(super) async fn validate(
    State(app): State<App>,
    Extension(token): Extension<UpstreamToken>,
    request: Request<Body>,
) -> Result<Json<Value>, ApiError> {
    let (_, body) = json_object(request, &app.config.limits).await?;
    let fields = Fields::new(&body);
    fields.only(&["ref", "revision", "self_test"])?;
    let text = fields.string("ref")?.ok_or_else(|| ApiError::missing("ref"))?;
    let asked = reference("ref", text, fields.string("revision")?)?;
    if fields.boolean("self_test")? == Some(true) {
        return Err(ApiError::unsupported("self_test", "this version checks files, it does not run them"));
    }
    let checked = app.registry.validate(&asked, credential(&token)).await;
    let (revision, check) = checked.map_err(|failure| refused(text, &failure))?;
    Ok(Json(report(Some(&revision), &check)))
}

/// Keeps an adapter in host memory or on the device.
pub(super) async fn pin(
    State(app): State<App>,
    Path(name): Path<String>,
    Asked(which): Asked<Which>,
    request: Request<Body>,
) -> Result<Json<AdapterView>, ApiError> {
    let (_, body) = json_object(request, &app.config.limits).await?;
    let fields = Fields::new(&body);
    fields.only(&["residency"])?;
    let level = match fields.string("residency")? {
        Some("device") => PinLevel::Device,
        Some("host") => PinLevel::Host,
        Some(other) => return Err(ApiError::invalid("residency", "device or host", other)),
        None => return Err(ApiError::missing("residency")),
    };
    set_pin(&app, &name, which, Some(level)).await
}

/// Lets it be evicted again.
pub(super) async fn unpin(
    State(app): State<App>,
    Path(name): Path<String>,
    Asked(which): Asked<Which>,
) -> Result<Json<AdapterView>, ApiError> {
    set_pin(&app, &name, which, None).await
}

async fn set_pin(app: &App, name: &str, which: Which, level: Option<PinLevel>) -> Result<Json<AdapterView>, ApiError> {
    let namespace = which.namespace()?;
    let pinned = app.registry.pin(&namespace, name, level).await;
    pinned.map(Json).map_err(|failure| refused_in("adapter", &namespace, name, &failure))
}

/// Query parameters of an unload.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeleteQuery {
    namespace: Option<String>,
    mode: Option<String>,
    purge: Option<String>,
}

/// Takes the name away at once.
pub(super) async fn delete(
    State(app): State<App>,
    Path(name): Path<String>,
    Asked(query): Asked<DeleteQuery>,
) -> Result<Json<AdapterView>, ApiError> {
    let mode = match query.mode.as_deref() {
        None | Some("drain") => ForgetMode::Drain,
        Some("now") => ForgetMode::Now,
        Some(other) => return Err(ApiError::invalid("mode", "drain or now", other)),
    };
    let purge = match query.purge.as_deref() {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => return Err(ApiError::invalid("purge", "true or false", other)),
    };
    let namespace = checked_namespace(query.namespace.unwrap_or_default())?;
    let ask = UnloadAsk { name: name.clone(), namespace: namespace.clone(), mode, purge };
    let gone = app.registry.unload(ask).await;
    gone.map(Json).map_err(|failure| refused_in("adapter", &namespace, &name, &failure))
}

impl App {
    /// Loads beside the request: a caller that hangs up does not stop it.
    pub(crate) async fn load(&self, ask: LoadAsk) -> Result<AdapterView, AdapterFailure> {
        let registry = self.registry.clone();
        let load = tokio::spawn(async move { registry.load(ask).await });
        load.await.unwrap_or_else(|_| Err(AdapterFailure::new("adapter_load_failed", "the load was given up")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_read_host_and_cause_and_callers_do_not() {
        let why = "https://hub.corp: connection refused";
        for cause in Cause::ALL {
            let plain = AdapterFailure::new(cause.row().code, "service unavailable: the source cannot be reached");
            let failure = AdapterFailure { detail: Some(why.to_owned()), ..plain };
            assert_eq!(refused("sql", &failure).message, format!("adapter `sql`: {why}"));
            let told = ApiError::adapter("sql", &failure);
            assert!(!format!("{told:?}").contains("hub.corp"), "{told:?}");
        }
        let plain = AdapterFailure::new("adapter_load_failed", "service unavailable: it is slow");
        assert_eq!(refused("sql", &plain).message, "adapter `sql`: it is slow");
    }

    #[test]
    fn a_name_that_nobody_registered_is_said_to_be_unregistered_with_its_namespace() {
        assert!(unknown("alias", "acme", "live").message.contains("no alias `live` is registered in namespace `acme`"));
        let gone = AdapterFailure::new("model_not_found", "no adapter is called `x`");
        let error = refused_in("adapter", "", "x", &gone);
        assert_eq!((error.cause, error.param.as_deref()), (Cause::ModelNotFound, Some("name")));
        assert!(error.message.starts_with("no adapter `x` is registered"), "{}", error.message);
    }
}
