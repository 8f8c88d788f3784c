//! What the shard remembers of a running sequence.

use std::collections::HashMap;

use loramux_proto::{Sampling, SeqStart};

use super::super::pooling::Pooler;

/// One sequence. Its last sampled token may be known to the device only.
#[derive(Debug)]
pub(super) struct DeviceSequence {
    /// Where the device keeps its last sampled token.
    pub(super) slot: u32,
    /// What the host knows.
    pub(super) tokens: Vec<u32>,
    /// Tokens that steps in flight will append: 0 or 1.
    pub(super) pending: usize,
    pub(super) prompt_tokens: usize,
    pub(super) sampling: Sampling,
    /// For penalties: each token of prompt and output, and how often it was generated. `None` where nothing asks.
    pub(super) seen: Option<HashMap<u32, u32>>,
    pub(super) pooler: Option<Pooler>,
}

impl DeviceSequence {
    pub(super) fn new(start: &SeqStart, slot: u32) -> Self {
        let sampling = start.sampling.clone().unwrap_or_default();
        let prompt_tokens = (start.prompt_tokens as usize).min(start.tokens.len());
        let penalised =
            sampling.repetition_penalty != 1.0 || sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
        let seen = penalised.then(|| {
            let (prompt, generated) = start.tokens.split_at(prompt_tokens);
            let prompt = if sampling.repetition_penalty == 1.0 { &[] } else { prompt };
            let mut seen: HashMap<u32, u32> = prompt.iter().map(|&token| (token, 0)).collect();
            for &token in generated {
                *seen.entry(token).or_default() += 1;
            }
            seen
        });
        let pooler = Pooler::new(start.pooling());
        Self { slot, tokens: start.tokens.clone(), pending: 0, prompt_tokens, sampling, seen, pooler }
    }

    /// Appends a token that the host has read.
    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if let Some(seen) = &mut self.seen {
            *seen.entry(token).or_default() += 1;
        }
    }

    /// Tokens generated once all steps in flight are done.
    pub(super) fn generated(&self) -> usize {
        self.tokens.len() + self.pending - self.prompt_tokens
    }

    /// The position that the next token will have.
    pub(super) fn next_position(&self) -> u64 {
        (self.tokens.len() + self.pending) as u64
    }
}
