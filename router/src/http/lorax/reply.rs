//! What LoRAX's routes write: texts with their details, and the headers that say how long it took.

use std::time::Instant;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use loramux_proto::TokenLogprob;
use serde::Serialize;

use super::token_texts::{TextToken, TokenTexts};
use super::validate::NativeRequest;
use crate::http::App;
use crate::http::error::ApiError;
use crate::http::openai::reply::{ChoiceParts, finite, position_of};
use crate::http::openai::run::Run;
use crate::http::openai::sequence::{End, Piece};
use crate::http::openai::types::StopReason;

/// What a reply needs besides the runs.
pub(super) struct Shape {
    pub(super) app: App,
    pub(super) asked: NativeRequest,
    /// Tokens of a sequence at most: the one that reaches this is the last.
    pub(super) max_tokens: u32,
    pub(super) started: Instant,
    /// When the request was handed to the engine.
    pub(super) validated: Instant,
}

#[derive(Serialize)]
struct GenerateResponse {
    generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

#[derive(Serialize)]
struct Details {
    finish_reason: &'static str,
    prompt_tokens: usize,
    generated_tokens: u32,
    skipped_tokens: u32,
    seed: Option<u64>,
    prefill: Vec<PrefillToken>,
    tokens: Vec<Token>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_tokens: Option<Vec<Vec<Alternative>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    best_of_sequences: Option<Vec<BestOfSequence>>,
}

#[derive(Serialize)]
struct BestOfSequence {
    generated_text: String,
    finish_reason: &'static str,
    generated_tokens: u32,
    skipped_tokens: u32,
    seed: Option<u64>,
    prefill: Vec<PrefillToken>,
    tokens: Vec<Token>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_tokens: Option<Vec<Vec<Alternative>>>,
}

#[derive(Clone, Serialize)]
struct PrefillToken {
    id: u32,
    text: String,
    /// Null for the first: nothing is in front of it.
    logprob: Option<f32>,
}

/// A generated token.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Token {
    id: u32,
    text: String,
    logprob: f32,
    special: bool,
    /// LoRAX's speculation; there is none here.
    skipped: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    alternative_tokens: Option<Vec<Alternative>>,
}

/// A token that could have been generated.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Alternative {
    id: u32,
    text: String,
    logprob: f32,
    special: bool,
}

impl Shape {
    /// Waits for all sequences and writes one reply, in a list if `listed`.
    ///
    /// # Errors
    /// What fails on the way.
    pub(super) async fn whole(&self, runs: Vec<Run>, listed: bool) -> Result<Response, ApiError> {
        let mut collected = self.app.collect(runs).await?;
        let ended = Instant::now();
        let Some((run, sequences)) = collected.pop() else {
            return Err(ApiError::new(crate::http::Cause::InternalError, "a request without sequences"));
        };
        let reply = self.reply(&run, sequences);
        let body = if listed { serde_json::to_vec(&[reply]) } else { serde_json::to_vec(&reply) };
        let mut response = Response::new(Body::from(body.unwrap_or_default())); // strings and finite numbers: cannot fail
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.name_the_work(headers);
        self.name_the_times(headers, &run, ended);
        Ok(response)
    }

    fn reply(&self, run: &Run, sequences: Vec<ChoiceParts>) -> GenerateResponse {
        let best = best(run);
        let mut others = Vec::new();
        let mut chosen = None;
        for (index, parts) in sequences.into_iter().enumerate() {
            let sequence = self.sequence(run, index, parts);
            if index == best { chosen = Some(sequence) } else { others.push(sequence) }
        }
        let Some(chosen) = chosen else { return GenerateResponse { generated_text: String::new(), details: None } };
        let details = self.asked.details.then_some(Details {
            finish_reason: chosen.finish_reason,
            prompt_tokens: run.prompt.len(),
            generated_tokens: chosen.generated_tokens,
            skipped_tokens: 0,
            seed: chosen.seed,
            prefill: chosen.prefill,
            tokens: chosen.tokens,
            top_tokens: chosen.top_tokens,
            best_of_sequences: (self.asked.best_of > 1).then_some(others),
        });
        GenerateResponse { generated_text: chosen.generated_text, details }
    }

    fn sequence(&self, run: &Run, index: usize, parts: ChoiceParts) -> BestOfSequence {
        let finish_reason = finish_reason(parts.end.as_ref());
        let generated_text = self.full_text(&parts.text);
        let mut texts = TokenTexts::default();
        let shown = parts.text.chars().count();
        texts.add(&mut Piece { text: parts.text, shown, ..Piece::default() });
        for entry in parts.entries {
            texts.add(&mut Piece { entry: Some(entry), shown, ..Piece::default() });
        }
        let tokens = if self.asked.details { texts.rest(&self.app) } else { Vec::new() };
        let top = |k: u32| tokens.iter().map(|token| self.alternatives(&token.entry.top, k)).collect();
        BestOfSequence {
            generated_text,
            finish_reason,
            generated_tokens: run.sequences.get(index).map_or(0, |sequence| sequence.tokens),
            skipped_tokens: 0,
            seed: self.seed(index),
            prefill: self.prefill(run),
            top_tokens: self.asked.top_tokens.map(top),
            tokens: tokens.iter().map(|token| self.token(token)).collect(),
        }
    }

    /// As generated, or with the prompt in front.
    pub(super) fn full_text(&self, text: &str) -> String {
        if self.asked.full_text { format!("{}{text}", self.asked.inputs) } else { text.to_owned() }
    }

    /// With which seed sequence `index` drew; `None` if nothing was drawn.
    pub(super) fn seed(&self, index: usize) -> Option<u64> {
        self.asked.params.seed.filter(|_| self.asked.sampled).map(|seed| seed.wrapping_add(index as u64))
    }

    pub(super) fn token(&self, token: &TextToken) -> Token {
        Token {
            id: token.entry.token,
            text: token.text.clone(),
            logprob: finite(token.entry.logprob),
            special: token.special,
            skipped: false,
            alternative_tokens: self.asked.alternatives.map(|k| self.alternatives(&token.entry.top, k)),
        }
    }

    /// The best `k` of what the shard reported.
    pub(super) fn alternatives(&self, top: &[TokenLogprob], k: u32) -> Vec<Alternative> {
        let one = |known: &TokenLogprob| Alternative {
            id: known.token,
            text: self.app.token_text(known.token),
            logprob: finite(known.logprob),
            special: self.app.text.is_special(known.token),
        };
        top.iter().take(k as usize).map(one).collect()
    }

    fn prefill(&self, run: &Run) -> Vec<PrefillToken> {
        if !self.asked.prefill {
            return Vec::new();
        }
        let one = |(position, &id): (usize, &u32)| PrefillToken {
            id,
            text: self.app.token_text(id),
            logprob: position_of(&run.prompt_logprobs, position).map(|known| finite(known.logprob)),
        };
        run.prompt.iter().enumerate().map(one).collect()
    }

    /// The headers that a stream has too.
    pub(super) fn name_the_work(&self, headers: &mut HeaderMap) {
        let on_gpu = self.app.device_type() != "cpu";
        headers.insert("x-compute-type", HeaderValue::from_static(if on_gpu { "gpu" } else { "cpu" }));
        headers.insert("x-compute-characters", HeaderValue::from(self.asked.inputs.chars().count()));
    }

    fn name_the_times(&self, headers: &mut HeaderMap, run: &Run, ended: Instant) {
        let ms = |from: Instant, to: Instant| {
            u64::try_from(to.saturating_duration_since(from).as_millis()).unwrap_or(u64::MAX)
        };
        let admitted = run.clock.admitted_at().unwrap_or(self.validated);
        let first_token = run.clock.first_token_at().unwrap_or(ended);
        let (prompt, generated) = (run.prompt.len() as u64, run.completion_tokens());
        let (total, inference) = (ms(self.started, ended), ms(admitted, ended));
        // Of the sequences together, as they were generated together.
        let rounds = run.sequences.iter().map(|sequence| u64::from(sequence.tokens)).max().unwrap_or(0).max(1);
        let values = [
            ("x-compute-time", total),
            ("x-total-time", total),
            ("x-prompt-tokens", prompt),
            ("x-generated-tokens", generated),
            ("x-skipped-tokens", 0),
            ("x-total-tokens", prompt + generated),
            ("x-validation-time", ms(self.started, self.validated)),
            ("x-queue-time", ms(self.validated, admitted)),
            ("x-inference-time", inference),
            ("x-time-per-token", inference / rounds),
            ("x-time-to-first-token", ms(self.started, first_token)),
            ("x-time-per-output-token", ms(first_token, ended) / (rounds - 1).max(1)),
        ];
        for (name, value) in values {
            headers.insert(HeaderName::from_static(name), HeaderValue::from(value));
        }
    }
}

/// The sequence with the best mean logprob.
fn best(run: &Run) -> usize {
    let mean = |sequence: &crate::http::openai::sequence::SequenceText| {
        sequence.logprob_sum / f64::from(sequence.tokens.max(1))
    };
    let best =
        run.sequences.iter().map(mean).enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map_or(0, |(index, _)| index)
}

/// LoRAX's word for the end.
pub(super) fn finish_reason(end: Option<&End>) -> &'static str {
    match end {
        Some(End { stop_reason: Some(StopReason::Text(_)), .. }) => "stop_sequence",
        Some(End { reason: "stop", .. }) => "eos_token",
        _ => "length",
    }
}
