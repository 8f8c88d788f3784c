//! Which slot holds which adapter on the device, and the uploads that will change it.
//!
//! An upload is given to the copy stream, behind the last step that was launched (its pages may still be read until that
//! is done). At each step's boundary the host asks whether the copies are done, and only then do the descriptors go to the
//! device and the slot changes hands: a step never waits for a load.

use std::collections::VecDeque;
use std::sync::Arc;

use loramux_kernels::device::step::BlockDesc;
use loramux_kernels::device::{
    Address, DeviceBuffer, DeviceError, Event, HostBuffer, HostUse, Priority, SharedDevice, Stream,
};
use loramux_kernels::{OpError, SLICES};
use loramux_proto::{AdapterUpload, SlotGeneration};

use super::super::run::ShardFault;
use super::super::slab::SlabImage;

/// Bytes given to the copy stream in one piece, so that a step's own copies are not held up behind a large one.
const PIECE_BYTES: usize = 8 << 20;

/// Contents of a slot.
#[derive(Clone, Debug, Default)]
struct Slot {
    generation: Option<u64>,
    /// Rows of the descriptor table, one for each rank block.
    block_rows: Vec<u32>,
    /// Whether a descriptor names gains and shifts.
    has_vectors: bool,
}

/// Slots and the rows of the descriptor table that are free.
#[derive(Debug)]
pub(super) struct SlotTable {
    slots: Vec<Slot>,
    free_rows: Vec<u32>,
}

impl SlotTable {
    pub(super) fn new(slots_max: usize, rows_max: usize) -> Self {
        Self { slots: vec![Slot::default(); slots_max], free_rows: (0..rows_max as u32).rev().collect() }
    }

    /// Rows of the descriptor table of what `slot` holds; a stale generation is a hard error.
    pub(super) fn block_rows(&self, slot: u32, generation: u64) -> Result<&[u32], ShardFault> {
        let held = self.slots.get(slot as usize).filter(|held| held.generation == Some(generation));
        let held = held.ok_or(OpError::Stale { slot, generation })?;
        Ok(&held.block_rows)
    }

    /// Whether what `slot` holds has gains and shifts.
    pub(super) fn has_vectors(&self, slot: u32) -> bool {
        self.slots.get(slot as usize).is_some_and(|held| held.has_vectors)
    }

    /// Takes rows for an adapter of `blocks` rank blocks. The slot's old content is gone from here on.
    pub(super) fn replace(&mut self, slot: u32, generation: u64, blocks: usize) -> Result<&[u32], ShardFault> {
        let missing = || ShardFault::Malformed(format!("upload into slot {slot}, which is not there"));
        let held = self.slots.get_mut(slot as usize).ok_or_else(missing)?;
        (held.generation, held.has_vectors) = (None, false);
        self.free_rows.append(&mut held.block_rows);
        if self.free_rows.len() < blocks {
            return Err(ShardFault::Malformed(format!("no room for the {blocks} rank blocks of slot {slot}")));
        }
        held.block_rows = self.free_rows.split_off(self.free_rows.len() - blocks);
        held.generation = Some(generation);
        Ok(&held.block_rows)
    }
}

/// An upload that the copy stream was given.
#[derive(Debug)]
struct Upload {
    slot: u32,
    generation: u64,
    /// Keeps the pages in host memory until they were copied.
    image: Arc<SlabImage>,
    pages: Vec<u32>,
    done: Event,
}

/// Rank blocks whose descriptors may be on their way at once; an adapter has at most as many (rank 4096).
const STAGED_ROWS_MAX: usize = 256;

/// Adapters on one device.
#[derive(Debug)]
pub(super) struct DeviceAdapters {
    pub(super) table: SlotTable,
    /// `[block row][layer][slice]`
    descs: DeviceBuffer,
    row_descs: usize,
    uploads: VecDeque<Upload>,
    copy_stream: Stream,
    /// Events that nobody waits for.
    spare_events: Vec<Event>,
    /// Descriptors on their way to the device: rows of `staging`, and when they have arrived.
    staging: HostBuffer<BlockDesc>,
    staged: VecDeque<(usize, Event)>,
    /// Rows in use, from `staging_next` backwards.
    staging_used: usize,
    staging_next: usize,
    device: SharedDevice,
}

/// Where adapters lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct ArenaPlace {
    pub(super) address: Address,
    pub(super) pages: usize,
}

impl DeviceAdapters {
    pub(super) fn new(
        device: &SharedDevice,
        slots_max: usize,
        rows_max: usize,
        layers: usize,
    ) -> Result<Self, DeviceError> {
        let row_descs = layers * SLICES;
        Ok(Self {
            table: SlotTable::new(slots_max, rows_max),
            descs: DeviceBuffer::new(device, rows_max * row_descs * size_of::<BlockDesc>())?,
            row_descs,
            uploads: VecDeque::new(),
            copy_stream: device.stream(Priority::Low)?,
            spare_events: Vec::new(),
            staging: HostBuffer::new(device, STAGED_ROWS_MAX * row_descs, HostUse::Upload)?,
            staged: VecDeque::new(),
            staging_used: 0,
            staging_next: 0,
            device: device.clone(),
        })
    }

    /// Where pages are copied.
    pub(super) fn copy_stream(&self) -> Stream {
        self.copy_stream
    }

    /// The descriptor table.
    pub(super) fn descs(&self) -> Address {
        self.descs.address()
    }

    /// Gives an upload to the copy stream, behind `after`.
    pub(super) fn begin(
        &mut self,
        upload: &AdapterUpload,
        image: Arc<SlabImage>,
        arena: ArenaPlace,
        after: Option<Event>,
    ) -> Result<(), ShardFault> {
        let fits =
            upload.pages.len() == image.pages_needed() && upload.pages.iter().all(|p| (*p as usize) < arena.pages);
        if !fits {
            return Err(ShardFault::Malformed(format!("upload into slot {}: wrong pages", upload.slot)));
        }
        // From now on the slot's old content may be overwritten: nobody may name it.
        if let Some(slot) = self.table.slots.get_mut(upload.slot as usize) {
            slot.generation = None;
        }
        if let Some(after) = after {
            self.device.wait(self.copy_stream, after)?;
        }
        let page_bytes = image.page_bytes();
        for (index, &page) in upload.pages.iter().enumerate() {
            for at in (0..page_bytes).step_by(PIECE_BYTES) {
                let bytes = (page_bytes - at).min(PIECE_BYTES);
                let to = arena.address + (page as usize * page_bytes + at) as u64;
                // SAFETY: the page lies in the arena; the image stays in host memory, unchanged, until `done` has come.
                unsafe { self.device.upload(self.copy_stream, to, image.page(index)[at..].as_ptr(), bytes)? };
            }
        }
        let done = self.take_event()?;
        self.device.record(done, self.copy_stream)?;
        let (slot, generation) = (upload.slot, upload.generation);
        self.uploads.push_back(Upload { slot, generation, image, pages: upload.pages.clone(), done });
        Ok(())
    }

    /// Publishes the uploads that are done: their descriptors go to the device on `stream`, before what is launched next.
    pub(super) fn publish(&mut self, stream: Stream) -> Result<Vec<SlotGeneration>, ShardFault> {
        self.reclaim()?;
        let mut published = Vec::new();
        while let Some(upload) = self.uploads.front() {
            if !self.device.is_done(upload.done)? {
                break;
            }
            let descs = upload.image.block_descs(&upload.pages)?;
            if descs.len() > STAGED_ROWS_MAX {
                return Err(ShardFault::Malformed(format!("an adapter of {} rank blocks", descs.len())));
            }
            if self.staging_used + descs.len() > STAGED_ROWS_MAX {
                break; // the rows of earlier steps have not arrived yet: the next step's boundary will do
            }
            let Some(upload) = self.uploads.pop_front() else { break };
            // The copies are done; this makes the step's stream see them, and costs nothing.
            self.device.wait(stream, upload.done)?;
            self.spare_events.push(upload.done);
            self.stage(stream, &upload, &descs)?;
            published.push(SlotGeneration { slot: upload.slot, generation: upload.generation });
        }
        Ok(published)
    }

    /// Gives the slot its rows of the table and copies them.
    fn stage(&mut self, stream: Stream, upload: &Upload, descs: &[Vec<BlockDesc>]) -> Result<(), ShardFault> {
        self.table.replace(upload.slot, upload.generation, descs.len())?;
        let Some(held) = self.table.slots.get_mut(upload.slot as usize) else { return Ok(()) };
        held.has_vectors = descs.iter().flatten().any(|desc| desc.vectors != 0);
        let rows = &held.block_rows;
        let row_bytes = self.row_descs * size_of::<BlockDesc>();
        for (&row, descs) in rows.iter().zip(descs) {
            let at = self.staging_next * self.row_descs;
            self.staging.as_mut_slice()[at..][..self.row_descs].copy_from_slice(descs);
            let to = self.descs.address() + u64::from(row) * row_bytes as u64;
            // SAFETY: the row is inside the table; its part of the staging buffer is kept until the event below has come.
            unsafe {
                let from = self.staging.as_ptr().add(at * size_of::<BlockDesc>());
                self.device.upload(stream, to, from, row_bytes)?;
            }
            self.staging_next = (self.staging_next + 1) % STAGED_ROWS_MAX;
        }
        let sent = self.take_event()?;
        self.device.record(sent, stream)?;
        self.staging_used += descs.len();
        self.staged.push_back((descs.len(), sent));
        Ok(())
    }

    /// Takes back staging rows that have arrived.
    fn reclaim(&mut self) -> Result<(), ShardFault> {
        while let Some(&(rows, sent)) = self.staged.front() {
            if !self.device.is_done(sent)? {
                break;
            }
            self.staged.pop_front();
            self.staging_used -= rows;
            self.spare_events.push(sent);
        }
        Ok(())
    }

    fn take_event(&mut self) -> Result<Event, DeviceError> {
        match self.spare_events.pop() {
            Some(event) => Ok(event),
            None => self.device.event(),
        }
    }
}
