//! The op on a device.

use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static RMS_NORM: KernelSource = KernelSource { file: "rms_norm.cu", text: include_str!("rms_norm.cu") };

const THREADS: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    residual: Address,
    y: Address,
    weight: Address,
    out: Address,
    rows: u32,
    eps: f32,
}

/// Where the op's data lies.
#[derive(Clone, Copy, Debug)]
pub struct RmsNormBuffers {
    /// `[rows, width]`, the model's type; written if there is `y`.
    pub residual: Address,
    /// `[rows, width]`, the model's type: added to `residual` first, which is rounded to the model's type.
    pub y: Option<Address>,
    /// `[width]` f32.
    pub weight: Address,
    /// `[rows, width]`, the model's type; written.
    pub out: Address,
}

/// `residual += y`, `out = norm(residual) * weight` on a device.
#[derive(Clone, Copy, Debug)]
pub struct RmsNormKernel {
    kernel: Kernel,
    eps: f32,
    /// Most blocks of a launch; any number is right.
    pub blocks_max: usize,
}

impl RmsNormKernel {
    /// The program for rows of `width` values.
    #[must_use]
    pub fn program(elem: Elem, width: usize) -> Program {
        Program::new::<Args>(&RMS_NORM, "rms_norm", THREADS, elem).define("NORM_WIDTH", width)
    }

    /// Loads it for rows of `width` values; `eps` is added to the mean of their squares.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if `width` is no multiple of 8, or zero; [`DeviceError`] of the compiler.
    pub fn load(device: &dyn Device, elem: Elem, width: usize, eps: f32) -> Result<Self, DeviceError> {
        if width == 0 || !width.is_multiple_of(8) {
            return Err(DeviceError::Unsupported(format!("rms_norm: width {width} is no multiple of 8")));
        }
        let blocks_max = device.info().multiprocessors as usize * 8;
        Ok(Self { kernel: device.load(&Self::program(elem, width))?, eps, blocks_max })
    }

    /// Norms `rows` rows.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// The addresses hold that much, nobody else uses what is written, and no two of them overlap.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        buffers: &RmsNormBuffers,
        rows: usize,
    ) -> Result<(), DeviceError> {
        let RmsNormBuffers { residual, y, weight, out } = *buffers;
        let args = Args { residual, y: y.unwrap_or(0), weight, out, rows: rows as u32, eps: self.eps };
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(rows.min(self.blocks_max)), 0, &args) }
    }
}
