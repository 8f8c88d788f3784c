//! PEFT LoRA adapters from a local directory: read once, checked completely, then packed into pages.
//!
//! What a file asks for is either served exactly or refused by name; nothing is skipped. Adapter files come from
//! strangers: they are read into memory under a limit (never mapped), hashed and parsed from the same bytes.

mod config;
mod error;
mod json;
mod merge;
mod modules;
mod read;
mod report;

pub use error::AdapterError;
pub use merge::{MergeError, MergeSpec, MergeStrategy, merge};
pub use report::{Refusal, Report, check};

use crate::files::{self, FileFault};
use crate::spec::DecoderSpec;
use config::LoraConfig;
use error::{CONFIG_FILE, WEIGHTS_FILE};
use half::f16;
use loramux_kernels::{AdapterImage, ImageLayout, LoraPart, Slice};
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

/// LoRA of one linear module: `y += scale * (x A^T) B^T`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraModule {
    /// Decoder layer.
    pub layer: usize,
    /// Which linear module of the layer.
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

/// A validated adapter in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftAdapter {
    /// SHA-256 over the canonical config and the weights file: equal content, equal id, wherever it came from.
    pub content_id: [u8; 32],
    /// One entry per adapted module, by layer and slice.
    pub modules: Vec<LoraModule>,
    /// `base_model_name_or_path`, empty if the config has none. Informative: shapes decide.
    pub base_model: String,
    /// Smallest rank of a module.
    pub rank_min: usize,
    /// Largest rank of a module.
    pub rank_max: usize,
    /// Names of the adapted linear modules, each once, such as `q_proj`.
    pub module_names: Vec<String>,
    layers: usize,
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
    let modules = read::modules(&weights, &config, spec, limits)?;
    let ranks = || modules.iter().map(|module| module.rank);
    let (rank_min, rank_max) = (ranks().min().unwrap_or(0), ranks().max().unwrap_or(0));
    let adapted = |slice: Slice| modules.iter().any(|module| module.slice == slice);
    let names = modules::MODULES.iter().filter(|(slice, _)| adapted(*slice));
    let module_names = names.map(|(_, name)| name.rsplit('.').next().unwrap_or(name).to_owned()).collect();
    Ok(PeftAdapter {
        content_id: content_id(&root, &weights),
        base_model: config.base_model,
        rank_min,
        rank_max,
        module_names,
        layers: spec.layers,
        modules,
    })
}

impl PeftAdapter {
    /// Lays the weights out in pages of `page_bytes`, rounded to the layout's type.
    ///
    /// # Errors
    /// `adapter_invalid` if a value has no finite form in it; `adapter_too_large` if a rank block does not fit a page.
    pub fn pack(&self, layout: impl Into<ImageLayout>, page_bytes: usize) -> Result<AdapterImage, AdapterError> {
        let layout = layout.into();
        if layout.is_half() {
            self.check_fits_f16()?;
        }
        let parts: Vec<LoraPart> = self
            .modules
            .iter()
            .map(|LoraModule { layer, slice, rank, scale, a, b, d_in, d_out }| LoraPart {
                layer: *layer,
                slice: *slice,
                rank: *rank,
                a,
                b,
                d_in: *d_in,
                d_out: *d_out,
                scale: *scale,
            })
            .collect();
        AdapterImage::pack(layout, page_bytes, self.layers, &parts).map_err(AdapterError::Pack)
    }

    /// What lies beyond 65504 would be stored as something else.
    fn check_fits_f16(&self) -> Result<(), AdapterError> {
        for module in &self.modules {
            let mut values = module.a.iter().chain(&module.b);
            if let Some(value) = values.find(|&&value| !f16::from_f32(value).is_finite()) {
                let at = format!("layer {} {:?}", module.layer, module.slice);
                return Err(AdapterError::weights(format!(
                    "{at} has the value {value}, which half precision cannot hold; use --dtype float32"
                )));
            }
        }
        Ok(())
    }
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
