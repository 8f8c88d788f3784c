//! A whole reply: collects every run, then writes one JSON body.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::Response;
use loramux_proto::{PositionLogprobs, TokenLogprob};

use super::message::MessageRules;
use super::resolve::Variant;
use super::run::{Progress, Run};
use super::sequence::{End, TokenEntry};
use super::types::{
    ChatChoice, ChatLogprob, ChatLogprobs, ChoiceExtras, CompletionChoice, CompletionLogprobs, LogprobMap,
    PromptLogprob, PromptPosition, Reply, TokenLogprobText, Usage,
};
use super::validate::Params;
use crate::adapters::ResolvedAdapter;
use crate::http::App;
use crate::http::error::{ApiError, Cause, without_secrets};

/// Stands for -inf, which JSON has not.
const LOGPROB_MIN: f32 = -9999.0;

/// Which of the two routes answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Completion,
    Chat,
}

/// What a reply shows, besides the text.
#[derive(Clone)]
pub(crate) struct Shape {
    pub(crate) app: App,
    pub(crate) kind: Kind,
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: String,
    /// Alternatives per token.
    pub(crate) logprobs: Option<u32>,
    /// Echo the prompt, and its logprobs if there are any.
    pub(crate) echo: bool,
    /// `choices[].prompt_logprobs`, with this many alternatives.
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) return_token_ids: bool,
    pub(crate) tokens_as_ids: bool,
    /// Choices per run.
    pub(crate) n: usize,
    /// How a chat's text becomes a message.
    pub(crate) message: MessageRules,
}

/// One choice while it is collected, or the part of it that a chunk shows.
#[derive(Clone, Debug, Default)]
pub(crate) struct ChoiceParts {
    pub(crate) text: String,
    pub(crate) entries: Vec<TokenEntry>,
    pub(crate) end: Option<End>,
}

impl Shape {
    pub(crate) fn new(app: &App, kind: Kind, params: &Params) -> Self {
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let model = if params.model.is_empty() { app.base_name() } else { &params.model };
        Self {
            app: app.clone(),
            kind,
            id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
            created: crate::http::unix_seconds(),
            model: model.to_owned(),
            fingerprint: app.fingerprint(),
            logprobs: None,
            echo: false,
            prompt_logprobs: params.prompt_logprobs,
            return_token_ids: params.return_token_ids,
            tokens_as_ids: params.tokens_as_ids,
            n: params.n as usize,
            message: MessageRules::default(),
        }
    }

    /// Waits for all runs and writes the body.
    ///
    /// # Errors
    /// The first run that fails; the others are cancelled.
    pub(crate) async fn whole(&self, runs: Vec<Run>) -> Result<Response, ApiError> {
        let collected = self.app.collect(runs).await?;
        let usage = usage(collected.iter().map(|(run, _)| run));
        let prompt = collected.first().map(|(run, _)| Arc::clone(&run.prompt));
        let body = match self.kind {
            Kind::Completion => {
                let choices = collected
                    .into_iter()
                    .flat_map(|run| self.best(run))
                    .map(|(run, i, parts)| self.completion_choice(&run, i, parts));
                self.json("text_completion", choices.collect(), usage, None)
            }
            Kind::Chat => {
                let choices = collected
                    .into_iter()
                    .flat_map(|run| self.best(run))
                    .map(|(run, i, parts)| self.chat_choice(&run, i, parts));
                let prompt = prompt.as_deref().filter(|_| self.return_token_ids);
                self.json("chat.completion", choices.collect(), usage, prompt)
            }
        };
        let mut response = Response::new(Body::from(body));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(response)
    }

    fn json<C: serde::Serialize>(
        &self,
        object: &str,
        choices: Vec<C>,
        usage: Usage,
        prompt: Option<&[u32]>,
    ) -> Vec<u8> {
        let reply = self.reply(object, choices, Some(Some(usage)), prompt);
        serde_json::to_vec(&reply).unwrap_or_default() // strings and finite numbers: this cannot fail
    }

    pub(crate) fn reply<'a, C>(
        &'a self,
        object: &'a str,
        choices: C,
        usage: Option<Option<Usage>>,
        prompt_token_ids: Option<&'a [u32]>,
    ) -> Reply<'a, C> {
        let (id, model) = (self.id.as_str(), self.model.as_str());
        Reply {
            id,
            object,
            created: self.created,
            model,
            choices,
            usage,
            system_fingerprint: &self.fingerprint,
            prompt_token_ids,
        }
    }

    /// The n choices of a run to show, best mean logprob first if there are more.
    fn best(&self, (run, parts): (Run, Vec<ChoiceParts>)) -> Vec<(Arc<Run>, usize, ChoiceParts)> {
        let mut ranked: Vec<(f64, ChoiceParts)> = run
            .sequences
            .iter()
            .map(|sequence| sequence.logprob_sum / f64::from(sequence.tokens.max(1)))
            .zip(parts)
            .collect();
        if ranked.len() > self.n {
            ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
            ranked.truncate(self.n);
        }
        let run = Arc::new(run);
        ranked.into_iter().enumerate().map(|(i, (_, parts))| (Arc::clone(&run), run.first_choice + i, parts)).collect()
    }

    fn completion_choice(&self, run: &Run, index: usize, parts: ChoiceParts) -> CompletionChoice {
        let head = if self.echo { run.echo.as_deref().unwrap_or("") } else { "" };
        let logprobs = self.logprobs.map(|_| self.completion_logprobs(run, true, &parts));
        CompletionChoice {
            index,
            text: format!("{head}{}", parts.text),
            logprobs,
            finish_reason: parts.end.as_ref().map(|end| end.reason),
            prompt_token_ids: self.return_token_ids.then(|| run.prompt.to_vec()),
            extras: self.extras(run, &parts, true),
        }
    }

    fn chat_choice(&self, run: &Run, index: usize, parts: ChoiceParts) -> ChatChoice {
        let extras = self.extras(run, &parts, true);
        let logprobs = self.logprobs.map(|_| self.chat_logprobs(&parts.entries));
        let mut reader = self.message.reader();
        let message = reader.message(&parts.text);
        let finish_reason = parts.end.as_ref().map(|end| reader.finish_reason(end.reason));
        ChatChoice { index, message, logprobs, finish_reason, extras }
    }

    pub(crate) fn extras(&self, run: &Run, parts: &ChoiceParts, first: bool) -> ChoiceExtras {
        ChoiceExtras {
            stop_reason: parts.end.as_ref().and_then(|end| end.stop_reason.clone()),
            adapter: run.label.clone(),
            prompt_logprobs: self.prompt_logprobs.filter(|_| first).map(|top| self.prompt_positions(run, top)),
            token_ids: self.return_token_ids.then(|| parts.entries.iter().map(|entry| entry.token).collect()),
        }
    }

    /// Entries of one choice, without those of text that a stop string cut off; `first`: with those of the echoed prompt
    /// in front.
    pub(crate) fn completion_logprobs(&self, run: &Run, first: bool, parts: &ChoiceParts) -> CompletionLogprobs {
        let mut logprobs = CompletionLogprobs::default();
        let top_max = self.logprobs.unwrap_or(0) as usize;
        let echo = run.echo.as_deref().filter(|_| self.echo).unwrap_or("");
        let head_scalars = echo.chars().count();
        if self.echo && first {
            let mut detokenizer = self.app.text.detokenizer(true);
            let (mut piece, mut scalars) = (String::new(), 0);
            for (position, &token) in run.prompt.iter().enumerate() {
                let known = position_of(&run.prompt_logprobs, position).map(|p| (p.logprob, p.top.as_slice()));
                self.push_entry(&mut logprobs, token, known, head_scalars.min(scalars), top_max);
                detokenizer.push(token, &mut piece);
                scalars += piece.chars().count();
                piece.clear();
            }
        }
        let cut = parts.end.as_ref().and_then(|end| end.cut).unwrap_or(usize::MAX);
        for entry in parts.entries.iter().filter(|entry| entry.offset < cut) {
            let known = Some((entry.logprob, entry.top.as_slice()));
            self.push_entry(&mut logprobs, entry.token, known, head_scalars + entry.offset, top_max);
        }
        logprobs
    }

    fn push_entry(
        &self,
        out: &mut CompletionLogprobs,
        token: u32,
        known: Option<(f32, &[TokenLogprob])>,
        offset: usize,
        top_max: usize,
    ) {
        let name = self.token_name(token);
        out.top_logprobs.push(known.map(|(logprob, top)| {
            let mut map = LogprobMap::default();
            for alternative in top.iter().take(top_max) {
                map.insert(self.token_name(alternative.token), finite(alternative.logprob));
            }
            map.insert(name.clone(), finite(logprob));
            map
        }));
        out.tokens.push(name);
        out.token_logprobs.push(known.map(|(logprob, _)| finite(logprob)));
        out.text_offset.push(offset);
    }

    pub(crate) fn chat_logprobs(&self, entries: &[TokenEntry]) -> ChatLogprobs {
        let top_max = self.logprobs.unwrap_or(0) as usize;
        let one = |entry: &TokenEntry| ChatLogprob {
            token: self.token_logprob(entry.token, entry.logprob),
            top_logprobs: entry.top.iter().take(top_max).map(|t| self.token_logprob(t.token, t.logprob)).collect(),
        };
        ChatLogprobs { content: entries.iter().map(one).collect(), refusal: None }
    }

    fn token_logprob(&self, token: u32, logprob: f32) -> TokenLogprobText {
        TokenLogprobText {
            token: self.token_name(token),
            logprob: finite(logprob),
            bytes: self.app.text.token_bytes(token),
        }
    }

    fn token_name(&self, token: u32) -> String {
        if self.tokens_as_ids { format!("token:{token}") } else { self.app.token_text(token) }
    }

    /// vLLM's `prompt_logprobs`: null, then for each prompt token the best ones and itself.
    fn prompt_positions(&self, run: &Run, top_max: u32) -> Vec<Option<PromptPosition>> {
        let position = |(position, &token): (usize, &u32)| {
            let known = position_of(&run.prompt_logprobs, position)?;
            let mut out = PromptPosition::default();
            let show = |token: u32, logprob: f32, rank: Option<usize>| {
                (token, PromptLogprob { logprob: finite(logprob), rank, decoded_token: self.token_name(token) })
            };
            let top = known.top.iter().take(top_max as usize).enumerate();
            out.0.extend(top.map(|(i, t)| show(t.token, t.logprob, Some(i + 1))));
            if !out.0.iter().any(|(id, _)| *id == token) {
                out.0.push(show(token, known.logprob, None));
            }
            Some(out)
        };
        run.prompt.iter().enumerate().map(position).collect()
    }
}

/// The report for `position`, if there is one (there is none for 0). They come in ascending order.
pub(crate) fn position_of(positions: &[PositionLogprobs], position: usize) -> Option<&PositionLogprobs> {
    let found = positions.binary_search_by_key(&position, |p| p.position as usize).ok()?;
    positions.get(found)
}

/// JSON has no infinity.
pub(crate) fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { LOGPROB_MIN } else { logprob.clamp(LOGPROB_MIN, f32::MAX) }
}

impl App {
    /// Reads all runs to their ends.
    ///
    /// # Errors
    /// The first run that fails (the others are cancelled), or `draining`.
    pub(crate) async fn collect(&self, runs: Vec<Run>) -> Result<Vec<(Run, Vec<ChoiceParts>)>, ApiError> {
        let mut ending = self.ending();
        let collected = futures_util::future::try_join_all(runs.into_iter().map(collect));
        tokio::select! {
            collected = collected => collected,
            _ = ending.wait_for(|ending| *ending) => {
                Err(ApiError::new(Cause::Draining, "the server is shutting down"))
            }
        }
    }
}

/// Reads one run to its end.
async fn collect(mut run: Run) -> Result<(Run, Vec<ChoiceParts>), ApiError> {
    let mut parts = vec![ChoiceParts::default(); run.sequences.len()];
    while let Some(progress) = run.next().await {
        if let Progress::Piece { index, piece } = progress?
            && let Some(choice) = parts.get_mut(index)
        {
            choice.text.push_str(&piece.text);
            choice.entries.extend(piece.entry);
            choice.end = piece.end.or(choice.end.take());
        }
    }
    Ok((run, parts))
}

/// Prompts count once per run, completions once per sequence.
pub(crate) fn usage<'a>(runs: impl Iterator<Item = &'a Run>) -> Usage {
    let [mut prompt, mut completion, mut cached] = [0; 3];
    for run in runs {
        prompt += run.prompt.len() as u64;
        completion += run.completion_tokens();
        cached += u64::from(run.cached_tokens);
    }
    Usage::new(prompt, completion, cached)
}

/// Adds the headers that say what answered.
pub(crate) fn name_the_source(response: &mut Response, app: &App, variants: &[Variant]) {
    let headers = response.headers_mut();
    let mut set = |name: &'static str, value: &str| {
        if let Ok(value) = HeaderValue::from_str(&visible_ascii(value)) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    let joined = |show: &dyn Fn(&ResolvedAdapter) -> String| {
        let each = variants.iter().map(|variant| variant.join(show)).filter(|text| !text.is_empty());
        each.collect::<Vec<_>>().join(",")
    };
    set("x-model-id", app.base_name());
    if variants.iter().any(|variant| !variant.adapters.is_empty()) {
        set("x-adapter-id", &joined(&|adapter| without_secrets(&adapter.name)));
        set("x-adapter-source", &joined(&|adapter| adapter.source.name().to_owned()));
        set("x-adapter-revision", &joined(&|adapter| adapter.revision.to_string()));
        set("x-adapter-content-id", &joined(&|adapter| adapter.prepared.content.short()));
    }
    if variants.iter().any(|variant| variant.fallback) {
        set("x-adapter-fallback", "base");
    }
}

/// Percent-encodes what is not visible ASCII.
pub(crate) fn visible_ascii(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        if byte.is_ascii_graphic() {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
