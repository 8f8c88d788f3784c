//! What the router tells a shard at its start. Goes to the child process as one JSON argument.

use std::path::PathBuf;

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
    pub(crate) step_tokens_max: u32,
    pub(crate) seqs_max: u32,
    /// Adapters on the device at once; `None` = as many as pages.
    pub(crate) slots_max: Option<u32>,
    /// Threads of the kernels; `None` = one per core.
    pub(crate) threads: Option<usize>,
}

/// Storage type of weights, KV and adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub(crate) enum DtypeChoice {
    /// f32 for an f32 checkpoint, else bf16
    Auto,
    /// 2 bytes a value: weights in bf16, KV cache and adapters in f16; sums in f32
    #[value(name = "bfloat16", alias = "bf16")]
    Bf16,
    /// 4 bytes a value
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
