//! Steps that the device was given and whose results the host has not read.

use std::time::Instant;

use loramux_kernels::cuda::{SampleOut, TopLogprob};
use loramux_kernels::device::{Event, HostBuffer};
use loramux_proto::SlotGeneration;

use super::super::batch::LogitRow;

/// Page-locked memory that one step's samples come back to.
#[derive(Debug)]
pub(super) struct Landing {
    pub(super) out: HostBuffer<SampleOut>,
    pub(super) top: HostBuffer<TopLogprob>,
    /// Hidden states of the rows that embeddings are made of, each at its row.
    pub(super) states: HostBuffer<u16>,
    /// Set behind the copies into it.
    pub(super) landed: Event,
}

/// A chunk of a sequence that wants an embedding.
#[derive(Clone, Copy, Debug)]
pub(super) struct PooledChunk {
    pub(super) seq: u64,
    /// Row of the chunk's first position.
    pub(super) first_row: usize,
    pub(super) start: u32,
    pub(super) len: u32,
    /// The prompt ends with it.
    pub(super) is_last: bool,
}

/// A step in flight.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) id: u64,
    pub(super) rows: Vec<LogitRow>,
    /// Sequences whose penalties found no room.
    pub(super) refused: Vec<u64>,
    /// Chunks whose hidden states come back.
    pub(super) pooled: Vec<PooledChunk>,
    pub(super) uploaded: Vec<SlotGeneration>,
    pub(super) landing: Landing,
    pub(super) started: Instant,
}
