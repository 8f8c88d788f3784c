//! The ops of the decoder stack as launches. What varies from step to step lies in the bundle, so the same launches can be
//! captured once for a bucket and replayed for every step of it.

use loramux_kernels::SLICES;
use loramux_kernels::cuda::{
    AttnDecodeLaunch, AttnPrefillLaunch, EmbeddingBuffers, GatherBuffers, KvCache, RmsNormBuffers, RopeCacheLaunch,
    SampleRow, SamplerBuffers,
};
use loramux_kernels::device::lora::SiteWork;
use loramux_kernels::device::step::{DECODE_PARTS_MAX, LoraItem, RowTile, StepCounts};
use loramux_kernels::device::{Address, DeviceError};
use loramux_models::{DecoderOps, NormAt, Site, run_layers};

use super::bundle::{Bundles, List};
use super::engine::Engine;
use super::lists::LoraPass;

/// What kind of step is launched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape<'a> {
    /// Rows that kernels compute, padding included.
    pub(super) rows: usize,
    /// Rows of the products.
    pub(super) bucket: usize,
    /// Rows of the LoRA tiles: 0 for decodes, 1 for prompts.
    pub(super) tiles: usize,
    /// The LoRA work; none for steps without adapters.
    pub(super) passes: &'a [LoraPass],
    /// Whether an adapter of the step has gains and shifts.
    pub(super) vectors: bool,
    /// Tiles of chunks of several rows.
    pub(super) prefill_tiles: usize,
}

/// One step's launches.
pub(super) struct StepOps<'a> {
    engine: &'a Engine,
    bundles: &'a Bundles,
    shape: Shape<'a>,
    /// A site whose deltas were shrunk and not yet expanded: the next op does it.
    unexpanded: Option<(usize, Site)>,
}

impl<'a> StepOps<'a> {
    pub(super) fn new(engine: &'a Engine, bundles: &'a Bundles, shape: Shape<'a>) -> Self {
        Self { engine, bundles, shape, unexpanded: None }
    }

    /// The forward pass.
    pub(super) fn forward(&mut self) -> Result<(), DeviceError> {
        let layers = self.engine.spec.layers;
        run_layers(self, layers)
    }

    /// Logits of rows `first..first + count` of the list of logit rows, and their samples. In a step that only decodes, the
    /// rows of the batch themselves.
    pub(super) fn sample(&self, first: usize, count: usize, gather: bool) -> Result<(), DeviceError> {
        let Engine { device, stream, kernels, plans, space, model, spec, .. } = self.engine;
        let (bucket, plan) =
            plans.head(count).ok_or_else(|| DeviceError::Unsupported(format!("{count} rows of logits at a time")))?;
        // The counts of this group of rows lie behind those of the step and its LoRA passes.
        let counts = self.counts(1 + self.shape.passes.len() + first / self.engine.limits.logit_rows_max);
        let weight = model.weights.head.as_ref().unwrap_or(&model.weights.embedding).address();
        let rows = if gather {
            let index = self.bundles.place(List::LogitRows) + 4 * first as u64;
            let buffers = GatherBuffers { picked: space.picked.address(), rows: space.normed.address(), index, counts };
            // SAFETY: the lists were checked against the capacities of these buffers, which live as long as the engine.
            unsafe { kernels.gather.launch(&**device, *stream, &buffers, bucket, self.shape.rows)? };
            space.picked.address()
        } else {
            space.normed.address()
        };
        let row_bytes = size_of::<SampleRow>() as u64;
        let buffers = SamplerBuffers {
            logits: space.logits.address(),
            rows: self.bundles.place(List::SampleRows) + row_bytes * first as u64,
            counts,
            edits: self.bundles.place(List::Edits),
            masks: self.bundles.place(List::Masks),
            last_token: space.last_token.address(),
            out: space.sample_out.address(),
            top: space.sample_top.address(),
        };
        debug_assert!(bucket * spec.vocab * 4 <= space.logits.bytes());
        // SAFETY: the same.
        unsafe {
            device.gemm(*stream, plan, space.logits.address(), rows, weight)?;
            kernels.sampler.launch(&**device, *stream, &buffers, bucket)
        }
    }

    fn counts(&self, index: usize) -> Address {
        self.bundles.place(List::Counts) + (index * size_of::<StepCounts>()) as u64
    }

    fn cache(&self, layer: usize) -> KvCache {
        KvCache { arena: self.engine.arena, shape: self.engine.kv, layer: layer as u32 }
    }

    fn norm_weight(&self, at: NormAt) -> Address {
        let weights = &self.engine.model.weights;
        match at {
            NormAt::Attention(layer) => weights.layers[layer].attention_norm.address(),
            NormAt::Mlp(layer) => weights.layers[layer].mlp_norm.address(),
            NormAt::Final => weights.final_norm.address(),
        }
    }

    fn norm_buffers(&self, at: NormAt, y: Option<Address>) -> RmsNormBuffers {
        let space = &self.engine.space;
        RmsNormBuffers {
            residual: space.residual.address(),
            y,
            weight: self.norm_weight(at),
            out: space.normed.address(),
        }
    }

    /// Where the LoRA work of a site lies, for one pass.
    fn work(&self, layer: usize, site: Site, pass: usize) -> SiteWork {
        let kernels = &self.engine.kernels.sites[site as usize];
        let LoraPass { first_tile, first_item, .. } = self.shape.passes[pass];
        SiteWork {
            v: self.engine.space.v.address(),
            tiles: self.bundles.place(List::RowTiles) + (first_tile * size_of::<RowTile>()) as u64,
            items: self.bundles.place(List::Items) + (first_item * size_of::<LoraItem>()) as u64,
            counts: self.counts(1 + pass),
            descs: self.engine.descs,
            arena: self.engine.arena,
            desc_stride: (self.engine.spec.layers * SLICES) as u32,
            desc_first: (layer * SLICES) as u32 + kernels.first_slice,
            slices: kernels.slices,
            reserved: 0,
        }
    }

    /// The base product of a site with the shrink of the first pass beside it, then the deltas.
    fn launch_site(
        &mut self,
        layer: usize,
        site: Site,
        y: Address,
        x: Address,
        weight: Address,
    ) -> Result<(), DeviceError> {
        let Engine { device, stream, side, fork, join, kernels, plans, .. } = self.engine;
        let Shape { bucket, tiles, passes, .. } = self.shape;
        let kernels = &kernels.sites[site as usize];
        let plan = plans
            .site(bucket, site)
            .ok_or_else(|| DeviceError::Unsupported(format!("a step of {bucket} rows has no plan")))?;
        let device = &**device;
        let (shrink, expand) = (&kernels.shrink[tiles], &kernels.expand[tiles]);
        if !passes.is_empty() {
            device.record(*fork, *stream)?;
            device.wait(*side, *fork)?;
            // SAFETY: the lists were checked against the capacities; `v` is the last expand's no more, which `fork` is behind.
            unsafe { shrink.launch(device, *side, &self.work(layer, site, 0), x, kernels.d_in)? };
            device.record(*join, *side)?;
        }
        // SAFETY: workspaces of the engine with room for `bucket` rows.
        unsafe { device.gemm(*stream, plan, y, x, weight)? };
        for pass in 0..passes.len() {
            let work = self.work(layer, site, pass);
            if self.shape.vectors {
                // SAFETY: the same; y is the product's, which is before this on the stream.
                unsafe { kernels.gain_shift.launch(device, *stream, &work, y, kernels.width)? };
            }
            if pass == 0 {
                device.wait(*stream, *join)?;
                if tiles == 0 && passes.len() == 1 && self.engine.fusions.has(site) {
                    self.unexpanded = Some((layer, site));
                    return Ok(());
                }
            } else {
                // SAFETY: as above; later passes use `v` after the expand before them, on the same stream.
                unsafe { shrink.launch(device, *stream, &work, x, kernels.d_in)? };
            }
            // SAFETY: the same.
            unsafe { expand.launch(device, *stream, &work, y, kernels.width)? };
        }
        Ok(())
    }
}

impl DecoderOps for StepOps<'_> {
    type Error = DeviceError;

    fn embed(&mut self) -> Result<(), DeviceError> {
        let Engine { device, stream, kernels, space, model, .. } = self.engine;
        let buffers = EmbeddingBuffers {
            out: space.residual.address(),
            table: model.weights.embedding.address(),
            tokens: self.bundles.place(List::Tokens),
            last_token: space.last_token.address(),
        };
        // SAFETY: workspaces of the engine, large enough for the rows that the lists were checked for.
        unsafe { kernels.embedding.launch(&**device, *stream, &buffers, self.shape.rows) }
    }

    fn norm(&mut self, at: NormAt) -> Result<(), DeviceError> {
        let Engine { device, stream, kernels, .. } = self.engine;
        // SAFETY: workspaces of the engine, large enough for the rows that the lists were checked for.
        unsafe { kernels.norm.launch(&**device, *stream, &self.norm_buffers(at, None), self.shape.rows) }
    }

    fn add_norm(&mut self, at: NormAt) -> Result<(), DeviceError> {
        let Engine { device, stream, kernels, space, .. } = self.engine;
        let buffers = self.norm_buffers(at, Some(space.projected.address()));
        let Some((layer, site)) = self.unexpanded.take() else {
            // SAFETY: the same.
            return unsafe { kernels.norm.launch(&**device, *stream, &buffers, self.shape.rows) };
        };
        let fused = if site == Site::Down { &kernels.norm_down } else { &kernels.norm_output };
        let work = self.work(layer, site, 0);
        // SAFETY: the same, and the site's shrink was launched before.
        unsafe { fused.launch(&**device, *stream, &work, &buffers) }
    }

    fn project(&mut self, layer: usize, site: Site) -> Result<(), DeviceError> {
        let (space, weights) = (&self.engine.space, &self.engine.model.weights.layers[layer]);
        let (y, x, weight) = match site {
            Site::Qkv => (&space.qkv, &space.normed, &weights.qkv),
            Site::Output => (&space.projected, &space.attended, &weights.output),
            Site::GateUp => (&space.gate_up, &space.normed, &weights.gate_up),
            Site::Down => (&space.projected, &space.activated, &weights.down),
        };
        self.launch_site(layer, site, y.address(), x.address(), weight.address())
    }

    fn rope_store(&mut self, layer: usize) -> Result<(), DeviceError> {
        let Engine { device, stream, kernels, space, model, .. } = self.engine;
        let launch = RopeCacheLaunch {
            qkv: space.qkv.address(),
            bias: model.weights.layers[layer].qkv_bias.as_ref().map(|bias| bias.address()),
            cos_sin: space.cos_sin.address(),
            positions: self.bundles.place(List::Positions),
            slots: self.bundles.place(List::KvSlots),
            cache: self.cache(layer),
            rows: self.shape.rows,
        };
        if let Some((layer, site)) = self.unexpanded.take() {
            let work = self.work(layer, site, 0);
            // SAFETY: the same as below, and the site's shrink was launched before.
            return unsafe { kernels.rope_lora.launch(&**device, *stream, &work, &launch) };
        }
        // SAFETY: the same, and the slots were checked to lie in the arena.
        unsafe { kernels.rope.launch(&**device, *stream, &launch) }
    }

    fn attention(&mut self, layer: usize) -> Result<(), DeviceError> {
        let Engine { device, stream, kernels, space, limits, .. } = self.engine;
        let (cache, counts) = (self.cache(layer), self.counts(0));
        let launch = AttnDecodeLaunch {
            qkv: space.qkv.address(),
            out: space.attended.address(),
            cache,
            block_table: self.bundles.place(List::BlockTable),
            units: self.bundles.place(List::DecodeUnits),
            counts,
            positions: self.bundles.place(List::Positions),
            workspace: space.partials.address(),
            counters: space.counters.address(),
            units_max: self.shape.rows.min(limits.decode_rows_max) * DECODE_PARTS_MAX,
        };
        // SAFETY: the same, and the block table was checked.
        unsafe { kernels.decode.launch(&**device, *stream, &launch)? };
        if self.shape.prefill_tiles > 0 {
            let launch = AttnPrefillLaunch {
                qkv: space.qkv.address(),
                out: space.attended.address(),
                cache,
                block_table: self.bundles.place(List::BlockTable),
                tiles: self.bundles.place(List::PrefillTiles),
                counts,
                tiles_max: self.shape.prefill_tiles,
            };
            // SAFETY: the same.
            unsafe { kernels.prefill.launch(&**device, *stream, &launch)? };
        }
        Ok(())
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        let Engine { device, stream, kernels, space, .. } = self.engine;
        let (out, gate_up) = (space.activated.address(), space.gate_up.address());
        if let Some((layer, site)) = self.unexpanded.take() {
            let work = self.work(layer, site, 0);
            // SAFETY: the same, and the site's shrink was launched before.
            return unsafe { kernels.silu_mul_lora.launch(&**device, *stream, &work, out, gate_up) };
        }
        // SAFETY: the same.
        unsafe { kernels.silu_mul.launch(&**device, *stream, out, gate_up, self.shape.rows) }
    }
}
