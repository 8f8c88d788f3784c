//! What a request must give, computed from the request alone: no blocks, no slots, no scheduler.

use super::marker::{
    adapters_mark, attend, average, draw, image_mark, kv_mark, logprob, owner_mark, page_mark, pooled,
};
use crate::engine::{Allowed, ContentId, FinishReason, GenerateRequest, GrammarState};

/// One sibling, token by token.
pub(super) struct Oracle {
    adapters: u64,
    owner: u64,
    seed: u64,
    max_tokens: u32,
    min_tokens: u32,
    end_tokens: Vec<u32>,
    chain: u64,
    attended: u64,
    positions: usize,
    generated: u32,
    /// How the sequence must end right after the last token, if it must.
    pub(super) pending: Option<FinishReason>,
    grammar: Option<Box<dyn GrammarState>>,
    mask: Option<Allowed>,
    /// The grammar cannot go on from here.
    pub(super) broken: bool,
    /// Of prompt position i + 1.
    pub(super) prompt_logprobs: Vec<f32>,
    /// The prompt's embeddings: mean, last.
    pub(super) pooled: [Vec<f32>; 2],
}

/// A token and what must follow it.
pub(super) struct Expected {
    pub(super) token: u32,
    pub(super) logprob: f32,
    pub(super) then: Option<FinishReason>,
}

impl Oracle {
    pub(super) fn new(request: &GenerateRequest, index: u32, pages_of: impl Fn(&ContentId) -> u32) -> Self {
        let image =
            |content: &ContentId| image_mark((0..pages_of(content) as usize).map(|page| page_mark(content, page)));
        let sampling = &request.sampling;
        let mut oracle = Self {
            adapters: adapters_mark(request.adapters.iter().map(|used| (used.scale, image(&used.content)))),
            owner: owner_mark(request.tenant, request.cache_salt.as_deref()),
            seed: sampling.seed.wrapping_add(u64::from(index)),
            max_tokens: request.max_tokens,
            min_tokens: sampling.min_tokens,
            end_tokens: sampling.end_tokens.clone(),
            chain: 0,
            attended: 0,
            positions: 0,
            generated: 0,
            pending: None,
            grammar: request.grammar.as_ref().filter(|_| request.max_tokens > 0).map(|grammar| grammar.start()),
            mask: None,
            broken: false,
            prompt_logprobs: Vec::new(),
            pooled: Default::default(),
        };
        let mut mean = 0;
        for (at, token) in request.prompt.iter().enumerate() {
            if at > 0 {
                oracle.prompt_logprobs.push(logprob(oracle.attended, *token));
            }
            oracle.push(*token);
            mean = average(mean, oracle.chain);
        }
        oracle.pooled = [pooled(mean), pooled(oracle.attended)];
        if oracle.look() {
            oracle.pending = Some(FinishReason::Stop);
        }
        oracle
    }

    /// Asks the grammar what may come. True if the text is complete.
    fn look(&mut self) -> bool {
        let Some(grammar) = &mut self.grammar else { return false };
        let allowed = grammar.next();
        self.broken = allowed.is_err();
        self.mask = allowed.ok();
        self.mask == Some(Allowed::End)
    }

    fn push(&mut self, token: u32) {
        self.chain = kv_mark(self.chain, token, self.positions, self.adapters, self.owner);
        self.attended = attend(self.attended, self.positions, self.chain);
        self.positions += 1;
    }

    /// The next token that must come.
    pub(super) fn next(&mut self) -> Expected {
        let forbidden: &[u32] = if self.generated < self.min_tokens { &self.end_tokens } else { &[] };
        let mask = match &self.mask {
            Some(Allowed::Tokens(words)) => Some(&**words),
            Some(Allowed::End) => panic!("a token after the end"),
            None => None,
        };
        assert!(!self.broken && self.pending.is_none(), "a token where none may come");
        let token = draw(self.attended, self.seed, self.positions, forbidden, mask);
        let logprob = logprob(self.attended, token);
        self.generated += 1;
        let then = if self.end_tokens.contains(&token) {
            Some(FinishReason::Stop)
        } else if self.generated >= self.max_tokens {
            Some(FinishReason::Length)
        } else {
            self.grammar.as_mut().map(|grammar| grammar.accept(token)).transpose().expect("the mask has it");
            self.look().then_some(FinishReason::Stop)
        };
        self.push(token);
        Expected { token, logprob, then }
    }
}
