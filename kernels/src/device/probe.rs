//! What a device reaches on plain work, for `loramux doctor`: figures to hold the model's speed against.

use std::rc::Rc;

use super::check::Random;
use super::{DeviceBuffer, DeviceError, Elem, Event, GemmOut, GemmShape, Priority, SharedDevice, Stream};

/// Elements of random data that are drawn on the host; the device repeats them.
const DRAWN: usize = 1 << 16;

/// Rate of copies of `bytes` on the device, in GB/s (10^9 bytes), read and written bytes together. Takes twice `bytes` of
/// memory, which should be much more than its caches hold.
///
/// # Errors
/// [`DeviceError`] of the driver.
pub fn copy_gb_per_s(device: &SharedDevice, bytes: usize, runs: usize) -> Result<f64, DeviceError> {
    let timer = Timer::new(device)?;
    let (from, to) = (DeviceBuffer::new(device, bytes)?, DeviceBuffer::new(device, bytes)?);
    from.fill(timer.stream, 0x3c)?;
    let seconds = timer.seconds(runs, || {
        // SAFETY: both buffers have `bytes`, and the timer waits before they go.
        unsafe { device.copy(timer.stream, to.address(), from.address(), bytes) }
    })?;
    Ok(2.0 * bytes as f64 / seconds / 1e9)
}

/// Rate of a product on random data, in TFLOP/s (10^12, a multiply-add counted as two).
///
/// # Errors
/// [`DeviceError`] of the driver or the library.
pub fn gemm_tflop_per_s(device: &SharedDevice, shape: GemmShape, runs: usize) -> Result<f64, DeviceError> {
    let timer = Timer::new(device)?;
    let GemmShape { rows, d_out, d_in, out, .. } = shape;
    let x = random(device, timer.stream, shape.elem, rows * d_in)?;
    let weight = random(device, timer.stream, shape.elem, d_out * d_in)?;
    let y = DeviceBuffer::new(device, rows * d_out * if out == GemmOut::F32 { 4 } else { 2 })?;
    let plan = device.gemm_plan(shape)?;
    let seconds = timer.seconds(runs, || {
        // SAFETY: the buffers are what the shape says, and the timer waits before they go.
        unsafe { device.gemm(timer.stream, plan, y.address(), x.address(), weight.address()) }
    })?;
    Ok(2.0 * (rows * d_out * d_in) as f64 / seconds / 1e12)
}

/// Device memory with `count` random elements in -1..1: the power that a GPU draws, and so its clock, depends on the data.
///
/// # Errors
/// [`DeviceError`] of the driver.
pub fn random(device: &SharedDevice, stream: Stream, elem: Elem, count: usize) -> Result<DeviceBuffer, DeviceError> {
    let buffer = DeviceBuffer::new(device, count * 2)?;
    let drawn = Random::new(count as u64).elems(elem, count.min(DRAWN), 1.0);
    buffer.write(stream, 0, &drawn)?;
    let mut filled = drawn.len();
    while filled < count {
        let more = filled.min(count - filled);
        // SAFETY: `more` elements behind the `filled` first ones are inside the buffer and do not overlap them.
        unsafe { device.copy(stream, buffer.address() + filled as u64 * 2, buffer.address(), more * 2)? };
        filled += more;
    }
    Ok(buffer)
}

struct Timer {
    device: SharedDevice,
    stream: Stream,
    start: Event,
    end: Event,
}

impl Timer {
    fn new(device: &SharedDevice) -> Result<Self, DeviceError> {
        Ok(Self {
            stream: device.stream(Priority::High)?,
            start: device.timed_event()?,
            end: device.timed_event()?,
            device: Rc::clone(device),
        })
    }

    /// Seconds of one run, after one that is not counted. Waits for all of them, whatever happens.
    fn seconds(&self, runs: usize, run: impl Fn() -> Result<(), DeviceError>) -> Result<f64, DeviceError> {
        let runs = runs.max(1);
        let given = (|| {
            run()?;
            self.device.record(self.start, self.stream)?;
            (0..runs).try_for_each(|_| run())
        })();
        self.device.record(self.end, self.stream)?;
        self.device.synchronize(self.end)?;
        given?;
        let seconds = f64::from(self.device.elapsed_ms(self.start, self.end)?) / 1e3;
        Ok(seconds.max(1e-9) / runs as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::testing::emulator_with;
    use crate::device::{Asynchrony, Schedule};

    #[test]
    fn rates_are_positive_and_finite_on_the_emulator() {
        let device: SharedDevice = Rc::new(emulator_with(Schedule::RoundRobin, false, Asynchrony::Lazy(1)));
        let copy = copy_gb_per_s(&device, 4 << 20, 4).unwrap();
        assert!(copy.is_finite() && copy > 0.01, "{copy} GB/s");
        let shape = GemmShape { rows: 16, d_out: 512, d_in: 384, elem: Elem::Bf16, out: GemmOut::F32 };
        let product = gemm_tflop_per_s(&device, shape, 2).unwrap();
        assert!(product.is_finite() && product > 1e-6, "{product} TFLOP/s");
    }

    #[test]
    fn random_data_fills_every_element() {
        let device: SharedDevice = Rc::new(emulator_with(Schedule::RoundRobin, false, Asynchrony::Eager));
        let stream = device.stream(Priority::High).unwrap();
        let count = 3 * DRAWN + 17;
        let values: Vec<u16> = random(&device, stream, Elem::F16, count).unwrap().read(stream, 0, count).unwrap();
        assert!(values.iter().all(|&bits| Elem::F16.from_bits(bits).abs() <= 1.0), "new memory is NaN");
        assert_eq!(values[DRAWN..2 * DRAWN], values[..DRAWN]);
    }
}
