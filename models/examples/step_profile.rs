//! Where the milliseconds of a decode step go, against the bytes and FLOPs it cannot do without.
//!
//! `cargo run --release -p loramux-models --example step_profile -- MODEL [--adapters DIR] [--rows 16] [--context 128] [--steps 40]
//! [--prefill] [--isa NAME]`: `DIR` holds PEFT adapters; row i uses the i-th of them (in a circle), without `--adapters` none.

use loramux_kernels::sampler::{History, SampleParams, SampleScratch, sample};
use loramux_kernels::{
    AdapterTable, Arena, AttnChunk, KvLayout, KvSlot, Segment, SlotScale, for_each_chunk, in_pool, isa_name, set_isa,
    threads,
};
use loramux_models::adapter::{self, AdapterLimits};
use loramux_models::{Batch, Decoder, DecoderLimits, LoadFormat, LoadOptions, OpTimes, Site, load};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const BLOCK_TOKENS: usize = 16;
const PAGE_BYTES: usize = 2 << 20;

struct Options {
    model: PathBuf,
    adapters: Option<PathBuf>,
    rows: usize,
    context: usize,
    steps: usize,
    prefill: bool,
}

fn options() -> Result<Options, Failure> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().ok_or("name a model directory")?.into();
    let mut options = Options { model, adapters: None, rows: 16, context: 128, steps: 40, prefill: false };
    while let Some(name) = arguments.next() {
        if name == "--prefill" {
            options.prefill = true;
            continue;
        }
        let value = arguments.next().ok_or_else(|| format!("{name} takes a value"))?;
        match name.as_str() {
            "--adapters" => options.adapters = Some(value.into()),
            "--rows" => options.rows = value.parse()?,
            "--context" => options.context = value.parse()?,
            "--steps" => options.steps = value.parse()?,
            "--isa" => set_isa(&value)?,
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    Ok(options)
}

struct Shard {
    decoder: Decoder,
    arena: Arena,
    table: AdapterTable,
    layout: KvLayout,
    adapters: Vec<SlotScale>,
    adapter_bytes: usize,
}

fn shard(options: &Options) -> Result<Shard, Failure> {
    let load_options = LoadOptions { dtype: None, format: LoadFormat::Auto, seed: 0 };
    let model = load(&options.model, &load_options, &mut |_| ())?;
    let rows = options.rows * if options.prefill { options.context } else { 1 };
    let limits = DecoderLimits { step_tokens_max: rows, logits_rows_max: options.rows };
    let decoder = Decoder::new(model, limits);
    let layout = decoder.kv_layout(BLOCK_TOKENS, PAGE_BYTES, decoder.dtype().arena());
    let blocks = options.rows * (options.context + options.steps).div_ceil(BLOCK_TOKENS);
    let kv_pages = blocks.div_ceil(layout.blocks_per_page());
    let mut shard = Shard {
        arena: Arena::new(PAGE_BYTES, kv_pages + options.rows * 256)?,
        table: AdapterTable::new(options.rows),
        decoder,
        layout,
        adapters: Vec::new(),
        adapter_bytes: 0,
    };
    if let Some(folder) = &options.adapters {
        publish(&mut shard, folder, options.rows, kv_pages as u32)?;
    }
    Ok(shard)
}

fn publish(shard: &mut Shard, folder: &Path, most: usize, mut next_page: u32) -> Result<(), Failure> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_, Failure>>()?;
    paths.retain(|path| path.join("adapter_config.json").exists());
    paths.sort();
    for (slot, path) in paths.iter().take(most).enumerate() {
        let read = adapter::read(path, shard.decoder.spec(), &AdapterLimits::default())?;
        let image = read.pack(shard.decoder.dtype(), PAGE_BYTES)?;
        let pages: Vec<u32> = (next_page..).take(image.pages_needed()).collect();
        next_page += pages.len() as u32;
        shard.table.publish(&mut shard.arena, slot as u32, 1, &image, &pages)?;
        shard.adapters.push(SlotScale { slot: slot as u32, generation: 1, scale: 1.0 });
        shard.adapter_bytes += std::fs::metadata(path.join("adapter_model.safetensors"))?.len() as usize;
    }
    if shard.adapters.is_empty() { Err("no adapter in --adapters".into()) } else { Ok(()) }
}

/// `len` tokens of each sequence from position `start` on.
fn batch(shard: &Shard, options: &Options, start: usize, len: usize) -> Result<Batch, Failure> {
    let mut batch = Batch::default();
    let per_sequence = (options.context + options.steps).div_ceil(BLOCK_TOKENS);
    for sequence in 0..options.rows {
        let first_row = batch.tokens.len();
        for position in start..start + len {
            batch.tokens.push(((sequence * 977 + position * 31) % (shard.decoder.spec().vocab - 1)) as u32);
            batch.positions.push(position as u32);
            let block = (sequence * per_sequence + position / BLOCK_TOKENS) as u32;
            batch.kv_slots.push(KvSlot { block, offset: (position % BLOCK_TOKENS) as u32 });
        }
        let first = batch.block_table.len();
        batch.block_table.extend((sequence * per_sequence..(sequence + 1) * per_sequence).map(|block| block as u32));
        batch.chunks.push(AttnChunk { first_row, len, start, blocks: first..batch.block_table.len() });
    }
    let each: Vec<[SlotScale; 1]> =
        (0..options.rows).filter_map(|i| Some([*shard.adapters.get(i % shard.adapters.len().max(1))?])).collect();
    // As a server does: neighbours with the same adapter are one segment.
    let mut first = 0;
    let segments = each.chunk_by(|a, b| a == b).map(|same| {
        let rows = first * len..(first + same.len()) * len;
        first += same.len();
        Segment { rows, adapters: &same[0] }
    });
    batch.work.build(&shard.table, segments)?;
    Ok(batch)
}

#[derive(Default)]
struct Sample {
    ops: OpTimes,
    forward: Duration,
    head: Duration,
    greedy: Duration,
}

fn step(shard: &mut Shard, batch: &Batch, rows: &[u32]) -> Result<Sample, Failure> {
    let mut times = Sample::default();
    let started = Instant::now();
    shard.decoder.forward_timed(batch, &shard.layout, &mut shard.arena, &shard.table, &mut times.ops)?;
    times.forward = started.elapsed();
    let started = Instant::now();
    let logits = shard.decoder.logits(rows, batch, &shard.arena, &shard.table)?;
    times.head = started.elapsed();
    let (started, vocab) = (Instant::now(), logits.width());
    for_each_chunk(logits.as_f32_mut(), vocab, usize::MAX, |_, row| {
        let params = SampleParams { temperature: 0.0, ..SampleParams::default() };
        let _ = std::hint::black_box(sample(row, &params, &History::default(), 0, &mut SampleScratch::default()));
    });
    times.greedy = started.elapsed();
    Ok(times)
}

/// The time of one kind of op.
type OpTime = fn(&Sample) -> Duration;

fn median(samples: &[Sample], of: impl Fn(&Sample) -> Duration) -> f64 {
    let mut all: Vec<f64> = samples.iter().map(|sample| of(sample).as_secs_f64() * 1e3).collect();
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn report(options: &Options, shard: &Shard, samples: &[Sample], rows: usize) {
    let spec = shard.decoder.spec();
    let (q, kv) = (spec.q_width(), spec.kv_width());
    let inner = [
        (spec.hidden, q + 2 * kv),
        (q, spec.hidden),
        (spec.hidden, 2 * spec.intermediate),
        (spec.intermediate, spec.hidden),
    ];
    println!(
        "{} on {}, {} threads: {rows} rows, context {}, {} adapters ({:.1} MB of files)",
        options.model.display(),
        isa_name(),
        threads(),
        options.context,
        shard.adapters.len(),
        shard.adapter_bytes as f64 / 1e6
    );
    println!("{:<12} {:>9} {:>9} {:>9} {:>9}", "op", "ms", "weights", "GB/s", "GFLOP/s");
    let line = |name: &str, ms: f64, bytes: f64, flops: f64| {
        println!("{name:<12} {ms:>9.3} {:>6.1} MB {:>9.1} {:>9.1}", bytes / 1e6, bytes / ms / 1e6, flops / ms / 1e6);
    };
    for (site, name) in Site::ALL.into_iter().zip(["qkv", "output", "gate_up", "down"]) {
        let weights = (inner[site as usize].0 * inner[site as usize].1 * spec.layers) as f64;
        line(name, median(samples, |s| s.ops.sites[site as usize]), 2.0 * weights, 2.0 * weights * rows as f64);
    }
    let head = (spec.hidden * spec.vocab) as f64;
    line("head", median(samples, |s| s.head), 2.0 * head, 2.0 * head * options.rows as f64);
    let context = options.context as f64 * options.rows as f64;
    let kv_bytes = 4.0 * context * (kv * spec.layers) as f64;
    line(
        "attention",
        median(samples, |s| s.ops.attention),
        kv_bytes,
        4.0 * rows as f64 * options.context as f64 * (q * spec.layers) as f64,
    );
    let small: [(&str, OpTime); 5] = [
        ("norms", |s| s.ops.norms),
        ("rope_store", |s| s.ops.rope_store),
        ("activation", |s| s.ops.activation),
        ("embed", |s| s.ops.embed),
        ("greedy", |s| s.greedy),
    ];
    for (name, of) in small {
        println!("{name:<12} {:>9.3}", median(samples, of));
    }
    println!("{:<12} {:>9.3}", "step", median(samples, |s| s.forward + s.head + s.greedy));
}

fn main() -> Result<(), Failure> {
    let options = options()?;
    let mut shard = shard(&options)?;
    in_pool(|| {
        let mut samples = Vec::new();
        for n in 0..options.steps {
            let (start, len) = if options.prefill { (0, options.context) } else { (options.context + n, 1) };
            let batch = batch(&shard, &options, start, len)?;
            let rows: Vec<u32> = (0..options.rows).map(|i| ((i + 1) * len - 1) as u32).collect();
            samples.push(step(&mut shard, &batch, &rows)?);
        }
        samples.drain(..options.steps / 4);
        report(&options, &shard, &samples, options.rows * if options.prefill { options.context } else { 1 });
        Ok(())
    })
}
