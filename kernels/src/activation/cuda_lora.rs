//! The op with the LoRA deltas of gate and up on a device.

use crate::device::lora::{DECODE_TILE_ROWS, SiteShape, SiteWork};
use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static SILU_MUL_LORA: KernelSource =
    KernelSource { file: "silu_mul_lora.cu", text: include_str!("silu_mul_lora.cu") };

const THREADS: u32 = 128;

/// Columns of a warp's unit: `COLUMNS` in the source.
const COLUMNS: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    site: SiteWork,
    gate_up: Address,
    out: Address,
    width: u32,
    reserved: u32,
}

/// `out = silu(gate + its delta) * (up + its delta)` on a device, for steps that only decode: expand and gate in one.
#[derive(Clone, Copy, Debug)]
pub struct SiluMulLoraKernel {
    kernel: Kernel,
    width: usize,
    /// Blocks of a launch; any number gives the same bits.
    pub blocks: usize,
}

impl SiluMulLoraKernel {
    /// The program for a site with `d_in` inputs.
    #[must_use]
    pub fn program(elem: Elem, d_in: usize) -> Program {
        SiteShape::program::<Args>(&SILU_MUL_LORA, "silu_mul_lora", THREADS, elem, (d_in, DECODE_TILE_ROWS))
    }

    /// Loads it for rows of `width` outputs, `d_in` inputs of gate and up, and steps of at most `tiles_max` row tiles.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for extents that [`SiteShape`] excludes; [`DeviceError`] of the compiler.
    pub fn load(
        device: &dyn Device,
        elem: Elem,
        d_in: usize,
        width: usize,
        tiles_max: usize,
    ) -> Result<Self, DeviceError> {
        let cols = [(0, width), (width, width)];
        SiteShape { d_in, cols: &cols, tile_rows: DECODE_TILE_ROWS }.check("silu_mul_lora")?;
        let units = tiles_max * width.div_ceil(COLUMNS);
        let blocks = units.div_ceil(THREADS as usize / 32).min(4 * device.info().multiprocessors as usize);
        Ok(Self { kernel: device.load(&Self::program(elem, d_in))?, width, blocks })
    }

    /// `gate_up: [rows, 2 * width]` to `out: [rows, width]`, for the rows of the step's tiles. `gate_up` keeps its values.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// The addresses hold that much, the lists what their counts say, the shrink of this step and site (gate, up) has
    /// been launched before, and nobody else uses `out`.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        work: &SiteWork,
        out: Address,
        gate_up: Address,
    ) -> Result<(), DeviceError> {
        let args = Args { site: *work, gate_up, out, width: self.width as u32, reserved: 0 };
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(self.blocks), 0, &args) }
    }
}
