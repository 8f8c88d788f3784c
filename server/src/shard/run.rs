//! Executes steps. Every decision was the scheduler's: this waits for no load and retries nothing.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use loramux_kernels::device::DeviceError;
use loramux_kernels::{AdapterTable, Arena, ArenaDtype, Dtype, KvLayout, OpError, copy_block, in_pool, isa_name};
use loramux_models::{BaseFiles, Decoder, DecoderLimits, LoadFormat, LoadOptions, ModelError};
use loramux_proto::{Info, SlotGeneration, Step, StepResult};

use super::Execute;
use super::batch::{BatchBuffers, BatchLimits, SeqState};
use super::lent::LentPages;
use super::memory;
use super::options::{DtypeChoice, LoadFormatChoice, ShardOptions};
use super::sampling::Sampler;
use super::slab::Slab;

/// KV positions in a block.
const BLOCK_TOKENS: usize = 16;
/// A page is a whole number of blocks near this.
const PAGE_BYTES_NEAR: usize = 2 << 20;
/// Rows of logits at once: bounds the largest workspace, `rows * vocab * 4` bytes.
const LOGIT_ROWS_MAX: usize = 64;
/// Adapter slots at most, whatever the arena holds.
const SLOTS_MAX: usize = 1 << 16;

/// Positions of a step where nothing was asked for. More do not make products faster, their activations leave the caches, and all
/// prompts that came at once would get their first token at the end of one long step.
const STEP_TOKENS: u32 = 512;
/// Positions of prompts beside decodes: products of so many rows are about as efficient as of more, and the step is short
/// enough not to be seen as a gap in a stream.
const PREFILL_TOKENS_BESIDE: u32 = 256;

/// Why the shard cannot go on. A scheduler that obeys its own rules never causes one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShardFault {
    #[error("step names sequence {0}, which was never started")]
    UnknownSequence(u64),
    #[error("malformed step: {0}")]
    Malformed(String),
    #[error("upload of an adapter that is not in host memory: {0}")]
    UnknownContent(String),
    #[error(transparent)]
    Op(OpError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Why the shard could not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("cannot reserve {bytes} bytes for the arena: {error}; set --arena-bytes lower")]
    Arena { bytes: u64, error: OpError },
    #[error(
        "--arena-bytes {bytes} is less than one sequence of {context} tokens needs ({needed}); set it higher or --max-model-len lower"
    )]
    ArenaTooSmall { bytes: u64, context: usize, needed: u64 },
    #[error("--device {choice}: {error}")]
    Device { choice: String, error: DeviceError },
    #[error("--dtype {dtype}: {reason}")]
    Dtype { dtype: &'static str, reason: &'static str },
    #[error("while the model was brought to the device: {0}")]
    OnDevice(#[from] DeviceError),
    #[error("while the device was tried out: {0}")]
    WarmUp(#[from] ShardFault),
}

/// Weights, arena, adapter table and the state of every running sequence, on the CPU. A step is computed when it is
/// submitted.
pub(crate) struct Executor {
    decoder: Decoder,
    arena: Arena,
    table: AdapterTable,
    slab: Arc<Slab>,
    /// What of the slab is in the arena alone.
    lent: LentPages,
    sequences: HashMap<u64, SeqState>,
    buffers: BatchBuffers,
    limits: BatchLimits,
    sampler: Sampler,
    results: VecDeque<StepResult>,
    info: Info,
}

impl Execute for Executor {
    fn info(&self) -> &Info {
        &self.info
    }

    fn slab(&self) -> &Arc<Slab> {
        &self.slab
    }

    fn submit(&mut self, step: &Step) -> Result<(), ShardFault> {
        let result = self.run(step)?;
        self.results.push_back(result);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.results.len()
    }

    fn poll(&mut self, _wait: bool) -> Result<Option<StepResult>, ShardFault> {
        Ok(self.results.pop_front())
    }
}

impl Executor {
    /// Reads the weights and reserves the arena.
    pub(super) fn load(
        options: &ShardOptions,
        notes: Vec<String>,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<Self, StartError> {
        let load =
            LoadOptions { dtype: dtype(options.dtype)?, format: format(options.load_format), seed: options.seed };
        let model = loramux_models::load(&options.model, &load, &mut |p| {
            progress(&p.what, p.done_bytes, p.total_bytes);
        })?;
        let (dtype, quantised, content_id) = (model.dtype, model.quantised, model.content_id);
        let (parameters, weight_bytes) = (model.parameters, model.weight_bytes);
        let asked = options.context_tokens_max.map_or(usize::MAX, |tokens| tokens as usize);
        let context = model.spec.context.min(asked);
        let step_tokens_max = options.step_tokens_or(STEP_TOKENS) as usize;
        let decoder = Decoder::new(model, DecoderLimits { step_tokens_max, logits_rows_max: LOGIT_ROWS_MAX });
        let layout = kv_layout(&decoder, dtype.arena());
        let pages = arena_pages(options, &layout, context)?;
        let arena = Arena::new(layout.page_bytes, pages)
            .map_err(|error| StartError::Arena { bytes: (layout.page_bytes * pages) as u64, error })?;
        let slots_max = options.slots_max.map_or(pages, |slots| slots as usize).clamp(1, SLOTS_MAX);
        let base = BaseFiles::new(&options.model, &load, content_id);
        let slab = Arc::new(Slab::new(decoder.spec().clone(), dtype, layout.page_bytes, base));
        let vocab = decoder.spec().vocab;
        let blocks_total = u32::try_from(pages * layout.blocks_per_page()).unwrap_or(u32::MAX);
        let info = Info {
            model_id: options.model_id.clone(),
            architecture: decoder.spec().family.clone(),
            device: format!("cpu ({} threads)", loramux_kernels::threads()),
            dtype: match (quantised, dtype) {
                (Some(format), _) => format.name().into(),
                (None, Dtype::F32) => "float32".into(),
                (None, Dtype::Bf16) => "bfloat16".into(),
            },
            vocab_size: decoder.spec().vocab as u32,
            context_tokens: context as u32,
            parameters,
            weight_bytes,
            page_bytes: layout.page_bytes as u64,
            pages_total: arena.pages() as u32,
            blocks_per_page: layout.blocks_per_page() as u32,
            block_tokens: layout.block_tokens as u32,
            slots_max: slots_max as u32,
            step_tokens_max: step_tokens_max as u32,
            seqs_max: options.seqs_max,
            load_ms: 0,
            base_content_id: content_id.to_vec(),
            kernel_path: isa_name().to_owned(),
            pipeline_depth: 1,
            prefill_tokens_beside: PREFILL_TOKENS_BESIDE,
            notes,
        };
        Ok(Self {
            decoder,
            arena,
            table: AdapterTable::new(slots_max),
            slab,
            lent: LentPages::new(pages),
            sequences: HashMap::new(),
            buffers: BatchBuffers::default(),
            limits: BatchLimits { layout, blocks_total, step_tokens_max, vocab },
            sampler: Sampler::default(),
            results: VecDeque::new(),
            info,
        })
    }

    /// One forward pass.
    fn run(&mut self, step: &Step) -> Result<StepResult, ShardFault> {
        let started = Instant::now();
        for seq in &step.finishes {
            self.sequences.remove(seq);
        }
        for copy in &step.copies {
            self.lent.take_back(&self.arena, copy.dst / self.info.blocks_per_page.max(1))?;
            copy_block(&mut self.arena, &self.limits.layout, copy.src, copy.dst)?;
        }
        let mut result = StepResult { id: step.id, uploaded: self.upload(step)?, ..StepResult::default() };
        for start in &step.starts {
            self.sequences.insert(start.seq, SeqState::new(start));
        }
        if !step.chunks.is_empty() {
            self.buffers.fill(step, &self.sequences, &self.table, &self.limits)?;
            let blocks_per_page = self.limits.layout.blocks_per_page();
            self.lent.take_back_written(&self.arena, &self.buffers.batch.kv_slots, blocks_per_page)?;
            in_pool(|| self.compute(&mut result))?;
            self.pool(step, &mut result)?;
            for sample in &result.samples {
                if let Some(seq) = self.sequences.get_mut(&sample.seq) {
                    seq.tokens.push(sample.token);
                }
            }
        }
        result.compute_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(result)
    }

    /// Forward pass, logits and samples of the filled batch.
    fn compute(&mut self, result: &mut StepResult) -> Result<(), ShardFault> {
        self.decoder.forward(&self.buffers.batch, &self.limits.layout, &mut self.arena, &self.table)?;
        for rows in self.buffers.logit_rows.chunks(LOGIT_ROWS_MAX) {
            self.sampler.rows.clear();
            self.sampler.rows.extend(rows.iter().map(|row| row.row));
            let logits = self.decoder.logits(&self.sampler.rows, &self.buffers.batch, &self.arena, &self.table)?;
            super::sampling::sample_rows(logits, rows, &self.buffers.masks, &self.sequences, result);
        }
        Ok(())
    }

    /// Takes the hidden states of the step's rows whose sequences want an embedding.
    fn pool(&mut self, step: &Step, result: &mut StepResult) -> Result<(), ShardFault> {
        let states = self.decoder.hidden();
        let (hidden, mut first) = (states.width(), 0);
        for chunk in &step.chunks {
            let pooler = self.sequences.get_mut(&chunk.seq).and_then(|seq| seq.pooler.as_mut());
            if let Some(pooler) = pooler {
                let rows = pooler.rows(chunk.len);
                let range = (first + rows.start as usize) * hidden..(first + rows.end as usize) * hidden;
                pooler.add(chunk.start, chunk.len, hidden, states.as_f32().get(range).unwrap_or_default())?;
                result.pooled.extend(chunk.pool.then(|| pooler.report(chunk.seq)));
            }
            first += chunk.len as usize;
        }
        Ok(())
    }

    fn upload(&mut self, step: &Step) -> Result<Vec<SlotGeneration>, ShardFault> {
        let mut uploaded = Vec::with_capacity(step.uploads.len());
        for upload in &step.uploads {
            let unknown = || ShardFault::UnknownContent(upload.content_id.iter().map(|b| format!("{b:02x}")).collect());
            let image = self.slab.get(&upload.content_id).ok_or_else(unknown)?;
            self.lent.upload(&mut self.arena, &image, &upload.pages)?;
            self.table.publish(&mut self.arena, upload.slot, upload.generation, image.image(), &upload.pages)?;
            uploaded.push(SlotGeneration { slot: upload.slot, generation: upload.generation });
        }
        Ok(uploaded)
    }
}

/// Pages of as many blocks as fit in [`PAGE_BYTES_NEAR`], and at least one.
fn kv_layout(decoder: &Decoder, dtype: ArenaDtype) -> KvLayout {
    let block_bytes = decoder.kv_layout(BLOCK_TOKENS, PAGE_BYTES_NEAR, dtype).block_bytes();
    let page_bytes = (PAGE_BYTES_NEAR / block_bytes).max(1) * block_bytes;
    decoder.kv_layout(BLOCK_TOKENS, page_bytes, dtype)
}

fn dtype(choice: DtypeChoice) -> Result<Option<Dtype>, StartError> {
    match choice {
        DtypeChoice::Auto => Ok(None),
        DtypeChoice::Bf16 => Ok(Some(Dtype::Bf16)),
        DtypeChoice::F32 => Ok(Some(Dtype::F32)),
        DtypeChoice::F16 => Err(StartError::Dtype {
            dtype: "float16",
            reason: "the CPU computes in bfloat16 or float32; use one of these",
        }),
    }
}

pub(super) fn format(choice: LoadFormatChoice) -> LoadFormat {
    match choice {
        LoadFormatChoice::Auto => LoadFormat::Auto,
        LoadFormatChoice::Safetensors => LoadFormat::Safetensors,
        LoadFormatChoice::Gguf => LoadFormat::Gguf,
        LoadFormatChoice::Dummy => LoadFormat::Dummy,
    }
}

/// Pages of the arena; at least one full context (and a page for an adapter) must fit.
fn arena_pages(options: &ShardOptions, layout: &KvLayout, context: usize) -> Result<usize, StartError> {
    let page = layout.page_bytes as u64;
    let context_pages = context.div_ceil(layout.block_tokens).div_ceil(layout.blocks_per_page()) as u64;
    let needed = (context_pages + 1) * page;
    let useful = context_pages * page * u64::from(options.seqs_max) + (1 << 30);
    let auto = || memory::arena_bytes_auto(memory::available_bytes(), useful).max(needed);
    let bytes = options.arena_bytes.unwrap_or_else(auto);
    if bytes < needed {
        return Err(StartError::ArenaTooSmall { bytes, context, needed });
    }
    Ok(usize::try_from(bytes / page).unwrap_or(usize::MAX).min(u32::MAX as usize / layout.blocks_per_page()))
}
