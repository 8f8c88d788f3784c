//! A rule for the answer of a model that thinks first: the thought is free, and the rule holds behind it.

use std::sync::Arc;

use super::{THINK_END, THINK_START, TextModel, Thought};
use crate::engine::{Allowed, Grammar, GrammarFailure, GrammarState};

const BITS: usize = u32::BITS as usize;
/// Bytes of a thought's end that are looked at for its closing mark: the mark, and the longest tokens around it.
const TAIL_BYTES: usize = 256;

impl TextModel {
    /// `rule`, held to the answer only, in a reply that may begin with a thought.
    pub(crate) fn after_thought(&self, rule: Arc<dyn Grammar>, thought: Thought) -> Arc<dyn Grammar> {
        if thought == Thought::Never {
            return rule;
        }
        let inner = &self.inner;
        let mut mask = vec![0; self.len_tokens().div_ceil(BITS)];
        let end_mark = inner.tokenizer.token_to_id(THINK_END);
        for token in 0..self.len_tokens() as u32 {
            if Some(token) == end_mark || (inner.table.is_known(token) && !inner.table.is_special(token)) {
                set(&mut mask, token, true);
            }
        }
        inner.end_tokens.iter().for_each(|&token| set(&mut mask, token, false));
        let opened = thought == Thought::Begun;
        let start_mark = inner.tokenizer.token_to_id(THINK_START).filter(|_| !opened);
        Arc::new(AfterThought { text: self.clone(), rule, mask: mask.into(), start_mark, opened })
    }
}

fn set(mask: &mut [u32], token: u32, on: bool) {
    if let Some(word) = mask.get_mut(token as usize / BITS) {
        let bit = 1 << (token as usize % BITS);
        *word = if on { *word | bit } else { *word & !bit };
    }
}

struct AfterThought {
    text: TextModel,
    rule: Arc<dyn Grammar>,
    /// What a thought is made of: all text, and its closing mark. The reply cannot end in it.
    mask: Arc<[u32]>,
    /// The token that begins a thought, where the prompt has not.
    start_mark: Option<u32>,
    opened: bool,
}

impl std::fmt::Debug for AfterThought {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AfterThought").field("rule", &self.rule).field("opened", &self.opened).finish_non_exhaustive()
    }
}

impl Grammar for AfterThought {
    fn start(&self) -> Box<dyn GrammarState> {
        let stage = if self.opened { Stage::Thinking(Vec::new()) } else { Stage::Start };
        let (mask, start_mark) = (Arc::clone(&self.mask), self.start_mark);
        Box::new(State { text: self.text.clone(), rule: self.rule.start(), mask, start_mark, stage })
    }
}

enum Stage {
    /// Nothing came: a thought may begin, or the answer.
    Start,
    /// With the last bytes of the thought.
    Thinking(Vec<u8>),
    Answer,
}

struct State {
    text: TextModel,
    rule: Box<dyn GrammarState>,
    mask: Arc<[u32]>,
    start_mark: Option<u32>,
    stage: Stage,
}

impl GrammarState for State {
    fn accept(&mut self, token: u32) -> Result<(), GrammarFailure> {
        match &mut self.stage {
            Stage::Start if Some(token) == self.start_mark => self.stage = Stage::Thinking(Vec::new()),
            Stage::Thinking(tail) => {
                tail.extend(self.text.token_bytes(token));
                if tail.windows(THINK_END.len()).any(|window| window == THINK_END.as_bytes()) {
                    self.stage = Stage::Answer;
                } else {
                    let old = tail.len().saturating_sub(TAIL_BYTES);
                    tail.drain(..old);
                }
            }
            Stage::Start | Stage::Answer => {
                self.stage = Stage::Answer;
                self.rule.accept(token)?;
            }
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Allowed, GrammarFailure> {
        match self.stage {
            Stage::Thinking(_) => Ok(Allowed::Tokens(Arc::clone(&self.mask))),
            Stage::Answer => self.rule.next(),
            Stage::Start => match (self.rule.next()?, self.start_mark) {
                (Allowed::Tokens(tokens), Some(mark)) => {
                    let mut tokens = tokens.to_vec();
                    tokens.resize(tokens.len().max(mark as usize / BITS + 1), 0);
                    set(&mut tokens, mark, true);
                    Ok(Allowed::Tokens(tokens.into()))
                }
                (allowed, _) => Ok(allowed),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::grammar::GrammarSpec;
    use crate::text::testing::{IM_END, byte_level, bytes_of};

    fn rule(thought: Thought) -> Box<dyn GrammarState> {
        let text = byte_level();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let rule = runtime.block_on(text.compile_grammar(GrammarSpec::Choice(vec!["yes".into()]))).unwrap();
        text.after_thought(rule, thought).start()
    }

    /// How many of `tokens` may come, one after the other.
    fn taken(state: &mut dyn GrammarState, tokens: &[u32]) -> usize {
        let may = |state: &mut dyn GrammarState, token: u32| match state.next().unwrap() {
            Allowed::Tokens(set) => {
                set.get(token as usize / BITS).is_some_and(|w| w >> (token as usize % BITS) & 1 == 1)
            }
            Allowed::End => false,
        };
        tokens.iter().take_while(|&&token| may(state, token) && state.accept(token).is_ok()).count()
    }

    #[test]
    fn the_rule_holds_behind_the_thought() {
        let thought = bytes_of("Hm, {1} no?</think>");
        let mut state = rule(Thought::Begun);
        assert_eq!(taken(&mut *state, &thought), thought.len());
        assert_eq!(taken(&mut *state, &bytes_of("yes")), 3);
        assert_eq!(state.next(), Ok(Allowed::End));
        let mut state = rule(Thought::Begun);
        assert_eq!(taken(&mut *state, &[bytes_of("x")[0], IM_END]), 1, "the reply cannot end in a thought");
        let mut state = rule(Thought::Begun);
        assert_eq!(taken(&mut *state, &bytes_of("x</think>no")), "x</think>".len());
    }

    #[test]
    fn a_thought_that_the_model_begins_itself_is_free_too() {
        let mark = byte_level().inner.tokenizer.token_to_id(THINK_START).unwrap();
        let mut state = rule(Thought::Possible);
        let tokens: Vec<u32> = std::iter::once(mark).chain(bytes_of("Hm</think>yes")).collect();
        assert_eq!(taken(&mut *state, &tokens), tokens.len());
        assert_eq!(taken(&mut *rule(Thought::Possible), &bytes_of("yes")), 3, "it may also answer at once");
        assert_eq!(taken(&mut *rule(Thought::Possible), &bytes_of("no")), 0);
        assert_eq!(taken(&mut *rule(Thought::Never), &[mark]), 0);
    }
}
