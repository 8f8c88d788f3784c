//! One error type for every route, and the one table from cause to status, type and code.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use serde::Serialize;

use crate::engine::{AdapterFailure, Failure};
use crate::text::grammar::CompileError;
use crate::text::{TemplateError, TextError};

/// Why a request is refused. Each has one row in [`Cause::row`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each name is its code, and the table below says the rest")]
pub enum Cause {
    InvalidValue,
    MissingField,
    InvalidJson,
    UnsupportedParameter,
    ContextLengthExceeded,
    InvalidSchema,
    AdapterAmbiguous,
    NameIsBaseModel,
    InvalidApiKey,
    RouteForbidden,
    SourceForbidden,
    ModelNotFound,
    RouteNotFound,
    RuntimeAdaptersDisabled,
    MethodNotAllowed,
    BodyTimeout,
    BodyTooLarge,
    UnsupportedMediaType,
    HeadersTooLarge,
    AdapterExists,
    PreconditionFailed,
    AdapterInvalid,
    AdapterUnsupported,
    AdapterBaseMismatch,
    AdapterTooLarge,
    AdapterRankLimit,
    QueueFull,
    RateLimited,
    QuotaExceeded,
    InternalError,
    ShardFault,
    AdapterNumerics,
    AdapterLoading,
    AdapterLoadFailed,
    AdapterAuthUnavailable,
    DiskFull,
    NotReady,
    Draining,
    DeadlineExceeded,
}

/// How a cause looks on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// HTTP status.
    pub status: StatusCode,
    /// `error.type`.
    pub kind: &'static str,
    /// `error.code`.
    pub code: &'static str,
    /// `error.retryable`.
    pub retryable: bool,
}

impl Cause {
    /// All causes, for tests and metrics.
    pub const ALL: [Self; 39] = [
        Self::InvalidValue,
        Self::MissingField,
        Self::InvalidJson,
        Self::UnsupportedParameter,
        Self::ContextLengthExceeded,
        Self::InvalidSchema,
        Self::AdapterAmbiguous,
        Self::NameIsBaseModel,
        Self::InvalidApiKey,
        Self::RouteForbidden,
        Self::SourceForbidden,
        Self::ModelNotFound,
        Self::RouteNotFound,
        Self::RuntimeAdaptersDisabled,
        Self::MethodNotAllowed,
        Self::BodyTimeout,
        Self::BodyTooLarge,
        Self::UnsupportedMediaType,
        Self::HeadersTooLarge,
        Self::AdapterExists,
        Self::PreconditionFailed,
        Self::AdapterInvalid,
        Self::AdapterUnsupported,
        Self::AdapterBaseMismatch,
        Self::AdapterTooLarge,
        Self::AdapterRankLimit,
        Self::QueueFull,
        Self::RateLimited,
        Self::QuotaExceeded,
        Self::InternalError,
        Self::ShardFault,
        Self::AdapterNumerics,
        Self::AdapterLoading,
        Self::AdapterLoadFailed,
        Self::AdapterAuthUnavailable,
        Self::DiskFull,
        Self::NotReady,
        Self::Draining,
        Self::DeadlineExceeded,
    ];

    /// The table.
    pub fn row(self) -> Row {
        const INVALID: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        const RATE: &str = "rate_limit_error";
        let (status, kind, code, retryable) = match self {
            Self::InvalidValue => (400, INVALID, "invalid_value", false),
            Self::MissingField => (400, INVALID, "missing_field", false),
            Self::InvalidJson => (400, INVALID, "invalid_json", false),
            Self::UnsupportedParameter => (400, INVALID, "unsupported_parameter", false),
            Self::ContextLengthExceeded => (400, INVALID, "context_length_exceeded", false),
            Self::InvalidSchema => (400, INVALID, "invalid_schema", false),
            Self::AdapterAmbiguous => (400, INVALID, "adapter_ambiguous", false),
            Self::NameIsBaseModel => (400, INVALID, "name_is_base_model", false),
            Self::InvalidApiKey => (401, "authentication_error", "invalid_api_key", false),
            Self::RouteForbidden => (403, "permission_error", "route_forbidden", false),
            Self::SourceForbidden => (403, "permission_error", "source_forbidden", false),
            Self::ModelNotFound => (404, INVALID, "model_not_found", false),
            Self::RouteNotFound => (404, INVALID, "route_not_found", false),
            Self::RuntimeAdaptersDisabled => (404, INVALID, "runtime_adapters_disabled", false),
            Self::MethodNotAllowed => (405, INVALID, "method_not_allowed", false),
            Self::BodyTimeout => (408, INVALID, "body_timeout", true),
            Self::AdapterExists => (409, INVALID, "adapter_exists", false),
            Self::PreconditionFailed => (409, INVALID, "precondition_failed", false),
            Self::BodyTooLarge => (413, INVALID, "body_too_large", false),
            Self::UnsupportedMediaType => (415, INVALID, "unsupported_media_type", false),
            Self::HeadersTooLarge => (431, INVALID, "headers_too_large", false),
            Self::AdapterInvalid => (422, INVALID, "adapter_invalid", false),
            Self::AdapterUnsupported => (422, INVALID, "adapter_unsupported", false),
            Self::AdapterBaseMismatch => (422, INVALID, "adapter_base_mismatch", false),
            Self::AdapterTooLarge => (422, INVALID, "adapter_too_large", false),
            Self::AdapterRankLimit => (422, INVALID, "adapter_rank_limit", false),
            Self::QueueFull => (429, RATE, "queue_full", true),
            Self::RateLimited => (429, RATE, "rate_limited", true),
            Self::QuotaExceeded => (429, RATE, "quota_exceeded", true),
            Self::InternalError => (500, SERVER, "internal_error", false),
            Self::ShardFault => (500, SERVER, "shard_fault", true),
            Self::AdapterNumerics => (500, SERVER, "adapter_numerics", false),
            Self::AdapterLoading => (503, SERVER, "adapter_loading", true),
            Self::AdapterLoadFailed => (503, SERVER, "adapter_load_failed", true),
            Self::AdapterAuthUnavailable => (503, SERVER, "adapter_auth_unavailable", true),
            Self::DiskFull => (503, SERVER, "disk_full", true),
            Self::NotReady => (503, SERVER, "not_ready", true),
            Self::Draining => (503, SERVER, "draining", true),
            Self::DeadlineExceeded => (504, SERVER, "deadline_exceeded", true),
        };
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Row { status, kind, code, retryable }
    }
}

/// What every route answers when it refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Which row of the table.
    pub cause: Cause,
    /// For people: what was found, what is accepted, what to change.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// When to come back, for `Retry-After`; without it the cause decides.
    pub retry_after: Option<Duration>,
    /// Another server's status and type for the same cause, on routes that copy that server.
    pub spelled: Option<(StatusCode, &'static str)>,
    /// The report of a refused adapter, sent beside the error.
    pub report: Option<Box<serde_json::Value>>,
}

/// Bytes of a value that an error message repeats.
const SHOWN_BYTES: usize = 64;

impl ApiError {
    /// An error without a field.
    pub fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self { cause, message: message.into(), param: None, retry_after: None, spelled: None, report: None }
    }

    /// An error at `param`.
    pub fn at(cause: Cause, param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::new(cause, message) }
    }

    /// The same, with the time after which a retry may succeed.
    pub fn after(self, retry_after: Option<Duration>) -> Self {
        Self { retry_after, ..self }
    }

    /// The same cause with the status and type that clients of another server know.
    pub fn spelled(self, status: StatusCode, kind: &'static str) -> Self {
        Self { spelled: Some((status, kind)), ..self }
    }

    /// The status on the wire.
    pub fn status(&self) -> StatusCode {
        self.spelled.map_or(self.cause.row().status, |(status, _)| status)
    }

    /// Whole seconds for `Retry-After`, rounded up, at least 1.
    pub fn retry_after_s(&self) -> u32 {
        let by_cause = match self.cause {
            Cause::Draining | Cause::NotReady | Cause::AdapterLoadFailed | Cause::AdapterAuthUnavailable => 5,
            Cause::DiskFull => 30,
            _ => 1,
        };
        let ceil = |after: Duration| u32::try_from(after.as_millis().div_ceil(1000)).unwrap_or(u32::MAX);
        self.retry_after.map_or(by_cause, ceil).max(1)
    }

    /// `` `{param}` must be {rule}; got {value} ``
    pub fn invalid(param: &str, rule: &str, value: &str) -> Self {
        Self::at(Cause::InvalidValue, param, format!("`{param}` must be {rule}; got {}", cut(value)))
    }

    /// `` `{param}` is required ``
    pub fn missing(param: &str) -> Self {
        Self::at(Cause::MissingField, param, format!("`{param}` is required"))
    }

    /// A limit of this server that a flag may raise.
    pub fn limit(param: &str, given: usize, unit: &str, limit: usize, flag: Option<&str>) -> Self {
        let flag = flag.map_or(String::new(), |flag| format!(" (--{flag})"));
        let message = format!("`{param}` has {given} {unit}; this server allows {limit}{flag}");
        Self::at(Cause::InvalidValue, param, message)
    }

    /// A field this server knows of and does not serve.
    pub fn unsupported(param: &str, why: &str) -> Self {
        Self::at(Cause::UnsupportedParameter, param, format!("`{param}` is not supported: {why}"))
    }

    /// Unknown, or not the caller's: one text for both.
    pub fn model_not_found(name: &str) -> Self {
        let message = format!("The model `{}` does not exist or you do not have access to it.", shown(name));
        Self::at(Cause::ModelNotFound, "model", message)
    }

    /// The opening is what client libraries match on.
    pub fn context_length(max_tokens: usize, prompt_tokens: usize, completion_tokens: usize) -> Self {
        let total = prompt_tokens + completion_tokens;
        let message = format!(
            "This model's maximum context length is {max_tokens} tokens. However, you requested {total} tokens \
             ({prompt_tokens} in the prompt, {completion_tokens} for the completion)."
        );
        Self::at(Cause::ContextLengthExceeded, "max_tokens", message)
    }

    /// The body of the error, as sent alone or as the last event of a stream.
    pub fn envelope(&self, request_id: &str) -> String {
        let row = self.cause.row();
        let body = Envelope {
            error: Inner {
                message: &self.message,
                kind: self.spelled.map_or(row.kind, |(_, kind)| kind),
                param: self.param.as_deref(),
                code: row.code,
                retryable: row.retryable,
                request_id,
            },
            report: self.report.as_deref(),
        };
        serde_json::to_string(&body).unwrap_or_default() // strings and a bool: this cannot fail
    }

    /// The whole response.
    pub fn response(&self, request_id: &str) -> Response<Body> {
        let status = self.status();
        let mut response = Response::new(Body::from(self.envelope(request_id)));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(self.retry_after_s()));
        }
        match self.cause {
            Cause::InvalidApiKey => headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            // The rest of the body is not read, so the connection cannot carry another request.
            Cause::BodyTimeout | Cause::BodyTooLarge | Cause::HeadersTooLarge => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"))
            }
            _ => None,
        };
        response
    }
}

/// The outermost layer turns the extension into the envelope; only it knows the request's id.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.status();
        response.extensions_mut().insert(self);
        response
    }
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Inner<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<&'a serde_json::Value>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: &'a str,
    retryable: bool,
    request_id: &'a str,
}

/// The front of `value`, at most [`SHOWN_BYTES`] long, cut between scalars.
pub(crate) fn cut(value: &str) -> String {
    if value.len() <= SHOWN_BYTES {
        return value.to_owned();
    }
    let end = (0..=SHOWN_BYTES).rev().find(|&at| value.is_char_boundary(at)).unwrap_or(0);
    format!("{}…", value.get(..end).unwrap_or(""))
}

/// A name as messages repeat it.
pub(crate) fn shown(name: &str) -> String {
    cut(&without_secrets(name))
}

/// Of a URL, neither credentials nor query: messages, headers and metrics go into logs.
pub(crate) fn without_secrets(name: &str) -> String {
    let Some((scheme, rest)) = name.split_once("://") else { return name.to_owned() };
    let rest = rest.split(['?', '#']).next().unwrap_or("");
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit('@').next().unwrap_or("");
    format!("{scheme}://{host}{path}")
}

/// The row of a code that the registry, a source or the shard gave.
pub(crate) fn adapter_cause(code: &str) -> Cause {
    const KNOWN: [Cause; 16] = [
        Cause::AdapterInvalid,
        Cause::AdapterUnsupported,
        Cause::AdapterBaseMismatch,
        Cause::AdapterTooLarge,
        Cause::AdapterRankLimit,
        Cause::AdapterLoading,
        Cause::AdapterAuthUnavailable,
        Cause::AdapterExists,
        Cause::PreconditionFailed,
        Cause::SourceForbidden,
        Cause::ModelNotFound,
        Cause::NameIsBaseModel,
        Cause::AdapterAmbiguous,
        Cause::QuotaExceeded,
        Cause::DiskFull,
        Cause::InvalidValue,
    ];
    KNOWN.into_iter().find(|cause| cause.row().code == code).unwrap_or(Cause::AdapterLoadFailed)
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let cause = match &failure {
            Failure::QueueFull { .. } => Cause::QueueFull,
            Failure::DeadlineExceeded => Cause::DeadlineExceeded,
            Failure::ShardFault => Cause::ShardFault,
            Failure::Numerics(_) => Cause::AdapterNumerics,
            // The rule was followed for a while and then cost more than a rule may.
            Failure::Grammar(_) => Cause::InvalidSchema,
            Failure::AdapterGone(..) => Cause::AdapterLoadFailed,
            Failure::TooLarge { .. } => Cause::ContextLengthExceeded,
            Failure::Draining => Cause::Draining,
        };
        Self::new(cause, failure.to_string())
    }
}

impl ApiError {
    /// What the shard or the registry found wrong with the adapter that was asked for as `name`.
    pub fn adapter(name: &str, failure: &AdapterFailure) -> Self {
        let cause = adapter_cause(&failure.code);
        if cause == Cause::ModelNotFound {
            return Self::model_not_found(name);
        }
        Self::at(cause, "model", format!("adapter `{}`: {}", shown(name), failure.message)).after(failure.retry_after)
    }
}

impl ApiError {
    /// Why the rule in `param` was not compiled: 400, or 429 where the server had no room for the work.
    pub fn grammar(param: &str, error: &CompileError) -> Self {
        match error {
            CompileError::Refused(error) => Self::at(Cause::InvalidSchema, param, error.to_string()),
            CompileError::Busy => Self::new(Cause::QueueFull, error.to_string()),
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        match &error {
            TextError::Encode(_) => Self::at(Cause::InvalidValue, "prompt", error.to_string()),
            TextError::NoTemplate => Self::at(Cause::UnsupportedParameter, "messages", error.to_string()),
            TextError::Template(TemplateError::NotContinuable) => {
                Self::at(Cause::InvalidValue, "continue_final_message", error.to_string())
            }
            TextError::Template(_) => Self::at(Cause::InvalidValue, "messages", error.to_string()),
            TextError::Panicked | TextError::File { .. } => Self::new(Cause::InternalError, "text processing failed"),
        }
    }
}
