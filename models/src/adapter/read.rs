//! `adapter_model.safetensors`: which tensor belongs to which module, and whether it may.

use super::config::LoraConfig;
use super::error::{AdapterError, WEIGHTS_FILE};
use super::modules::{ENDS, MODULES, extents, has_bias, path};
use super::names::{Found, Role, sort, tensor_name};
use super::{AdapterLimits, LoraModule, OutputVectors, WholeMatrix};
use crate::error::list;
use crate::spec::DecoderSpec;
use crate::weights::safetensors::{self, HeaderFault, HeaderLimits, TensorData, TensorInfo};
use loramux_kernels::Slice;
use std::collections::BTreeMap;

/// What a file holds, checked against its config and the base's shapes.
#[derive(Default)]
pub(super) struct Contents {
    pub(super) modules: Vec<LoraModule>,
    pub(super) outputs: Vec<OutputVectors>,
    /// Trained embedding and head.
    pub(super) whole: Vec<WholeMatrix>,
    /// The base's own embedding and head, saved beside their LoRA.
    pub(super) base_copies: Vec<WholeMatrix>,
}

/// Reads every tensor of a file held in memory.
pub(super) fn contents(
    file: &[u8],
    config: &LoraConfig,
    spec: &DecoderSpec,
    limits: &AdapterLimits,
) -> Result<Contents, AdapterError> {
    let mut sorted = sort(header(file, limits)?, spec)?;
    let mut reader = Reader { file, config, out: Contents::default(), untargeted: Vec::new(), missing: Vec::new() };
    let mut visit = |layer: usize, slice: Slice, path: String, is_target: bool| {
        let (d_out, d_in) = extents(spec, slice);
        let site = Site { layer, slice, path, d_out, d_in, is_target, has_bias: has_bias(spec, slice) };
        reader.module(&site, sorted.remove(&(layer, slice)).unwrap_or_default())
    };
    for layer in 0..spec.layers {
        for (slice, name) in MODULES {
            let path = path(layer, name);
            let is_target = config.targets(&path, layer);
            visit(layer, slice, path, is_target)?;
        }
    }
    for (slice, path) in ENDS {
        visit(0, slice, path.to_owned(), config.targets_end(slice, path))?;
    }
    let Reader { out, untargeted, missing, .. } = reader;
    if !untargeted.is_empty() {
        let reason = format!("{} tensors are of modules that adapter_config.json does not target", untargeted.len());
        return Err(AdapterError::weights(format!("{reason}: {}", list(&untargeted))));
    }
    if !missing.is_empty() {
        let reason = format!("{} tensors of targeted modules are missing", missing.len());
        return Err(AdapterError::weights(format!("{reason}: {}", list(&missing))));
    }
    match out.modules.is_empty() {
        false => Ok(out),
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

/// A module of the base.
struct Site {
    layer: usize,
    slice: Slice,
    path: String,
    d_out: usize,
    d_in: usize,
    /// Whether the config puts LoRA on it.
    is_target: bool,
    has_bias: bool,
}

struct Reader<'a> {
    file: &'a [u8],
    config: &'a LoraConfig,
    out: Contents,
    untargeted: Vec<String>,
    missing: Vec<String>,
}

impl Reader<'_> {
    /// Reads the tensors of one module, and notes those that should be there or should not.
    fn module(&mut self, site: &Site, mut found: Found) -> Result<(), AdapterError> {
        let Site { layer, slice, .. } = *site;
        let mut wanted = Vec::new();
        if site.is_target {
            wanted.extend([Role::A, Role::B]);
            wanted.extend(self.config.use_dora.then_some(Role::Magnitude));
            wanted.extend(self.config.lora_bias.then_some(Role::BiasOfB));
        }
        wanted.extend(self.config.saves(slice).then_some(Role::Weight));
        let absent = wanted.iter().filter(|role| !found.contains_key(role));
        let absent: Vec<String> = absent.map(|role| tensor_name(&site.path, slice, *role)).collect();
        if !absent.is_empty() {
            self.missing.extend(absent);
            return Ok(());
        }
        if site.is_target
            && let (Some((_, a)), Some((_, b))) = (found.remove(&Role::A), found.remove(&Role::B))
        {
            let module = self.pair(site, &a, &b)?;
            self.out.modules.push(module);
        }
        let mut vector = |role: Role, wanted: bool| match found.remove(&role) {
            Some((name, info)) if wanted => self.vector(site, &name, &info).map(Some),
            Some(other) => {
                found.insert(role, other);
                Ok(None)
            }
            None => Ok(None),
        };
        let outputs = OutputVectors {
            layer,
            slice,
            magnitude: vector(Role::Magnitude, wanted.contains(&Role::Magnitude))?,
            lora_bias: vector(Role::BiasOfB, wanted.contains(&Role::BiasOfB))?,
            bias: vector(Role::Bias, self.config.trains_biases && site.has_bias)?,
            base_has_bias: site.has_bias,
        };
        if outputs.magnitude.is_some() || outputs.lora_bias.is_some() || outputs.bias.is_some() {
            self.out.outputs.push(outputs);
        }
        if self.config.saves(slice)
            && let Some((name, info)) = found.remove(&Role::Weight)
        {
            let matrix = self.whole(site, &name, &info)?;
            self.out.whole.push(matrix);
        }
        let is_end = matches!(slice, Slice::Embed | Slice::Head);
        if is_end
            && site.is_target
            && let Some((name, info)) = found.remove(&Role::BaseWeight)
        {
            let matrix = self.whole(site, &name, &info)?;
            self.out.base_copies.push(matrix);
        }
        if let Some((name, _)) = found.get(&Role::Bias).filter(|_| !site.has_bias && self.config.trains_biases) {
            return Err(AdapterError::UnmatchedTensors { names: vec![name.clone()] });
        }
        self.untargeted.extend(found.into_values().map(|(name, _)| name));
        Ok(())
    }

    fn pair(&self, site: &Site, a: &TensorInfo, b: &TensorInfo) -> Result<LoraModule, AdapterError> {
        let Site { layer, slice, d_out, d_in, .. } = *site;
        let rank = self.config.rank(&site.path);
        let (a_name, b_name) = (tensor_name(&site.path, slice, Role::A), tensor_name(&site.path, slice, Role::B));
        for (info, tensor, want, base_axis) in [(a, &a_name, [rank, d_in], 1), (b, &b_name, [d_out, rank], 0)] {
            let [Some(&first), Some(&second)] = [info.shape.first(), info.shape.get(1)] else {
                return Err(AdapterError::weights(format!(
                    "tensor `{tensor}` has shape {:?}, wanted is {want:?}",
                    info.shape
                )));
            };
            let found = [first, second];
            if found[base_axis] != want[base_axis] {
                let want = want.to_vec();
                return Err(AdapterError::BaseShape { tensor: tensor.clone(), found: info.shape.clone(), want });
            }
            if found != want {
                let reason =
                    format!("tensor `{tensor}` has shape {found:?}, rank {rank} of adapter_config.json wants {want:?}");
                return Err(AdapterError::weights(reason));
            }
        }
        let scale = self.config.scale(&site.path);
        let (a, b) = (self.values(a, &a_name)?, self.values(b, &b_name)?);
        Ok(LoraModule { layer, slice, rank, scale, a, b, d_in, d_out })
    }

    /// One number for each output.
    fn vector(&self, site: &Site, name: &str, info: &TensorInfo) -> Result<Vec<f32>, AdapterError> {
        // Old versions of PEFT kept the embedding's magnitude as a row.
        if info.shape.iter().product::<usize>() != site.d_out || info.shape.last() != Some(&site.d_out) {
            let (tensor, found) = (name.to_owned(), info.shape.clone());
            return Err(AdapterError::BaseShape { tensor, found, want: vec![site.d_out] });
        }
        self.values(info, name)
    }

    /// A whole matrix of the embedding or the head.
    fn whole(&self, site: &Site, name: &str, info: &TensorInfo) -> Result<WholeMatrix, AdapterError> {
        // Both lie as `[vocabulary, hidden]`, while the embedding's outputs are the hidden width.
        let want = match site.slice {
            Slice::Embed => vec![site.d_in, site.d_out],
            _ => vec![site.d_out, site.d_in],
        };
        if info.shape != want {
            return Err(AdapterError::BaseShape { tensor: name.to_owned(), found: info.shape.clone(), want });
        }
        let data = self.data(info, name)?;
        Ok(WholeMatrix { slice: site.slice, name: name.to_owned(), data })
    }

    fn data(&self, info: &TensorInfo, tensor: &str) -> Result<TensorData, AdapterError> {
        let (start, bytes) = (info.start as usize, info.bytes as usize);
        let data = self.file.get(start..).and_then(|rest| rest.get(..bytes));
        let data = data.ok_or_else(|| AdapterError::weights(format!("tensor `{tensor}` passes the file's end")))?;
        let Some(data) = TensorData::decode(&info.element, data) else {
            let feature = format!("dtype {} of tensor `{tensor}`", info.element.name());
            return Err(AdapterError::unsupported(WEIGHTS_FILE, feature, "accepted are F32, F16 and BF16"));
        };
        match data.position(|value| !value.is_finite()) {
            None => Ok(data),
            Some((at, value)) => {
                Err(AdapterError::weights(format!("tensor `{tensor}` has the value {value} at element {at}")))
            }
        }
    }

    fn values(&self, info: &TensorInfo, tensor: &str) -> Result<Vec<f32>, AdapterError> {
        self.data(info, tensor).map(TensorData::into_f32)
    }
}
