//! What a tensor of `adapter_model.safetensors` is, by its name: a module's path between PEFT's prefix and one of PEFT's
//! endings. Source: PEFT `utils/save_and_load.py` (`get_peft_model_state_dict`, 0.21).

use super::error::{AdapterError, WEIGHTS_FILE};
use super::modules::{ENDS, MODULES, path};
use crate::error::list;
use crate::spec::DecoderSpec;
use crate::weights::safetensors::TensorInfo;
use loramux_kernels::Slice;
use std::collections::{BTreeMap, HashMap};

/// What PEFT puts before every module's path.
const PREFIX: &str = "base_model.model.";

/// A role of a tensor in its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// `lora_A` or, of the embedding, `lora_embedding_A`.
    A,
    /// `lora_B` or `lora_embedding_B`.
    B,
    /// The bias of `lora_B`.
    BiasOfB,
    /// DoRA's magnitude of each output.
    Magnitude,
    /// A trained bias of the base.
    Bias,
    /// The trained weight of a module in `modules_to_save`.
    Weight,
    /// The base's own weight, which PEFT saves beside LoRA on the embedding or the head.
    BaseWeight,
}

/// Endings and what they mean; an ending that is the end of another comes after it.
const ENDINGS: [(&str, Role); 11] = [
    (".lora_A.weight", Role::A),
    (".lora_B.weight", Role::B),
    (".lora_embedding_A", Role::A),
    (".lora_embedding_B", Role::B),
    (".lora_B.bias", Role::BiasOfB),
    (".lora_magnitude_vector", Role::Magnitude),
    (".lora_magnitude_vector.weight", Role::Magnitude),
    (".base_layer.bias", Role::Bias),
    (".bias", Role::Bias),
    (".base_layer.weight", Role::BaseWeight),
    (".weight", Role::Weight),
];

/// The tensors of one module, each with its name.
pub(super) type Found = BTreeMap<Role, (String, TensorInfo)>;

/// The name that a tensor would have.
pub(super) fn tensor_name(path: &str, slice: Slice, role: Role) -> String {
    let embedding = |(ending, _): &&(&str, Role)| ending.contains("embedding") == (slice == Slice::Embed);
    let pair = matches!(role, Role::A | Role::B);
    let mut endings = ENDINGS.iter().filter(|(_, of)| *of == role);
    let ending = if pair { endings.find(embedding) } else { endings.next() };
    format!("{PREFIX}{path}{}", ending.map_or("", |(ending, _)| ending))
}

/// Sorts tensors by module. Every tensor must belong to one: none is skipped in silence.
pub(super) fn sort(
    tensors: BTreeMap<String, TensorInfo>,
    spec: &DecoderSpec,
) -> Result<BTreeMap<(usize, Slice), Found>, AdapterError> {
    let mut places: HashMap<String, (usize, Slice)> = HashMap::new();
    for layer in 0..spec.layers {
        places.extend(MODULES.iter().map(|(slice, name)| (path(layer, name), (layer, *slice))));
    }
    places.extend(ENDS.iter().map(|(slice, path)| ((*path).to_owned(), (0, *slice))));
    let (mut sorted, mut unmatched, mut unnamed) = (BTreeMap::<_, Found>::new(), Vec::new(), Vec::new());
    for (name, info) in tensors {
        if name.contains(".modules_to_save.") || name.contains(".original_module.") {
            let reason = "save the adapter with `save_pretrained`, which names the weight after its module";
            return Err(AdapterError::unsupported(WEIGHTS_FILE, format!("modules_to_save (tensor `{name}`)"), reason));
        }
        let Some((module, role)) = split(&name) else {
            unnamed.push(name);
            continue;
        };
        let Some(place) = places.get(module) else {
            // `lora_A.default.weight` ends like a trained weight.
            let list = if module.contains(".lora_") { &mut unnamed } else { &mut unmatched };
            list.push(name);
            continue;
        };
        let found = sorted.entry(*place).or_default();
        if let Some((other, _)) = found.get(&role) {
            return Err(AdapterError::weights(format!("tensors `{other}` and `{name}` are the same thing twice")));
        }
        // `lora_A` of an embedding and `lora_embedding_A` of a linear module do not exist.
        if matches!(role, Role::A | Role::B) && tensor_name(module, place.1, role) != name {
            unnamed.push(name);
            continue;
        }
        found.insert(role, (name, info));
    }
    if !unnamed.is_empty() {
        let reason = format!("{} tensors are not named `{PREFIX}<module>.lora_A.weight` or lora_B", unnamed.len());
        return Err(AdapterError::weights(format!("{reason}: {}", list(&unnamed))));
    }
    match unmatched.is_empty() {
        true => Ok(sorted),
        false => Err(AdapterError::UnmatchedTensors { names: unmatched }),
    }
}

fn split(name: &str) -> Option<(&str, Role)> {
    let rest = name.strip_prefix(PREFIX)?;
    ENDINGS.iter().find_map(|(ending, role)| rest.strip_suffix(ending).map(|module| (module, *role)))
}
