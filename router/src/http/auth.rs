//! API keys: one layer over the whole router, default deny, decided on the matched route.

use axum::extract::{MatchedPath, Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use subtle::ConstantTimeEq;

use super::App;
use super::error::{ApiError, Cause};

/// Routes that need no key. Every other one does, unknown ones included.
const OPEN: &[&str] =
    &["/", "/health", "/health/live", "/health/ready", "/health/startup", "/startup", "/ping", "/metrics"];

/// Whose request this is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Caller {
    /// 0 on an open server, else derived from the key.
    pub(crate) tenant: u64,
}

/// Hashes of the accepted keys.
#[derive(Clone, Default)]
pub(crate) struct Keys {
    hashes: Vec<[u8; 32]>,
}

impl Keys {
    pub(crate) fn new(keys: &[String]) -> Self {
        Self { hashes: keys.iter().map(|key| *blake3::hash(key.as_bytes()).as_bytes()).collect() }
    }

    /// The caller behind `Authorization`, if its key is one of ours. Compares all keys, each in constant time.
    fn caller(&self, authorization: Option<&[u8]>) -> Option<Caller> {
        let (scheme, token) = authorization?.split_at_checked(7)?;
        if !scheme.eq_ignore_ascii_case(b"bearer ") {
            return None;
        }
        let hash = *blake3::hash(token.trim_ascii()).as_bytes();
        let mut found = subtle::Choice::from(0);
        for known in &self.hashes {
            found |= known.as_slice().ct_eq(hash.as_slice());
        }
        let tenant = hash.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        bool::from(found).then_some(Caller { tenant })
    }
}

/// The layer.
pub(crate) async fn authenticate(
    State(app): State<App>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let open = request.extensions().get::<MatchedPath>().is_some_and(|path| OPEN.contains(&path.as_str()));
    let caller = if app.keys.hashes.is_empty() || open {
        Caller::default()
    } else {
        let authorization = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
        let message = "a valid API key is required: `Authorization: Bearer <key>`";
        app.keys.caller(authorization).ok_or_else(|| ApiError::new(Cause::InvalidApiKey, message))?
    };
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}
