//! Bringing a model to a device: weights, kernels, workspaces, the arena in what memory is left, and the captured graphs.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use loramux_kernels::cuda::{AttnPrefillKernel, SampleRow, TOP_MAX, TokenEdit, UnpackKernel, VOCAB_MAX};
use loramux_kernels::device::step::{
    BLOCK_TOKENS, DECODE_PARTS_MAX, DecodeUnit, KvShape, LoraItem, PrefillTile, RowTile, StepCounts,
};
use loramux_kernels::device::{DeviceBuffer, DeviceError, Elem, HostBuffer, HostUse, Priority, SharedDevice};
use loramux_kernels::{ImageLayout, RANK_BLOCK, SLICES};
use loramux_models::{BaseFiles, DecoderSpec, LoadOptions, Site};
use loramux_proto::Info;

use super::super::memory;
use super::super::options::ShardOptions;
use super::super::run::{StartError, format};
use super::super::slab::{PinnedPool, Slab};
use super::adapters::{ArenaPlace, DeviceAdapters};
use super::bundle::Bundles;
use super::engine::{DECODE_BUCKETS, Engine, EngineLimits, EnginePlace, Fusions, heads, site_cols};
use super::flight::Landing;
use super::graphs::Graphs;
use super::lists::{ListLimits, Lists};
use super::sampling::{EDITS_MAX, SampleLists};
use super::weights::DeviceStore;
use super::{DEPTH, DeviceExecutor};

/// A page is a whole number of blocks near this.
const PAGE_BYTES_NEAR: usize = 2 << 20;
/// Positions of a step where nothing was asked for.
const STEP_TOKENS: u32 = 2048;
/// Page-locked memory takes at most one part in so many of the host's free memory.
const PINNED_SHARE: u64 = 2;
/// Memory that is left alone: the driver's, the libraries', and graphs'.
const RESERVE_BYTES: u64 = 3 << 30;
/// Rank blocks that all adapters of one row may have: 16 adapters of rank 512.
const ROW_ITEMS_MAX: usize = 512;
/// LoRA items of one pass, for tiles of decodes and of prompts.
const ITEMS_MAX: [usize; 2] = [4096, 1024];

/// How adapters and KV share the arena.
struct Budget {
    page_bytes: usize,
    pages: usize,
    /// Rows of the descriptor table: as many as the smallest rank blocks could fill.
    desc_rows: usize,
}

impl DeviceExecutor {
    /// Loads a model.
    pub(in super::super) fn load(
        device: &SharedDevice,
        elem: Elem,
        options: &ShardOptions,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<Self, StartError> {
        let stream = device.stream(Priority::High)?;
        let load = LoadOptions { dtype: None, format: format(options.load_format), seed: options.seed };
        let mut report = |p: loramux_models::Progress| progress(&p.what, p.done_bytes, p.total_bytes);
        let model = loramux_models::load_into(&options.model, &load, &mut report, |spec, _| {
            check(spec)?;
            Ok(DeviceStore::new(device, stream, elem)?)
        })?;
        let (content_id, parameters, weight_bytes) = (model.content_id, model.parameters, model.weight_bytes);
        let asked = options.context_tokens_max.map_or(usize::MAX, |tokens| tokens as usize);
        let context = model.spec.context.min(asked);
        let limits = limits(options, context);
        let kv = kv_shape(&model.spec);
        let (rope, activation, norm) = (options.fuse_rope, options.fuse_activation, options.fuse_norm);
        let fusions = Fusions { rope, activation, norm };
        let place = EnginePlace { device: device.clone(), stream, elem, fusions, arena: 0, kv, descs: 0 };
        let mut engine = Engine::new(model, place, limits)?;
        let unpack = UnpackKernel::load(&**device, elem)?;
        let bundles = Bundles::new(device, unpack, capacities(&engine))?;
        let landings = landings(device, &limits, engine.spec.hidden)?;
        let mut notes = Vec::new();
        let base = BaseFiles::new(&options.model, &load, content_id);
        let (pool, slab) = slab(device, options, &engine, base, &mut notes)?;
        let budget = budget(device, options, &engine)?;
        let slots_max = options.slots_max.map_or(budget.pages, |slots| slots as usize).clamp(1, 1 << 16);
        let adapters = DeviceAdapters::new(device, slots_max, budget.desc_rows, engine.spec.layers)?;
        // One page more than the scheduler knows of: padding rows of a bucket write there.
        let arena = DeviceBuffer::new(device, (budget.pages + 1) * budget.page_bytes)?;
        (engine.arena, engine.descs) = (arena.address(), adapters.descs());
        let blocks_total = (budget.pages * kv.per_page as usize) as u32;
        let info = info(&engine, options, &budget, slots_max, context);
        let info = Info { parameters, weight_bytes, base_content_id: content_id.to_vec(), notes, ..info };
        let list_limits = ListLimits {
            blocks_total,
            step_tokens_max: limits.step_tokens_max,
            prefill_rows: AttnPrefillKernel::tile_rows(heads(&engine.spec)),
            items_max: limits.items_max,
            window: engine.spec.window,
            vocab: engine.spec.vocab,
        };
        let mut executor = Self {
            graphs: Graphs::default(),
            place: ArenaPlace { address: arena.address(), pages: budget.pages },
            engine,
            bundles,
            adapters,
            arena,
            slab,
            sequences: HashMap::new(),
            free_slots: (0..limits.sequences_max as u32).rev().collect(),
            lists: Lists::default(),
            samples: SampleLists::default(),
            list_limits,
            trash_block: blocks_total,
            flights: VecDeque::new(),
            landings,
            launched: None,
            _pool: pool,
            info,
        };
        executor.warm_up()?;
        Ok(executor)
    }

    /// Runs every kind of launch once, with nothing to do, then captures the graphs: a first launch loads its module, which
    /// a capture must not.
    fn warm_up(&mut self) -> Result<(), StartError> {
        let started = Instant::now();
        let free_before = self.engine.device.free_bytes()?;
        for tiles in [0, 1] {
            self.launch_nothing(tiles)?;
        }
        let rows_max = self.engine.limits.logit_rows_max;
        self.engine.run_products(rows_max)?;
        self.graphs = Graphs::capture(&self.engine, &self.bundles, rows_max)?;
        let (buckets, nodes) = self.graphs.size(&self.engine);
        let graph_bytes = free_before.saturating_sub(self.engine.device.free_bytes()?);
        let capture_ms = started.elapsed().as_millis() as u64;
        self.info.notes.push(format!(
            "captured {} decode graphs of up to {nodes} nodes in {capture_ms} ms, {} MiB",
            2 * buckets,
            graph_bytes >> 20
        ));
        self.info.notes.extend(self.engine.device.take_warnings());
        Ok(())
    }
}

/// What the kernels cannot do, by name.
fn check(spec: &DecoderSpec) -> Result<(), DeviceError> {
    heads(spec).check()?;
    let refuse = |what: String| Err(DeviceError::Unsupported(what));
    for site in Site::ALL {
        let (cols, d_in) = site_cols(spec, site);
        if !d_in.is_multiple_of(32) || cols.iter().any(|(first, outputs)| first % 8 != 0 || outputs % 16 != 0) {
            return refuse(format!(
                "the projections of this model ({site:?}: {d_in} inputs, outputs {cols:?}) are no multiples of 32 and 16, \
                 which the CUDA kernels need; use --device cpu"
            ));
        }
    }
    if spec.vocab > VOCAB_MAX {
        return refuse(format!("a vocabulary of {}, the CUDA sampler takes {}", spec.vocab, VOCAB_MAX));
    }
    Ok(())
}

fn limits(options: &ShardOptions, context: usize) -> EngineLimits {
    let seqs = options.seqs_max as usize;
    let bucket = DECODE_BUCKETS.into_iter().find(|&bucket| bucket >= seqs);
    EngineLimits {
        step_tokens_max: options.step_tokens_or(STEP_TOKENS) as usize,
        logit_rows_max: bucket.unwrap_or(DECODE_BUCKETS[DECODE_BUCKETS.len() - 1]),
        decode_rows_max: seqs,
        sequences_max: 2 * seqs + 64,
        context,
        items_max: ITEMS_MAX,
    }
}

/// Pages of as many blocks as fit in [`PAGE_BYTES_NEAR`], and at least one.
fn kv_shape(spec: &DecoderSpec) -> KvShape {
    let block_bytes = spec.layers * heads(spec).layer_bytes();
    let per_page = (PAGE_BYTES_NEAR / block_bytes).max(1);
    KvShape {
        page_bytes: (per_page * block_bytes) as u64,
        block_bytes: block_bytes as u32,
        per_page: per_page as u32,
        kv_heads: spec.kv_heads as u32,
        reserved: 0,
    }
}

/// Bytes of each list's place, in the order of `List`.
fn capacities(engine: &Engine) -> [usize; 13] {
    let EngineLimits { step_tokens_max, logit_rows_max, decode_rows_max, context, .. } = engine.limits;
    let rows = step_tokens_max.max(logit_rows_max);
    let tiles = rows;
    let items = (decode_rows_max + step_tokens_max.div_ceil(super::lists::PREFILL_TILE_ROWS) + 1) * ROW_ITEMS_MAX;
    [
        (tiles + rows + 2) * size_of::<StepCounts>(),
        rows * 4,
        rows * 4,
        rows * 8,
        tiles * size_of::<RowTile>(),
        items * size_of::<LoraItem>(),
        decode_rows_max * DECODE_PARTS_MAX * size_of::<DecodeUnit>(),
        rows * size_of::<PrefillTile>(),
        decode_rows_max * context.div_ceil(BLOCK_TOKENS) * 4,
        rows * 4,
        rows * size_of::<SampleRow>(),
        EDITS_MAX * size_of::<TokenEdit>(),
        decode_rows_max * engine.spec.vocab.div_ceil(32) * 4,
    ]
}

fn landings(device: &SharedDevice, limits: &EngineLimits, hidden: usize) -> Result<Vec<Landing>, DeviceError> {
    let rows = limits.step_tokens_max.max(limits.logit_rows_max);
    (0..=DEPTH)
        .map(|_| {
            Ok(Landing {
                out: HostBuffer::new(device, rows, HostUse::Readback)?,
                top: HostBuffer::new(device, rows * TOP_MAX, HostUse::Readback)?,
                states: HostBuffer::new(device, limits.step_tokens_max * hidden, HostUse::Readback)?,
                landed: device.event()?,
            })
        })
        .collect()
}

type Pool = Option<HostBuffer<u8>>;

/// What adapters can have on the CPU and not on a device, by the names of `PeftAdapter::features`.
const LACKED_FEATURES: [&str; 3] = ["embed_tokens", "lm_head", "modules_to_save"];

/// The host slab over page-locked memory; without it where the system refuses so much. What does not fit is kept in ordinary
/// memory, from where copies are slower.
fn slab(
    device: &SharedDevice,
    options: &ShardOptions,
    engine: &Engine,
    base: BaseFiles,
    notes: &mut Vec<String>,
) -> Result<(Pool, Arc<Slab>), StartError> {
    let page_bytes = engine.kv.page_bytes as usize;
    // Page-locked memory is taken at once and never swapped: half of what is free, whatever the limit says.
    let free = memory::available_bytes().map_or(u64::MAX, |bytes| bytes / PINNED_SHARE);
    let pages = usize::try_from(options.host_adapter_bytes.min(free)).unwrap_or(usize::MAX) / page_bytes;
    let memory = match HostBuffer::<u8>::new(device, pages * page_bytes, HostUse::Upload) {
        Ok(memory) => Some(memory),
        Err(error) => {
            notes.push(format!("adapters are kept in ordinary host memory and copied more slowly: {error}"));
            None
        }
    };
    // SAFETY: the executor keeps `memory` as long as it lives, and it outlives every image of its slab: it ends with the
    // process.
    let pool = memory.as_ref().map(|memory| Arc::new(unsafe { PinnedPool::new(memory.as_ptr(), page_bytes, pages) }));
    let slab = Slab::new(engine.spec.clone(), ImageLayout::Device(engine.elem), page_bytes, base);
    Ok((memory, Arc::new(slab.on_device(pool, device.info().name.clone(), &LACKED_FEATURES))))
}

/// Pages that fit in what is free, or in what was asked for; at least one full context and a page for an adapter.
fn budget(device: &SharedDevice, options: &ShardOptions, engine: &Engine) -> Result<Budget, StartError> {
    let (spec, kv) = (&engine.spec, engine.kv);
    let page = kv.page_bytes;
    let context = engine.limits.context;
    let context_pages = context.div_ceil(BLOCK_TOKENS).div_ceil(kv.per_page as usize) as u64;
    let needed = (context_pages + 1) * page;
    // The smallest row of the table: one rank block of one matrix of one layer.
    let smallest = Site::ALL.into_iter().flat_map(|site| {
        let (cols, d_in) = site_cols(spec, site);
        cols.into_iter().map(move |(_, outputs)| (d_in + outputs) * RANK_BLOCK * 2)
    });
    let rows_per_page = (page as usize).div_ceil(smallest.min().unwrap_or(1)) as u64;
    let row_bytes = (spec.layers * SLICES * 16) as u64;
    let free = device.free_bytes()?;
    let reserve = RESERVE_BYTES.min(free / 10);
    let room = free.saturating_sub(reserve).saturating_sub(page);
    let bytes = match options.arena_bytes {
        Some(bytes) => bytes,
        None => room / (page + rows_per_page * row_bytes) * page,
    };
    if bytes < needed {
        return Err(StartError::ArenaTooSmall { bytes, context, needed });
    }
    let pages = (bytes / page).min(u64::from(u32::MAX / 2) / u64::from(kv.per_page));
    // Descriptors count in units of 256 bytes.
    let pages = pages.min((u64::from(u32::MAX) - 1) * 256 / page);
    Ok(Budget {
        page_bytes: page as usize,
        pages: pages as usize,
        desc_rows: (pages * rows_per_page).min(1 << 24) as usize,
    })
}

fn info(engine: &Engine, options: &ShardOptions, budget: &Budget, slots_max: usize, context: usize) -> Info {
    let device = engine.device.info();
    Info {
        model_id: options.model_id.clone(),
        architecture: engine.spec.family.clone(),
        device: format!("{} ({})", device.name, device.arch),
        dtype: match engine.elem {
            Elem::Bf16 => "bfloat16".into(),
            Elem::F16 => "float16".into(),
        },
        vocab_size: engine.spec.vocab as u32,
        context_tokens: context as u32,
        page_bytes: budget.page_bytes as u64,
        pages_total: budget.pages as u32,
        blocks_per_page: engine.kv.per_page,
        block_tokens: BLOCK_TOKENS as u32,
        slots_max: slots_max as u32,
        step_tokens_max: engine.limits.step_tokens_max as u32,
        seqs_max: options.seqs_max,
        kernel_path: device.arch.clone(),
        pipeline_depth: DEPTH as u32,
        prefill_tokens_beside: 0, // a step of as many positions as one may hold is short here
        ..Info::default()
    }
}
