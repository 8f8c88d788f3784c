//! SmolLM2-135M-Instruct and three trained adapters against transformers + PEFT (golden file, float32).
//!
//! Reads `LORAMUX_REAL_MODEL_DIR` (a Hugging Face directory), `LORAMUX_REAL_ADAPTERS_DIR`, `LORAMUX_REAL_GOLDEN` (the golden
//! file) and `LORAMUX_REAL_GGUF` (the same model as GGUF). A part whose variables are not set prints that it was skipped.
//!
//! All cases run as one batch, base rows beside rows of every adapter. A mismatch is a bug unless the two best logits of
//! that step are nearer than rounding (the golden file's margin); what follows such a step is another text.

mod support;

use loramux_kernels::{Dtype, SlotScale};
use loramux_models::adapter::{self, AdapterLimits};
use loramux_models::text_files;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use support::runner::{Runner, Sequence};

/// One prompt with one adapter, or none.
struct Case {
    adapter: Option<String>,
    prompt: Vec<u32>,
    output: Vec<u32>,
    margin: Vec<f64>,
    top: Vec<Vec<(u32, f32)>>,
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from)
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn golden(path: &Path) -> Vec<Case> {
    let text = std::fs::read_to_string(path).expect("the golden file");
    let root: Value = serde_json::from_str(&text).expect("JSON");
    let cases = root["cases"].as_array().expect("cases").iter();
    let top = |step: &Value| {
        let pairs = step.as_array().expect("five pairs").iter();
        pairs
            .map(|pair| (pair[0].as_u64().expect("an id") as u32, pair[1].as_f64().expect("a number") as f32))
            .collect()
    };
    let case = |case: &Value| Case {
        adapter: case["adapter"].as_str().map(str::to_owned),
        prompt: ids(&case["prompt_ids"]),
        output: ids(&case["output_ids"]),
        margin: case["margin"].as_array().expect("margins").iter().map(|m| m.as_f64().expect("a number")).collect(),
        top: case["top5_logprobs"].as_array().expect("steps").iter().map(top).collect(),
    };
    cases.map(case).collect()
}

fn logprob(logits: &[f32], token: u32) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    logits[token as usize] - max - sum.ln() as f32
}

fn argmax(logits: &[f32]) -> u32 {
    let best =
        logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &v)| if v > best.1 { (i, v) } else { best });
    best.0 as u32
}

/// What a storage type may change: the golden run is float32.
struct Tolerance {
    dtype: Dtype,
    kv: Dtype,
    /// Steps with a smaller gap between the two best logits may go either way.
    margin: f64,
    logprob: f32,
}

fn publish_all(runner: &mut Runner, adapters: &Path, cases: &[Case]) -> BTreeMap<String, SlotScale> {
    let mut slots = BTreeMap::new();
    for name in cases.iter().filter_map(|case| case.adapter.as_ref()) {
        if !slots.contains_key(name) {
            let adapter = adapter::read(&adapters.join(name), runner.decoder.spec(), &AdapterLimits::default());
            let adapter = adapter.unwrap_or_else(|error| panic!("{name}: {error}"));
            slots.insert(name.clone(), runner.publish(&adapter));
        }
    }
    slots
}

/// Runs every case greedily in one batch. Returns how many tokens were compared.
fn check(model: &Path, adapters: &Path, cases: &[Case], tolerance: &Tolerance) -> usize {
    let mut runner = Runner::new(model, Some(tolerance.dtype), 2 << 20, 600).with_kv(tolerance.kv);
    let slots = publish_all(&mut runner, adapters, cases);
    let mut sequences: Vec<Sequence> = cases
        .iter()
        .map(|case| Sequence::new(&case.prompt, &case.adapter.iter().map(|name| slots[name]).collect::<Vec<_>>()))
        .collect();
    let (mut going, mut compared, mut worst) = (vec![true; cases.len()], 0, 0.0f32);
    for step in 0..32 {
        let mut chunks: Vec<(&mut Sequence, usize)> = sequences
            .iter_mut()
            .map(|sequence| {
                let rows = sequence.tokens.len() - sequence.computed;
                (sequence, rows)
            })
            .collect();
        let logits = runner.step_last(&mut chunks);
        for (i, (case, logits)) in cases.iter().zip(&logits).enumerate() {
            let token = argmax(logits);
            sequences[i].tokens.push(token);
            if !going[i] {
                continue;
            }
            let what = format!("{tolerance} case {i} ({:?}) step {step}", case.adapter);
            if let Some(top) = case.top.get(step) {
                for &(id, want) in top {
                    let difference = (logprob(logits, id) - want).abs();
                    worst = worst.max(difference);
                    assert!(
                        difference < tolerance.logprob,
                        "{what}: logprob of {id} differs by {difference} from {want}"
                    );
                }
            }
            if token == case.output[step] {
                compared += 1;
            } else {
                let margin = case.margin[step];
                assert!(margin < tolerance.margin, "{what}: {token} instead of {}, margin {margin}", case.output[step]);
                going[i] = false;
            }
        }
    }
    println!("{tolerance}: {compared} of {} tokens equal, worst logprob difference {worst:.2e}", 32 * cases.len());
    compared
}

impl std::fmt::Display for Tolerance {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(formatter, "weights {:?}, cache {:?}:", self.dtype, self.kv)
    }
}

/// The checkpoint is bf16, so bf16 weights lose nothing; the f16 adapters are rounded, and a bf16 cache rounds every key
/// and value of 30 layers, which shows most in improbable tokens.
const TOLERANCES: [Tolerance; 3] = [
    Tolerance { dtype: Dtype::F32, kv: Dtype::F32, margin: 1e-3, logprob: 1e-3 },
    Tolerance { dtype: Dtype::Bf16, kv: Dtype::F32, margin: 0.05, logprob: 2e-2 },
    Tolerance { dtype: Dtype::Bf16, kv: Dtype::Bf16, margin: 0.05, logprob: 1e-1 },
];

#[test]
fn greedy_tokens_and_logprobs_equal_transformers_and_peft() {
    let names = ["LORAMUX_REAL_MODEL_DIR", "LORAMUX_REAL_ADAPTERS_DIR", "LORAMUX_REAL_GOLDEN"];
    let [Some(model), Some(adapters), Some(golden_file)] = names.map(variable) else {
        println!("SKIPPED: the real model was not compared with transformers + PEFT: set {}", names.join(", "));
        return;
    };
    let cases = golden(&golden_file);
    assert!(cases.iter().any(|case| case.adapter.is_none()) && cases.iter().any(|case| case.adapter.is_some()));
    for tolerance in TOLERANCES {
        let compared = check(&model, &adapters, &cases, &tolerance);
        assert!(compared * 10 > 32 * cases.len() * 9, "only {compared} tokens were equal before a near tie");
    }
}

#[test]
fn the_gguf_equals_the_directory_made_from_it() {
    let names = ["LORAMUX_REAL_MODEL_DIR", "LORAMUX_REAL_GGUF", "LORAMUX_REAL_GOLDEN", "LORAMUX_REAL_ADAPTERS_DIR"];
    let [Some(model), Some(gguf), Some(golden_file), Some(adapters)] = names.map(variable) else {
        println!("SKIPPED: the real GGUF was not compared with its directory: set {}", names.join(", "));
        return;
    };
    let cases = golden(&golden_file);
    let [from_gguf, from_directory] = [&gguf, &model].map(|path| {
        // The directory holds the dequantised values rounded to bf16, so bf16 storage makes both the same numbers.
        let mut runner = Runner::new(path, Some(Dtype::Bf16), 2 << 20, 600);
        let slots = publish_all(&mut runner, &adapters, &cases);
        let with_adapter = |case: &Case| case.adapter.iter().map(|name| slots[name]).collect::<Vec<_>>();
        let picked = cases.iter().step_by(5).map(|case| (case.prompt.clone(), with_adapter(case))).collect::<Vec<_>>();
        picked
            .into_iter()
            .map(|(prompt, adapters)| {
                let mut sequence = Sequence::new(&prompt, &adapters);
                runner.step_last(&mut [(&mut sequence, prompt.len())])
            })
            .collect::<Vec<_>>()
    });
    assert_eq!(from_gguf, from_directory);
}

#[test]
fn the_ggufs_tokenizer_gives_the_golden_ids() {
    let names = ["LORAMUX_REAL_GGUF", "LORAMUX_REAL_MODEL_DIR", "LORAMUX_REAL_GOLDEN"];
    let [Some(gguf), Some(model), Some(golden_file)] = names.map(variable) else {
        println!("SKIPPED: the real GGUF's tokenizer was not compared: set {}", names.join(", "));
        return;
    };
    let root: Value =
        serde_json::from_str(&std::fs::read_to_string(golden_file).expect("the golden file")).expect("JSON");
    for path in [&gguf, &model] {
        let text = text_files(path).unwrap_or_else(|error| panic!("{error}"));
        let tokenizer: tokenizers::Tokenizer = text.tokenizer_json.parse().unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((text.config_bos, &text.config_eos[..]), (Some(1), &[2][..]), "{}", path.display());
        assert!(text.chat_template.is_some_and(|template| template.contains("<|im_start|>")));
        for case in root["cases"].as_array().expect("cases") {
            let prompt = case["prompt"].as_str().expect("text");
            let found = tokenizer.encode(prompt, true).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(found.get_ids(), ids(&case["prompt_ids"]), "{}: {prompt}", path.display());
            let output = tokenizer.decode(&ids(&case["output_ids"]), false).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(output, case["output_text"].as_str().expect("text"), "{}", path.display());
        }
    }
}
