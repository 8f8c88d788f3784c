//! One adapter as the bytes of arena pages.

use super::{RANK_BLOCK, SLICES, Slice};
use crate::arena::UNIT_BYTES;
use crate::device::Elem;
use crate::device::step::BlockDesc;
use crate::dtype::{ArenaDtype, to_f16};
use crate::error::{OpError, at_most, same};
use crate::simd::LANES;

/// A and B of one matrix of one layer.
#[derive(Clone, Copy, Debug)]
pub struct LoraPart<'a> {
    /// The decoder layer.
    pub layer: usize,
    /// The matrix of the layer.
    pub slice: Slice,
    /// Ranks of this pair; pairs of one adapter may differ.
    pub rank: usize,
    /// A, row-major `[rank, d_in]`.
    pub a: &'a [f32],
    /// B, row-major `[d_out, rank]`.
    pub b: &'a [f32],
    /// Inputs of the matrix.
    pub d_in: usize,
    /// Outputs of the matrix.
    pub d_out: usize,
    /// Factor of the delta, such as alpha / rank.
    pub scale: f32,
}

/// How an image's blocks lie, and its storage type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageLayout {
    /// For the CPU's kernels: A as `[d_in][16]`, B in panels of 16 outputs.
    Cpu(ArenaDtype),
    /// For a device's kernels: A as `[16][d_in]`, B as `[d_out][16]`.
    Device(Elem),
}

impl From<ArenaDtype> for ImageLayout {
    fn from(dtype: ArenaDtype) -> Self {
        Self::Cpu(dtype)
    }
}

impl ImageLayout {
    const fn value_bytes(self) -> usize {
        match self {
            Self::Cpu(dtype) => dtype.bytes(),
            Self::Device(_) => 2,
        }
    }

    const fn b_elements(self, d_out: usize) -> usize {
        match self {
            Self::Cpu(_) => b_elements(d_out),
            Self::Device(_) => RANK_BLOCK * d_out,
        }
    }

    /// Whether values beyond 65504 have no finite form.
    #[must_use]
    pub const fn is_half(self) -> bool {
        matches!(self, Self::Cpu(ArenaDtype::F16) | Self::Device(Elem::F16))
    }
}

/// An adapter packed into whole pages, in host memory, and where each of its blocks lies. No block crosses a page.
#[derive(Clone, Debug)]
pub struct AdapterImage {
    pub(super) layout: ImageLayout,
    pub(super) page_bytes: usize,
    pub(super) layers: usize,
    pub(super) rank_blocks: usize,
    pub(super) entries: Vec<Entry>,
    pages: usize,
    bytes: Vec<u8>,
}

/// One rank block of one matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) rank_block: usize,
    pub(super) layer: usize,
    pub(super) slice: Slice,
    /// Offset of the A block from the start of the image, bytes.
    pub(super) a: usize,
    /// Offset of the B block, bytes.
    pub(super) b: usize,
    pub(super) d_in: usize,
    pub(super) d_out: usize,
    pub(super) scale: f32,
}

/// Elements of a B block: panels of 16 outputs, `[d_out / 16][16 ranks][16 outputs]`, the last one filled with zeros.
pub(crate) const fn b_elements(d_out: usize) -> usize {
    RANK_BLOCK * d_out.next_multiple_of(LANES)
}

/// Place of rank `r` (of the block) and output `o` in a B block.
pub(crate) const fn b_index(r: usize, o: usize) -> usize {
    (o / LANES * RANK_BLOCK + r) * LANES + o % LANES
}

impl AdapterImage {
    /// Packs an adapter for a model of `layers` layers: first-fit decreasing, values rounded to the layout's type.
    ///
    /// # Errors
    /// [`OpError::Shape`] if a part's data disagree with its extents, a pair comes twice or `page_bytes` is no multiple of
    /// 256; [`OpError::Limit`] for a layer that is not there; [`OpError::BlockOverPage`]; [`OpError::OutOfMemory`].
    pub fn pack(
        layout: impl Into<ImageLayout>,
        page_bytes: usize,
        layers: usize,
        parts: &[LoraPart],
    ) -> Result<Self, OpError> {
        let (op, layout) = ("adapter image", layout.into());
        same(op, "page bytes modulo 256", page_bytes % UNIT_BYTES, 0)?;
        let mut seen = vec![false; layers.saturating_mul(SLICES)];
        let mut blocks = Vec::new(); // (bytes, entry, is B)
        let mut entries = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            at_most(op, "layer + 1", part.layer.saturating_add(1), layers)?;
            same(op, "elements of A", part.a.len(), part.rank.saturating_mul(part.d_in))?;
            same(op, "elements of B", part.b.len(), part.rank.saturating_mul(part.d_out))?;
            let twice = std::mem::replace(&mut seen[part.layer * SLICES + part.slice as usize], true);
            same(op, "pairs for one matrix", 1 + usize::from(twice), 1)?;
            for rank_block in 0..part.rank.div_ceil(RANK_BLOCK) {
                let block_bytes = |elements: usize| (elements * layout.value_bytes()).next_multiple_of(UNIT_BYTES);
                blocks.push((block_bytes(RANK_BLOCK * part.d_in), entries.len(), false));
                blocks.push((block_bytes(layout.b_elements(part.d_out)), entries.len(), true));
                let LoraPart { layer, slice, d_in, d_out, scale, .. } = *part;
                entries.push((index, Entry { rank_block, layer, slice, a: 0, b: 0, d_in, d_out, scale }));
            }
        }
        let pages = place(&mut blocks, page_bytes, |entry, is_b, offset| {
            let entry = &mut entries[entry].1;
            *(if is_b { &mut entry.b } else { &mut entry.a }) = offset;
        })?;
        let total = pages.saturating_mul(page_bytes);
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(total).map_err(|_| OpError::OutOfMemory { what: "an adapter", bytes: total })?;
        bytes.resize(total, 0);
        for (index, entry) in &entries {
            write_blocks(&mut bytes, layout, &parts[*index], entry);
        }
        let entries: Vec<Entry> = entries.into_iter().map(|(_, entry)| entry).collect();
        let rank_blocks = entries.iter().map(|entry| entry.rank_block + 1).max().unwrap_or(0);
        Ok(Self { layout, page_bytes, layers, rank_blocks, entries, pages, bytes })
    }

    /// Arena pages it takes.
    #[must_use]
    pub const fn pages_needed(&self) -> usize {
        self.pages
    }

    /// Rank blocks of its widest matrix.
    #[must_use]
    pub const fn rank_blocks(&self) -> usize {
        self.rank_blocks
    }

    /// Host memory of the pages, bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.pages * self.page_bytes
    }

    /// Gives the pages away, to memory that a device copies from faster; the image then only says where blocks lie.
    #[must_use]
    pub fn take_bytes(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    /// Takes back what [`Self::take_bytes`] gave.
    pub fn put_bytes(&mut self, bytes: Vec<u8>) {
        debug_assert_eq!(bytes.len(), self.bytes());
        self.bytes = bytes;
    }

    /// The descriptors of rank block `rank_block`, `[layer][slice]`, once the image lies in `pages` of an arena.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the number of pages is not the image's, or it is packed for the CPU; [`OpError::Limit`] for a
    /// page beyond what a descriptor can name.
    pub fn block_descs(&self, pages: &[u32]) -> Result<Vec<Vec<BlockDesc>>, OpError> {
        let op = "block descriptors";
        same(op, "layout (1 = for a device)", usize::from(matches!(self.layout, ImageLayout::Device(_))), 1)?;
        same(op, "pages", pages.len(), self.pages_needed())?;
        let units_per_page = self.page_bytes / UNIT_BYTES;
        let to_unit = |offset: usize| {
            let unit =
                pages[offset / self.page_bytes] as usize * units_per_page + offset % self.page_bytes / UNIT_BYTES;
            at_most(op, "arena units", unit, u32::MAX as usize - 1)?;
            Ok(unit as u32)
        };
        let mut descs = vec![vec![BlockDesc::ABSENT; self.layers * SLICES]; self.rank_blocks];
        for entry in &self.entries {
            descs[entry.rank_block][entry.layer * SLICES + entry.slice as usize] =
                BlockDesc { a_unit: to_unit(entry.a)?, b_unit: to_unit(entry.b)?, scale: entry.scale, reserved: 0 };
        }
        Ok(descs)
    }

    /// Bytes of a page.
    #[must_use]
    pub const fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// The pages.
    pub fn pages(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks(self.page_bytes)
    }
}

/// Gives each block a place, first-fit decreasing; returns the number of pages.
fn place(
    blocks: &mut [(usize, usize, bool)],
    page_bytes: usize,
    mut set: impl FnMut(usize, bool, usize),
) -> Result<usize, OpError> {
    blocks.sort_by_key(|&(bytes, ..)| std::cmp::Reverse(bytes));
    let mut free: Vec<usize> = Vec::new();
    let (mut last_bytes, mut from) = (0, 0);
    for &(bytes, entry, is_b) in blocks.iter() {
        if bytes > page_bytes {
            return Err(OpError::BlockOverPage { block_bytes: bytes, page_bytes });
        }
        if bytes != last_bytes {
            // A page that was too full for a block is too full for the next of the same size: go on where we were.
            (last_bytes, from) = (bytes, 0);
        }
        while from < free.len() && free[from] < bytes {
            from += 1;
        }
        if from == free.len() {
            free.push(page_bytes);
        }
        set(entry, is_b, from * page_bytes + page_bytes - free[from]);
        free[from] -= bytes;
    }
    Ok(free.len())
}

/// Writes the A and B block of one entry.
fn write_blocks(bytes: &mut [u8], layout: ImageLayout, part: &LoraPart, entry: &Entry) {
    let first = entry.rank_block * RANK_BLOCK;
    let ranks = (part.rank - first).min(RANK_BLOCK);
    let mut put = |start: usize, index: usize, value: f32| match layout {
        ImageLayout::Cpu(ArenaDtype::F32) => {
            bytes[start + 4 * index..][..4].copy_from_slice(&value.to_ne_bytes());
        }
        ImageLayout::Cpu(ArenaDtype::F16) => {
            bytes[start + 2 * index..][..2].copy_from_slice(&to_f16(value).to_ne_bytes());
        }
        ImageLayout::Device(elem) => {
            bytes[start + 2 * index..][..2].copy_from_slice(&elem.to_bits(value).to_ne_bytes());
        }
    };
    let for_device = matches!(layout, ImageLayout::Device(_));
    for r in 0..ranks {
        for (k, &value) in part.a[(first + r) * part.d_in..][..part.d_in].iter().enumerate() {
            put(entry.a, if for_device { r * part.d_in + k } else { k * RANK_BLOCK + r }, value);
        }
    }
    for (o, row) in part.b.chunks_exact(part.rank).enumerate() {
        for (r, &value) in row[first..first + ranks].iter().enumerate() {
            put(entry.b, if for_device { o * RANK_BLOCK + r } else { b_index(r, o) }, value);
        }
    }
}
