//! `adapter_model.safetensors`: which tensor belongs to which module, and whether it may.

use super::config::LoraConfig;
use super::error::{AdapterError, WEIGHTS_FILE};
use super::modules::{MODULES, OUTSIDE_THE_LAYERS, extents, path};
use super::{AdapterLimits, LoraModule};
use crate::error::list;
use crate::spec::DecoderSpec;
use crate::weights::safetensors::{self, HeaderFault, HeaderLimits, TensorData, TensorInfo};
use loramux_kernels::Slice;
use std::collections::{BTreeMap, HashMap};

/// A module's pair, as found in the file.
#[derive(Default)]
struct Pair {
    a: Option<TensorInfo>,
    b: Option<TensorInfo>,
}

/// Which of the two matrices a tensor is.
enum Side {
    A,
    B,
}

/// Reads every LoRA pair of a file held in memory.
pub(super) fn modules(
    file: &[u8],
    config: &LoraConfig,
    spec: &DecoderSpec,
    limits: &AdapterLimits,
) -> Result<Vec<LoraModule>, AdapterError> {
    let mut pairs = pairs(header(file, limits)?, spec)?;
    let (mut modules, mut untargeted, mut missing) = (Vec::new(), Vec::new(), Vec::new());
    for layer in 0..spec.layers {
        for (slice, name) in MODULES {
            let path = path(layer, name);
            let pair = pairs.remove(&(layer, slice as usize)).unwrap_or_default();
            match (config.targets(&path, layer), pair) {
                (true, Pair { a: Some(a), b: Some(b) }) => {
                    let (d_out, d_in) = extents(spec, slice);
                    let site = Site { layer, slice, path, d_out, d_in };
                    modules.push(module(file, config, &site, &a, &b)?);
                }
                (true, Pair { a, b }) => {
                    missing.extend(
                        [(a.is_none(), 'A'), (b.is_none(), 'B')]
                            .iter()
                            .filter(|(none, _)| *none)
                            .map(|(_, side)| tensor_name(&path, *side)),
                    );
                }
                (false, Pair { a, b }) => {
                    untargeted.extend(a.map(|_| tensor_name(&path, 'A')));
                    untargeted.extend(b.map(|_| tensor_name(&path, 'B')));
                }
            }
        }
    }
    if !untargeted.is_empty() {
        let reason = format!("{} tensors are of modules that adapter_config.json does not target", untargeted.len());
        return Err(AdapterError::weights(format!("{reason}: {}", list(&untargeted))));
    }
    if !missing.is_empty() {
        let reason = format!("{} tensors of targeted modules are missing", missing.len());
        return Err(AdapterError::weights(format!("{reason}: {}", list(&missing))));
    }
    match modules.is_empty() {
        false => Ok(modules),
        true => Err(AdapterError::config("`target_modules` matches no module of this base model")),
    }
}

fn header(file: &[u8], limits: &AdapterLimits) -> Result<BTreeMap<String, TensorInfo>, AdapterError> {
    let Some((prefix, rest)) = file.split_first_chunk::<8>() else {
        return Err(AdapterError::weights(format!("{} bytes: too short for a safetensors header", file.len())));
    };
    let file_bytes = file.len() as u64;
    let limits =
        HeaderLimits { header_bytes_max: limits.header_bytes_max, tensors_max: limits.tensors_max, dims_max: 2 };
    let header = || -> Result<_, HeaderFault> {
        let bytes = safetensors::header_bytes(*prefix, file_bytes, &limits)? as usize;
        let json =
            rest.get(..bytes).ok_or_else(|| HeaderFault::Invalid("the header passes the file's end".to_owned()))?;
        safetensors::parse_header(json, file_bytes, &limits)
    };
    header().map_err(|fault| match fault {
        HeaderFault::Invalid(reason) => AdapterError::weights(reason),
        HeaderFault::TooLarge { what, found, limit } => {
            AdapterError::TooLarge { file: WEIGHTS_FILE, what, found, limit }
        }
    })
}

/// Sorts tensors by module. Every tensor must belong to one: none is skipped in silence.
fn pairs(
    tensors: BTreeMap<String, TensorInfo>,
    spec: &DecoderSpec,
) -> Result<BTreeMap<(usize, usize), Pair>, AdapterError> {
    let mut places = HashMap::new();
    for layer in 0..spec.layers {
        for (slice, name) in MODULES {
            places.insert(path(layer, name), (layer, slice as usize));
        }
    }
    let (mut pairs, mut unmatched, mut unnamed) = (BTreeMap::<_, Pair>::new(), Vec::new(), Vec::new());
    for (name, info) in tensors {
        if let Some((feature, reason)) = refused_feature(&name) {
            return Err(AdapterError::unsupported(WEIGHTS_FILE, format!("{feature} (tensor `{name}`)"), reason));
        }
        let Some((module, side)) = split_name(&name) else {
            unnamed.push(name);
            continue;
        };
        let Some(place) = places.get(module) else {
            unmatched.push(name);
            continue;
        };
        let pair = pairs.entry(*place).or_default();
        match side {
            Side::A => pair.a = Some(info),
            Side::B => pair.b = Some(info),
        }
    }
    if !unnamed.is_empty() {
        let reason = format!("{} tensors are not named `{PREFIX}<module>.lora_A.weight` or lora_B", unnamed.len());
        return Err(AdapterError::weights(format!("{reason}: {}", list(&unnamed))));
    }
    match unmatched.is_empty() {
        true => Ok(pairs),
        false => Err(AdapterError::UnmatchedTensors { names: unmatched }),
    }
}

const PREFIX: &str = "base_model.model.";

fn tensor_name(path: &str, side: char) -> String {
    format!("{PREFIX}{path}.lora_{side}.weight")
}

fn split_name(name: &str) -> Option<(&str, Side)> {
    let rest = name.strip_prefix(PREFIX)?;
    match rest.strip_suffix(".lora_A.weight") {
        Some(module) => Some((module, Side::A)),
        None => rest.strip_suffix(".lora_B.weight").map(|module| (module, Side::B)),
    }
}

/// Tensors of PEFT features that are known and not served.
fn refused_feature(name: &str) -> Option<(&'static str, &'static str)> {
    if let Some(outside) = OUTSIDE_THE_LAYERS.into_iter().find(|module| name.split('.').any(|part| part == *module)) {
        return Some((outside, "an adapted or trained embedding or head is not served yet"));
    }
    if name.contains(".lora_magnitude_vector") {
        return Some(("use_dora", "weight-decomposed LoRA is not served yet"));
    }
    if name.contains(".lora_embedding_") {
        return Some(("embed_tokens", "LoRA on the embedding is not served yet"));
    }
    if name.ends_with(".lora_B.bias") {
        return Some(("lora_bias", "a bias on B is not served yet"));
    }
    if name.contains(".modules_to_save.") || name.contains(".original_module.") {
        return Some(("modules_to_save", "fully trained modules are not served yet"));
    }
    name.ends_with(".bias").then_some(("bias", "trained biases are not served yet"))
}

/// Where a pair belongs.
struct Site {
    layer: usize,
    slice: Slice,
    path: String,
    d_out: usize,
    d_in: usize,
}

fn module(
    file: &[u8],
    config: &LoraConfig,
    site: &Site,
    a: &TensorInfo,
    b: &TensorInfo,
) -> Result<LoraModule, AdapterError> {
    let Site { layer, slice, d_out, d_in, .. } = *site;
    let rank = config.rank(&site.path);
    for (info, side, want, base_axis) in [(a, 'A', [rank, d_in], 1), (b, 'B', [d_out, rank], 0)] {
        let tensor = tensor_name(&site.path, side);
        let [Some(&first), Some(&second)] = [info.shape.first(), info.shape.get(1)] else {
            return Err(AdapterError::weights(format!(
                "tensor `{tensor}` has shape {:?}, wanted is {want:?}",
                info.shape
            )));
        };
        let found = [first, second];
        if found[base_axis] != want[base_axis] {
            return Err(AdapterError::BaseShape { tensor, found: info.shape.clone(), want });
        }
        if found != want {
            let reason =
                format!("tensor `{tensor}` has shape {found:?}, rank {rank} of adapter_config.json wants {want:?}");
            return Err(AdapterError::weights(reason));
        }
    }
    let scale = config.scale(&site.path);
    let a = values(file, a, &tensor_name(&site.path, 'A'))?;
    let b = values(file, b, &tensor_name(&site.path, 'B'))?;
    Ok(LoraModule { layer, slice, rank, scale, a, b, d_in, d_out })
}

fn values(file: &[u8], info: &TensorInfo, tensor: &str) -> Result<Vec<f32>, AdapterError> {
    let (start, bytes) = (info.start as usize, info.bytes as usize);
    let data = file.get(start..).and_then(|rest| rest.get(..bytes));
    let data = data.ok_or_else(|| AdapterError::weights(format!("tensor `{tensor}` passes the file's end")))?;
    let Some(data) = TensorData::decode(&info.element, data) else {
        let feature = format!("dtype {} of tensor `{tensor}`", info.element.name());
        return Err(AdapterError::unsupported(WEIGHTS_FILE, feature, "accepted are F32, F16 and BF16"));
    };
    let values = data.into_f32();
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(at) => {
            Err(AdapterError::weights(format!("tensor `{tensor}` has the value {} at element {at}", values[at])))
        }
    }
}
