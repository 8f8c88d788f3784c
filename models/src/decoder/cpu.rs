//! The ops of the stack on the CPU. LoRA sits inside the projections: each is the base product, then shrink and expand for
//! the rows that have an adapter.

use super::Workspace;
use super::batch::Batch;
use super::stack::{DecoderOps, NormAt, Site};
use crate::spec::DecoderSpec;
use crate::weights::{CpuStore, Weights};
use loramux_kernels::{
    AdapterTable, Arena, AttnSpec, KvLayout, LoraSite, OpError, Slice, add_rms_norm, embedding, linear, lora_expand,
    lora_shrink, paged_attention, rms_norm, rope_store, silu_mul,
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

/// One step on the CPU.
pub(super) struct CpuOps<'a> {
    pub(super) weights: &'a Weights<CpuStore>,
    pub(super) batch: &'a Batch,
    pub(super) table: &'a AdapterTable,
    pub(super) layout: &'a KvLayout,
    pub(super) attention: &'a AttnSpec,
    pub(super) sites: &'a Sites,
    pub(super) rms_eps: f32,
    pub(super) arena: &'a mut Arena,
    pub(super) space: &'a mut Workspace,
}

impl CpuOps<'_> {
    fn norm_weight(&self, at: NormAt) -> &[f32] {
        match at {
            NormAt::Attention(layer) => &self.weights.layers[layer].attention_norm,
            NormAt::Mlp(layer) => &self.weights.layers[layer].mlp_norm,
            NormAt::Final => &self.weights.final_norm,
        }
    }
}

impl DecoderOps for CpuOps<'_> {
    type Error = OpError;

    fn embed(&mut self) -> Result<(), OpError> {
        embedding(&mut self.space.residual, &self.weights.embedding, &self.batch.tokens)?;
        self.space.rope.fill(&self.batch.positions)
    }

    fn norm(&mut self, at: NormAt) -> Result<(), OpError> {
        let mut normed = std::mem::take(&mut self.space.normed);
        let outcome = rms_norm(&mut normed, &self.space.residual, self.norm_weight(at), self.rms_eps);
        self.space.normed = normed;
        outcome
    }

    fn add_norm(&mut self, at: NormAt) -> Result<(), OpError> {
        let (mut normed, mut residual) =
            (std::mem::take(&mut self.space.normed), std::mem::take(&mut self.space.residual));
        let outcome =
            add_rms_norm(&mut normed, &mut residual, &self.space.projected, self.norm_weight(at), self.rms_eps);
        (self.space.normed, self.space.residual) = (normed, residual);
        outcome
    }

    fn project(&mut self, layer: usize, site: Site) -> Result<(), OpError> {
        let weights = &self.weights.layers[layer];
        let space = &mut *self.space;
        let (y, x, weight, bias, lora) = match site {
            Site::Qkv => (&mut space.qkv, &space.normed, &weights.qkv, weights.qkv_bias.as_deref(), &self.sites.qkv),
            Site::Output => (&mut space.projected, &space.attended, &weights.output, None, &self.sites.output),
            Site::GateUp => (&mut space.gate_up, &space.normed, &weights.gate_up, None, &self.sites.gate_up),
            Site::Down => (&mut space.projected, &space.activated, &weights.down, None, &self.sites.down),
        };
        linear(y, x, weight, bias)?;
        lora_shrink(&mut space.lora, x, self.arena, self.table, layer, lora, &self.batch.work)?;
        lora_expand(y, &space.lora, self.arena, self.table, layer, lora, &self.batch.work)
    }

    fn rope_store(&mut self, layer: usize) -> Result<(), OpError> {
        let Workspace { qkv, rope, .. } = &mut *self.space;
        rope_store(qkv, self.attention.heads, rope, self.arena, self.layout, layer, &self.batch.kv_slots)
    }

    fn attention(&mut self, layer: usize) -> Result<(), OpError> {
        let Workspace { attended, qkv, .. } = &mut *self.space;
        let Batch { chunks, block_table, .. } = self.batch;
        paged_attention(attended, qkv, self.arena, self.layout, layer, self.attention, chunks, block_table)
    }

    fn activate(&mut self) -> Result<(), OpError> {
        silu_mul(&mut self.space.activated, &self.space.gate_up)
    }
}
