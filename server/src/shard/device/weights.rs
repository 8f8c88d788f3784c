//! Base weights in device memory: row-major, in the model's 16-bit type.

use loramux_kernels::device::{DeviceBuffer, DeviceError, Elem, Event, HostBuffer, HostUse, SharedDevice, Stream};
use loramux_kernels::{HostData, OpError, WeightPart};
use loramux_models::{ModelError, WeightStore};

/// Values converted and sent at a time.
const STAGE_VALUES: usize = 8 << 20;

/// Outputs of a weight matrix are rounded up to this in memory.
pub(super) const OUTPUTS_MULTIPLE: usize = 16;

/// Sends weights to a device, converting one half of a staging buffer while the other is copied.
pub(super) struct DeviceStore {
    device: SharedDevice,
    stream: Stream,
    elem: Elem,
    stages: [(HostBuffer<u16>, Event); 2],
    next: usize,
}

impl DeviceStore {
    pub(super) fn new(device: &SharedDevice, stream: Stream, elem: Elem) -> Result<Self, DeviceError> {
        let stage = || Ok((HostBuffer::new(device, STAGE_VALUES, HostUse::Upload)?, device.event()?));
        Ok(Self { device: device.clone(), stream, elem, stages: [stage()?, stage()?], next: 0 })
    }

    fn send(&mut self, to: &DeviceBuffer, at: usize, data: HostData) -> Result<(), DeviceError> {
        for first in (0..data.len()).step_by(STAGE_VALUES) {
            let count = (data.len() - first).min(STAGE_VALUES);
            let (stage, sent) = &mut self.stages[self.next];
            self.device.synchronize(*sent)?;
            convert(self.elem, &mut stage.as_mut_slice()[..count], data, first);
            let address = to.address() + ((at + first) * size_of::<u16>()) as u64;
            // SAFETY: `matrix` took memory for all parts; the stage is left alone until `sent` has come.
            unsafe { self.device.upload(self.stream, address, stage.as_ptr(), count * size_of::<u16>())? };
            self.device.record(*sent, self.stream)?;
            self.next = 1 - self.next;
        }
        Ok(())
    }
}

fn convert(elem: Elem, to: &mut [u16], from: HostData, first: usize) {
    match (elem, from) {
        (Elem::Bf16, HostData::Bf16(values)) => copy(to, &values[first..], |v| v.to_bits()),
        (Elem::F16, HostData::F16(values)) => copy(to, &values[first..], |v| v.to_bits()),
        (_, HostData::F32(values)) => copy(to, &values[first..], |v| elem.to_bits(*v)),
        (_, HostData::Bf16(values)) => copy(to, &values[first..], |v| elem.to_bits(v.to_f32())),
        (_, HostData::F16(values)) => copy(to, &values[first..], |v| elem.to_bits(v.to_f32())),
    }
}

fn copy<T>(to: &mut [u16], from: &[T], bits: impl Fn(&T) -> u16) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = bits(from);
    }
}

impl WeightStore for DeviceStore {
    type Matrix = DeviceBuffer;
    type Vector = DeviceBuffer;

    fn matrix(&mut self, parts: &[WeightPart]) -> Result<(DeviceBuffer, u64), ModelError> {
        let shape = |what, got, want| Err(OpError::Shape { op: "device weights", what, got, want }.into());
        for part in parts {
            if part.data.len() != part.d_out.saturating_mul(part.d_in) || part.d_in != parts[0].d_in {
                return shape("elements of a part", part.data.len(), part.d_out.saturating_mul(part.d_in));
            }
        }
        let values: usize = parts.iter().map(|part| part.data.len()).sum();
        if values == 0 {
            return shape("elements", 0, 1);
        }
        // Rows of zeros behind the last: products may have more outputs than the model, for their rows' alignment.
        let padding = values.next_multiple_of(parts[0].d_in * OUTPUTS_MULTIPLE) - values;
        let buffer = DeviceBuffer::new(&self.device, (values + padding) * size_of::<u16>())?;
        buffer.write(self.stream, values * size_of::<u16>(), &vec![0u16; padding])?;
        let mut at = 0;
        for part in parts {
            self.send(&buffer, at, part.data)?;
            at += part.data.len();
        }
        Ok((buffer, (values * size_of::<u16>()) as u64))
    }

    fn vector(&mut self, values: Vec<f32>) -> Result<DeviceBuffer, ModelError> {
        Ok(DeviceBuffer::of(&self.device, self.stream, &values)?)
    }
}

impl Drop for DeviceStore {
    fn drop(&mut self) {
        for (_, sent) in &self.stages {
            // An error shows again at the next call that can report it.
            let _ = self.device.synchronize(*sent);
        }
    }
}
