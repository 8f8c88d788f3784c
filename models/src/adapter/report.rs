//! A dry run: everything that can be said about an adapter's files, not only the first thing that is wrong.

use super::error::{AdapterError, CONFIG_FILE, WEIGHTS_FILE};
use super::modules::{MODULES, path};
use super::{AdapterLimits, LoraConfig, PeftAdapter, content_id, json, read, read_file};
use crate::spec::DecoderSpec;
use crate::weights::safetensors::{self, Element, HeaderFault, HeaderLimits, TensorInfo};
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// Names of unmatched tensors in a report.
const UNMATCHED_MAX: usize = 64;
/// Features of one config that are refused one after another.
const REFUSALS_MAX: usize = 32;

/// One reason why an adapter cannot be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// As [`AdapterError::code`].
    pub code: &'static str,
    /// As [`AdapterError`] prints.
    pub message: String,
}

impl From<&AdapterError> for Refusal {
    fn from(error: &AdapterError) -> Self {
        Self { code: error.code(), message: error.to_string() }
    }
}

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// The adapter, if it can be served as far as its files say.
    pub adapter: Option<PeftAdapter>,
    /// Its id, if both files could be read.
    pub content_id: Option<[u8; 32]>,
    /// `base_model_name_or_path`, empty if there is none.
    pub base_model: String,
    /// What its config asks for beyond plain LoRA: `rslora`, `dora`, `lora_bias`, `bias`, `embed_tokens`, `lm_head`,
    /// `modules_to_save`.
    pub features: Vec<&'static str>,
    /// Size of the weights file.
    pub weight_bytes: u64,
    /// Tensors that belong to a module of this base.
    pub tensors_matched: usize,
    /// The first names of others, sorted.
    pub tensors_unmatched: Vec<String>,
    /// Every tensor names a module of this base, and no shape is another base's.
    pub base_matches: bool,
    /// Why it cannot be served.
    pub refusals: Vec<Refusal>,
    /// What a person should know though it can.
    pub warnings: Vec<String>,
}

/// Looks at the adapter in `dir` as [`read()`](super::read()) does, and goes on after a fault where that makes sense.
pub fn check(dir: &Path, spec: &DecoderSpec, limits: &AdapterLimits) -> Report {
    let mut report = Report::default();
    if !dir.is_dir() {
        report.refuse(&AdapterError::NotFound { path: dir.to_owned() });
        return report;
    }
    let root = report.config(dir, limits);
    let has_weights = report.weights(dir, spec, limits, root.as_ref());
    match read(dir, spec, limits) {
        Ok(adapter) => {
            report.base_matches = true;
            report.base_model.clone_from(&adapter.base_model);
            report.features.clone_from(&adapter.features);
            report.adapter = Some(adapter);
        }
        Err(error) => {
            let other_base = matches!(error, AdapterError::UnmatchedTensors { .. } | AdapterError::BaseShape { .. });
            report.base_matches = has_weights && report.tensors_unmatched.is_empty() && !other_base;
            report.refuse(&error);
        }
    }
    report
}

impl Report {
    /// Each reason once.
    fn refuse(&mut self, error: &AdapterError) {
        let refusal = Refusal::from(error);
        if !self.refusals.contains(&refusal) {
            self.refusals.push(refusal);
        }
    }

    /// Every feature of the config that is refused, not only the first: each is looked for with the others unset.
    fn config(&mut self, dir: &Path, limits: &AdapterLimits) -> Option<Value> {
        let bytes = match read_file(dir, CONFIG_FILE, limits.config_bytes_max) {
            Ok(bytes) => bytes,
            Err(error) => {
                self.refuse(&error);
                return None;
            }
        };
        let root = match json::parse_strict(&bytes) {
            Ok(root) => root,
            Err(reason) => {
                self.refuse(&AdapterError::config(reason));
                return None;
            }
        };
        self.base_model = root.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or_default().to_owned();
        self.features = features(&root);
        let mut rest = root.clone();
        for _ in 0..REFUSALS_MAX {
            let Err(error) = LoraConfig::parse(rest.to_string().as_bytes(), limits.rank_max) else { break };
            self.refuse(&error);
            let AdapterError::Unsupported { feature, .. } = &error else { break };
            let name = feature.split_whitespace().next().unwrap_or_default();
            if rest.as_object_mut().is_none_or(|fields| fields.remove(name).is_none()) {
                break;
            }
        }
        Some(root)
    }

    /// What the weights' header says, whatever the config is. False if there is none.
    fn weights(&mut self, dir: &Path, spec: &DecoderSpec, limits: &AdapterLimits, root: Option<&Value>) -> bool {
        let file = match read_file(dir, WEIGHTS_FILE, limits.bytes_max) {
            Ok(file) => file,
            Err(error) => {
                self.refuse(&error);
                return false;
            }
        };
        self.weight_bytes = file.len() as u64;
        self.content_id = root.map(|root| content_id(root, &file));
        let tensors = match header(&file, limits) {
            Ok(tensors) => tensors,
            Err(error) => {
                self.refuse(&error);
                return false;
            }
        };
        let known = module_paths(spec);
        let (matched, unmatched): (Vec<&String>, Vec<&String>) =
            tensors.keys().partition(|name| module_of(name).is_some_and(|module| known.contains(module)));
        self.tensors_matched = matched.len();
        self.tensors_unmatched = unmatched.iter().take(UNMATCHED_MAX).map(|name| (*name).clone()).collect();
        if !unmatched.is_empty() {
            let names = unmatched.into_iter().cloned().collect();
            self.refuse(&AdapterError::UnmatchedTensors { names });
        }
        for (name, info) in &tensors {
            if let Element::Other(dtype) = &info.element {
                let feature = format!("dtype {dtype} of tensor `{name}`");
                self.refuse(&AdapterError::unsupported(WEIGHTS_FILE, feature, "accepted are F32, F16 and BF16"));
                break;
            }
        }
        if tensors.values().any(|info| info.element == Element::F32) {
            self.warnings.push("tensors are stored as F32; they are rounded to the server's 16-bit type".to_owned());
        }
        true
    }
}

fn header(file: &[u8], limits: &AdapterLimits) -> Result<BTreeMap<String, TensorInfo>, AdapterError> {
    let short = || AdapterError::weights(format!("{} bytes: too short for a safetensors header", file.len()));
    let (prefix, rest) = file.split_first_chunk::<8>().ok_or_else(short)?;
    let limits =
        HeaderLimits { header_bytes_max: limits.header_bytes_max, tensors_max: limits.tensors_max, dims_max: 2 };
    let parse = || {
        let bytes = safetensors::header_bytes(*prefix, file.len() as u64, &limits)? as usize;
        let header = rest.get(..bytes).ok_or_else(|| HeaderFault::Invalid("the header passes the end".to_owned()))?;
        safetensors::parse_header(header, file.len() as u64, &limits)
    };
    parse().map_err(|fault| match fault {
        HeaderFault::Invalid(reason) => AdapterError::weights(reason),
        HeaderFault::TooLarge { what, found, limit } => {
            AdapterError::TooLarge { file: WEIGHTS_FILE, what, found, limit }
        }
    })
}

fn module_paths(spec: &DecoderSpec) -> HashSet<String> {
    let layers = (0..spec.layers).flat_map(|layer| MODULES.iter().map(move |(_, name)| path(layer, name)));
    layers.chain(["lm_head".to_owned(), "model.embed_tokens".to_owned()]).collect()
}

/// The module that a tensor's name means: without PEFT's prefix, and without what it says of the module.
fn module_of(name: &str) -> Option<&str> {
    let rest = name.strip_prefix("base_model.model.")?;
    let marks = [".lora_", ".modules_to_save", ".base_layer", ".original_module"];
    let marked = marks.iter().filter_map(|mark| rest.find(mark)).min();
    let end = marked.or_else(|| rest.rfind(".weight")).or_else(|| rest.rfind(".bias"))?;
    rest.get(..end)
}

/// What a config asks for, served or not.
fn features(root: &Value) -> Vec<&'static str> {
    let flag = |name: &str| root.get(name).and_then(Value::as_bool).unwrap_or(false);
    let names = |field: &str| root.get(field).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let targets = |module: &str| {
        let last = |name: &Value| name.as_str().is_some_and(|name| name.rsplit('.').next() == Some(module));
        names("target_modules").iter().any(last)
    };
    let bias = root.get("bias").and_then(Value::as_str).is_some_and(|bias| !bias.is_empty() && bias != "none");
    let all = [
        ("rslora", flag("use_rslora")),
        ("dora", flag("use_dora")),
        ("lora_bias", flag("lora_bias")),
        ("bias", bias),
        ("embed_tokens", targets("embed_tokens")),
        ("lm_head", targets("lm_head")),
        ("modules_to_save", !names("modules_to_save").is_empty()),
    ];
    all.into_iter().filter(|(_, is_asked)| *is_asked).map(|(name, _)| name).collect()
}
