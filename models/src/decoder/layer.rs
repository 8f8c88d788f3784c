//! One decoder layer. LoRA sits inside the linear projections: each is the base product, then shrink and expand for the
//! rows that have an adapter.

use super::Workspace;
use super::batch::Batch;
use crate::spec::DecoderSpec;
use crate::weights::LayerWeights;
use loramux_kernels::{
    AdapterTable, Arena, AttnSpec, KvLayout, LoraScratch, LoraSite, OpError, PackedWeight, Rows, Slice, add_rms_norm,
    linear, lora_expand, lora_shrink, paged_attention, rope_store, silu_mul,
};

/// The four projections of a layer that LoRA can act on: columns of each slice in the projection's output.
pub(super) struct Sites {
    qkv: LoraSite,
    output: LoraSite,
    gate_up: LoraSite,
    down: LoraSite,
}

impl Sites {
    pub(super) fn new(spec: &DecoderSpec) -> Self {
        let (q, kv, wide) = (spec.q_width(), spec.kv_width(), spec.intermediate);
        Self {
            qkv: LoraSite {
                slices: &[Slice::Q, Slice::K, Slice::V],
                cols: vec![(0, q), (q, kv), (q + kv, kv)],
                d_in: spec.hidden,
            },
            output: LoraSite { slices: &[Slice::O], cols: vec![(0, spec.hidden)], d_in: q },
            gate_up: LoraSite {
                slices: &[Slice::Gate, Slice::Up],
                cols: vec![(0, wide), (wide, wide)],
                d_in: spec.hidden,
            },
            down: LoraSite { slices: &[Slice::Down], cols: vec![(0, spec.hidden)], d_in: wide },
        }
    }
}

/// What every layer of one step shares.
pub(super) struct StepInputs<'a> {
    pub(super) batch: &'a Batch,
    pub(super) table: &'a AdapterTable,
    pub(super) layout: &'a KvLayout,
    pub(super) attention: &'a AttnSpec,
    pub(super) sites: &'a Sites,
    pub(super) rms_eps: f32,
}

/// Runs layer `layer`. On entry `normed` holds the normed residual; on exit, normed by `next_norm`, that of the next.
pub(super) fn forward(
    layer: usize,
    weights: &LayerWeights,
    next_norm: &[f32],
    step: &StepInputs,
    arena: &mut Arena,
    space: &mut Workspace,
) -> Result<(), OpError> {
    let StepInputs { batch, layout, attention, sites, rms_eps, .. } = *step;
    let Workspace { residual, normed, qkv, attended, projected, gate_up, activated, rope, lora } = space;
    let bias = weights.qkv_bias.as_deref();
    Projection { weight: &weights.qkv, bias, site: &sites.qkv, layer }.apply(qkv, normed, step, arena, lora)?;
    rope_store(qkv, attention.heads, rope, arena, layout, layer, &batch.kv_slots)?;
    paged_attention(attended, qkv, arena, layout, layer, attention, &batch.chunks, &batch.block_table)?;
    Projection { weight: &weights.output, bias: None, site: &sites.output, layer }
        .apply(projected, attended, step, arena, lora)?;
    add_rms_norm(normed, residual, projected, &weights.mlp_norm, rms_eps)?;
    Projection { weight: &weights.gate_up, bias: None, site: &sites.gate_up, layer }
        .apply(gate_up, normed, step, arena, lora)?;
    silu_mul(activated, gate_up)?;
    Projection { weight: &weights.down, bias: None, site: &sites.down, layer }
        .apply(projected, activated, step, arena, lora)?;
    add_rms_norm(normed, residual, projected, next_norm, rms_eps)
}

/// `y = x W^T (+ bias)`, plus each row's LoRA delta.
struct Projection<'a> {
    weight: &'a PackedWeight,
    bias: Option<&'a [f32]>,
    site: &'a LoraSite,
    layer: usize,
}

impl Projection<'_> {
    fn apply(
        &self,
        y: &mut Rows,
        x: &Rows,
        step: &StepInputs,
        arena: &Arena,
        lora: &mut LoraScratch,
    ) -> Result<(), OpError> {
        let StepInputs { batch, table, .. } = *step;
        linear(y, x, self.weight, self.bias)?;
        lora_shrink(lora, x, arena, table, self.layer, self.site, &batch.work)?;
        lora_expand(y, lora, arena, table, self.layer, self.site, &batch.work)
    }
}
