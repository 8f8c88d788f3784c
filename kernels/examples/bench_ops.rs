//! GB/s of what is bound by memory and GFLOP/s of what is bound by arithmetic, per op, at the shapes of SmolLM2-135M and
//! Llama-3.2-1B. `cargo run --release -p loramux-kernels --example bench_ops`; a few seconds.

use loramux_kernels::{
    AdapterImage, AdapterTable, Arena, ArenaDtype, AttnChunk, AttnSpec, Dtype, HostData, KvLayout, KvSlot, LoraPart,
    LoraScratch, LoraSite, PackedWeight, RopeAngles, Rows, Segment, Slice, SlotScale, WeightPart, WorkList, in_pool,
    isa_name, linear, lora_expand, lora_shrink, paged_attention, rms_norm, rope_store, sampler, silu_mul,
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

fn report(op: &str, seconds: f64, bytes: usize, flops: usize) {
    let (us, gb, gflop) = (seconds * 1e6, bytes as f64 / seconds / 1e9, flops as f64 / seconds / 1e9);
    println!("  {op:<34} {us:>10.1} us {gb:>8.1} GB/s {gflop:>8.1} GFLOP/s");
}

fn bench_linear(model: Model) -> Result<(), Failure> {
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
            report(&format!("linear {name} {d_out}x{d_in} M={m}"), seconds, weights[0].bytes(), 2 * m * d_in * d_out);
        }
    }
    Ok(())
}

fn bench_attention(model: Model) -> Result<(), Failure> {
    let Model { heads, kv_heads, .. } = model;
    let mut layout =
        KvLayout { layers: 1, kv_heads, head_dim: HEAD_DIM, block_tokens: 16, dtype: ArenaDtype::F16, page_bytes: 0 };
    layout.page_bytes = layout.block_bytes();
    let context = 2048;
    let mut arena = Arena::new(layout.page_bytes, context / 16)?;
    let width = (heads + 2 * kv_heads) * HEAD_DIM;
    let mut qkv = rows(context, width);
    let mut rope = RopeAngles::new(vec![1.0; HEAD_DIM / 2], 1.0, context);
    rope.fill(&(0..context as u32).collect::<Vec<_>>())?;
    let slots: Vec<KvSlot> = (0..context as u32).map(|p| KvSlot { block: p / 16, offset: p % 16 }).collect();
    let seconds = time(|_| Ok(rope_store(&mut qkv, heads, &rope, &mut arena, &layout, 0, &slots)?))?;
    report("rope_store 2048 rows", seconds, 4 * context * width, 0);
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
        report(&format!("attention {len} rows at {start}"), seconds, bytes, 4 * pairs * heads * HEAD_DIM);
    }
    Ok(())
}

fn bench_lora(model: Model) -> Result<(), Failure> {
    let Model { hidden, intermediate, heads, kv_heads, .. } = model;
    let (q, kv) = (heads * HEAD_DIM, kv_heads * HEAD_DIM);
    let sites = [
        LoraSite { slices: &[Slice::Q, Slice::K, Slice::V], cols: vec![(0, q), (q, kv), (q + kv, kv)], d_in: hidden },
        LoraSite { slices: &[Slice::Down], cols: vec![(0, hidden)], d_in: intermediate },
    ];
    for (site, rank) in sites.iter().flat_map(|site| [(site, 16), (site, 64)]) {
        let (adapters, page_bytes) = (64, 2 << 20);
        let (a, b) = (values(rank * site.d_in), values(rank * hidden.max(q)));
        let part = |(&slice, &(_, d_out)): (&Slice, &(usize, usize))| LoraPart {
            layer: 0,
            slice,
            rank,
            a: &a,
            b: &b[..rank * d_out],
            d_in: site.d_in,
            d_out,
            scale: 0.1,
        };
        let parts: Vec<LoraPart> = site.slices.iter().zip(&site.cols).map(part).collect();
        let image = AdapterImage::pack(Dtype::Bf16, page_bytes, 1, &parts)?;
        let pages = image.pages_needed();
        let mut arena = Arena::new(page_bytes, adapters * pages)?;
        let mut table = AdapterTable::new(adapters);
        let mut slots = Vec::new();
        for slot in 0..adapters as u32 {
            let ids: Vec<u32> = (slot * pages as u32..).take(pages).collect();
            table.publish(&mut arena, slot, 1, &image, &ids)?;
            slots.push([SlotScale { slot, generation: 1, scale: 1.0 }]);
        }
        let width: usize = site.cols.iter().map(|(_, d_out)| d_out).sum();
        for (name, rows_each, used) in [("1 row", 1, 1), ("64 distinct", 1, 64), ("256 rows of one", 256, 1)] {
            let total = rows_each * used;
            let (x, mut y, mut v) = (rows(total, site.d_in), rows(total, width), LoraScratch::default());
            let mut work = WorkList::default();
            let segments = slots.iter().take(used).enumerate();
            let segments = segments.map(|(n, adapters)| Segment { rows: n * rows_each..(n + 1) * rows_each, adapters });
            work.build(&table, segments)?;
            let elements = rank * (site.d_in * site.slices.len() + width);
            let seconds = time(|_| {
                lora_shrink(&mut v, &x, &arena, &table, 0, site, &work)?;
                Ok(lora_expand(&mut y, &v, &arena, &table, 0, site, &work)?)
            })?;
            let op = format!("lora {:?} r{rank} {name}", site.slices[0]);
            report(&op, seconds, used * elements * 2, 2 * total * elements);
        }
    }
    Ok(())
}

fn bench_small(model: Model) -> Result<(), Failure> {
    let Model { hidden, intermediate, vocab, .. } = model;
    for m in [1, 256] {
        let (x, mut out, weight) = (rows(m, hidden), Rows::zeros(m, hidden), values(hidden));
        let seconds = time(|_| Ok(rms_norm(&mut out, &x, &weight, 1e-5)?))?;
        report(&format!("rms_norm M={m}"), seconds, 8 * m * hidden, 0);
        let (x, mut out) = (rows(m, 2 * intermediate), Rows::zeros(m, intermediate));
        let seconds = time(|_| Ok(silu_mul(&mut out, &x)?))?;
        report(&format!("silu_mul M={m}"), seconds, 12 * m * intermediate, 0);
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
        report(&format!("sample {name}"), seconds, 4 * vocab, 0);
    }
    let seconds = time(|_| {
        black_box(sampler::top_logprobs(&logits, 5));
        Ok(())
    })?;
    report("top_logprobs 5", seconds, 4 * vocab, 0);
    Ok(())
}

fn main() -> Result<(), Failure> {
    in_pool(|| {
        for model in MODELS {
            println!("{} on {}", model.name, isa_name());
            bench_linear(model)?;
            bench_attention(model)?;
            bench_lora(model)?;
            bench_small(model)?;
        }
        Ok(())
    })
}
