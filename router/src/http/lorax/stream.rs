//! LoRAX's stream: an event for each token, the last with the whole text and the details; no `[DONE]`.

use axum::http::HeaderMap;
use axum::response::Response;
use serde::Serialize;
use tracing::Instrument;

use super::error::lorax_error;
use super::reply::{Alternative, Shape, Token, finish_reason};
use super::token_texts::{TextToken, TokenTexts};
use crate::http::error::ApiError;
use crate::http::openai::run::{Progress, Run};
use crate::http::openai::sequence::{End, Piece};
use crate::http::openai::sse::{EventSender, Gone, Runs, Step};
use crate::http::server::ConnectionAbort;

#[derive(Serialize)]
struct StreamResponse {
    token: Token,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_tokens: Option<Vec<Alternative>>,
    /// Null but in the last event.
    generated_text: Option<String>,
    /// Null but in the last event.
    details: Option<StreamDetails>,
}

#[derive(Serialize)]
struct StreamDetails {
    finish_reason: &'static str,
    prompt_tokens: usize,
    generated_tokens: u32,
    skipped_tokens: u32,
    seed: Option<u64>,
}

impl Shape {
    /// Waits until the run is admitted, then answers 200 and streams.
    ///
    /// # Errors
    /// What fails before has its own status.
    pub(super) async fn stream(
        self,
        runs: Vec<Run>,
        request_id: String,
        abort: Option<ConnectionAbort>,
    ) -> Result<Response, ApiError> {
        let mut runs = Runs::new(&self.app, runs);
        let first = runs.first().await?;
        let (events, stream) = EventSender::channel(&self.app, abort);
        let mut headers = HeaderMap::new();
        self.name_the_work(&mut headers);
        let producer = Producer {
            shape: self,
            request_id,
            events,
            runs,
            texts: TokenTexts::default(),
            generated: String::new(),
            last: None,
        };
        let mut response = stream.response(producer.run(first).in_current_span());
        response.headers_mut().extend(headers);
        Ok(response)
    }
}

struct Producer {
    shape: Shape,
    request_id: String,
    events: EventSender,
    runs: Runs,
    texts: TokenTexts,
    /// The text so far.
    generated: String,
    /// The token behind which the end came or will come.
    last: Option<TextToken>,
}

impl Producer {
    async fn run(mut self, first: Step) {
        let outcome = self.produce(first).await;
        self.runs.cancel();
        if let Ok(Err(error)) = outcome {
            let code = error.cause.row().code;
            self.shape.app.metrics.rejected(code);
            tracing::debug!(request_id = self.request_id, code, "a stream ended with an error");
            let _ = self.events.send(format!("data: {}\n\n", lorax_error(&error))).await;
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
            match progress {
                Some(Err(error)) => return Ok(Err(error)),
                Some(Ok(Progress::Admitted)) => {}
                Some(Ok(Progress::Piece { piece, .. })) => self.piece(&run, piece).await?,
                None => continue,
            }
            self.runs.go_on(run);
        }
    }

    /// Sends the tokens whose texts are certain now. The last token waits for the end: the details go with it.
    async fn piece(&mut self, run: &Run, mut piece: Piece) -> Result<(), Gone> {
        self.generated.push_str(&piece.text);
        let end = piece.end.take();
        self.texts.add(&mut piece);
        let is_over = run.sequences.first().is_some_and(|s| s.is_over() || s.tokens >= self.shape.max_tokens);
        if end.is_none() && is_over {
            return Ok(());
        }
        let mut tokens = match end {
            None => self.texts.ready(&self.shape.app),
            Some(_) => self.texts.rest(&self.shape.app),
        };
        self.last = tokens.last().cloned().or(self.last.take());
        if end.is_some() {
            tokens.pop();
        }
        for token in tokens {
            self.token(&token, None, None).await?;
        }
        match end {
            Some(end) => self.end(run, &end).await,
            None => Ok(()),
        }
    }

    async fn end(&mut self, run: &Run, end: &End) -> Result<(), Gone> {
        let Some(token) = self.last.take() else { return Ok(()) };
        let details = StreamDetails {
            finish_reason: finish_reason(Some(end)),
            prompt_tokens: run.prompt.len(),
            generated_tokens: run.sequences.first().map_or(0, |sequence| sequence.tokens),
            skipped_tokens: 0,
            seed: self.shape.seed(0),
        };
        let text = self.shape.full_text(&self.generated);
        self.token(&token, Some(text), Some(details)).await
    }

    async fn token(
        &mut self,
        token: &TextToken,
        generated_text: Option<String>,
        details: Option<StreamDetails>,
    ) -> Result<(), Gone> {
        let top_tokens = self.shape.asked.top_tokens.map(|k| self.shape.alternatives(&token.entry.top, k));
        let chunk = StreamResponse { token: self.shape.token(token), top_tokens, generated_text, details };
        self.events.send_json(&chunk).await
    }
}
