//! Which rows use which rank blocks: built once per step, used by every site of every layer.

use super::ends::Uses;
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
    /// What any of the adapters has.
    pub(crate) uses: Uses,
}

/// Which blocks of the adapters a list of the head's rows is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadWork {
    /// Their rank blocks, and with them their gains and shifts.
    Pairs,
    /// The blocks of 16 inputs of what they add to the head's weight.
    Rows,
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

    /// Whether an adapter of the list may change the embedding.
    #[must_use]
    pub const fn acts_on_embedding(&self) -> bool {
        self.uses.embed || self.uses.embed_rows
    }

    /// Replaces the list by that of the rows whose logits are wanted: row `i` of the new list is row `rows[i]` of `step`.
    /// Empty if no adapter of `step` acts on the head in this way.
    ///
    /// # Errors
    /// [`OpError::Stale`] if a slot has changed since `step` was built, [`OpError::Limit`] over 2^32 rows.
    pub fn select(&mut self, table: &AdapterTable, step: &Self, rows: &[u32], head: HeadWork) -> Result<(), OpError> {
        self.clear();
        let wanted = match head {
            HeadWork::Pairs => step.uses.head,
            HeadWork::Rows => step.uses.head_rows,
        };
        if !wanted {
            return Ok(());
        }
        self.uses = step.uses;
        let run_of = |row: u32| {
            let run = step.runs.partition_point(|run| run.rows.end <= row as usize);
            step.runs.get(run).filter(|run| run.rows.contains(&(row as usize)))
        };
        let mut first = 0;
        while let Some(&row) = rows.get(first) {
            let Some(run) = run_of(row) else {
                first += 1;
                continue;
            };
            let count = rows[first..].iter().take_while(|row| run.rows.contains(&(**row as usize))).count();
            let outcome = self.push_selected(table, &step.items[run.items.clone()], first..first + count, head);
            if outcome.is_err() {
                self.clear();
                return outcome;
            }
            first += count;
        }
        Ok(())
    }

    fn push_selected(
        &mut self,
        table: &AdapterTable,
        items: &[Item],
        rows: Range<usize>,
        head: HeadWork,
    ) -> Result<(), OpError> {
        let first_item = self.items.len();
        for item in items {
            let blocks = match head {
                HeadWork::Pairs => item.rank_block..item.rank_block + 1,
                HeadWork::Rows if item.rank_block == 0 => 0..table.head_row_blocks(item.slot, item.generation)? as u32,
                HeadWork::Rows => 0..0,
            };
            for rank_block in blocks {
                at_most("work list", "rows of all items", self.planes + rows.len(), u32::MAX as usize)?;
                let (first_row, plane) = (rows.start as u32, self.planes as u32);
                self.items.push(Item { rank_block, first_row, rows: rows.len() as u32, plane, ..*item });
                self.planes += rows.len();
            }
        }
        if self.items.len() > first_item {
            self.runs.push(Run { rows, items: first_item..self.items.len() });
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.items.clear();
        self.runs.clear();
        self.planes = 0;
        self.uses = Uses::default();
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
            self.uses = self.uses.and(table.uses(slot, generation)?);
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
