//! One error type for every route, and the one table from cause to status, type and code.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use serde::Serialize;

use crate::engine::{AdapterFailure, Failure};
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
    AdapterAmbiguous,
    NameIsBaseModel,
    InvalidApiKey,
    ModelNotFound,
    RouteNotFound,
    MethodNotAllowed,
    BodyTimeout,
    BodyTooLarge,
    UnsupportedMediaType,
    HeadersTooLarge,
    AdapterInvalid,
    AdapterUnsupported,
    AdapterBaseMismatch,
    AdapterTooLarge,
    AdapterRankLimit,
    QueueFull,
    InternalError,
    ShardFault,
    AdapterNumerics,
    AdapterLoading,
    AdapterLoadFailed,
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
    pub const ALL: [Self; 29] = [
        Self::InvalidValue,
        Self::MissingField,
        Self::InvalidJson,
        Self::UnsupportedParameter,
        Self::ContextLengthExceeded,
        Self::AdapterAmbiguous,
        Self::NameIsBaseModel,
        Self::InvalidApiKey,
        Self::ModelNotFound,
        Self::RouteNotFound,
        Self::MethodNotAllowed,
        Self::BodyTimeout,
        Self::BodyTooLarge,
        Self::UnsupportedMediaType,
        Self::HeadersTooLarge,
        Self::AdapterInvalid,
        Self::AdapterUnsupported,
        Self::AdapterBaseMismatch,
        Self::AdapterTooLarge,
        Self::AdapterRankLimit,
        Self::QueueFull,
        Self::InternalError,
        Self::ShardFault,
        Self::AdapterNumerics,
        Self::AdapterLoading,
        Self::AdapterLoadFailed,
        Self::NotReady,
        Self::Draining,
        Self::DeadlineExceeded,
    ];

    /// The table.
    pub fn row(self) -> Row {
        const INVALID: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        let (status, kind, code, retryable) = match self {
            Self::InvalidValue => (400, INVALID, "invalid_value", false),
            Self::MissingField => (400, INVALID, "missing_field", false),
            Self::InvalidJson => (400, INVALID, "invalid_json", false),
            Self::UnsupportedParameter => (400, INVALID, "unsupported_parameter", false),
            Self::ContextLengthExceeded => (400, INVALID, "context_length_exceeded", false),
            Self::AdapterAmbiguous => (400, INVALID, "adapter_ambiguous", false),
            Self::NameIsBaseModel => (400, INVALID, "name_is_base_model", false),
            Self::InvalidApiKey => (401, "authentication_error", "invalid_api_key", false),
            Self::ModelNotFound => (404, INVALID, "model_not_found", false),
            Self::RouteNotFound => (404, INVALID, "route_not_found", false),
            Self::MethodNotAllowed => (405, INVALID, "method_not_allowed", false),
            Self::BodyTimeout => (408, INVALID, "body_timeout", true),
            Self::BodyTooLarge => (413, INVALID, "body_too_large", false),
            Self::UnsupportedMediaType => (415, INVALID, "unsupported_media_type", false),
            Self::HeadersTooLarge => (431, INVALID, "headers_too_large", false),
            Self::AdapterInvalid => (422, INVALID, "adapter_invalid", false),
            Self::AdapterUnsupported => (422, INVALID, "adapter_unsupported", false),
            Self::AdapterBaseMismatch => (422, INVALID, "adapter_base_mismatch", false),
            Self::AdapterTooLarge => (422, INVALID, "adapter_too_large", false),
            Self::AdapterRankLimit => (422, INVALID, "adapter_rank_limit", false),
            Self::QueueFull => (429, "rate_limit_error", "queue_full", true),
            Self::InternalError => (500, SERVER, "internal_error", false),
            Self::ShardFault => (500, SERVER, "shard_fault", true),
            Self::AdapterNumerics => (500, SERVER, "adapter_numerics", false),
            Self::AdapterLoading => (503, SERVER, "adapter_loading", true),
            Self::AdapterLoadFailed => (503, SERVER, "adapter_load_failed", true),
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
}

/// Bytes of a value that an error message repeats.
const SHOWN_BYTES: usize = 64;

impl ApiError {
    /// An error without a field.
    pub fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self { cause, message: message.into(), param: None }
    }

    /// An error at `param`.
    pub fn at(cause: Cause, param: &str, message: impl Into<String>) -> Self {
        Self { cause, message: message.into(), param: Some(param.to_owned()) }
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
        let message = format!("The model `{}` does not exist or you do not have access to it.", cut(name));
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
                kind: row.kind,
                param: self.param.as_deref(),
                code: row.code,
                retryable: row.retryable,
                request_id,
            },
        };
        serde_json::to_string(&body).unwrap_or_default() // strings and a bool: this cannot fail
    }

    /// The whole response. `retry_after_s` is sent with 429 and 503.
    pub fn response(&self, request_id: &str, retry_after_s: u32) -> Response<Body> {
        let status = self.cause.row().status;
        let mut response = Response::new(Body::from(self.envelope(request_id)));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_after_s.max(1)));
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
        *response.status_mut() = self.cause.row().status;
        response.extensions_mut().insert(self);
        response
    }
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Inner<'a>,
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

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let cause = match &failure {
            Failure::QueueFull { .. } => Cause::QueueFull,
            Failure::DeadlineExceeded => Cause::DeadlineExceeded,
            Failure::ShardFault => Cause::ShardFault,
            Failure::Numerics(_) => Cause::AdapterNumerics,
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
        let cause = match failure.code.as_str() {
            "adapter_invalid" => Cause::AdapterInvalid,
            "adapter_unsupported" => Cause::AdapterUnsupported,
            "adapter_base_mismatch" => Cause::AdapterBaseMismatch,
            "adapter_too_large" => Cause::AdapterTooLarge,
            "adapter_rank_limit" => Cause::AdapterRankLimit,
            "adapter_loading" => Cause::AdapterLoading,
            "model_not_found" => return Self::model_not_found(name),
            _ => Cause::AdapterLoadFailed,
        };
        Self::at(cause, "model", format!("adapter `{}`: {}", cut(name), failure.message))
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
