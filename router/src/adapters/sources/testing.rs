//! A small HTTP server that answers as a test says and remembers what it was asked.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Response};
use futures_util::TryStreamExt;

use super::*;
use crate::adapters::{FileName, Origin};

type Answers = dyn Fn(&Parts) -> Response<Body> + Send + Sync;

/// One request as it arrived.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub method: String,
    pub path: String,
    pub headers: HeaderMap,
}

impl Seen {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// Stops with the test's runtime.
pub(super) struct Server {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    pub(super) async fn start(answers: impl Fn(&Parts) -> Response<Body> + Send + Sync + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, answers): (Arc<Mutex<Vec<Seen>>>, Arc<Answers>) = (Arc::default(), Arc::new(answers));
        let log = Arc::clone(&seen);
        let router = axum::Router::new().fallback(move |request: axum::extract::Request| {
            let (log, answers) = (Arc::clone(&log), Arc::clone(&answers));
            async move {
                let parts = request.into_parts().0;
                log.lock().unwrap().push(Seen {
                    method: parts.method.to_string(),
                    path: parts.uri.to_string(),
                    headers: parts.headers.clone(),
                });
                answers(&parts)
            }
        });
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, seen }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// True if any header of any request holds `text`.
    pub(super) fn was_told(&self, text: &str) -> bool {
        let holds = |seen: &Seen| {
            seen.path.contains(text)
                || seen.headers.values().any(|value| String::from_utf8_lossy(value.as_bytes()).contains(text))
        };
        self.seen().iter().any(holds)
    }
}

/// A whole file or the asked range of it, with `headers`.
pub(super) fn file(parts: &Parts, bytes: &'static [u8], headers: &[(&str, &str)]) -> Response<Body> {
    let range =
        parts.headers.get("range").and_then(|value| value.to_str().ok()).and_then(|value| value.strip_prefix("bytes="));
    let start = range.and_then(|range| range.trim_end_matches('-').parse::<usize>().ok()).unwrap_or(0);
    let mut response = Response::builder().status(if range.is_some() { 206 } else { 200 });
    if range.is_some() {
        response = response.header("content-range", format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len()));
    }
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response = response.header("content-length", (bytes.len() - start).to_string());
    let body = if parts.method == "HEAD" { Body::empty() } else { Body::from(&bytes[start..]) };
    response.body(body).unwrap()
}

pub(super) fn status(code: u16, headers: &[(&str, &str)]) -> Response<Body> {
    let mut response = Response::builder().status(code);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(Body::from("upstream says: SECRET-UPSTREAM-TEXT")).unwrap()
}

/// Settings whose waits are short.
pub(super) fn quick() -> SourceSettings {
    let pace = Pace {
        resolve_timeout: Duration::from_secs(5),
        open_timeout: Duration::from_secs(5),
        window: Duration::from_millis(300),
        bytes_min: 1000,
    };
    SourceSettings { pace, ..SourceSettings::default() }
}

pub(super) fn token(text: &str) -> Credential {
    Credential::Token(text.to_owned().into())
}

pub(super) async fn resolve(sources: &Sources, text: &str, credential: &Credential) -> Result<Resolved, SourceError> {
    sources.resolve(&AdapterRef::parse(text).unwrap(), credential).await
}

/// The bytes of one file from `offset` on.
pub(super) async fn read(
    sources: &Sources,
    resolved: &Resolved,
    name: FileName,
    offset: u64,
    credential: &Credential,
) -> Result<Vec<u8>, SourceError> {
    let Origin::Remote(files) = &resolved.origin else { panic!("a directory: {resolved:?}") };
    let file = files.iter().find(|file| file.name == name).unwrap();
    let body = sources.open(resolved, file, offset, credential).await?;
    body.try_fold(Vec::new(), |sum, chunk| async move { Ok([sum, chunk.to_vec()].concat()) }).await
}

/// A failure, its text free of what the upstream said and of secrets.
#[track_caller]
pub(super) fn clean<T: std::fmt::Debug>(outcome: Result<T, SourceError>) -> SourceError {
    let error = outcome.unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(!text.contains("SECRET"), "{text}");
    error
}

pub(super) fn is_retryable(error: &SourceError) -> bool {
    matches!(error, SourceError::Retryable { .. })
}

pub(super) fn is_forbidden(error: &SourceError) -> bool {
    matches!(error, SourceError::Permanent { code: "source_forbidden", .. })
}
