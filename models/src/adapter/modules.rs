//! The seven linear modules of a layer, the embedding and the head by their PEFT names, and PEFT's rules for which names a config means.
//!
//! Source: PEFT `tuners/tuners_utils.py` (`check_target_module_exists`) and `utils/other.py` (`get_pattern_key`).

use super::error::{AdapterError, CONFIG_FILE};
use crate::spec::DecoderSpec;
use loramux_kernels::Slice;
use regex::{Regex, RegexBuilder};
use serde_json::Value;
use std::collections::HashSet;

/// Slices of a layer and the names of their modules.
pub(crate) const MODULES: [(Slice, &str); 7] = [
    (Slice::Q, "self_attn.q_proj"),
    (Slice::K, "self_attn.k_proj"),
    (Slice::V, "self_attn.v_proj"),
    (Slice::O, "self_attn.o_proj"),
    (Slice::Gate, "mlp.gate_proj"),
    (Slice::Up, "mlp.up_proj"),
    (Slice::Down, "mlp.down_proj"),
];

/// The modules outside the layers, and their paths.
pub(crate) const ENDS: [(Slice, &str); 2] = [(Slice::Embed, "model.embed_tokens"), (Slice::Head, "lm_head")];

/// Whether the base's module has a bias.
pub(crate) fn has_bias(spec: &DecoderSpec, slice: Slice) -> bool {
    spec.qkv_bias && matches!(slice, Slice::Q | Slice::K | Slice::V)
}

/// Path of a module in the base model, as PEFT sees it.
pub(crate) fn path(layer: usize, module: &str) -> String {
    format!("model.layers.{layer}.{module}")
}

/// `(d_out, d_in)` of a slice's weight.
pub(crate) fn extents(spec: &DecoderSpec, slice: Slice) -> (usize, usize) {
    match slice {
        Slice::Q => (spec.q_width(), spec.hidden),
        Slice::K | Slice::V => (spec.kv_width(), spec.hidden),
        Slice::O => (spec.hidden, spec.q_width()),
        Slice::Gate | Slice::Up => (spec.intermediate, spec.hidden),
        Slice::Down => (spec.hidden, spec.intermediate),
        Slice::Embed => (spec.hidden, spec.vocab),
        Slice::Head | Slice::HeadDelta => (spec.vocab, spec.hidden),
    }
}

/// Compiled size of one pattern: a repetition bomb is refused instead of compiled.
const PATTERN_BYTES_MAX: usize = 1 << 20;

/// A pattern from a config. The `regex` crate matches in linear time, so no pattern can hang the loader.
#[derive(Debug)]
pub(crate) struct Pattern(Regex);

impl Pattern {
    /// A key of `rank_pattern` or `alpha_pattern`: the whole path, or its end after a dot.
    pub(crate) fn suffix(field: &str, key: &str) -> Result<Self, AdapterError> {
        Self::compile(field, key, &format!(r"^(?:(.*\.)?({key})$)"))
    }

    /// A string in `target_modules` or `exclude_modules`: the whole path.
    fn whole(field: &str, key: &str) -> Result<Self, AdapterError> {
        Self::compile(field, key, &format!("^(?:{key})$"))
    }

    fn compile(field: &str, key: &str, regex: &str) -> Result<Self, AdapterError> {
        // `a)|(b` would compile once wrapped, and mean something else than it says.
        let own = RegexBuilder::new(key).size_limit(PATTERN_BYTES_MAX).build();
        match own.and_then(|_| RegexBuilder::new(regex).size_limit(PATTERN_BYTES_MAX).build()) {
            Ok(regex) => Ok(Self(regex)),
            Err(regex::Error::CompiledTooBig(_)) => {
                let reason = format!("pattern `{key}` of `{field}` is larger than {PATTERN_BYTES_MAX} bytes compiled");
                Err(AdapterError::config(reason))
            }
            Err(_) => Err(AdapterError::unsupported(
                CONFIG_FILE,
                format!("pattern `{key}` of `{field}`"),
                "it is no regular expression, or uses look-around or back references",
            )),
        }
    }

    pub(crate) fn matches(&self, path: &str) -> bool {
        self.0.is_match(path)
    }
}

/// The modules that `target_modules` or `exclude_modules` mean.
#[derive(Debug)]
pub(crate) enum ModuleSet {
    /// `all-linear`: every linear module of the layers.
    AllLinear,
    /// A list: a whole path, or its end after a dot.
    Names(HashSet<String>),
    /// A string: a pattern for the whole path.
    Whole(Pattern),
}

impl ModuleSet {
    pub(crate) fn parse(field: &str, value: &Value) -> Result<Self, AdapterError> {
        let bad = || AdapterError::config(format!("`{field}` is {value}, accepted is a string or a list of strings"));
        match value {
            Value::String(text) if text == "all-linear" => Ok(Self::AllLinear),
            Value::String(text) => Pattern::whole(field, text).map(Self::Whole),
            Value::Array(list) => {
                let names: Option<HashSet<String>> = list.iter().map(|name| name.as_str().map(str::to_owned)).collect();
                names.map(Self::Names).ok_or_else(bad)
            }
            _ => Err(bad()),
        }
    }

    pub(crate) fn contains(&self, path: &str) -> bool {
        match self {
            Self::AllLinear => true,
            Self::Whole(pattern) => pattern.matches(path),
            Self::Names(names) => {
                names.contains(path) || path.match_indices('.').any(|(dot, _)| names.contains(&path[dot + 1..]))
            }
        }
    }
}
