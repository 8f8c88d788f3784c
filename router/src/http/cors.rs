//! Pages of other origins: which ones may read answers (`--cors-allow-origin`).
//!
//! The layer lies around all others: a browser asks first without a key, and a refusal has to be readable too.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

/// How long a browser may keep an answer to its first question.
const MAX_AGE: Duration = Duration::from_secs(600);

/// Our headers that scripts may read besides the usual ones.
const EXPOSED: [&str; 28] = [
    "retry-after",
    "x-request-id",
    "x-ignored-fields",
    "x-model-id",
    "x-adapter-id",
    "x-adapter-source",
    "x-adapter-revision",
    "x-adapter-content-id",
    "x-adapter-fallback",
    "x-compute-type",
    "x-compute-time",
    "x-compute-characters",
    "x-total-time",
    "x-prompt-tokens",
    "x-generated-tokens",
    "x-skipped-tokens",
    "x-total-tokens",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-prefill-time",
    "x-decode-time",
    "x-time-per-token",
    "x-time-to-first-token",
    "x-time-per-output-token",
    "server-timing",
    "traceresponse",
    "www-authenticate",
];

/// Whose pages may read answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorsOrigin(HeaderValue);

impl CorsOrigin {
    /// Reads an origin as an operator writes it: `*`, or scheme, host and perhaps a port.
    ///
    /// # Errors
    /// What is expected.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const RULE: &str = "`*` or an origin such as https://app.example.com, without a path";
        if text == "*" {
            return Ok(Self(HeaderValue::from_static("*")));
        }
        let origin = url::Url::parse(text).map_err(|_| RULE)?.origin();
        // Browsers send it in this form, and it is compared byte by byte.
        let sent = origin.ascii_serialization();
        if !origin.is_tuple() || !text.trim_end_matches('/').eq_ignore_ascii_case(&sent) {
            return Err(RULE);
        }
        HeaderValue::from_str(&sent).map(Self).map_err(|_| RULE)
    }
}

/// The layer; `None` where no origin is allowed.
pub(super) fn layer(origins: &[CorsOrigin]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let allowed = match origins.iter().any(|origin| origin.0 == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().map(|origin| origin.0.clone())),
    };
    let methods = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::DELETE];
    Some(
        CorsLayer::new()
            .allow_origin(allowed)
            .allow_methods(methods)
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(EXPOSED.map(HeaderName::from_static))
            .max_age(MAX_AGE),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_read_as_browsers_send_them() {
        for (typed, sent) in [
            ("*", "*"),
            ("https://App.Example.com", "https://app.example.com"),
            ("http://localhost:3000/", "http://localhost:3000"),
        ] {
            assert_eq!(CorsOrigin::parse(typed).unwrap().0, sent, "{typed}");
        }
        // A browser leaves the usual port out.
        for bad in [
            "https://a.example:443",
            "null",
            "",
            "example.com",
            "https://",
            "https://a/b",
            "https://a?x",
            "https://u@a",
            "file:///x",
            "*.example.com",
        ] {
            assert!(CorsOrigin::parse(bad).is_err(), "{bad}");
        }
    }
}
