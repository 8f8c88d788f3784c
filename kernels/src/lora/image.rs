//! One adapter as the bytes of arena pages.

use super::parts::{AdapterParts, LoraPart};
use super::plan::{Entry, NO_BLOCK, Plan, Table, TableOf, rows_per_tile};
use super::{END_TILE, RANK_BLOCK, SLICES, Slice};
use crate::arena::UNIT_BYTES;
use crate::device::Elem;
use crate::device::step::BlockDesc;
use crate::dtype::Dtype;
use crate::error::{OpError, at_most, same};
use crate::simd::{LANES, Line};
use half::bf16;

/// How an image's blocks lie, and its storage type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageLayout {
    /// For the CPU's kernels: lines of 16 ranks (A) or 16 outputs (B), in bf16 of two inputs each.
    Cpu(Dtype),
    /// For a device's kernels: A as `[16][d_in]`, B as `[d_out][16]`.
    Device(Elem),
}

impl From<Dtype> for ImageLayout {
    fn from(dtype: Dtype) -> Self {
        Self::Cpu(dtype)
    }
}

impl ImageLayout {
    pub(super) const fn value_bytes(self) -> usize {
        match self {
            Self::Cpu(dtype) => dtype.bytes(),
            Self::Device(_) => 2,
        }
    }

    pub(super) const fn b_elements(self, d_out: usize) -> usize {
        match self {
            Self::Cpu(_) => b_elements(d_out),
            Self::Device(_) => RANK_BLOCK * d_out,
        }
    }

    pub(super) const fn a_elements(self, d_in: usize) -> usize {
        match self {
            Self::Cpu(dtype) => a_bytes(dtype, d_in) / dtype.bytes(),
            Self::Device(_) => RANK_BLOCK * d_in,
        }
    }

    /// Place of rank `r` (of the block) and input `k` in an A block.
    const fn a_index(self, r: usize, k: usize, d_in: usize) -> usize {
        match self {
            Self::Cpu(dtype) => a_index(dtype, r, k),
            Self::Device(_) => r * d_in + k,
        }
    }

    /// Place of rank `r` (of the block) and output `o` in a B block.
    const fn b_index(self, r: usize, o: usize) -> usize {
        match self {
            Self::Cpu(dtype) => b_index(dtype, r, o),
            Self::Device(_) => o * RANK_BLOCK + r,
        }
    }

    /// Whether values beyond 65504 have no finite form.
    #[must_use]
    pub const fn is_half(self) -> bool {
        matches!(self, Self::Device(Elem::F16))
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
    pub(super) tables: Vec<Table>,
    pages: usize,
    bytes: Vec<u8>,
}

/// Elements of a B block: panels of 16 outputs, `[d_out / 16][16 ranks][16 outputs]`, the last one filled with zeros.
pub(crate) const fn b_elements(d_out: usize) -> usize {
    RANK_BLOCK * d_out.next_multiple_of(LANES)
}

/// Bytes of an A block: a line for each input, or for two in bf16.
pub(crate) const fn a_bytes(dtype: Dtype, d_in: usize) -> usize {
    d_in.div_ceil(inputs_of_line(dtype)) * size_of::<Line>()
}

/// Inputs that a line holds for each of its 16 lanes.
const fn inputs_of_line(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 1,
        Dtype::Bf16 => 2,
    }
}

/// Place of input `k` of lane `lane` in a run of lines.
const fn in_lines(dtype: Dtype, lane: usize, k: usize) -> usize {
    let inputs = inputs_of_line(dtype);
    (k / inputs * LANES + lane) * inputs + k % inputs
}

/// Place of rank `r` (of the block) and input `k` in an A block.
const fn a_index(dtype: Dtype, r: usize, k: usize) -> usize {
    in_lines(dtype, r, k)
}

/// Place of rank `r` (of the block) and output `o` in a B block.
const fn b_index(dtype: Dtype, r: usize, o: usize) -> usize {
    o / LANES * RANK_BLOCK * LANES + in_lines(dtype, o % LANES, r)
}

/// Element of an A block.
#[cfg(test)]
pub(crate) fn a_at(dtype: Dtype, block: &[u8], r: usize, k: usize) -> f32 {
    if k < block.len() / dtype.bytes() / RANK_BLOCK { decode_at(dtype, block, a_index(dtype, r, k)) } else { 0.0 }
}

/// Element of a B block.
#[cfg(test)]
pub(crate) fn b_at(dtype: Dtype, block: &[u8], r: usize, o: usize) -> f32 {
    decode_at(dtype, block, b_index(dtype, r, o))
}

#[cfg(test)]
fn decode_at(dtype: Dtype, block: &[u8], index: usize) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_ne_bytes(block[4 * index..][..4].try_into().unwrap()),
        Dtype::Bf16 => bf16::from_ne_bytes(block[2 * index..][..2].try_into().unwrap()).to_f32(),
    }
}

impl AdapterImage {
    /// Packs LoRA pairs alone; see [`Self::pack_parts`].
    ///
    /// # Errors
    /// As [`Self::pack_parts`].
    pub fn pack(
        layout: impl Into<ImageLayout>,
        page_bytes: usize,
        layers: usize,
        parts: &[LoraPart],
    ) -> Result<Self, OpError> {
        Self::pack_parts(layout, page_bytes, layers, &AdapterParts { lora: parts, ..AdapterParts::default() })
    }

    /// Packs an adapter for a model of `layers` layers: first-fit decreasing, values rounded to the layout's type, gains
    /// and shifts in f32. Whole matrices hold zeros until [`Self::set_rows`].
    ///
    /// # Errors
    /// [`OpError::Shape`] if a part's data disagree with its extents, a pair comes twice or `page_bytes` is no multiple of
    /// 256; [`OpError::Limit`] for a layer that is not there; [`OpError::BlockOverPage`]; [`OpError::OutOfMemory`].
    pub fn pack_parts(
        layout: impl Into<ImageLayout>,
        page_bytes: usize,
        layers: usize,
        parts: &AdapterParts,
    ) -> Result<Self, OpError> {
        let layout = layout.into();
        same("adapter image", "page bytes modulo 256", page_bytes % UNIT_BYTES, 0)?;
        let mut plan = Plan::new(layout, layers);
        plan.add(parts)?;
        let pages = plan.place(page_bytes)?;
        let total = pages.saturating_mul(page_bytes);
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(total).map_err(|_| OpError::OutOfMemory { what: "an adapter", bytes: total })?;
        bytes.resize(total, 0);
        let Plan { entries, tables, .. } = plan;
        let is_delta = |entry: &Entry| entry.slice == Slice::HeadDelta;
        let rank_blocks = entries.iter().filter(|entry| !is_delta(entry)).map(|entry| entry.rank_block + 1).max();
        let rank_blocks = rank_blocks.unwrap_or(0);
        let mut image = Self { layout, page_bytes, layers, rank_blocks, entries, tables, pages, bytes };
        image.write(parts);
        Ok(image)
    }

    /// Writes rows `first_row..` of what is added to the weight of the embedding ([`Slice::Embed`]) or the head
    /// ([`Slice::Head`]): whole rows of `[vocabulary, hidden]`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the image has no such matrix or `rows` is no whole rows; [`OpError::Limit`] past its end.
    pub fn set_rows(&mut self, slice: Slice, first_row: usize, rows: &[f32]) -> Result<(), OpError> {
        let op = "adapter image";
        let (vocab, hidden) = match slice {
            Slice::Embed => self.tables.iter().rev().find_map(|table| match table.of {
                TableOf::EmbedRows { first, rows } => Some((first + rows, table.width)),
                _ => None,
            }),
            _ => self.entries.iter().rev().find(|entry| entry.slice == Slice::HeadDelta).map(|last| {
                let before = last.layer * END_TILE;
                (before + last.d_out, last.d_in)
            }),
        }
        .ok_or(OpError::Shape { op, what: "whole matrices", got: 0, want: 1 })?;
        same(op, "elements of rows modulo the width", rows.len() % hidden, 0)?;
        at_most(op, "last row", first_row.saturating_add(rows.len() / hidden), vocab)?;
        match slice {
            Slice::Embed => self.set_embed_rows(first_row, rows, hidden),
            _ => self.set_head_rows(first_row, rows, hidden),
        }
        Ok(())
    }

    fn set_embed_rows(&mut self, first_row: usize, rows: &[f32], hidden: usize) {
        let per_tile = rows_per_tile(hidden);
        let starts: Vec<usize> = self.offsets(|of| matches!(of, TableOf::EmbedRows { .. })).collect();
        for (row, values) in (first_row..).zip(rows.chunks_exact(hidden)) {
            for (k, &value) in values.iter().enumerate() {
                put(&mut self.bytes, self.layout, starts[row / per_tile], row % per_tile * hidden + k, value);
            }
        }
    }

    fn set_head_rows(&mut self, first_row: usize, rows: &[f32], hidden: usize) {
        let Self { bytes, entries, layout, .. } = self;
        for entry in entries.iter().filter(|entry| entry.slice == Slice::HeadDelta) {
            let (tile_first, inputs) = (entry.layer * END_TILE, entry.rank_block * RANK_BLOCK);
            let from = first_row.max(tile_first);
            let to = (first_row + rows.len() / hidden).min(tile_first + entry.d_out);
            for row in from..to {
                let values = &rows[(row - first_row) * hidden..][inputs..hidden.min(inputs + RANK_BLOCK)];
                for (r, &value) in values.iter().enumerate() {
                    put(bytes, *layout, entry.b, layout.b_index(r, row - tile_first), value);
                }
            }
        }
    }

    fn offsets(&self, is: impl Fn(&TableOf) -> bool) -> impl Iterator<Item = usize> {
        self.tables.iter().filter(move |table| is(&table.of)).map(|table| table.offset)
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
        for entry in self.entries.iter().filter(|entry| entry.slice.is_in_layer()) {
            descs[entry.rank_block][entry.layer * SLICES + entry.slice as usize] =
                BlockDesc { a_unit: to_unit(entry.a)?, b_unit: to_unit(entry.b)?, scale: entry.scale, vectors: 0 };
        }
        for table in &self.tables {
            if let TableOf::Vectors { layer, slice, .. } = table.of
                && slice.is_in_layer()
                && let Some(row) = descs.first_mut()
            {
                // An adapter's first rank block has them, even where it leaves the matrix itself alone.
                row[layer * SLICES + slice as usize].vectors = to_unit(table.offset)? + 1;
            }
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

    /// Writes every block but those of whole matrices.
    fn write(&mut self, parts: &AdapterParts) {
        let Self { layout, entries, tables, bytes, .. } = self;
        for entry in entries.iter() {
            if let Some(part) = entry.part.and_then(|part| parts.lora.get(part)) {
                write_pair(bytes, *layout, part, entry);
            }
        }
        for table in tables.iter() {
            match table.of {
                TableOf::Vectors { part, first, .. } => {
                    let vectors = &parts.vectors[part];
                    let both = [vectors.gain, vectors.shift].map(|values| &values[first..first + table.width]);
                    for (index, value) in both.into_iter().flatten().enumerate() {
                        bytes[table.offset + 4 * index..][..4].copy_from_slice(&value.to_ne_bytes());
                    }
                }
                TableOf::EmbedColumns { part, rank_block, first, tokens } => {
                    let (part, first_rank) = (&parts.lora[part], rank_block * RANK_BLOCK);
                    for r in first_rank..part.rank.min(first_rank + RANK_BLOCK) {
                        for (token, &value) in part.a[r * part.d_in..][first..first + tokens].iter().enumerate() {
                            put(bytes, *layout, table.offset, token * RANK_BLOCK + r - first_rank, value);
                        }
                    }
                }
                TableOf::EmbedRows { .. } => {}
            }
        }
    }
}

/// Writes one value, rounded, as element `index` of the block at `start`.
fn put(bytes: &mut [u8], layout: ImageLayout, start: usize, index: usize, value: f32) {
    match layout {
        ImageLayout::Cpu(Dtype::F32) => {
            bytes[start + 4 * index..][..4].copy_from_slice(&value.to_ne_bytes());
        }
        ImageLayout::Cpu(Dtype::Bf16) => {
            bytes[start + 2 * index..][..2].copy_from_slice(&bf16::from_f32(value).to_ne_bytes());
        }
        ImageLayout::Device(elem) => {
            bytes[start + 2 * index..][..2].copy_from_slice(&elem.to_bits(value).to_ne_bytes());
        }
    }
}

/// Writes the A and B block of one entry.
fn write_pair(bytes: &mut [u8], layout: ImageLayout, part: &LoraPart, entry: &Entry) {
    let first = entry.rank_block * RANK_BLOCK;
    let ranks = (part.rank - first).min(RANK_BLOCK);
    let first_output = if entry.slice == Slice::Head { entry.layer * END_TILE } else { 0 };
    // The tiles of a head share their A.
    if entry.a != NO_BLOCK && first_output == 0 {
        for r in 0..ranks {
            for (k, &value) in part.a[(first + r) * part.d_in..][..part.d_in].iter().enumerate() {
                put(bytes, layout, entry.a, layout.a_index(r, k, part.d_in), value);
            }
        }
    }
    for (o, row) in part.b.chunks_exact(part.rank).skip(first_output).take(entry.d_out).enumerate() {
        for (r, &value) in row[first..first + ranks].iter().enumerate() {
            put(bytes, layout, entry.b, layout.b_index(r, o), value);
        }
    }
}
