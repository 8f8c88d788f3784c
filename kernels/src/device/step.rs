//! What a step tells the kernels: the same structs as in `step.cuh`, where each field is explained.

/// Positions of a KV block on a device.
pub const BLOCK_TOKENS: usize = 16;

/// Flag of a token that only the device knows; the rest is its sequence's slot.
pub const FROM_DEVICE: u32 = 1 << 31;

/// `a_unit` and `b_unit` of a slice that the adapter leaves alone.
pub const NOT_TARGETED: u32 = u32::MAX;

/// Most stretches that one decoding row's keys are cut into.
pub const DECODE_PARTS_MAX: usize = 16;

/// How much there is to do.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepCounts {
    /// Rows that mean something.
    pub rows: u32,
    /// Number of [`LoraItem`].
    pub lora_items: u32,
    /// Number of [`RowTile`].
    pub row_tiles: u32,
    /// Number of [`DecodeUnit`].
    pub decode_units: u32,
    /// Number of [`PrefillTile`].
    pub prefill_tiles: u32,
    /// Rows to sample.
    pub sample_rows: u32,
    /// Zero.
    pub reserved: [u32; 2],
}

/// One rank block of one slice of one resident adapter.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockDesc {
    /// The A block `[16][d_in]`, in units of 256 bytes from the arena's start.
    pub a_unit: u32,
    /// The B block `[d_out][16]`.
    pub b_unit: u32,
    /// alpha / r of the module.
    pub scale: f32,
    /// Gains and shifts of the slice, `[2][d_out]` f32: their unit plus one; 0 if there are none. In the first rank block only.
    pub vectors: u32,
}

impl BlockDesc {
    /// The slice is left alone.
    pub const ABSENT: Self = Self { a_unit: NOT_TARGETED, b_unit: NOT_TARGETED, scale: 0.0, vectors: 0 };
}

/// Rows that use one rank block of one adapter.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraItem {
    /// Row of the descriptor table.
    pub block_row: u32,
    /// First row of the batch.
    pub first_row: u32,
    /// Rows, at least one.
    pub row_count: u32,
    /// The request's factor.
    pub scale: f32,
}

/// Rows and the items that act on them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowTile {
    /// First row of the batch.
    pub first_row: u32,
    /// Rows.
    pub row_count: u32,
    /// First item.
    pub first_item: u32,
    /// Items; none for rows of the base model.
    pub item_count: u32,
}

/// A stretch of one decoding row's keys.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodeUnit {
    /// Row of the batch.
    pub row: u32,
    /// First entry in the block table.
    pub blocks: u32,
    /// First position, a multiple of 16.
    pub kv_begin: u32,
    /// Behind the last position.
    pub kv_end: u32,
    /// Which stretch.
    pub part: u32,
    /// Of how many.
    pub parts: u32,
    /// Zero.
    pub reserved: [u32; 2],
}

/// Consecutive rows of one prefill chunk.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefillTile {
    /// First row of the batch.
    pub first_row: u32,
    /// Rows.
    pub row_count: u32,
    /// Position of the first row.
    pub position: u32,
    /// First entry in the block table.
    pub blocks: u32,
}

/// How KV blocks lie in the arena.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvShape {
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Blocks in a page.
    pub per_page: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Zero.
    pub reserved: u32,
}

/// The stretches of a row that sees `kv_len` positions from `kv_first` on: cut by the row's own length only, so that its
/// sums do not depend on the batch. Each is a multiple of 16 positions, at least 256, and there are at most 16.
pub fn decode_units(row: u32, blocks: u32, kv_first: usize, kv_len: usize) -> impl Iterator<Item = DecodeUnit> {
    let begin = kv_first / BLOCK_TOKENS * BLOCK_TOKENS;
    let span = kv_len.saturating_sub(begin);
    let stretch = span.div_ceil(DECODE_PARTS_MAX).next_multiple_of(BLOCK_TOKENS).max(256);
    let parts = span.div_ceil(stretch).max(1);
    (0..parts).map(move |part| DecodeUnit {
        row,
        blocks,
        kv_begin: (begin + part * stretch) as u32,
        kv_end: (begin + (part + 1) * stretch).min(kv_len) as u32,
        part: part as u32,
        parts: parts as u32,
        reserved: [0; 2],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_cover_every_position_once() {
        for (first, len) in [(0, 1), (0, 16), (0, 255), (0, 257), (5, 300), (100, 4096), (0, 4097), (31, 131_072)] {
            let units: Vec<_> = decode_units(7, 3, first, len).collect();
            assert!(units.len() <= DECODE_PARTS_MAX);
            assert!(units[0].kv_begin as usize <= first && first < units[0].kv_begin as usize + 16);
            assert_eq!(units.last().unwrap().kv_end as usize, len);
            assert!(units.windows(2).all(|pair| pair[0].kv_end == pair[1].kv_begin));
            assert!(units.iter().all(|unit| unit.kv_begin < unit.kv_end && unit.parts as usize == units.len()));
        }
    }
}
