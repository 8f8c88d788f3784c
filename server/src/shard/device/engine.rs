//! The model on a device: weights, kernels, workspaces, and the launches of one step. Everything is made at start; a step
//! only launches.

use loramux_kernels::AttnSpec;
use loramux_kernels::cuda::{
    AddRmsNormLoraKernel, AttnDecodeKernel, AttnPrefillKernel, EmbeddingKernel, GatherRowsKernel, HeadShape,
    RmsNormKernel, RopeCacheKernel, RopeCacheLoraKernel, SampleOut, SamplerKernel, SiluMulKernel, SiluMulLoraKernel,
    TOP_MAX, TopLogprob,
};
use loramux_kernels::device::lora::SiteShape;
use loramux_kernels::device::step::{DECODE_PARTS_MAX, KvShape};
use loramux_kernels::device::{
    Address, DeviceBuffer, DeviceError, Elem, Event, GemmOut, GemmPlan, GemmShape, Priority, SharedDevice, Stream,
};
use loramux_models::{DecoderSpec, Model, Site, inv_freq};

use super::lists::{DECODE_TILE_ROWS, PREFILL_TILE_ROWS};
use super::lora::SiteKernels;
use super::weights::{DeviceStore, OUTPUTS_MULTIPLE};

/// Rows of a step's products: graphs are captured for those up to 256, longer steps take the next multiple.
pub(super) const DECODE_BUCKETS: [usize; 13] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256];

/// Extents that workspaces and plans are made for.
#[derive(Clone, Copy, Debug)]
pub(super) struct EngineLimits {
    pub(super) step_tokens_max: usize,
    /// Rows of logits at a time: a bucket.
    pub(super) logit_rows_max: usize,
    /// Sequences in one step.
    pub(super) decode_rows_max: usize,
    /// Sequences the device remembers the last token of.
    pub(super) sequences_max: usize,
    pub(super) context: usize,
    /// LoRA items of a pass: decodes, prompts.
    pub(super) items_max: [usize; 2],
}

/// Row counts that products are planned for.
pub(super) fn row_buckets(rows_max: usize) -> Vec<usize> {
    let mut buckets: Vec<usize> = DECODE_BUCKETS.into_iter().filter(|&rows| rows < rows_max).collect();
    let mut rows = 256;
    while rows < rows_max {
        rows += if rows < 4096 { 128 } else { 512 };
        buckets.push(rows.min(rows_max));
    }
    if buckets.last() != Some(&rows_max) {
        buckets.push(rows_max);
    }
    buckets
}

/// Products by bucket.
#[derive(Debug)]
pub(super) struct Plans {
    pub(super) buckets: Vec<usize>,
    /// `[bucket][site]`
    sites: Vec<[GemmPlan; 4]>,
    /// `[bucket up to logit_rows_max]`
    heads: Vec<(usize, GemmPlan)>,
}

impl Plans {
    fn new(device: &SharedDevice, spec: &DecoderSpec, elem: Elem, limits: &EngineLimits) -> Result<Self, DeviceError> {
        let buckets = row_buckets(limits.step_tokens_max.max(limits.logit_rows_max));
        let plan = |rows, d_out, d_in, out| device.gemm_plan(GemmShape { rows, d_out, d_in, elem, out });
        let mut sites = Vec::with_capacity(buckets.len());
        for &rows in &buckets {
            let (q, kv) = (spec.q_width(), spec.kv_width());
            sites.push([
                plan(rows, q + 2 * kv, spec.hidden, GemmOut::Elem)?,
                plan(rows, spec.hidden, q, GemmOut::Elem)?,
                plan(rows, 2 * spec.intermediate, spec.hidden, GemmOut::Elem)?,
                plan(rows, spec.hidden, spec.intermediate, GemmOut::Elem)?,
            ]);
        }
        let heads = buckets
            .iter()
            .filter(|&&rows| rows <= limits.logit_rows_max)
            .map(|&rows| Ok((rows, plan(rows, logits_stride(spec), spec.hidden, GemmOut::F32)?)))
            .collect::<Result<_, DeviceError>>()?;
        Ok(Self { buckets, sites, heads })
    }

    /// The bucket of a step of `rows` rows.
    pub(super) fn bucket(&self, rows: usize) -> usize {
        let index = self.buckets.partition_point(|&bucket| bucket < rows);
        self.buckets.get(index).copied().unwrap_or(rows)
    }

    pub(super) fn site(&self, bucket: usize, site: Site) -> Option<GemmPlan> {
        let index = self.buckets.binary_search(&bucket).ok()?;
        Some(self.sites[index][site as usize])
    }

    pub(super) fn head(&self, rows: usize) -> Option<(usize, GemmPlan)> {
        self.heads.iter().copied().find(|&(bucket, _)| bucket >= rows)
    }
}

/// Activations of one step.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) residual: DeviceBuffer,
    pub(super) normed: DeviceBuffer,
    pub(super) qkv: DeviceBuffer,
    pub(super) attended: DeviceBuffer,
    pub(super) projected: DeviceBuffer,
    pub(super) gate_up: DeviceBuffer,
    pub(super) activated: DeviceBuffer,
    pub(super) picked: DeviceBuffer,
    pub(super) logits: DeviceBuffer,
    pub(super) partials: DeviceBuffer,
    pub(super) counters: DeviceBuffer,
    /// `[position][head_dim / 2][cos, sin]`
    pub(super) cos_sin: DeviceBuffer,
    /// `[sequence slot]`
    pub(super) last_token: DeviceBuffer,
    pub(super) sample_out: DeviceBuffer,
    pub(super) sample_top: DeviceBuffer,
    pub(super) v: DeviceBuffer,
}

/// The kernels of the model's shapes.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) embedding: EmbeddingKernel,
    pub(super) norm: RmsNormKernel,
    pub(super) rope: RopeCacheKernel,
    pub(super) rope_lora: RopeCacheLoraKernel,
    pub(super) decode: AttnDecodeKernel,
    pub(super) prefill: AttnPrefillKernel,
    pub(super) silu_mul: SiluMulKernel,
    pub(super) silu_mul_lora: SiluMulLoraKernel,
    pub(super) norm_output: AddRmsNormLoraKernel,
    pub(super) norm_down: AddRmsNormLoraKernel,
    pub(super) gather: GatherRowsKernel,
    pub(super) sampler: SamplerKernel,
    pub(super) sites: [SiteKernels; 4],
}

/// Expands that are left to the op behind the product, in steps that only decode. Off until a measurement says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fusions {
    /// q, k and v + delta, then rotation and cache.
    pub(super) rope: bool,
    /// silu(gate + delta) * (up + delta).
    pub(super) activation: bool,
    /// residual += y + delta, then the norm.
    pub(super) norm: bool,
}

impl Fusions {
    /// Whether the op behind this site's product expands its deltas.
    pub(super) fn has(self, site: Site) -> bool {
        match site {
            Site::Qkv => self.rope,
            Site::GateUp => self.activation,
            Site::Output | Site::Down => self.norm,
        }
    }
}

/// The model on a device.
pub(super) struct Engine {
    pub(super) device: SharedDevice,
    pub(super) stream: Stream,
    /// Shrinks run here, beside the base product.
    pub(super) side: Stream,
    pub(super) fork: Event,
    pub(super) join: Event,
    pub(super) spec: DecoderSpec,
    pub(super) elem: Elem,
    pub(super) model: Model<DeviceStore>,
    pub(super) kernels: Kernels,
    pub(super) plans: Plans,
    pub(super) space: Space,
    pub(super) limits: EngineLimits,
    pub(super) fusions: Fusions,
    pub(super) arena: Address,
    pub(super) kv: KvShape,
    pub(super) descs: Address,
}

/// Heads as the attention kernels see them.
pub(super) fn heads(spec: &DecoderSpec) -> HeadShape {
    HeadShape { heads: spec.heads, kv_heads: spec.kv_heads, head_dim: spec.head_dim }
}

/// Elements from one row of logits to the next.
pub(super) fn logits_stride(spec: &DecoderSpec) -> usize {
    spec.vocab.next_multiple_of(OUTPUTS_MULTIPLE)
}

/// Columns of a site's matrices, and its inputs.
pub(super) fn site_cols(spec: &DecoderSpec, site: Site) -> (Vec<(usize, usize)>, usize) {
    let (q, kv, wide) = (spec.q_width(), spec.kv_width(), spec.intermediate);
    match site {
        Site::Qkv => (vec![(0, q), (q, kv), (q + kv, kv)], spec.hidden),
        Site::Output => (vec![(0, spec.hidden)], q),
        Site::GateUp => (vec![(0, wide), (wide, wide)], spec.hidden),
        Site::Down => (vec![(0, spec.hidden)], wide),
    }
}

impl Kernels {
    fn load(device: &SharedDevice, spec: &DecoderSpec, elem: Elem, limits: &EngineLimits) -> Result<Self, DeviceError> {
        let device = &**device;
        let attention =
            AttnSpec { heads: spec.heads, scale: (spec.head_dim as f32).sqrt().recip(), window: spec.window };
        let shape = heads(spec);
        let site = |site| SiteKernels::load(device, spec, elem, site, limits);
        let fused_norm =
            |d_in| AddRmsNormLoraKernel::load(device, elem, (d_in, spec.hidden), limits.decode_rows_max, spec.rms_eps);
        Ok(Self {
            embedding: EmbeddingKernel::load(device, elem, spec.hidden, spec.vocab, limits.sequences_max)?,
            norm: RmsNormKernel::load(device, elem, spec.hidden, spec.rms_eps)?,
            rope: RopeCacheKernel::load(device, elem, shape)?,
            rope_lora: RopeCacheLoraKernel::load(device, elem, spec.hidden, shape, limits.decode_rows_max)?,
            decode: AttnDecodeKernel::load(device, elem, shape, &attention)?,
            prefill: AttnPrefillKernel::load(device, elem, shape, &attention)?,
            silu_mul: SiluMulKernel::load(device, elem, spec.intermediate)?,
            silu_mul_lora: SiluMulLoraKernel::load(
                device,
                elem,
                spec.hidden,
                spec.intermediate,
                limits.decode_rows_max,
            )?,
            norm_output: fused_norm(spec.q_width())?,
            norm_down: fused_norm(spec.intermediate)?,
            gather: GatherRowsKernel::load(device, elem, spec.hidden)?,
            sampler: SamplerKernel::load(device, spec.vocab, logits_stride(spec))?,
            sites: [site(Site::Qkv)?, site(Site::Output)?, site(Site::GateUp)?, site(Site::Down)?],
        })
    }
}

impl Space {
    fn new(
        device: &SharedDevice,
        stream: Stream,
        spec: &DecoderSpec,
        kernels: &Kernels,
        limits: &EngineLimits,
    ) -> Result<Self, DeviceError> {
        let rows_max = limits.step_tokens_max.max(limits.logit_rows_max);
        let rows = |width: usize| DeviceBuffer::new(device, rows_max * width * 2);
        let units_max = limits.decode_rows_max * DECODE_PARTS_MAX;
        let v_bytes = Site::ALL.into_iter().flat_map(|site| {
            let (cols, d_in) = site_cols(spec, site);
            [(DECODE_TILE_ROWS, limits.items_max[0]), (PREFILL_TILE_ROWS, limits.items_max[1])]
                .map(|(tile_rows, items)| SiteShape { d_in, cols: &cols, tile_rows }.v_bytes(items))
        });
        let counters = DeviceBuffer::new(device, kernels.decode.counter_bytes(rows_max))?;
        counters.fill(stream, 0)?;
        let last_token = DeviceBuffer::new(device, limits.sequences_max * 4)?;
        last_token.fill(stream, 0)?;
        Ok(Self {
            residual: rows(spec.hidden)?,
            normed: rows(spec.hidden)?,
            qkv: rows(spec.q_width() + 2 * spec.kv_width())?,
            attended: rows(spec.q_width())?,
            projected: rows(spec.hidden)?,
            gate_up: rows(2 * spec.intermediate)?,
            activated: rows(spec.intermediate)?,
            picked: DeviceBuffer::new(device, limits.logit_rows_max * spec.hidden * 2)?,
            logits: DeviceBuffer::new(device, limits.logit_rows_max * logits_stride(spec) * 4)?,
            partials: DeviceBuffer::new(device, kernels.decode.workspace_bytes(units_max))?,
            counters,
            cos_sin: DeviceBuffer::of(device, stream, &cos_sin(spec, limits.context))?,
            last_token,
            sample_out: DeviceBuffer::new(device, limits.logit_rows_max * size_of::<SampleOut>())?,
            sample_top: DeviceBuffer::new(device, limits.logit_rows_max * TOP_MAX * size_of::<TopLogprob>())?,
            v: DeviceBuffer::new(device, v_bytes.max().unwrap_or(0))?,
        })
    }
}

/// Cosines and sines of every position: the same f32 values as on the CPU.
fn cos_sin(spec: &DecoderSpec, context: usize) -> Vec<f32> {
    let frequencies = inv_freq(&spec.rope);
    let mut table = Vec::with_capacity(context * frequencies.len() * 2);
    for position in 0..context {
        for frequency in &frequencies {
            let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
            table.extend([cos as f32, sin as f32]);
        }
    }
    table
}

/// What the engine is made for, beside the model.
pub(super) struct EnginePlace {
    pub(super) device: SharedDevice,
    pub(super) stream: Stream,
    pub(super) elem: Elem,
    pub(super) fusions: Fusions,
    pub(super) arena: Address,
    pub(super) kv: KvShape,
    pub(super) descs: Address,
}

impl Engine {
    /// Runs every product that graphs will hold, and the largest, once and waits: a library loads its code at the first
    /// launch, which a capture must not.
    pub(super) fn run_products(&self, rows_max: usize) -> Result<(), DeviceError> {
        let (space, layer) = (&self.space, &self.model.weights.layers[0]);
        let largest = self.plans.buckets.last().copied();
        let captured = self.plans.buckets.iter().copied().filter(|&bucket| bucket <= rows_max);
        for bucket in captured.chain(largest) {
            for site in Site::ALL {
                let (y, x, weight) = match site {
                    Site::Qkv => (&space.qkv, &space.normed, &layer.qkv),
                    Site::Output => (&space.projected, &space.attended, &layer.output),
                    Site::GateUp => (&space.gate_up, &space.normed, &layer.gate_up),
                    Site::Down => (&space.projected, &space.activated, &layer.down),
                };
                if let Some(plan) = self.plans.site(bucket, site) {
                    let (y, x, weight) = (y.address(), x.address(), weight.address());
                    // SAFETY: workspaces with room for the largest bucket.
                    unsafe { self.device.gemm(self.stream, plan, y, x, weight)? };
                }
            }
        }
        let head = self.model.weights.head.as_ref().unwrap_or(&self.model.weights.embedding).address();
        for &(_, plan) in &self.plans.heads {
            // SAFETY: the same.
            unsafe { self.device.gemm(self.stream, plan, space.logits.address(), space.picked.address(), head)? };
        }
        let event = self.device.event()?;
        self.device.record(event, self.stream)?;
        self.device.synchronize(event)
    }

    /// Compiles the kernels, plans the products and takes the workspaces.
    pub(super) fn new(
        model: Model<DeviceStore>,
        place: EnginePlace,
        limits: EngineLimits,
    ) -> Result<Self, DeviceError> {
        let EnginePlace { device, stream, elem, fusions, arena, kv, descs } = place;
        let spec = model.spec.clone();
        let kernels = Kernels::load(&device, &spec, elem, &limits)?;
        let plans = Plans::new(&device, &spec, elem, &limits)?;
        let space = Space::new(&device, stream, &spec, &kernels, &limits)?;
        let (side, fork, join) = (device.stream(Priority::High)?, device.event()?, device.event()?);
        Ok(Self {
            device,
            stream,
            side,
            fork,
            join,
            spec,
            elem,
            model,
            kernels,
            plans,
            space,
            limits,
            fusions,
            arena,
            kv,
            descs,
        })
    }
}
