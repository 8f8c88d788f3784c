//! Texts that must not be generated (`bad_words`): everything else may come.
//!
//! A word of one token is never allowed; of a longer one the last token is not allowed behind the others. Each word counts as
//! the tokenizer writes it at the beginning of a text and behind a space. One that the model spells with other tokens still
//! comes through, as it does with vLLM, whose rule this is.

use std::sync::Arc;

use super::{TextError, TextModel};
use crate::engine::{Allowed, Grammar, GrammarFailure, GrammarState};

/// Bits of one word of a mask.
const BITS: usize = u32::BITS as usize;

impl TextModel {
    /// The rule that none of `words` is generated, in addition to `other`. Each word counts with and without a space in
    /// front. `allowed`: the only tokens that may come, unless it is empty. Tokens of the model are below `vocab`.
    ///
    /// # Errors
    /// [`TextError::Encode`].
    pub async fn without_words(
        &self,
        words: Vec<String>,
        allowed: Vec<u32>,
        vocab: u32,
        other: Option<Arc<dyn Grammar>>,
    ) -> Result<Arc<dyn Grammar>, TextError> {
        self.on_worker(move |inner| {
            let mut spelled: Vec<Vec<u32>> = Vec::with_capacity(words.len() * 2);
            for word in &words {
                let alone = inner.encode(word.trim_start(), false)?;
                let inside = inner.encode(&format!(" {}", word.trim_start()), false)?;
                spelled.extend([alone, inside]);
            }
            spelled.retain(|word| !word.is_empty());
            spelled.sort_unstable();
            spelled.dedup();
            Ok(Arc::new(BadWords::new(spelled, &allowed, vocab, other)) as Arc<dyn Grammar>)
        })
        .await
    }
}

/// What may come besides the forbidden words, and the other rule that holds, if there is one.
#[derive(Debug)]
struct BadWords {
    /// Token ids of words with two tokens or more.
    words: Arc<[Vec<u32>]>,
    /// Tokens that may come where no longer word is about to end.
    mask: Arc<[u32]>,
    other: Option<Arc<dyn Grammar>>,
}

impl BadWords {
    /// `words` in tokens, none of them empty; `allowed` are the only tokens that may come, unless it is empty. Tokens are
    /// below `vocab`.
    fn new(words: Vec<Vec<u32>>, allowed: &[u32], vocab: u32, other: Option<Arc<dyn Grammar>>) -> Self {
        let mut mask = if allowed.is_empty() { full_mask(vocab) } else { mask_of(allowed, vocab) };
        let (short, words): (Vec<_>, Vec<_>) = words.into_iter().partition(|word| word.len() < 2);
        short.iter().flatten().for_each(|&token| forbid(&mut mask, token));
        Self { words: words.into(), mask: mask.into(), other }
    }
}

impl Grammar for BadWords {
    fn start(&self) -> Box<dyn GrammarState> {
        Box::new(State {
            words: Arc::clone(&self.words),
            mask: Arc::clone(&self.mask),
            recent: Vec::new(),
            recent_max: self.words.iter().map(|word| word.len() - 1).max().unwrap_or(0),
            other: self.other.as_ref().map(|other| other.start()),
        })
    }
}

struct State {
    words: Arc<[Vec<u32>]>,
    mask: Arc<[u32]>,
    /// The last tokens that were generated.
    recent: Vec<u32>,
    /// How many of them a word can look back at.
    recent_max: usize,
    other: Option<Box<dyn GrammarState>>,
}

impl GrammarState for State {
    fn accept(&mut self, token: u32) -> Result<(), GrammarFailure> {
        if let Some(other) = &mut self.other {
            other.accept(token)?;
        }
        self.recent.push(token);
        let old = self.recent.len().saturating_sub(self.recent_max);
        self.recent.drain(..old);
        Ok(())
    }

    fn next(&mut self) -> Result<Allowed, GrammarFailure> {
        let other = match self.other.as_mut().map(|other| other.next()).transpose()? {
            Some(Allowed::End) => return Ok(Allowed::End),
            Some(Allowed::Tokens(mask)) => Some(mask),
            None => None,
        };
        let mut ending = self.words.iter().filter_map(|word| {
            let (last, front) = word.split_last()?;
            self.recent.ends_with(front).then_some(*last)
        });
        let first = ending.next();
        if other.is_none() && first.is_none() {
            return some_token(Arc::clone(&self.mask));
        }
        let mut mask: Vec<u32> = match &other {
            Some(other) => self.mask.iter().zip(other.iter()).map(|(a, b)| a & b).collect(),
            None => self.mask.to_vec(),
        };
        first.into_iter().chain(ending).for_each(|token| forbid(&mut mask, token));
        some_token(mask.into())
    }
}

fn some_token(mask: Arc<[u32]>) -> Result<Allowed, GrammarFailure> {
    if mask.iter().all(|word| *word == 0) {
        return Err(GrammarFailure("`bad_words` forbids every token that may come here".into()));
    }
    Ok(Allowed::Tokens(mask))
}

/// Bits 0..vocab.
fn full_mask(vocab: u32) -> Vec<u32> {
    let vocab = vocab as usize;
    let bits = |word: usize| match vocab - word * BITS {
        rest if rest < BITS => (1 << rest) - 1,
        _ => u32::MAX,
    };
    (0..vocab.div_ceil(BITS)).map(bits).collect()
}

fn mask_of(tokens: &[u32], vocab: u32) -> Vec<u32> {
    let mut mask = vec![0; (vocab as usize).div_ceil(BITS)];
    for &token in tokens {
        if let Some(word) = mask.get_mut(token as usize / BITS) {
            *word |= 1 << (token as usize % BITS);
        }
    }
    mask
}

fn forbid(mask: &mut [u32], token: u32) {
    if let Some(word) = mask.get_mut(token as usize / BITS) {
        *word &= !(1 << (token as usize % BITS));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(state: &mut dyn GrammarState) -> Vec<u32> {
        let Allowed::Tokens(mask) = state.next().unwrap() else { panic!("not at an end") };
        let bit = |token: &u32| mask[*token as usize / BITS] >> (*token as usize % BITS) & 1 == 1;
        (0..mask.len() as u32 * u32::BITS).filter(bit).collect()
    }

    #[test]
    fn a_word_is_forbidden_where_it_would_end() {
        let grammar = BadWords::new(vec![vec![3], vec![1, 2], vec![1, 1, 4]], &[], 40, None);
        let mut state = grammar.start();
        let all: Vec<u32> = (0..40).filter(|token| *token != 3).collect();
        let without = |banned: &[u32]| all.iter().copied().filter(|token| !banned.contains(token)).collect::<Vec<_>>();
        assert_eq!(allowed(&mut *state), all, "and nothing beyond the vocabulary");
        for (token, banned) in [(1, &[2][..]), (1, &[2, 4]), (2, &[]), (1, &[2]), (4, &[]), (39, &[])] {
            state.accept(token).unwrap();
            assert_eq!(allowed(&mut *state), without(banned), "behind {token}");
        }
        assert_eq!(allowed(&mut *grammar.start()), all, "each sequence has a state of its own");
    }

    #[derive(Debug)]
    struct Digits;
    impl Grammar for Digits {
        fn start(&self) -> Box<dyn GrammarState> {
            Box::new(DigitsState(0))
        }
    }
    struct DigitsState(u32);
    impl GrammarState for DigitsState {
        fn accept(&mut self, _: u32) -> Result<(), GrammarFailure> {
            self.0 += 1;
            Ok(())
        }
        fn next(&mut self) -> Result<Allowed, GrammarFailure> {
            Ok(if self.0 == 2 { Allowed::End } else { Allowed::Tokens(Arc::from([0b1110])) })
        }
    }

    #[test]
    fn another_rule_holds_too() {
        let grammar = BadWords::new(vec![vec![3], vec![1, 2]], &[], 64, Some(Arc::new(Digits)));
        let mut state = grammar.start();
        assert_eq!(allowed(&mut *state), [1, 2]);
        state.accept(1).unwrap();
        assert_eq!(allowed(&mut *state), [1]);
        state.accept(1).unwrap();
        assert_eq!(state.next(), Ok(Allowed::End));
    }

    #[test]
    fn where_nothing_is_left_it_says_so() {
        let grammar = BadWords::new(vec![vec![3], vec![1, 2]], &[1, 2, 3], 64, None);
        let mut state = grammar.start();
        assert_eq!(allowed(&mut *state), [1, 2]);
        let mut none = BadWords::new(vec![vec![3]], &[3], 64, None).start();
        assert!(none.next().unwrap_err().0.contains("bad_words"));
    }
}
