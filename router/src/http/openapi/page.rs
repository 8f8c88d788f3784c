//! `/docs`: a page that reads `/openapi.json` and shows it. Its files are part of the binary and name no other host.

use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};

/// Scripts, styles and requests of this origin only; no frame may hold the page.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// `GET /docs`.
pub(super) async fn html() -> Response {
    file("text/html; charset=utf-8", include_str!("page/docs.html"))
}

/// `GET /docs/docs.css`.
pub(super) async fn css() -> Response {
    file("text/css; charset=utf-8", include_str!("page/docs.css"))
}

/// `GET /docs/docs.js`.
pub(super) async fn js() -> Response {
    file("text/javascript; charset=utf-8", include_str!("page/docs.js"))
}

fn file(media_type: &'static str, text: &'static str) -> Response {
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, media_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // A new version of the server has a new page.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}
