//! A weight matrix in either form.

use super::{QuantWeight, quant_linear};
use crate::embedding;
use crate::error::OpError;
use crate::linear::{PackedWeight, linear};
use crate::lora_expand::lora_expand;
use crate::lora_gain_shift::lora_gain_shift;
use crate::lora_shrink::lora_shrink;
use crate::projection::{Adapters, project};
use crate::rows::Rows;

/// A weight matrix `[d_out, d_in]` as the CPU's products take it.
#[derive(Debug)]
pub enum Matrix {
    /// In f32 or bf16.
    Packed(PackedWeight),
    /// In the 4 to 8 bits of a GGUF file.
    Quant(QuantWeight),
}

impl Matrix {
    /// Memory in bytes, padding included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Packed(weight) => weight.bytes(),
            Self::Quant(weight) => weight.bytes(),
        }
    }

    /// Whether its products read their inputs as pairs of bf16: see [`Rows::hold_pairs`].
    #[must_use]
    pub fn takes_pairs(&self) -> bool {
        match self {
            Self::Packed(weight) => weight.takes_pairs(),
            Self::Quant(_) => false,
        }
    }

    /// `y = x W^T (+ bias)`; `y` gets the rows of `x`.
    ///
    /// # Errors
    /// Those of [`linear`] and [`quant_linear`].
    pub fn linear(&self, y: &mut Rows, x: &Rows, bias: Option<&[f32]>) -> Result<(), OpError> {
        match self {
            Self::Packed(weight) => linear(y, x, weight, bias),
            Self::Quant(weight) => quant_linear(y, x, weight, bias),
        }
    }

    /// [`Matrix::linear`], and what the adapters add.
    ///
    /// # Errors
    /// Those of [`project`].
    pub fn project(&self, y: &mut Rows, x: &Rows, bias: Option<&[f32]>, adapters: Adapters) -> Result<(), OpError> {
        match self {
            Self::Packed(weight) => project(y, x, weight, bias, adapters),
            Self::Quant(weight) => {
                quant_linear(y, x, weight, bias)?;
                let Adapters { v, arena, table, layer, site, work } = adapters;
                if work.is_empty() {
                    return Ok(());
                }
                lora_gain_shift(y, arena, table, layer, site, work)?;
                lora_shrink(v, x, arena, table, layer, site, work)?;
                lora_expand(y, v, arena, table, layer, site, work)
            }
        }
    }

    /// Reads row `tokens[t]` into row `t` of `out`, which gets one row per token.
    ///
    /// # Errors
    /// Those of [`embedding`](crate::embedding()).
    pub fn embedding(&self, out: &mut Rows, tokens: &[u32]) -> Result<(), OpError> {
        match self {
            Self::Packed(weight) => embedding::embedding(out, weight, tokens),
            Self::Quant(weight) => {
                embedding::gather(out, weight.d_out(), weight.d_in(), tokens, |row, k| weight.element(row, k))
            }
        }
    }
}
