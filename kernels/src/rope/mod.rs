//! Rotary positions and the write into the KV cache.
//!
//! For a head `h` and pair `i < rotary_dim / 2`, with angle `a = position * inv_freq[i]`:
//! `h'[i] = h[i] cos a - h[i + rotary_dim / 2] sin a`, `h'[i + rotary_dim / 2] = h[i + rotary_dim / 2] cos a + h[i] sin a`
//! (arXiv:2104.09864 in the half-split pairing of GPT-NeoX and Hugging Face). Elements from `rotary_dim` on pass through.
//! `qkv: [rows, (heads + 2 kv_heads) * head_dim]` f32. q and k are rotated in place; k and v are rounded to the cache's type.
//! Tokens of a sequence are written in their order: of a pair of values the first clears the second.

pub(crate) mod check;
pub(crate) mod check_lora;
mod cpu;
pub(crate) mod cuda;
pub(crate) mod cuda_lora;
#[cfg(test)]
mod tests;

use crate::arena::Arena;
use crate::error::{OpError, at_most, same};
use crate::kv_cache::{KvLayout, KvSlot};
use crate::rows::Rows;
use crate::simd::Isa;

/// Cosines and sines of one step, `[rows, rotary_dim / 2]` each: computed once, used by every layer.
#[derive(Clone, Debug)]
pub struct RopeAngles {
    inv_freq: Vec<f32>,
    attention_scaling: f32,
    rows_max: usize,
    rows: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeAngles {
    /// Takes memory for `rows_max` rows. `inv_freq` has `rotary_dim / 2` elements (already scaled, where the model scales
    /// them); cosines and sines are multiplied by `attention_scaling`.
    #[must_use]
    pub fn new(inv_freq: Vec<f32>, attention_scaling: f32, rows_max: usize) -> Self {
        let elements = rows_max * inv_freq.len();
        Self { inv_freq, attention_scaling, rows_max, rows: 0, cos: vec![0.0; elements], sin: vec![0.0; elements] }
    }

    /// Sets the angles of a step: row `t` is at `positions[t]`.
    ///
    /// # Errors
    /// [`OpError::Limit`] for more rows than `rows_max`.
    pub fn fill(&mut self, positions: &[u32]) -> Result<(), OpError> {
        at_most("rope", "rows", positions.len(), self.rows_max)?;
        self.rows = positions.len();
        let half = self.inv_freq.len();
        for (t, &position) in positions.iter().enumerate() {
            if t > 0 && positions[t - 1] == position {
                self.cos.copy_within((t - 1) * half..t * half, t * half);
                self.sin.copy_within((t - 1) * half..t * half, t * half);
                continue;
            }
            for (i, inv_freq) in self.inv_freq.iter().enumerate() {
                // The angle is an f32, as in the models' training; the functions are exact to f32.
                let (sin, cos) = f64::from(position as f32 * inv_freq).sin_cos();
                self.cos[t * half + i] = cos as f32 * self.attention_scaling;
                self.sin[t * half + i] = sin as f32 * self.attention_scaling;
            }
        }
        Ok(())
    }

    fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let half = self.inv_freq.len();
        (&self.cos[row * half..][..half], &self.sin[row * half..][..half])
    }
}

/// Rotates q and k of every row in place and writes k and v of row `t` to `slots[t]` of layer `layer`.
///
/// # Errors
/// [`OpError::Shape`] if `qkv`, `rope`, `slots` or the layout disagree; [`OpError::Limit`] if a slot or the layer is not in
/// the cache. Nothing is written then.
#[expect(clippy::too_many_arguments, reason = "what one launch takes; a struct would only rename them")]
pub fn rope_store(
    qkv: &mut Rows,
    heads: usize,
    rope: &RopeAngles,
    arena: &mut Arena,
    layout: &KvLayout,
    layer: usize,
    slots: &[KvSlot],
) -> Result<(), OpError> {
    let op = "rope_store";
    let blocks = layout.check(op, arena)?;
    same(op, "width of qkv", qkv.width(), (heads + 2 * layout.kv_heads) * layout.head_dim)?;
    same(op, "rows of the angles", rope.rows, qkv.rows())?;
    same(op, "slots", slots.len(), qkv.rows())?;
    at_most(op, "rotary_dim", 2 * rope.inv_freq.len(), layout.head_dim)?;
    at_most(op, "layer + 1", layer + 1, layout.layers)?;
    for slot in slots {
        at_most(op, "block id + 1", slot.block as usize + 1, blocks)?;
        at_most(op, "offset in the block + 1", slot.offset as usize + 1, layout.block_tokens)?;
    }
    cpu::rope_store(Isa::best(), qkv, arena, &cpu::Store { heads, rope, layout, layer, slots });
    Ok(())
}
