//! The op on a device.

use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static GATHER_ROWS: KernelSource =
    KernelSource { file: "gather_rows.cu", text: include_str!("gather_rows.cu") };

const THREADS: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    picked: Address,
    rows: Address,
    index: Address,
    counts: Address,
    places: u32,
    rows_total: u32,
    width: u32,
    reserved: u32,
}

/// Where the op's data lies.
#[derive(Clone, Copy, Debug)]
pub struct GatherBuffers {
    /// `[places, width]`, the model's type; written.
    pub picked: Address,
    /// `[rows_total, width]`, the model's type.
    pub rows: Address,
    /// u32, one row for each of the step's `sample_rows`.
    pub index: Address,
    /// [`StepCounts`](crate::device::step::StepCounts).
    pub counts: Address,
}

/// `picked[i] = rows[index[i]]` on a device.
#[derive(Clone, Copy, Debug)]
pub struct GatherRowsKernel {
    kernel: Kernel,
    width: usize,
    /// Most blocks of a launch; any number is right.
    pub blocks_max: usize,
}

impl GatherRowsKernel {
    /// The program.
    #[must_use]
    pub fn program(elem: Elem) -> Program {
        Program::new::<Args>(&GATHER_ROWS, "gather_rows", THREADS, elem)
    }

    /// Loads it for rows of `width` values.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if `width` is no multiple of 8; [`DeviceError`] of the compiler.
    pub fn load(device: &dyn Device, elem: Elem, width: usize) -> Result<Self, DeviceError> {
        if !width.is_multiple_of(8) {
            return Err(DeviceError::Unsupported(format!("gather_rows: width {width} is no multiple of 8")));
        }
        let blocks_max = device.info().multiprocessors as usize * 8;
        Ok(Self { kernel: device.load(&Self::program(elem))?, width, blocks_max })
    }

    /// Fills all `places` of the bucket; those behind `sample_rows`, and entries that are no row, get row 0.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// The addresses hold that much, and nobody else uses `picked`.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        buffers: &GatherBuffers,
        places: usize,
        rows_total: usize,
    ) -> Result<(), DeviceError> {
        let GatherBuffers { picked, rows, index, counts } = *buffers;
        let (places_u32, rows_total, width) = (places as u32, rows_total as u32, self.width as u32);
        let args = Args { picked, rows, index, counts, places: places_u32, rows_total, width, reserved: 0 };
        let blocks = (places * self.width / 8).div_ceil(THREADS as usize).min(self.blocks_max);
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(blocks), 0, &args) }
    }
}
