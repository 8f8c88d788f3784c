//! The streams of the OpenAI routes: chunks out of what the runs do.

use std::collections::HashSet;

use axum::response::Response;
use tracing::Instrument;

use super::message::MessageReader;
use super::reply::{ChoiceParts, Kind, Shape, usage};
use super::run::{Progress, Run};
use super::sequence::Piece;
use super::sse::{EventSender, Gone, Runs, Step, event};
use super::types::{ChatChunkChoice, ChatDelta, CompletionChoice};
use super::validate::StreamOptions;
use crate::http::error::ApiError;
use crate::http::server::ConnectionAbort;

/// What a stream needs besides its shape.
pub(crate) struct StreamContext {
    pub(crate) options: StreamOptions,
    pub(crate) request_id: String,
    /// Ends the connection of a client that does not read.
    pub(crate) abort: Option<ConnectionAbort>,
}

impl Shape {
    /// Waits until the first run is admitted, then answers 200 and streams.
    ///
    /// # Errors
    /// What fails before anything was admitted has its own status.
    pub(crate) async fn stream(self, runs: Vec<Run>, context: StreamContext) -> Result<Response, ApiError> {
        let mut runs = Runs::new(&self.app, runs);
        let first = runs.first().await?;
        let (events, response) = EventSender::channel(&self.app, context.abort.clone());
        let producer = Producer {
            shape: self,
            context,
            events,
            runs,
            pending: Vec::new(),
            readers: Vec::new(),
            started: HashSet::new(),
            done: Vec::new(),
        };
        tokio::spawn(producer.run(first).in_current_span());
        Ok(response)
    }
}

struct Producer {
    shape: Shape,
    context: StreamContext,
    events: EventSender,
    runs: Runs,
    /// By choice: what the next chunk shows.
    pending: Vec<ChoiceParts>,
    /// By choice: makes a chat's text into parts of a message.
    readers: Vec<MessageReader>,
    /// Choices that have sent their first chunk.
    started: HashSet<usize>,
    /// Runs that ended, for usage.
    done: Vec<Run>,
}

impl Producer {
    async fn run(mut self, first: Step) {
        let outcome = self.produce(first).await;
        // The runs go first: memory is free even if the channel is not.
        self.runs.cancel();
        match outcome {
            Ok(Ok(())) | Err(Gone) => {}
            Ok(Err(error)) => {
                let event = format!("data: {}\n\n", error.envelope(&self.context.request_id));
                self.shape.app.metrics.rejected(error.cause.row().code);
                let _ = self.events.send(event).await;
            }
        }
    }

    /// `Ok(Err(_))` is told to the client as the last event.
    async fn produce(&mut self, first: Step) -> Result<Result<(), ApiError>, Gone> {
        let mut next = Some(first);
        loop {
            let (run, progress) = match next.take() {
                Some(step) => step,
                None => match self.runs.next(&self.events).await? {
                    Ok(Some(step)) => step,
                    Ok(None) => break,
                    Err(error) => return Ok(Err(error)),
                },
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
            self.runs.go_on(run);
        }
        self.close().await.map(Ok)
    }

    /// A chat stream says whose turn it is before anything else.
    async fn open_choices(&mut self, run: &Run) -> Result<(), Gone> {
        if self.shape.kind == Kind::Completion {
            return Ok(());
        }
        for index in 0..run.sequences.len() {
            let delta = ChatDelta { role: Some("assistant"), content: Some(String::new()), ..ChatDelta::default() };
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
            self.readers.resize(choice + 1, self.shape.message.reader());
        }
        let Some(pending) = self.pending.get_mut(choice) else { return Ok(()) };
        pending.text.push_str(&piece.text);
        pending.entries.extend(piece.entry);
        pending.end = piece.end;
        let (interval, tokens) =
            (self.context.options.interval, run.sequences.get(index).map_or(0, |sequence| sequence.tokens));
        let is_early = interval > 1 && tokens > 1 && !tokens.is_multiple_of(interval);
        if pending.end.is_none() && (pending.text.is_empty() || is_early) {
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

    /// A chunk for each part of the message. The end is a chunk of its own with an empty delta; it also carries the
    /// logprobs of an end token.
    async fn chat(&mut self, run: &Run, index: usize, mut parts: ChoiceParts) -> Result<(), Gone> {
        let mut end = parts.end.take();
        let mut deltas = Vec::new();
        if let Some(reader) = self.readers.get_mut(index) {
            deltas = reader.push(&parts.text);
            if let Some(end) = &mut end {
                deltas.extend(reader.finish());
                end.reason = reader.finish_reason(end.reason);
            }
        }
        for delta in deltas {
            let choice = self.chat_chunk(run, index, delta.into(), &parts);
            self.send_chunk(run, "chat.completion.chunk", choice).await?;
            parts.entries.clear();
        }
        if end.is_some() {
            parts.end = end;
            let choice = self.chat_chunk(run, index, ChatDelta::default(), &parts);
            self.send_chunk(run, "chat.completion.chunk", choice).await?;
        } else if let Some(pending) = self.pending.get_mut(index) {
            // All of the text is held back: its tokens wait with it.
            pending.entries.splice(0..0, parts.entries);
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
        self.events.send(event).await
    }

    /// The last words: usage if it was asked for, and the end mark.
    async fn close(&mut self) -> Result<(), Gone> {
        if self.context.options.include_usage {
            let object = if self.shape.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" };
            let chunk = self.shape.reply::<()>(object, Vec::new(), Some(Some(usage(self.done.iter()))), None);
            let event = event(&chunk);
            self.events.send(event).await?;
        }
        self.events.send("data: [DONE]\n\n").await
    }
}
