//! What an adapter consists of, before it is packed.

use super::Slice;

/// A and B of one matrix.
#[derive(Clone, Copy, Debug)]
pub struct LoraPart<'a> {
    /// The decoder layer; 0 for the embedding and the head.
    pub layer: usize,
    /// The matrix: one of a layer, [`Slice::Embed`] or [`Slice::Head`].
    pub slice: Slice,
    /// Ranks of this pair; pairs of one adapter may differ.
    pub rank: usize,
    /// A, row-major `[rank, d_in]`.
    pub a: &'a [f32],
    /// B, row-major `[d_out, rank]`.
    pub b: &'a [f32],
    /// Inputs of the matrix; for the embedding, the tokens.
    pub d_in: usize,
    /// Outputs of the matrix.
    pub d_out: usize,
    /// Factor of the delta, such as alpha / rank.
    pub scale: f32,
}

/// Two numbers for each output of a matrix: the adapter adds `gain * y + shift` to what the base computes (see
/// [`crate::lora_gain_shift()`]).
#[derive(Clone, Copy, Debug)]
pub struct VectorPart<'a> {
    /// The decoder layer; 0 for the embedding and the head.
    pub layer: usize,
    /// The matrix: one of a layer, [`Slice::Embed`] or [`Slice::Head`].
    pub slice: Slice,
    /// `[d_out]`.
    pub gain: &'a [f32],
    /// `[d_out]`.
    pub shift: &'a [f32],
}

/// An adapter. The rows of its two whole matrices are written after packing, with
/// [`AdapterImage::set_rows`](super::AdapterImage::set_rows), so that nobody needs to hold them at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdapterParts<'a> {
    /// At most one for each matrix.
    pub lora: &'a [LoraPart<'a>],
    /// At most one for each matrix.
    pub vectors: &'a [VectorPart<'a>],
    /// `(vocabulary, hidden)` of what is added to the embedding's own weight, if something is.
    pub embed_rows: Option<(usize, usize)>,
    /// The same of the head.
    pub head_rows: Option<(usize, usize)>,
}
