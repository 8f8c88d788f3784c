//! From logits to samples: one row after another in parallel, each by its own sequence's parameters.

use std::cell::RefCell;
use std::collections::HashMap;

use loramux_kernels::sampler::{History, SampleParams, SampleScratch, logprob_of, sample, top_logprobs};
use loramux_kernels::{Rows, for_each_chunk};
use loramux_proto::{PositionLogprobs, PromptLogprobs, Sample, Sampling, SeqFault, StepResult, TokenLogprob};

use super::batch::{LogitRow, SeqState, Want};

/// Kept from step to step.
#[derive(Default)]
pub(super) struct Sampler {
    /// Rows of the batch whose logits are computed next.
    pub(super) rows: Vec<u32>,
}

enum Outcome {
    Sample(Sample),
    Prompt(u64, PositionLogprobs),
    Fault(SeqFault),
}

thread_local! {
    /// Room for sorting, kept from step to step.
    static SCRATCH: RefCell<SampleScratch> = RefCell::new(SampleScratch::default());
}

/// A row on its way through the team.
struct Job<'a> {
    logits: &'a mut [f32],
    row: &'a LogitRow,
    outcome: Option<Outcome>,
}

/// Works `logits` (`[rows.len(), vocab]`, overwritten) off into `result`. `masks` has the words that rows name.
pub(super) fn sample_rows(
    logits: &mut Rows,
    rows: &[LogitRow],
    masks: &[u32],
    sequences: &HashMap<u64, SeqState>,
    result: &mut StepResult,
) {
    let vocab = logits.width();
    let rows = logits.as_f32_mut().chunks_mut(vocab).zip(rows);
    let mut jobs: Vec<Job> = rows.map(|(logits, row)| Job { logits, row, outcome: None }).collect();
    let work_ns = jobs.len() * vocab / 8; // what a greedy row takes; others take longer
    for_each_chunk(&mut jobs, 1, work_ns, |_, job| {
        let Some(job) = job.first_mut() else { return };
        let Some(seq) = sequences.get(&job.row.seq) else { return };
        SCRATCH.with_borrow_mut(|scratch| job.outcome = Some(one_row(job.logits, job.row, masks, seq, scratch)));
    });
    let outcomes = jobs.into_iter().map(|job| job.outcome);
    for outcome in outcomes.into_iter().flatten() {
        match outcome {
            Outcome::Sample(sample) => result.samples.push(sample),
            Outcome::Fault(fault) => result.faults.push(fault),
            Outcome::Prompt(seq, position) => match result.prompt_logprobs.last_mut() {
                Some(last) if last.seq == seq => last.positions.push(position),
                _ => result.prompt_logprobs.push(PromptLogprobs { seq, positions: vec![position] }),
            },
        }
    }
}

fn one_row(logits: &mut [f32], row: &LogitRow, masks: &[u32], seq: &SeqState, scratch: &mut SampleScratch) -> Outcome {
    match row.want {
        Want::Sample { mask } => {
            let words = logits.len().div_ceil(32);
            let mask = mask.and_then(|first| masks.get(first as usize..)?.get(..words));
            draw(logits, mask, row.seq, seq, scratch)
        }
        Want::PromptLogprob { position } => {
            let token = seq.tokens.get(position as usize).copied().unwrap_or_default();
            let top = alternatives(logits, seq.sampling.prompt_logprobs.unwrap_or(0));
            let logprob = logprob_of(logits, token);
            Outcome::Prompt(row.seq, PositionLogprobs { position, logprob, top })
        }
    }
}

/// What the request set; without what names single tokens.
pub(super) fn params(sampling: &Sampling) -> SampleParams<'static> {
    SampleParams {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        seed: sampling.seed,
        ..SampleParams::default()
    }
}

fn draw(logits: &mut [f32], mask: Option<&[u32]>, id: u64, seq: &SeqState, scratch: &mut SampleScratch) -> Outcome {
    let sampling = &seq.sampling;
    let (prompt, generated) = seq.tokens.split_at(seq.prompt_tokens);
    let ban = if seq.generated() < sampling.min_tokens as usize { sampling.end_tokens.as_slice() } else { &[] };
    let params =
        SampleParams { ban, logit_bias: &seq.bias, allowed: &sampling.allowed_tokens, mask, ..params(sampling) };
    // The raw distribution is reported, so it is read before penalties and temperature change the row.
    let raw = sampling.logprobs.map(|k| (logits.to_vec(), k));
    let position = seq.tokens.len() as u64;
    match sample(logits, &params, &History { prompt, generated }, position, scratch) {
        Ok(token) => {
            let (logprob, top) =
                raw.map_or((0.0, Vec::new()), |(raw, k)| (logprob_of(&raw, token), alternatives(&raw, k)));
            Outcome::Sample(Sample { seq: id, token, logprob, top })
        }
        Err(error) => Outcome::Fault(SeqFault { seq: id, reason: error.to_string() }),
    }
}

fn alternatives(logits: &[f32], k: u32) -> Vec<TokenLogprob> {
    let top = top_logprobs(logits, k as usize);
    top.into_iter().map(|(token, logprob)| TokenLogprob { token, logprob }).collect()
}
