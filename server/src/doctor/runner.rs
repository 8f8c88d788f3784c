//! Drives a shard step by step, in the place of the scheduler: a few sequences at a time, blocks scattered over the arena,
//! as many steps in flight as the shard wants.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use loramux_kernels::device::check::Random;
use loramux_proto::{
    AdapterRef, AdapterUpload, Chunk, Info, PrepareAdapter, Sampling, SeqStart, Step, StepResult, TokenLogprob,
    prepared,
};

use crate::shard::Execute;

/// How long an upload may take before it counts as lost.
const UPLOAD_LIMIT: Duration = Duration::from_secs(60);

/// An adapter in the shard's host memory.
#[derive(Clone, Debug)]
pub(crate) struct Prepared {
    pub(crate) content_id: Vec<u8>,
    pub(crate) pages: u32,
}

/// How a sequence goes through the shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The prompt in chunks, then this many tokens, one a step.
    Generate { chunk: usize, tokens: usize },
    /// One token a step, whatever is sampled: what a decode computes, on a text that is given.
    ForcedDecode,
    /// The prompt's own log-probabilities, in chunks.
    PromptLogprobs { chunk: usize },
}

/// One sequence.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) tokens: Vec<u32>,
    pub(crate) adapters: Vec<AdapterRef>,
    pub(crate) sampling: Sampling,
    pub(crate) mode: Mode,
}

/// What the shard said of the token at a position.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Position {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
    pub(crate) top: Vec<TokenLogprob>,
}

/// Neither randomness nor penalties; with the most likely tokens of each position.
pub(crate) fn greedy() -> Sampling {
    Sampling {
        top_p: 1.0,
        repetition_penalty: 1.0,
        logprobs: Some(20),
        prompt_logprobs: Some(20),
        ..Sampling::default()
    }
}

/// A shard and what the scheduler would know of it.
pub(crate) struct Runner {
    executor: Box<dyn Execute>,
    info: Info,
    next_step: u64,
    next_seq: u64,
    next_generation: u64,
    free_pages: Vec<u32>,
    free_blocks: Vec<u32>,
    slots: HashMap<u32, Vec<u32>>,
}

/// Reads an adapter into a shard's host memory.
pub(crate) fn prepare(executor: &dyn Execute, dir: &Path) -> anyhow::Result<Prepared> {
    let request = PrepareAdapter { dir: dir.display().to_string(), ..PrepareAdapter::default() };
    match executor.slab().prepare(&request).outcome {
        Some(prepared::Outcome::Report(report)) => {
            Ok(Prepared { content_id: report.content_id, pages: report.pages_needed })
        }
        Some(prepared::Outcome::Error(error)) => bail!("adapter {}: {}", dir.display(), error.message),
        None => bail!("adapter {}: no answer", dir.display()),
    }
}

/// A sequence on its way.
struct Running {
    seq: u64,
    blocks: Vec<u32>,
    computed: usize,
    /// Tokens given, and those that steps were submitted for.
    known: usize,
    positions: Vec<Position>,
}

impl Runner {
    /// Half of the pages are for adapters.
    pub(crate) fn new(executor: Box<dyn Execute>, seed: u64) -> Self {
        let adapter_pages = executor.info().pages_total / 2;
        Self::with_pages(executor, adapter_pages, seed)
    }

    /// Some of the pages are for adapters, the others for KV blocks, which are handed out in a shuffled order.
    pub(crate) fn with_pages(executor: Box<dyn Execute>, adapter_pages: u32, seed: u64) -> Self {
        let info = executor.info().clone();
        let adapter_pages = adapter_pages.min(info.pages_total);
        let first = adapter_pages * info.blocks_per_page;
        let mut free_blocks: Vec<u32> = (first..info.pages_total * info.blocks_per_page).collect();
        let mut random = Random::new(seed);
        for at in (1..free_blocks.len()).rev() {
            free_blocks.swap(at, random.below(at + 1));
        }
        let free_pages = (0..adapter_pages).rev().collect();
        let slots = HashMap::new();
        Self { executor, info, next_step: 1, next_seq: 1, next_generation: 1, free_pages, free_blocks, slots }
    }

    pub(crate) fn info(&self) -> &Info {
        &self.info
    }

    /// Reads an adapter into host memory.
    pub(crate) fn prepare(&self, dir: &Path) -> anyhow::Result<Prepared> {
        prepare(&*self.executor, dir)
    }

    /// Brings an adapter into a slot and waits until it is there.
    pub(crate) fn place(&mut self, slot: u32, adapter: &Prepared) -> anyhow::Result<AdapterRef> {
        let upload = self.upload(slot, adapter)?;
        let wanted = upload.generation;
        self.submit(Step { uploads: vec![upload], ..Step::default() })?;
        let started = Instant::now();
        loop {
            let Some(result) = self.poll()? else { bail!("a step was not answered") };
            if result.uploaded.iter().any(|up| up.slot == slot && up.generation == wanted) {
                return Ok(AdapterRef { slot, generation: wanted, scale: 1.0 });
            }
            ensure!(
                started.elapsed() < UPLOAD_LIMIT,
                "the upload into slot {slot} did not come within {UPLOAD_LIMIT:?}"
            );
            self.submit(Step::default())?;
        }
    }

    /// The message that brings an adapter into a slot, on pages of the slot's own.
    pub(crate) fn upload(&mut self, slot: u32, adapter: &Prepared) -> anyhow::Result<AdapterUpload> {
        let pages = self.slots.entry(slot).or_default();
        while pages.len() > adapter.pages as usize {
            self.free_pages.extend(pages.pop());
        }
        while pages.len() < adapter.pages as usize {
            pages.push(self.free_pages.pop().context("the arena has no pages left for adapters")?);
        }
        let generation = self.next_generation;
        self.next_generation += 1;
        Ok(AdapterUpload { content_id: adapter.content_id.clone(), slot, generation, pages: pages.clone() })
    }

    /// Gives a step to the shard; its number is set here.
    pub(crate) fn submit(&mut self, mut step: Step) -> anyhow::Result<()> {
        step.id = self.next_step;
        self.next_step += 1;
        Ok(self.executor.submit(&step)?)
    }

    /// Waits for the oldest step.
    pub(crate) fn poll(&mut self) -> anyhow::Result<Option<StepResult>> {
        Ok(self.executor.poll(true)?)
    }

    /// Steps that the shard wants in flight.
    pub(crate) fn depth(&self) -> usize {
        (self.info.pipeline_depth as usize).max(1)
    }

    /// Launches of a decode of `rows` rows, if it is one graph.
    pub(crate) fn graph_nodes(&self, rows: usize, adapters: bool) -> Option<usize> {
        self.executor.graph_nodes(rows, adapters)
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.executor.in_flight()
    }

    pub(crate) fn take_seq(&mut self) -> u64 {
        self.next_seq += 1;
        self.next_seq - 1
    }

    /// Blocks for `tokens` positions.
    pub(crate) fn take_blocks(&mut self, tokens: usize) -> anyhow::Result<Vec<u32>> {
        let count = tokens.div_ceil(self.info.block_tokens as usize);
        let keep = self.free_blocks.len().checked_sub(count).context("the arena has no KV blocks left")?;
        Ok(self.free_blocks.split_off(keep))
    }

    pub(crate) fn give_blocks(&mut self, blocks: &[u32]) {
        self.free_blocks.splice(0..0, blocks.iter().copied());
    }

    /// Runs sequences side by side to their ends. The positions of each: for generated tokens and forced decodes what was
    /// sampled, for prompts what their own tokens got.
    pub(crate) fn run(&mut self, jobs: &[Job]) -> anyhow::Result<Vec<Vec<Position>>> {
        let mut running = Vec::with_capacity(jobs.len());
        let mut starts = Vec::with_capacity(jobs.len());
        for job in jobs {
            let generated = if let Mode::Generate { tokens, .. } = job.mode { tokens } else { 0 };
            let (seq, blocks) = (self.take_seq(), self.take_blocks(job.tokens.len() + generated)?);
            let (tokens, known) = (job.tokens.clone(), job.tokens.len());
            starts.push(SeqStart {
                seq,
                tokens,
                prompt_tokens: known as u32,
                sampling: Some(job.sampling.clone()),
                pooling: 0,
            });
            running.push(Running { seq, blocks, computed: 0, known, positions: Vec::new() });
        }
        let mut unanswered = VecDeque::new();
        loop {
            let chunks = self.chunks(jobs, &mut running);
            if !chunks.is_empty() {
                self.submit(Step { starts: std::mem::take(&mut starts), chunks, ..Step::default() })?;
                unanswered.push_back(());
            }
            let is_over = running.iter().zip(jobs).all(|(running, job)| next_len(running, job).is_none());
            while unanswered.len() >= if is_over { 1 } else { self.depth() } {
                let Some(result) = self.poll()? else { bail!("a step was not answered") };
                unanswered.pop_front();
                take(result, &mut running)?;
            }
            if is_over {
                break;
            }
        }
        let finishes = running.iter().map(|running| running.seq).collect();
        self.submit(Step { finishes, ..Step::default() })?;
        self.poll()?;
        Ok(running
            .into_iter()
            .map(|running| {
                self.give_blocks(&running.blocks);
                running.positions
            })
            .collect())
    }

    /// The next chunk of each sequence that is not at its end, as many as the step's tokens allow.
    fn chunks(&self, jobs: &[Job], running: &mut [Running]) -> Vec<Chunk> {
        let mut budget = self.info.step_tokens_max as usize;
        let mut chunks = Vec::new();
        for (running, job) in running.iter_mut().zip(jobs) {
            let Some(len) = next_len(running, job).map(|len| len.min(budget)).filter(|&len| len > 0) else { continue };
            budget -= len;
            let (start, end) = (running.computed, running.computed + len);
            let sample = match job.mode {
                Mode::Generate { .. } => end == running.known,
                Mode::ForcedDecode => true,
                Mode::PromptLogprobs { .. } => false,
            };
            if sample && matches!(job.mode, Mode::Generate { .. }) {
                running.known += 1;
            }
            running.computed = end;
            let blocks = running.blocks[..end.div_ceil(self.info.block_tokens as usize)].to_vec();
            chunks.push(Chunk {
                seq: running.seq,
                start: start as u32,
                len: len as u32,
                blocks,
                adapters: job.adapters.clone(),
                sample,
                prompt_logprobs: matches!(job.mode, Mode::PromptLogprobs { .. }),
                mask: None,
                pool: false,
                blocks_from: 0,
            });
        }
        chunks
    }
}

/// Positions of the next chunk; `None` at the end.
fn next_len(running: &Running, job: &Job) -> Option<usize> {
    let left = running.known - running.computed;
    let (chunk, end) = match job.mode {
        Mode::Generate { chunk, tokens } => (chunk, job.tokens.len() + tokens),
        Mode::ForcedDecode => (1, usize::MAX),
        Mode::PromptLogprobs { chunk } => (chunk, usize::MAX),
    };
    // The last token that is generated is not computed.
    (left > 0 && running.known < end).then(|| left.min(chunk.max(1)))
}

fn take(result: StepResult, running: &mut [Running]) -> anyhow::Result<()> {
    if let Some(fault) = result.faults.first() {
        bail!("sequence {} failed: {}", fault.seq, fault.reason);
    }
    for sample in result.samples {
        if let Some(running) = running.iter_mut().find(|running| running.seq == sample.seq) {
            running.positions.push(Position { token: sample.token, logprob: sample.logprob, top: sample.top });
        }
    }
    for prompt in result.prompt_logprobs {
        if let Some(running) = running.iter_mut().find(|running| running.seq == prompt.seq) {
            let positions = prompt.positions.into_iter();
            running.positions.extend(positions.map(|p| Position { token: 0, logprob: p.logprob, top: p.top }));
        }
    }
    Ok(())
}
