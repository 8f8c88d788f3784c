//! Grammars of the simulation: what may come is a formula of all tokens before it. Answers take their time.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::sequence::Mask;
use super::super::{MaskAsk, MaskStep, RequestId, Scheduler};
use super::marker::{VOCAB, mix};
use super::world::World;
use crate::engine::{Allowed, Grammar, GrammarFailure, GrammarState};

/// One grammar for each salt.
#[derive(Debug)]
pub(super) struct Formula {
    pub(super) salt: u64,
    /// Some texts lead to where it cannot go on.
    pub(super) breaks: bool,
}

struct FormulaState {
    /// Of all tokens so far.
    mark: u64,
    breaks: bool,
}

impl Grammar for Formula {
    fn start(&self) -> Box<dyn GrammarState> {
        Box::new(FormulaState { mark: self.salt, breaks: self.breaks })
    }
}

impl GrammarState for FormulaState {
    fn accept(&mut self, token: u32) -> Result<(), GrammarFailure> {
        let Ok(Allowed::Tokens(words)) = self.next() else { panic!("a token where none may come") };
        assert!(has(&words, token), "token {token} is outside of its grammar");
        self.mark = mix(self.mark, u64::from(token));
        Ok(())
    }

    fn next(&mut self) -> Result<Allowed, GrammarFailure> {
        let kind = mix(self.mark, 11);
        match kind % 100 {
            0..4 => return Ok(Allowed::End),
            4 if self.breaks => return Err(GrammarFailure("too deep".into())),
            _ => {}
        }
        let mut words = [0u32; VOCAB.div_ceil(32) as usize];
        let sparse = 1 + kind / 100 % 12;
        let may = |token: &u64| mix(self.mark, *token).is_multiple_of(sparse) || *token == kind / 1200 % VOCAB;
        (0..VOCAB).filter(may).for_each(|token| words[token as usize / 32] |= 1 << (token % 32));
        Ok(Allowed::Tokens(Arc::from(words)))
    }
}

/// Whether the mask has the token.
pub(super) fn has(words: &[u32], token: u32) -> bool {
    words.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
}

/// What a step's chunk says may come.
pub(super) fn words_of(mask: &[u8]) -> Vec<u32> {
    mask.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

/// Turns until it comes, whose, and what.
type Answer = (u32, (RequestId, u32, usize), Result<Allowed, GrammarFailure>);

/// States, and answers on their way.
#[derive(Default)]
pub(super) struct Grammars {
    states: BTreeMap<(RequestId, u32), Box<dyn GrammarState>>,
    answers: Vec<Answer>,
}

impl World {
    /// Takes asks, and brings the answers that are due, some of them twice.
    pub(super) fn move_grammars(&mut self) {
        for MaskAsk { request, index, generated, step } in self.scheduler.take_mask_asks() {
            let mut state = match step {
                MaskStep::Start(grammar) => grammar.start(),
                MaskStep::Accept(token) => {
                    let mut state = self.grammars.states.remove(&(request, index)).expect("asked once at a time");
                    state.accept(token).expect("the token was allowed");
                    state
                }
            };
            let (answer, delay) = (state.next(), self.rng.range(0, self.weather.mask_delay_max));
            assert!(self.grammars.states.insert((request, index), state).is_none(), "started twice");
            self.grammars.answers.push((delay, (request, index, generated), answer));
        }
        self.check_asks();
        for (delay, at, answer) in std::mem::take(&mut self.grammars.answers) {
            if delay > 0 {
                self.grammars.answers.push((delay - 1, at, answer));
                continue;
            }
            let (request, index, generated) = at;
            let wrong = [(index + 9, generated), (index, generated + 1), (index, generated.wrapping_sub(1))];
            for (index, generated) in wrong {
                self.scheduler.set_mask(request, index, generated, Err(GrammarFailure("of another token".into())));
            }
            self.scheduler.set_mask(request, index, generated, answer);
            self.scheduler.set_mask(request, index, generated, Ok(Allowed::End));
            self.totals.masks += 1;
        }
        let events = self.scheduler.take_events();
        self.check_events(events);
    }

    /// Whoever waits for a mask has one on its way.
    fn check_asks(&self) {
        for at in self.scheduler.awaited_masks() {
            assert_eq!(self.grammars.answers.iter().filter(|(_, asked, _)| *asked == at).count(), 1, "{at:?}");
        }
    }
}

impl Scheduler {
    /// Request, sibling and tokens generated of each sequence that waits for a mask.
    pub(super) fn awaited_masks(&self) -> Vec<(RequestId, u32, usize)> {
        let waiting = self.sequences.iter().flatten().filter(|seq| matches!(seq.mask, Mask::Awaited) && !seq.leaving);
        waiting.map(|seq| (seq.job.id, seq.index, seq.generated.len())).collect()
    }
}
