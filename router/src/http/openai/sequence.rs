//! One sequence on its way out: tokens to text, stop strings, the end.

use std::sync::Arc;

use loramux_proto::TokenLogprob;

use super::types::StopReason;
use crate::engine::FinishReason;
use crate::text::{Detokenizer, StopMatcher, StopOutcome, TextModel};

/// What decides where the text of a sequence ends, shared by all sequences of a request.
#[derive(Clone, Debug)]
pub(crate) struct TextRules {
    pub(crate) stop: Vec<String>,
    /// Tokens that end a sequence: those of the model (unless ignored) and those of the request.
    pub(crate) end_tokens: Vec<u32>,
    /// Of these, the ones the request named: they are reported as `stop_reason`.
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) include_stop: bool,
    pub(crate) skip_special: bool,
    /// Special tokens that are text all the same: marks of tool calls and thoughts.
    pub(crate) shown_special: Arc<[u32]>,
    pub(crate) min_tokens: u32,
}

/// A generated token with what was asked for about it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenEntry {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
    pub(crate) top: Vec<TokenLogprob>,
    /// Scalars of generated text in front of it.
    pub(crate) offset: usize,
    /// The same up to its end; equal to `offset` while a character is not complete.
    pub(crate) end: usize,
}

/// Why a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    /// `stop` or `length`.
    pub(crate) reason: &'static str,
    pub(crate) stop_reason: Option<StopReason>,
    /// Scalars of generated text in all, if a stop string cut some off.
    pub(crate) cut: Option<usize>,
}

/// What one event adds to a choice.
#[derive(Clone, Debug, Default)]
pub(crate) struct Piece {
    pub(crate) text: String,
    /// Scalars of generated text up to the end of `text`.
    pub(crate) shown: usize,
    pub(crate) entry: Option<TokenEntry>,
    pub(crate) end: Option<End>,
}

/// See the module.
pub(crate) struct SequenceText {
    rules: Arc<TextRules>,
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    /// Scalars decoded so far, held back or not.
    scalars: usize,
    /// Of these, the ones given out.
    shown: usize,
    pub(crate) tokens: u32,
    /// Sum over its tokens, for `best_of`.
    pub(crate) logprob_sum: f64,
    /// A token of `end_tokens` came; only `Finished` can follow.
    end_token: Option<u32>,
    pub(crate) ended: bool,
}

impl SequenceText {
    pub(crate) fn new(rules: Arc<TextRules>, text: &TextModel) -> Self {
        let detokenizer = text.detokenizer(rules.skip_special).showing(Arc::clone(&rules.shown_special));
        let matcher = StopMatcher::new(rules.stop.clone());
        Self {
            rules,
            detokenizer,
            matcher,
            scalars: 0,
            shown: 0,
            tokens: 0,
            logprob_sum: 0.0,
            end_token: None,
            ended: false,
        }
    }

    /// Takes a token. If the piece has an end, a stop string was found and the engine has to be told.
    pub(crate) fn token(&mut self, token: u32, logprob: f32, top: Vec<TokenLogprob>) -> Piece {
        self.tokens += 1;
        self.logprob_sum += f64::from(logprob);
        let mut entry = TokenEntry { token, logprob, top, offset: self.scalars, end: self.scalars };
        let is_end = self.rules.end_tokens.contains(&token);
        if is_end {
            self.end_token = Some(token);
            if !self.rules.include_stop {
                return Piece { entry: Some(entry), shown: self.shown, ..Piece::default() };
            }
        }
        let mut text = String::new();
        self.detokenizer.push(token, &mut text);
        let piece = self.matched(text);
        entry.end = self.scalars;
        Piece { entry: Some(entry), ..piece }
    }

    /// An end token came: nothing but the end can follow.
    pub(crate) fn is_over(&self) -> bool {
        self.end_token.is_some()
    }

    /// The engine ended the sequence: gives what was held back.
    pub(crate) fn finished(&mut self, reason: FinishReason) -> Piece {
        let mut text = String::new();
        self.detokenizer.finish(&mut text);
        let mut piece = self.matched(text);
        if piece.end.is_none() {
            let held = self.matcher.finish();
            piece.shown += held.chars().count();
            piece.text.push_str(&held);
            self.ended = true;
            let named = self.end_token.filter(|token| self.rules.stop_tokens.contains(token));
            let reason = if reason == FinishReason::Stop { "stop" } else { "length" };
            piece.end = Some(End { reason, stop_reason: named.map(StopReason::Token), cut: None });
        }
        piece
    }

    /// What of `text`, and of what was held back before, can be given out.
    fn matched(&mut self, text: String) -> Piece {
        let scalars = text.chars().count();
        self.scalars += scalars;
        if self.rules.stop.is_empty() {
            self.shown += scalars;
            return Piece { text, shown: self.shown, ..Piece::default() };
        }
        match self.matcher.push(&text, self.tokens >= self.rules.min_tokens.max(1)) {
            StopOutcome::Clear(text) => {
                self.shown += text.chars().count();
                Piece { text, shown: self.shown, ..Piece::default() }
            }
            StopOutcome::Found { which, before } => {
                self.ended = true;
                let stop = self.rules.stop.get(which).cloned().unwrap_or_default();
                let text = if self.rules.include_stop { before + &stop } else { before };
                self.shown += text.chars().count();
                let stop_reason = Some(StopReason::Text(stop));
                let end = Some(End { reason: "stop", stop_reason, cut: Some(self.shown) });
                Piece { text, shown: self.shown, entry: None, end }
            }
        }
    }
}
