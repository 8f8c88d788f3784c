//! Attention on a device: one kernel for decoding rows, one for prefill chunks.

use super::AttnSpec;
use crate::device::step::{BLOCK_TOKENS, KvShape};
use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source for decoding rows.
pub(crate) static ATTN_DECODE: KernelSource =
    KernelSource { file: "attn_decode.cu", text: include_str!("attn_decode.cu") };

/// The source for prefill chunks.
pub(crate) static ATTN_PREFILL: KernelSource =
    KernelSource { file: "attn_prefill.cu", text: include_str!("attn_prefill.cu") };

const DECODE_THREADS: u32 = 128;
const PREFILL_THREADS: u32 = 256;

/// Rows of the M side of a prefill tile: positions times heads of a group.
const PREFILL_M: usize = 128;

/// Sizes of the head dimension that the kernels have fragments for.
const HEAD_DIMS: [usize; 5] = [32, 64, 96, 128, 256];

/// Query heads of one kv head that fit the M side of an mma.
const GROUP_MAX: usize = 16;

/// Heads of an attention layer. A qkv row is `[heads + 2 * kv_heads][head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads; a multiple of the kv heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Query heads that share a kv head.
    #[must_use]
    pub const fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Elements of a qkv row.
    #[must_use]
    pub const fn qkv_width(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Bytes that a block takes in one layer.
    #[must_use]
    pub const fn layer_bytes(self) -> usize {
        2 * self.kv_heads * BLOCK_TOKENS * self.head_dim * size_of::<u16>()
    }

    /// Checks that the kernels know this shape.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] that names what is wrong.
    pub fn check(self) -> Result<(), DeviceError> {
        let Self { heads, kv_heads, head_dim } = self;
        if !HEAD_DIMS.contains(&head_dim) {
            return Err(DeviceError::Unsupported(format!("head_dim {head_dim}: the kernels have {HEAD_DIMS:?}")));
        }
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) || self.group() > GROUP_MAX {
            let text =
                format!("{heads} heads over {kv_heads} kv heads: the kernels take 1 to {GROUP_MAX} heads a kv head");
            return Err(DeviceError::Unsupported(text));
        }
        Ok(())
    }
}

/// The KV cache as kernels see it.
#[derive(Clone, Copy, Debug)]
pub struct KvCache {
    /// The arena's first byte.
    pub arena: Address,
    /// How blocks lie in it.
    pub shape: KvShape,
    /// The layer.
    pub layer: u32,
}

/// What a kernel takes for [`AttnSpec`]: exponents are of two, and no window is one that nothing leaves.
fn scale_and_window(spec: &AttnSpec) -> (f32, u32) {
    let window = spec.window.map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX));
    (spec.scale * std::f32::consts::LOG2_E, window)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DecodeArgs {
    qkv: Address,
    out: Address,
    arena: Address,
    block_table: Address,
    units: Address,
    counts: Address,
    positions: Address,
    partials: Address,
    arrived: Address,
    kv: KvShape,
    layer: u32,
    window: u32,
    scale: f32,
    reserved: u32,
}

/// Attention of rows that are a sequence's last position, one [`DecodeUnit`](crate::device::step::DecodeUnit) after the
/// other.
#[derive(Clone, Copy, Debug)]
pub struct AttnDecodeKernel {
    kernel: Kernel,
    shape: HeadShape,
    scale: f32,
    window: u32,
    /// Most blocks of a launch; any number is right.
    pub blocks_max: usize,
}

/// Addresses of one launch. Rows are those of the batch.
#[derive(Clone, Copy, Debug)]
pub struct AttnDecodeLaunch {
    /// `[rows][heads + 2 * kv_heads][head_dim]`; q is read.
    pub qkv: Address,
    /// `[rows][heads][head_dim]`; rows of units are written.
    pub out: Address,
    /// Keys and values, those of the rows themselves included.
    pub cache: KvCache,
    /// u32 block numbers.
    pub block_table: Address,
    /// [`DecodeUnit`](crate::device::step::DecodeUnit)s; those of a row follow each other.
    pub units: Address,
    /// [`StepCounts`](crate::device::step::StepCounts).
    pub counts: Address,
    /// u32 position of each row.
    pub positions: Address,
    /// [`AttnDecodeKernel::workspace_bytes`] of any content.
    pub workspace: Address,
    /// [`AttnDecodeKernel::counter_bytes`], zero before the first launch; every launch leaves them zero.
    pub counters: Address,
    /// Units that the lists have room for.
    pub units_max: usize,
}

impl AttnDecodeKernel {
    /// The program.
    #[must_use]
    pub fn program(elem: Elem, shape: HeadShape) -> Program {
        Program::new::<DecodeArgs>(&ATTN_DECODE, "attn_decode", DECODE_THREADS, elem)
            .define("HEAD_DIM", shape.head_dim)
            .define("GROUP", shape.group())
    }

    /// Loads it; `spec.heads` is the shape's.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for heads the kernel does not know; [`DeviceError`] of the compiler.
    pub fn load(device: &dyn Device, elem: Elem, shape: HeadShape, spec: &AttnSpec) -> Result<Self, DeviceError> {
        shape.check()?;
        let (scale, window) = scale_and_window(spec);
        let kernel = device.load(&Self::program(elem, shape))?;
        Ok(Self { kernel, shape, scale, window, blocks_max: device.info().multiprocessors as usize * 4 })
    }

    /// Bytes of workspace for launches of up to `units_max` units.
    #[must_use]
    pub const fn workspace_bytes(&self, units_max: usize) -> usize {
        let stats = (2 * self.shape.group()).next_multiple_of(4);
        units_max * self.shape.kv_heads * (self.shape.group() * self.shape.head_dim + stats) * size_of::<f32>()
    }

    /// Bytes of counters for batches of up to `rows_max` rows.
    #[must_use]
    pub const fn counter_bytes(&self, rows_max: usize) -> usize {
        rows_max * self.shape.kv_heads * size_of::<u32>()
    }

    /// Attention of every unit that the counts name.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// The addresses hold what [`AttnDecodeLaunch`] says, and nobody else uses `out`, workspace and counters meanwhile.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        addresses: &AttnDecodeLaunch,
    ) -> Result<(), DeviceError> {
        let args = DecodeArgs {
            qkv: addresses.qkv,
            out: addresses.out,
            arena: addresses.cache.arena,
            block_table: addresses.block_table,
            units: addresses.units,
            counts: addresses.counts,
            positions: addresses.positions,
            partials: addresses.workspace,
            arrived: addresses.counters,
            kv: addresses.cache.shape,
            layer: addresses.cache.layer,
            window: self.window,
            scale: self.scale,
            reserved: 0,
        };
        let blocks = (addresses.units_max * self.shape.kv_heads).min(self.blocks_max);
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(blocks), 0, &args) }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PrefillArgs {
    qkv: Address,
    out: Address,
    arena: Address,
    block_table: Address,
    tiles: Address,
    counts: Address,
    kv: KvShape,
    layer: u32,
    window: u32,
    scale: f32,
    reserved: u32,
}

/// Attention of prefill chunks, one [`PrefillTile`](crate::device::step::PrefillTile) after the other.
#[derive(Clone, Copy, Debug)]
pub struct AttnPrefillKernel {
    kernel: Kernel,
    shape: HeadShape,
    scale: f32,
    window: u32,
    /// Most blocks of a launch; any number is right.
    pub blocks_max: usize,
}

/// Addresses of one launch. Rows are those of the batch.
#[derive(Clone, Copy, Debug)]
pub struct AttnPrefillLaunch {
    /// `[rows][heads + 2 * kv_heads][head_dim]`; q is read.
    pub qkv: Address,
    /// `[rows][heads][head_dim]`; rows of tiles are written.
    pub out: Address,
    /// Keys and values, those of the rows themselves included.
    pub cache: KvCache,
    /// u32 block numbers.
    pub block_table: Address,
    /// [`PrefillTile`](crate::device::step::PrefillTile)s of at most [`AttnPrefillKernel::tile_rows`] rows.
    pub tiles: Address,
    /// [`StepCounts`](crate::device::step::StepCounts).
    pub counts: Address,
    /// Tiles that the list has room for.
    pub tiles_max: usize,
}

impl AttnPrefillKernel {
    /// The program.
    #[must_use]
    pub fn program(elem: Elem, shape: HeadShape) -> Program {
        Program::new::<PrefillArgs>(&ATTN_PREFILL, "attn_prefill", PREFILL_THREADS, elem)
            .define("HEAD_DIM", shape.head_dim)
            .define("GROUP", shape.group())
            .shared(Self::shared_bytes(shape))
    }

    /// Loads it; `spec.heads` is the shape's.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for heads the kernel does not know; [`DeviceError`] of the compiler.
    pub fn load(device: &dyn Device, elem: Elem, shape: HeadShape, spec: &AttnSpec) -> Result<Self, DeviceError> {
        shape.check()?;
        let (scale, window) = scale_and_window(spec);
        let kernel = device.load(&Self::program(elem, shape))?;
        // A block for each (tile, kv head): they differ in length, and the device hands them out as others end.
        Ok(Self { kernel, shape, scale, window, blocks_max: 1 << 20 })
    }

    /// Most rows of a tile.
    #[must_use]
    pub const fn tile_rows(shape: HeadShape) -> usize {
        PREFILL_M / shape.group()
    }

    /// Two buffers of K `[keys][head_dim + 8]` and V `[head_dim][keys + 8]`, as in the source.
    const fn shared_bytes(shape: HeadShape) -> u32 {
        let keys = if shape.head_dim <= 128 { 64 } else { 32 };
        let elements = keys * (shape.head_dim + 8) + shape.head_dim * (keys + 8);
        (2 * elements * size_of::<u16>()) as u32
    }

    /// Attention of every tile that the counts name.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// The addresses hold what [`AttnPrefillLaunch`] says, and nobody else uses `out` meanwhile.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        addresses: &AttnPrefillLaunch,
    ) -> Result<(), DeviceError> {
        let args = PrefillArgs {
            qkv: addresses.qkv,
            out: addresses.out,
            arena: addresses.cache.arena,
            block_table: addresses.block_table,
            tiles: addresses.tiles,
            counts: addresses.counts,
            kv: addresses.cache.shape,
            layer: addresses.cache.layer,
            window: self.window,
            scale: self.scale,
            reserved: 0,
        };
        let blocks = (addresses.tiles_max * self.shape.kv_heads).min(self.blocks_max);
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(blocks), Self::shared_bytes(self.shape), &args) }
    }
}
