//! What a reply must look like: a JSON schema, a regular expression, a list of choices or a grammar, as sets of tokens that
//! may come next.
//!
//! llguidance does the parsing. This module feeds it what it can hold (`schema.rs`, `regex.rs`, `gbnf.rs` translate and
//! refuse), bounds what one rule may cost (`limits.rs`) and shares what was compiled (`store.rs`).

mod compile;
mod disjoint;
mod gbnf;
mod limits;
mod numbers;
mod regex;
mod schema;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::sync::Arc;

use serde_json::Value as Json;
use tokio::sync::oneshot;

use super::{TextError, TextModel};
use crate::engine::Grammar;
pub(super) use store::GrammarStore;

/// A rule for a whole reply, as a request states it.
#[derive(Clone, Debug, PartialEq)]
pub enum GrammarSpec {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under this schema.
    JsonSchema(Json),
    /// The same, with white space that the request chose.
    JsonSpaced {
        /// What the JSON is valid under.
        schema: Json,
        /// What may stand between its parts.
        space: JsonSpace,
    },
    /// Text that matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in Lark's notation (llguidance's dialect, with `%json`).
    Lark(String),
    /// A grammar in llama.cpp's notation.
    Gbnf(String),
}

impl GrammarSpec {
    /// A grammar in whichever of the two notations it is written.
    pub fn grammar(text: &str) -> Self {
        if gbnf::is_gbnf(text) { Self::Gbnf(text.to_owned()) } else { Self::Lark(text.to_owned()) }
    }
}

/// White space between the parts of generated JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum JsonSpace {
    /// One space after `,` and `:`, nothing else. Small models that may pad, pad for ever.
    #[default]
    Fixed,
    /// Spaces, tabs and line ends anywhere.
    Free,
    /// What this regular expression matches, anywhere.
    Pattern(String),
}

/// Why a rule is refused (400 `invalid_schema`).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(pub String);

impl From<TextError> for GrammarError {
    fn from(error: TextError) -> Self {
        Self(error.to_string())
    }
}

impl TextModel {
    /// Makes a rule ready for use: at most one second on a thread of its own, or at once if it was compiled before.
    ///
    /// # Errors
    /// The rule is malformed, uses what is not supported, matches nothing, or costs more than a rule may.
    pub async fn compile_grammar(&self, spec: GrammarSpec) -> Result<Arc<dyn Grammar>, GrammarError> {
        let store = &self.inner.grammars;
        let key = format!("{spec:?}");
        if let Some(known) = store.find(&key) {
            return known;
        }
        let permit = Arc::clone(&store.workers).acquire_owned().await.map_err(|_| TextError::Panicked)?;
        if let Some(known) = store.find(&key) {
            return known; // somebody else compiled it while this one waited
        }
        let inner = Arc::clone(&self.inner);
        let (ready, prepared) = oneshot::channel();
        let (answer, answered) = oneshot::channel();
        let work = move || {
            let _permit = permit; // with the thread, not with the caller: one that leaves does not free the thread
            let factory = inner.grammars.factory(&inner.table, &inner.end_tokens);
            ready.send(()).ok();
            let result = factory.and_then(|factory| compile::compile(factory, &spec)).map(Arc::new);
            // Kept even if nobody waits any more: a rule that was late, on a busy machine, is there the next time.
            inner.grammars.keep(key, result.clone());
            answer.send(result).ok();
        };
        let thread = std::thread::Builder::new().name("grammar".into()).stack_size(limits::STACK_BYTES);
        thread.spawn(work).map_err(|_| TextError::Panicked)?;
        prepared.await.ok(); // the vocabulary's own preparation is not the rule's time
        match tokio::time::timeout(limits::COMPILE_TIME_MAX, answered).await {
            Ok(Ok(result)) => result.map(|compiled| compiled as Arc<dyn Grammar>),
            Ok(Err(_)) => Err(TextError::Panicked.into()),
            Err(_) => Err(limits::too_slow()),
        }
    }
}
