//! Causal attention over the paged KV cache, for rows whose keys and values are already in it.
//!
//! For a row at position `p` and head `h`, with `j` from `max(0, p + 1 - window)` to `p` and g = h's kv head:
//! `s[j] = scale * sum over d of q[d] k[j, d]` (one FMA chain), `w[j] = e^(s[j] - max s)`,
//! `out[d] = (sum over j of w[j] v[j, d]) / (sum over j of w[j])`; the first sum is one FMA chain in the order of `j`, the
//! second runs in 16 lanes by a key's place in its block and then by halves. So a row's bits depend on its own tokens and
//! on `block_tokens`, not on chunks, batch mates or where its blocks lie.
//!
//! A cache of bf16 holds pairs, two dimensions of a key and two tokens' values, and meets pairs: `q` is rounded to bf16 in the
//! first product and `w` in the sum above the line (not in that below); of a pair the second is added first.
//!
//! `qkv: [rows, (heads + 2 kv_heads) * head_dim]` (only q is read), `out: [rows, heads * head_dim]`, f32 or
//! pairs of bf16 ([`Rows::hold_pairs`]).

pub(crate) mod check;
mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::arena::Arena;
use crate::error::{OpError, at_most, same};
use crate::kv_cache::KvLayout;
use crate::rows::Rows;
use crate::simd::Isa;
use std::ops::Range;

/// Rows of one sequence: `first_row..first_row + len` are its positions `start..start + len`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttnChunk {
    /// First row of the batch.
    pub first_row: usize,
    /// Number of rows.
    pub len: usize,
    /// Position of the first row.
    pub start: usize,
    /// The sequence's blocks, as a range of the step's block table; they reach at least to the chunk's last position.
    pub blocks: Range<usize>,
}

/// What all layers' attention shares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttnSpec {
    /// Query heads; a multiple of the kv heads.
    pub heads: usize,
    /// Factor of the scores, 1 / sqrt(head_dim) as a rule.
    pub scale: f32,
    /// Keys that a position sees, itself included; `None`: all before it.
    pub window: Option<usize>,
}

/// Attention of every chunk; `out` gets the rows of `qkv`. Rows in no chunk are left as they are.
///
/// # Errors
/// [`OpError::Shape`] if extents disagree, [`OpError::Limit`] if a chunk's rows or blocks are not there. Nothing is written
/// then.
#[expect(clippy::too_many_arguments, reason = "what one launch takes; a struct would only rename them")]
pub fn paged_attention(
    out: &mut Rows,
    qkv: &Rows,
    arena: &Arena,
    layout: &KvLayout,
    layer: usize,
    spec: &AttnSpec,
    chunks: &[AttnChunk],
    block_table: &[u32],
) -> Result<(), OpError> {
    let op = "paged_attention";
    let blocks = layout.check(op, arena)?;
    same(op, "width of qkv", qkv.width(), (spec.heads + 2 * layout.kv_heads) * layout.head_dim)?;
    same(op, "width of out", out.width(), spec.heads * layout.head_dim)?;
    same(op, "heads modulo kv heads", spec.heads % layout.kv_heads, 0)?;
    at_most(op, "layer + 1", layer + 1, layout.layers)?;
    let mut rows_end = 0;
    for chunk in chunks {
        // In order and apart, so that threads write different rows.
        at_most(op, "rows of chunks before a chunk", rows_end, chunk.first_row)?;
        rows_end = chunk.first_row.saturating_add(chunk.len);
        at_most(op, "last row of a chunk", rows_end, qkv.rows())?;
        at_most(op, "end of a chunk's blocks", chunk.blocks.end, block_table.len())?;
        if chunk.len == 0 {
            continue;
        }
        let needed = chunk.start.saturating_add(chunk.len).div_ceil(layout.block_tokens);
        at_most(op, "blocks a chunk needs", needed, chunk.blocks.len())?;
        for &block in &block_table[chunk.blocks.clone()][..needed] {
            at_most(op, "block id + 1", block as usize + 1, blocks)?;
        }
    }
    out.set_rows(qkv.rows())?;
    let attention = cpu::Attention { qkv, arena: arena.bytes(), layout, layer, spec, chunks, block_table };
    cpu::paged_attention(Isa::best(), out, &attention);
    Ok(())
}
