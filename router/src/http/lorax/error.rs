//! Errors in LoRAX's form: `{"error", "error_type", "code"}` with LoRAX's statuses.

use axum::body::Body;
use axum::http::{Response, StatusCode};
use serde::Serialize;

use crate::http::error::{ApiError, Cause};

#[derive(Serialize)]
struct LoraxError<'a> {
    error: &'a str,
    error_type: &'a str,
    /// Ours: says more than LoRAX's five types.
    code: &'a str,
}

/// Status and `error_type` of an error.
fn class(error: &ApiError) -> (StatusCode, &'static str) {
    let own = error.cause.row().status;
    match error.cause {
        // Only the template reads messages here.
        Cause::InvalidValue | Cause::UnsupportedParameter if error.param.as_deref() == Some("messages") => {
            (StatusCode::UNPROCESSABLE_ENTITY, "template_error")
        }
        Cause::ModelNotFound
        | Cause::ShardFault
        | Cause::AdapterNumerics
        | Cause::AdapterInvalid
        | Cause::AdapterUnsupported
        | Cause::AdapterBaseMismatch
        | Cause::AdapterTooLarge
        | Cause::AdapterRankLimit
        | Cause::AdapterLoading
        | Cause::AdapterLoadFailed
        | Cause::AdapterAuthUnavailable
        | Cause::DiskFull => (StatusCode::FAILED_DEPENDENCY, "generation"),
        Cause::DeadlineExceeded => (own, "generation"),
        Cause::InvalidApiKey => (own, "authentication"),
        Cause::NotReady | Cause::Draining => (own, "healthcheck"),
        Cause::InternalError => (own, "incomplete_generation"),
        Cause::BodyTimeout
        | Cause::BodyTooLarge
        | Cause::UnsupportedMediaType
        | Cause::HeadersTooLarge
        | Cause::MethodNotAllowed
        | Cause::RouteNotFound => (own, "validation"),
        _ => match own {
            StatusCode::BAD_REQUEST => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
            StatusCode::TOO_MANY_REQUESTS => (own, "overloaded"),
            StatusCode::FORBIDDEN => (own, "permission"),
            _ => (StatusCode::FAILED_DEPENDENCY, "generation"),
        },
    }
}

/// The status of a cause on LoRAX's routes.
pub(in crate::http) fn lorax_status(cause: Cause) -> u16 {
    class(&ApiError::new(cause, "")).0.as_u16()
}

/// The body of an error, alone or as the last event of a stream.
pub(in crate::http) fn lorax_error(error: &ApiError) -> String {
    let (_, error_type) = class(error);
    let text = match error_type {
        "validation" | "template_error" => format!("Input validation error: {}", error.message),
        "generation" => format!("Request failed during generation: {}", error.message),
        "overloaded" => "Model is overloaded".to_owned(),
        _ => error.message.clone(),
    };
    let body = LoraxError { error: &text, error_type, code: error.cause.row().code };
    serde_json::to_string(&body).unwrap_or_default() // strings: this cannot fail
}

/// The whole response, with the headers that our own envelope has.
pub(in crate::http) fn lorax_response(error: &ApiError, request_id: &str) -> Response<Body> {
    let mut response = error.response(request_id).map(|_| Body::from(lorax_error(error)));
    *response.status_mut() = class(error).0;
    response
}
