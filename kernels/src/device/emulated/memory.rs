//! Memory of the emulated device: ordinary memory, with what is freed kept aside for a while so that late uses show.

use std::alloc::Layout;
use std::collections::{BTreeMap, VecDeque};

use super::super::DeviceError;

/// What new and freed memory is filled with: NaN in every float type.
const POISON: u8 = 0xff;

/// Most bytes of one allocation that are filled: an arena may be larger than the machine has pages for.
const POISON_BYTES_MAX: usize = 64 << 20;

/// Most bytes of freed memory that are kept aside while nothing is queued.
const ASIDE_BYTES_MAX: usize = 64 << 20;

#[derive(Debug)]
struct Block {
    layout: Layout,
    place: Place,
    is_freed: bool,
}

/// Whose memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Device memory.
    Device,
    /// Page-locked host memory.
    Host,
}

/// All blocks, by address.
#[derive(Debug, Default)]
pub(super) struct Memory {
    blocks: BTreeMap<u64, Block>,
    aside: VecDeque<u64>,
    aside_bytes: usize,
    device_bytes: usize,
}

impl Memory {
    /// Bytes of device memory in use.
    pub(super) const fn device_bytes(&self) -> usize {
        self.device_bytes
    }

    /// Takes memory, filled with NaN; the host's is zeroed.
    pub(super) fn alloc(&mut self, bytes: usize, place: Place, bytes_max: u64) -> Result<u64, DeviceError> {
        let name = if place == Place::Device { "device" } else { "page-locked host" };
        let refused = || DeviceError::OutOfMemory { place: name, bytes };
        let layout = Layout::from_size_align(bytes.max(1), 256).map_err(|_| refused())?;
        if place == Place::Device && (self.device_bytes + layout.size()) as u64 > bytes_max {
            return Err(refused());
        }
        // SAFETY: the size is not zero.
        let pointer = unsafe {
            match place {
                Place::Device => std::alloc::alloc(layout),
                Place::Host => std::alloc::alloc_zeroed(layout),
            }
        };
        if pointer.is_null() {
            return Err(refused());
        }
        if place == Place::Device {
            self.device_bytes += layout.size();
            // SAFETY: just allocated with at least this size.
            unsafe { std::ptr::write_bytes(pointer, POISON, layout.size().min(POISON_BYTES_MAX)) };
        }
        self.blocks.insert(pointer as u64, Block { layout, place, is_freed: false });
        Ok(pointer as u64)
    }

    /// Poisons memory and keeps it aside, so that its address is not given out again soon. An address that is none of ours
    /// is left alone.
    pub(super) fn free(&mut self, address: u64) {
        let Some(block) = self.blocks.get_mut(&address).filter(|block| !block.is_freed) else { return };
        block.is_freed = true;
        if block.place == Place::Device {
            self.device_bytes -= block.layout.size();
        }
        self.aside_bytes += block.layout.size();
        self.aside.push_back(address);
        // SAFETY: the block is allocated with this size; its owner has given it up.
        unsafe { std::ptr::write_bytes(address as *mut u8, POISON, block.layout.size().min(POISON_BYTES_MAX)) };
    }

    /// Gives the oldest freed blocks back to the machine. Only while no work is queued.
    pub(super) fn trim(&mut self) {
        while self.aside_bytes > ASIDE_BYTES_MAX {
            let Some(address) = self.aside.pop_front() else { return };
            if let Some(block) = self.blocks.remove(&address) {
                self.aside_bytes -= block.layout.size();
                // SAFETY: allocated with this layout in `alloc`.
                unsafe { std::alloc::dealloc(address as *mut u8, block.layout) };
            }
        }
    }

    /// Checks a range of device memory.
    pub(super) fn check_device(&self, what: &str, at: u64, bytes: usize) -> Result<(), DeviceError> {
        match self.block_of(at) {
            Some((_, block)) if block.place == Place::Host => fault(what, "takes host memory for the device's"),
            Some((begin, block)) => check_block(what, begin, block, at, bytes),
            None => fault(what, &format!("uses {at:#x}, which is no device memory")),
        }
    }

    /// Checks a range of host memory. What the device did not give out is the caller's own.
    pub(super) fn check_host(&self, what: &str, at: u64, bytes: usize) -> Result<(), DeviceError> {
        match self.block_of(at) {
            Some((_, block)) if block.place == Place::Device => fault(what, "takes device memory for the host's"),
            Some((begin, block)) => check_block(what, begin, block, at, bytes),
            None => Ok(()),
        }
    }

    /// Checks that no word of an argument struct points into freed memory.
    pub(super) fn check_args(&self, what: &str, args: &[u64]) -> Result<(), DeviceError> {
        for &word in args {
            if self.block_of(word).is_some_and(|(_, block)| block.is_freed) {
                return fault(what, "uses memory that was freed while the work was queued or before");
            }
        }
        Ok(())
    }

    /// The block that an address is in.
    fn block_of(&self, at: u64) -> Option<(u64, &Block)> {
        let (begin, block) = self.blocks.range(..=at).next_back()?;
        (at - begin < block.layout.size() as u64).then_some((*begin, block))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (address, block) in &self.blocks {
            // SAFETY: allocated with this layout in `alloc`; the device that lent it is going.
            unsafe { std::alloc::dealloc(*address as *mut u8, block.layout) };
        }
    }
}

fn check_block(what: &str, begin: u64, block: &Block, at: u64, bytes: usize) -> Result<(), DeviceError> {
    if block.is_freed {
        return fault(what, "uses memory that was freed while the work was queued or before");
    }
    let room = block.layout.size() - (at - begin) as usize;
    if bytes > room {
        return fault(what, &format!("takes {bytes} bytes where {room} are left of {}", block.layout.size()));
    }
    Ok(())
}

fn fault(what: &str, text: &str) -> Result<(), DeviceError> {
    Err(DeviceError::Emulated(format!("{what} {text}")))
}
