//! `adapter_config.json`: strict JSON, every key accounted for.
//!
//! A key is either read, or known to change nothing at inference, or must be unset. A key that this version does not
//! know must be unset too: newer PEFT variants arrive as new keys, and serving one as plain LoRA gives wrong text.
//! Source: PEFT `tuners/lora/config.py` (0.21).

use super::error::AdapterError;
use super::json;
use super::modules::{ENDS, ModuleSet, Pattern};
use loramux_kernels::Slice;
use serde_json::{Map, Value};

/// Patterns in one of `rank_pattern` and `alpha_pattern`.
const PATTERNS_MAX: usize = 256;

/// What a LoRA config says about every module.
#[derive(Debug)]
pub(crate) struct LoraConfig {
    pub(crate) base_model: String,
    targets: ModuleSet,
    excluded: Option<ModuleSet>,
    /// Only these layers, when given.
    layers: Option<Vec<u64>>,
    rank: usize,
    alpha: f64,
    rank_pattern: Vec<(Pattern, usize)>,
    alpha_pattern: Vec<(Pattern, f64)>,
    pub(crate) use_rslora: bool,
    /// Weight-decomposed (arXiv:2402.09353): targeted modules have a magnitude for each output.
    pub(crate) use_dora: bool,
    /// B has a bias.
    pub(crate) lora_bias: bool,
    /// The file may hold biases of the base that were trained.
    pub(crate) trains_biases: bool,
    /// Which of the embedding and the head were trained as a whole.
    saved: Vec<Slice>,
}

impl LoraConfig {
    /// Parses the file's bytes.
    ///
    /// # Errors
    /// `adapter_invalid` for malformed values, `adapter_unsupported` for features by name, `adapter_rank_limit`.
    pub(crate) fn parse(bytes: &[u8], rank_max: usize) -> Result<(Self, Value), AdapterError> {
        let root = json::parse_strict(bytes).map_err(AdapterError::config)?;
        let Value::Object(fields) = &root else {
            return Err(AdapterError::config("not a JSON object"));
        };
        check_peft_type(fields)?;
        check_features(fields)?;
        let rank_of = |field: &str, value: &Value| rank(field, value, rank_max);
        let (use_dora, lora_bias) = (flag(fields, "use_dora")?, flag(fields, "lora_bias")?);
        if use_dora && lora_bias {
            return Err(AdapterError::config("`use_dora` and `lora_bias` exclude each other, as in PEFT"));
        }
        let config = Self {
            base_model: base_model(fields)?,
            targets: targets(fields)?,
            excluded: match set(fields, "exclude_modules") {
                None => None,
                Some(value) => Some(ModuleSet::parse("exclude_modules", value)?),
            },
            layers: layers(fields)?,
            rank: match fields.get("r") {
                Some(value) => rank_of("r", value)?,
                None => return Err(AdapterError::config("`r` is missing")),
            },
            alpha: match fields.get("lora_alpha") {
                Some(value) => alpha("lora_alpha", value)?,
                None => return Err(AdapterError::config("`lora_alpha` is missing")),
            },
            rank_pattern: patterns(fields, "rank_pattern", rank_of)?,
            alpha_pattern: patterns(fields, "alpha_pattern", alpha)?,
            use_rslora: flag(fields, "use_rslora")?,
            use_dora,
            lora_bias,
            trains_biases: trains_biases(fields)?,
            saved: saved(fields)?,
        };
        config.check_ends(fields)?;
        Ok((config, root))
    }

    /// What concerns the embedding and the head.
    fn check_ends(&self, fields: &Map<String, Value>) -> Result<(), AdapterError> {
        let acts_on = |slice: &Slice, path: &str| self.saves(*slice) || self.targets_end(*slice, path);
        let tied = set(fields, "ensure_weight_tying").is_some();
        if tied && ENDS.iter().any(|(slice, path)| acts_on(slice, path)) {
            return Err(refuse(
                "ensure_weight_tying",
                "an adapter shared by the embedding and the head is not served yet",
            ));
        }
        if self.lora_bias && ENDS.iter().any(|&(slice, path)| slice == Slice::Embed && self.targets_end(slice, path)) {
            return Err(AdapterError::config("`lora_bias` and LoRA on the embedding exclude each other, as in PEFT"));
        }
        Ok(())
    }

    /// Whether PEFT would put LoRA on this module of this layer.
    pub(crate) fn targets(&self, path: &str, layer: usize) -> bool {
        self.targets.contains(path)
            && !self.excluded.as_ref().is_some_and(|excluded| excluded.contains(path))
            && self.layers.as_ref().is_none_or(|layers| layers.contains(&(layer as u64)))
    }

    /// Whether PEFT would put LoRA on the embedding or the head: `all-linear` means neither, a list of layers no module
    /// outside them, and a module that is trained as a whole has no LoRA.
    pub(crate) fn targets_end(&self, slice: Slice, path: &str) -> bool {
        self.layers.is_none()
            && !matches!(self.targets, ModuleSet::AllLinear)
            && !self.saves(slice)
            && self.targets.contains(path)
            && !self.excluded.as_ref().is_some_and(|excluded| excluded.contains(path))
    }

    /// Whether the embedding or the head was trained as a whole.
    pub(crate) fn saves(&self, slice: Slice) -> bool {
        self.saved.contains(&slice)
    }

    /// Rank of a module: the first pattern that matches wins, as in PEFT.
    pub(crate) fn rank(&self, path: &str) -> usize {
        first_match(&self.rank_pattern, path).unwrap_or(self.rank)
    }

    /// `alpha / r`, or `alpha / sqrt(r)` with rank-stabilised LoRA (arXiv:2312.03732).
    pub(crate) fn scale(&self, path: &str) -> f32 {
        let (alpha, rank) = (first_match(&self.alpha_pattern, path).unwrap_or(self.alpha), self.rank(path) as f64);
        let scale = if self.use_rslora { alpha / rank.sqrt() } else { alpha / rank };
        scale as f32
    }
}

fn first_match<T: Copy>(patterns: &[(Pattern, T)], path: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.matches(path)).map(|(_, value)| *value)
}

/// Keys that are read by [`LoraConfig::parse`].
const READ: [&str; 18] = [
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "use_dora",
    "lora_bias",
    "bias",
    "modules_to_save",
    "ensure_weight_tying",
];

/// Keys that say how the adapter was made and change nothing when it is served.
const INERT: [&str; 9] = [
    "auto_mapping",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "loftq_config",
];

/// A feature that must be unset, and what to say when it is not.
const REFUSED: [(&str, &str); 9] = [
    ("fan_in_fan_out", "transposed weights do not occur in this base model"),
    ("trainable_token_indices", "trained token embeddings are not served yet"),
    ("layer_replication", "replicated layers are not served yet"),
    ("alora_invocation_tokens", "activated LoRA is not served yet"),
    ("target_parameters", "LoRA on bare parameters is not served yet"),
    ("use_qalora", "QA-LoRA is not served yet"),
    ("use_bdlora", "block-diagonal LoRA is not served yet"),
    ("megatron_config", "Megatron parallel layers are not served"),
    ("arrow_config", "Arrow routing is not served yet"),
];

fn check_peft_type(fields: &Map<String, Value>) -> Result<(), AdapterError> {
    match fields.get("peft_type") {
        Some(Value::String(kind)) if kind == "LORA" => {}
        Some(Value::String(kind)) => return Err(refuse(&format!("peft_type `{kind}`"), "accepted is `LORA`")),
        Some(other) => return Err(AdapterError::config(format!("`peft_type` is {other}, accepted is \"LORA\""))),
        None => return Err(AdapterError::config("`peft_type` is missing")),
    }
    match set(fields, "task_type") {
        None => Ok(()),
        Some(Value::String(task)) if task == "CAUSAL_LM" => Ok(()),
        Some(other) => Err(refuse(&format!("task_type {other}"), "accepted is `CAUSAL_LM`")),
    }
}

fn check_features(fields: &Map<String, Value>) -> Result<(), AdapterError> {
    for (name, reason) in REFUSED {
        if set(fields, name).is_some() {
            return Err(refuse(name, reason));
        }
    }
    match fields.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(Value::String(init)) if ["gaussian", "eva", "orthogonal"].contains(&init.as_str()) => {}
        // The others change the base weights when training starts, so the adapter fits only that changed base.
        Some(other) => {
            let reason = "it changes the base weights; save the adapter converted to plain LoRA";
            return Err(refuse(&format!("init_lora_weights {other}"), reason));
        }
    }
    match set(fields, "layers_pattern") {
        None => {}
        Some(pattern) if pattern == "layers" || pattern.as_array().is_some_and(|list| list[..] == ["layers"]) => {}
        Some(other) => return Err(refuse(&format!("layers_pattern {other}"), "accepted is `layers`")),
    }
    for name in fields.keys() {
        let known = [&READ[..], &INERT[..]].iter().any(|keys| keys.contains(&name.as_str()));
        if !known && set(fields, name).is_some() {
            return Err(refuse(name, "this version does not know the field, and it is set"));
        }
    }
    Ok(())
}

fn refuse(feature: &str, reason: &str) -> AdapterError {
    AdapterError::unsupported(super::error::CONFIG_FILE, feature, reason)
}

/// A field's value unless it is absent or says nothing: null, false, or empty.
fn set<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    fields.get(name).filter(|value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    })
}

fn base_model(fields: &Map<String, Value>) -> Result<String, AdapterError> {
    match fields.get("base_model_name_or_path") {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(name)) => Ok(name.clone()),
        Some(other) => Err(AdapterError::config(format!("`base_model_name_or_path` is {other}, accepted is a string"))),
    }
}

fn targets(fields: &Map<String, Value>) -> Result<ModuleSet, AdapterError> {
    let value =
        set(fields, "target_modules").ok_or_else(|| AdapterError::config("`target_modules` is missing or empty"))?;
    ModuleSet::parse("target_modules", value)
}

fn trains_biases(fields: &Map<String, Value>) -> Result<bool, AdapterError> {
    match set(fields, "bias") {
        None => Ok(false),
        Some(Value::String(bias)) if bias == "none" => Ok(false),
        Some(Value::String(bias)) if ["all", "lora_only"].contains(&bias.as_str()) => Ok(true),
        Some(other) => Err(refuse(&format!("bias {other}"), "accepted are `none`, `all` and `lora_only`")),
    }
}

fn saved(fields: &Map<String, Value>) -> Result<Vec<Slice>, AdapterError> {
    let Some(value) = set(fields, "modules_to_save") else { return Ok(Vec::new()) };
    let bad = || AdapterError::config(format!("`modules_to_save` is {value}, accepted is a list of names"));
    let mut saved = Vec::new();
    for name in value.as_array().ok_or_else(bad)? {
        let name = name.as_str().ok_or_else(bad)?;
        // PEFT compares the end of a module's path.
        let Some((slice, _)) = ENDS.iter().find(|(_, path)| path.ends_with(name) && !name.is_empty()) else {
            return Err(refuse(&format!("modules_to_save `{name}`"), "accepted are `lm_head` and `embed_tokens`"));
        };
        saved.push(*slice);
    }
    Ok(saved)
}

fn layers(fields: &Map<String, Value>) -> Result<Option<Vec<u64>>, AdapterError> {
    let value = match fields.get("layers_to_transform") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(list)) if list.is_empty() => return Ok(None),
        Some(value) => value,
    };
    if matches!(fields.get("target_modules"), Some(Value::String(_))) {
        return Err(AdapterError::config("`layers_to_transform` needs `target_modules` to be a list, as in PEFT"));
    }
    let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let layers: Option<Vec<u64>> = list.iter().map(Value::as_u64).collect();
    let bad =
        || AdapterError::config(format!("`layers_to_transform` is {value}, accepted is a layer or a list of layers"));
    layers.map(Some).ok_or_else(bad)
}

fn flag(fields: &Map<String, Value>, name: &str) -> Result<bool, AdapterError> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(AdapterError::config(format!("`{name}` is {other}, accepted is true or false"))),
    }
}

fn rank(field: &str, value: &Value, rank_max: usize) -> Result<usize, AdapterError> {
    match value.as_u64() {
        Some(rank) if rank > rank_max as u64 => {
            Err(AdapterError::RankLimit { field: format!("`{field}`"), rank, limit: rank_max })
        }
        Some(rank) if rank >= 1 => Ok(rank as usize),
        _ => Err(AdapterError::config(format!("`{field}` is {value}, accepted is an integer in 1..={rank_max}"))),
    }
}

fn alpha(field: &str, value: &Value) -> Result<f64, AdapterError> {
    // Beyond this no bfloat16 product stays finite in use.
    const ALPHA_MAX: f64 = 1e6;
    match value.as_f64() {
        Some(alpha) if alpha.abs() <= ALPHA_MAX => Ok(alpha),
        _ => Err(AdapterError::config(format!("`{field}` is {value}, accepted is a number up to {ALPHA_MAX:e}"))),
    }
}

/// A pattern object in the order of the file, which decides between patterns that both match.
fn patterns<T>(
    fields: &Map<String, Value>,
    name: &str,
    read: impl Fn(&str, &Value) -> Result<T, AdapterError>,
) -> Result<Vec<(Pattern, T)>, AdapterError> {
    let object = match fields.get(name) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(object)) => object,
        Some(other) => return Err(AdapterError::config(format!("`{name}` is {other}, accepted is an object"))),
    };
    if object.len() > PATTERNS_MAX {
        return Err(AdapterError::config(format!(
            "`{name}` has {} patterns, accepted are {PATTERNS_MAX}",
            object.len()
        )));
    }
    let entry = |(key, value): (&String, &Value)| {
        Ok((Pattern::suffix(name, key)?, read(&format!("{name}[\"{key}\"]"), value)?))
    };
    object.iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mutated_config_is_read_or_refused_and_never_panics() {
        const SEED: u64 = 0xC0F1_6001;
        let good: &[u8] = br#"{"peft_type":"LORA","r":8,"lora_alpha":16,"target_modules":["q_proj"],"rank_pattern":{"q.*":4},"use_rslora":true}"#;
        let pool: &[u8] = b"0123456789{}[]()\",:.-+*?|^$eE nulltrefas\\\0\xff";
        let mut state = SEED;
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize
        };
        let mut accepted = 0;
        for _ in 0..20_000 {
            let mut text = good.to_vec();
            for _ in 0..1 + next() % 4 {
                let at = next() % text.len();
                match next() % 3 {
                    0 => text[at] = pool[next() % pool.len()],
                    1 => drop(text.remove(at)),
                    _ => text.insert(at, pool[next() % pool.len()]),
                }
            }
            if let Ok((config, _)) = LoraConfig::parse(&text, 512) {
                accepted += 1;
                let path = "model.layers.0.self_attn.q_proj";
                let (rank, scale) = (config.rank(path), config.scale(path));
                assert!((1..=512).contains(&rank) && scale.is_finite(), "{}", String::from_utf8_lossy(&text));
            }
        }
        assert!(accepted > 100, "only {accepted} mutants were accepted, seed {SEED:#x}: the test shows little");
    }
}
