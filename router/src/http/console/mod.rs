//! The console: a page for people, made of static files in this binary, and the numbers it shows.
//!
//! The page holds nothing secret. What it shows comes from `GET /admin/v1/live` and the rest of the admin API with the admin
//! key, and from `/v1` with an API key, which it keeps for as long as its tab is open.

mod live;
mod record;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

pub(crate) use live::live;
pub(crate) use record::Recorder;

use super::App;
use super::error::ApiError;
use super::service;

/// Scripts, styles and requests of this origin only, nothing inline, in nobody's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

const INDEX: &str = include_str!("page/index.html");

/// Names below `/console/`, media types and texts.
const FILES: &[(&str, &str, &str)] = &[
    ("console.css", CSS, include_str!("page/console.css")),
    ("parts.css", CSS, include_str!("page/parts.css")),
    ("icon.svg", SVG, include_str!("page/icon.svg")),
    ("main.js", SCRIPT, include_str!("page/main.js")),
    ("api.js", SCRIPT, include_str!("page/api.js")),
    ("dom.js", SCRIPT, include_str!("page/dom.js")),
    ("format.js", SCRIPT, include_str!("page/format.js")),
    ("colors.js", SCRIPT, include_str!("page/colors.js")),
    ("overview.js", SCRIPT, include_str!("page/overview.js")),
    ("memory.js", SCRIPT, include_str!("page/memory.js")),
    ("plot.js", SCRIPT, include_str!("page/plot.js")),
    ("adapters.js", SCRIPT, include_str!("page/adapters.js")),
    ("dialogs.js", SCRIPT, include_str!("page/dialogs.js")),
    ("playground.js", SCRIPT, include_str!("page/playground.js")),
];

/// The page and its files.
pub(crate) fn routes() -> Router<App> {
    Router::new().route("/console", get(page)).route("/console/{file}", get(file))
}

/// `GET /`: the page for browsers, readiness for everybody else.
pub(crate) async fn front(app: State<App>, headers: HeaderMap) -> Result<Response, ApiError> {
    if wants_html(&headers) { Ok(page(headers).await) } else { service::ready(app).await }
}

async fn page(headers: HeaderMap) -> Response {
    let mut response = served(&headers, HTML, INDEX);
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
    response
}

async fn file(Path(name): Path<String>, headers: HeaderMap) -> Result<Response, ApiError> {
    let found = FILES.iter().find(|(known, ..)| *known == name);
    let (_, kind, text) = found.ok_or_else(|| service::unknown_route(&format!("/console/{name}")))?;
    Ok(served(&headers, kind, text))
}

/// True if `text/html` is named as acceptable: programs send `*/*` or nothing.
fn wants_html(headers: &HeaderMap) -> bool {
    let ranges = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    ranges.flat_map(|value| value.split(',')).any(|range| {
        let mut parts = range.split(';').map(str::trim);
        let is_html = parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("text/html"));
        let is_refused = |part: &str| {
            part.split_once('=').is_some_and(|(name, q)| {
                name.trim().eq_ignore_ascii_case("q") && q.trim().parse::<f32>().is_ok_and(|q| q <= 0.0)
            })
        };
        is_html && !parts.any(is_refused)
    })
}

/// The text, or 304 where the browser has this version's already.
fn served(headers: &HeaderMap, kind: &'static str, text: &'static str) -> Response {
    let tag = format!("\"{}\"", blake3::hash(text.as_bytes()).to_hex().get(..16).unwrap_or_default());
    let has_it = headers.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes());
    let mut response = if has_it { StatusCode::NOT_MODIFIED.into_response() } else { text.into_response() };
    let fixed = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    let own = response.headers_mut();
    for (name, value) in fixed {
        own.insert(name, HeaderValue::from_static(value));
    }
    own.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    own.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        own.insert(header::ETAG, tag);
    }
    response
}
