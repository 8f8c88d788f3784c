//! PEFT LoRA adapters from a local directory: read once, checked completely, then packed into pages.
//!
//! What a file asks for is either served exactly or refused by name; nothing is skipped. Adapter files come from
//! strangers: they are read into memory under a limit (never mapped), hashed and parsed from the same bytes.

mod config;
mod error;
mod fold;
mod json;
mod merge;
mod modules;
mod names;
mod pack;
mod read;
mod report;

pub use error::AdapterError;
pub use merge::{MergeError, MergeSpec, MergeStrategy, merge};
pub use report::{Refusal, Report, check};

use crate::files::{self, FileFault};
use crate::spec::DecoderSpec;
use crate::weights::safetensors::TensorData;
use config::LoraConfig;
use error::{CONFIG_FILE, WEIGHTS_FILE};
use loramux_kernels::Slice;
use modules::{ENDS, MODULES};
use sha2::{Digest, Sha256};
use std::path::Path;

/// Admission limits of one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterLimits {
    /// Largest rank of any module.
    pub rank_max: usize,
    /// Size of the weights file.
    pub bytes_max: u64,
    /// Tensors in the weights file.
    pub tensors_max: usize,
    /// Size of the weights file's header.
    pub header_bytes_max: u64,
    /// Size of the config file.
    pub config_bytes_max: u64,
}

impl Default for AdapterLimits {
    fn default() -> Self {
        Self {
            rank_max: 512,
            bytes_max: 2 << 30,
            tensors_max: 1 << 16,
            header_bytes_max: 16 << 20,
            config_bytes_max: 64 << 10,
        }
    }
}

/// LoRA of one module: `y += scale * (x A^T) B^T`. Of the embedding, x is the token as a unit vector.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraModule {
    /// Decoder layer; 0 for the embedding and the head.
    pub layer: usize,
    /// Which module.
    pub slice: Slice,
    /// Rows of A.
    pub rank: usize,
    /// `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA.
    pub scale: f32,
    /// `[rank, d_in]`.
    pub a: Vec<f32>,
    /// `[d_out, rank]`.
    pub b: Vec<f32>,
    /// Input width of the module.
    pub d_in: usize,
    /// Output width of the module.
    pub d_out: usize,
}

/// What an adapter says about the outputs of one module, beside its pair; each `[d_out]`, at least one is there.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputVectors {
    /// Decoder layer; 0 for the embedding and the head.
    pub layer: usize,
    /// Which module.
    pub slice: Slice,
    /// DoRA's magnitude.
    pub magnitude: Option<Vec<f32>>,
    /// The bias of B.
    pub lora_bias: Option<Vec<f32>>,
    /// The trained bias, in place of the base's.
    pub bias: Option<Vec<f32>>,
    base_has_bias: bool,
}

/// An embedding or head of an adapter's file, `[vocabulary, hidden]` as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct WholeMatrix {
    pub(crate) slice: Slice,
    pub(crate) name: String,
    pub(crate) data: TensorData,
}

/// A validated adapter in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftAdapter {
    /// SHA-256 over the canonical config and the weights file: equal content, equal id, wherever it came from.
    pub content_id: [u8; 32],
    /// One entry per adapted module, by layer and slice, then the embedding and the head.
    pub modules: Vec<LoraModule>,
    /// In the same order, of those modules that have any.
    pub outputs: Vec<OutputVectors>,
    /// What it uses beyond plain LoRA: `rslora`, `dora`, `lora_bias`, `bias`, `embed_tokens`, `lm_head`, `modules_to_save`.
    pub features: Vec<&'static str>,
    /// `base_model_name_or_path`, empty if the config has none. Informative: shapes decide.
    pub base_model: String,
    /// Smallest rank of a module.
    pub rank_min: usize,
    /// Largest rank of a module.
    pub rank_max: usize,
    /// Names of the adapted linear modules, each once, such as `q_proj`.
    pub module_names: Vec<String>,
    whole: Vec<WholeMatrix>,
    base_copies: Vec<WholeMatrix>,
    layers: usize,
    vocab: usize,
    hidden: usize,
}

/// Reads and checks the adapter in `dir` for the model `spec`.
///
/// # Errors
/// [`AdapterError`]; its `code` is the wire code.
pub fn read(dir: &Path, spec: &DecoderSpec, limits: &AdapterLimits) -> Result<PeftAdapter, AdapterError> {
    if !dir.is_dir() {
        return Err(AdapterError::NotFound { path: dir.to_owned() });
    }
    let config_bytes = read_file(dir, CONFIG_FILE, limits.config_bytes_max)?;
    let (config, root) = LoraConfig::parse(&config_bytes, limits.rank_max)?;
    let weights = read_file(dir, WEIGHTS_FILE, limits.bytes_max)?;
    let contents = read::contents(&weights, &config, spec, limits)?;
    let features = features(&config, &contents);
    let read::Contents { modules, outputs, whole, base_copies } = contents;
    let ranks = || modules.iter().map(|module| module.rank);
    let (rank_min, rank_max) = (ranks().min().unwrap_or(0), ranks().max().unwrap_or(0));
    let adapted = |slice: Slice| modules.iter().any(|module| module.slice == slice);
    let names = MODULES.iter().chain(&ENDS).filter(|(slice, _)| adapted(*slice));
    let module_names = names.map(|(_, name)| name.rsplit('.').next().unwrap_or(name).to_owned()).collect();
    Ok(PeftAdapter {
        content_id: content_id(&root, &weights),
        base_model: config.base_model,
        rank_min,
        rank_max,
        module_names,
        features,
        layers: spec.layers,
        vocab: spec.vocab,
        hidden: spec.hidden,
        modules,
        outputs,
        whole,
        base_copies,
    })
}

/// What the file really has, not what its config could have had.
fn features(config: &LoraConfig, contents: &read::Contents) -> Vec<&'static str> {
    let outputs = |is: fn(&OutputVectors) -> bool| contents.outputs.iter().any(is);
    let pair = |slice: Slice| contents.modules.iter().any(|module| module.slice == slice);
    let all = [
        ("rslora", config.use_rslora),
        ("dora", outputs(|own| own.magnitude.is_some())),
        ("lora_bias", outputs(|own| own.lora_bias.is_some())),
        ("bias", outputs(|own| own.bias.is_some())),
        ("embed_tokens", pair(Slice::Embed)),
        ("lm_head", pair(Slice::Head)),
        ("modules_to_save", !contents.whole.is_empty()),
    ];
    all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

fn read_file(dir: &Path, file: &'static str, bytes_max: u64) -> Result<Vec<u8>, AdapterError> {
    files::read_bounded(&dir.join(file), bytes_max).map_err(|fault| match fault {
        FileFault::Absent if file == WEIGHTS_FILE && dir.join("adapter_model.bin").exists() => {
            let reason = "pickle files can run code; save the adapter as adapter_model.safetensors";
            AdapterError::unsupported("adapter_model.bin", "a pickle file", reason)
        }
        FileFault::Absent => AdapterError::Invalid { file, reason: "the file is missing".to_owned() },
        FileFault::NotRegular => AdapterError::Invalid { file, reason: "not a regular file".to_owned() },
        FileFault::TooLarge { bytes } => {
            AdapterError::TooLarge { file, what: "the file's size in bytes", found: bytes, limit: bytes_max }
        }
        FileFault::Io(source) => AdapterError::Io { file, source },
    })
}

/// Bump the number when the same files are read into other weights.
fn content_id(config: &serde_json::Value, weights: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"loramux adapter 1\0");
    let config = json::canonical(config);
    for (name, bytes) in [(CONFIG_FILE, config.as_bytes()), (WEIGHTS_FILE, weights)] {
        hash.update(name);
        hash.update([0]);
        hash.update(Sha256::digest(bytes));
    }
    hash.finalize().into()
}
