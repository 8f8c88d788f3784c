//! From a [`Step`] to the device batch: rows of tokens, where their keys and values go, which adapters they run under, and
//! which rows want logits. Everything on the wire is checked here, before any kernel runs.

use std::collections::HashMap;

use loramux_kernels::{AdapterTable, AttnChunk, KvLayout, KvSlot, OpError, Segment, SlotScale};
use loramux_models::Batch;
use loramux_proto::{AdapterRef, Chunk, Sampling, SeqStart, Step};

use super::pooling::Pooler;
use super::run::ShardFault;

/// What the shard remembers of a sequence: enough for penalties, and to know the tokens of the next chunk.
pub(super) struct SeqState {
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_tokens: usize,
    pub(super) sampling: Sampling,
    pub(super) bias: Vec<(u32, f32)>,
    pub(super) pooler: Option<Pooler>,
}

impl SeqState {
    pub(super) fn new(start: &SeqStart) -> Self {
        let sampling = start.sampling.clone().unwrap_or_default();
        let bias = sampling.logit_bias.iter().map(|entry| (entry.token, entry.bias)).collect();
        let prompt_tokens = (start.prompt_tokens as usize).min(start.tokens.len());
        Self { tokens: start.tokens.clone(), prompt_tokens, sampling, bias, pooler: Pooler::new(start.pooling()) }
    }

    pub(super) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }
}

/// One row whose logits are wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogitRow {
    pub(super) seq: u64,
    pub(super) row: u32,
    pub(super) want: Want,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// Draw the next token; `mask`: the first word of those that say what may come.
    Sample { mask: Option<u32> },
    /// Report the logprob of the prompt token at this position.
    PromptLogprob { position: u32 },
}

/// Buffers that are kept from step to step.
#[derive(Default)]
pub(super) struct BatchBuffers {
    pub(super) batch: Batch,
    pub(super) logit_rows: Vec<LogitRow>,
    /// Of samples; one bit for each token of the vocabulary.
    pub(super) masks: Vec<u32>,
    adapters: Vec<SlotScale>,
    /// (first row, end row, range of `adapters`)
    segments: Vec<(usize, usize, std::ops::Range<usize>)>,
}

/// Bounds of one step.
pub(super) struct BatchLimits {
    pub(super) layout: KvLayout,
    pub(super) blocks_total: u32,
    pub(super) step_tokens_max: usize,
    pub(super) vocab: usize,
}

impl BatchBuffers {
    pub(super) fn fill(
        &mut self,
        step: &Step,
        sequences: &HashMap<u64, SeqState>,
        table: &AdapterTable,
        limits: &BatchLimits,
    ) -> Result<(), ShardFault> {
        self.batch.clear();
        self.logit_rows.clear();
        self.masks.clear();
        self.adapters.clear();
        self.segments.clear();
        let mut previous: &[AdapterRef] = &[];
        for chunk in &step.chunks {
            let seq = sequences.get(&chunk.seq).ok_or(ShardFault::UnknownSequence(chunk.seq))?;
            let first = self.batch.tokens.len();
            self.push_rows(chunk, seq, limits)?;
            self.push_logit_rows(chunk, seq, first, limits.vocab)?;
            let end = self.batch.tokens.len();
            match self.segments.last_mut() {
                Some(last) if previous == chunk.adapters => last.1 = end,
                _ => {
                    let from = self.adapters.len();
                    self.adapters.extend(chunk.adapters.iter().map(slot_scale));
                    self.segments.push((first, end, from..self.adapters.len()));
                }
            }
            previous = &chunk.adapters;
        }
        let adapters = &self.adapters;
        let segments = self.segments.iter().map(|(first, end, range)| Segment {
            rows: *first..*end,
            adapters: adapters.get(range.clone()).unwrap_or_default(),
        });
        self.batch.work.build(table, segments).map_err(ShardFault::Op)
    }

    fn push_rows(&mut self, chunk: &Chunk, seq: &SeqState, limits: &BatchLimits) -> Result<(), ShardFault> {
        let malformed = |what: &str| ShardFault::Malformed(format!("chunk of sequence {}: {what}", chunk.seq));
        let (start, len) = (chunk.start as usize, chunk.len as usize);
        let end = start + len;
        let tokens = seq.tokens.get(start..end).ok_or_else(|| malformed("names positions it has no tokens for"))?;
        let block_tokens = limits.layout.block_tokens;
        if len == 0 || self.batch.tokens.len() + len > limits.step_tokens_max {
            return Err(malformed("is empty or over the step's tokens"));
        }
        if chunk.blocks.len() != end.div_ceil(block_tokens) || chunk.blocks.iter().any(|b| *b >= limits.blocks_total) {
            return Err(malformed("has a wrong block table"));
        }
        let (first_row, blocks_from) = (self.batch.tokens.len(), self.batch.block_table.len());
        self.batch.tokens.extend_from_slice(tokens);
        self.batch.positions.extend(chunk.start..chunk.start + chunk.len);
        self.batch.block_table.extend_from_slice(&chunk.blocks);
        for position in start..end {
            let (block, offset) = (chunk.blocks[position / block_tokens], position % block_tokens);
            self.batch.kv_slots.push(KvSlot { block, offset: offset as u32 });
        }
        let blocks = blocks_from..self.batch.block_table.len();
        self.batch.chunks.push(AttnChunk { first_row, len, start, blocks });
        Ok(())
    }

    fn push_logit_rows(&mut self, chunk: &Chunk, seq: &SeqState, first: usize, vocab: usize) -> Result<(), ShardFault> {
        if chunk.prompt_logprobs {
            for offset in 0..chunk.len {
                let position = chunk.start + offset + 1;
                if (position as usize) < seq.prompt_tokens {
                    let want = Want::PromptLogprob { position };
                    self.logit_rows.push(LogitRow { seq: chunk.seq, row: first as u32 + offset, want });
                }
            }
        }
        if chunk.sample {
            let row = (first as u32 + chunk.len) - 1;
            let mask = push_mask(&mut self.masks, chunk, vocab)?;
            self.logit_rows.push(LogitRow { seq: chunk.seq, row, want: Want::Sample { mask } });
        }
        Ok(())
    }
}

/// Appends a chunk's mask, one bit for each token of the vocabulary, and returns the place of its first word.
pub(super) fn push_mask(masks: &mut Vec<u32>, chunk: &Chunk, vocab: usize) -> Result<Option<u32>, ShardFault> {
    let Some(bytes) = &chunk.mask else { return Ok(None) };
    let (first, words) = (masks.len(), vocab.div_ceil(32));
    let (given, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() || given.len() > words {
        let (seq, len) = (chunk.seq, bytes.len());
        return Err(ShardFault::Malformed(format!(
            "chunk of sequence {seq}: a mask of {len} bytes for {vocab} tokens"
        )));
    }
    masks.extend(given.iter().map(|word| u32::from_le_bytes(*word)));
    masks.resize(first + words, 0);
    if let Some(last) = masks.last_mut() {
        *last &= u32::MAX >> (words * 32 - vocab);
    }
    Ok(Some(first as u32))
}

fn slot_scale(adapter: &AdapterRef) -> SlotScale {
    SlotScale { slot: adapter.slot, generation: adapter.generation, scale: adapter.scale }
}

impl From<OpError> for ShardFault {
    fn from(error: OpError) -> Self {
        Self::Op(error)
    }
}
