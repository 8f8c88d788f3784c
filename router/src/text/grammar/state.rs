//! Where a sequence stands in its rule.

use std::sync::{Arc, Mutex, PoisonError};

use llguidance::Matcher;

use super::compile::plain;
use crate::engine::{Allowed, Grammar, GrammarFailure, GrammarState};

/// A compiled rule.
pub(crate) struct Compiled {
    /// In front of the first token, its first set of tokens already computed.
    start: Mutex<Matcher>,
    end_tokens: Arc<[u32]>,
}

impl Compiled {
    pub(super) fn new(start: Matcher, end_tokens: Arc<[u32]>) -> Self {
        Self { start: Mutex::new(start), end_tokens }
    }
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

impl Grammar for Compiled {
    fn start(&self) -> Box<dyn GrammarState> {
        // A copy of its own: with a shared one, a sequence that uses the lexer up would fail its neighbours too.
        let matcher = self.start.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        Box::new(State { matcher, end_tokens: Arc::clone(&self.end_tokens), ended: false })
    }
}

struct State {
    matcher: Matcher,
    end_tokens: Arc<[u32]>,
    /// An end token came where the text may end.
    ended: bool,
}

impl GrammarState for State {
    fn accept(&mut self, token: u32) -> Result<(), GrammarFailure> {
        if self.ended {
            return Err(GrammarFailure("the text is complete; no token can follow".into()));
        }
        if self.end_tokens.contains(&token) && self.matcher.is_accepting().map_err(failure)? {
            self.ended = true;
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(failure)
    }

    fn next(&mut self) -> Result<Allowed, GrammarFailure> {
        if self.ended || (self.matcher.is_stopped() && !self.matcher.is_error()) {
            return Ok(Allowed::End);
        }
        let set = self.matcher.compute_mask().map_err(failure)?;
        let ends = self.end_tokens.iter().filter(|&&end| set.is_allowed(end)).count();
        if ends > 0 && ends == set.num_set() {
            return Ok(Allowed::End);
        }
        Ok(Allowed::Tokens(Arc::from(set.as_slice())))
    }
}

fn failure(error: impl std::fmt::Display) -> GrammarFailure {
    GrammarFailure(format!("the reply cannot go on under its rule: {}", plain(&error)))
}
