//! The op on a device.

use crate::device::lora::{SiteShape, SiteWork, splits};
use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static LORA_SHRINK: KernelSource =
    KernelSource { file: "lora_shrink.cu", text: include_str!("lora_shrink.cu") };

const THREADS: u32 = 128;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    site: SiteWork,
    x: Address,
    x_stride: u32,
    reserved: u32,
}

/// `v = x A^T` for every item of a step and every matrix of a site.
#[derive(Clone, Copy, Debug)]
pub struct ShrinkKernel {
    kernel: Kernel,
    d_in: usize,
    /// Blocks of a launch; any number gives the same bits.
    pub blocks: usize,
}

impl ShrinkKernel {
    /// The program.
    #[must_use]
    pub fn program(elem: Elem, d_in: usize, tile_rows: usize) -> Program {
        SiteShape::program::<Args>(&LORA_SHRINK, "lora_shrink", THREADS, elem, (d_in, tile_rows))
            .define("SHRINK_K", d_in)
    }

    /// Loads it for steps of at most `items_max` items.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for extents that [`SiteShape`] excludes; [`DeviceError`] of the compiler.
    pub fn load(device: &dyn Device, elem: Elem, shape: SiteShape<'_>, items_max: usize) -> Result<Self, DeviceError> {
        shape.check("lora_shrink")?;
        let kernel = device.load(&Self::program(elem, shape.d_in, shape.tile_rows))?;
        let units = items_max * shape.cols.len() * splits(shape.d_in);
        // Four blocks fit a multiprocessor: more would wait for these.
        let blocks = units.min(4 * device.info().multiprocessors as usize);
        Ok(Self { kernel, d_in: shape.d_in, blocks })
    }

    /// Fills `work.v` from `x: [rows, x_stride]`, of which the first `d_in` columns of rows in an item are read. Tiles of
    /// matrices that an item leaves alone are not written.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if `x_stride` is less than `d_in` or no multiple of 8; [`DeviceError`] of the driver.
    /// # Safety
    /// The lists and `x` hold what their counts and items say, `v` has [`SiteShape::v_bytes`], and nobody else uses `v`.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        work: &SiteWork,
        x: Address,
        x_stride: usize,
    ) -> Result<(), DeviceError> {
        if x_stride < self.d_in || !x_stride.is_multiple_of(8) {
            return Err(DeviceError::Unsupported(format!("lora_shrink: {x_stride} elements from row to row")));
        }
        let args = Args { site: *work, x, x_stride: x_stride as u32, reserved: 0 };
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(self.blocks), 0, &args) }
    }
}
