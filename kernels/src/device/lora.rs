//! What the LoRA kernels share: the same as in `lora.cuh`.

use super::step::LoraItem;
use super::{Address, DeviceError, Elem, KernelSource, Program};
use crate::lora::RANK_BLOCK;

/// Most matrices of one site: queries, keys and values.
pub const SITE_SLICES_MAX: usize = 3;

/// Rows of a tile in steps that only decode.
pub const DECODE_TILE_ROWS: usize = 8;

/// Rows of a tile in steps with prefill.
pub const PREFILL_TILE_ROWS: usize = 64;

/// Parts that a sum over `d_in` inputs is cut into, to fill a GPU with few adapters: each has at least 512 inputs. A
/// function of the shape alone, so that bits do not depend on the batch.
#[must_use]
pub const fn splits(d_in: usize) -> usize {
    match d_in / 1024 {
        0 => 1,
        1..=8 => d_in / 1024,
        _ => 8,
    }
}

/// Where the LoRA work of one site (matrices that share an input) of one layer lies on the device.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SiteWork {
    /// `[item][slice][split][tile rows][16]` f32, of [`SiteShape::v_bytes`] bytes: between shrink and expand.
    pub v: Address,
    /// [`RowTile`](super::step::RowTile)s, `row_tiles` of them.
    pub tiles: Address,
    /// [`LoraItem`]s, `lora_items` of them.
    pub items: Address,
    /// [`StepCounts`](super::step::StepCounts).
    pub counts: Address,
    /// [`BlockDesc`](super::step::BlockDesc)s: `[block row * desc_stride + desc_first + slice]`.
    pub descs: Address,
    /// What descriptors count from.
    pub arena: Address,
    /// Descriptors of a block row: layers times [`SLICES`](crate::SLICES).
    pub desc_stride: u32,
    /// Descriptor of the site's first matrix in this layer.
    pub desc_first: u32,
    /// Matrices of the site.
    pub slices: u32,
    /// Zero.
    pub reserved: u32,
}

/// Extents of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiteShape<'a> {
    /// Inputs, a multiple of 32.
    pub d_in: usize,
    /// For each matrix its first column in `y`, a multiple of 8, and its number of outputs, a multiple of 16.
    pub cols: &'a [(usize, usize)],
    /// Most rows of a tile: [`DECODE_TILE_ROWS`] or [`PREFILL_TILE_ROWS`].
    pub tile_rows: usize,
}

impl SiteShape<'_> {
    /// Bytes of `v` for that many items.
    #[must_use]
    pub const fn v_bytes(&self, items_max: usize) -> usize {
        items_max * self.cols.len() * splits(self.d_in) * self.tile_rows * RANK_BLOCK * size_of::<f32>()
    }

    /// A program with the constants of `lora.cuh`.
    pub(crate) fn program<Args>(
        source: &'static KernelSource,
        entry: &'static str,
        threads: u32,
        elem: Elem,
        (d_in, tile_rows): (usize, usize),
    ) -> Program {
        Program::new::<Args>(source, entry, threads, elem)
            .define("TILE_ROWS", tile_rows)
            .define("LORA_SPLITS", splits(d_in))
    }

    /// What every LoRA kernel relies on.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] names the extent.
    pub(crate) fn check(&self, op: &str) -> Result<(), DeviceError> {
        let refuse = |what: String| Err(DeviceError::Unsupported(format!("{op}: {what}")));
        if self.d_in == 0 || !self.d_in.is_multiple_of(32) {
            return refuse(format!("{} inputs are no multiple of 32", self.d_in));
        }
        if self.tile_rows != DECODE_TILE_ROWS && self.tile_rows != PREFILL_TILE_ROWS {
            return refuse(format!(
                "tiles of {} rows; there are {DECODE_TILE_ROWS} and {PREFILL_TILE_ROWS}",
                self.tile_rows
            ));
        }
        if self.cols.is_empty() || self.cols.len() > SITE_SLICES_MAX {
            return refuse(format!("{} matrices; a site has 1 to {SITE_SLICES_MAX}", self.cols.len()));
        }
        for &(first, d_out) in self.cols {
            if !first.is_multiple_of(8) || d_out == 0 || !d_out.is_multiple_of(16) {
                return refuse(format!("{d_out} outputs from column {first} on; multiples of 16 and 8 are supported"));
            }
        }
        Ok(())
    }
}

const _: () = assert!(size_of::<SiteWork>() == 64 && size_of::<LoraItem>() == 16, "as in lora.cuh and step.cuh");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_has_at_least_512_inputs() {
        for d_in in (32..=65_536).step_by(32) {
            let splits = splits(d_in);
            assert!((1..=8).contains(&splits) && (splits == 1 || d_in / splits >= 512), "{d_in}: {splits}");
        }
        assert_eq!([576, 896, 2048, 4096, 4864, 14_336].map(splits), [1, 1, 2, 4, 4, 8]);
    }

    #[test]
    fn extents_that_the_kernels_cannot_take_are_refused() {
        let good = SiteShape { d_in: 576, cols: &[(0, 576), (576, 192)], tile_rows: 8 };
        assert_eq!(good.check("op"), Ok(()));
        let four = [(0, 16); 4];
        let bad = [
            SiteShape { d_in: 0, ..good },
            SiteShape { d_in: 48, ..good },
            SiteShape { tile_rows: 16, ..good },
            SiteShape { cols: &[], ..good },
            SiteShape { cols: &four, ..good },
            SiteShape { cols: &[(0, 24)], ..good },
            SiteShape { cols: &[(0, 0)], ..good },
            SiteShape { cols: &[(4, 16)], ..good },
        ];
        for shape in bad {
            assert!(matches!(shape.check("op"), Err(DeviceError::Unsupported(_))), "{shape:?}");
        }
    }
}
