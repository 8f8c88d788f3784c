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
    /// Set behind the copies into it.
    pub(super) landed: Event,
}

/// A step in flight.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) id: u64,
    pub(super) rows: Vec<LogitRow>,
    /// Sequences whose penalties found no room.
    pub(super) refused: Vec<u64>,
    pub(super) uploaded: Vec<SlotGeneration>,
    pub(super) landing: Landing,
    pub(super) started: Instant,
}
