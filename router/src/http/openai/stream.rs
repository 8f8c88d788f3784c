//! Server-sent events: a producer reads the runs and fills a bounded channel, the response body empties it.
//!
//! The client is gone when the channel's other end is dropped; it is stalled when the channel stays full. Both end the
//! producer, and with it the runs.

use std::collections::HashSet;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::watch;

use super::reply::{ChoiceParts, Kind, Shape, usage};
use super::run::{Progress, Run};
use super::sequence::Piece;
use super::types::{ChatChunkChoice, ChatDelta, CompletionChoice};
use super::validate::StreamOptions;
use crate::http::error::{ApiError, Cause};
use crate::http::server::ConnectionAbort;

/// What a stream needs besides its shape.
pub(crate) struct StreamContext {
    pub(crate) options: StreamOptions,
    pub(crate) request_id: String,
    /// Ends the connection of a client that does not read.
    pub(crate) abort: Option<ConnectionAbort>,
}

/// Resolves when running requests have to end.
async fn told_to_end(ending: &mut watch::Receiver<bool>) {
    // The sender lives in the application, which outlives its requests; without it there is nothing to wait for.
    if ending.wait_for(|ending| *ending).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// A run and what it just did.
type Step = (Run, Option<Result<Progress, ApiError>>);

async fn step(mut run: Run) -> Step {
    let progress = run.next().await;
    (run, progress)
}

impl Shape {
    /// Waits until the first run is admitted, then answers 200 and streams.
    ///
    /// # Errors
    /// What fails before anything was admitted has its own status.
    pub(crate) async fn stream(self, runs: Vec<Run>, context: StreamContext) -> Result<Response, ApiError> {
        let mut running: FuturesUnordered<BoxFuture<'static, Step>> =
            runs.into_iter().map(|run| Box::pin(step(run)) as _).collect();
        let mut ending = self.app.ending();
        let first = tokio::select! {
            first = running.next() => first,
            () = told_to_end(&mut ending) => None,
        };
        let Some((run, progress)) = first else {
            return Err(ApiError::new(Cause::Draining, "the server is shutting down"));
        };
        let first = match progress {
            Some(Err(error)) => return Err(error),
            other => (run, other),
        };
        let (events, receiver) = mpsc::channel(self.app.config.limits.stalled_events.max(1));
        let producer = Producer {
            shape: self,
            context,
            events,
            running,
            pending: Vec::new(),
            started: HashSet::new(),
            done: Vec::new(),
        };
        tokio::spawn(producer.run(first));
        let body = futures_util::stream::unfold(receiver, |mut receiver| async move {
            let event: Bytes = receiver.recv().await?;
            Some((Ok::<_, std::convert::Infallible>(event), receiver))
        });
        let mut response = Response::new(Body::from_stream(body));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(response)
    }
}

/// The client left or stalled: nothing more can be told.
struct Gone;

struct Producer {
    shape: Shape,
    context: StreamContext,
    events: mpsc::Sender<Bytes>,
    running: FuturesUnordered<BoxFuture<'static, Step>>,
    /// By choice: what the next chunk shows.
    pending: Vec<ChoiceParts>,
    /// Choices that have sent their first chunk.
    started: HashSet<usize>,
    /// Runs that ended, for usage.
    done: Vec<Run>,
}

impl Producer {
    async fn run(mut self, first: Step) {
        let outcome = self.produce(first).await;
        // The runs go first: memory is free even if the channel is not.
        self.running.clear();
        match outcome {
            Ok(Ok(())) | Err(Gone) => {}
            Ok(Err(error)) => {
                let event = format!("data: {}\n\n", error.envelope(&self.context.request_id));
                self.shape.app.metrics.rejected(error.cause.row().code);
                let _ = self.send(event).await;
            }
        }
    }

    /// `Ok(Err(_))` is told to the client as the last event.
    async fn produce(&mut self, first: Step) -> Result<Result<(), ApiError>, Gone> {
        let mut next = Some(first);
        let mut ending = self.shape.app.ending();
        let ping_every = self.shape.app.config.limits.ping_every;
        loop {
            let (run, progress) = match next.take() {
                Some(step) => step,
                None => {
                    tokio::select! {
                        biased;
                        () = self.events.closed() => return Err(Gone),
                        () = told_to_end(&mut ending) => {
                            return Ok(Err(ApiError::new(Cause::Draining, "the server is shutting down")));
                        }
                        step = self.running.next() => match step {
                            Some(step) => step,
                            None => break,
                        },
                        () = tokio::time::sleep(ping_every) => {
                            self.send(": ping\n\n".into()).await?;
                            continue;
                        }
                    }
                }
            };
            match progress {
                Some(Err(error)) => return Ok(Err(error)),
                Some(Ok(Progress::Admitted)) => self.open_choices(&run).await?,
                Some(Ok(Progress::Piece { index, piece })) => self.piece(&run, index, piece).await?,
                None => {
                    self.done.push(run);
                    continue;
                }
            }
            self.running.push(Box::pin(step(run)));
        }
        self.close().await.map(Ok)
    }

    /// A chat stream says whose turn it is before anything else.
    async fn open_choices(&mut self, run: &Run) -> Result<(), Gone> {
        if self.shape.kind == Kind::Completion {
            return Ok(());
        }
        for index in 0..run.sequences.len() {
            let delta = ChatDelta { role: Some("assistant"), content: Some(String::new()) };
            let choice = self.chat_chunk(run, run.first_choice + index, delta, &ChoiceParts::default());
            self.send_chunk(run, "chat.completion.chunk", choice).await?;
        }
        Ok(())
    }

    /// Adds to a choice, and sends a chunk when there is text or an end to show.
    async fn piece(&mut self, run: &Run, index: usize, piece: Piece) -> Result<(), Gone> {
        let choice = run.first_choice + index;
        if self.pending.len() <= choice {
            self.pending.resize(choice + 1, ChoiceParts::default());
        }
        let Some(pending) = self.pending.get_mut(choice) else { return Ok(()) };
        pending.text.push_str(&piece.text);
        pending.entries.extend(piece.entry);
        pending.end = piece.end;
        if pending.text.is_empty() && pending.end.is_none() {
            return Ok(());
        }
        let mut parts = std::mem::take(pending);
        if parts.end.is_none() {
            // Tokens of text that is held back wait with it: a stop string may yet cut them off.
            let shown = parts.entries.partition_point(|entry| entry.offset < piece.shown);
            pending.entries = parts.entries.split_off(shown);
        }
        match self.shape.kind {
            Kind::Completion => self.completion(run, choice, parts).await,
            Kind::Chat => self.chat(run, choice, parts).await,
        }
    }

    async fn completion(&mut self, run: &Run, index: usize, parts: ChoiceParts) -> Result<(), Gone> {
        let shape = &self.shape;
        let first = self.started.insert(index);
        let head = if first && shape.echo { run.echo.as_deref().unwrap_or("") } else { "" };
        let choice = CompletionChoice {
            index,
            text: format!("{head}{}", parts.text),
            logprobs: shape.logprobs.map(|_| shape.completion_logprobs(run, first, &parts)),
            finish_reason: parts.end.as_ref().map(|end| end.reason),
            prompt_token_ids: (first && shape.return_token_ids).then(|| run.prompt.to_vec()),
            extras: shape.extras(run, &parts, false),
        };
        self.send_chunk(run, "text_completion", choice).await
    }

    /// The end is a chunk of its own with an empty delta; it also carries the logprobs of an end token.
    async fn chat(&mut self, run: &Run, index: usize, mut parts: ChoiceParts) -> Result<(), Gone> {
        let end = parts.end.take();
        if !parts.text.is_empty() {
            let content = Some(std::mem::take(&mut parts.text));
            let choice = self.chat_chunk(run, index, ChatDelta { role: None, content }, &parts);
            self.send_chunk(run, "chat.completion.chunk", choice).await?;
            parts.entries.clear();
        }
        if end.is_some() {
            parts.end = end;
            let choice = self.chat_chunk(run, index, ChatDelta::default(), &parts);
            self.send_chunk(run, "chat.completion.chunk", choice).await?;
        }
        Ok(())
    }

    fn chat_chunk(&self, run: &Run, index: usize, delta: ChatDelta, parts: &ChoiceParts) -> ChatChunkChoice {
        let shape = &self.shape;
        let logprobs =
            shape.logprobs.filter(|_| !parts.entries.is_empty()).map(|_| shape.chat_logprobs(&parts.entries));
        let mut extras = shape.extras(run, parts, false);
        extras.token_ids = extras.token_ids.filter(|ids| !ids.is_empty());
        ChatChunkChoice { index, delta, logprobs, finish_reason: parts.end.as_ref().map(|end| end.reason), extras }
    }

    /// One chunk with one choice. `run` is the one it comes from: it is in neither list now.
    async fn send_chunk<C: serde::Serialize>(&mut self, run: &Run, object: &str, choice: C) -> Result<(), Gone> {
        let options = self.context.options;
        let usage = match options.continuous_usage {
            true => Some(Some(usage(std::iter::once(run)))),
            false if options.include_usage => Some(None),
            false => None,
        };
        let chunk = self.shape.reply(object, vec![choice], usage, None);
        let event = event(&chunk);
        self.send(event).await
    }

    /// The last words: usage if it was asked for, and the end mark.
    async fn close(&mut self) -> Result<(), Gone> {
        if self.context.options.include_usage {
            let object = if self.shape.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" };
            let chunk = self.shape.reply::<()>(object, Vec::new(), Some(Some(usage(self.done.iter()))), None);
            let event = event(&chunk);
            self.send(event).await?;
        }
        self.send("data: [DONE]\n\n".into()).await
    }

    async fn send(&mut self, event: String) -> Result<(), Gone> {
        let event = match self.events.try_send(Bytes::from(event)) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Closed(_)) => return Err(Gone),
            Err(TrySendError::Full(event)) => event,
        };
        let limit: Duration = self.shape.app.config.limits.stalled_timeout;
        match tokio::time::timeout(limit, self.events.send(event)).await {
            Ok(sent) => sent.map_err(|_| Gone),
            Err(_) => {
                self.shape.app.metrics.stream_stalled();
                if let Some(abort) = &self.context.abort {
                    abort.abort();
                }
                Err(Gone)
            }
        }
    }
}

fn event<T: serde::Serialize>(chunk: &T) -> String {
    format!("data: {}\n\n", serde_json::to_string(chunk).unwrap_or_default()) // strings and finite numbers: cannot fail
}
