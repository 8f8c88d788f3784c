//! The shard's memory of block tables: a step names only what is new of them.

use std::collections::HashMap;

use crate::{AdapterRef, Step};

/// Block table and adapters of each sequence, as its last chunk left them.
#[derive(Debug, Default)]
pub struct Tables {
    by_sequence: HashMap<u64, Table>,
}

#[derive(Debug, Default)]
struct Table {
    blocks: Vec<u32>,
    adapters: Vec<AdapterRef>,
}

/// A chunk goes on from a table that was never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownTable {
    /// Whose chunk.
    pub seq: u64,
    /// Its `blocks_from`.
    pub blocks_from: u32,
    /// Blocks that are known of it.
    pub known: usize,
}

impl std::fmt::Display for UnknownTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { seq, blocks_from, known } = self;
        write!(f, "chunk of sequence {seq} begins with block {blocks_from} of its table; {known} are known")
    }
}

impl std::error::Error for UnknownTable {}

impl Tables {
    /// Makes every chunk's `blocks` and `adapters` whole and its `blocks_from` 0. Called once for each step, in their order.
    ///
    /// # Errors
    /// [`UnknownTable`]; the step may be completed in part.
    pub fn complete(&mut self, step: &mut Step) -> Result<(), UnknownTable> {
        for seq in &step.finishes {
            self.by_sequence.remove(seq);
        }
        for chunk in &mut step.chunks {
            let from = chunk.blocks_from as usize;
            if from == 0 {
                let table = self.by_sequence.entry(chunk.seq).or_default();
                table.blocks.clone_from(&chunk.blocks);
                table.adapters.clone_from(&chunk.adapters);
                continue;
            }
            let known = self.by_sequence.get(&chunk.seq).map_or(0, |table| table.blocks.len());
            let unknown = UnknownTable { seq: chunk.seq, blocks_from: chunk.blocks_from, known };
            let table = self.by_sequence.get_mut(&chunk.seq).filter(|_| from <= known).ok_or(unknown)?;
            table.blocks.truncate(from);
            table.blocks.append(&mut chunk.blocks);
            chunk.blocks.clone_from(&table.blocks);
            chunk.adapters.clone_from(&table.adapters);
            chunk.blocks_from = 0;
        }
        Ok(())
    }

    /// Sequences with a table.
    pub fn len(&self) -> usize {
        self.by_sequence.len()
    }

    /// No sequence has one.
    pub fn is_empty(&self) -> bool {
        self.by_sequence.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Chunk;

    fn chunk(seq: u64, blocks_from: u32, blocks: &[u32], slots: &[u32]) -> Chunk {
        let adapters = slots.iter().map(|slot| AdapterRef { slot: *slot, generation: 1, scale: 1.0 }).collect();
        Chunk { seq, blocks_from, blocks: blocks.to_vec(), adapters, ..Chunk::default() }
    }

    fn completed(tables: &mut Tables, finishes: &[u64], chunks: Vec<Chunk>) -> Result<Step, UnknownTable> {
        let mut step = Step { finishes: finishes.to_vec(), chunks, ..Step::default() };
        tables.complete(&mut step).map(|()| step)
    }

    #[test]
    fn a_chunk_that_names_what_is_new_becomes_the_whole_table() {
        let mut tables = Tables::default();
        completed(&mut tables, &[], vec![chunk(1, 0, &[7, 8], &[3]), chunk(2, 0, &[9], &[])]).unwrap();
        let step = completed(&mut tables, &[], vec![chunk(1, 2, &[], &[]), chunk(2, 1, &[4], &[])]).unwrap();
        assert_eq!(step.chunks, vec![chunk(1, 0, &[7, 8], &[3]), chunk(2, 0, &[9, 4], &[])]);
        // The second block was written by others too: from it on the table is new.
        let step = completed(&mut tables, &[], vec![chunk(1, 1, &[5, 6], &[])]).unwrap();
        assert_eq!(step.chunks, vec![chunk(1, 0, &[7, 5, 6], &[3])]);
        // The whole table again, under other adapters.
        let step = completed(&mut tables, &[], vec![chunk(1, 0, &[1], &[])]).unwrap();
        assert_eq!(step.chunks, vec![chunk(1, 0, &[1], &[])]);
    }

    #[test]
    fn a_finished_sequence_and_a_gap_are_errors() {
        let mut tables = Tables::default();
        completed(&mut tables, &[], vec![chunk(1, 0, &[7], &[])]).unwrap();
        let gap = UnknownTable { seq: 1, blocks_from: 2, known: 1 };
        assert_eq!(completed(&mut tables, &[], vec![chunk(1, 2, &[3], &[])]).unwrap_err(), gap);
        let gone = UnknownTable { seq: 1, blocks_from: 1, known: 0 };
        assert_eq!(completed(&mut tables, &[1], vec![chunk(1, 1, &[3], &[])]).unwrap_err(), gone);
        assert!(tables.is_empty());
    }
}
