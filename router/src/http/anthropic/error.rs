//! Errors in Anthropic's form: `{"type": "error", "error": {"type", "message"}, "request_id"}`, with our statuses.

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Response, StatusCode};
use serde::Serialize;

use crate::http::error::ApiError;

/// Beside `x-request-id`, where Anthropic's clients look for it.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

#[derive(Serialize)]
struct Outer<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    error: Inner<'a>,
    request_id: &'a str,
}

#[derive(Serialize)]
struct Inner<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    message: &'a str,
    /// Ours: says more than Anthropic's types.
    code: &'static str,
    param: Option<&'a str>,
}

/// Anthropic's type for a status.
fn kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        504 => "timeout_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    }
}

/// The body of an error, alone or as the last event of a stream.
pub(in crate::http) fn anthropic_error(error: &ApiError, request_id: &str) -> String {
    let row = error.cause.row();
    let inner =
        Inner { kind: kind(row.status), message: &error.message, code: row.code, param: error.param.as_deref() };
    let body = Outer { kind: "error", error: inner, request_id };
    serde_json::to_string(&body).unwrap_or_default() // strings: this cannot fail
}

/// The whole response, with the headers that our own envelope has.
pub(in crate::http) fn anthropic_response(error: &ApiError, request_id: &str) -> Response<Body> {
    let mut response = error.response(request_id).map(|_| Body::from(anthropic_error(error, request_id)));
    response.headers_mut().extend(HeaderValue::from_str(request_id).ok().map(|id| (REQUEST_ID, id)));
    response
}
