//! The streams of the OpenAI routes: chunks out of what the runs do.

use axum::response::Response;
use bytes::{BufMut, BytesMut};
use tracing::Instrument;

use super::message::MessageReader;
use super::reply::{ChoiceParts, Kind, Shape, usage};
use super::run::{Progress, Run};
use super::sequence::Piece;
use super::sse::{EventSender, Gone, Runs, Step, write_json_event};
use super::types::{ChatChunkChoice, ChatDelta, CompletionChoice};
use super::validate::StreamOptions;
use crate::http::error::ApiError;
use crate::http::server::ConnectionAbort;

/// `object` of a chunk.
const CHAT_CHUNK: &str = "chat.completion.chunk";
const COMPLETION_CHUNK: &str = "text_completion";

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
        let (events, stream) = EventSender::channel(&self.app, context.abort.clone());
        let producer = Producer { shape: self, context, events, runs, choices: Vec::new(), done: Vec::new() };
        Ok(stream.response(producer.run(first).in_current_span()))
    }
}

struct Producer {
    shape: Shape,
    context: StreamContext,
    events: EventSender,
    runs: Runs,
    choices: Vec<Choice>,
    /// Runs that ended, for usage.
    done: Vec<Run>,
}

/// What a stream remembers of one of its choices.
#[derive(Clone)]
struct Choice {
    /// What the next chunk shows.
    pending: ChoiceParts,
    /// Makes a chat's text into parts of a message.
    reader: MessageReader,
    /// Its first chunk was sent.
    started: bool,
    /// What its chunks of text have in common, once one was sent.
    frame: Option<TextFrame>,
}

/// A chunk that adds text and nothing else, without the text: the same for all of a choice.
#[derive(Clone)]
struct TextFrame {
    before: Vec<u8>,
    behind: Vec<u8>,
}

impl TextFrame {
    /// Cuts the text out of an event that `write` makes with a text of no other meaning.
    fn new(write: impl FnOnce(&mut BytesMut, String)) -> Option<Self> {
        let (mark, mut event) = (uuid::Uuid::new_v4().simple().to_string(), BytesMut::new());
        write(&mut event, mark.clone());
        let mark = format!("\"{mark}\"");
        let at = event.windows(mark.len()).position(|part| part == mark.as_bytes())?;
        let (before, behind) = (event.get(..at)?.to_vec(), event.get(at + mark.len()..)?.to_vec());
        Some(Self { before, behind })
    }

    fn write(&self, out: &mut BytesMut, text: &str) {
        out.reserve(self.before.len() + text.len() + self.behind.len() + 16);
        out.extend_from_slice(&self.before);
        let _ = serde_json::to_writer((&mut *out).writer(), text); // a string: this cannot fail
        out.extend_from_slice(&self.behind);
    }
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
                    self.done.push(*run);
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
            self.send_chunk(run, CHAT_CHUNK, choice).await?;
        }
        Ok(())
    }

    /// Adds to a choice, and sends a chunk when there is text or an end to show.
    async fn piece(&mut self, run: &Run, index: usize, piece: Piece) -> Result<(), Gone> {
        let choice = run.first_choice + index;
        if self.choices.len() <= choice {
            let reader = self.shape.message.reader();
            let new = Choice { pending: ChoiceParts::default(), reader, started: false, frame: None };
            self.choices.resize(choice + 1, new);
        }
        let keeps_entries = self.shape.logprobs.is_some() || self.shape.return_token_ids;
        let Some(Choice { pending, .. }) = self.choices.get_mut(choice) else { return Ok(()) };
        match pending.text.is_empty() {
            true => pending.text = piece.text,
            false => pending.text.push_str(&piece.text),
        }
        pending.entries.extend(piece.entry.filter(|_| keeps_entries));
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
        if self.is_text(choice, &parts, keeps_entries) {
            return self.text(run, choice, &parts.text).await;
        }
        match self.shape.kind {
            Kind::Completion => self.completion(run, choice, parts).await,
            Kind::Chat => self.chat(run, choice, parts).await,
        }
    }

    /// The chunk adds text to its choice, as it is, and says nothing else.
    fn is_text(&self, index: usize, parts: &ChoiceParts, keeps_entries: bool) -> bool {
        let Some(choice) = self.choices.get(index) else { return false };
        let is_plain = match self.shape.kind {
            Kind::Completion => choice.started || !self.shape.echo,
            Kind::Chat => choice.reader.is_plain(),
        };
        is_plain && parts.end.is_none() && !keeps_entries && !self.context.options.continuous_usage
    }

    /// Sends a chunk for which [`Self::is_text`] holds.
    async fn text(&mut self, run: &Run, index: usize, text: &str) -> Result<(), Gone> {
        self.events.room().await?;
        if self.choices.get(index).is_some_and(|choice| choice.frame.is_none()) {
            let frame = TextFrame::new(|out, text| self.write_text(out, run, index, text));
            if let Some(choice) = self.choices.get_mut(index) {
                (choice.started, choice.frame) = (true, frame);
            }
        }
        let frame = self.choices.get(index).and_then(|choice| choice.frame.as_ref());
        self.events.push(|out| match frame {
            Some(frame) => frame.write(out, text),
            None => self.write_text(out, run, index, text.to_owned()),
        });
        Ok(())
    }

    /// Such a chunk in full, which [`TextFrame`] then repeats.
    fn write_text(&self, out: &mut BytesMut, run: &Run, index: usize, text: String) {
        let (shape, parts) = (&self.shape, ChoiceParts::default());
        match shape.kind {
            Kind::Completion => {
                let extras = shape.extras(run, &parts, false);
                let choice = CompletionChoice {
                    index,
                    text,
                    logprobs: None,
                    finish_reason: None,
                    prompt_token_ids: None,
                    extras,
                };
                self.write_chunk(out, run, COMPLETION_CHUNK, choice);
            }
            Kind::Chat => {
                let delta = ChatDelta { content: Some(text), ..ChatDelta::default() };
                self.write_chunk(out, run, CHAT_CHUNK, self.chat_chunk(run, index, delta, &parts));
            }
        }
    }

    async fn completion(&mut self, run: &Run, index: usize, parts: ChoiceParts) -> Result<(), Gone> {
        let shape = &self.shape;
        let first = self.choices.get_mut(index).is_none_or(|choice| !std::mem::replace(&mut choice.started, true));
        let head = if first && shape.echo { run.echo.as_deref().unwrap_or("") } else { "" };
        let choice = CompletionChoice {
            index,
            text: format!("{head}{}", parts.text),
            logprobs: shape.logprobs.map(|_| shape.completion_logprobs(run, first, &parts)),
            finish_reason: parts.end.as_ref().map(|end| end.reason),
            prompt_token_ids: (first && shape.return_token_ids).then(|| run.prompt.to_vec()),
            extras: shape.extras(run, &parts, false),
        };
        self.send_chunk(run, COMPLETION_CHUNK, choice).await
    }

    /// A chunk for each part of the message. The end is a chunk of its own with an empty delta; it also carries the
    /// logprobs of an end token.
    async fn chat(&mut self, run: &Run, index: usize, mut parts: ChoiceParts) -> Result<(), Gone> {
        let mut end = parts.end.take();
        let mut deltas = Vec::new();
        if let Some(Choice { reader, .. }) = self.choices.get_mut(index) {
            deltas = reader.push(&parts.text);
            if let Some(end) = &mut end {
                deltas.extend(reader.finish());
                end.reason = reader.finish_reason(end.reason);
            }
        }
        for delta in deltas {
            let choice = self.chat_chunk(run, index, delta.into(), &parts);
            self.send_chunk(run, CHAT_CHUNK, choice).await?;
            parts.entries.clear();
        }
        if end.is_some() {
            parts.end = end;
            let choice = self.chat_chunk(run, index, ChatDelta::default(), &parts);
            self.send_chunk(run, CHAT_CHUNK, choice).await?;
        } else if let Some(Choice { pending, .. }) = self.choices.get_mut(index) {
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
        self.events.room().await?;
        self.events.push(|out| self.write_chunk(out, run, object, choice));
        Ok(())
    }

    fn write_chunk<C: serde::Serialize>(&self, out: &mut BytesMut, run: &Run, object: &str, choice: C) {
        let options = self.context.options;
        let usage = match options.continuous_usage {
            true => Some(Some(usage(std::iter::once(run)))),
            false if options.include_usage => Some(None),
            false => None,
        };
        write_json_event(out, &self.shape.reply(object, [choice], usage, None));
    }

    /// The last words: usage if it was asked for, and the end mark.
    async fn close(&mut self) -> Result<(), Gone> {
        if self.context.options.include_usage {
            let object = if self.shape.kind == Kind::Chat { CHAT_CHUNK } else { COMPLETION_CHUNK };
            let usage = Some(Some(usage(self.done.iter())));
            self.events.send_json(&self.shape.reply::<[(); 0]>(object, [], usage, None)).await?;
        }
        self.events.send("data: [DONE]\n\n").await
    }
}
