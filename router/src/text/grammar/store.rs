//! Compiled rules, kept for the next request with the same rule; refusals too, so that they are cheap.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::ParserFactory;
use tokio::sync::Semaphore;

use super::state::Compiled;
use super::{GrammarError, limits, vocabulary};
use crate::engine::Grammar;
use crate::text::detokenizer::TokenTable;

/// What became of a rule.
pub(super) type Outcome = Result<Arc<Compiled>, GrammarError>;

/// Everything about rules that requests share.
pub(crate) struct GrammarStore {
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    kept: Mutex<Kept>,
    /// Half of the cores at most: the others go on with everybody else's work.
    pub(super) workers: Arc<Semaphore>,
    /// For threads that are late and gave their permit of `workers` back.
    pub(super) late: Arc<Semaphore>,
}

impl Default for GrammarStore {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, |n| n.get());
        Self {
            factory: OnceLock::new(),
            kept: Mutex::new(Kept::default()),
            workers: Arc::new(Semaphore::new((cores / 2).max(1))),
            late: Arc::new(Semaphore::new(limits::LATE_THREADS_MAX)),
        }
    }
}

impl GrammarStore {
    pub(super) fn find(&self, key: &str) -> Option<Result<Arc<dyn Grammar>, GrammarError>> {
        let outcome = self.kept.lock().unwrap_or_else(PoisonError::into_inner).find(key)?;
        Some(outcome.map(|compiled| compiled as Arc<dyn Grammar>))
    }

    pub(super) fn keep(&self, key: String, outcome: Outcome) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).keep(key, outcome);
    }

    /// True if [`Self::factory`] returns at once.
    pub(super) fn is_ready(&self) -> bool {
        self.factory.get().is_some()
    }

    /// What rules are compiled with, made at the first call.
    pub(super) fn factory(&self, table: &TokenTable, end_tokens: &[u32]) -> Result<&ParserFactory, GrammarError> {
        self.factory.get_or_init(|| vocabulary::factory(table, end_tokens)).as_ref().map_err(Clone::clone)
    }
}

/// Least recently used goes first.
#[derive(Default)]
struct Kept {
    /// The most recently used is last.
    entries: Vec<Entry>,
    bytes: usize,
}

struct Entry {
    /// The rule as text. (Two JSON objects are equal whatever the order of their members; two rules are not.)
    key: String,
    outcome: Outcome,
    bytes: usize,
}

impl Kept {
    fn find(&mut self, key: &str) -> Option<Outcome> {
        let at = self.entries.iter().rposition(|entry| entry.key == key)?;
        let entry = self.entries.remove(at);
        let outcome = entry.outcome.clone();
        self.entries.push(entry);
        Some(outcome)
    }

    fn keep(&mut self, key: String, outcome: Outcome) {
        if self.find(&key).is_some() {
            return;
        }
        let compiled =
            if outcome.is_ok() { limits::COMPILED_BYTES + key.len() * limits::COMPILED_BYTES_PER_BYTE } else { 0 };
        let bytes = key.len() + compiled;
        self.bytes += bytes;
        self.entries.push(Entry { key, outcome, bytes });
        let mut drop_to = 0;
        while self.bytes > limits::KEPT_BYTES_MAX || self.entries.len() - drop_to > limits::KEPT_MAX {
            let Some(oldest) = self.entries.get(drop_to) else { break };
            self.bytes -= oldest.bytes;
            drop_to += 1;
        }
        self.entries.drain(..drop_to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> Outcome {
        Err(GrammarError(text.into()))
    }

    #[test]
    fn the_oldest_rules_go_when_there_are_too_many_or_they_are_too_large() {
        let mut kept = Kept::default();
        for i in 0..limits::KEPT_MAX + 10 {
            kept.keep(format!("{i}"), refused("small"));
            assert!(kept.find("0").is_some(), "what is used stays");
        }
        assert_eq!(kept.entries.len(), limits::KEPT_MAX);
        assert!(kept.find("1").is_none());
        let large = "x".repeat(limits::KEPT_BYTES_MAX / 4);
        for i in 0..8 {
            kept.keep(format!("{i}{large}"), refused("large"));
            assert!(kept.bytes <= limits::KEPT_BYTES_MAX);
            assert_eq!(kept.bytes, kept.entries.iter().map(|entry| entry.bytes).sum::<usize>());
        }
    }
}
