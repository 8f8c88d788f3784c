//! Server-sent events: a producer reads the runs and fills a bounded channel, the response body empties it.
//!
//! The client is gone when the channel's other end is dropped; it is stalled when the channel stays full. Both end the
//! producer, and with it the runs.

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::watch;

use super::run::{Progress, Run};
use crate::http::App;
use crate::http::error::{ApiError, Cause};
use crate::http::server::ConnectionAbort;

/// The client left or stalled: nothing more can be told.
pub(crate) struct Gone;

/// A run and what it just did; `None`: it ended.
pub(crate) type Step = (Run, Option<Result<Progress, ApiError>>);

async fn step(mut run: Run) -> Step {
    let progress = run.next().await;
    (run, progress)
}

/// Resolves when running requests have to end.
async fn told_to_end(ending: &mut watch::Receiver<bool>) {
    // The sender lives in the application, which outlives its requests; without it there is nothing to wait for.
    if ending.wait_for(|ending| *ending).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn draining() -> ApiError {
    ApiError::new(Cause::Draining, "the server is shutting down")
}

/// The runs of one request while they are streamed.
pub(crate) struct Runs {
    app: App,
    running: FuturesUnordered<BoxFuture<'static, Step>>,
    ending: watch::Receiver<bool>,
}

impl Runs {
    pub(crate) fn new(app: &App, runs: Vec<Run>) -> Self {
        let running = runs.into_iter().map(|run| Box::pin(step(run)) as _).collect();
        Self { app: app.clone(), running, ending: app.ending() }
    }

    /// Waits until something happened to a run, so that what fails before has a status of its own.
    ///
    /// # Errors
    /// The failure of the first run, or `draining`.
    pub(crate) async fn first(&mut self) -> Result<Step, ApiError> {
        let first = tokio::select! {
            first = self.running.next() => first,
            () = told_to_end(&mut self.ending) => None,
        };
        match first.ok_or_else(draining)? {
            (_, Some(Err(error))) => Err(error),
            step => Ok(step),
        }
    }

    /// What happens next to any run; `None` when all have ended. Sends comments while nothing happens.
    pub(crate) async fn next(&mut self, events: &EventSender) -> Result<Result<Option<Step>, ApiError>, Gone> {
        let ping_every = self.app.config.limits.ping_every;
        loop {
            tokio::select! {
                biased;
                () = events.closed() => return Err(Gone),
                () = told_to_end(&mut self.ending) => return Ok(Err(draining())),
                step = self.running.next() => return Ok(Ok(step)),
                () = tokio::time::sleep(ping_every) => events.send(": ping\n\n".into()).await?,
            }
        }
    }

    /// Takes a run back that a step gave out.
    pub(crate) fn go_on(&mut self, run: Run) {
        self.running.push(Box::pin(step(run)));
    }

    /// Ends all runs; their memory is free even if the client's channel is not.
    pub(crate) fn cancel(&mut self) {
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
    async fn closed(&self) {
        self.events.closed().await;
    }

    /// Waits for room; a client that makes none in time is cut off.
    pub(crate) async fn send(&self, event: String) -> Result<(), Gone> {
        let event = match self.events.try_send(Bytes::from(event)) {
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
pub(crate) fn event<T: serde::Serialize>(chunk: &T) -> String {
    format!("data: {}\n\n", serde_json::to_string(chunk).unwrap_or_default()) // strings and finite numbers: cannot fail
}
