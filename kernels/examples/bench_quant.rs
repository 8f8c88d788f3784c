//! Quantised weights beside bf16: GB/s of one row, where memory is the bound, and GFLOP/s of many, where arithmetic is.
//! `cargo run --release -p loramux-kernels --example bench_quant -- [--shapes 4096x4096,..] [--m 1,16,..] [--isa avx2]
//! [--threads 1]`; some seconds. The forms take turns, so that a busy machine slows all of them.

use loramux_kernels::{
    Dtype, HostData, OpError, PackedWeight, QuantFormat, QuantPart, QuantWeight, Rows, WeightPart, in_pool, linear,
    quant_linear, set_isa, set_threads,
};
use std::time::Instant;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Calls of each form at each shape.
const ROUNDS: usize = 15;
/// Weights are used in turn from this many bytes, so that the caches are cold as in a real step.
const COLD_BYTES: usize = 96 << 20;
const FORMATS: [QuantFormat; 5] =
    [QuantFormat::Q8_0, QuantFormat::Q4_0, QuantFormat::Q4_1, QuantFormat::Q4_K, QuantFormat::Q6_K];

struct Options {
    /// `(d_out, d_in)`
    shapes: Vec<(usize, usize)>,
    rows: Vec<usize>,
}

fn options() -> Result<Options, Failure> {
    let mut options = Options { shapes: vec![(1536, 768), (4096, 4096)], rows: vec![1, 4, 16, 64, 256] };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} takes a value"))?;
        match name.as_str() {
            "--shapes" => {
                let pair = |text: &str| -> Result<(usize, usize), Failure> {
                    let (d_out, d_in) = text.split_once('x').ok_or("a shape is OUTPUTSxINPUTS")?;
                    Ok((d_out.parse()?, d_in.parse()?))
                };
                options.shapes = value.split(',').map(pair).collect::<Result<_, _>>()?;
            }
            "--m" => options.rows = value.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--isa" => set_isa(&value)?,
            "--threads" => set_threads(value.parse()?).map_err(|threads| format!("there are {threads} threads"))?,
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    Ok(options)
}

/// Pseudo-random bits.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

fn values(n: usize) -> Vec<f32> {
    let mut state = 1;
    (0..n).map(|_| random(&mut state) as f32 / (1u64 << 30) as f32 - 1.0).collect()
}

/// Takes the number of a call, y and x.
type Call = Box<dyn FnMut(usize, &mut Rows, &Rows) -> Result<(), Failure>>;

/// A product to time: some copies of a weight, and what takes the number of a call.
struct Form {
    name: String,
    bytes: usize,
    best_s: f64,
    call: Call,
}

fn copies<W>(bytes: usize, pack: impl Fn() -> Result<W, OpError>) -> Result<Vec<W>, OpError> {
    (0..COLD_BYTES.div_ceil(bytes)).map(|_| pack()).collect()
}

fn dense(d_out: usize, d_in: usize) -> Result<Form, Failure> {
    let data = values(d_out * d_in);
    let part = WeightPart { data: HostData::F32(&data), d_out, d_in };
    let bytes = 2 * d_out * d_in;
    let weights = copies(bytes, || PackedWeight::pack(Dtype::Bf16, &[part]))?;
    let call = move |n: usize, y: &mut Rows, x: &Rows| Ok(linear(y, x, &weights[n % weights.len()], None)?);
    Ok(Form { name: "bf16".to_owned(), bytes, best_s: f64::INFINITY, call: Box::new(call) })
}

fn quantised(format: QuantFormat, d_out: usize, d_in: usize) -> Result<Form, Failure> {
    let mut state = 2;
    let blocks = d_out * d_in / format.block_len();
    let data: Vec<u8> = (0..blocks * format.block_bytes()).map(|_| random(&mut state) as u8 & 0x3f).collect();
    let weights = copies(data.len(), || QuantWeight::pack(&[QuantPart { data: &data, format, d_out, d_in }]))?;
    let bytes = weights[0].bytes();
    let call = move |n: usize, y: &mut Rows, x: &Rows| Ok(quant_linear(y, x, &weights[n % weights.len()], None)?);
    Ok(Form { name: format!("{format:?}"), bytes, best_s: f64::INFINITY, call: Box::new(call) })
}

fn bench(rows: &[usize], d_out: usize, d_in: usize) -> Result<(), Failure> {
    let mut forms = vec![dense(d_out, d_in)?];
    for format in FORMATS {
        forms.push(quantised(format, d_out, d_in)?);
    }
    println!("{d_out} x {d_in}");
    for &m in rows {
        let (mut x, mut y) = (Rows::zeros(m, d_in), Rows::zeros(m, d_out));
        x.as_f32_mut().copy_from_slice(&values(m * d_in));
        for form in &mut forms {
            form.best_s = f64::INFINITY;
        }
        for n in 0..ROUNDS {
            for form in &mut forms {
                let started = Instant::now();
                (form.call)(n, &mut y, &x)?;
                form.best_s = form.best_s.min(started.elapsed().as_secs_f64());
            }
        }
        let dense_s = forms[0].best_s;
        for Form { name, bytes, best_s, .. } in &forms {
            let (us, gb, gflop) =
                (best_s * 1e6, *bytes as f64 / best_s / 1e9, 2.0 * (m * d_out * d_in) as f64 / best_s / 1e9);
            let ratio = dense_s / best_s;
            println!("  m={m:<4} {name:<5} {us:>9.1} us {gb:>7.1} GB/s {gflop:>8.1} GFLOP/s {ratio:>6.2}x");
        }
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    let Options { shapes, rows } = options()?;
    in_pool(|| shapes.into_iter().try_for_each(|(d_out, d_in)| bench(&rows, d_out, d_in)))
}
