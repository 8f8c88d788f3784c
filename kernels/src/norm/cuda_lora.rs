//! The residual's sum and norm with a LoRA delta on a device.

use super::cuda::RmsNormBuffers;
use crate::device::lora::{DECODE_TILE_ROWS, SiteShape, SiteWork};
use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static ADD_RMS_NORM_LORA: KernelSource =
    KernelSource { file: "add_rms_norm_lora.cu", text: include_str!("add_rms_norm_lora.cu") };

const THREADS: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    site: SiteWork,
    residual: Address,
    y: Address,
    weight: Address,
    out: Address,
    eps: f32,
    reserved: u32,
}

/// `residual += y + its delta`, `out = norm(residual) * weight` on a device, for steps that only decode: expand, sum and
/// norm in one.
#[derive(Clone, Copy, Debug)]
pub struct AddRmsNormLoraKernel {
    kernel: Kernel,
    eps: f32,
    /// Blocks of a launch; any number gives the same bits.
    pub blocks: usize,
}

impl AddRmsNormLoraKernel {
    /// The program for rows of `width` values and a site with `d_in` inputs.
    #[must_use]
    pub fn program(elem: Elem, d_in: usize, width: usize) -> Program {
        let constants = (d_in, DECODE_TILE_ROWS);
        SiteShape::program::<Args>(&ADD_RMS_NORM_LORA, "add_rms_norm_lora", THREADS, elem, constants)
            .define("NORM_WIDTH", width)
    }

    /// Loads it for rows of `width` outputs of a site with `d_in` inputs, and steps of at most `tiles_max` row tiles; `eps`
    /// is added to the mean of squares.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for extents that [`SiteShape`] excludes; [`DeviceError`] of the compiler.
    pub fn load(
        device: &dyn Device,
        elem: Elem,
        (d_in, width): (usize, usize),
        tiles_max: usize,
        eps: f32,
    ) -> Result<Self, DeviceError> {
        let cols = [(0, width)];
        SiteShape { d_in, cols: &cols, tile_rows: DECODE_TILE_ROWS }.check("add_rms_norm_lora")?;
        let blocks = tiles_max.min(device.info().multiprocessors as usize);
        Ok(Self { kernel: device.load(&Self::program(elem, d_in, width))?, eps, blocks })
    }

    /// Computes the rows of the step's tiles. `y` keeps its values.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] without `y`; [`DeviceError`] of the driver.
    /// # Safety
    /// The addresses hold the rows of the tiles, the lists what their counts say, the shrink of this step and site (one
    /// matrix) has been launched before, nobody else uses what is written, and no two of the buffers overlap.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        work: &SiteWork,
        buffers: &RmsNormBuffers,
    ) -> Result<(), DeviceError> {
        let RmsNormBuffers { residual, y, weight, out } = *buffers;
        let y = y.ok_or_else(|| DeviceError::Unsupported("add_rms_norm_lora: no y to add".into()))?;
        let args = Args { site: *work, residual, y, weight, out, eps: self.eps, reserved: 0 };
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(self.blocks), 0, &args) }
    }
}
