//! Models as far as kernels care: what programs are compiled for.

use super::Elem;
use crate::attention::cuda::HeadShape;

/// The widths of a model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ModelShape {
    /// For reports.
    pub name: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width between gate/up and down.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens that the model knows.
    pub vocab: usize,
    /// Its 16-bit type.
    pub elem: Elem,
}

impl ModelShape {
    /// The shapes that every kernel is compiled for in tests: a small model with few heads, one with a large vocabulary, and
    /// the size that most fine-tunes have. One of them in half precision.
    #[must_use]
    pub fn tested() -> [Self; 3] {
        let shape = |name: &str, widths: [usize; 6], elem| {
            let [hidden, intermediate, heads, kv_heads, head_dim, vocab] = widths;
            Self { name: name.to_owned(), hidden, intermediate, heads, kv_heads, head_dim, vocab, elem }
        };
        [
            shape("SmolLM2-135M", [576, 1536, 9, 3, 64, 49_152], Elem::F16),
            shape("Qwen2.5-0.5B", [896, 4864, 14, 2, 64, 151_936], Elem::Bf16),
            shape("Llama-3.1-8B", [4096, 14_336, 32, 8, 128, 128_256], Elem::Bf16),
        ]
    }

    /// The heads, as attention's kernels take them.
    #[must_use]
    pub const fn head_shape(&self) -> HeadShape {
        HeadShape { heads: self.heads, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    /// Width of queries, keys and values of one position.
    #[must_use]
    pub const fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}
