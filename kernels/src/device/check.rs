//! Checks of the kernels against their plain definitions, on any device: in tests on the emulator, in `loramux doctor` on
//! the machine's GPU.

use super::{DeviceBuffer, DeviceError, Elem, SharedDevice, Stream};
use half::{bf16, f16};

/// How much to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Seconds on a GPU: for `doctor` at a user's.
    Quick,
    /// Everything.
    Full,
}

/// Why a check failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A value is wrong.
    #[error("{0}")]
    Wrong(String),
}

/// What a check found.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Launches that were compared.
    pub cases: usize,
    /// Largest error, in the check's own unit.
    pub worst: f64,
    /// That unit, such as `of sum |x a|`.
    pub unit: &'static str,
}

/// A check of one op.
#[derive(Clone, Copy)]
pub struct OpCheck {
    /// The op's folder.
    pub name: &'static str,
    /// Runs it.
    pub run: fn(&Checker) -> Result<Summary, CheckError>,
}

/// What a check works with.
#[derive(Debug)]
pub struct Checker {
    /// The device.
    pub device: SharedDevice,
    /// The stream it uses.
    pub stream: Stream,
    /// How much to check.
    pub effort: Effort,
}

impl Checker {
    /// A checker for a device.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    pub fn new(device: SharedDevice, effort: Effort) -> Result<Self, DeviceError> {
        let stream = device.stream(super::Priority::High)?;
        Ok(Self { device, stream, effort })
    }

    /// Device memory that holds `values`.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn buffer<T: Copy>(&self, values: &[T]) -> Result<DeviceBuffer, DeviceError> {
        DeviceBuffer::of(&self.device, self.stream, values)
    }

    /// Device memory of `bytes` bytes that are all 0xff, which is NaN in every float type.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn poisoned(&self, bytes: usize) -> Result<DeviceBuffer, DeviceError> {
        let buffer = DeviceBuffer::new(&self.device, bytes)?;
        buffer.fill(self.stream, 0xff)?;
        Ok(buffer)
    }

    /// Waits for the stream.
    ///
    /// # Errors
    /// A [`DeviceError`] of what was launched.
    pub fn wait(&self) -> Result<(), DeviceError> {
        let event = self.device.event()?;
        self.device.record(event, self.stream)?;
        self.device.synchronize(event)
    }
}

/// Fails with a message unless `ok`.
///
/// # Errors
/// [`CheckError::Wrong`].
pub fn expect(ok: bool, message: impl FnOnce() -> String) -> Result<(), CheckError> {
    if ok { Ok(()) } else { Err(CheckError::Wrong(message())) }
}

impl Elem {
    /// Bits of the nearest value (ties to even).
    #[must_use]
    pub fn to_bits(self, value: f32) -> u16 {
        match self {
            Self::Bf16 => bf16::from_f32(value).to_bits(),
            Self::F16 => f16::from_f32(value).to_bits(),
        }
    }

    /// The value of bits.
    #[must_use]
    pub fn from_bits(self, bits: u16) -> f32 {
        match self {
            Self::Bf16 => bf16::from_bits(bits).to_f32(),
            Self::F16 => f16::from_bits(bits).to_f32(),
        }
    }

    /// Distance between 1 and the next value.
    #[must_use]
    pub const fn epsilon(self) -> f64 {
        match self {
            Self::Bf16 => 1.0 / 128.0,
            Self::F16 => 1.0 / 1024.0,
        }
    }
}

/// A small seeded generator: the checks need reproducible, not good, numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Begins a sequence.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678_9abc_def1)
    }

    /// The next word (SplitMix64).
    pub const fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound`.
    pub const fn below(&mut self, bound: usize) -> usize {
        (self.word() % bound as u64) as usize
    }

    /// Uniform in -1..1.
    pub fn uniform(&mut self) -> f32 {
        ((self.word() >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }

    /// Bits of uniform values in -1..1 times `scale`.
    pub fn elems(&mut self, elem: Elem, count: usize, scale: f32) -> Vec<u16> {
        (0..count).map(|_| elem.to_bits(self.uniform() * scale)).collect()
    }
}
