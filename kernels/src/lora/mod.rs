//! Adapters: how they are packed, where they lie on the device, and which rows use which. The arithmetic is in
//! `lora_shrink` and `lora_expand`: `y[t] += s_t * (x[t] A^T) B^T`, with A, B and s of row t's adapters (S-LoRA,
//! arXiv:2311.03285; Punica, arXiv:2310.18547).
//!
//! Ranks come in blocks of 16, the last one filled with zeros. On the CPU blocks are lines of 64 bytes: of 16 ranks in an A
//! block, of 16 outputs in the panels of a B block, so that the lanes of the first product are ranks, those of the second are
//! outputs, and both are read from front to back. In f32 a line is `[16]` of one input; in bf16 it is `[16][2]` of two
//! consecutive ones, as in a packed weight, and what is multiplied with it is rounded to bf16.

mod ends;
mod image;
mod parts;
mod plan;
mod scratch;
mod table;
#[cfg(test)]
mod tests;
mod work;

pub use image::{AdapterImage, ImageLayout};
#[cfg(test)]
pub(crate) use image::{a_at, b_at};
pub(crate) use image::{a_bytes, b_elements};
pub use parts::{AdapterParts, LoraPart, VectorPart};
pub use scratch::LoraScratch;
pub use table::AdapterTable;
pub(crate) use work::Run;
pub use work::{HeadWork, Segment, SlotScale, WorkList};
#[cfg(test)]
pub(crate) mod fixture;

/// Ranks of a block.
pub const RANK_BLOCK: usize = 16;

/// Matrices of a layer that an adapter can act on.
pub const SLICES: usize = 7;

/// Outputs of the head, or tokens of the embedding, that lie in one block: a vocabulary is larger than a page.
pub const END_TILE: usize = 8192;

/// A matrix that an adapter can act on: the [`SLICES`] of a layer, then those outside the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Slice {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// The projection after attention.
    O,
    /// The gate of the MLP.
    Gate,
    /// The MLP's way up.
    Up,
    /// The MLP's way down.
    Down,
    /// The embedding. Its input is a token, so its A is read by columns.
    Embed,
    /// The head. Its outputs come in tiles of [`END_TILE`]; where an op asks for a layer, it gets the tile.
    Head,
    /// What is added to the head's own weight: a B whose A is the identity, so rank block `i` reads inputs `16 i..16 i + 16`.
    HeadDelta,
}

impl Slice {
    /// Whether it is one of the [`SLICES`] of a layer.
    #[must_use]
    pub const fn is_in_layer(self) -> bool {
        !matches!(self, Self::Embed | Self::Head | Self::HeadDelta)
    }
}

/// Matrices that share one input and whose outputs lie side by side in one `y`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraSite {
    /// The matrices, such as `[Q, K, V]`.
    pub slices: &'static [Slice],
    /// For each of them its first column in `y` and its number of outputs.
    pub cols: Vec<(usize, usize)>,
    /// Inputs.
    pub d_in: usize,
}
