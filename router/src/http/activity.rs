//! Watches one connection: when a request's head began to arrive, which requests run, when something last moved.
//!
//! hyper has one timer for "no next request" and "half a head"; they need different limits, and the protocol sniffing
//! in front of hyper has none.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::bare_error;
use super::config::HttpLimits;

/// Shared by the connection's reader, its requests and its watchdog.
#[derive(Clone)]
pub(super) struct Activity {
    state: Arc<Mutex<State>>,
}

struct State {
    running: usize,
    /// First byte of a head that is not complete; at the start, the moment of the accept.
    head_since: Option<Instant>,
    last_moved: Instant,
}

impl Activity {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { state: Arc::new(Mutex::new(State { running: 0, head_since: Some(now), last_moved: now })) }
    }

    /// A request's head is complete. The guard ends with its response's last byte.
    pub(super) fn begin(&self) -> Running {
        let mut state = self.lock();
        state.running += 1;
        state.head_since = None;
        Running(self.clone())
    }

    /// Resolves when the connection has to be closed.
    pub(super) async fn expired(&self, limits: &HttpLimits) {
        loop {
            tokio::time::sleep(limits.header_timeout.min(limits.idle_timeout) / 2).await;
            let state = self.lock();
            let late = state.head_since.is_some_and(|since| since.elapsed() >= limits.header_timeout);
            let idle = state.running == 0 && state.last_moved.elapsed() >= limits.idle_timeout;
            if late || idle {
                return;
            }
        }
    }

    fn moved(&self, arrived: bool) {
        let mut state = self.lock();
        if state.running > 0 {
            return; // idle time begins with the end of the last request
        }
        state.last_moved = Instant::now();
        if arrived {
            state.head_since.get_or_insert_with(Instant::now);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that runs.
pub(super) struct Running(Activity);

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.running -= 1;
        state.last_moved = Instant::now();
    }
}

/// A response body that keeps its request running until it is sent or dropped.
pub(super) struct TrackedBody {
    pub(super) body: Body,
    pub(super) _running: Running,
}

impl HttpBody for TrackedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A socket that reports when bytes move.
pub(super) struct TrackedIo<T> {
    io: T,
    activity: Activity,
    /// What is written in the place of a bare refusal, and how many bytes of hyper's it stands for.
    refusal: Option<(Vec<u8>, usize)>,
}

impl<T> TrackedIo<T> {
    pub(super) fn new(io: T, activity: Activity) -> Self {
        Self { io, activity, refusal: None }
    }
}

impl<T: AsyncWrite + Unpin> TrackedIo<T> {
    /// Writes what stands for `bytes`; `None` if they are written as they are.
    fn poll_refusal(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Option<Poll<std::io::Result<usize>>> {
        if self.refusal.is_none() {
            self.refusal = Some((bare_error::with_body(bytes)?, bytes.len()));
        }
        let (left, stands_for) = self.refusal.as_mut()?;
        while !left.is_empty() {
            match Pin::new(&mut self.io).poll_write(cx, left) {
                Poll::Ready(Ok(0)) => return Some(Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()))),
                Poll::Ready(Ok(written)) => drop(left.drain(..written)),
                Poll::Ready(Err(error)) => return Some(Poll::Ready(Err(error))),
                Poll::Pending => return Some(Poll::Pending),
            }
        }
        let written = *stands_for;
        self.refusal = None;
        Some(Poll::Ready(Ok(written)))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for TrackedIo<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.activity.moved(true);
        }
        result
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for TrackedIo<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        if let Some(written) = self.poll_refusal(cx, bytes) {
            return written;
        }
        let result = Pin::new(&mut self.io).poll_write(cx, bytes);
        if result.is_ready() {
            self.activity.moved(false);
        }
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        if let Some(first) = bytes.iter().find(|part| !part.is_empty())
            && let Some(written) = self.poll_refusal(cx, first)
        {
            return written;
        }
        let result = Pin::new(&mut self.io).poll_write_vectored(cx, bytes);
        if result.is_ready() {
            self.activity.moved(false);
        }
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
