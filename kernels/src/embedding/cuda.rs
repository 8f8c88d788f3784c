//! The op on a device.

use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static EMBEDDING: KernelSource = KernelSource { file: "embedding.cu", text: include_str!("embedding.cu") };

const THREADS: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    out: Address,
    table: Address,
    tokens: Address,
    last_token: Address,
    rows: u32,
    width: u32,
    vocab: u32,
    slots: u32,
}

/// Where the op's data lies.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingBuffers {
    /// `[rows, width]`, the model's type; written.
    pub out: Address,
    /// `[vocab, width]`, the model's type.
    pub table: Address,
    /// `[rows]` u32: a token, or [`FROM_DEVICE`](crate::device::step::FROM_DEVICE) and the slot whose last token it is.
    pub tokens: Address,
    /// `[slots]` u32: what was drawn last for each slot.
    pub last_token: Address,
}

/// `out[row] = table[token(row)]` on a device.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingKernel {
    kernel: Kernel,
    width: usize,
    vocab: usize,
    slots: usize,
    /// Most blocks of a launch; any number is right.
    pub blocks_max: usize,
}

impl EmbeddingKernel {
    /// The program.
    #[must_use]
    pub fn program(elem: Elem) -> Program {
        Program::new::<Args>(&EMBEDDING, "embedding", THREADS, elem)
    }

    /// Loads it for a table `[vocab, width]` and `slots` last tokens.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if `width` is no multiple of 8; [`DeviceError`] of the compiler.
    pub fn load(
        device: &dyn Device,
        elem: Elem,
        width: usize,
        vocab: usize,
        slots: usize,
    ) -> Result<Self, DeviceError> {
        if !width.is_multiple_of(8) {
            return Err(DeviceError::Unsupported(format!("embedding: width {width} is no multiple of 8")));
        }
        let blocks_max = device.info().multiprocessors as usize * 8;
        Ok(Self { kernel: device.load(&Self::program(elem))?, width, vocab, slots, blocks_max })
    }

    /// Fills `rows` rows. A token outside the table, or a slot that does not exist, gets row 0 of the table.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// The addresses hold that much, and nobody else uses `out`.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        buffers: &EmbeddingBuffers,
        rows: usize,
    ) -> Result<(), DeviceError> {
        let EmbeddingBuffers { out, table, tokens, last_token } = *buffers;
        let (width, vocab, slots) = (self.width as u32, self.vocab as u32, self.slots as u32);
        let args = Args { out, table, tokens, last_token, rows: rows as u32, width, vocab, slots };
        let blocks = (rows * self.width / 8).div_ceil(THREADS as usize).min(self.blocks_max);
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(blocks), 0, &args) }
    }
}
