//! Asks a running server's admin API.

use std::time::Duration;

use anyhow::{Context, anyhow};
use reqwest::{Method, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use url::Url;

/// Where the admin API listens unless it is told otherwise.
const DEFAULT_URL: &str = "http://127.0.0.1:8001";
/// Longer than any `wait` the server takes.
const TIMEOUT: Duration = Duration::from_secs(660);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How asking went wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// No answer, or none that is ours.
    #[error("{0}")]
    Unreachable(String),
    /// What was typed cannot be meant.
    #[error("{0}")]
    Typed(String),
    /// The server said no.
    #[error("{message}")]
    Refused {
        /// The API's code.
        code: String,
        /// What it says.
        message: String,
        /// The whole body.
        body: Value,
    },
}

/// A server's admin API.
pub(crate) struct Client {
    http: reqwest::Client,
    base: Url,
    /// As people write it: of a socket, its path.
    typed: String,
    key: Option<SecretString>,
}

impl Client {
    /// Connects to nothing yet.
    pub(crate) fn new(url: Option<&str>, key: Option<SecretString>) -> anyhow::Result<Self> {
        let typed = url.unwrap_or(DEFAULT_URL);
        let builder = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(TIMEOUT);
        let (builder, base) = match typed.strip_prefix("unix:") {
            Some(path) => (builder.unix_socket(path), "http://localhost"),
            None => (builder, typed),
        };
        let base = Url::parse(base).with_context(|| format!("--url {typed}: not a URL; write http://{typed}"))?;
        if !matches!(base.scheme(), "http" | "https") || base.cannot_be_a_base() {
            return Err(anyhow!("--url {typed}: must be http://host:port or unix:/path, such as http://{typed}"));
        }
        Ok(Self { http: builder.build().context("cannot make an HTTP client")?, base, typed: typed.to_owned(), key })
    }

    /// One call. `path` are the segments behind `/admin/v1`; each may hold any character.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Value, CallError> {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(["admin", "v1"]).extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request = self.http.request(method, url);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key.expose_secret());
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let unreachable = |error: reqwest::Error| {
            // The innermost cause is what a person can act on.
            let mut cause: &dyn std::error::Error = &error;
            while let Some(inner) = cause.source() {
                cause = inner;
            }
            CallError::Unreachable(format!(
                "{} does not answer: {cause}; is the server running there? (--url)",
                self.typed
            ))
        };
        let answer = request.send().await.map_err(unreachable)?;
        let status = answer.status();
        let text = answer.text().await.map_err(unreachable)?;
        read(&self.base, status, &text)
    }
}

fn read(base: &Url, status: StatusCode, text: &str) -> Result<Value, CallError> {
    let parsed: Option<Value> = serde_json::from_str(text).ok();
    match parsed {
        Some(value) if status.is_success() => Ok(value),
        Some(value) => {
            let field = |name: &str| value["error"][name].as_str().unwrap_or_default().to_owned();
            let (code, message) = (field("code"), field("message"));
            if code == "route_not_found" || message.starts_with("no route") {
                return Err(CallError::Unreachable(format!(
                    "{base} has no admin API: that is on the admin listener ({DEFAULT_URL} unless --admin-listen says \
                     otherwise), and on the main port where the server has an --admin-key"
                )));
            }
            if code.is_empty() {
                return Err(CallError::Unreachable(format!(
                    "{base} answered {status}: no server of this kind (--url)"
                )));
            }
            Err(CallError::Refused { code, message, body: value })
        }
        None => Err(CallError::Unreachable(format!("{base} answered {status}: no server of this kind (--url)"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_apart() {
        let base = Url::parse("http://127.0.0.1:1").unwrap();
        assert!(read(&base, StatusCode::OK, "{\"data\":[]}").is_ok());
        let refused =
            read(&base, StatusCode::NOT_FOUND, "{\"error\":{\"code\":\"model_not_found\",\"message\":\"m\"}}");
        assert!(matches!(refused, Err(CallError::Refused { code, .. }) if code == "model_not_found"));
        for (status, text) in [(StatusCode::OK, "<html>"), (StatusCode::NOT_FOUND, "{}"), (StatusCode::FOUND, "")] {
            assert!(matches!(read(&base, status, text), Err(CallError::Unreachable(_))), "{text}");
        }
        assert!(Client::new(Some("ftp://x"), None).is_err());
        assert!(Client::new(Some("nothing"), None).is_err());
    }
}
