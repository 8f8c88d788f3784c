//! What PEFT trains beyond pairs of linear modules, against transformers + PEFT: DoRA, biases, LoRA on the embedding and the
//! head, modules trained as a whole. The adapters and the numbers are in `data/peft`, made by `data/make_peft_golden.py`.

mod support;

use loramux_kernels::{Dtype, SlotScale};
use loramux_models::adapter::{self, AdapterLimits, PeftAdapter};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use support::runner::{Runner, Sequence, max_difference};
use support::{Stored, changed, tiny_config, tiny_weights, write_model};

const SEED: u64 = 0xFEA7_0001;
const MODELS: [&str; 3] = ["llama", "tied", "qwen2"];

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft")
}

/// A prompt under some adapters, and what the reference computed.
struct Case {
    adapters: Vec<(String, f32)>,
    prompt: Vec<u32>,
    output: Vec<u32>,
    margins: Vec<f64>,
    /// After the prompt.
    logits: Vec<f32>,
    /// Of each step, a few tokens and their logprobs.
    top: Vec<Vec<(u32, f32)>>,
}

fn numbers<T>(value: &Value, of: impl Fn(&Value) -> T) -> Vec<T> {
    value.as_array().expect("a list").iter().map(of).collect()
}

fn float(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn id(value: &Value) -> u32 {
    value.as_u64().expect("a token") as u32
}

fn cases(model: &str) -> Vec<Case> {
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(data().join("golden.json")).expect("the file")).expect("JSON");
    let of_model = golden["cases"].as_array().expect("cases").iter().filter(|case| case["model"] == model);
    let case = |case: &Value| Case {
        adapters: numbers(&case["adapters"], |part| {
            (part[0].as_str().expect("a name").to_owned(), float(&part[1]) as f32)
        }),
        prompt: numbers(&case["prompt"], id),
        output: numbers(&case["output"], id),
        margins: numbers(&case["margins"], float),
        logits: numbers(&case["logits"], |value| float(value) as f32),
        top: numbers(&case["top"], |step| numbers(step, |pair| (id(&pair[0]), float(&pair[1]) as f32))),
    };
    of_model.map(case).collect()
}

/// Writes a base model of the golden file.
fn base(dir: &Path, model: &str, stored: Stored) {
    let (kind, tied) = (if model == "qwen2" { "qwen2" } else { "llama" }, model == "tied");
    let config = changed(tiny_config(kind), json!({"tie_word_embeddings": tied}));
    write_model(dir, &config, &tiny_weights(&config, SEED), stored);
}

fn read(runner: &Runner, name: &str) -> PeftAdapter {
    adapter::read(&data().join(name), runner.decoder.spec(), &AdapterLimits::default())
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The base with every adapter of its cases published.
fn world(dir: &Path, model: &str, dtype: Dtype, cases: &[Case]) -> (Runner, BTreeMap<String, SlotScale>) {
    base(dir, model, Stored::F32);
    let mut runner = Runner::new(dir, Some(dtype), 64 << 10, 1024);
    let mut slots = BTreeMap::new();
    for (name, _) in cases.iter().flat_map(|case| &case.adapters) {
        if !slots.contains_key(name) {
            let adapter = read(&runner, name);
            slots.insert(name.clone(), runner.publish(&adapter));
        }
    }
    (runner, slots)
}

fn used(case: &Case, slots: &BTreeMap<String, SlotScale>) -> Vec<SlotScale> {
    case.adapters.iter().map(|(name, scale)| SlotScale { scale: *scale, ..slots[name] }).collect()
}

fn logprob(logits: &[f32], token: u32) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    logits[token as usize] - max - sum.ln() as f32
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32
}

/// Generates all cases greedily in one batch; returns the worst difference of a logit after the prompt.
fn generate(model: &str, cases: &[Case], dtype: Dtype, tolerance: f32) -> f32 {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (mut runner, slots) = world(dir.path(), model, dtype, cases);
    let mut sequences: Vec<Sequence> =
        cases.iter().map(|case| Sequence::new(&case.prompt, &used(case, &slots))).collect();
    let (mut worst, mut going, mut compared) = (0.0f32, vec![true; cases.len()], 0);
    for step in 0..cases[0].output.len() {
        let mut chunks = Vec::new();
        for sequence in &mut sequences {
            let rows = sequence.tokens.len() - sequence.computed;
            chunks.push((sequence, rows));
        }
        let logits = runner.step_last(&mut chunks);
        for (i, (case, logits)) in cases.iter().zip(&logits).enumerate() {
            let what = format!("{model} {dtype:?} {:?} step {step}", case.adapters);
            if step == 0 {
                let difference = max_difference(std::slice::from_ref(logits), std::slice::from_ref(&case.logits));
                assert!(difference < tolerance, "{what}: logits differ by {difference}");
                worst = worst.max(difference);
            }
            for &(token, want) in case.top[step].iter().filter(|_| going[i]) {
                let difference = (logprob(logits, token) - want).abs();
                assert!(difference < tolerance, "{what}: logprob of {token} differs by {difference}");
            }
            let token = argmax(logits);
            if token != case.output[step] && going[i] {
                let margin = case.margins[step];
                assert!(
                    margin < 2.0 * f64::from(tolerance),
                    "{what}: {token}, not {}, margin {margin}",
                    case.output[step]
                );
                going[i] = false;
            }
            compared += usize::from(going[i]);
            sequences[i].tokens.push(token);
        }
    }
    let all = cases.len() * cases[0].output.len();
    println!("{model} {dtype:?}: {compared} of {all} tokens equal, worst logit difference {worst:.2e}");
    assert!(compared * 2 > all, "{model}: only {compared} tokens were equal before a near tie");
    worst
}

#[test]
fn every_feature_alone_and_together_equals_transformers_and_peft() {
    for model in MODELS {
        let cases = cases(model);
        assert!(cases.iter().any(|case| case.adapters.is_empty()) && cases.iter().any(|case| case.adapters.len() > 1));
        generate(model, &cases, Dtype::F32, 1e-4);
    }
}

/// Base and adapters in bfloat16: the golden run is float32, and the rounded base alone differs from it.
#[test]
fn with_rounded_storage_the_features_stay_as_close_as_the_base() {
    for model in MODELS {
        let (base, adapted): (Vec<Case>, Vec<Case>) =
            cases(model).into_iter().partition(|case| case.adapters.is_empty());
        let of_base = generate(model, &base, Dtype::Bf16, 0.25);
        let of_adapted = generate(model, &adapted, Dtype::Bf16, 0.25);
        assert!(of_adapted < 6.0 * of_base, "{model}: {of_adapted}, the base alone {of_base}");
    }
}

#[test]
fn a_row_in_a_mixed_batch_equals_that_row_alone_bit_for_bit() {
    for (model, dtype) in [("llama", Dtype::F32), ("llama", Dtype::Bf16), ("tied", Dtype::F32), ("qwen2", Dtype::Bf16)]
    {
        let cases = cases(model);
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (mut runner, slots) = world(dir.path(), model, dtype, &cases);
        let alone: Vec<Vec<Vec<f32>>> =
            cases.iter().map(|case| runner.whole(&case.prompt, &used(case, &slots))).collect();
        let mut sequences: Vec<Sequence> =
            cases.iter().map(|case| Sequence::new(&case.prompt, &used(case, &slots))).collect();
        let mut chunks: Vec<(&mut Sequence, usize)> = Vec::new();
        for sequence in &mut sequences {
            let rows = sequence.tokens.len();
            chunks.push((sequence, rows));
        }
        let together = runner.step(&mut chunks);
        let mut first = 0;
        for (case, alone) in cases.iter().zip(&alone) {
            assert_eq!(alone[..], together[first..first + alone.len()], "{model} {dtype:?} {:?}", case.adapters);
            first += alone.len();
        }
    }
}

#[test]
fn an_adapter_says_what_it_uses() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (model, name, features, modules) in [
        ("llama", "plain", vec![], vec!["q_proj", "v_proj"]),
        ("llama", "dora-bf16", vec!["rslora", "dora"], vec!["q_proj", "o_proj", "up_proj"]),
        ("llama", "lora-bias", vec!["lora_bias"], vec!["q_proj", "k_proj", "down_proj"]),
        ("llama", "ends-dora", vec!["dora", "embed_tokens", "lm_head"], vec!["q_proj", "embed_tokens", "lm_head"]),
        ("llama", "save-head", vec!["modules_to_save"], vec!["q_proj"]),
        ("qwen2", "qwen-dora-bias", vec!["dora", "bias"], vec!["q_proj", "v_proj", "down_proj"]),
    ] {
        base(dir.path(), model, Stored::F32);
        let runner = Runner::tiny(dir.path(), Dtype::F32);
        let adapter = read(&runner, name);
        assert_eq!(
            (&adapter.features, &adapter.module_names),
            (&features, &modules.iter().map(|m| (*m).to_owned()).collect()),
            "{name}"
        );
        assert_eq!(adapter.needs_base(), !matches!(name, "plain" | "lora-bias"), "{name}");
    }
}

#[test]
fn without_the_bases_weights_or_with_others_the_adapter_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    base(dir.path(), "llama", Stored::F32);
    let runner = Runner::tiny(dir.path(), Dtype::F32);
    for name in ["dora", "save-head", "ends-saved"] {
        let error = read(&runner, name).pack(Dtype::F32, 64 << 10).expect_err("it needs the base");
        assert_eq!(error.code(), "adapter_load_failed", "{name}: {error}");
    }
    let files = runner.base.clone().expect("loaded from files");
    // The same shapes with other values: a copy of the embedding no longer is one, and the files are not those loaded.
    let config = tiny_config("llama");
    write_model(dir.path(), &config, &tiny_weights(&config, SEED + 1), Stored::F32);
    let other = Runner::tiny(dir.path(), Dtype::F32);
    let refused = |name: &str, runner: &Runner| {
        let base = runner.base.as_ref().expect("loaded from files");
        read(runner, name).pack_onto(Dtype::F32, 64 << 10, base).expect_err("refused")
    };
    let error = refused("ends-saved", &other);
    assert_eq!(error.code(), "adapter_unsupported");
    assert!(error.to_string().contains("embed_tokens.base_layer.weight"), "{error}");
    write_model(
        dir.path(),
        &changed(config.clone(), json!({"rope_theta": 5000.0})),
        &tiny_weights(&config, SEED),
        Stored::F32,
    );
    let error = read(&runner, "dora").pack_onto(Dtype::F32, 64 << 10, &files).expect_err("changed files");
    assert!(error.code() == "adapter_load_failed" && error.to_string().contains("changed"), "{error}");
}

#[test]
fn a_vocabulary_larger_than_a_tile_of_the_head_is_served_in_pieces() {
    use support::{Tensor, adapter_config, adapter_weights, write_adapter};
    let dir = tempfile::tempdir().expect("a temporary directory");
    let vocab = 8192 + 40;
    let config = changed(tiny_config("llama"), json!({"vocab_size": vocab, "num_hidden_layers": 1}));
    let weights = tiny_weights(&config, SEED);
    write_model(&dir.path().join("."), &config, &weights, Stored::F32);
    // The same head, as a difference of nothing but two rows: one in each tile.
    let mut head = weights["lm_head.weight"].clone();
    for row in [3, 8200] {
        head.values[row * 48..][..48].iter_mut().for_each(|value| *value += 1.0);
    }
    let mut tensors = adapter_weights(&config, &["q_proj"], SEED, |_, _| 2);
    tensors.values_mut().for_each(|tensor: &mut Tensor| tensor.values.fill(0.0));
    tensors.insert("base_model.model.lm_head.weight".to_owned(), head);
    let saved = changed(adapter_config(2, &["q_proj"]), json!({"modules_to_save": ["lm_head"]}));
    write_adapter(&dir.path().join("saved"), &saved, &tensors, Stored::F32);
    let mut runner = Runner::new(dir.path(), Some(Dtype::F32), 1 << 20, 64);
    let adapter = adapter::read(&dir.path().join("saved"), runner.decoder.spec(), &AdapterLimits::default());
    let slot = runner.publish(&adapter.unwrap_or_else(|error| panic!("{error}")));
    let (plain, with) = (runner.whole(&[5, 8201], &[]), runner.whole(&[5, 8201], &[slot]));
    for (plain, with) in plain.iter().zip(&with) {
        let moved: Vec<usize> = (0..vocab).filter(|&token| (plain[token] - with[token]).abs() > 1e-4).collect();
        assert_eq!(moved, [3, 8200]);
    }
}
