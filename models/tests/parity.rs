//! The decoder against candle-transformers, an independent implementation: f32, seeded tiny models, every position.

mod support;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2};
use loramux_kernels::Dtype;
use serde_json::{Value, json};
use std::path::Path;
use support::runner::{Runner, max_difference};
use support::{Random, Stored, changed, tiny_config, tiny_weights};

const SEED: u64 = 0xCA4D_1E01;
const TOLERANCE: f32 = 1e-4;

fn text(config: &Value) -> Vec<u32> {
    let mut random = Random(SEED);
    let vocab = config["vocab_size"].as_u64().expect("a size") as usize;
    (0..29).map(|_| random.below(vocab) as u32).collect()
}

fn candle_weights(dir: &Path) -> VarBuilder<'static> {
    let file = std::fs::read(dir.join("model.safetensors")).expect("just written");
    VarBuilder::from_buffered_safetensors(file, DType::F32, &Device::Cpu).expect("well formed")
}

fn input(tokens: &[u32]) -> Tensor {
    Tensor::new(tokens, &Device::Cpu).and_then(|tokens| tokens.unsqueeze(0)).expect("a tensor")
}

fn last_row(logits: &Tensor) -> Vec<f32> {
    logits.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("one row of logits")
}

fn llama_logits(dir: &Path, config: &Value, tokens: &[u32]) -> Vec<f32> {
    let config: llama::LlamaConfig = serde_json::from_value(config.clone()).expect("a candle config");
    let config = config.into_config(false);
    let model = llama::Llama::load(candle_weights(dir), &config).expect("loads");
    let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu).expect("a cache");
    last_row(&model.forward(&input(tokens), 0, &mut cache).expect("logits"))
}

fn mistral_logits(dir: &Path, config: &Value, tokens: &[u32]) -> Vec<f32> {
    let config: mistral::Config = serde_json::from_value(config.clone()).expect("a candle config");
    let mut model = mistral::Model::new(&config, candle_weights(dir)).expect("loads");
    last_row(&model.forward(&input(tokens), 0).expect("logits"))
}

fn qwen2_logits(dir: &Path, config: &Value, tokens: &[u32]) -> Vec<f32> {
    let config: qwen2::Config = serde_json::from_value(config.clone()).expect("a candle config");
    let mut model = qwen2::ModelForCausalLM::new(&config, candle_weights(dir)).expect("loads");
    last_row(&model.forward(&input(tokens), 0).expect("logits"))
}

/// candle gives the last position only, so every prefix is asked for.
fn check(name: &str, config: &Value, oracle: fn(&Path, &Value, &[u32]) -> Vec<f32>) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    support::write_model(dir.path(), config, &tiny_weights(config, SEED), Stored::F32);
    let tokens = text(config);
    let found = Runner::tiny(dir.path(), Dtype::F32).whole(&tokens, &[]);
    for length in 1..=tokens.len() {
        let want = vec![oracle(dir.path(), config, &tokens[..length])];
        let difference = max_difference(&found[length - 1..length], &want);
        assert!(difference < TOLERANCE, "{name}: position {} differs by {difference}, seed {SEED:#x}", length - 1);
    }
    let spread = found.iter().flatten().fold(0.0f32, |most, v| most.max(v.abs()));
    assert!(spread > 0.5, "{name}: logits up to {spread} only: the test shows nothing");
}

#[test]
fn llama_equals_candle() {
    check("llama", &tiny_config("llama"), llama_logits);
    check("llama tied", &changed(tiny_config("llama"), json!({"tie_word_embeddings": true})), llama_logits);
    let multi_head = json!({"num_key_value_heads": 6, "rope_theta": 500000.0});
    check("llama without grouped heads", &changed(tiny_config("llama"), multi_head), llama_logits);
}

#[test]
fn llama3_rope_scaling_equals_candle() {
    // A short original context, so that within the head's few frequencies some are kept, some blended, some divided.
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64});
    let config = changed(tiny_config("llama"), json!({"rope_scaling": scaling, "rope_theta": 100.0}));
    check("llama3 rope", &config, llama_logits);
}

#[test]
fn mistral_with_a_sliding_window_equals_candle() {
    // candle's window keeps one position more than transformers': `j + window < i` is masked, so w here is w - 1 there.
    let ours = changed(tiny_config("mistral"), json!({"sliding_window": 6}));
    check("mistral", &ours, |dir, config, tokens| {
        let theirs = changed(config.clone(), json!({"sliding_window": 5}));
        mistral_logits(dir, &theirs, tokens)
    });
    check("mistral without a window", &tiny_config("mistral"), mistral_logits);
}

#[test]
fn qwen2_with_biases_equals_candle() {
    let extra = json!({"sliding_window": 64, "max_window_layers": 3, "use_sliding_window": false});
    let config = changed(tiny_config("qwen2"), extra);
    check("qwen2", &config, qwen2_logits);
    check("qwen2 tied", &changed(config, json!({"tie_word_embeddings": true})), qwen2_logits);
}
