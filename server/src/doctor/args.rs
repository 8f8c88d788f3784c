//! What can be typed behind `loramux doctor` and `loramux warm-kernels`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::shard::{DeviceChoice, DtypeChoice};

/// Where CUDA's libraries and the compiled kernels are; the same flags as those of `serve`.
#[derive(Args, Debug)]
pub(crate) struct CudaArgs {
    /// Where compiled CUDA kernels are kept. Default: ~/.cache/loramux/kernels
    #[arg(long = "kernel-cache", alias = "kernel-cache-dir", env = "LORAMUX_KERNEL_CACHE", value_name = "DIR")]
    pub(crate) kernel_cache: Option<PathBuf>,
    /// A folder with CUDA's libraries (NVRTC, cuBLASLt), looked at before the usual ones; repeat for more
    #[arg(long, env = "LORAMUX_CUDA_LIBRARIES", value_name = "DIR", value_delimiter = ',')]
    pub(crate) cuda_libraries: Vec<PathBuf>,
}

/// A set of measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// Products and LoRA kernels of each site, one by one
    #[value(name = "A", alias = "a")]
    A,
    /// Steps of the whole model
    #[value(name = "B", alias = "b")]
    B,
}

/// Widths of a model whose weights are made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShapeChoice {
    /// Llama-3.1-8B
    #[value(name = "llama-3.1-8b")]
    Llama8b,
    /// Qwen2.5-0.5B
    #[value(name = "qwen2.5-0.5b")]
    Qwen05b,
    /// SmolLM2-135M
    #[value(name = "smollm2-135m")]
    Smol135m,
    /// Two narrow layers, for trying the code path without a GPU
    #[value(name = "tiny")]
    Tiny,
}

#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    /// What to look at: auto (the first GPU, or the CPU where there is none), cpu, cuda, cuda:N, or emulated
    #[arg(long, env = "LORAMUX_DEVICE", default_value = "auto", value_name = "DEVICE")]
    pub(crate) device: DeviceChoice,
    #[command(flatten)]
    pub(crate) cuda: CudaArgs,
    /// The model's 16-bit type: bfloat16 or float16
    #[arg(long, env = "LORAMUX_DTYPE", value_enum, default_value = "auto")]
    pub(crate) dtype: DtypeChoice,
    /// Print JSON instead of a page
    #[arg(long)]
    pub(crate) json: bool,
    /// Every check of every op, then a small model end to end against the CPU, with adapters changing places
    #[arg(long, conflicts_with = "bench")]
    pub(crate) full: bool,
    /// With --full: how often an adapter takes a slot from another. Default: 100000 on a GPU, 60 on the emulator
    #[arg(long, value_name = "COUNT", requires = "full")]
    pub(crate) switches: Option<u64>,
    /// With --full: parts to run, comma-separated (ops, model, churn). Default: all
    #[arg(long, value_delimiter = ',', value_name = "PART", requires = "full")]
    pub(crate) only: Vec<Part>,
    /// Leave the copy and the large product out; a sanitizer would take minutes for them
    #[arg(long)]
    pub(crate) skip_speed: bool,
    /// Measure instead of checking: A (kernels) or B (steps)
    #[arg(long, value_enum, value_name = "TIER")]
    pub(crate) bench: Option<Tier>,
    /// With --bench: widths of the model. Default: llama-3.1-8b, on the emulator tiny
    #[arg(long, value_enum, value_name = "NAME", requires = "bench")]
    pub(crate) model_shape: Option<ShapeChoice>,
    /// With --bench: stop beginning new rows after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 480, requires = "bench")]
    pub(crate) time_limit: u64,
    /// With --bench: the source revision, for the report
    #[arg(long, value_name = "REVISION")]
    pub(crate) commit: Option<String>,
    /// Seed of made-up weights, adapters and prompts
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Write the report as JSON to this file too
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
}

/// A part of `doctor --full`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Each op against its definition
    Ops,
    /// A small model against the CPU
    Model,
    /// Adapters changing places
    Churn,
}

#[derive(Args, Debug)]
pub(crate) struct WarmArgs {
    /// Model to compile for: a Hugging Face directory (config.json is enough) or a .gguf file
    #[arg(long, alias = "model", value_name = "PATH", conflicts_with = "shape")]
    pub(crate) model_id: Option<PathBuf>,
    /// Well-known models by name, comma-separated: llama-3.1-8b, qwen2.5-0.5b, smollm2-135m, demo, or all
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub(crate) shape: Vec<String>,
    /// Architectures, comma-separated, such as sm_80,sm_90a
    #[arg(long, value_delimiter = ',', required = true, value_name = "ARCH")]
    pub(crate) arch: Vec<String>,
    /// The model's 16-bit type, as it will be given to `serve`: bfloat16 (auto) or float16
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) dtype: DtypeChoice,
    #[command(flatten)]
    pub(crate) cuda: CudaArgs,
    /// Compile on this many threads. Default: one per core
    #[arg(long)]
    pub(crate) threads: Option<usize>,
}
