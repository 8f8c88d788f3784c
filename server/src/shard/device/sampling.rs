//! What the sampler reads for each row, and what it answers.

use std::collections::{BTreeMap, HashMap};

use loramux_kernels::cuda::{NONE, SampleOut, SampleRow, TOP_MAX, TokenEdit, TopLogprob, push_mask};
use loramux_kernels::sampler::{NonFinite, SampleParams};
use loramux_proto::{PositionLogprobs, PromptLogprobs, Sample, SeqFault, StepResult, TokenLogprob};

use super::super::batch::{LogitRow, Want};
use super::super::run::ShardFault;
use super::super::sampling::params;
use super::sequence::DeviceSequence;

/// Entries that the edits of one step may have in all: a sequence under penalties has one for each distinct token of its
/// prompt and output.
pub(super) const EDITS_MAX: usize = 1 << 20;

/// Sampling lists of one step; kept from step to step.
#[derive(Debug, Default)]
pub(super) struct SampleLists {
    pub(super) rows: Vec<SampleRow>,
    pub(super) edits: Vec<TokenEdit>,
    pub(super) masks: Vec<u32>,
    /// Sequences whose edits found no room in the step.
    pub(super) refused: Vec<u64>,
    scratch: BTreeMap<u32, TokenEdit>,
}

impl SampleLists {
    /// Replaces the lists. `masks` has the words that rows name. `logits_row` counts from 0 in each group of `group_rows` rows; a step that only decodes has one
    /// group, whose rows are those of the batch.
    pub(super) fn fill(
        &mut self,
        logit_rows: &[LogitRow],
        masks: &[u32],
        sequences: &HashMap<u64, DeviceSequence>,
        (vocab, group_rows): (usize, usize),
    ) -> Result<(), ShardFault> {
        self.rows.clear();
        self.edits.clear();
        self.masks.clear();
        self.refused.clear();
        for (index, row) in logit_rows.iter().enumerate() {
            let seq = sequences.get(&row.seq).ok_or(ShardFault::UnknownSequence(row.seq))?;
            let logits_row = (index % group_rows) as u32;
            let filled = match row.want {
                Want::Sample { mask } => {
                    let mask = mask.and_then(|first| masks.get(first as usize..)?.get(..vocab.div_ceil(32)));
                    self.sample_row(seq, mask, vocab, logits_row)
                }
                Want::PromptLogprob { position } => SampleRow {
                    kind: SampleRow::TARGET,
                    target: seq.tokens.get(position as usize).copied().unwrap_or_default(),
                    logprobs: seq.sampling.prompt_logprobs.unwrap_or(0).min(TOP_MAX as u32),
                    ..SampleRow::new(&SampleParams::default(), 0, logits_row, seq.slot)
                },
            };
            self.rows.push(filled);
            if self.edits.len() > EDITS_MAX {
                self.edits.truncate(filled.edits as usize);
                self.refused.push(row.seq);
                if let Some(row) = self.rows.last_mut() {
                    row.edit_count = 0;
                }
            }
        }
        Ok(())
    }

    fn sample_row(&mut self, seq: &DeviceSequence, mask: Option<&[u32]>, vocab: usize, logits_row: u32) -> SampleRow {
        let sampling = &seq.sampling;
        let early = seq.generated() < sampling.min_tokens as usize;
        let ban = if early { sampling.end_tokens.as_slice() } else { &[] };
        let params = SampleParams { ban, allowed: &sampling.allowed_tokens, mask, ..params(sampling) };
        let (first, count) = self.push_edits(seq, params.ban_in_force());
        let first_word = self.masks.len() as u32;
        SampleRow {
            edits: first,
            edit_count: count,
            mask: if push_mask(&mut self.masks, &params, vocab) { first_word } else { NONE },
            logprobs: sampling.logprobs.map_or(NONE, |n| n.min(TOP_MAX as u32)),
            pending: u32::from(seq.pending > 0 && seq.seen.is_some()),
            ..SampleRow::new(&params, seq.next_position(), logits_row, seq.slot)
        }
    }

    /// One entry for each token whose logit is changed.
    fn push_edits(&mut self, seq: &DeviceSequence, ban: &[u32]) -> (u32, u32) {
        let edits = &mut self.scratch;
        edits.clear();
        let entry = |token: u32| TokenEdit { token, ..TokenEdit::default() };
        for (&token, &count) in seq.seen.iter().flatten() {
            edits.entry(token).or_insert_with(|| entry(token)).flags |=
                TokenEdit::SEEN | count.min(TokenEdit::SEEN - 1);
        }
        for bias in &seq.sampling.logit_bias {
            edits.entry(bias.token).or_insert_with(|| entry(bias.token)).bias += bias.bias;
        }
        for &token in ban {
            edits.entry(token).or_insert_with(|| entry(token)).flags |= TokenEdit::BAN;
        }
        let first = self.edits.len() as u32;
        self.edits.extend(edits.values());
        (first, edits.len() as u32)
    }
}

/// Turns the sampler's answers into the step's result.
pub(super) fn read(
    rows: &[LogitRow],
    out: &[SampleOut],
    top: &[TopLogprob],
    wants_logprobs: impl Fn(&LogitRow) -> bool,
    result: &mut StepResult,
) {
    for (index, (row, out)) in rows.iter().zip(out).enumerate() {
        let first = index * TOP_MAX;
        let alternatives = || {
            let count = (out.top_count as usize).min(TOP_MAX);
            let top = top.get(first..first + count).unwrap_or_default();
            top.iter().map(|t| TokenLogprob { token: t.token, logprob: t.logprob }).collect::<Vec<_>>()
        };
        match row.want {
            Want::PromptLogprob { position } => {
                let position = PositionLogprobs { position, logprob: out.logprob, top: alternatives() };
                match result.prompt_logprobs.last_mut() {
                    Some(last) if last.seq == row.seq => last.positions.push(position),
                    _ => result.prompt_logprobs.push(PromptLogprobs { seq: row.seq, positions: vec![position] }),
                }
            }
            Want::Sample { .. } => match fault(out) {
                Some(fault) => result.faults.push(SeqFault { seq: row.seq, reason: fault.to_string() }),
                None => {
                    let (logprob, top) =
                        if wants_logprobs(row) { (out.logprob, alternatives()) } else { (0.0, Vec::new()) };
                    result.samples.push(Sample { seq: row.seq, token: out.token, logprob, top });
                }
            },
        }
    }
}

/// Fails the sequences whose edits were left out; what was drawn for them means nothing.
pub(super) fn refuse(refused: &[u64], result: &mut StepResult) {
    for &seq in refused {
        result.samples.retain(|sample| sample.seq != seq);
        result.faults.retain(|fault| fault.seq != seq);
        let reason = "penalties over too many distinct tokens at once; use fewer such requests, or shorter ones".into();
        result.faults.push(SeqFault { seq, reason });
    }
}

fn fault(out: &SampleOut) -> Option<NonFinite> {
    match out.fault {
        0 => None,
        SampleOut::FAULT_LOGIT => Some(NonFinite::Logit { token: out.token }),
        _ => Some(NonFinite::NothingLeft),
    }
}
