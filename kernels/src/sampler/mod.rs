//! From one row of logits to a token.
//!
//! Order: bias, masked, allowed and banned tokens, penalties, temperature, top-k, top-p, min-p, draw. Below a temperature of 1e-5
//! the largest logit wins, the lowest id among equals. Otherwise the draw is Gumbel-max: the token with the largest
//! `logit / T - ln(-ln u)`, where `u` depends on (seed, position, token) only, so a draw is the same in every batch and
//! whatever the filters left beside the token.
//! On a device one kernel does all of it (`sampler.cu`) and draws the same token from the same logits.
//! Penalties follow vLLM: repetition looks at prompt and output, presence and frequency at the output.

pub(crate) mod check;
pub(crate) mod cuda;
mod draw;
pub(crate) mod edits;
mod filters;
mod logprobs;
mod penalties;
mod philox;
#[cfg(test)]
mod tests;

pub use edits::{push_edits, push_mask};
pub use logprobs::{LogSoftmax, log_softmax_stats, logprob_of, top_logprobs};

use filters::Candidate;

/// How one sequence samples.
#[derive(Clone, Copy, Debug)]
pub struct SampleParams<'a> {
    /// Below 1e-5: greedy.
    pub temperature: f32,
    /// Tokens kept, the most likely ones; 0: all.
    pub top_k: u32,
    /// Probability kept, the most likely tokens first; 1 or more: all; 0: one token.
    pub top_p: f32,
    /// Least probability kept, relative to the most likely token's; 0: all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1: none.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens in the output; 0: none.
    pub presence_penalty: f32,
    /// Subtracted once for each occurrence in the output; 0: none.
    pub frequency_penalty: f32,
    /// Key of the random numbers.
    pub seed: u64,
    /// Tokens that may not come (end tokens before `min_tokens`).
    pub ban: &'a [u32],
    /// Added to logits.
    pub logit_bias: &'a [(u32, f32)],
    /// The only tokens that may come; empty: all.
    pub allowed: &'a [u32],
    /// Token t may come if bit t % 32 of word t / 32 is set; words that are missing are 0. None: all. No bit stands for a
    /// token beyond the vocabulary.
    pub mask: Option<&'a [u32]>,
}

impl<'a> SampleParams<'a> {
    /// The ban, or nothing where the mask would leave no other token: what must come is not held back.
    pub fn ban_in_force(&self) -> &'a [u32] {
        let Some(mask) = self.mask.filter(|_| !self.ban.is_empty()) else { return self.ban };
        let may = |token: u32| mask.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1);
        let others = if self.allowed.is_empty() {
            let first = |at: usize| !self.ban[..at].contains(&self.ban[at]);
            let banned = (0..self.ban.len()).filter(|&at| may(self.ban[at]) && first(at)).count();
            mask.iter().map(|word| word.count_ones() as usize).sum::<usize>() > banned
        } else {
            self.allowed.iter().any(|&token| may(token) && !self.ban.contains(&token))
        };
        if others { self.ban } else { &[] }
    }
}

impl Default for SampleParams<'_> {
    /// The model's own distribution.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            ban: &[],
            logit_bias: &[],
            allowed: &[],
            mask: None,
        }
    }
}

/// What penalties look at.
#[derive(Clone, Copy, Debug, Default)]
pub struct History<'a> {
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// Tokens generated so far.
    pub generated: &'a [u32],
}

/// Why no token could be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NonFinite {
    /// The model's output is broken.
    #[error("the model's logit of token {token} is not a number or infinite")]
    Logit {
        /// The first such token.
        token: u32,
    },
    /// Every token is banned, or not allowed.
    #[error("no token is left to choose from")]
    NothingLeft,
}

/// Memory that is kept from draw to draw.
#[derive(Debug, Default)]
pub struct SampleScratch {
    counts: Vec<u32>,
    touched: Vec<u32>,
    candidates: Vec<Candidate>,
    allowed: Vec<(u32, f32)>,
}

/// Temperatures below this mean greedy.
const GREEDY_BELOW: f32 = 1e-5;

/// Draws the token at `position` of a sequence. `logits: [vocab]` are overwritten.
///
/// # Errors
/// [`NonFinite`] if a logit is NaN or +infinity, or if no token is left.
pub fn sample(
    logits: &mut [f32],
    params: &SampleParams,
    history: &History,
    position: u64,
    scratch: &mut SampleScratch,
) -> Result<u32, NonFinite> {
    if let Some(token) = logits.iter().position(|&l| l.is_nan() || l == f32::INFINITY) {
        return Err(NonFinite::Logit { token: token as u32 });
    }
    for &(token, bias) in params.logit_bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    restrict(logits, params, &mut scratch.allowed);
    penalties::apply(logits, params, history, scratch);
    let best = argmax(logits).ok_or(NonFinite::NothingLeft)?;
    if params.temperature.is_nan() || params.temperature < GREEDY_BELOW {
        return Ok(best);
    }
    let scale = 1.0 / params.temperature;
    for logit in logits.iter_mut() {
        *logit *= scale;
    }
    let draw = draw::Draw { seed: params.seed, position };
    if filters::active(params, logits.len()) {
        filters::keep(logits, logits[best as usize], params, &mut scratch.candidates);
        Ok(draw.among(&scratch.candidates).unwrap_or(best))
    } else {
        Ok(draw.all(logits, best))
    }
}

/// Takes away banned tokens and those that the mask or the list of allowed ones leaves out.
fn restrict(logits: &mut [f32], params: &SampleParams, kept: &mut Vec<(u32, f32)>) {
    if !params.allowed.is_empty() {
        kept.clear();
        kept.extend(params.allowed.iter().filter_map(|&token| logits.get(token as usize).map(|&logit| (token, logit))));
        logits.fill(f32::NEG_INFINITY);
        for &(token, logit) in kept.iter() {
            logits[token as usize] = logit;
        }
    }
    if let Some(mask) = params.mask {
        let words = mask.iter().copied().chain(std::iter::repeat(0));
        for (logits, word) in logits.chunks_mut(32).zip(words) {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
    for &token in params.ban_in_force() {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// The largest logit's token, the lowest id among equals; `None` if all are minus infinity.
fn argmax(logits: &[f32]) -> Option<u32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return None;
    }
    logits.iter().position(|&l| l == max).map(|token| token as u32)
}
