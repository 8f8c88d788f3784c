//! The one decoder stack: embedding, layers, norm, head. A model family is never asked for here; [`DecoderSpec`] and the
//! packed weights say all there is to know.

mod batch;
mod cpu;
mod stack;
mod timed;

pub use batch::Batch;
pub use stack::{DecoderOps, NormAt, Site, run_layers};
pub use timed::OpTimes;

use crate::error::ModelError;
use crate::rope;
use crate::spec::DecoderSpec;
use crate::weights::{CpuStore, Model, Weights};
use cpu::{CpuOps, HeadOps, Sites};
use loramux_kernels::{
    AdapterTable, Arena, ArenaDtype, AttnSpec, Dtype, KvLayout, LoraScratch, OpError, RopeAngles, Rows, WorkList,
    gather_rows,
};
use timed::Timed;

/// Sizes of the decoder's workspaces, which are allocated once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderLimits {
    /// Rows of the largest step.
    pub step_tokens_max: usize,
    /// Rows of logits computed at a time.
    pub logits_rows_max: usize,
}

/// A loaded model with its workspaces. One step at a time: [`Decoder::forward`], then [`Decoder::logits`] for the rows
/// that are wanted. Allocates nothing between construction and drop.
pub struct Decoder {
    spec: DecoderSpec,
    weights: Weights<CpuStore>,
    dtype: Dtype,
    attention: AttnSpec,
    sites: Sites,
    /// Whether what only projections read is kept as they read it.
    rounds: bool,
    space: Workspace,
    picked: Rows,
    logits: Rows,
    head_work: WorkList,
}

/// Activations of one step, `[step_tokens_max, ...]` each.
pub(crate) struct Workspace {
    residual: Rows,
    normed: Rows,
    qkv: Rows,
    attended: Rows,
    projected: Rows,
    gate_up: Rows,
    activated: Rows,
    rope: RopeAngles,
    lora: LoraScratch,
}

impl Workspace {
    fn new(spec: &DecoderSpec, rows: usize) -> Self {
        let qkv_width = spec.q_width() + 2 * spec.kv_width();
        Self {
            residual: Rows::zeros(rows, spec.hidden),
            normed: Rows::zeros(rows, spec.hidden),
            qkv: Rows::zeros(rows, qkv_width),
            attended: Rows::zeros(rows, spec.q_width()),
            projected: Rows::zeros(rows, spec.hidden),
            gate_up: Rows::zeros(rows, 2 * spec.intermediate),
            activated: Rows::zeros(rows, spec.intermediate),
            rope: RopeAngles::new(rope::inv_freq(&spec.rope), 1.0, rows),
            lora: LoraScratch::default(),
        }
    }
}

impl Decoder {
    /// Takes a model and allocates every workspace.
    pub fn new(model: Model, limits: DecoderLimits) -> Self {
        let Model { spec, weights, dtype, .. } = model;
        let scale = (spec.head_dim as f32).sqrt().recip();
        Self {
            attention: AttnSpec { heads: spec.heads, scale, window: spec.window },
            sites: Sites::new(&spec),
            rounds: dtype == Dtype::Bf16 && weights.layers.iter().all(cpu::takes_pairs),
            space: Workspace::new(&spec, limits.step_tokens_max),
            picked: Rows::zeros(limits.logits_rows_max, spec.hidden),
            logits: Rows::zeros(limits.logits_rows_max, spec.vocab),
            head_work: WorkList::default(),
            spec,
            weights,
            dtype,
        }
    }

    /// Architecture of the model.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Storage type of the weights; [`Dtype::arena`] gives that of adapters and the KV cache.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How this model's KV cache lies in pages.
    pub fn kv_layout(&self, block_tokens: usize, page_bytes: usize, dtype: ArenaDtype) -> KvLayout {
        let DecoderSpec { layers, kv_heads, head_dim, .. } = self.spec;
        KvLayout { layers, kv_heads, head_dim, block_tokens, dtype, page_bytes }
    }

    /// Runs one step: stores keys and values in the arena and leaves the final normed hidden states inside.
    ///
    /// # Errors
    /// [`ModelError::Op`] if the batch disagrees with itself, passes a limit or names a token outside the vocabulary.
    pub fn forward(
        &mut self,
        batch: &Batch,
        layout: &KvLayout,
        arena: &mut Arena,
        table: &AdapterTable,
    ) -> Result<(), ModelError> {
        self.run(batch, layout, arena, table, None)
    }

    /// As [`Self::forward`], and adds the time of each op to `times`.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_timed(
        &mut self,
        batch: &Batch,
        layout: &KvLayout,
        arena: &mut Arena,
        table: &AdapterTable,
        times: &mut OpTimes,
    ) -> Result<(), ModelError> {
        self.run(batch, layout, arena, table, Some(times))
    }

    fn run(
        &mut self,
        batch: &Batch,
        layout: &KvLayout,
        arena: &mut Arena,
        table: &AdapterTable,
        times: Option<&mut OpTimes>,
    ) -> Result<(), ModelError> {
        let Self { spec, weights, attention, sites, rounds, space, .. } = self;
        for (what, got) in [("positions", batch.positions.len()), ("KV slots", batch.kv_slots.len())] {
            if got != batch.rows() {
                return Err(OpError::Shape { op: "decoder", what, got, want: batch.rows() }.into());
            }
        }
        let rms_eps = spec.rms_eps;
        let rounds = *rounds;
        let mut ops = CpuOps { weights, batch, table, layout, attention, sites, rounds, rms_eps, arena, space };
        match times {
            Some(times) => run_layers(&mut Timed { ops, times }, spec.layers),
            None => run_layers(&mut ops, spec.layers),
        }
        .map_err(ModelError::Op)
    }

    /// Final hidden states of the last step, after the last norm: `[rows of the batch, hidden]`.
    pub fn hidden(&self) -> &Rows {
        &self.space.normed
    }

    /// Logits of the given rows of the last step, which was that of `batch`: `[rows.len(), vocab]`, for at most
    /// `logits_rows_max` rows a call.
    ///
    /// # Errors
    /// [`ModelError::Op`] for a row outside the last step or too many rows, or if an adapter's slot has changed.
    pub fn logits(
        &mut self,
        rows: &[u32],
        batch: &Batch,
        arena: &Arena,
        table: &AdapterTable,
    ) -> Result<&mut Rows, ModelError> {
        let Self { weights, sites, space, picked, logits, head_work, .. } = self;
        gather_rows(picked, &space.normed, rows)?;
        let weight = weights.head.as_ref().unwrap_or(&weights.embedding);
        let head = HeadOps { weight, sites, arena, table, work: head_work, lora: &mut space.lora };
        head.logits(logits, picked, rows, &batch.work)?;
        Ok(logits)
    }
}
