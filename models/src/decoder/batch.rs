//! What one step computes: plain data, filled by the shard into buffers that are kept between steps.

use loramux_kernels::{AttnChunk, KvSlot, WorkList};

/// The rows of one forward pass. Row i is `tokens[i]` at `positions[i]`, whose key and value go to `kv_slots[i]`.
#[derive(Default)]
pub struct Batch {
    /// Token ids, one per row.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Where each row's key and value are stored.
    pub kv_slots: Vec<KvSlot>,
    /// Runs of rows of one sequence, covering every row once and in order.
    pub chunks: Vec<AttnChunk>,
    /// Block ids of all sequences; each chunk has a range of it.
    pub block_table: Vec<u32>,
    /// Which adapters act on which rows.
    pub work: WorkList,
}

impl Batch {
    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        let Self { tokens, positions, kv_slots, chunks, block_table, work: _ } = self;
        tokens.clear();
        positions.clear();
        kv_slots.clear();
        chunks.clear();
        block_table.clear();
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }
}
