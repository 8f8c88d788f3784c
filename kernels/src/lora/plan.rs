//! Which blocks an adapter has, and where each lies in its pages.

use super::image::ImageLayout;
use super::parts::{AdapterParts, LoraPart, VectorPart};
use super::{END_TILE, RANK_BLOCK, SLICES, Slice};
use crate::arena::UNIT_BYTES;
use crate::error::{OpError, at_most, same};

/// Offset of a block that is not there.
pub(super) const NO_BLOCK: usize = usize::MAX;

/// One rank block of one matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// Which of the adapter's pairs; none for what is added to the head's weight.
    pub(super) part: Option<usize>,
    pub(super) rank_block: usize,
    /// The layer, or the tile of the head.
    pub(super) layer: usize,
    pub(super) slice: Slice,
    /// Offset of the A block from the start of the image, bytes.
    pub(super) a: usize,
    /// Offset of the B block, bytes.
    pub(super) b: usize,
    pub(super) d_in: usize,
    /// Outputs in this block.
    pub(super) d_out: usize,
    pub(super) scale: f32,
}

/// A block that is no half of a pair.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub(super) of: TableOf,
    /// Offset from the start of the image, bytes.
    pub(super) offset: usize,
    /// Elements of a row.
    pub(super) width: usize,
}

/// What a [`Table`] holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum TableOf {
    /// `[2][width]` f32: gains, then shifts, of outputs `first..` of the matrix. The layer is the tile for the head.
    Vectors { part: usize, layer: usize, slice: Slice, first: usize },
    /// `[tokens][16]`: the embedding's A of tokens `first..`, so that a token's ranks lie together.
    EmbedColumns { part: usize, rank_block: usize, first: usize, tokens: usize },
    /// `[rows][width]`: what is added to the embedding's rows `first..`.
    EmbedRows { first: usize, rows: usize },
}

/// Rows of `width` elements that lie in one block.
pub(super) const fn rows_per_tile(width: usize) -> usize {
    const TILE_ELEMENTS: usize = 1 << 17;
    match TILE_ELEMENTS.checked_div(width) {
        None | Some(0) => 1,
        Some(rows) => rows,
    }
}

/// Which offsets a block's place sets.
#[derive(Clone, Copy, Debug)]
enum Of {
    /// A of so many entries from this one on: they share it.
    A(usize, usize),
    B(usize),
    Table(usize),
}

/// Blocks to be placed.
pub(super) struct Plan {
    layout: ImageLayout,
    layers: usize,
    blocks: Vec<(usize, Of)>,
    pub(super) entries: Vec<Entry>,
    pub(super) tables: Vec<Table>,
}

const OP: &str = "adapter image";

impl Plan {
    pub(super) fn new(layout: ImageLayout, layers: usize) -> Self {
        Self { layout, layers, blocks: Vec::new(), entries: Vec::new(), tables: Vec::new() }
    }

    /// Adds every block, after checking what it comes from.
    pub(super) fn add(&mut self, parts: &AdapterParts) -> Result<(), OpError> {
        let mut seen = vec![false; self.layers.saturating_mul(SLICES).saturating_add(2)];
        for (index, part) in parts.lora.iter().enumerate() {
            self.check_place(part.layer, part.slice, &mut seen)?;
            same(OP, "elements of A", part.a.len(), part.rank.saturating_mul(part.d_in))?;
            same(OP, "elements of B", part.b.len(), part.rank.saturating_mul(part.d_out))?;
            for rank_block in 0..part.rank.div_ceil(RANK_BLOCK) {
                self.add_rank_block(index, part, rank_block);
            }
        }
        seen.fill(false);
        for (index, part) in parts.vectors.iter().enumerate() {
            self.check_place(part.layer, part.slice, &mut seen)?;
            same(OP, "elements of the shift", part.shift.len(), part.gain.len())?;
            self.add_vectors(index, part);
        }
        if let Some((vocab, hidden)) = parts.embed_rows {
            let per_tile = rows_per_tile(hidden);
            for first in (0..vocab).step_by(per_tile) {
                let rows = (vocab - first).min(per_tile);
                let bytes = rows * hidden * self.layout.value_bytes();
                self.add_table(bytes, hidden, TableOf::EmbedRows { first, rows });
            }
        }
        if let Some((vocab, hidden)) = parts.head_rows {
            for rank_block in 0..hidden.div_ceil(RANK_BLOCK) {
                for (tile, d_out) in tiles(vocab) {
                    let (part, slice) = (None, Slice::HeadDelta);
                    self.add_b(Entry { part, rank_block, layer: tile, slice, d_in: hidden, d_out, ..Self::EMPTY });
                }
            }
        }
        Ok(())
    }

    const EMPTY: Entry = Entry {
        part: None,
        rank_block: 0,
        layer: 0,
        slice: Slice::Q,
        a: NO_BLOCK,
        b: NO_BLOCK,
        d_in: 0,
        d_out: 0,
        scale: 1.0,
    };

    /// The matrix is there and was not named before.
    fn check_place(&self, layer: usize, slice: Slice, seen: &mut [bool]) -> Result<(), OpError> {
        let place = match slice {
            Slice::Embed => self.layers * SLICES,
            Slice::Head => self.layers * SLICES + 1,
            Slice::HeadDelta => {
                return Err(OpError::Shape { op: OP, what: "pairs of a whole matrix", got: 1, want: 0 });
            }
            _ => {
                at_most(OP, "layer + 1", layer.saturating_add(1), self.layers)?;
                layer * SLICES + slice as usize
            }
        };
        let twice = std::mem::replace(&mut seen[place], true);
        same(OP, "pairs for one matrix", 1 + usize::from(twice), 1)
    }

    fn add_rank_block(&mut self, part: usize, pair: &LoraPart, rank_block: usize) {
        let LoraPart { layer, slice, d_in, d_out, scale, .. } = *pair;
        let entry = Entry { part: Some(part), rank_block, layer, slice, d_in, d_out, scale, ..Self::EMPTY };
        let layout = self.layout;
        let a_bytes = |width: usize| layout.a_elements(width) * layout.value_bytes();
        match slice {
            Slice::Embed => {
                for (tile, tokens) in tiles(d_in) {
                    let of = TableOf::EmbedColumns { part, rank_block, first: tile * END_TILE, tokens };
                    self.add_table(a_bytes(tokens), RANK_BLOCK, of);
                }
                self.add_b(entry);
            }
            Slice::Head => {
                self.add_block(a_bytes(d_in), Of::A(self.entries.len(), d_out.div_ceil(END_TILE)));
                for (tile, d_out) in tiles(d_out) {
                    self.add_b(Entry { layer: tile, d_out, ..entry });
                }
            }
            _ => {
                self.add_block(a_bytes(d_in), Of::A(self.entries.len(), 1));
                self.add_b(entry);
            }
        }
    }

    fn add_vectors(&mut self, part: usize, vectors: &VectorPart) {
        let VectorPart { layer, slice, gain, .. } = *vectors;
        let pieces: Vec<(usize, usize, usize)> = match slice {
            Slice::Head => tiles(gain.len()).map(|(tile, width)| (tile, tile * END_TILE, width)).collect(),
            Slice::Embed => vec![(0, 0, gain.len())],
            _ => vec![(layer, 0, gain.len())],
        };
        for (layer, first, width) in pieces {
            self.add_table(2 * width * size_of::<f32>(), width, TableOf::Vectors { part, layer, slice, first });
        }
    }

    fn add_b(&mut self, entry: Entry) {
        let bytes = self.layout.b_elements(entry.d_out) * self.layout.value_bytes();
        self.add_block(bytes, Of::B(self.entries.len()));
        self.entries.push(entry);
    }

    fn add_table(&mut self, bytes: usize, width: usize, of: TableOf) {
        self.add_block(bytes, Of::Table(self.tables.len()));
        self.tables.push(Table { of, offset: NO_BLOCK, width });
    }

    fn add_block(&mut self, bytes: usize, of: Of) {
        self.blocks.push((bytes.next_multiple_of(UNIT_BYTES), of));
    }

    /// Gives each block a place, first-fit decreasing; returns the number of pages.
    pub(super) fn place(&mut self, page_bytes: usize) -> Result<usize, OpError> {
        self.blocks.sort_by_key(|&(bytes, _)| std::cmp::Reverse(bytes));
        let mut free: Vec<usize> = Vec::new();
        let (mut last_bytes, mut from) = (0, 0);
        for &(bytes, of) in &self.blocks {
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
            let offset = from * page_bytes + page_bytes - free[from];
            match of {
                Of::A(first, count) => self.entries[first..first + count].iter_mut().for_each(|entry| entry.a = offset),
                Of::B(entry) => self.entries[entry].b = offset,
                Of::Table(table) => self.tables[table].offset = offset,
            }
            free[from] -= bytes;
        }
        Ok(free.len())
    }
}

/// Tiles of `extent` outputs or tokens: number and extent of each.
pub(super) fn tiles(extent: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..extent.div_ceil(END_TILE)).map(move |tile| (tile, (extent - tile * END_TILE).min(END_TILE)))
}
