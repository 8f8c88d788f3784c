//! The ops of the stack on the CPU. LoRA sits inside the projections: each is the base product, then shrink and expand for
//! the rows that have an adapter.

use super::Workspace;
use super::batch::Batch;
use super::stack::{DecoderOps, NormAt, Site};
use crate::spec::DecoderSpec;
use crate::weights::{CpuStore, LayerWeights, Weights};
use loramux_kernels::{
    AdapterTable, Adapters, Arena, AttnSpec, END_TILE, HeadWork, KvLayout, LoraScratch, LoraSite, Matrix, OpError,
    Rows, Slice, WorkList, add_rms_norm, lora_embed_rows, lora_embed_shrink, lora_expand, lora_gain_shift,
    lora_identity_shrink, lora_shrink, paged_attention, rms_norm, rope_store, silu_mul,
};

/// The products that LoRA can act on: the four projections of a layer with the columns of each slice in their output, the
/// embedding, and the head in tiles of its outputs.
pub(super) struct Sites {
    qkv: LoraSite,
    output: LoraSite,
    gate_up: LoraSite,
    down: LoraSite,
    embed: LoraSite,
    head: Vec<LoraSite>,
    head_rows: Vec<LoraSite>,
}

fn head_tiles(spec: &DecoderSpec, slices: &'static [Slice]) -> Vec<LoraSite> {
    let starts = (0..spec.vocab).step_by(END_TILE);
    let cols = |first: usize| vec![(first, (spec.vocab - first).min(END_TILE))];
    starts.map(|first| LoraSite { slices, cols: cols(first), d_in: spec.hidden }).collect()
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
            embed: LoraSite { slices: &[Slice::Embed], cols: vec![(0, spec.hidden)], d_in: spec.vocab },
            head: head_tiles(spec, &[Slice::Head]),
            head_rows: head_tiles(spec, &[Slice::HeadDelta]),
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
    /// Whether the inputs of all projections are kept as pairs of bf16.
    pub(super) rounds: bool,
    pub(super) rms_eps: f32,
    pub(super) arena: &'a mut Arena,
    pub(super) space: &'a mut Workspace,
}

/// Whether all projections of a layer read pairs of bf16.
pub(super) fn takes_pairs(layer: &LayerWeights<CpuStore>) -> bool {
    [&layer.qkv, &layer.output, &layer.gate_up, &layer.down].into_iter().all(Matrix::takes_pairs)
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
        let Batch { tokens, positions, work, .. } = self.batch;
        let Workspace { residual, rope, lora, .. } = &mut *self.space;
        self.weights.embedding.embedding(residual, tokens)?;
        if work.acts_on_embedding() {
            let site = &self.sites.embed;
            lora_gain_shift(residual, self.arena, self.table, 0, site, work)?;
            lora_embed_shrink(lora, self.arena, self.table, site, tokens, work)?;
            lora_expand(residual, lora, self.arena, self.table, 0, site, work)?;
            lora_embed_rows(residual, self.arena, self.table, tokens, work)?;
        }
        rope.fill(positions)
    }

    fn norm(&mut self, at: NormAt) -> Result<(), OpError> {
        let mut normed = std::mem::take(&mut self.space.normed);
        normed.hold_pairs(self.rounds && at != NormAt::Final);
        let outcome = rms_norm(&mut normed, &self.space.residual, self.norm_weight(at), self.rms_eps);
        self.space.normed = normed;
        outcome
    }

    fn add_norm(&mut self, at: NormAt) -> Result<(), OpError> {
        let (mut normed, mut residual) =
            (std::mem::take(&mut self.space.normed), std::mem::take(&mut self.space.residual));
        normed.hold_pairs(self.rounds && at != NormAt::Final);
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
        let (arena, table, work) = (&*self.arena, self.table, &self.batch.work);
        weight.project(y, x, bias, Adapters { v: &mut space.lora, arena, table, layer, site: lora, work })
    }

    fn rope_store(&mut self, layer: usize) -> Result<(), OpError> {
        let Workspace { qkv, rope, .. } = &mut *self.space;
        rope_store(qkv, self.attention.heads, rope, self.arena, self.layout, layer, &self.batch.kv_slots)
    }

    fn attention(&mut self, layer: usize) -> Result<(), OpError> {
        let Workspace { attended, qkv, .. } = &mut *self.space;
        attended.hold_pairs(self.rounds);
        let Batch { chunks, block_table, .. } = self.batch;
        paged_attention(attended, qkv, self.arena, self.layout, layer, self.attention, chunks, block_table)
    }

    fn activate(&mut self) -> Result<(), OpError> {
        self.space.activated.hold_pairs(self.rounds);
        silu_mul(&mut self.space.activated, &self.space.gate_up)
    }
}

/// The head's product for the rows whose logits are wanted, and what their adapters change of it.
pub(super) struct HeadOps<'a> {
    pub(super) weight: &'a Matrix,
    pub(super) sites: &'a Sites,
    pub(super) arena: &'a Arena,
    pub(super) table: &'a AdapterTable,
    /// Kept between calls.
    pub(super) work: &'a mut WorkList,
    pub(super) lora: &'a mut LoraScratch,
}

impl HeadOps<'_> {
    /// `logits = picked W^T` and the deltas; row `i` of `picked` is row `rows[i]` of the step that `step` is of.
    pub(super) fn logits(self, logits: &mut Rows, picked: &Rows, rows: &[u32], step: &WorkList) -> Result<(), OpError> {
        let Self { weight, sites, arena, table, work, lora } = self;
        weight.linear(logits, picked, None)?;
        work.select(table, step, rows, HeadWork::Pairs)?;
        if !work.is_empty() {
            for (tile, site) in sites.head.iter().enumerate() {
                lora_gain_shift(logits, arena, table, tile, site, work)?;
                lora_shrink(lora, picked, arena, table, tile, site, work)?;
                lora_expand(logits, lora, arena, table, tile, site, work)?;
            }
        }
        work.select(table, step, rows, HeadWork::Rows)?;
        if !work.is_empty() {
            for (tile, site) in sites.head_rows.iter().enumerate() {
                lora_identity_shrink(lora, picked, table, tile, site, work)?;
                lora_expand(logits, lora, arena, table, tile, site, work)?;
            }
        }
        Ok(())
    }
}
