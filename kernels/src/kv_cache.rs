//! Where keys and values lie in the arena.

use crate::arena::Arena;
use crate::dtype::ArenaDtype;
use crate::error::{OpError, at_most};
use crate::simd::LANES;

/// Bytes of a word of the cache.
pub(crate) const WORD_BYTES: usize = 4;

/// Shape of the KV cache. Block `b` lies in page `b / blocks_per_page()`.
///
/// Inside a block: layer, then K and V, then kv head. On the CPU all of it is words of 4 bytes: an f32, or two bf16, the first in
/// the low half. A head's K is `[head_dim / elements of a word][block_tokens rounded up to 16]`: lanes of a score are tokens, a
/// pair is two dimensions. Its V is `[block_tokens / elements of a word][head_dim rounded up to 16]`: lanes of an output are
/// dimensions, a pair is two tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Decoder layers.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Positions of a block; multiples of 16 waste nothing.
    pub block_tokens: usize,
    /// Storage type.
    pub dtype: ArenaDtype,
    /// Bytes of an arena page.
    pub page_bytes: usize,
}

impl KvLayout {
    /// Bytes of a block: all layers of `block_tokens` positions.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        self.layers * self.kv_heads * (self.k_words() + self.v_words()) * WORD_BYTES
    }

    /// Blocks in a page.
    #[must_use]
    pub const fn blocks_per_page(&self) -> usize {
        self.page_bytes / self.block_bytes()
    }

    /// Row length of K, in words.
    pub(crate) const fn k_stride(&self) -> usize {
        self.block_tokens.next_multiple_of(LANES)
    }

    /// Row length of V, in words.
    pub(crate) const fn v_stride(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Words of a head's K in a block.
    pub(crate) const fn k_words(&self) -> usize {
        self.head_dim.div_ceil(self.dtype.per_word()) * self.k_stride()
    }

    /// Words of a head's V in a block.
    pub(crate) const fn v_words(&self) -> usize {
        self.block_tokens.div_ceil(self.dtype.per_word()) * self.v_stride()
    }

    /// Offset of a head's K from the start of the block, in words.
    pub(crate) const fn k_offset(&self, layer: usize, kv_head: usize) -> usize {
        layer * self.kv_heads * (self.k_words() + self.v_words()) + kv_head * self.k_words()
    }

    /// Offset of a head's V from the start of the block, in words.
    pub(crate) const fn v_offset(&self, layer: usize, kv_head: usize) -> usize {
        self.k_offset(layer, self.kv_heads) + kv_head * self.v_words()
    }

    /// Offset of a block from the start of the arena, in words.
    pub(crate) const fn block_offset(&self, block: u32) -> usize {
        let (block, per_page) = (block as usize, self.blocks_per_page());
        ((block / per_page) * self.page_bytes + (block % per_page) * self.block_bytes()) / WORD_BYTES
    }

    /// Element `d` of a token's key in a head's K, in elements from its start.
    #[cfg(test)]
    pub(crate) const fn k_element(&self, d: usize, token: usize) -> usize {
        let per = self.dtype.per_word();
        (d / per * self.k_stride() + token) * per + d % per
    }

    /// Element `d` of a token's value in a head's V, in elements from its start.
    #[cfg(test)]
    pub(crate) const fn v_element(&self, d: usize, token: usize) -> usize {
        let per = self.dtype.per_word();
        (token / per * self.v_stride() + d) * per + token % per
    }

    /// Checks the layout itself and that `arena` has its pages; returns the number of blocks.
    pub(crate) fn check(&self, op: &'static str, arena: &Arena) -> Result<usize, OpError> {
        let shape = |what, got, want| Err(OpError::Shape { op, what, got, want });
        if self.block_bytes() == 0 {
            return shape("bytes of a KV block", 0, 1);
        }
        if self.page_bytes != arena.page_bytes() {
            return shape("page bytes", self.page_bytes, arena.page_bytes());
        }
        at_most(op, "bytes of a KV block", self.block_bytes(), self.page_bytes)?;
        Ok(self.blocks_per_page() * arena.pages())
    }
}

/// Where one row's key and value go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSlot {
    /// The block.
    pub block: u32,
    /// Position inside the block.
    pub offset: u32,
}

/// Copies one block, all layers, for copy-on-write.
///
/// # Errors
/// [`OpError::Limit`] if a block is not in the arena, [`OpError::Shape`] if the layout is not the arena's.
pub fn copy_block(arena: &mut Arena, layout: &KvLayout, src: u32, dst: u32) -> Result<(), OpError> {
    let blocks = layout.check("copy_block", arena)?;
    at_most("copy_block", "block id + 1", src.max(dst) as usize + 1, blocks)?;
    let start = |block| layout.block_offset(block) * WORD_BYTES;
    let (from, to) = (start(src), start(dst));
    arena.bytes_mut().copy_within(from..from + layout.block_bytes(), to);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(head_dim: usize, block_tokens: usize) -> KvLayout {
        KvLayout { layers: 2, kv_heads: 3, head_dim, block_tokens, dtype: ArenaDtype::Bf16, page_bytes: 64 << 10 }
    }

    #[test]
    fn a_block_is_copied_whole_and_nothing_else() {
        let layout = layout(32, 16);
        let mut arena = Arena::new(layout.page_bytes, 2).unwrap();
        let (src, dst) = (1u32, layout.blocks_per_page() as u32 + 2);
        let at = |block| layout.block_offset(block) * WORD_BYTES;
        arena.bytes_mut()[at(src)..][..layout.block_bytes()].fill(9);
        copy_block(&mut arena, &layout, src, dst).unwrap();
        let nines = arena.bytes().iter().filter(|&&b| b == 9).count();
        assert_eq!(nines, 2 * layout.block_bytes());
        assert!(arena.bytes()[at(dst)..][..layout.block_bytes()].iter().all(|&b| b == 9));
        let blocks = 2 * layout.blocks_per_page() as u32;
        assert!(matches!(copy_block(&mut arena, &layout, 0, blocks), Err(OpError::Limit { .. })));
    }

    #[test]
    fn parts_of_a_block_do_not_overlap() {
        for (head_dim, block_tokens) in [(8, 4), (16, 16), (20, 32), (64, 24), (5, 3)] {
            let layout = layout(head_dim, block_tokens);
            let mut starts = Vec::new();
            for layer in 0..layout.layers {
                for head in 0..layout.kv_heads {
                    starts.push((layout.k_offset(layer, head), layout.k_words()));
                    starts.push((layout.v_offset(layer, head), layout.v_words()));
                }
            }
            starts.sort_unstable();
            let mut end = 0;
            for (start, words) in starts {
                assert_eq!(start, end, "head_dim {head_dim}");
                end = start + words;
            }
            assert_eq!(end * WORD_BYTES, layout.block_bytes());
        }
    }
}
