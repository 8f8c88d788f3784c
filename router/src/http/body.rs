//! Reads request bodies: bounded in bytes and in time, JSON only.

use axum::body::Body;
use axum::http::Request;
use axum::http::{HeaderMap, header, request::Parts};
use bytes::BytesMut;
use http_body_util::BodyExt;
use serde_json::{Map, Value};

use super::config::HttpLimits;
use super::error::{ApiError, Cause};
use super::json;

/// Splits a request and parses its body as a JSON object.
///
/// # Errors
/// 408, 413, 415, or `invalid_json`.
pub(crate) async fn json_object(
    request: Request<Body>,
    limits: &HttpLimits,
) -> Result<(Parts, Map<String, Value>), ApiError> {
    let (parts, body) = request.into_parts();
    check_media_type(&parts.headers)?;
    let declared = parts.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > limits.body_bytes as u64) {
        return Err(too_large(limits));
    }
    let bytes = tokio::time::timeout(limits.body_timeout, read(body, limits)).await.map_err(|_| {
        let message = format!("the body did not arrive within {} s", limits.body_timeout.as_secs_f32());
        ApiError::new(Cause::BodyTimeout, message)
    })??;
    Ok((parts, json::object(&bytes)?))
}

async fn read(mut body: Body, limits: &HttpLimits) -> Result<BytesMut, ApiError> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|_| ApiError::new(Cause::InvalidJson, "the body ended before its declared length"))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limits.body_bytes {
            return Err(too_large(limits));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

fn too_large(limits: &HttpLimits) -> ApiError {
    let message = format!("the body is larger than {} bytes (--max-body-bytes)", limits.body_bytes);
    ApiError::new(Cause::BodyTooLarge, message)
}

/// Missing, or `application/json` with any parameters; no compression.
fn check_media_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let refuse = |what: &str| Err(ApiError::new(Cause::UnsupportedMediaType, what.to_owned()));
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING)
        && !encoding.as_bytes().eq_ignore_ascii_case(b"identity")
    {
        return refuse("`Content-Encoding` is not supported: send the body uncompressed");
    }
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let essence = value.to_str().unwrap_or("").split(';').next().unwrap_or("").trim();
    if essence.is_empty() || essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    refuse("`Content-Type` must be application/json")
}
