//! One assistant's turn for the routes that speak another dialect than chat completions: a chat with one choice goes in,
//! parts of a message come out, whole or as they arrive.
//!
//! A dialect translates its request into the fields of `/v1/chat/completions`, starts it with `App::start_chat`, and gives
//! a [`Narrator`] that writes the dialect's own events.

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::{Map, Value};
use tracing::Instrument;

use super::App;
use super::envelope::RequestId;
use super::error::{ApiError, Cause};
use super::json::Fields;
use super::openai::chat::ChatStart;
use super::openai::message::{MessageDelta, MessageReader};
use super::openai::reply::{Shape, name_the_source};
use super::openai::resolve::Variant;
use super::openai::run::{Progress, Run};
use super::openai::sequence::{End, Piece, TokenEntry};
use super::openai::sse::{EventSender, Gone, Runs, Step};
use super::openai::types::{ChatLogprob, StopReason};
use super::server::ConnectionAbort;

/// Fields of chat completions that other dialects do not have and that keep their name and meaning there, and
/// those that would make more than one message, which are refused.
pub(crate) const EXTRAS: &[&str] = &[
    "n",
    "best_of",
    "adapters",
    "adapter_id",
    "adapter_source",
    "adapter_scale",
    "adapter_wait",
    "adapter_load_timeout_ms",
    "api_token",
    "compose",
    "merged_adapters",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "ignore_eos_token",
    "include_stop_str_in_output",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "add_special_tokens",
    "truncate_prompt_tokens",
    "cache_salt",
    "priority",
    "request_id",
    "chat_template",
    "chat_template_kwargs",
    "include_reasoning",
    "documents",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
];

/// A request in the fields of chat completions, and what its parts were called before.
#[derive(Debug, Default)]
pub(crate) struct Translated {
    /// The body of `/v1/chat/completions`.
    pub(crate) chat: Map<String, Value>,
    /// Where each of `chat.messages` came from, as error messages name it.
    pub(crate) places: Vec<String>,
}

impl Translated {
    /// Takes over the fields that mean the same everywhere.
    ///
    /// # Errors
    /// 400 for a field that would make more than one choice: a turn is one message.
    pub(crate) fn with_extras(fields: &Fields<'_>) -> Result<Self, ApiError> {
        for name in ["n", "best_of"] {
            fields.integer(name, "1 (a reply is one message)", |n| n == 1)?;
        }
        if fields.get("adapters").is_some() {
            return Err(ApiError::unsupported("adapters", "a reply is one message; send a request for each adapter"));
        }
        let mut translated = Self::default();
        for name in EXTRAS.iter().filter(|name| !matches!(**name, "n" | "best_of")) {
            translated.copy(fields, name, name);
        }
        Ok(translated)
    }

    /// Copies field `from`, if it is there, as `to`.
    pub(crate) fn copy(&mut self, fields: &Fields<'_>, from: &str, to: &str) {
        if let Some(value) = fields.get(from) {
            self.set(to, value.clone());
        }
    }

    pub(crate) fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.chat.insert(name.to_owned(), value.into());
    }

    /// Sets `messages`; each comes with its place in the request.
    pub(crate) fn messages(&mut self, messages: Vec<(String, Value)>) {
        let (places, messages): (Vec<_>, Vec<_>) = messages.into_iter().unzip();
        self.places = places;
        self.set("messages", messages);
    }

    /// An error about the chat, in the words of the request: `names` are names of chat completions with those of the
    /// dialect, for a whole field or its front; `inner` are the same within a name.
    pub(crate) fn renamed(&self, mut error: ApiError, names: &[(&str, &str)], inner: &[(&str, &str)]) -> ApiError {
        let Some(old) = error.param.take() else { return error };
        let mut new = self.original_place(&old).unwrap_or_else(|| old.clone());
        let found = names.iter().find_map(|(from, to)| {
            let rest = new.strip_prefix(from)?;
            (rest.is_empty() || rest.starts_with(['.', '['])).then(|| format!("{to}{rest}"))
        });
        new = found.unwrap_or(new);
        for (from, to) in inner {
            new = new.replace(from, to);
        }
        error.message = error.message.replace(&format!("`{old}`"), &format!("`{new}`"));
        error.param = Some(new);
        error
    }

    /// `messages[3].content` is `input[2].content`, say. A place without an index is a text: it has no parts.
    fn original_place(&self, param: &str) -> Option<String> {
        let (index, rest) = param.strip_prefix("messages[")?.split_once(']')?;
        let place = self.places.get(index.parse::<usize>().ok()?)?;
        Some(if place.contains('[') { format!("{place}{rest}") } else { place.clone() })
    }
}

/// Tokens of a turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TurnUsage {
    pub(crate) prompt_tokens: u64,
    /// Of these, the ones whose KV was there already.
    pub(crate) cached_tokens: u64,
    pub(crate) completion_tokens: u64,
    /// Of these, the ones up to the end of the reasoning.
    pub(crate) reasoning_tokens: u64,
}

/// Why a turn ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TurnStop {
    /// The model had said all.
    End,
    /// `max_tokens`, or the context was full.
    Length,
    /// A stop string of the request.
    StopString(String),
    /// It called tools and waits for their results.
    ToolCalls,
}

/// What a dialect writes while a turn goes on. Each call gives whole server-sent events, or nothing.
pub(crate) trait Narrator: Send + 'static {
    /// The prompt is in the batch.
    fn begin(&mut self, usage: TurnUsage) -> String;
    /// The message grew. `logprobs` are those of the tokens behind a piece of content, if the request asked for them.
    fn delta(&mut self, delta: MessageDelta, logprobs: Vec<ChatLogprob>) -> String;
    /// The turn is over.
    fn end(&mut self, stop: &TurnStop, usage: TurnUsage) -> String;
    /// The turn failed; nothing follows.
    fn fail(&mut self, error: &ApiError, request_id: &str) -> String;
}

/// A turn that is over.
#[derive(Debug)]
pub(crate) struct WholeTurn {
    /// Each with the logprobs of its tokens, if they were asked for.
    pub(crate) deltas: Vec<(MessageDelta, Vec<ChatLogprob>)>,
    pub(crate) stop: TurnStop,
    pub(crate) usage: TurnUsage,
}

/// Turns pieces of text into parts of the message, and counts.
struct TurnReader {
    shape: Shape,
    reader: MessageReader,
    /// Tokens whose text is not shown yet.
    pending: Vec<TokenEntry>,
    reasoning_tokens: u64,
    end: Option<End>,
}

impl TurnReader {
    fn new(shape: Shape) -> Self {
        let reader = shape.message.reader();
        Self { shape, reader, pending: Vec::new(), reasoning_tokens: 0, end: None }
    }

    fn piece(&mut self, run: &Run, piece: Piece) -> Vec<(MessageDelta, Vec<ChatLogprob>)> {
        let mut deltas = self.reader.push(&piece.text);
        if piece.end.is_some() {
            deltas.extend(self.reader.finish());
            self.end = piece.end;
        }
        if deltas.iter().any(|delta| matches!(delta, MessageDelta::Reasoning(_))) {
            self.reasoning_tokens = run.completion_tokens();
        }
        let mut logprobs = self.logprobs(piece.entry, piece.shown, &deltas);
        deltas.into_iter().map(|delta| (delta, std::mem::take(&mut logprobs))).collect()
    }

    /// Of the tokens that these deltas show, if all of them are content: a token of something else, or of both, is left out.
    fn logprobs(&mut self, entry: Option<TokenEntry>, shown: usize, deltas: &[MessageDelta]) -> Vec<ChatLogprob> {
        if self.shape.logprobs.is_none() {
            return Vec::new();
        }
        self.pending.extend(entry);
        let held_back = self.pending.split_off(self.pending.partition_point(|entry| entry.offset < shown));
        let told = std::mem::replace(&mut self.pending, held_back);
        let is_content = deltas.iter().all(|delta| matches!(delta, MessageDelta::Content(_)));
        if is_content && !deltas.is_empty() { self.shape.chat_logprobs(&told).content } else { Vec::new() }
    }

    fn usage(&self, run: &Run) -> TurnUsage {
        TurnUsage {
            prompt_tokens: run.prompt.len() as u64,
            cached_tokens: u64::from(run.cached_tokens),
            completion_tokens: run.completion_tokens(),
            reasoning_tokens: self.reasoning_tokens,
        }
    }

    fn stop(&self) -> TurnStop {
        match &self.end {
            Some(End { reason: "length", .. }) => TurnStop::Length,
            _ if self.reader.has_called() => TurnStop::ToolCalls,
            Some(End { stop_reason: Some(StopReason::Text(text)), .. }) => TurnStop::StopString(text.clone()),
            _ => TurnStop::End,
        }
    }
}

impl App {
    /// Waits for the end of a turn.
    ///
    /// # Errors
    /// Whatever the run fails with, or `draining`.
    pub(crate) async fn whole_turn(&self, mut chat: ChatStart) -> Result<WholeTurn, ApiError> {
        let mut run = only_run(&mut chat)?;
        let mut reader = TurnReader::new(chat.shape);
        let mut ending = self.ending();
        let mut deltas = Vec::new();
        loop {
            let progress = tokio::select! {
                progress = run.next() => progress,
                _ = ending.wait_for(|ending| *ending) => {
                    return Err(ApiError::new(Cause::Draining, "the server is shutting down"));
                }
            };
            match progress.transpose()? {
                Some(Progress::Admitted) => {}
                Some(Progress::Piece { piece, .. }) => deltas.extend(reader.piece(&run, piece)),
                None => return Ok(WholeTurn { deltas, stop: reader.stop(), usage: reader.usage(&run) }),
            }
        }
    }

    /// Waits until a turn is admitted, then answers 200 and lets `narrator` tell it.
    ///
    /// # Errors
    /// What fails before has a status of its own.
    pub(crate) async fn stream_turn<N: Narrator>(
        &self,
        mut chat: ChatStart,
        narrator: N,
        parts: &Parts,
    ) -> Result<Response, ApiError> {
        let mut runs = Runs::new(self, std::mem::take(&mut chat.runs));
        let first = runs.first().await?;
        let (events, stream) = EventSender::channel(self, parts.extensions.get::<ConnectionAbort>().cloned());
        let request_id = parts.extensions.get::<RequestId>().map_or_else(String::new, |id| id.0.clone());
        let reader = TurnReader::new(chat.shape);
        let producer = Producer { app: self.clone(), request_id, narrator, reader, events, runs };
        let mut response = stream.response(producer.run(first).in_current_span());
        name_the_source(&mut response, self, &chat.variants);
        Ok(response)
    }
}

/// A whole reply in JSON that says what answered.
pub(crate) fn json_reply(app: &App, body: Vec<u8>, variants: &[Variant]) -> Response {
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    name_the_source(&mut response, app, variants);
    response
}

/// A turn has one run: nothing that makes more passes [`Translated::with_extras`].
fn only_run(chat: &mut ChatStart) -> Result<Run, ApiError> {
    chat.runs.pop().ok_or_else(|| ApiError::new(Cause::InternalError, "a chat without a run"))
}

struct Producer<N> {
    app: App,
    request_id: String,
    narrator: N,
    reader: TurnReader,
    events: EventSender,
    runs: Runs,
}

impl<N: Narrator> Producer<N> {
    async fn run(mut self, first: Step) {
        let outcome = self.produce(first).await;
        // The runs go first: memory is free even if the channel is not.
        self.runs.cancel();
        if let Ok(Err(error)) = outcome {
            self.app.metrics.rejected(error.cause.row().code);
            let events = self.narrator.fail(&error, &self.request_id);
            let _ = self.events.send(events).await;
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
                    Ok(None) => return Ok(Ok(())),
                    Err(error) => return Ok(Err(error)),
                },
            };
            let events = match progress {
                Some(Err(error)) => return Ok(Err(error)),
                Some(Ok(Progress::Admitted)) => self.narrator.begin(self.reader.usage(&run)),
                Some(Ok(Progress::Piece { piece, .. })) => {
                    let deltas = self.reader.piece(&run, piece);
                    deltas.into_iter().map(|(delta, logprobs)| self.narrator.delta(delta, logprobs)).collect()
                }
                None => {
                    let events = self.narrator.end(&self.reader.stop(), self.reader.usage(&run));
                    return self.events.send(events).await.map(Ok);
                }
            };
            if !events.is_empty() {
                self.events.send(events).await?;
            }
            self.runs.go_on(run);
        }
    }
}
