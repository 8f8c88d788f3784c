//! What the router tells a shard at its start. Goes to the child process as one JSON argument.

use std::path::PathBuf;

use loramux_kernels::device::LibraryPaths;
use serde::{Deserialize, Serialize};

/// Settings of one shard.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ShardOptions {
    /// A Hugging Face directory or a GGUF file.
    pub(crate) model: PathBuf,
    /// What clients call it; for reports only.
    pub(crate) model_id: String,
    pub(crate) dtype: DtypeChoice,
    pub(crate) load_format: LoadFormatChoice,
    /// Seed of `--load-format dummy`.
    pub(crate) seed: u64,
    /// Context tokens at most; `None` = the model's own.
    pub(crate) context_tokens_max: Option<u32>,
    /// Bytes for KV and adapters; `None` = from the memory that is free.
    pub(crate) arena_bytes: Option<u64>,
    /// Positions of a step at most; `None` = what suits the device.
    pub(crate) step_tokens_max: Option<u32>,
    pub(crate) seqs_max: u32,
    /// Adapters on the device at once; `None` = as many as pages.
    pub(crate) slots_max: Option<u32>,
    /// Threads of the kernels; `None` = one per core.
    pub(crate) threads: Option<usize>,
    /// Instructions of the kernels on the CPU; `None` = the fastest there are.
    pub(crate) cpu_isa: Option<String>,
    /// Where steps are computed.
    pub(crate) device: DeviceChoice,
    /// Page-locked memory for adapters that are not on the device, bytes.
    pub(crate) host_adapter_bytes: u64,
    /// Where compiled kernels are kept.
    pub(crate) kernel_cache_dir: PathBuf,
    /// Where CUDA's libraries may be.
    pub(crate) cuda_paths: CudaPaths,
    /// Expand the deltas of q, k and v in the op that rotates and caches them.
    pub(crate) fuse_rope: bool,
    /// Expand the MLP's deltas in the activation.
    pub(crate) fuse_activation: bool,
    /// Expand the deltas of o and down in the norm behind them.
    pub(crate) fuse_norm: bool,
}

impl ShardOptions {
    /// Positions of a step at most, where nothing was asked for as many as suit the device.
    pub(crate) fn step_tokens_or(&self, suitable: u32) -> u32 {
        self.step_tokens_max.unwrap_or(suitable.max(self.seqs_max))
    }
}

/// What command line and environment say about CUDA's libraries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CudaPaths {
    /// Folders that were typed; looked at first.
    pub(crate) dirs: Vec<PathBuf>,
    /// `CUDA_HOME` or `CUDA_PATH`.
    pub(crate) cuda_home: Option<PathBuf>,
    /// `VIRTUAL_ENV`.
    pub(crate) virtual_env: Option<PathBuf>,
}

impl CudaPaths {
    /// For the kernels' look-up.
    pub(crate) fn libraries(&self) -> LibraryPaths {
        let Self { dirs, cuda_home, virtual_env } = self.clone();
        LibraryPaths { dirs, cuda_home, virtual_env, ask_python: true }
    }
}

/// Where steps are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DeviceChoice {
    /// The first GPU, or the CPU where there is none.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU.
    Cuda(u32),
    /// The host emulator of the CUDA kernels: slow, for tests.
    Emulated,
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "emulated" => Ok(Self::Emulated),
            _ => {
                let index = text.strip_prefix("cuda:").and_then(|index| index.parse().ok());
                index.map(Self::Cuda).ok_or_else(|| "accepted are auto, cpu, cuda and cuda:N".to_owned())
            }
        }
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Emulated => f.write_str("emulated"),
        }
    }
}

/// Storage type of weights, KV and adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub(crate) enum DtypeChoice {
    /// f32 for an f32 checkpoint on the CPU, else bf16
    Auto,
    /// 2 bytes a value: weights, KV cache and adapters in bf16; sums in f32
    #[value(name = "bfloat16", alias = "bf16")]
    Bf16,
    /// 2 bytes a value, on a GPU only: everything stored in f16
    #[value(name = "float16", alias = "f16", alias = "half")]
    F16,
    /// 4 bytes a value, on the CPU only
    #[value(name = "float32", alias = "f32")]
    F32,
}

/// What the weights are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub(crate) enum LoadFormatChoice {
    /// By what lies at --model-id
    Auto,
    /// *.safetensors
    Safetensors,
    /// *.gguf
    Gguf,
    /// Seeded random weights of the shapes in config.json (benchmarks)
    Dummy,
}
