//! Which slot holds which adapter, and where its blocks lie in the arena.

use super::image::{AdapterImage, Entry, ImageLayout};
use super::{SLICES, Slice};
use crate::arena::{Arena, UNIT_BYTES};
use crate::dtype::ArenaDtype;
use crate::error::{OpError, at_most, same};

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

/// The adapter leaves this matrix, or this rank block of it, alone.
const ABSENT: Desc = Desc { a_unit: u32::MAX, b_unit: u32::MAX, scale: 0.0, d_in: 0, d_out: 0 };

/// Contents of a slot; the vector keeps its memory when the slot changes hands.
#[derive(Clone, Debug)]
struct Slot {
    /// `None`: empty.
    generation: Option<u64>,
    dtype: ArenaDtype,
    layers: usize,
    rank_blocks: usize,
    /// `[rank block][layer][slice]`
    descs: Vec<Desc>,
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
        let empty = Slot { generation: None, dtype: ArenaDtype::F32, layers: 0, rank_blocks: 0, descs: Vec::new() };
        Self { slots: vec![empty; slots_max] }
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
        for &Entry { rank_block, layer, slice, a, b, d_in, d_out, scale } in &image.entries {
            slot.descs[(rank_block * image.layers + layer) * SLICES + slice as usize] =
                Desc { a_unit: to_unit(a), b_unit: to_unit(b), scale, d_in: d_in as u32, d_out: d_out as u32 };
        }
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

    /// Storage type and descriptor; `None` where the adapter leaves the matrix alone.
    pub(crate) fn desc(
        &self,
        item: &super::work::Item,
        layer: usize,
        slice: Slice,
    ) -> Result<Option<(ArenaDtype, Desc)>, OpError> {
        let slot = self.held(item.slot, item.generation)?;
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
