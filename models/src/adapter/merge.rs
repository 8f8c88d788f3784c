//! Several adapters become one, which is stored and served like any other.
//!
//! The factors are merged, not the deltas: A of the result is a merge of the parts' A, B one of their B. A part with
//! weight w whose own scale (alpha / r) is s enters A with `sign(w s) sqrt(|w s|)` and B with `sqrt(|w s|)`, as in PEFT's
//! `add_weighted_adapter`, so one part alone gives w times its delta, and the result has `lora_alpha = r`. (LoRAX enters w
//! into both factors and takes the first part's scale.) Since `(A1 + A2)(B1 + B2)` has cross terms, the sum of deltas is
//! what `compose` gives, not this.
//!
//! Unequal ranks: each pair is filled up with zeros to the largest rank of all, so the first components of the parts meet
//! each other, and the components that a smaller part lacks are the larger ones' own.

mod combine;

use super::error::{AdapterError, CONFIG_FILE, WEIGHTS_FILE};
use super::modules::{MODULES, path};
use super::{AdapterLimits, LoraModule, PeftAdapter, json, read};
use crate::files;
use crate::spec::DecoderSpec;
use crate::weights::safetensors::{self, Element, HeaderLimits};
use combine::{Part, Recipe};
use half::{bf16, f16};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Adapters in one merge.
const PARTS_MAX: usize = 8;
/// Their weights files together, bytes: all are in memory at once, as f32.
const PARTS_BYTES_MAX: u64 = 4 << 30;

/// How adapters are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeStrategy {
    /// The weighted sum.
    Linear,
    /// The largest values stay, a sign is elected for each place, and what agrees with it is averaged.
    Ties,
    /// Values are dropped at random and the others scaled up, then the weighted sum.
    DareLinear,
    /// As `DareLinear`, with the election of `Ties`.
    DareTies,
}

/// One merge.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeSpec {
    /// One for each part.
    pub weights: Vec<f32>,
    /// How.
    pub strategy: MergeStrategy,
    /// Share of values of each tensor that stay, in (0, 1]; not for `Linear`.
    pub density: Option<f32>,
    /// The sign that occurs more often is elected, not the one of the sum.
    pub sign_by_frequency: bool,
    /// Another seed drops other values.
    pub seed: u64,
}

/// Why adapters were not merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// A part was refused.
    #[error("merged adapter {index}: {source}")]
    Part {
        /// Which, from 0.
        index: usize,
        /// Why.
        source: AdapterError,
    },
    /// A part has more than pairs of matrices on linear modules.
    #[error("merged adapter {index}: {feature} cannot be merged; accepted are plain LoRA pairs on linear modules")]
    Unsupported {
        /// Which, from 0.
        index: usize,
        /// The feature by its PEFT name.
        feature: &'static str,
    },
    /// The parts or the numbers do not fit together.
    #[error("merged_adapters: {0}")]
    Invalid(String),
    /// The result cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl MergeError {
    /// The stable code on the wire.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Part { source, .. } => source.code(),
            Self::Unsupported { .. } => "adapter_unsupported",
            Self::Invalid(_) => "adapter_invalid",
            Self::Write { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => "disk_full",
            Self::Write { .. } => "adapter_load_failed",
        }
    }
}

/// Merges the adapters in `dirs` into a new one in `out`, which is made if it is not there. The same contents and the same
/// `spec` give the same bytes.
///
/// # Errors
/// [`MergeError`]; then neither file of an adapter is in `out`.
pub fn merge(
    dirs: &[PathBuf],
    spec: &MergeSpec,
    out: &Path,
    base: &DecoderSpec,
    limits: &AdapterLimits,
) -> Result<(), MergeError> {
    let recipe = check(dirs, spec)?;
    let (parts, element) = read_parts(dirs, base, limits)?;
    let draw = Draw::new(&parts, spec);
    let rank = parts.iter().map(|part| part.rank_max).max().unwrap_or(0);
    let mut tensors = BTreeMap::new();
    let mut layers_of: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for layer in 0..base.layers {
        for (slice, name) in MODULES {
            let find = |part: &PeftAdapter| part.modules.iter().position(|m| m.layer == layer && m.slice == slice);
            let found: Vec<(usize, &LoraModule)> =
                parts.iter().enumerate().filter_map(|(at, part)| Some((at, &part.modules[find(part)?]))).collect();
            let Some((_, first)) = found.first() else { continue };
            let path = path(layer, name);
            let (d_in, d_out) = (first.d_in, first.d_out);
            let (a, b) = merge_pair(&found, &recipe, spec, &draw, &path, rank);
            tensors.insert(format!("base_model.model.{path}.lora_A.weight"), ([rank, d_in], a));
            tensors.insert(format!("base_model.model.{path}.lora_B.weight"), ([d_out, rank], b));
            layers_of.entry(name).or_default().push(layer);
        }
    }
    if tensors.values().any(|(_, values)| values.iter().any(|value| !value.is_finite())) {
        return Err(MergeError::Invalid("the merge has values that are not finite; choose smaller weights".to_owned()));
    }
    let config = config(&parts[0].base_model, rank, &layers_of, base.layers);
    write_adapter(out, &config, &to_safetensors(&tensors, element))
}

/// What can be said without reading a file.
fn check(dirs: &[PathBuf], spec: &MergeSpec) -> Result<Recipe, MergeError> {
    let invalid = |reason: String| Err(MergeError::Invalid(reason));
    if dirs.is_empty() || dirs.len() > PARTS_MAX {
        return invalid(format!("{} adapters, accepted are 1..{PARTS_MAX}", dirs.len()));
    }
    if dirs.len() != spec.weights.len() {
        return invalid(format!("{} weights for {} adapters", spec.weights.len(), dirs.len()));
    }
    if let Some(weight) = spec.weights.iter().find(|weight| !weight.is_finite()) {
        return invalid(format!("a weight is {weight}, accepted are finite numbers"));
    }
    let density = match (spec.strategy, spec.density) {
        (MergeStrategy::Linear, _) => 1.0,
        // By its decimal form: 0.7 of 10 values are 7, while the nearest f32 is a little less than 0.7.
        (_, Some(density)) if density > 0.0 && density <= 1.0 => density.to_string().parse().unwrap_or(1.0),
        (_, Some(density)) => return invalid(format!("density is {density}, accepted is 0 < density <= 1")),
        (_, None) => return invalid("density is missing; every strategy but linear needs it".to_owned()),
    };
    Ok(Recipe { strategy: spec.strategy, density, sign_by_frequency: spec.sign_by_frequency })
}

/// The parts, and the type their tensors are stored in if it is one for all.
fn read_parts(
    dirs: &[PathBuf],
    base: &DecoderSpec,
    limits: &AdapterLimits,
) -> Result<(Vec<PeftAdapter>, Element), MergeError> {
    let bytes = dirs.iter().filter_map(|dir| std::fs::metadata(dir.join(WEIGHTS_FILE)).ok()).map(|file| file.len());
    let bytes = bytes.fold(0, u64::saturating_add);
    if bytes > PARTS_BYTES_MAX {
        let reason = format!("the adapters have {bytes} bytes together, accepted are {PARTS_BYTES_MAX}");
        return Err(MergeError::Invalid(reason));
    }
    let (mut parts, mut elements) = (Vec::new(), Vec::new());
    for (index, dir) in dirs.iter().enumerate() {
        let part = read(dir, base, limits).map_err(|source| MergeError::Part { index, source })?;
        // rsLoRA only changes the scale; all else is more than the two factors.
        if let Some(feature) = part.features.iter().find(|feature| **feature != "rslora") {
            return Err(MergeError::Unsupported { index, feature });
        }
        elements.push(element(dir, limits));
        parts.push(part);
    }
    let first = elements.first().cloned().flatten();
    let one = first.filter(|first| elements.iter().all(|other| other.as_ref() == Some(first)));
    Ok((parts, one.unwrap_or(Element::F32)))
}

/// The type of all tensors of a weights file that was read before; None if there are several.
fn element(dir: &Path, limits: &AdapterLimits) -> Option<Element> {
    let file = files::read_bounded(&dir.join(WEIGHTS_FILE), limits.bytes_max).ok()?;
    let (prefix, rest) = file.split_first_chunk::<8>()?;
    let limits =
        HeaderLimits { header_bytes_max: limits.header_bytes_max, tensors_max: limits.tensors_max, dims_max: 2 };
    let bytes = safetensors::header_bytes(*prefix, file.len() as u64, &limits).ok()?;
    let header = rest.get(..usize::try_from(bytes).ok()?)?;
    let tensors = safetensors::parse_header(header, file.len() as u64, &limits).ok()?;
    let mut elements = tensors.into_values().map(|info| info.element);
    let first = elements.next()?;
    elements.all(|other| other == first).then_some(first)
}

/// A and B of one module of the result, `[rank, d_in]` and `[d_out, rank]`.
fn merge_pair(
    found: &[(usize, &LoraModule)],
    recipe: &Recipe,
    spec: &MergeSpec,
    draw: &Draw,
    path: &str,
    rank: usize,
) -> (Vec<f32>, Vec<f32>) {
    let (mut a_parts, mut b_parts) = (Vec::new(), Vec::new());
    for &(index, module) in found {
        let factor = spec.weights[index] * module.scale;
        let root = factor.abs().sqrt();
        let mut a = module.a.clone();
        recipe.prune(&mut a, |bits| draw.fill(index, path, "A", bits));
        a.resize(rank * module.d_in, 0.0);
        a_parts.push(Part { values: a, weight: if factor < 0.0 { -root } else { root } });
        let mut b = module.b.clone();
        recipe.prune(&mut b, |bits| draw.fill(index, path, "B", bits));
        let mut wide = vec![0.0; module.d_out * rank];
        for (to, from) in wide.chunks_exact_mut(rank).zip(b.chunks_exact(module.rank)) {
            to[..module.rank].copy_from_slice(from);
        }
        b_parts.push(Part { values: wide, weight: root });
    }
    (recipe.combine(&a_parts), recipe.combine(&b_parts))
}

/// Random bits for each tensor of each part, from what is merged and how: never from a path or a clock.
struct Draw([u8; 32]);

impl Draw {
    fn new(parts: &[PeftAdapter], spec: &MergeSpec) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(b"loramux merge 1\0");
        hash.update(&[spec.strategy as u8, u8::from(spec.sign_by_frequency)]);
        hash.update(&spec.density.unwrap_or(0.0).to_bits().to_le_bytes());
        hash.update(&spec.seed.to_le_bytes());
        for (part, weight) in parts.iter().zip(&spec.weights) {
            hash.update(&part.content_id);
            hash.update(&weight.to_bits().to_le_bytes());
        }
        Self(*hash.finalize().as_bytes())
    }

    fn fill(&self, part: usize, path: &str, side: &str, bits: &mut [u8]) {
        let mut hash = blake3::Hasher::new_keyed(&self.0);
        hash.update(format!("{part} {path} {side}").as_bytes());
        hash.finalize_xof().fill(bits);
    }
}

/// A module that every layer has is named once, the others by their whole paths.
fn config(base_model: &str, rank: usize, layers_of: &BTreeMap<&str, Vec<usize>>, layers: usize) -> Vec<u8> {
    let mut targets = Vec::new();
    for (name, adapted) in layers_of {
        if adapted.len() == layers {
            targets.push(name.rsplit('.').next().unwrap_or(name).to_owned());
        } else {
            targets.extend(adapted.iter().map(|layer| path(*layer, name)));
        }
    }
    let base_model = if base_model.is_empty() { Value::Null } else { base_model.into() };
    let config = json!({
        "base_model_name_or_path": base_model,
        "bias": "none",
        "inference_mode": true,
        "lora_alpha": rank,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    });
    let mut text = json::canonical(&config);
    text.push('\n');
    text.into_bytes()
}

type Merged = BTreeMap<String, ([usize; 2], Vec<f32>)>;

/// The file's bytes, tensors in the order of their names. Half precision only if it holds every value.
fn to_safetensors(tensors: &Merged, element: Element) -> Vec<u8> {
    let mut values = tensors.values().flat_map(|(_, values)| values);
    let element = match element {
        Element::F16 if values.all(|value| f16::from_f32(*value).is_finite()) => Element::F16,
        Element::Bf16 if values.all(|value| bf16::from_f32(*value).is_finite()) => Element::Bf16,
        _ => Element::F32,
    };
    let size = if element == Element::F32 { 4 } else { 2 };
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, (shape, values)) in tensors {
        let start = end;
        end += values.len() * size;
        header.insert(name.clone(), json!({"dtype": element.name(), "shape": shape, "data_offsets": [start, end]}));
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' '); // data is aligned for whoever maps the file
    }
    let mut file = Vec::with_capacity(8 + header.len() + end);
    file.extend_from_slice(&(header.len() as u64).to_le_bytes());
    file.extend_from_slice(header.as_bytes());
    for value in tensors.values().flat_map(|(_, values)| values) {
        match element {
            Element::F16 => file.extend_from_slice(&f16::from_f32(*value).to_le_bytes()),
            Element::Bf16 => file.extend_from_slice(&bf16::from_f32(*value).to_le_bytes()),
            _ => file.extend_from_slice(&value.to_le_bytes()),
        }
    }
    file
}

/// Both files are complete before one has its name.
fn write_adapter(out: &Path, config: &[u8], weights: &[u8]) -> Result<(), MergeError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| MergeError::Write { path, source }
    };
    std::fs::create_dir_all(out).map_err(failed(out))?;
    let files = [(WEIGHTS_FILE, weights), (CONFIG_FILE, config)].map(|(name, bytes)| (out.join(name), bytes));
    let partial = |path: &Path| path.with_extension("partial");
    let written = files.iter().try_for_each(|(path, bytes)| {
        let write = || {
            let mut file = std::fs::File::create(partial(path))?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(failed(path))
    });
    let named = written.and_then(|()| {
        files.iter().try_for_each(|(path, _)| std::fs::rename(partial(path), path).map_err(failed(path)))
    });
    if named.is_err() {
        for (path, _) in &files {
            // What cannot be removed was most likely never made; the first failure is the one to tell.
            let _ = std::fs::remove_file(partial(path));
            let _ = std::fs::remove_file(path);
        }
    }
    named
}
