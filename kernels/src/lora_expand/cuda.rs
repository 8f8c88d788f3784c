//! The op on a device.

use crate::device::lora::{DECODE_TILE_ROWS, SITE_SLICES_MAX, SiteShape, SiteWork};
use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static LORA_EXPAND_ADD: KernelSource =
    KernelSource { file: "lora_expand_add.cu", text: include_str!("lora_expand_add.cu") };

const THREADS: u32 = 128;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    site: SiteWork,
    y: Address,
    y_stride: u32,
    first_col: [u32; SITE_SLICES_MAX],
    d_out: [u32; SITE_SLICES_MAX],
    reserved: u32,
}

/// `y += scale * V B^T` for every row tile of a step and every matrix of a site.
#[derive(Clone, Copy, Debug)]
pub struct ExpandAddKernel {
    kernel: Kernel,
    first_col: [u32; SITE_SLICES_MAX],
    d_out: [u32; SITE_SLICES_MAX],
    width: usize,
    /// Blocks of a launch; any number gives the same bits.
    pub blocks: usize,
}

/// Consecutive outputs of a lane. 8 keep 4 KiB of B in flight a warp, which decode needs; 4 leave registers for two groups
/// of rows that share B, which prefill needs.
const fn run(tile_rows: usize) -> usize {
    if tile_rows == DECODE_TILE_ROWS { 8 } else { 4 }
}

impl ExpandAddKernel {
    /// The program.
    #[must_use]
    pub fn program(elem: Elem, d_in: usize, tile_rows: usize) -> Program {
        Self::program_with_run(elem, d_in, tile_rows, run(tile_rows))
    }

    fn program_with_run(elem: Elem, d_in: usize, tile_rows: usize, run: usize) -> Program {
        SiteShape::program::<Args>(&LORA_EXPAND_ADD, "lora_expand_add", THREADS, elem, (d_in, tile_rows))
            .define("EXPAND_RUN", run)
    }

    /// Loads it for steps of at most `tiles_max` row tiles.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for extents that [`SiteShape`] excludes; [`DeviceError`] of the compiler.
    pub fn load(device: &dyn Device, elem: Elem, shape: SiteShape<'_>, tiles_max: usize) -> Result<Self, DeviceError> {
        Self::load_with_run(device, elem, shape, tiles_max, run(shape.tile_rows))
    }

    /// The same with 4 or 8 consecutive outputs to a lane, to compare them.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_with_run(
        device: &dyn Device,
        elem: Elem,
        shape: SiteShape<'_>,
        tiles_max: usize,
        run: usize,
    ) -> Result<Self, DeviceError> {
        shape.check("lora_expand_add")?;
        if run != 4 && run != 8 {
            return Err(DeviceError::Unsupported(format!("lora_expand_add: runs of {run} outputs; there are 4 and 8")));
        }
        let kernel = device.load(&Self::program_with_run(elem, shape.d_in, shape.tile_rows, run))?;
        let (mut first_col, mut d_out) = ([0; SITE_SLICES_MAX], [0; SITE_SLICES_MAX]);
        for (i, &(first, outputs)) in shape.cols.iter().enumerate() {
            (first_col[i], d_out[i]) = (first as u32, outputs as u32);
        }
        let width = shape.cols.iter().map(|&(first, outputs)| first + outputs).max().unwrap_or(0);
        let units: usize = shape.cols.iter().map(|&(_, outputs)| outputs.div_ceil(16 * run)).sum();
        let warps = THREADS as usize / 32;
        let blocks = (tiles_max * units).div_ceil(warps).min(4 * device.info().multiprocessors as usize);
        Ok(Self { kernel, first_col, d_out, width, blocks })
    }

    /// Adds to `y: [rows, y_stride]`, in place, the deltas that the shrink left in `work.v`. Rows without items and
    /// matrices that no item targets keep their bits.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if `y_stride` is less than the site's width or no multiple of 8; [`DeviceError`] of the
    /// driver.
    /// # Safety
    /// The lists and `y` hold what their counts and tiles say, the shrink of this step and site has been launched
    /// before, and nobody else uses `y`.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        work: &SiteWork,
        y: Address,
        y_stride: usize,
    ) -> Result<(), DeviceError> {
        if y_stride < self.width || !y_stride.is_multiple_of(8) {
            return Err(DeviceError::Unsupported(format!("lora_expand_add: {y_stride} elements from row to row")));
        }
        let (first_col, d_out) = (self.first_col, self.d_out);
        let args = Args { site: *work, y, y_stride: y_stride as u32, first_col, d_out, reserved: 0 };
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(self.blocks), 0, &args) }
    }
}
