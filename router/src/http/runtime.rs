//! Loading and unloading adapters over the main port, as vLLM's and SGLang's clients spell it.
//!
//! Controllers decide by the text of a message whether to try again. So a message of a failure that may go away starts
//! with `service unavailable:`, and one that stays holds none of the phrases they look for.

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::{HeaderValue, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::App;
use super::auth::UpstreamToken;
use super::body::json_object;
use super::envelope::RequestId;
use super::error::{ApiError, Cause, shown};
use super::json::Fields;
use crate::access::Caller;
use crate::adapters::{AdapterRef, AdapterState, AdapterView, ListFilter, LoadAsk, UnloadAsk, Wait, is_valid_name};
use crate::engine::{AdapterFailure, ForgetMode};

/// Status and `error.type` as vLLM gives them.
type Spelling = (StatusCode, &'static str);

const BAD_REQUEST: Spelling = (StatusCode::BAD_REQUEST, "BadRequestError");
const INVALID_INPUT: Spelling = (StatusCode::BAD_REQUEST, "InvalidUserInput");
const NOT_FOUND: Spelling = (StatusCode::NOT_FOUND, "NotFoundError");
const FORBIDDEN: Spelling = (StatusCode::FORBIDDEN, "PermissionError");
/// The type of everything that may go away.
const UNAVAILABLE: &str = "ServiceUnavailableError";

/// What controllers take for a sign that another try may help.
const RETRY_PHRASES: [&str; 8] = [
    "connection refused",
    "connection reset",
    "timeout",
    "no route to host",
    "network is unreachable",
    "temporary failure",
    "service unavailable",
    "bad gateway",
];
/// Adapters that a reply of SGLang's routes names.
const LISTED_MAX: usize = 1000;

/// Whose request this is, as the layer of keys found.
struct Who {
    caller: Caller,
    token: UpstreamToken,
}

/// What either spelling asks for.
struct Load {
    name: String,
    path: String,
    in_place: bool,
    pinned: Option<bool>,
}

/// `POST /v1/load_lora_adapter`.
pub(crate) async fn load(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Extension(token): Extension<UpstreamToken>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let (_, body) = json_object(request, &app.config.limits).await.map_err(permanent_body)?;
    let asked = load_of(&Fields::new(&body)).map_err(|error| match error.cause {
        Cause::MissingField => permanent(error, BAD_REQUEST),
        _ => permanent(error, INVALID_INPUT),
    })?;
    let name = asked.name.clone();
    app.load_for(&Who { caller, token }, asked).await?;
    Ok(format!("Success: LoRA adapter '{name}' added successfully.").into_response())
}

fn load_of(fields: &Fields<'_>) -> Result<Load, ApiError> {
    let needed = |name: &str| fields.string(name)?.ok_or_else(|| ApiError::missing(name));
    let (name, path) = (needed("lora_name")?, needed("lora_path")?);
    if name.is_empty() || path.is_empty() {
        let param = if name.is_empty() { "lora_name" } else { "lora_path" };
        let message = "Both 'lora_name' and 'lora_path' must be provided.";
        return Err(ApiError::at(Cause::InvalidValue, param, message));
    }
    if !is_valid_name(name) {
        let rule = "letters, digits, `.`, `_`, `-`, at most 128 of them, with at most one `/`";
        return Err(ApiError::invalid("lora_name", rule, name));
    }
    Ok(Load {
        name: name.to_owned(),
        path: path.to_owned(),
        in_place: fields.boolean("load_inplace")?.unwrap_or(false),
        pinned: fields.boolean("pinned")?,
    })
}

/// `POST /v1/unload_lora_adapter`.
pub(crate) async fn unload(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Extension(token): Extension<UpstreamToken>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let (_, body) = json_object(request, &app.config.limits).await.map_err(permanent_body)?;
    let name = Fields::new(&body).string("lora_name").map_err(permanent_body)?.unwrap_or_default();
    app.unload_for(&Who { caller, token }, name).await?;
    Ok(format!("Success: LoRA adapter '{name}' removed successfully.").into_response())
}

impl App {
    async fn load_for(&self, who: &Who, asked: Load) -> Result<AdapterView, ApiError> {
        let Load { name, path, in_place, pinned } = asked;
        if !who.caller.may_use_adapter(&name) {
            let message = format!("this key may not load an adapter called `{}`", shown(&name));
            return Err(permanent(ApiError::new(Cause::RouteForbidden, message), FORBIDDEN));
        }
        // A path that is none, and a source this key may not name, are answered as what is not there.
        let absent = || not_found(format!("No adapter found for {}", shown(&path)), "lora_path");
        let reference = AdapterRef::parse(&path).map_err(|_| absent())?;
        if !who.caller.may_use_source(reference.source) {
            return Err(absent());
        }
        // A name from the key's list must not be a way to what is on neither its list nor the server's.
        let restricted = who.caller.is_restricted();
        if restricted && self.is_operators(&who.caller, &name) {
            let message =
                format!("this key may not load an adapter called `{}`: the operator's have such names", shown(&name));
            return Err(permanent(ApiError::new(Cause::RouteForbidden, message), FORBIDDEN));
        }
        if restricted && !(who.caller.may_use_reference(&reference) && self.registry.may_be_named(&reference)) {
            return Err(absent());
        }
        let ask = LoadAsk {
            namespace: who.caller.namespace.to_string(),
            in_place,
            pinned: pinned.filter(|_| !restricted),
            credential: super::admin::load_credential(&who.caller, &who.token),
            ..LoadAsk::new(name.as_str(), reference, Wait::Until(self.config.adapter_load_timeout))
        };
        self.load(ask).await.map_err(|failure| load_refused(&name, &failure, absent))
    }

    /// A name of `--adapter`, or one that reads like a repository where other callers would mean the repository.
    fn is_operators(&self, caller: &Caller, name: &str) -> bool {
        let would_hide = caller.namespace.is_empty() && name.contains('/');
        would_hide || self.registry.is_by_flag(&caller.namespace, name)
    }

    async fn unload_for(&self, who: &Who, name: &str) -> Result<AdapterView, ApiError> {
        if name.is_empty() {
            let message = "'lora_name' needs to be provided to unload a LoRA adapter.";
            return Err(permanent(ApiError::at(Cause::MissingField, "lora_name", message), INVALID_INPUT));
        }
        let absent = || not_found(format!("The lora adapter '{}' cannot be found.", shown(name)), "lora_name");
        let is_operators = who.caller.is_restricted() && self.is_operators(&who.caller, name);
        if is_operators || !who.caller.may_use_adapter(name) {
            return Err(absent());
        }
        let namespace = who.caller.namespace.to_string();
        let ask = UnloadAsk { name: name.to_owned(), namespace, mode: ForgetMode::Drain, purge: false };
        self.registry.unload(ask).await.map_err(|failure| match failure.code.as_str() {
            "model_not_found" => absent(),
            _ => refused(ApiError::adapter(name, &failure)),
        })
    }
}

fn not_found(message: String, param: &str) -> ApiError {
    permanent(ApiError::at(Cause::ModelNotFound, param, message), NOT_FOUND)
}

fn load_refused(name: &str, failure: &AdapterFailure, absent: impl Fn() -> ApiError) -> ApiError {
    let error = ApiError::adapter(name, failure);
    match error.cause {
        Cause::AdapterExists => {
            let message = format!(
                "The lora adapter '{}' has already been loaded. If you want to load the adapter in place, set \
                 'load_inplace' to True.",
                shown(name)
            );
            permanent(ApiError::at(Cause::AdapterExists, "lora_name", message), INVALID_INPUT)
        }
        Cause::ModelNotFound | Cause::SourceForbidden => absent(),
        _ => refused(error),
    }
}

fn refused(error: ApiError) -> ApiError {
    if error.cause.row().retryable {
        let message = error.message.replacen("service unavailable: ", "", 1);
        let (message, status) = (format!("service unavailable: {message}"), error.status());
        return ApiError { message, ..error }.spelled(status, UNAVAILABLE);
    }
    let spelling = match error.cause {
        Cause::NameIsBaseModel | Cause::InvalidValue => INVALID_INPUT,
        _ => BAD_REQUEST,
    };
    permanent(error, spelling)
}

/// A body that cannot be read: only a plain 400 is vLLM's; 408, 413 and 415 keep their status.
fn permanent_body(error: ApiError) -> ApiError {
    let status = error.status();
    permanent(error, (status, BAD_REQUEST.1))
}

/// Gives `error` vLLM's spelling, and a message that nobody takes for an invitation to try again.
fn permanent(error: ApiError, (status, kind): Spelling) -> ApiError {
    ApiError { message: without_phrases(&error.message), ..error }.spelled(status, kind)
}

/// `text` without the phrases of [`RETRY_PHRASES`]: it may repeat a path or a name that holds one.
fn without_phrases(text: &str) -> String {
    let mut text = text.to_owned();
    for phrase in RETRY_PHRASES {
        // Lower case of ASCII alone keeps positions.
        while let Some(at) = text.to_ascii_lowercase().find(phrase) {
            match phrase.find(' ') {
                Some(space) => text.replace_range(at + space..=at + space, "-"),
                None => text.insert(at + "time".len(), '-'),
            }
        }
    }
    text
}

/// `POST /load_lora_adapter`.
pub(crate) async fn sglang_load(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Extension(token): Extension<UpstreamToken>,
    request: Request<Body>,
) -> Response {
    let id = request.extensions().get::<RequestId>().cloned();
    let who = Who { caller, token };
    let loaded = async {
        let (_, body) = json_object(request, &app.config.limits).await?;
        app.load_for(&who, load_of(&Fields::new(&body))?).await
    };
    app.sglang_reply(&who, loaded.await, id)
}

/// `POST /unload_lora_adapter`.
pub(crate) async fn sglang_unload(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Extension(token): Extension<UpstreamToken>,
    request: Request<Body>,
) -> Response {
    let id = request.extensions().get::<RequestId>().cloned();
    let who = Who { caller, token };
    let unloaded = async {
        let (_, body) = json_object(request, &app.config.limits).await?;
        app.unload_for(&who, Fields::new(&body).string("lora_name")?.unwrap_or_default()).await
    };
    app.sglang_reply(&who, unloaded.await, id)
}

impl App {
    fn sglang_reply(&self, who: &Who, done: Result<AdapterView, ApiError>, id: Option<RequestId>) -> Response {
        let mut response = match done {
            Ok(_) => {
                let namespace = Some(who.caller.namespace.to_string());
                let state = Some(AdapterState::Ready);
                let filter = ListFilter { namespace, state, limit: LISTED_MAX, ..ListFilter::default() };
                let (views, _) = self.registry.list(&filter);
                let mine = views.into_iter().filter(|view| who.caller.may_use_adapter(&view.name));
                let loaded: Map<String, Value> = mine.map(|view| (view.name, Value::String(view.reference))).collect();
                Json(json!({"success": true, "loaded_adapters": loaded})).into_response()
            }
            Err(error) => {
                self.metrics.rejected(error.cause.row().code);
                let body = Json(json!({"success": false, "error_message": error.message}));
                (StatusCode::BAD_REQUEST, body).into_response()
            }
        };
        // Says that the body is final: SGLang's clients know no other shape.
        if let Some(value) = id.and_then(|id| HeaderValue::from_str(&id.0).ok()) {
            response.headers_mut().insert("x-request-id", value);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_go_away_reads_as_an_invitation_to_try_again() {
        let holds = |message: &str| RETRY_PHRASES.iter().any(|phrase| message.to_lowercase().contains(phrase));
        let texts = ["it is broken", "/adapters/Connection Refused", "a timeout timeout", "Bad Gateway: bad gateway"];
        for cause in Cause::ALL {
            for text in texts.iter().chain(&RETRY_PHRASES) {
                let failure = AdapterFailure::new(cause.row().code, *text);
                let absent = || not_found(format!("No adapter found for {text}"), "lora_path");
                let error = load_refused("timeout", &failure, absent);
                if error.cause.row().retryable {
                    assert!(error.message.starts_with("service unavailable:"), "{cause:?}: {}", error.message);
                    assert!(matches!(error.status().as_u16(), 429 | 503), "{cause:?}");
                } else {
                    assert!(!holds(&error.message), "{cause:?}: {}", error.message);
                    assert!(matches!(error.status().as_u16(), 400 | 404), "{cause:?}: {}", error.status());
                }
            }
        }
        assert_eq!(without_phrases("no such file: /a/b"), "no such file: /a/b");
        assert_eq!(without_phrases("a Timeout"), "a Time-out");
    }
}
