//! The op with the LoRA deltas of q, k and v on a device.

use super::cuda::RopeCacheLaunch;
use crate::attention::cuda::HeadShape;
use crate::device::lora::{DECODE_TILE_ROWS, SiteShape, SiteWork};
use crate::device::step::KvShape;
use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source.
pub(crate) static ROPE_CACHE_LORA: KernelSource =
    KernelSource { file: "rope_cache_lora.cu", text: include_str!("rope_cache_lora.cu") };

const THREADS: u32 = 128;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    site: SiteWork,
    qkv: Address,
    bias: Address,
    cos_sin: Address,
    positions: Address,
    slots: Address,
    kv_arena: Address,
    kv: KvShape,
    layer: u32,
    heads: u32,
}

/// Adds deltas and bias to q, k and v, rotates q and k, and writes k and v into the cache, for steps that only decode:
/// expand and rope in one.
#[derive(Clone, Copy, Debug)]
pub struct RopeCacheLoraKernel {
    kernel: Kernel,
    shape: HeadShape,
    /// Blocks of a launch; any number gives the same bits.
    pub blocks: usize,
}

impl RopeCacheLoraKernel {
    /// The program for a site with `d_in` inputs.
    #[must_use]
    pub fn program(elem: Elem, d_in: usize, shape: HeadShape) -> Program {
        SiteShape::program::<Args>(&ROPE_CACHE_LORA, "rope_cache_lora", THREADS, elem, (d_in, DECODE_TILE_ROWS))
            .define("HEAD_DIM", shape.head_dim)
    }

    /// Loads it for `d_in` inputs of q, k and v, and steps of at most `tiles_max` row tiles.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for heads the kernel does not know and extents that [`SiteShape`] excludes;
    /// [`DeviceError`] of the compiler.
    pub fn load(
        device: &dyn Device,
        elem: Elem,
        d_in: usize,
        shape: HeadShape,
        tiles_max: usize,
    ) -> Result<Self, DeviceError> {
        shape.check()?;
        SiteShape { d_in, cols: &cols(shape), tile_rows: DECODE_TILE_ROWS }.check("rope_cache_lora")?;
        let units = tiles_max * (shape.heads + 2 * shape.kv_heads);
        let blocks = units.div_ceil(THREADS as usize / 32).min(4 * device.info().multiprocessors as usize);
        Ok(Self { kernel: device.load(&Self::program(elem, d_in, shape))?, shape, blocks })
    }

    /// The rows of the step's tiles in one layer; `addresses.rows` is not looked at. Other rows of qkv, and their slots,
    /// keep what they hold.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// The addresses hold what [`RopeCacheLaunch`] says, the lists what their counts say, the shrink of this step and site
    /// (q, k, v) has been launched before, slots lie in the arena, and nobody else uses qkv and the slots.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        work: &SiteWork,
        addresses: &RopeCacheLaunch,
    ) -> Result<(), DeviceError> {
        let args = Args {
            site: *work,
            qkv: addresses.qkv,
            bias: addresses.bias.unwrap_or(0),
            cos_sin: addresses.cos_sin,
            positions: addresses.positions,
            slots: addresses.slots,
            kv_arena: addresses.cache.arena,
            kv: addresses.cache.shape,
            layer: addresses.cache.layer,
            heads: self.shape.heads as u32,
        };
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(self.blocks), 0, &args) }
    }
}

/// Columns of q, k and v in a qkv row.
pub(crate) fn cols(shape: HeadShape) -> [(usize, usize); 3] {
    let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    [(0, q), (q, kv), (q + kv, kv)]
}
