//! Server-sent events: a producer reads the runs and fills a bounded channel, the response body empties it.
//!
//! The client is gone when the channel's other end is dropped; it is stalled when the channel stays full. Both end the
//! producer, and with it the runs.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};

use super::run::{Progress, Run};
use crate::http::App;
use crate::http::error::{ApiError, Cause};
use crate::http::server::ConnectionAbort;

/// Bytes that an event of one token usually fits in.
const EVENT_BYTES_USUAL: usize = 384;

/// The client left or stalled: nothing more can be told.
pub(crate) struct Gone;

/// A run and what it just did; `None`: it ended.
pub(crate) type Step = (Run, Option<Result<Progress, ApiError>>);

async fn step(mut run: Run) -> Step {
    let progress = run.next().await;
    (run, progress)
}

/// Resolves when running requests have to end.
async fn told_to_end(mut ending: watch::Receiver<bool>) {
    // The sender lives in the application, which outlives its requests; without it there is nothing to wait for.
    if ending.wait_for(|ending| *ending).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn draining() -> ApiError {
    ApiError::new(Cause::Draining, "the server is shutting down")
}

/// The runs of one request while they are streamed.
///
/// What a stream waits for besides its runs is waited for all the time, not anew for each token.
pub(crate) struct Runs {
    app: App,
    /// The only run is polled where it lies ..
    alone: Option<Run>,
    /// .. several tell which of them moved.
    running: FuturesUnordered<BoxFuture<'static, Step>>,
    /// Running requests have to end.
    told_to_end: BoxFuture<'static, ()>,
    /// The client left.
    left: Option<BoxFuture<'static, ()>>,
    ping: Pin<Box<Sleep>>,
    /// When a run last did something.
    moved: Instant,
}

/// What a producer goes on with.
#[expect(clippy::large_enum_variant, reason = "moved once; a box would be an allocation for each token")]
enum Next {
    Step(Option<Step>),
    Gone,
    ToldToEnd,
    Ping,
}

impl Runs {
    pub(crate) fn new(app: &App, mut runs: Vec<Run>) -> Self {
        let alone = if runs.len() == 1 { runs.pop() } else { None };
        Self {
            app: app.clone(),
            alone,
            running: runs.into_iter().map(|run| Box::pin(step(run)) as _).collect(),
            told_to_end: Box::pin(told_to_end(app.ending())),
            left: None,
            ping: Box::pin(tokio::time::sleep(app.config.limits.ping_every)),
            moved: Instant::now(),
        }
    }

    /// Waits until something happened to a run, so that what fails before has a status of its own.
    ///
    /// # Errors
    /// The failure of the first run, or `draining`.
    pub(crate) async fn first(&mut self) -> Result<Step, ApiError> {
        let first = poll_fn(|cx| match self.poll_step(cx) {
            Poll::Pending => self.told_to_end.as_mut().poll(cx).map(|()| None),
            ready => ready,
        });
        match first.await.ok_or_else(draining)? {
            (_, Some(Err(error))) => Err(error),
            step => Ok(step),
        }
    }

    /// What happens next to any run; `None` when all have ended. Sends comments while nothing happens.
    pub(crate) async fn next(&mut self, events: &EventSender) -> Result<Result<Option<Step>, ApiError>, Gone> {
        loop {
            match poll_fn(|cx| self.poll_next(events, cx)).await {
                Next::Step(step) => return Ok(Ok(step)),
                Next::Gone => return Err(Gone),
                Next::ToldToEnd => return Ok(Err(draining())),
                Next::Ping => events.send(": ping\n\n").await?,
            }
        }
    }

    /// A step that is there goes first: whoever sends it finds out whether the client left.
    fn poll_next(&mut self, events: &EventSender, cx: &mut Context<'_>) -> Poll<Next> {
        if let Poll::Ready(step) = self.poll_step(cx) {
            self.moved = Instant::now();
            return Poll::Ready(Next::Step(step));
        }
        let left = self.left.get_or_insert_with(|| events.closed());
        if left.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Next::Gone);
        }
        if self.told_to_end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Next::ToldToEnd);
        }
        let ping_every = self.app.config.limits.ping_every;
        while self.ping.as_mut().poll(cx).is_ready() {
            let is_due = self.moved.elapsed() >= ping_every;
            if is_due {
                self.moved = Instant::now();
            }
            self.ping.as_mut().reset(self.moved + ping_every);
            if is_due {
                return Poll::Ready(Next::Ping);
            }
        }
        Poll::Pending
    }

    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Option<Step>> {
        let Some(run) = &mut self.alone else { return self.running.poll_next_unpin(cx) };
        let progress = ready!(run.poll_next(cx));
        Poll::Ready(self.alone.take().map(|run| (run, progress)))
    }

    /// Takes a run back that a step gave out.
    pub(crate) fn go_on(&mut self, run: Run) {
        if self.running.is_empty() {
            self.alone = Some(run);
        } else {
            self.running.push(Box::pin(step(run)));
        }
    }

    /// Ends all runs; their memory is free even if the client's channel is not.
    pub(crate) fn cancel(&mut self) {
        self.alone = None;
        self.running.clear();
    }
}

/// The producer's end of a stream.
pub(crate) struct EventSender {
    app: App,
    events: mpsc::Sender<Bytes>,
    /// Ends the connection of a client that does not read.
    abort: Option<ConnectionAbort>,
}

impl EventSender {
    /// A stream's two ends: what fills it, and the 200 response that carries it.
    pub(crate) fn channel(app: &App, abort: Option<ConnectionAbort>) -> (Self, Response) {
        let (events, receiver) = mpsc::channel(app.config.limits.stalled_events.max(1));
        let body = futures_util::stream::unfold(receiver, |mut receiver| async move {
            let event: Bytes = receiver.recv().await?;
            Some((Ok::<_, std::convert::Infallible>(event), receiver))
        });
        let mut response = Response::new(Body::from_stream(body));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        (Self { app: app.clone(), events, abort }, response)
    }

    /// Resolves when the client left.
    fn closed(&self) -> BoxFuture<'static, ()> {
        let events = self.events.clone();
        Box::pin(async move { events.closed().await })
    }

    /// Waits for room; a client that makes none in time is cut off.
    pub(crate) async fn send(&self, event: impl Into<Bytes>) -> Result<(), Gone> {
        let event = match self.events.try_send(event.into()) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Closed(_)) => return Err(Gone),
            Err(TrySendError::Full(event)) => event,
        };
        match tokio::time::timeout(self.app.config.limits.stalled_timeout, self.events.send(event)).await {
            Ok(sent) => sent.map_err(|_| Gone),
            Err(_) => {
                self.app.metrics.stream_stalled();
                if let Some(abort) = &self.abort {
                    abort.abort();
                }
                Err(Gone)
            }
        }
    }
}

/// One event of `chunk`.
pub(crate) fn event<T: serde::Serialize>(chunk: &T) -> Bytes {
    let mut bytes = Vec::with_capacity(EVENT_BYTES_USUAL);
    bytes.extend_from_slice(b"data: ");
    // Strings and finite numbers: this cannot fail.
    let _ = serde_json::to_writer(&mut bytes, chunk);
    bytes.extend_from_slice(b"\n\n");
    Bytes::from(bytes)
}
