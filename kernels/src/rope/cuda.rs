//! The op on a device.

use crate::attention::cuda::{HeadShape, KvCache};
use crate::device::step::KvShape;
use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static ROPE_CACHE: KernelSource =
    KernelSource { file: "rope_cache.cu", text: include_str!("rope_cache.cu") };

const THREADS: u32 = 256;

/// Elements of a head that one thread takes.
const THREAD_ELEMENTS: usize = 16;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    qkv: Address,
    bias: Address,
    cos_sin: Address,
    positions: Address,
    slots: Address,
    arena: Address,
    kv: KvShape,
    layer: u32,
    rows: u32,
    heads: u32,
    reserved: u32,
}

/// Adds the bias, rotates q and k, and writes k and v into the cache.
#[derive(Clone, Copy, Debug)]
pub struct RopeCacheKernel {
    kernel: Kernel,
    shape: HeadShape,
    /// Most blocks of a launch; any number is right.
    pub blocks_max: usize,
}

/// Addresses of one launch.
#[derive(Clone, Copy, Debug)]
pub struct RopeCacheLaunch {
    /// `[rows][heads + 2 * kv_heads][head_dim]`; q is rotated in place, k and v stay as they are.
    pub qkv: Address,
    /// f32 `[heads + 2 * kv_heads][head_dim]`; [`None`] adds nothing.
    pub bias: Option<Address>,
    /// f32 `[position][head_dim / 2][cos, sin]`.
    pub cos_sin: Address,
    /// u32 position of each row.
    pub positions: Address,
    /// Two u32 a row: block, and position inside the block.
    pub slots: Address,
    /// Where keys and values go.
    pub cache: KvCache,
    /// Rows of the bucket, padding included: padding rows need slots that nobody reads.
    pub rows: usize,
}

impl RopeCacheKernel {
    /// The program.
    #[must_use]
    pub fn program(elem: Elem, shape: HeadShape) -> Program {
        Program::new::<Args>(&ROPE_CACHE, "rope_cache", THREADS, elem).define("HEAD_DIM", shape.head_dim)
    }

    /// Loads it.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for heads the kernel does not know; [`DeviceError`] of the compiler.
    pub fn load(device: &dyn Device, elem: Elem, shape: HeadShape) -> Result<Self, DeviceError> {
        shape.check()?;
        let kernel = device.load(&Self::program(elem, shape))?;
        Ok(Self { kernel, shape, blocks_max: device.info().multiprocessors as usize * 8 })
    }

    /// Rows of one layer.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// The addresses hold what [`RopeCacheLaunch`] says, slots lie in the arena, and nobody else uses qkv and the slots.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        addresses: &RopeCacheLaunch,
    ) -> Result<(), DeviceError> {
        let args = Args {
            qkv: addresses.qkv,
            bias: addresses.bias.unwrap_or(0),
            cos_sin: addresses.cos_sin,
            positions: addresses.positions,
            slots: addresses.slots,
            arena: addresses.cache.arena,
            kv: addresses.cache.shape,
            layer: addresses.cache.layer,
            rows: addresses.rows as u32,
            heads: self.shape.heads as u32,
            reserved: 0,
        };
        let threads = addresses.rows * self.shape.qkv_width() / THREAD_ELEMENTS;
        let blocks = threads.div_ceil(THREADS as usize).min(self.blocks_max);
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(blocks), 0, &args) }
    }
}
