//! From a [`Step`] to the lists that the kernels walk: plain data, built on the host, checked before anything is launched.

use std::collections::HashMap;

use loramux_kernels::device::step::{
    BLOCK_TOKENS, DecodeUnit, FROM_DEVICE, LoraItem, PrefillTile, RowTile, StepCounts, decode_units,
};
use loramux_proto::{AdapterRef, Chunk, Step};

use super::super::batch::{LogitRow, Want, push_mask};
use super::super::run::ShardFault;
use super::adapters::SlotTable;
use super::sequence::DeviceSequence;

/// Rows of a LoRA tile: those of one n-side of an mma for decodes, eight of them where prompts are computed.
pub(super) const DECODE_TILE_ROWS: usize = 8;
pub(super) const PREFILL_TILE_ROWS: usize = 64;

/// Bounds of one step's lists.
#[derive(Clone, Copy, Debug)]
pub(super) struct ListLimits {
    pub(super) blocks_total: u32,
    pub(super) step_tokens_max: usize,
    /// Positions (rows) of one prefill tile of the attention kernel.
    pub(super) prefill_rows: usize,
    /// LoRA items that one pass may have, for tiles of decodes and of prompts.
    pub(super) items_max: [usize; 2],
    pub(super) window: Option<usize>,
    pub(super) vocab: usize,
}

/// A run of tiles whose items fit the kernels' workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LoraPass {
    pub(super) first_tile: usize,
    pub(super) tiles: usize,
    pub(super) first_item: usize,
    pub(super) items: usize,
}

/// One step's lists; kept from step to step.
#[derive(Debug, Default)]
pub(super) struct Lists {
    pub(super) tokens: Vec<u32>,
    pub(super) positions: Vec<u32>,
    /// Block and offset of each row's key and value.
    pub(super) kv_slots: Vec<[u32; 2]>,
    pub(super) block_table: Vec<u32>,
    pub(super) decode_units: Vec<DecodeUnit>,
    pub(super) prefill_tiles: Vec<PrefillTile>,
    pub(super) row_tiles: Vec<RowTile>,
    pub(super) items: Vec<LoraItem>,
    pub(super) passes: Vec<LoraPass>,
    pub(super) logit_rows: Vec<LogitRow>,
    /// What may be drawn, one bit for each token of the vocabulary; not yet as the sampler reads it.
    pub(super) masks: Vec<u32>,
    /// Whether an adapter of the step has gains and shifts.
    pub(super) vectors: bool,
    /// Every chunk is one position whose next token is drawn: the step that graphs are captured for.
    pub(super) decode_only: bool,
}

impl Lists {
    /// Replaces the lists.
    pub(super) fn fill(
        &mut self,
        step: &Step,
        sequences: &HashMap<u64, DeviceSequence>,
        slots: &SlotTable,
        limits: &ListLimits,
    ) -> Result<(), ShardFault> {
        self.clear();
        self.decode_only = step.chunks.iter().all(|chunk| chunk.len == 1 && chunk.sample && !chunk.prompt_logprobs);
        for chunk in &step.chunks {
            let seq = sequences.get(&chunk.seq).ok_or(ShardFault::UnknownSequence(chunk.seq))?;
            let first = self.tokens.len();
            self.push_rows(chunk, seq, limits)?;
            self.push_attention(chunk, first, limits);
            self.push_logit_rows(chunk, seq.prompt_tokens, first, limits.vocab)?;
        }
        self.push_lora(step, slots, limits)
    }

    /// Rows.
    pub(super) fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The counts of one LoRA pass, beside those of the whole step.
    pub(super) fn counts(&self, pass: Option<&LoraPass>, sample_rows: usize) -> StepCounts {
        StepCounts {
            rows: self.rows() as u32,
            lora_items: pass.map_or(0, |pass| pass.items as u32),
            row_tiles: pass.map_or(0, |pass| pass.tiles as u32),
            decode_units: self.decode_units.len() as u32,
            prefill_tiles: self.prefill_tiles.len() as u32,
            sample_rows: sample_rows as u32,
            reserved: [0; 2],
        }
    }

    fn clear(&mut self) {
        let Self {
            tokens,
            positions,
            kv_slots,
            block_table,
            decode_units,
            prefill_tiles,
            row_tiles,
            items,
            passes,
            logit_rows,
            masks,
            vectors,
            decode_only: _,
        } = self;
        *vectors = false;
        tokens.clear();
        positions.clear();
        kv_slots.clear();
        block_table.clear();
        decode_units.clear();
        prefill_tiles.clear();
        row_tiles.clear();
        items.clear();
        passes.clear();
        logit_rows.clear();
        masks.clear();
    }

    fn push_rows(&mut self, chunk: &Chunk, seq: &DeviceSequence, limits: &ListLimits) -> Result<(), ShardFault> {
        let malformed = |what: &str| ShardFault::Malformed(format!("chunk of sequence {}: {what}", chunk.seq));
        let (start, len) = (chunk.start as usize, chunk.len as usize);
        let end = start + len;
        if len == 0 || self.tokens.len() + len > limits.step_tokens_max {
            return Err(malformed("is empty or over the step's tokens"));
        }
        if chunk.blocks.len() != end.div_ceil(BLOCK_TOKENS) || chunk.blocks.iter().any(|b| *b >= limits.blocks_total) {
            return Err(malformed("has a wrong block table"));
        }
        for position in start..end {
            let token = match seq.tokens.get(position) {
                Some(&token) => token,
                // Drawn by a step whose result the host has not read.
                None if position < seq.tokens.len() + seq.pending => FROM_DEVICE | seq.slot,
                None => return Err(malformed("names positions it has no tokens for")),
            };
            self.tokens.push(token);
            self.positions.push(position as u32);
            self.kv_slots.push([chunk.blocks[position / BLOCK_TOKENS], (position % BLOCK_TOKENS) as u32]);
        }
        Ok(())
    }

    /// One unit list for a decode, tiles for a longer chunk.
    fn push_attention(&mut self, chunk: &Chunk, first: usize, limits: &ListLimits) {
        let blocks = self.block_table.len() as u32;
        self.block_table.extend_from_slice(&chunk.blocks);
        let (start, len) = (chunk.start as usize, chunk.len as usize);
        if len == 1 {
            let kv_first = limits.window.map_or(0, |window| (start + 1).saturating_sub(window));
            self.decode_units.extend(decode_units(first as u32, blocks, kv_first, start + 1));
            return;
        }
        for offset in (0..len).step_by(limits.prefill_rows) {
            self.prefill_tiles.push(PrefillTile {
                first_row: (first + offset) as u32,
                row_count: (len - offset).min(limits.prefill_rows) as u32,
                position: (start + offset) as u32,
                blocks,
            });
        }
    }

    fn push_logit_rows(
        &mut self,
        chunk: &Chunk,
        prompt_tokens: usize,
        first: usize,
        vocab: usize,
    ) -> Result<(), ShardFault> {
        if chunk.prompt_logprobs {
            for offset in 0..chunk.len {
                let position = chunk.start + offset + 1;
                if (position as usize) < prompt_tokens {
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

    /// Tiles over every row, and the items of those that have adapters. Chunks with the same adapters are one run.
    fn push_lora(&mut self, step: &Step, slots: &SlotTable, limits: &ListLimits) -> Result<(), ShardFault> {
        let (tile_rows, items_max) = match self.decode_only {
            true => (DECODE_TILE_ROWS, limits.items_max[0]),
            false => (PREFILL_TILE_ROWS, limits.items_max[1]),
        };
        let mut first_row = 0usize;
        let mut chunks = step.chunks.iter().peekable();
        while let Some(chunk) = chunks.next() {
            let mut rows = chunk.len as usize;
            while let Some(next) = chunks.next_if(|next| next.adapters == chunk.adapters) {
                rows += next.len as usize;
            }
            let per_tile = items_of(&chunk.adapters, slots)?;
            self.vectors |= chunk.adapters.iter().any(|adapter| slots.has_vectors(adapter.slot));
            if per_tile.len() > items_max {
                return Err(ShardFault::Malformed(format!(
                    "a row has {} rank blocks, the limit is {items_max}",
                    per_tile.len()
                )));
            }
            for offset in (0..rows).step_by(tile_rows) {
                let row_count = (rows - offset).min(tile_rows) as u32;
                self.push_tile((first_row + offset) as u32, row_count, &per_tile, items_max);
            }
            first_row += rows;
        }
        Ok(())
    }

    /// Adds a tile to the last pass, or begins another when its items would not fit.
    fn push_tile(&mut self, first_row: u32, row_count: u32, blocks: &[(u32, f32)], items_max: usize) {
        let fits = self.passes.last().is_some_and(|pass| pass.items + blocks.len() <= items_max);
        if !fits {
            let (first_tile, first_item) = (self.row_tiles.len(), self.items.len());
            self.passes.push(LoraPass { first_tile, tiles: 0, first_item, items: 0 });
        }
        let Some(pass) = self.passes.last_mut() else { return };
        let (first_item, item_count) = (pass.items as u32, blocks.len() as u32);
        self.row_tiles.push(RowTile { first_row, row_count, first_item, item_count });
        self.items.extend(blocks.iter().map(|&(block_row, scale)| LoraItem { block_row, first_row, row_count, scale }));
        pass.tiles += 1;
        pass.items += blocks.len();
    }
}

/// Rank blocks of a row's adapters, in the order in which their deltas are added, each with the request's factor.
fn items_of(adapters: &[AdapterRef], slots: &SlotTable) -> Result<Vec<(u32, f32)>, ShardFault> {
    let mut items = Vec::new();
    for adapter in adapters {
        let rows = slots.block_rows(adapter.slot, adapter.generation)?;
        items.extend(rows.iter().map(|&row| (row, adapter.scale)));
    }
    Ok(items)
}
