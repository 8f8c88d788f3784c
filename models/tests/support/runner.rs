//! A shard in miniature: an arena, an adapter table, and steps made of chunks of sequences.

use loramux_kernels::{AdapterTable, Arena, ArenaDtype, AttnChunk, Dtype, KvLayout, KvSlot, Segment, SlotScale};
use loramux_models::adapter::PeftAdapter;
use loramux_models::{BaseFiles, Batch, Decoder, DecoderLimits, LoadFormat, LoadOptions, Model, load};
use std::path::Path;

const BLOCK_TOKENS: usize = 4;
const STEP_TOKENS_MAX: usize = 2048;
/// Fewer than most steps ask for, so that logits come in several calls.
const LOGITS_ROWS_MAX: usize = 24;

/// A sequence with its cache blocks and adapters.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<u32>,
    pub(crate) computed: usize,
    pub(crate) adapters: Vec<SlotScale>,
    blocks: Vec<u32>,
}

impl Sequence {
    pub(crate) fn new(tokens: &[u32], adapters: &[SlotScale]) -> Self {
        Self { tokens: tokens.to_vec(), adapters: adapters.to_vec(), ..Self::default() }
    }
}

pub(crate) struct Runner {
    pub(crate) base: Option<BaseFiles>,
    pub(crate) decoder: Decoder,
    arena: Arena,
    table: AdapterTable,
    layout: KvLayout,
    batch: Batch,
    next_block: u32,
    /// Adapters take pages from the end.
    pages_left: usize,
    next_slot: u32,
}

impl Runner {
    /// Loads `path` and takes `pages` pages of `page_bytes` each.
    pub(crate) fn new(path: &Path, dtype: Option<Dtype>, page_bytes: usize, pages: usize) -> Self {
        let options = LoadOptions { dtype, format: LoadFormat::Auto, seed: 0 };
        let model = load(path, &options, &mut |_| ()).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let base = BaseFiles::new(path, &options, model.content_id);
        Self { base: Some(base), ..Self::from_model(model, page_bytes, pages) }
    }

    /// The same with the KV cache in another type than the weights.
    pub(crate) fn with_kv(mut self, dtype: ArenaDtype) -> Self {
        self.layout = self.decoder.kv_layout(BLOCK_TOKENS, self.arena.page_bytes(), dtype);
        self
    }

    /// As [`Runner::new`], for a model in memory.
    pub(crate) fn from_model(model: Model, page_bytes: usize, pages: usize) -> Self {
        let limits = DecoderLimits { step_tokens_max: STEP_TOKENS_MAX, logits_rows_max: LOGITS_ROWS_MAX };
        let decoder = Decoder::new(model, limits);
        let layout = decoder.kv_layout(BLOCK_TOKENS, page_bytes, decoder.dtype().arena());
        let arena = Arena::new(page_bytes, pages).expect("memory for the arena");
        let (batch, table) = (Batch::default(), AdapterTable::new(64));
        Self { base: None, decoder, arena, table, layout, batch, next_block: 0, pages_left: pages, next_slot: 0 }
    }

    pub(crate) fn tiny(path: &Path, dtype: Dtype) -> Self {
        Self::new(path, Some(dtype), 64 << 10, 512)
    }

    /// Publishes an adapter and returns how a sequence names it.
    pub(crate) fn publish(&mut self, adapter: &PeftAdapter) -> SlotScale {
        let image = match &self.base {
            Some(base) => adapter.pack_onto(self.decoder.dtype(), self.arena.page_bytes(), base),
            None => adapter.pack(self.decoder.dtype(), self.arena.page_bytes()),
        };
        let image = image.unwrap_or_else(|error| panic!("{error}"));
        self.pages_left -= image.pages_needed();
        let pages: Vec<u32> = (self.pages_left..).map(|page| page as u32).take(image.pages_needed()).collect();
        let (slot, generation) = (self.next_slot, 7 + u64::from(self.next_slot));
        self.next_slot += 1;
        self.table.publish(&mut self.arena, slot, generation, &image, &pages).expect("the table has room");
        SlotScale { slot, generation, scale: 1.0 }
    }

    /// Computes the next `rows` tokens of each sequence in one step; returns the logits of every row, in order.
    pub(crate) fn step(&mut self, chunks: &mut [(&mut Sequence, usize)]) -> Vec<Vec<f32>> {
        let last_rows = self.forward(chunks);
        let rows: Vec<u32> = (0..=last_rows.last().copied().expect("a step has rows")).collect();
        self.logits(&rows)
    }

    /// As [`Runner::step`], for the last row of each chunk only.
    pub(crate) fn step_last(&mut self, chunks: &mut [(&mut Sequence, usize)]) -> Vec<Vec<f32>> {
        let rows = self.forward(chunks);
        self.logits(&rows)
    }

    fn forward(&mut self, chunks: &mut [(&mut Sequence, usize)]) -> Vec<u32> {
        self.batch.clear();
        let (mut segments, mut last_rows) = (Vec::new(), Vec::new());
        for (sequence, rows) in chunks {
            let first_row = self.batch.tokens.len();
            let range = sequence.computed..sequence.computed + *rows;
            while sequence.blocks.len() * BLOCK_TOKENS < range.end {
                // Every second one, so that the blocks of a sequence are no run.
                sequence.blocks.push(self.next_block ^ 1);
                self.next_block += 1;
            }
            let first_block = self.batch.block_table.len();
            self.batch.block_table.extend(&sequence.blocks);
            let blocks = first_block..self.batch.block_table.len();
            self.batch.chunks.push(AttnChunk { first_row, len: *rows, start: range.start, blocks });
            for position in range.clone() {
                let (block, offset) = (sequence.blocks[position / BLOCK_TOKENS], (position % BLOCK_TOKENS) as u32);
                self.batch.tokens.push(sequence.tokens[position]);
                self.batch.positions.push(position as u32);
                self.batch.kv_slots.push(KvSlot { block, offset });
            }
            sequence.computed = range.end;
            segments.push((first_row..first_row + *rows, sequence.adapters.clone()));
            last_rows.push((first_row + *rows - 1) as u32);
        }
        assert!(
            (self.next_block as usize + 1).div_ceil(self.layout.blocks_per_page()) <= self.pages_left,
            "arena too small"
        );
        let segments = segments.iter().filter(|(_, adapters)| !adapters.is_empty());
        let segments = segments.map(|(rows, adapters)| Segment { rows: rows.clone(), adapters });
        self.batch.work.build(&self.table, segments).expect("current generations");
        self.decoder.forward(&self.batch, &self.layout, &mut self.arena, &self.table).expect("a valid batch");
        last_rows
    }

    fn logits(&mut self, rows: &[u32]) -> Vec<Vec<f32>> {
        let vocab = self.decoder.spec().vocab;
        let mut out = Vec::new();
        for rows in rows.chunks(LOGITS_ROWS_MAX) {
            let logits = self.decoder.logits(rows, &self.batch, &self.arena, &self.table).expect("rows of the step");
            out.extend(logits.as_f32().chunks(vocab).map(<[f32]>::to_vec));
        }
        out
    }

    /// Logits of every row of one text, computed in one step.
    pub(crate) fn whole(&mut self, tokens: &[u32], adapters: &[SlotScale]) -> Vec<Vec<f32>> {
        let mut sequence = Sequence::new(tokens, adapters);
        self.step(&mut [(&mut sequence, tokens.len())])
    }
}

/// Largest difference between two sets of logits.
pub(crate) fn max_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}
