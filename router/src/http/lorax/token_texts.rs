//! Which part of a sequence's text belongs to which token.

use crate::http::App;
use crate::http::openai::sequence::{Piece, TokenEntry};

/// Hands out tokens with their texts once these are certain. Texts of tokens that are not special add up to the text of
/// the sequence.
#[derive(Default)]
pub(super) struct TokenTexts {
    /// In order; the text of the first is not certain, or nobody asked yet.
    waiting: Vec<TokenEntry>,
    /// Given out by the sequence and not by this.
    text: String,
    /// Scalars of text given out by this.
    taken: usize,
    /// Scalars given out by the sequence.
    shown: usize,
}

/// A token as LoRAX shows it.
#[derive(Clone, Debug)]
pub(super) struct TextToken {
    pub(super) entry: TokenEntry,
    pub(super) text: String,
    pub(super) special: bool,
}

impl TokenTexts {
    /// Takes what an event added.
    pub(super) fn add(&mut self, piece: &mut Piece) {
        self.text.push_str(&piece.text);
        self.shown = piece.shown;
        self.waiting.extend(piece.entry.take());
    }

    /// Tokens whose texts are certain. A token without text of its own (part of a character) waits for the next one.
    pub(super) fn ready(&mut self, app: &App) -> Vec<TextToken> {
        let certain = |entry: &TokenEntry| {
            app.text.is_special(entry.token)
                || entry.end <= self.shown && (entry.end > entry.offset || entry.end < self.shown)
        };
        let ready = self.waiting.iter().take_while(|entry| certain(entry)).count();
        let rest = self.waiting.split_off(ready);
        let ready = std::mem::replace(&mut self.waiting, rest);
        ready.into_iter().map(|entry| self.token(app, entry)).collect()
    }

    /// All that are left: the sequence has ended. What belongs to no token (the replacement of an incomplete character)
    /// goes to the last one that shows text.
    pub(super) fn rest(&mut self, app: &App) -> Vec<TextToken> {
        let left = std::mem::take(&mut self.waiting);
        let mut tokens: Vec<TextToken> = left.into_iter().map(|entry| self.token(app, entry)).collect();
        if let Some(last) = tokens.iter_mut().rfind(|token| !token.special) {
            last.text.push_str(&self.text);
        }
        self.text.clear();
        tokens
    }

    fn token(&mut self, app: &App, entry: TokenEntry) -> TextToken {
        if app.text.is_special(entry.token) {
            let text = app.token_text(entry.token);
            return TextToken { entry, text, special: true };
        }
        let scalars = entry.end.saturating_sub(self.taken);
        let bytes = self.text.char_indices().nth(scalars).map_or(self.text.len(), |(at, _)| at);
        let rest = self.text.split_off(bytes);
        let text = std::mem::replace(&mut self.text, rest);
        self.taken = self.taken.max(entry.end);
        TextToken { entry, text, special: false }
    }
}
