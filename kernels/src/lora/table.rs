//! Which slot holds which adapter, and where its blocks lie in the arena.

use super::ends::{Ends, Uses, Vectors};
use super::image::{AdapterImage, ImageLayout};
use super::plan::{Entry, NO_BLOCK};
use super::work::{Item, WorkList};
use super::{SLICES, Slice};
use crate::arena::{Arena, UNIT_BYTES};
use crate::dtype::Dtype;
use crate::error::{OpError, at_most, same};
use crate::rows::{Rows, in_f32};

/// One rank block of one matrix on the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Desc {
    /// The A block, in units of 256 bytes from the start of the arena.
    pub(crate) a_unit: u32,
    /// The B block.
    pub(crate) b_unit: u32,
    pub(crate) scale: f32,
    pub(crate) d_in: u32,
    pub(crate) d_out: u32,
}

impl Desc {
    /// The descriptor of an entry whose blocks lie where `to_unit` says.
    pub(super) fn of(entry: &Entry, to_unit: impl Fn(usize) -> u32) -> Self {
        let unit = |offset: usize| if offset == NO_BLOCK { u32::MAX } else { to_unit(offset) };
        let Entry { a, b, d_in, d_out, scale, .. } = *entry;
        Self { a_unit: unit(a), b_unit: unit(b), scale, d_in: d_in as u32, d_out: d_out as u32 }
    }
}

/// The adapter leaves this matrix, or this rank block of it, alone.
pub(super) const ABSENT: Desc = Desc { a_unit: u32::MAX, b_unit: u32::MAX, scale: 0.0, d_in: 0, d_out: 0 };

/// Contents of a slot; the vector keeps its memory when the slot changes hands.
#[derive(Clone, Debug)]
struct Slot {
    /// `None`: empty.
    generation: Option<u64>,
    dtype: Dtype,
    layers: usize,
    rank_blocks: usize,
    /// `[rank block][layer][slice]`
    descs: Vec<Desc>,
    ends: Ends,
}

/// Slots of resident adapters.
#[derive(Debug)]
pub struct AdapterTable {
    slots: Vec<Slot>,
}

impl AdapterTable {
    /// A table of empty slots.
    #[must_use]
    pub fn new(slots_max: usize) -> Self {
        let empty = || Slot {
            generation: None,
            dtype: Dtype::F32,
            layers: 0,
            rank_blocks: 0,
            descs: Vec::new(),
            ends: Ends::default(),
        };
        Self { slots: std::iter::repeat_with(empty).take(slots_max).collect() }
    }

    /// Number of slots.
    #[must_use]
    pub const fn slots_max(&self) -> usize {
        self.slots.len()
    }

    /// Copies an adapter into `pages` of the arena and makes it the content of `slot`. What the slot held is gone, and its
    /// generation is stale.
    ///
    /// # Errors
    /// [`OpError::Limit`] if the slot or a page is not there; [`OpError::Shape`] if the number of pages or their size is not
    /// the image's. The slot keeps what it held then.
    pub fn publish(
        &mut self,
        arena: &mut Arena,
        slot: u32,
        generation: u64,
        image: &AdapterImage,
        pages: &[u32],
    ) -> Result<(), OpError> {
        let op = "publish";
        let ImageLayout::Cpu(dtype) = image.layout else {
            return Err(OpError::Shape { op, what: "layout (0 = for the CPU)", got: 1, want: 0 });
        };
        at_most(op, "slot + 1", slot as usize + 1, self.slots.len())?;
        same(op, "page bytes", image.page_bytes, arena.page_bytes())?;
        same(op, "pages", pages.len(), image.pages_needed())?;
        for &page in pages {
            arena.page(page)?;
        }
        for (&page, bytes) in pages.iter().zip(image.pages()) {
            arena.page_mut(page)?.copy_from_slice(bytes);
        }
        let to_unit = |offset: usize| {
            let page = pages[offset / image.page_bytes] as usize;
            // `Arena::new` bounds the arena so that this fits.
            ((page * image.page_bytes + offset % image.page_bytes) / UNIT_BYTES) as u32
        };
        let slot = &mut self.slots[slot as usize];
        slot.generation = Some(generation);
        slot.dtype = dtype;
        (slot.layers, slot.rank_blocks) = (image.layers, image.rank_blocks);
        slot.descs.clear();
        slot.descs.resize(image.rank_blocks * image.layers * SLICES, ABSENT);
        for entry in image.entries.iter().filter(|entry| entry.slice.is_in_layer()) {
            let index = (entry.rank_block * image.layers + entry.layer) * SLICES + entry.slice as usize;
            slot.descs[index] = Desc::of(entry, to_unit);
        }
        slot.ends.publish(image, to_unit);
        Ok(())
    }

    /// Whether `slot` holds `generation`.
    ///
    /// # Errors
    /// [`OpError::Stale`] if not.
    pub fn check(&self, slot: u32, generation: u64) -> Result<(), OpError> {
        self.held(slot, generation).map(|_| ())
    }

    /// Empties a slot: every generation of it is stale. Slots that are not there are empty already.
    pub fn clear(&mut self, slot: u32) {
        if let Some(slot) = self.slots.get_mut(slot as usize) {
            slot.generation = None;
        }
    }

    /// Rank blocks of what `slot` holds.
    pub(super) fn rank_blocks(&self, slot: u32, generation: u64) -> Result<usize, OpError> {
        Ok(self.held(slot, generation)?.rank_blocks)
    }

    /// Which of the rarer parts the content of `slot` has.
    pub(super) fn uses(&self, slot: u32, generation: u64) -> Result<Uses, OpError> {
        Ok(self.held(slot, generation)?.ends.uses)
    }

    /// Blocks of 16 inputs of what is added to the head's weight.
    pub(super) fn head_row_blocks(&self, slot: u32, generation: u64) -> Result<usize, OpError> {
        Ok(self.held(slot, generation)?.ends.head_row_blocks())
    }

    /// Whether an adapter of the list multiplies pairs of bf16.
    pub(crate) fn takes_pairs(&self, work: &WorkList) -> bool {
        let dtype = |item: &Item| self.held(item.slot, item.generation).map(|slot| slot.dtype);
        work.items.iter().any(|item| dtype(item) == Ok(Dtype::Bf16))
    }

    /// Refuses rows that hold pairs if an adapter of the list does not multiply them.
    pub(crate) fn check_inputs(&self, op: &'static str, x: &Rows, work: &WorkList) -> Result<(), OpError> {
        let dtype = |item: &Item| self.held(item.slot, item.generation).map(|slot| slot.dtype);
        if work.items.iter().any(|item| dtype(item) == Ok(Dtype::F32)) { in_f32(op, x) } else { Ok(()) }
    }

    /// Gains and shifts of a matrix; `None` where the adapter has none.
    pub(crate) fn vectors(&self, item: &Item, layer: usize, slice: Slice) -> Result<Option<Vectors>, OpError> {
        Ok(self.held(item.slot, item.generation)?.ends.vectors(layer, slice))
    }

    /// Storage type of an item's adapter, and where the ranks of a token lie: unit and place in the block.
    pub(crate) fn embed_column(&self, item: &Item, token: usize) -> Result<Option<(Dtype, u32, usize)>, OpError> {
        let slot = self.held(item.slot, item.generation)?;
        let found = slot.ends.embed_column(item.rank_block as usize, token);
        Ok(found.map(|(unit, place)| (slot.dtype, unit, place)))
    }

    /// Storage type of an item's adapter, and where a token's row lies: unit, row in the block and its width.
    pub(crate) fn embed_row(&self, item: &Item, token: usize) -> Result<Option<(Dtype, u32, usize, usize)>, OpError> {
        let slot = self.held(item.slot, item.generation)?;
        Ok(slot.ends.embed_row(token).map(|(unit, row, width)| (slot.dtype, unit, row, width)))
    }

    /// Rows and width of what an item's adapter adds to the embedding; zeros if nothing.
    pub(crate) fn embed_extents(&self, item: &Item) -> Result<(usize, usize), OpError> {
        Ok(self.held(item.slot, item.generation)?.ends.embed_extents())
    }

    /// Storage type and descriptor; `None` where the adapter leaves the matrix alone. For the head, `layer` is the tile.
    pub(crate) fn desc(&self, item: &Item, layer: usize, slice: Slice) -> Result<Option<(Dtype, Desc)>, OpError> {
        let slot = self.held(item.slot, item.generation)?;
        if !slice.is_in_layer() {
            let desc = slot.ends.desc(item.rank_block as usize, layer, slice);
            return Ok(desc.map(|desc| (slot.dtype, desc)));
        }
        at_most("lora", "layer + 1", layer + 1, slot.layers)?;
        let index = (item.rank_block as usize * slot.layers + layer) * SLICES + slice as usize;
        let stale = OpError::Stale { slot: item.slot, generation: item.generation };
        let desc = *slot.descs.get(index).ok_or(stale)?; // absent if other content came under the same generation
        Ok((desc != ABSENT).then_some((slot.dtype, desc)))
    }

    fn held(&self, slot: u32, generation: u64) -> Result<&Slot, OpError> {
        let held = self.slots.get(slot as usize).filter(|held| held.generation == Some(generation));
        held.ok_or(OpError::Stale { slot, generation })
    }
}
