//! Memory that is given back when it is dropped.

use std::marker::PhantomData;

use super::{Address, DeviceError, HostUse, SharedDevice, Stream};

/// Device memory. Whoever drops it knows that no work uses it any more.
#[derive(Debug)]
pub struct DeviceBuffer {
    device: SharedDevice,
    address: Address,
    bytes: usize,
}

impl DeviceBuffer {
    /// Takes `bytes` of undefined content.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn new(device: &SharedDevice, bytes: usize) -> Result<Self, DeviceError> {
        let address = device.alloc(bytes.max(1))?;
        Ok(Self { device: device.clone(), address, bytes })
    }

    /// Takes memory for `values`, copies them and waits.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn of<T: Copy>(device: &SharedDevice, stream: Stream, values: &[T]) -> Result<Self, DeviceError> {
        let buffer = Self::new(device, size_of_val(values))?;
        buffer.write(stream, 0, values)?;
        Ok(buffer)
    }

    /// Where it begins.
    #[must_use]
    pub const fn address(&self) -> Address {
        self.address
    }

    /// Its size.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `values` to byte `at` and waits. For start-up and tests.
    ///
    /// # Errors
    /// [`DeviceError`]; [`DeviceError::Unsupported`] if they do not fit.
    pub fn write<T: Copy>(&self, stream: Stream, at: usize, values: &[T]) -> Result<(), DeviceError> {
        self.check(at, size_of_val(values))?;
        if values.is_empty() {
            return Ok(());
        }
        let event = self.device.event()?;
        // SAFETY: the range is inside this buffer, and the host waits before `values` can go.
        unsafe {
            self.device.upload(stream, self.address + at as u64, values.as_ptr().cast(), size_of_val(values))?;
        }
        self.device.record(event, stream)?;
        self.device.synchronize(event)
    }

    /// Copies `count` values from byte `at` and waits. For start-up and tests; `T` must take any bits.
    ///
    /// # Errors
    /// [`DeviceError`]; [`DeviceError::Unsupported`] if the range is not inside.
    pub fn read<T: Copy + Default>(&self, stream: Stream, at: usize, count: usize) -> Result<Vec<T>, DeviceError> {
        self.check(at, count * size_of::<T>())?;
        let mut values = vec![T::default(); count];
        let event = self.device.event()?;
        // SAFETY: the range is inside this buffer, and the host waits before `values` is used.
        unsafe {
            let to = values.as_mut_ptr().cast();
            self.device.download(stream, to, self.address + at as u64, count * size_of::<T>())?;
        }
        self.device.record(event, stream)?;
        self.device.synchronize(event)?;
        Ok(values)
    }

    /// Sets every byte and waits.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn fill(&self, stream: Stream, byte: u8) -> Result<(), DeviceError> {
        let event = self.device.event()?;
        // SAFETY: the whole of this buffer.
        unsafe { self.device.fill(stream, self.address, byte, self.bytes)? };
        self.device.record(event, stream)?;
        self.device.synchronize(event)
    }

    fn check(&self, at: usize, bytes: usize) -> Result<(), DeviceError> {
        if at.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(DeviceError::Unsupported(format!("{bytes} bytes at {at} of a buffer of {}", self.bytes)));
        }
        Ok(())
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: taken in `new`; the owner knows that no work uses it any more.
        unsafe { self.device.free(self.address) }
    }
}

/// Page-locked host memory of `len` values.
#[derive(Debug)]
pub struct HostBuffer<T: Copy> {
    device: SharedDevice,
    pointer: *mut u8,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Copy> HostBuffer<T> {
    /// Takes memory for `len` zeroed values; `T` must take any bits.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn new(device: &SharedDevice, len: usize, purpose: HostUse) -> Result<Self, DeviceError> {
        let pointer = device.alloc_host((len * size_of::<T>()).max(1), purpose)?;
        Ok(Self { device: device.clone(), pointer, len, of: PhantomData })
    }

    /// For [`Device::upload`](super::Device::upload) and [`Device::download`](super::Device::download).
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.pointer
    }

    /// The values. The caller has waited for the work that writes them.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `len` initialised values, aligned to 256 bytes.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.len) }
    }

    /// The values. The caller has waited for the work that reads or writes them.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and `&mut self` makes the host's access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.len) }
    }
}

impl<T: Copy> Drop for HostBuffer<T> {
    fn drop(&mut self) {
        // SAFETY: taken in `new`; the owner knows that no work uses it any more.
        unsafe { self.device.free_host(self.pointer) }
    }
}
