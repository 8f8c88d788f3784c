//! The op on a device.

use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static SILU_MUL: KernelSource = KernelSource { file: "silu_mul.cu", text: include_str!("silu_mul.cu") };

const THREADS: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    gate_up: Address,
    out: Address,
    rows: u32,
    width: u32,
}

/// `out = silu(gate) * up` on a device.
#[derive(Clone, Copy, Debug)]
pub struct SiluMulKernel {
    kernel: Kernel,
    width: usize,
    blocks_max: usize,
}

impl SiluMulKernel {
    /// The program.
    #[must_use]
    pub fn program(elem: Elem) -> Program {
        Program::new::<Args>(&SILU_MUL, "silu_mul", THREADS, elem)
    }

    /// Loads it for rows of `width` outputs.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if `width` is no multiple of 8; [`DeviceError`] of the compiler.
    pub fn load(device: &dyn Device, elem: Elem, width: usize) -> Result<Self, DeviceError> {
        if !width.is_multiple_of(8) {
            return Err(DeviceError::Unsupported(format!("silu_mul: width {width} is no multiple of 8")));
        }
        let blocks_max = device.info().multiprocessors as usize * 8;
        Ok(Self { kernel: device.load(&Self::program(elem))?, width, blocks_max })
    }

    /// `gate_up: [rows, 2 * width]` to `out: [rows, width]`.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// The addresses hold that much, and nobody else uses `out`.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        out: Address,
        gate_up: Address,
        rows: usize,
    ) -> Result<(), DeviceError> {
        let args = Args { gate_up, out, rows: rows as u32, width: self.width as u32 };
        let blocks = (rows * self.width / 8).div_ceil(THREADS as usize).min(self.blocks_max);
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(blocks), 0, &args) }
    }
}
