//! GB/s and GFLOP/s of each op at the shapes of SmolLM2-135M and Llama-3.2-1B, and how much of the time is what its bytes or
//! operations take at the machine's ceilings, which are measured first. Ops that find their data in caches may be above 100 %.
//! `cargo run --release -p loramux-kernels --example bench_ops [linear] [attention] [lora] [small]`;
//! some seconds.

use loramux_kernels::{
    AdapterImage, AdapterTable, Adapters, Arena, ArenaDtype, AttnChunk, AttnSpec, Ceilings, Dtype, HostData, KvLayout,
    KvSlot, LoraPart, LoraScratch, LoraSite, PackedWeight, RopeAngles, Rows, Segment, Slice, SlotScale, WeightPart,
    WorkList, in_pool, isa_name, linear, paged_attention, project, rms_norm, rope_store, sampler, silu_mul, threads,
};
use std::hint::black_box;
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Time that one figure may take.
const PATIENCE: Duration = Duration::from_millis(120);
/// Weights are used in turn from this many bytes, so that the caches are cold as in a real step.
const COLD_BYTES: usize = 160 << 20;

#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
}

const HEAD_DIM: usize = 64;
const MODELS: [Model; 2] = [
    Model { name: "SmolLM2-135M", hidden: 576, intermediate: 1536, heads: 9, kv_heads: 3, vocab: 49152 },
    Model { name: "Llama-3.2-1B", hidden: 2048, intermediate: 8192, heads: 32, kv_heads: 8, vocab: 128_256 },
];

/// Seconds of the fastest of many calls; `call` gets its number.
fn time(mut call: impl FnMut(usize) -> Result<(), Failure>) -> Result<f64, Failure> {
    let (started, mut best, mut n) = (Instant::now(), f64::INFINITY, 0);
    while n < 4 || started.elapsed() < PATIENCE {
        let before = Instant::now();
        call(n)?;
        best = best.min(before.elapsed().as_secs_f64());
        n += 1;
    }
    Ok(best)
}

/// Pseudo-random values in -1..1.
fn values(n: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn rows(rows: usize, width: usize) -> Rows {
    let mut out = Rows::zeros(rows, width);
    out.as_f32_mut().copy_from_slice(&values(rows * width));
    out
}

/// What multiplies in an op.
#[derive(Clone, Copy, PartialEq)]
enum Arithmetic {
    F32,
    /// Weights in bf16: pairs where the machine has them.
    Weights,
}

fn report(ceilings: Ceilings, op: &str, seconds: f64, bytes: usize, flops: usize, arithmetic: Arithmetic) {
    let (us, gb, gflop) = (seconds * 1e6, bytes as f64 / seconds / 1e9, flops as f64 / seconds / 1e9);
    let rate = match ceilings.pairs_per_second {
        Some(pairs) if arithmetic == Arithmetic::Weights => pairs,
        _ => ceilings.f32_per_second,
    };
    let bound = (bytes as f64 / ceilings.bytes_per_second).max(flops as f64 / rate);
    let part = 100.0 * bound / seconds;
    println!("  {op:<34} {us:>10.1} us {gb:>8.1} GB/s {gflop:>8.1} GFLOP/s {part:>6.0} %");
}

/// Seconds by which `second` takes longer than `first`: the median of calls in turn.
fn time_more(
    mut first: impl FnMut(usize) -> Result<(), Failure>,
    mut second: impl FnMut(usize) -> Result<(), Failure>,
) -> Result<f64, Failure> {
    let (started, mut n, mut more) = (Instant::now(), 0, Vec::new());
    while n < 8 || started.elapsed() < 4 * PATIENCE {
        let before = Instant::now();
        first(n)?;
        let between = Instant::now();
        second(n)?;
        more.push(between.elapsed().as_secs_f64() - (between - before).as_secs_f64());
        n += 1;
    }
    more.sort_by(f64::total_cmp);
    Ok(more[n / 2])
}

fn bench_linear(model: Model, ceilings: Ceilings) -> Result<(), Failure> {
    let Model { hidden, intermediate, heads, kv_heads, vocab, .. } = model;
    let sites = [
        ("qkv", (heads + 2 * kv_heads) * HEAD_DIM, hidden),
        ("gate_up", 2 * intermediate, hidden),
        ("down", hidden, intermediate),
        ("head", vocab, hidden),
    ];
    for (name, d_out, d_in) in sites {
        let data = values(d_out * d_in);
        let part = WeightPart { data: HostData::F32(&data), d_out, d_in };
        let copies = (COLD_BYTES / (2 * d_out * d_in)).clamp(1, 32);
        let weights: Vec<_> =
            (0..copies).map(|_| PackedWeight::pack(Dtype::Bf16, &[part])).collect::<Result<_, _>>()?;
        for m in if name == "head" { &[1, 8][..] } else { &[1, 4, 16, 256] } {
            let (x, mut y) = (rows(*m, d_in), Rows::zeros(*m, d_out));
            let seconds = time(|n| Ok(linear(&mut y, &x, &weights[n % copies], None)?))?;
            let op = format!("linear {name} {d_out}x{d_in} M={m}");
            report(ceilings, &op, seconds, weights[0].bytes(), 2 * m * d_in * d_out, Arithmetic::Weights);
        }
    }
    Ok(())
}

fn bench_attention(model: Model, ceilings: Ceilings) -> Result<(), Failure> {
    let Model { heads, kv_heads, .. } = model;
    let mut layout =
        KvLayout { layers: 1, kv_heads, head_dim: HEAD_DIM, block_tokens: 16, dtype: ArenaDtype::Bf16, page_bytes: 0 };
    layout.page_bytes = layout.block_bytes();
    let context = 2048;
    let mut arena = Arena::new(layout.page_bytes, context / 16)?;
    let width = (heads + 2 * kv_heads) * HEAD_DIM;
    let mut qkv = rows(context, width);
    let mut rope = RopeAngles::new(vec![1.0; HEAD_DIM / 2], 1.0, context);
    rope.fill(&(0..context as u32).collect::<Vec<_>>())?;
    let slots: Vec<KvSlot> = (0..context as u32).map(|p| KvSlot { block: p / 16, offset: p % 16 }).collect();
    let seconds = time(|_| Ok(rope_store(&mut qkv, heads, &rope, &mut arena, &layout, 0, &slots)?))?;
    report(ceilings, "rope_store 2048 rows", seconds, 4 * context * width, 0, Arithmetic::F32);
    let table: Vec<u32> = (0..context as u32 / 16).collect();
    let spec = AttnSpec { heads, scale: 0.125, window: None };
    let mut out = Rows::zeros(context, heads * HEAD_DIM);
    for (start, len) in [(512, 1), (2047, 1), (0, 512), (1536, 512)] {
        qkv.set_rows(len)?;
        let blocks = 0..(start + len).div_ceil(16);
        let chunks = [AttnChunk { first_row: 0, len, start, blocks }];
        let seconds = time(|_| Ok(paged_attention(&mut out, &qkv, &arena, &layout, 0, &spec, &chunks, &table)?))?;
        let pairs = len * start + len * (len + 1) / 2;
        let bytes = (start + len) * kv_heads * HEAD_DIM * 4;
        report(
            ceilings,
            &format!("attention {len} rows at {start}"),
            seconds,
            bytes,
            4 * pairs * heads * HEAD_DIM,
            Arithmetic::F32,
        );
    }
    Ok(())
}

/// Adapters of the benchmark.
const ADAPTERS: usize = 16;

/// What the adapters add to a product: time, bytes and operations are theirs alone. Weights and adapters come from memory.
fn bench_lora(model: Model, ceilings: Ceilings) -> Result<(), Failure> {
    let Model { hidden, intermediate, heads, kv_heads, .. } = model;
    let (q, kv) = (heads * HEAD_DIM, kv_heads * HEAD_DIM);
    let sites = [
        LoraSite { slices: &[Slice::Q, Slice::K, Slice::V], cols: vec![(0, q), (q, kv), (q + kv, kv)], d_in: hidden },
        LoraSite {
            slices: &[Slice::Gate, Slice::Up],
            cols: vec![(0, intermediate), (intermediate, intermediate)],
            d_in: hidden,
        },
        LoraSite { slices: &[Slice::Down], cols: vec![(0, hidden)], d_in: intermediate },
    ];
    for (site, rank) in sites.iter().flat_map(|site| [(site, 16), (site, 64)]) {
        let width: usize = site.cols.iter().map(|(_, d_out)| d_out).sum();
        let elements = rank * (site.d_in * site.slices.len() + width);
        let (layers, page_bytes) = ((COLD_BYTES / 2 / (ADAPTERS * elements * 2)).max(2), 2 << 20);
        let (mut arena, table, slots) = adapters(site, rank, layers, page_bytes)?;
        let data = values(width * site.d_in);
        let part = WeightPart { data: HostData::F32(&data), d_out: width, d_in: site.d_in };
        let copies = (COLD_BYTES / 2 / (2 * data.len())).clamp(1, 32);
        let weights: Vec<_> =
            (0..copies).map(|_| PackedWeight::pack(Dtype::Bf16, &[part])).collect::<Result<_, _>>()?;
        for (name, rows_each, used) in [("1 row", 1, 1), ("16 distinct", 1, 16), ("256 rows of one", 256, 1)] {
            let total = rows_each * used;
            let (x, mut y, mut z) = (rows(total, site.d_in), Rows::zeros(total, width), Rows::zeros(total, width));
            let (mut v, mut work) = (LoraScratch::default(), WorkList::default());
            let segments = slots.iter().take(used).enumerate();
            let segments = segments.map(|(n, adapters)| Segment { rows: n * rows_each..(n + 1) * rows_each, adapters });
            work.build(&table, segments)?;
            let arena = &mut arena;
            let more = time_more(
                |n| Ok(linear(&mut z, &x, &weights[2 * n % copies], None)?),
                |n| {
                    let (v, layer) = (&mut v, n % layers);
                    let adapters = Adapters { v, arena, table: &table, layer, site, work: &work };
                    Ok(project(&mut y, &x, &weights[(2 * n + 1) % copies], None, adapters)?)
                },
            )?;
            let op = format!("lora {:?} r{rank} {name}", site.slices[0]);
            report(ceilings, &op, more, used * elements * 2, 2 * total * elements, Arithmetic::Weights);
        }
    }
    Ok(())
}

/// An arena with [`ADAPTERS`] adapters of the site's matrices in `layers` layers.
fn adapters(
    site: &LoraSite,
    rank: usize,
    layers: usize,
    page_bytes: usize,
) -> Result<(Arena, AdapterTable, Vec<[SlotScale; 1]>), Failure> {
    let widest = site.cols.iter().map(|(_, d_out)| *d_out).max().unwrap_or(0);
    let (a, b) = (values(rank * site.d_in), values(rank * widest));
    let part = |layer: usize, slice: Slice, d_out: usize| LoraPart {
        layer,
        slice,
        rank,
        a: &a,
        b: &b[..rank * d_out],
        d_in: site.d_in,
        d_out,
        scale: 0.1,
    };
    let of_layer = |layer| site.slices.iter().zip(&site.cols).map(move |(&slice, &(_, d_out))| (layer, slice, d_out));
    let parts: Vec<LoraPart> =
        (0..layers).flat_map(of_layer).map(|(layer, slice, d_out)| part(layer, slice, d_out)).collect();
    let image = AdapterImage::pack(Dtype::Bf16, page_bytes, layers, &parts)?;
    let pages = image.pages_needed();
    let mut arena = Arena::new(page_bytes, ADAPTERS * pages)?;
    let mut table = AdapterTable::new(ADAPTERS);
    let mut slots = Vec::new();
    for slot in 0..ADAPTERS as u32 {
        let ids: Vec<u32> = (slot * pages as u32..).take(pages).collect();
        table.publish(&mut arena, slot, 1, &image, &ids)?;
        slots.push([SlotScale { slot, generation: 1, scale: 1.0 }]);
    }
    Ok((arena, table, slots))
}

fn bench_small(model: Model, ceilings: Ceilings) -> Result<(), Failure> {
    let Model { hidden, intermediate, vocab, .. } = model;
    for m in [1, 256] {
        let (x, mut out, weight) = (rows(m, hidden), Rows::zeros(m, hidden), values(hidden));
        let seconds = time(|_| Ok(rms_norm(&mut out, &x, &weight, 1e-5)?))?;
        report(ceilings, &format!("rms_norm M={m}"), seconds, 8 * m * hidden, 0, Arithmetic::F32);
        let (x, mut out) = (rows(m, 2 * intermediate), Rows::zeros(m, intermediate));
        let seconds = time(|_| Ok(silu_mul(&mut out, &x)?))?;
        report(ceilings, &format!("silu_mul M={m}"), seconds, 12 * m * intermediate, 0, Arithmetic::F32);
    }
    let logits: Vec<f32> = values(vocab).iter().map(|v| v * 12.0).collect();
    let mut scratch = sampler::SampleScratch::default();
    let free = sampler::SampleParams::default();
    let cases = [
        ("greedy", sampler::SampleParams { temperature: 0.0, ..free }),
        ("free", free),
        ("top-p 0.9", sampler::SampleParams { top_p: 0.9, ..free }),
        ("top-k 50", sampler::SampleParams { top_k: 50, ..free }),
    ];
    let mut row = logits.clone();
    for (name, params) in cases {
        let seconds = time(|n| {
            row.copy_from_slice(&logits);
            let history = sampler::History::default();
            black_box(sampler::sample(&mut row, &params, &history, n as u64, &mut scratch)?);
            Ok(())
        })?;
        report(ceilings, &format!("sample {name}"), seconds, 4 * vocab, 0, Arithmetic::F32);
    }
    let seconds = time(|_| {
        black_box(sampler::top_logprobs(&logits, 5));
        Ok(())
    })?;
    report(ceilings, "top_logprobs 5", seconds, 4 * vocab, 0, Arithmetic::F32);
    Ok(())
}

type Bench = fn(Model, Ceilings) -> Result<(), Failure>;
const OPS: [(&str, Bench); 4] =
    [("linear", bench_linear), ("attention", bench_attention), ("lora", bench_lora), ("small", bench_small)];

fn main() -> Result<(), Failure> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = wanted.iter().find(|wanted| OPS.iter().all(|(name, _)| name != wanted)) {
        return Err(format!(
            "unknown ops {unknown}: give some of {}, or nothing",
            OPS.map(|(name, _)| name).join(", ")
        )
        .into());
    }
    in_pool(|| {
        let ceilings = Ceilings::measure()?;
        let pairs = ceilings.pairs_per_second.map_or("no".to_owned(), |pairs| format!("{:.0}", pairs / 1e9));
        let (read, single) = (ceilings.bytes_per_second / 1e9, ceilings.f32_per_second / 1e9);
        println!("{} threads: {read:.1} GB/s read, {single:.0} GFLOP/s of f32, {pairs} GFLOP/s of pairs", threads());
        for model in MODELS {
            println!("{} on {}", model.name, isa_name());
            for (name, bench) in OPS {
                if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
                    bench(model, ceilings)?;
                }
            }
        }
        Ok(())
    })
}
