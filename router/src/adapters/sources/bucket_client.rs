//! The HTTP client under `object_store`: ours, without redirects, environment proxies and other people's error texts.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http_body_util::BodyExt;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
};
use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, HeaderValue};
use reqwest::{Client, StatusCode};
use url::Url;

use super::cause::place;

/// What the store answered last. Travels with one request as an extension: the crate's errors carry texts, not headers.
#[derive(Clone, Default)]
pub(super) struct Answer(Arc<Mutex<Option<(StatusCode, HeaderMap)>>>);

impl Answer {
    /// Status and headers, if there was an answer.
    pub(super) fn get(&self) -> Option<(StatusCode, HeaderMap)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, status: StatusCode, headers: &HeaderMap) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((status, headers.clone()));
    }
}

/// Makes `object_store` use our client.
pub(super) struct Connector(pub Client);

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Service(self.0.clone())))
    }
}

struct Service(Client);

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Service")
    }
}

impl HttpService for Service {
    fn call<'a, 'f>(
        &'a self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'f>>
    where
        'a: 'f,
        Self: 'f,
    {
        Box::pin(self.send(request))
    }
}

impl Service {
    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let answer = parts.extensions.get::<Answer>().cloned().unwrap_or_default();
        let url = Url::parse(&parts.uri.to_string()).map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        let body = body.collect().await?.to_bytes();
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        request.headers_mut().insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if !body.is_empty() {
            *request.body_mut() = Some(body.into());
        }
        let response: ::axum::http::Response<reqwest::Body> = self.0.execute(request).await.map_err(sent)?.into();
        let (mut parts, body) = response.into_parts();
        answer.set(parts.status, &parts.headers);
        let is_plain =
            matches!(parts.headers.get(CONTENT_ENCODING).map(HeaderValue::as_bytes), None | Some(b"" | b"identity"));
        if !parts.status.is_success() || !is_plain {
            // An error's text is read by nobody, however long it is; an encoded body is nobody's bytes.
            if !is_plain && parts.status.is_success() {
                parts.status = StatusCode::BAD_GATEWAY;
            }
            return Ok(HttpResponse::from_parts(parts, Bytes::new().into()));
        }
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body.map_err(sent))))
    }
}

fn sent(error: reqwest::Error) -> HttpError {
    let kind = if error.is_timeout() {
        HttpErrorKind::Timeout
    } else if error.is_connect() {
        HttpErrorKind::Connect
    } else {
        HttpErrorKind::Unknown
    };
    let place = error.url().map(place).unwrap_or_default();
    HttpError::new(kind, Sent { place, error: error.without_url() })
}

/// A connection that failed, and where to: of the URL nothing else is kept, it may be signed.
#[derive(Debug, thiserror::Error)]
#[error("no answer")]
pub(super) struct Sent {
    pub place: String,
    #[source]
    pub error: reqwest::Error,
}
