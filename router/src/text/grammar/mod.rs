//! What a reply must look like: a JSON schema, a regular expression, a list of choices or a grammar, as sets of tokens that
//! may come next.
//!
//! llguidance does the parsing. This module feeds it what it can hold (`schema.rs`, `regex.rs`, `gbnf.rs` translate and
//! refuse), bounds what one rule may cost (`limits.rs`) and shares what was compiled (`store.rs`).

mod compile;
mod disjoint;
mod gbnf;
mod keywords;
mod limits;
mod meets;
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
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;

use super::{Inner, TextError, TextModel};
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

/// Why there is no compiled rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// It is the rule's own fault.
    #[error("{0}")]
    Refused(#[from] GrammarError),
    /// Other rules are being compiled on every thread there is for that (429 `queue_full`); the same rule may be tried again.
    #[error("other rules are being compiled; try again")]
    Busy,
}

impl From<TextError> for GrammarError {
    fn from(error: TextError) -> Self {
        Self(error.to_string())
    }
}

impl TextModel {
    /// Makes a rule ready for use: at most one second of waiting for a thread and one on it, or at once if it was compiled
    /// before.
    ///
    /// # Errors
    /// The rule is malformed, uses what is not supported, matches nothing, or costs more than a rule may; or no thread
    /// is free.
    pub async fn compile_grammar(&self, spec: GrammarSpec) -> Result<Arc<dyn Grammar>, CompileError> {
        let store = &self.inner.grammars;
        let key = format!("{spec:?}");
        if let Some(known) = store.find(&key) {
            return Ok(known?);
        }
        // The vocabulary's own preparation is no rule's time.
        let inner = Arc::clone(&self.inner);
        let factory = move || inner.grammars.factory(&inner.table, &inner.end_tokens).map(|_| ());
        if !store.is_ready() {
            tokio::task::spawn_blocking(factory).await.map_err(|_| GrammarError::from(TextError::Panicked))??;
        }
        let permit = timeout(limits::COMPILE_TIME_MAX, Arc::clone(&store.workers).acquire_owned()).await;
        let Ok(Ok(permit)) = permit else { return Err(CompileError::Busy) };
        if let Some(known) = store.find(&key) {
            return Ok(known?); // somebody else compiled it while this one waited
        }
        // Apart from the caller, which may leave: the permit goes back when the work ends or is late, not before.
        let compiled = tokio::spawn(compile_apart(Arc::clone(&self.inner), key, spec, permit)).await;
        let compiled = compiled.map_err(|_| GrammarError::from(TextError::Panicked))??;
        Ok(compiled as Arc<dyn Grammar>)
    }
}

/// Compiles on a thread of its own, which nothing can stop. One that is late gives its permit back as long as few are late,
/// so that a rule which never ends costs a core and not everybody else's rules.
async fn compile_apart(
    inner: Arc<Inner>,
    key: String,
    spec: GrammarSpec,
    permit: OwnedSemaphorePermit,
) -> store::Outcome {
    let late = Arc::clone(&inner.grammars.late);
    let (answer, answered) = oneshot::channel();
    let work = move || {
        let factory = inner.grammars.factory(&inner.table, &inner.end_tokens);
        let result = factory.and_then(|factory| compile::compile(factory, &spec)).map(Arc::new);
        // Kept even if nobody waits any more: a rule that was late, on a busy machine, is there the next time.
        inner.grammars.keep(key, result.clone());
        answer.send(result).ok();
    };
    let thread = std::thread::Builder::new().name("grammar".into()).stack_size(limits::STACK_BYTES);
    thread.spawn(work).map_err(|_| TextError::Panicked)?;
    in_time(answered, permit, late).await
}

/// What comes out of `answered`, if it does so in time. Else whoever is late holds one of `late`, or the `permit` still, until
/// it ends.
async fn in_time(
    mut answered: oneshot::Receiver<store::Outcome>,
    permit: OwnedSemaphorePermit,
    late: Arc<Semaphore>,
) -> store::Outcome {
    if let Ok(result) = timeout(limits::COMPILE_TIME_MAX, &mut answered).await {
        return result.map_err(|_| TextError::Panicked)?;
    }
    let held = late.try_acquire_owned().unwrap_or(permit);
    tokio::spawn(async move {
        answered.await.ok();
        drop(held);
    });
    Err(limits::too_slow())
}
