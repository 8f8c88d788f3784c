//! The tokenizer's vocabulary as the library wants it: bytes of every token in a trie.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};

use super::{GrammarError, limits};
use crate::text::detokenizer::TokenTable;

/// What a grammar is compiled with. Costs some MiB and some 100 ms for a large vocabulary, once.
///
/// # Errors
/// The model has no end token or no vocabulary, so no grammar could end.
pub(super) fn factory(table: &TokenTable, end_tokens: &[u32]) -> Result<ParserFactory, GrammarError> {
    let words = words(table);
    let len_tokens = u32::try_from(words.len()).unwrap_or(u32::MAX);
    let ends: Vec<u32> = end_tokens.iter().copied().filter(|&id| id < len_tokens).collect();
    let Some(&first) = ends.first() else {
        return Err(GrammarError("this model has no end token, so its replies cannot be held to a rule".into()));
    };
    let trie = TokTrie::from(&TokRxInfo::new(len_tokens, first), &words).with_eos_tokens(&ends);
    let env: TokEnv = Arc::new(Vocabulary(ApproximateTokEnv::new(trie)));
    let slices = SlicedBiasComputer::json_slices();
    let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
        .map_err(|error| GrammarError(format!("this tokenizer cannot be held to a rule: {error}")))?;
    factory.quiet();
    *factory.limits_mut() = limits::parser_limits();
    Ok(factory)
}

/// Bytes of token i at place i. Special tokens get the trie's mark in front, so that no text can spell them; ids that the
/// tokenizer lacks are empty, which no text can reach.
fn words(table: &TokenTable) -> Vec<Vec<u8>> {
    let word = |id: u32| {
        if !table.is_known(id) {
            return Vec::new();
        }
        let bytes = table.text_bytes(id);
        if !table.is_special(id) {
            return bytes;
        }
        [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes.as_slice()].concat()
    };
    (0..table.len_tokens() as u32).map(word).collect()
}

/// A vocabulary alone: which of several spellings a model takes is its own choice, so nothing is ever forced.
struct Vocabulary(ApproximateTokEnv);

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        self.0.tok_trie()
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.0.tokenize_bytes(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}
