//! The dense product alone: GFLOP/s and GB/s as JSON lines, with one weight (its caches warm) and with weights in turn
//! (cold, as in a step). `cargo run --release -p loramux-kernels --example bench_gemm -- --m 1,16 --shapes 1536x576 --isa avx2`

use loramux_kernels::{Dtype, HostData, PackedWeight, Rows, WeightPart, in_pool, isa_name, linear, set_isa, threads};
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Weights in turn are so many bytes together.
const COLD_BYTES: usize = 160 << 20;

struct Options {
    shapes: Vec<(usize, usize)>,
    rows: Vec<usize>,
    seconds: f64,
}

fn options() -> Result<Options, Failure> {
    let mut options =
        Options { shapes: vec![(1536, 576), (576, 1536), (4096, 4096)], rows: vec![1, 4, 16, 64, 256], seconds: 0.3 };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} takes a value"))?;
        match name.as_str() {
            "--shapes" => {
                let pair = |text: &str| -> Result<(usize, usize), Failure> {
                    let (n, k) = text.split_once('x').ok_or("a shape is NxK")?;
                    Ok((n.parse()?, k.parse()?))
                };
                options.shapes = value.split(',').map(pair).collect::<Result<_, _>>()?;
            }
            "--m" => options.rows = value.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--seconds" => options.seconds = value.parse()?,
            "--isa" => set_isa(&value)?,
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    Ok(options)
}

/// Numbers of no particular order, in -1..1.
fn numbers(count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn measure(n: usize, k: usize, m: usize, cold: bool, seconds: f64) -> Result<(), Failure> {
    let data = numbers(n * k);
    let part = WeightPart { data: HostData::F32(&data), d_out: n, d_in: k };
    let copies = if cold { (COLD_BYTES / (2 * n * k)).max(2) } else { 1 };
    let weights: Vec<_> = (0..copies).map(|_| PackedWeight::pack(Dtype::Bf16, &[part])).collect::<Result<_, _>>()?;
    let bytes = weights[0].bytes();
    let (mut x, mut y) = (Rows::zeros(m, k), Rows::zeros(m, n));
    x.as_f32_mut().copy_from_slice(&numbers(m * k));
    let mut times = Vec::new();
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let mut turn = 0;
    while times.len() < 8 || Instant::now() < end {
        let before = Instant::now();
        linear(&mut y, &x, &weights[turn % copies], None)?;
        times.push(before.elapsed().as_secs_f64());
        turn += 1;
    }
    times.drain(..times.len() / 4);
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!(
        "{{\"program\":\"loramux {}\",\"threads\":{},\"n\":{n},\"k\":{k},\"m\":{m},\"out\":\"f32\",\"weights\":\"{}\",\"us\":{:.2},\"us_min\":{:.2},\"gflops\":{:.1},\"gbs\":{:.1}}}",
        isa_name(),
        threads(),
        if cold { "cold" } else { "warm" },
        median * 1e6,
        times[0] * 1e6,
        2.0 * (n * k * m) as f64 / median / 1e9,
        bytes as f64 / median / 1e9,
    );
    Ok(())
}

fn main() -> Result<(), Failure> {
    let Options { shapes, rows, seconds } = options()?;
    for (n, k) in shapes {
        for &m in &rows {
            for cold in [false, true] {
                in_pool(|| measure(n, k, m, cold, seconds))?;
            }
        }
    }
    Ok(())
}
