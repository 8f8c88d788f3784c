//! The op on a device.

use crate::device::lora::{SITE_SLICES_MAX, SiteShape, SiteWork};
use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static LORA_GAIN_SHIFT: KernelSource =
    KernelSource { file: "lora_gain_shift.cu", text: include_str!("lora_gain_shift.cu") };

const THREADS: u32 = 256;
/// Outputs of a thread.
const OUTPUTS: usize = 8;

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

/// `y += scale * (gain * y + shift)` for every row tile of a step and every matrix of a site.
#[derive(Clone, Copy, Debug)]
pub struct GainShiftKernel {
    kernel: Kernel,
    first_col: [u32; SITE_SLICES_MAX],
    d_out: [u32; SITE_SLICES_MAX],
    width: usize,
    /// Blocks of a launch; any number gives the same bits.
    pub blocks: usize,
}

impl GainShiftKernel {
    /// The program.
    #[must_use]
    pub fn program(elem: Elem) -> Program {
        Program::new::<Args>(&LORA_GAIN_SHIFT, "lora_gain_shift", THREADS, elem)
    }

    /// Loads it for steps of at most `tiles_max` row tiles, of any height.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for extents that [`SiteShape`] excludes; [`DeviceError`] of the compiler.
    pub fn load(device: &dyn Device, elem: Elem, shape: SiteShape<'_>, tiles_max: usize) -> Result<Self, DeviceError> {
        shape.check("lora_gain_shift")?;
        let kernel = device.load(&Self::program(elem))?;
        let (mut first_col, mut d_out) = ([0; SITE_SLICES_MAX], [0; SITE_SLICES_MAX]);
        for (i, &(first, outputs)) in shape.cols.iter().enumerate() {
            (first_col[i], d_out[i]) = (first as u32, outputs as u32);
        }
        let width = shape.cols.iter().map(|&(first, outputs)| first + outputs).max().unwrap_or(0);
        let units: usize = shape.cols.iter().map(|&(_, outputs)| outputs / OUTPUTS).sum();
        let blocks = (tiles_max * units).div_ceil(THREADS as usize).min(8 * device.info().multiprocessors as usize);
        Ok(Self { kernel, first_col, d_out, width, blocks })
    }

    /// Changes `y: [rows, y_stride]` in place. Rows and matrices without gains and shifts keep their bits.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if `y_stride` is less than the site's width or no multiple of 8; [`DeviceError`] of the
    /// driver.
    /// # Safety
    /// The lists and `y` hold what their counts and tiles say, and nobody else uses `y`.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        work: &SiteWork,
        y: Address,
        y_stride: usize,
    ) -> Result<(), DeviceError> {
        if y_stride < self.width || !y_stride.is_multiple_of(8) {
            return Err(DeviceError::Unsupported(format!("lora_gain_shift: {y_stride} elements from row to row")));
        }
        let (first_col, d_out) = (self.first_col, self.d_out);
        let args = Args { site: *work, y, y_stride: y_stride as u32, first_col, d_out, reserved: 0 };
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(self.blocks), 0, &args) }
    }
}
