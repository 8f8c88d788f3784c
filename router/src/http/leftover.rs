//! What a handler left unread of a request's body.
//!
//! A refusal often comes before the body does. On HTTP/1 the body's bytes stand in front of the next request, and hyper
//! closes a connection whose body was not read, without a word: a client that pools its connections sends its next
//! request into a closed one. So a small rest is read, and for any other one the response says `Connection: close`.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, Version, header};
use axum::response::Response;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// Larger rests are not worth the connection.
const BYTES_MAX: u64 = 64 * 1024;
/// How long an answer waits for the rest: long enough for a packet that follows the head.
const WAIT: Duration = Duration::from_millis(100);

/// The body of a request whose handler may already be gone.
pub(super) struct Leftover {
    body: SharedBody,
    /// The client sends its body only when it is told to go on; a final answer tells it not to.
    waits_for_continue: bool,
}

impl Leftover {
    /// Takes a hold of the request's body; `None` on HTTP/2, where a body is in nobody's way.
    pub(super) fn of(request: Request) -> (Request, Option<Self>) {
        if request.version() >= Version::HTTP_2 {
            return (request, None);
        }
        let (parts, body) = request.into_parts();
        let waits_for_continue = parts.headers.contains_key(header::EXPECT);
        let body = SharedBody(Arc::new(Mutex::new(Source { body, ended: false })));
        (Request::from_parts(parts, Body::new(body.clone())), Some(Self { body, waits_for_continue }))
    }

    /// Reads the rest, or marks `response` as the connection's last.
    pub(super) async fn settle(mut self, response: &mut Response) {
        if self.body.is_end_stream() {
            return;
        }
        let small = !self.waits_for_continue && self.body.size_hint().lower() <= BYTES_MAX;
        if !small || !matches!(tokio::time::timeout(WAIT, self.body.read_rest()).await, Ok(true)) {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

/// A body with two holders; only one of them reads at a time.
#[derive(Clone)]
struct SharedBody(Arc<Mutex<Source>>);

struct Source {
    body: Body,
    /// It said so, and must not be asked again: a chunked body does not know its end by itself.
    ended: bool,
}

impl SharedBody {
    fn lock(&self) -> MutexGuard<'_, Source> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the end came within [`BYTES_MAX`].
    async fn read_rest(&mut self) -> bool {
        let mut bytes = 0;
        while let Some(frame) = self.frame().await {
            let Ok(frame) = frame else { return false };
            bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
            if bytes > BYTES_MAX {
                return false;
            }
        }
        true
    }
}

impl HttpBody for SharedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut source = self.lock();
        if source.ended {
            return Poll::Ready(None);
        }
        let frame = Pin::new(&mut source.body).poll_frame(cx);
        source.ended = matches!(frame, Poll::Ready(None | Some(Err(_))));
        frame
    }

    fn is_end_stream(&self) -> bool {
        let source = self.lock();
        source.ended || source.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.lock().body.size_hint()
    }
}
