//! What a slot holds beside the pairs of its layers: the embedding's, the head's, and gains and shifts.

use super::image::AdapterImage;
use super::plan::{TableOf, rows_per_tile};
use super::table::{ABSENT, Desc};
use super::{END_TILE, SLICES, Slice};

/// A unit where nothing lies.
const NO_UNIT: u32 = u32::MAX;

/// Which of the rarer parts an adapter has, or the adapters of a step: where a flag is off, nothing is looked up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uses {
    pub(crate) vectors: bool,
    pub(crate) embed: bool,
    pub(crate) embed_rows: bool,
    pub(crate) head: bool,
    pub(crate) head_rows: bool,
}

impl Uses {
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            vectors: self.vectors || other.vectors,
            embed: self.embed || other.embed,
            embed_rows: self.embed_rows || other.embed_rows,
            head: self.head || other.head,
            head_rows: self.head_rows || other.head_rows,
        }
    }
}

/// Gains and shifts of one matrix (or one tile of the head) on the device: `[2][width]` f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Vectors {
    pub(crate) unit: u32,
    pub(crate) width: u32,
}

const NO_VECTORS: Vectors = Vectors { unit: NO_UNIT, width: 0 };

/// Descriptors outside the layers; the vectors keep their memory when the slot changes hands.
#[derive(Clone, Debug, Default)]
pub(super) struct Ends {
    pub(super) uses: Uses,
    /// Tiles of the head in the two lists below.
    head_tiles: usize,
    /// `[rank block][tile]`
    head: Vec<Desc>,
    /// `[block of 16 inputs][tile]`
    head_rows: Vec<Desc>,
    /// `[rank block]`
    embed: Vec<Desc>,
    /// `[rank block][tile of tokens]`
    embed_columns: Vec<u32>,
    embed_tiles: usize,
    /// `[tile of rows]`, and the extents of the whole.
    embed_rows: Vec<u32>,
    embed_extents: (usize, usize),
    /// `[layer][slice]`, then the embedding, then the tiles of the head.
    vectors: Vec<Vectors>,
    layers: usize,
}

impl Ends {
    /// Takes the image's descriptors over.
    pub(super) fn publish(&mut self, image: &AdapterImage, to_unit: impl Fn(usize) -> u32) {
        self.clear(image);
        for entry in image.entries.iter().filter(|entry| !entry.slice.is_in_layer()) {
            let desc = Desc::of(entry, &to_unit);
            match entry.slice {
                Slice::Embed => put(&mut self.embed, entry.rank_block, desc, ABSENT),
                Slice::Head => put(&mut self.head, entry.rank_block * self.head_tiles + entry.layer, desc, ABSENT),
                _ => put(&mut self.head_rows, entry.rank_block * self.head_tiles + entry.layer, desc, ABSENT),
            }
        }
        for table in &image.tables {
            let unit = to_unit(table.offset);
            match table.of {
                TableOf::Vectors { layer, slice, .. } => {
                    let (index, width) = (self.vectors_index(layer, slice), table.width as u32);
                    put(&mut self.vectors, index, Vectors { unit, width }, NO_VECTORS);
                }
                TableOf::EmbedColumns { rank_block, first, .. } => {
                    put(&mut self.embed_columns, rank_block * self.embed_tiles + first / END_TILE, unit, NO_UNIT);
                }
                TableOf::EmbedRows { first, rows } => {
                    self.embed_extents = (first + rows, table.width);
                    put(&mut self.embed_rows, first / rows_per_tile(table.width), unit, NO_UNIT);
                }
            }
        }
        let vectors_at = |slice: Slice| self.vectors(0, slice).is_some();
        self.uses = Uses {
            vectors: !self.vectors.is_empty(),
            embed: !self.embed.is_empty() || vectors_at(Slice::Embed),
            embed_rows: !self.embed_rows.is_empty(),
            head: !self.head.is_empty() || vectors_at(Slice::Head),
            head_rows: !self.head_rows.is_empty(),
        };
    }

    fn clear(&mut self, image: &AdapterImage) {
        let of_head = image.entries.iter().filter(|entry| matches!(entry.slice, Slice::Head | Slice::HeadDelta));
        self.head_tiles = of_head.map(|entry| entry.layer + 1).max().unwrap_or(0);
        let tokens = |of: &TableOf| match of {
            TableOf::EmbedColumns { first, .. } => first / END_TILE + 1,
            _ => 0,
        };
        self.embed_tiles = image.tables.iter().map(|table| tokens(&table.of)).max().unwrap_or(0);
        self.layers = image.layers;
        self.embed_extents = (0, 0);
        self.head.clear();
        self.head_rows.clear();
        self.embed.clear();
        self.embed_columns.clear();
        self.embed_rows.clear();
        self.vectors.clear();
    }

    fn vectors_index(&self, layer: usize, slice: Slice) -> usize {
        match slice {
            Slice::Embed => self.layers * SLICES,
            Slice::Head | Slice::HeadDelta => self.layers * SLICES + 1 + layer,
            _ => layer * SLICES + slice as usize,
        }
    }

    /// A block of the embedding, the head or what is added to the head's weight.
    pub(super) fn desc(&self, rank_block: usize, tile: usize, slice: Slice) -> Option<Desc> {
        let of_head = |list: &[Desc]| {
            (tile < self.head_tiles).then(|| list.get(rank_block * self.head_tiles + tile).copied()).flatten()
        };
        let desc = match slice {
            Slice::Embed => self.embed.get(rank_block).copied(),
            Slice::Head => of_head(&self.head),
            _ => of_head(&self.head_rows),
        };
        desc.filter(|desc| *desc != ABSENT)
    }

    pub(super) fn vectors(&self, layer: usize, slice: Slice) -> Option<Vectors> {
        let vectors = self.vectors.get(self.vectors_index(layer, slice)).copied();
        vectors.filter(|vectors| vectors.unit != NO_UNIT)
    }

    /// Blocks of 16 inputs of what is added to the head's weight.
    pub(super) fn head_row_blocks(&self) -> usize {
        self.head_rows.len().checked_div(self.head_tiles).unwrap_or(0)
    }

    /// Where a token's 16 ranks lie: the unit of the block, and the token's place in it.
    pub(super) fn embed_column(&self, rank_block: usize, token: usize) -> Option<(u32, usize)> {
        let tile = token / END_TILE;
        let index = (tile < self.embed_tiles).then_some(rank_block * self.embed_tiles + tile)?;
        let unit = self.embed_columns.get(index).copied().filter(|unit| *unit != NO_UNIT)?;
        Some((unit, token % END_TILE))
    }

    /// Where a token's row of what is added to the embedding lies: the unit of the block, the row in it, and its width.
    pub(super) fn embed_row(&self, token: usize) -> Option<(u32, usize, usize)> {
        let (vocab, width) = self.embed_extents;
        let per_tile = rows_per_tile(width);
        let unit = (token < vocab).then(|| self.embed_rows.get(token / per_tile).copied()).flatten()?;
        Some((unit, token % per_tile, width))
    }

    /// Rows and width of what is added to the embedding.
    pub(super) const fn embed_extents(&self) -> (usize, usize) {
        self.embed_extents
    }
}

/// `list[index] = value`; the list grows with `empty`.
fn put<T: Clone>(list: &mut Vec<T>, index: usize, value: T, empty: T) {
    if list.len() <= index {
        list.resize(index + 1, empty);
    }
    list[index] = value;
}
