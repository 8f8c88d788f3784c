//! What the tests of this crate share: seeded numbers, small model directories, and a shard in miniature.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod adapter;
pub(crate) mod gguf;
pub(crate) mod golden;
pub(crate) mod runner;

use half::{bf16, f16};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// SplitMix64: every random number of the tests comes from a printed seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In `0..end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Uniform in -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn values(&mut self, count: usize, spread: f32) -> Vec<f32> {
        (0..count).map(|_| spread * self.unit()).collect()
    }
}

/// A tensor before it is written.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

pub(crate) type Tensors = BTreeMap<String, Tensor>;

/// Element types a test file can have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Stored {
    F32,
    F16,
    Bf16,
}

impl Stored {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    pub(crate) fn bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        }
    }

    /// What a reader gets back.
    pub(crate) fn round(self, values: &[f32]) -> Vec<f32> {
        match self {
            Self::F32 => values.to_vec(),
            Self::F16 => values.iter().map(|v| f16::from_f32(*v).to_f32()).collect(),
            Self::Bf16 => values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect(),
        }
    }
}

/// A safetensors file from a header and data that need not fit each other.
pub(crate) fn raw_safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// A well-formed safetensors file.
pub(crate) fn safetensors(tensors: &Tensors, stored: Stored) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    for (name, tensor) in tensors {
        let bytes = stored.bytes(&tensor.values);
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({"dtype": stored.name(), "shape": tensor.shape, "data_offsets": offsets}));
        data.extend(bytes);
    }
    raw_safetensors(&Value::Object(header).to_string(), &data)
}

pub(crate) fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) {
    std::fs::write(dir.join(name), content).expect("the temporary directory takes a file");
}

/// A small config: grouped heads, odd-ish sizes, nothing a multiple of a kernel's tile.
pub(crate) fn tiny_config(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "intermediate_size": 88, "vocab_size": 101, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false,
        "sliding_window": null, "hidden_act": "silu"
    })
}

/// The same object with some fields replaced.
pub(crate) fn changed(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().expect("changes are an object") {
        config[key] = value.clone();
    }
    config
}

fn size(config: &Value, field: &str) -> usize {
    config[field].as_u64().expect("a size") as usize
}

/// Names and `[d_out, d_in]` of the seven linear modules of a layer.
pub(crate) fn modules(config: &Value) -> [(&'static str, usize, usize); 7] {
    let (hidden, wide) = (size(config, "hidden_size"), size(config, "intermediate_size"));
    let heads = size(config, "num_attention_heads");
    let head_dim = config["head_dim"].as_u64().map_or(hidden / heads, |dim| dim as usize);
    let (q, kv) = (heads * head_dim, size(config, "num_key_value_heads") * head_dim);
    [
        ("self_attn.q_proj", q, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, q),
        ("mlp.gate_proj", wide, hidden),
        ("mlp.up_proj", wide, hidden),
        ("mlp.down_proj", hidden, wide),
    ]
}

/// Seeded weights of a config's shapes.
pub(crate) fn tiny_weights(config: &Value, seed: u64) -> Tensors {
    let mut random = Random(seed);
    let mut tensors = Tensors::new();
    let (hidden, vocab) = (size(config, "hidden_size"), size(config, "vocab_size"));
    let mut put = |name: String, shape: Vec<usize>, centre: f32, spread: f32| {
        let values = random.values(shape.iter().product(), spread).into_iter().map(|v| centre + v).collect();
        tensors.insert(name, Tensor { shape, values });
    };
    put("model.embed_tokens.weight".to_owned(), vec![vocab, hidden], 0.0, 1.0);
    put("model.norm.weight".to_owned(), vec![hidden], 1.0, 0.3);
    if config["tie_word_embeddings"] == json!(false) {
        put("lm_head.weight".to_owned(), vec![vocab, hidden], 0.0, 0.3);
    }
    for layer in 0..size(config, "num_hidden_layers") {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            put(format!("model.layers.{layer}.{norm}.weight"), vec![hidden], 1.0, 0.3);
        }
        for (module, d_out, d_in) in modules(config) {
            put(format!("model.layers.{layer}.{module}.weight"), vec![d_out, d_in], 0.0, 0.25);
            let biased = config["model_type"] == json!("qwen2")
                && ["q_proj", "k_proj", "v_proj"].iter().any(|m| module.ends_with(m));
            if biased {
                put(format!("model.layers.{layer}.{module}.bias"), vec![d_out], 0.0, 0.5);
            }
        }
    }
    tensors
}

/// Writes a whole model directory.
pub(crate) fn write_model(dir: &Path, config: &Value, tensors: &Tensors, stored: Stored) {
    write(dir, "config.json", config.to_string());
    write(dir, "model.safetensors", safetensors(tensors, stored));
}

/// Linear modules by their short names.
pub(crate) const ALL_MODULES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

pub(crate) fn adapter_config(rank: usize, targets: &[&str]) -> Value {
    json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": targets, "bias": "none", "fan_in_fan_out": false, "use_rslora": false, "use_dora": false,
        "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0, "inference_mode": true
    })
}

/// Seeded LoRA pairs for `targets`, with the rank that `rank_of(layer, short name)` gives.
pub(crate) fn adapter_weights(
    config: &Value,
    targets: &[&str],
    seed: u64,
    rank_of: impl Fn(usize, &str) -> usize,
) -> Tensors {
    let mut random = Random(seed);
    let mut tensors = Tensors::new();
    for layer in 0..size(config, "num_hidden_layers") {
        for (module, d_out, d_in) in modules(config) {
            let short = module.rsplit('.').next().expect("a module has a name");
            if !targets.contains(&short) {
                continue;
            }
            let rank = rank_of(layer, short);
            let name = |side: char| format!("base_model.model.model.layers.{layer}.{module}.lora_{side}.weight");
            // The product keeps its size at any rank, so that every adapter changes the output and none drowns it.
            let spread = 0.2 / (rank as f32).sqrt();
            tensors.insert(name('A'), Tensor { shape: vec![rank, d_in], values: random.values(rank * d_in, 0.3) });
            tensors.insert(name('B'), Tensor { shape: vec![d_out, rank], values: random.values(d_out * rank, spread) });
        }
    }
    tensors
}

pub(crate) fn write_adapter(dir: &Path, config: &Value, tensors: &Tensors, stored: Stored) {
    std::fs::create_dir_all(dir).expect("the temporary directory takes a directory");
    write(dir, "adapter_config.json", config.to_string());
    write(dir, "adapter_model.safetensors", safetensors(tensors, stored));
}

/// Base weights with `scale * B A` added in f64: what an adapter means.
pub(crate) fn merged(base: &Tensors, adapter: &Tensors, scale_of: impl Fn(&str, usize) -> f64) -> Tensors {
    let mut out = base.clone();
    for (name, a) in adapter.iter().filter(|(name, _)| name.ends_with(".lora_A.weight")) {
        let path = name.trim_start_matches("base_model.model.").trim_end_matches(".lora_A.weight");
        let b = &adapter[&name.replace("lora_A", "lora_B")];
        let (rank, d_in, d_out) = (a.shape[0], a.shape[1], b.shape[0]);
        let weight = out.get_mut(&format!("{path}.weight")).expect("the module exists");
        let scale = scale_of(path, rank);
        for o in 0..d_out {
            for i in 0..d_in {
                let delta: f64 =
                    (0..rank).map(|r| f64::from(b.values[o * rank + r]) * f64::from(a.values[r * d_in + i])).sum();
                let value = &mut weight.values[o * d_in + i];
                *value = (f64::from(*value) + scale * delta) as f32;
            }
        }
    }
    out
}
