//! Tier B: steps of the whole model with made-up weights, through the interface that the router uses, as many in flight as
//! the shard wants. A step's time is from one result to the next; the host's part is what handing a step over takes.

use std::time::Instant;

use anyhow::bail;
use loramux_kernels::device::check::Random;
use loramux_kernels::device::step::BLOCK_TOKENS;
use loramux_models::DecoderSpec;
use loramux_proto::{AdapterRef, Chunk, Sampling, SeqStart, Step};

use super::shapes::Roofline;
use super::{Setting, Times};
use crate::doctor::adapters::RandomAdapter;
use crate::doctor::churn::TempDir;
use crate::doctor::machine::shard_options;
use crate::doctor::report::{Section, Status};
use crate::doctor::runner::{Prepared, Runner, greedy, prepare};
use crate::shard::{LoadFormatChoice, ShardOptions, launch};

/// What is measured.
struct Grid {
    batches: &'static [usize],
    contexts: &'static [usize],
    /// Ranks of the distinct adapters of a batch; no more of them than it has rows.
    mixes: Vec<(&'static str, Vec<usize>)>,
    prompts: &'static [usize],
    warm: usize,
    runs: usize,
    step_tokens_max: usize,
}

impl Grid {
    fn new(is_emulated: bool) -> Self {
        let mixed: Vec<usize> = [8, 16, 32, 64].into_iter().cycle().take(64).collect();
        if is_emulated {
            let mixes = vec![("0", vec![]), ("1 r16", vec![16]), ("mixed ranks", vec![8, 16])];
            let (batches, contexts, prompts): (&[_], &[_], &[_]) = (&[1, 2], &[20], &[33]);
            return Self { batches, contexts, mixes, prompts, warm: 1, runs: 3, step_tokens_max: 48 };
        }
        Self {
            batches: &[1, 8, 16, 32, 64, 128, 256],
            contexts: &[512, 2048],
            mixes: vec![
                ("0", vec![]),
                ("1 r16", vec![16]),
                ("8 r16", vec![16; 8]),
                ("64 r16", vec![16; 64]),
                ("64 of ranks 8 to 64", mixed),
            ],
            prompts: &[512, 2048, 8192],
            warm: 10,
            runs: 100,
            step_tokens_max: 8192,
        }
    }

    fn sequences_max(&self) -> usize {
        self.batches.iter().copied().max().unwrap_or(1)
    }
}

/// A model that is loaded, and its adapters by rank.
struct Bench {
    runner: Runner,
    adapters: Vec<(usize, Prepared)>,
    roofline: Roofline,
    random: Random,
    vocab: usize,
}

/// Sequences with a cache of a certain length.
struct Batch {
    seqs: Vec<u64>,
    blocks: Vec<Vec<u32>>,
    context: usize,
}

/// Measures decodes and prompts.
pub(super) fn measure(setting: &Setting, sections: &mut Vec<Section>) -> anyhow::Result<()> {
    let grid = Grid::new(setting.is_emulated);
    let started = Instant::now();
    let mut bench = Bench::load(setting, &grid)?;
    let mut section = Section::new("model");
    let info = bench.runner.info();
    let text =
        format!("{:.0} M parameters, ready in {:.1} s", info.parameters as f64 / 1e6, started.elapsed().as_secs_f64());
    section.push(Status::Info, setting.model.name, text).field("parameters", info.parameters);
    sections.push(section);
    for &context in grid.contexts {
        let mut section = Section::new(if context <= 512 { "decode, short texts" } else { "decode, long texts" });
        for &batch in grid.batches {
            if !setting.has_time(&mut section, &format!("b {batch}, context {context}")) {
                break;
            }
            bench.decodes(&grid, batch, context, &mut section)?;
        }
        sections.push(section);
    }
    let mut section = Section::new("prompts");
    for &tokens in grid.prompts {
        if setting.has_time(&mut section, &format!("{tokens} tokens")) {
            bench.prompts(&grid, tokens, &mut section)?;
        }
    }
    sections.push(section);
    Ok(())
}

impl Bench {
    fn load(setting: &Setting, grid: &Grid) -> anyhow::Result<Self> {
        let dir = TempDir::new("bench")?;
        let spec: DecoderSpec = setting.model.spec()?;
        std::fs::write(dir.0.join("config.json"), setting.model.config())?;
        let context = grid.contexts.iter().chain(grid.prompts).copied().max().unwrap_or(1) + 16;
        let options = ShardOptions {
            model: dir.0.clone(),
            load_format: LoadFormatChoice::Dummy,
            context_tokens_max: Some(context as u32),
            arena_bytes: setting.is_emulated.then_some(64 << 20),
            step_tokens_max: Some(grid.step_tokens_max as u32),
            seqs_max: grid.sequences_max() as u32,
            slots_max: Some(64),
            host_adapter_bytes: if setting.is_emulated { 64 << 20 } else { 2 << 30 },
            ..shard_options(setting.args)
        };
        let executor = launch::load_on(Some(setting.device), &options, Vec::new(), &mut |_, _, _| {})?;
        let mut ranks: Vec<usize> = grid.mixes.iter().flat_map(|(_, ranks)| ranks.iter().copied()).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let mut adapters = Vec::new();
        for rank in ranks {
            let path = dir.0.join(format!("r{rank}"));
            RandomAdapter { rank, seed: setting.args.seed + rank as u64, gain: 0.05 }.write(&path, &spec)?;
            adapters.push((rank, prepare(&*executor, &path)?));
        }
        // The same content in every slot: each has pages of its own, so a step reads as many bytes as of distinct ones.
        let pages = |ranks: &Vec<usize>| -> u32 {
            let of =
                |rank: &usize| adapters.iter().find(|(known, _)| known == rank).map_or(0, |(_, adapter)| adapter.pages);
            ranks.iter().map(of).sum()
        };
        let adapter_pages = grid.mixes.iter().map(|(_, ranks)| pages(ranks)).max().unwrap_or(0);
        // A slot that grows keeps its pages until it is filled anew.
        let runner = Runner::with_pages(executor, 2 * adapter_pages, setting.args.seed);
        Ok(Self {
            runner,
            adapters,
            roofline: Roofline::new(&spec, setting.ceilings),
            random: Random::new(setting.args.seed),
            vocab: spec.vocab,
        })
    }

    /// One batch under every mix of adapters.
    fn decodes(&mut self, grid: &Grid, batch: usize, context: usize, section: &mut Section) -> anyhow::Result<()> {
        let mut rows = match self.fill(grid, batch, context) {
            Ok(rows) => rows,
            Err(error) => {
                section.push(
                    Status::Warning,
                    format!("b {batch}, context {context}"),
                    format!("not measured: {error:#}"),
                );
                return Ok(());
            }
        };
        let mut base = None;
        for (name, ranks) in &grid.mixes {
            let ranks = &ranks[..ranks.len().min(batch)];
            // The mix is the one before, cut to the batch.
            if ranks.len() < 2 && base.is_some() && !name.starts_with('1') {
                continue;
            }
            let placed = self.place(ranks)?;
            let step = |rows: &Batch| decode(rows, &placed);
            let (times, host) = self.time(grid, || step(&rows))?;
            let p50 = times.at(0.5);
            let ratio = p50 / *base.get_or_insert(p50);
            let bound = self.roofline.decode_us(batch, context, ranks);
            let nodes = self.runner.graph_nodes(batch, !ranks.is_empty());
            let text = format!(
                "{:9.3} ms p50 {:9.3} p99  {:5.1} % of the roofline  {ratio:6.3} x base  {:4} nodes  host {:6.0} us",
                p50 / 1e3,
                times.at(0.99) / 1e3,
                100.0 * bound / p50,
                nodes.unwrap_or(0),
                host.at(0.5)
            );
            let line = section.push(Status::Info, format!("b {batch}, ctx {context}, adapters {name}"), text);
            times.fields(line);
            line.field("kind", "decode")
                .field("batch", batch)
                .field("context", context)
                .field("adapters", ranks.len())
                .field("ranks", ranks.to_vec())
                .field("ratio_to_base", ratio)
                .field("roofline_us", bound)
                .field("roofline_part", bound / p50)
                .field("tokens_per_s", 1e6 * batch as f64 / p50)
                .field("graph_nodes", nodes)
                .field("host_p50_us", host.at(0.5));
        }
        self.forget(&mut rows)
    }

    /// A prompt in one step, without and with an adapter.
    fn prompts(&mut self, grid: &Grid, tokens: usize, section: &mut Section) -> anyhow::Result<()> {
        let mut base = None;
        for ranks in [&[][..], &[16][..]] {
            let (seq, blocks) = (self.runner.take_seq(), self.runner.take_blocks(tokens)?);
            let starts = vec![self.start(seq, tokens)];
            self.runner.submit(Step { starts, ..Step::default() })?;
            self.runner.poll()?;
            let adapters = self.place(ranks)?;
            let mut rows = Batch { seqs: vec![seq], blocks: vec![blocks], context: tokens };
            let prompt = |rows: &Batch| Step {
                chunks: vec![chunk(seq, 0, tokens, &rows.blocks[0], adapters.clone(), true)],
                ..Step::default()
            };
            let runs = Grid { warm: grid.warm.min(2), runs: grid.runs.min(20), ..Grid::new(true) };
            let (times, host) = self.time(&runs, || prompt(&rows))?;
            let p50 = times.at(0.5);
            let ratio = p50 / *base.get_or_insert(p50);
            let bound = self.roofline.prefill_us(tokens, ranks.iter().sum());
            let text = format!(
                "{:9.3} ms p50 {:9.3} p99  {:5.1} % of the roofline  {ratio:6.3} x base  host {:6.0} us",
                p50 / 1e3,
                times.at(0.99) / 1e3,
                100.0 * bound / p50,
                host.at(0.5)
            );
            let line = section.push(Status::Info, format!("{tokens} tokens, adapters {}", ranks.len()), text);
            times.fields(line);
            line.field("kind", "prefill")
                .field("tokens", tokens)
                .field("adapters", ranks.len())
                .field("ranks", ranks.to_vec())
                .field("ratio_to_base", ratio)
                .field("roofline_us", bound)
                .field("roofline_part", bound / p50)
                .field("tokens_per_s", 1e6 * tokens as f64 / p50)
                .field("host_p50_us", host.at(0.5));
            self.forget(&mut rows)?;
        }
        Ok(())
    }

    fn start(&mut self, seq: u64, tokens: usize) -> SeqStart {
        let tokens: Vec<u32> = (0..tokens).map(|_| self.random.below(self.vocab) as u32).collect();
        let sampling = Sampling { logprobs: None, prompt_logprobs: None, ..greedy() };
        SeqStart { seq, prompt_tokens: tokens.len() as u32, tokens, sampling: Some(sampling), pooling: 0 }
    }

    /// Sequences whose caches are computed, in steps of as many tokens as there may be.
    fn fill(&mut self, grid: &Grid, batch: usize, context: usize) -> anyhow::Result<Batch> {
        let mut rows = Batch { seqs: Vec::new(), blocks: Vec::new(), context };
        for _ in 0..batch {
            match self.runner.take_blocks(context) {
                Ok(blocks) => rows.blocks.push(blocks),
                Err(error) => {
                    rows.blocks.iter().for_each(|blocks| self.runner.give_blocks(blocks));
                    return Err(error);
                }
            }
        }
        for row in 0..batch {
            let seq = self.runner.take_seq();
            rows.seqs.push(seq);
            let mut starts = vec![self.start(seq, context)];
            for first in (0..context).step_by(grid.step_tokens_max) {
                let len = (context - first).min(grid.step_tokens_max);
                let chunks = vec![chunk(seq, first, len, &rows.blocks[row], Vec::new(), false)];
                self.runner.submit(Step { starts: std::mem::take(&mut starts), chunks, ..Step::default() })?;
                self.runner.poll()?;
            }
        }
        Ok(rows)
    }

    fn forget(&mut self, rows: &mut Batch) -> anyhow::Result<()> {
        let finishes = std::mem::take(&mut rows.seqs);
        self.runner.submit(Step { finishes, ..Step::default() })?;
        self.runner.poll()?;
        rows.blocks.drain(..).for_each(|blocks| self.runner.give_blocks(&blocks));
        Ok(())
    }

    /// Adapters of these ranks, in slots 0, 1, ...
    fn place(&mut self, ranks: &[usize]) -> anyhow::Result<Vec<AdapterRef>> {
        let mut placed = Vec::with_capacity(ranks.len());
        for (slot, rank) in ranks.iter().enumerate() {
            let Some((_, adapter)) = self.adapters.iter().find(|(known, _)| known == rank) else {
                bail!("no adapter of rank {rank} was made")
            };
            let adapter = adapter.clone();
            placed.push(self.runner.place(slot as u32, &adapter)?);
        }
        Ok(placed)
    }

    /// Times from result to result, and of handing over.
    fn time(&mut self, grid: &Grid, step: impl Fn() -> Step) -> anyhow::Result<(Times, Times)> {
        let (mut landed, mut host) = (Vec::new(), Vec::new());
        for run in 0..grid.warm + grid.runs + 1 {
            let step = step();
            let started = Instant::now();
            self.runner.submit(step)?;
            if run >= grid.warm {
                host.push(1e6 * started.elapsed().as_secs_f64());
            }
            while self.runner.in_flight() >= self.runner.depth() {
                self.take(&mut landed)?;
            }
        }
        while self.runner.in_flight() > 0 {
            self.take(&mut landed)?;
        }
        let us = landed.windows(2).skip(grid.warm).map(|pair| 1e6 * (pair[1] - pair[0]).as_secs_f64()).collect();
        Ok((Times::new(us), Times::new(host)))
    }

    fn take(&mut self, landed: &mut Vec<Instant>) -> anyhow::Result<()> {
        let Some(result) = self.runner.poll()? else { bail!("a step was not answered") };
        if let Some(fault) = result.faults.first() {
            bail!("a sequence failed: {}", fault.reason);
        }
        landed.push(Instant::now());
        Ok(())
    }
}

/// Each row's last position once more, row i under adapter i of the list, round and round; rows of an adapter side by side.
fn decode(rows: &Batch, placed: &[AdapterRef]) -> Step {
    let count = rows.seqs.len();
    let of = |row: usize| placed.get(row * placed.len() / count).map(|&adapter| vec![adapter]).unwrap_or_default();
    let last = rows.context - 1;
    let chunks = (0..count).map(|row| chunk(rows.seqs[row], last, 1, &rows.blocks[row], of(row), true));
    Step { chunks: chunks.collect(), ..Step::default() }
}

fn chunk(seq: u64, start: usize, len: usize, blocks: &[u32], adapters: Vec<AdapterRef>, sample: bool) -> Chunk {
    let blocks = blocks[..(start + len).div_ceil(BLOCK_TOKENS)].to_vec();
    Chunk {
        seq,
        start: start as u32,
        len: len as u32,
        blocks,
        adapters,
        sample,
        prompt_logprobs: false,
        mask: None,
        pool: false,
        blocks_from: 0,
    }
}
