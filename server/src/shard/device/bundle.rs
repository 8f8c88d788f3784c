//! The lists of a step on their way to the device: packed into page-locked memory, spread over their places by one launch.

use loramux_kernels::cuda::{BundleSection, UnpackKernel};
use loramux_kernels::device::{Address, DeviceBuffer, DeviceError, Event, HostBuffer, HostUse, SharedDevice, Stream};

use super::super::run::ShardFault;

/// Bundles that may be on their way at once, one more than steps in flight.
const RING: usize = 3;

/// Lists of a step, by what kernels call them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum List {
    Counts,
    Tokens,
    Positions,
    KvSlots,
    RowTiles,
    Items,
    DecodeUnits,
    PrefillTiles,
    BlockTable,
    LogitRows,
    SampleRows,
    Edits,
    Masks,
}

const LISTS: usize = 13;

/// Fixed places of the lists on the device, and the ring of page-locked bundles.
#[derive(Debug)]
pub(super) struct Bundles {
    places: Vec<DeviceBuffer>,
    ring: Vec<(HostBuffer<u8>, Option<Event>)>,
    next: usize,
    unpack: UnpackKernel,
    device: SharedDevice,
}

/// A bundle being packed.
pub(super) struct Packing<'a> {
    bundles: &'a mut Bundles,
    used: usize,
    sections: Vec<BundleSection>,
}

impl Bundles {
    /// Takes `capacities` bytes for each list.
    pub(super) fn new(
        device: &SharedDevice,
        unpack: UnpackKernel,
        capacities: [usize; LISTS],
    ) -> Result<Self, DeviceError> {
        let room = capacities.map(|bytes| bytes.next_multiple_of(16));
        let places = room.iter().map(|&bytes| DeviceBuffer::new(device, bytes.max(16))).collect::<Result<_, _>>()?;
        let total = room.iter().sum();
        let ring = (0..RING)
            .map(|_| Ok((HostBuffer::new(device, total, HostUse::Upload)?, None)))
            .collect::<Result<_, DeviceError>>()?;
        Ok(Self { places, ring, next: 0, unpack, device: device.clone() })
    }

    /// Where a list lies.
    pub(super) fn place(&self, list: List) -> Address {
        self.places[list as usize].address()
    }

    /// Begins the next bundle. Waits only if more steps are in flight than were promised.
    pub(super) fn begin(&mut self) -> Result<Packing<'_>, ShardFault> {
        if let Some(sent) = self.ring[self.next].1 {
            self.device.synchronize(sent)?;
        }
        Ok(Packing { bundles: self, used: 0, sections: Vec::with_capacity(LISTS) })
    }
}

impl Packing<'_> {
    /// Adds a list. One that has no room is a hard error: no kernel is launched.
    pub(super) fn push<T: Copy>(&mut self, list: List, values: &[T]) -> Result<(), ShardFault> {
        let bytes = size_of_val(values);
        let place = &self.bundles.places[list as usize];
        if bytes > place.bytes() {
            let room = place.bytes();
            return Err(ShardFault::Malformed(format!("{list:?} has {bytes} bytes, there is room for {room}")));
        }
        if bytes == 0 {
            return Ok(());
        }
        let to = place.address();
        let (ring, _) = &mut self.bundles.ring[self.bundles.next];
        // SAFETY: plain structs of integers and floats without padding, read as bytes.
        let values = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), bytes) };
        ring.as_mut_slice()[self.used..][..bytes].copy_from_slice(values);
        self.sections.push(BundleSection { to, from: self.used as u32, bytes: bytes as u32 });
        self.used += bytes.next_multiple_of(16);
        Ok(())
    }

    /// Sends it on `stream`, before what is launched next.
    pub(super) fn send(self, stream: Stream) -> Result<(), ShardFault> {
        let bundles = self.bundles;
        let next = bundles.next;
        let bundle = bundles.ring[next].0.as_ptr() as Address;
        // SAFETY: the sections were packed into this bundle and fit their places; the host leaves it alone until the event
        // that is recorded below has come.
        unsafe { bundles.unpack.launch(&*bundles.device, stream, bundle, &self.sections)? };
        let event = match bundles.ring[next].1 {
            Some(event) => event,
            None => bundles.device.event()?,
        };
        bundles.device.record(event, stream)?;
        bundles.ring[next].1 = Some(event);
        bundles.next = (next + 1) % RING;
        Ok(())
    }
}
