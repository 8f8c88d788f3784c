//! The outermost layer: gives each request its id, and every response that is not 2xx the one error body.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use futures_util::FutureExt;
use tracing::Instrument;

use super::App;
use super::anthropic::{self, error::anthropic_response};
use super::error::{ApiError, Cause};
use super::leftover::Leftover;
use super::lorax::error::lorax_response;
use crate::observe::RequestRecord;

/// The id of a request, in logs, headers and error bodies.
#[derive(Clone, Debug)]
pub(crate) struct RequestId(pub(crate) String);

/// How an error looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorShape {
    /// The envelope.
    OpenAi,
    /// What LoRAX's clients read.
    Lorax,
    /// What Anthropic's clients read.
    Anthropic,
}

impl ErrorShape {
    /// By the matched route; a handler that knows better says so in the response's extensions.
    fn of(request: &Request) -> Self {
        match request.extensions().get::<MatchedPath>().map(MatchedPath::as_str) {
            Some("/") if request.method() == Method::POST => Self::Lorax,
            Some("/generate" | "/generate_stream" | "/invocations" | "/embed" | "/classify" | "/classify_batch") => {
                Self::Lorax
            }
            // Also where there is no route: it is the client that counts.
            _ if anthropic::is_here(request.uri().path()) => Self::Anthropic,
            _ => Self::OpenAi,
        }
    }
}

/// The layer.
pub(crate) async fn envelope(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let recording = app.observer.begin(&request, id.clone());
    let record = recording.record();
    request.extensions_mut().insert(RequestId(id));
    request.extensions_mut().insert(Arc::clone(&record));
    let span = tracing::info_span!("request", request_id = record.id, trace_id = record.trace_id());
    let response = answer(&app, request, next, &record).instrument(span).await;
    recording.hold(response)
}

async fn answer(app: &App, request: Request, next: Next, record: &RequestRecord) -> Response {
    let shape = ErrorShape::of(&request);
    let (request, leftover) = Leftover::of(request);
    let mut response = match check_head(app, &request) {
        Ok(()) => match AssertUnwindSafe(next.run(request)).catch_unwind().await {
            Ok(response) => response,
            Err(_) => respond(
                app,
                &ApiError::new(Cause::InternalError, "an internal error; the request id is in the log"),
                record,
                shape,
            ),
        },
        Err(error) => respond(app, &error, record, shape),
    };
    let shape = response.extensions_mut().remove::<ErrorShape>().unwrap_or(shape);
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        let allow = response.headers_mut().remove(header::ALLOW); // set by the router with a 405
        response = respond(app, &error, record, shape);
        response.headers_mut().extend(allow.map(|allow| (header::ALLOW, allow)));
    } else if is_error(response.status()) && response.headers().get("x-request-id").is_none() {
        let error = ApiError::new(cause_of(response.status()), response.status().to_string());
        response = respond(app, &error, record, shape);
    }
    if let Ok(value) = HeaderValue::from_str(&record.id) {
        response.headers_mut().insert("x-request-id", value);
    }
    if let Some(leftover) = leftover {
        leftover.settle(&mut response).await;
        if app.is_draining() {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
    response
}

/// 304 and redirects have no envelope.
fn is_error(status: StatusCode) -> bool {
    status.is_client_error() || status.is_server_error()
}

fn respond(app: &App, error: &ApiError, record: &RequestRecord, shape: ErrorShape) -> Response {
    let (row, id) = (error.cause.row(), record.id.as_str());
    // Probes ask once a second; what is waited for is in the log where it happens.
    let is_state = matches!(error.cause, Cause::NotReady | Cause::Draining);
    if row.status.is_server_error() && !is_state {
        tracing::error!(code = row.code, "{error}");
    }
    app.metrics.rejected(row.code);
    record.failed(row.code);
    let mut response: axum::http::Response<Body> = match shape {
        ErrorShape::OpenAi => error.response(id),
        ErrorShape::Lorax => lorax_response(error, id),
        ErrorShape::Anthropic => anthropic_response(error, id),
    };
    // Marks the body as an envelope, so that it is not wrapped twice.
    if let Ok(value) = HeaderValue::from_str(id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

/// What a bare status of a library means. Our own handlers never send one.
fn cause_of(status: StatusCode) -> Cause {
    match status {
        StatusCode::NOT_FOUND => Cause::RouteNotFound,
        StatusCode::METHOD_NOT_ALLOWED => Cause::MethodNotAllowed,
        StatusCode::PAYLOAD_TOO_LARGE => Cause::BodyTooLarge,
        status if status.is_client_error() => Cause::InvalidValue,
        _ => Cause::InternalError,
    }
}

/// The client's id if it is one, else a new one.
fn request_id(request: &Request) -> String {
    let ours = |id: &&str| {
        (1..=128).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    };
    let sent = request.headers().get("x-request-id").and_then(|value| value.to_str().ok()).filter(ours);
    sent.map_or_else(|| uuid::Uuid::new_v4().simple().to_string(), str::to_owned)
}

/// hyper accepts somewhat larger heads than we do, so that the refusal has our body.
fn check_head(app: &App, request: &Request) -> Result<(), ApiError> {
    let (limits, headers) = (&app.config.limits, request.headers());
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    let bytes = bytes + request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    if headers.len() > limits.headers_max || bytes > limits.header_bytes {
        let (count, max, max_bytes) = (headers.len(), limits.headers_max, limits.header_bytes);
        let message = format!("{count} headers of {bytes} bytes; this server allows {max} of {max_bytes}");
        return Err(ApiError::new(Cause::HeadersTooLarge, message));
    }
    Ok(())
}
