//! Which rows use which rank blocks: built once per step, used by every site of every layer.

use super::table::AdapterTable;
use crate::error::{OpError, at_most};
use std::ops::Range;

/// An adapter on the device and the strength it runs at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotScale {
    /// The slot.
    pub slot: u32,
    /// What the slot must hold.
    pub generation: u64,
    /// Factor of the delta, on top of the module's own.
    pub scale: f32,
}

/// Rows that use the same adapters, in the same order.
#[derive(Clone, Debug)]
pub struct Segment<'a> {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Their adapters; none for rows of the base model.
    pub adapters: &'a [SlotScale],
}

/// One rank block of one adapter for a run of rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Item {
    pub(crate) slot: u32,
    pub(crate) generation: u64,
    pub(crate) rank_block: u32,
    pub(crate) first_row: u32,
    pub(crate) rows: u32,
    /// Rows of the items before this one.
    pub(crate) plane: u32,
    pub(crate) scale: f32,
}

/// A run of rows and its items, in the order in which their deltas are added.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Run {
    pub(crate) rows: Range<usize>,
    pub(crate) items: Range<usize>,
}

/// The work of a step. Rows without an adapter are in no item and cost nothing.
#[derive(Clone, Debug, Default)]
pub struct WorkList {
    pub(crate) items: Vec<Item>,
    pub(crate) runs: Vec<Run>,
    /// Rows of all items together.
    pub(crate) planes: usize,
}

impl WorkList {
    /// Replaces the list. Segments come in the order of their rows and do not overlap.
    ///
    /// # Errors
    /// [`OpError::Stale`] if a slot does not hold the generation a segment names, [`OpError::Limit`] if segments overlap.
    /// The list is empty then.
    pub fn build<'a>(
        &mut self,
        table: &AdapterTable,
        mut segments: impl Iterator<Item = Segment<'a>>,
    ) -> Result<(), OpError> {
        self.clear();
        let outcome = segments.try_for_each(|segment| self.push(table, &segment));
        if outcome != Ok(()) {
            self.clear();
        }
        outcome
    }

    /// Whether no row has an adapter.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    fn clear(&mut self) {
        self.items.clear();
        self.runs.clear();
        self.planes = 0;
    }

    fn push(&mut self, table: &AdapterTable, segment: &Segment) -> Result<(), OpError> {
        let Segment { rows, adapters } = segment;
        let end = self.runs.last().map_or(0, |run| run.rows.end);
        if rows.is_empty() {
            return adapters.iter().try_for_each(|adapter| table.check(adapter.slot, adapter.generation));
        }
        let first_item = self.items.len();
        for &SlotScale { slot, generation, scale } in *adapters {
            at_most("work list", "rows of segments before a segment", end, rows.start)?;
            at_most("work list", "last row", rows.end, u32::MAX as usize)?;
            for rank_block in 0..table.rank_blocks(slot, generation)? {
                let (first_row, count) = (rows.start as u32, rows.len() as u32);
                at_most("work list", "rows of all items", self.planes + rows.len(), u32::MAX as usize)?;
                let plane = self.planes as u32;
                let rank_block = rank_block as u32;
                self.items.push(Item { slot, generation, rank_block, first_row, rows: count, plane, scale });
                self.planes += rows.len();
            }
        }
        if self.items.len() > first_item {
            self.runs.push(Run { rows: rows.clone(), items: first_item..self.items.len() });
        }
        Ok(())
    }
}
