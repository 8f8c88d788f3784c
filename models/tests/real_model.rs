//! SmolLM2-135M-Instruct and three trained adapters against transformers + PEFT (golden file, float32).
//!
//! Reads `LORAMUX_REAL_MODEL_DIR` (a Hugging Face directory), `LORAMUX_REAL_ADAPTERS_DIR`, `LORAMUX_REAL_GOLDEN` (the golden
//! file) and `LORAMUX_REAL_GGUF` (the same model as GGUF). `LORAMUX_REAL_ISA` names the instructions to use (`--cpu-isa`). A part whose variables are not set prints that it was skipped.
//!
//! All cases run as one batch, base rows beside rows of every adapter. A mismatch is a bug unless the two best logits of
//! that step are nearer than rounding (the golden file's margin); what follows such a step is another text.

mod support;

use loramux_kernels::{ArenaDtype, Dtype, isa_name, set_isa};
use loramux_models::text_files;
use serde_json::Value;
use std::path::{Path, PathBuf};
use support::golden::{Case, Tolerance, check, ids, publish_all, tokens};
use support::runner::{Runner, Sequence};

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from)
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

/// The checkpoint is bf16, so bf16 weights lose nothing; a bf16 arena rounds every key and value of 30 layers, and the queries
/// and attention weights that meet them, which shows most in improbable tokens. Instructions that multiply pairs of bf16 round
/// the inputs of every product too.
fn tolerances() -> [Tolerance; 3] {
    let (margin, logprob) = if isa_name().ends_with("bf16") { (0.2, 0.25) } else { (0.05, 2e-2) };
    [
        Tolerance { dtype: Some(Dtype::F32), kv: ArenaDtype::F32, margin: 1e-3, logprob: 1e-3 },
        Tolerance { dtype: Some(Dtype::Bf16), kv: ArenaDtype::F32, margin, logprob },
        Tolerance { dtype: Some(Dtype::Bf16), kv: ArenaDtype::Bf16, margin: 0.2, logprob: 0.25 },
    ]
}

#[test]
fn greedy_tokens_and_logprobs_equal_transformers_and_peft() {
    let names = ["LORAMUX_REAL_MODEL_DIR", "LORAMUX_REAL_ADAPTERS_DIR", "LORAMUX_REAL_GOLDEN"];
    let [Some(model), Some(adapters), Some(golden_file)] = names.map(variable) else {
        println!("SKIPPED: the real model was not compared with transformers + PEFT: set {}", names.join(", "));
        return;
    };
    let cases = golden(&golden_file);
    assert!(cases.iter().any(|case| case.adapter.is_none()) && cases.iter().any(|case| case.adapter.is_some()));
    if let Ok(isa) = std::env::var("LORAMUX_REAL_ISA")
        && let Err(error) = set_isa(&isa)
    {
        println!("SKIPPED: {isa} was not compared with transformers + PEFT: {error}");
        return;
    }
    println!("instructions: {}", isa_name());
    for tolerance in tolerances() {
        let compared = check(&model, &adapters, &cases, &tolerance);
        assert!(compared * 10 > tokens(&cases) * 8, "only {compared} tokens were equal before a near tie");
    }
}

/// Activations that are rounded to 8 bits, as in llama.cpp, move a log-probability further than 16-bit weights do.
const QUANTISED: Tolerance = Tolerance { dtype: None, kv: ArenaDtype::Bf16, margin: 0.5, logprob: 0.8 };

#[test]
fn a_gguf_whose_weights_stay_quantised_follows_the_golden_file() {
    let names = ["LORAMUX_REAL_GGUF", "LORAMUX_REAL_ADAPTERS_DIR", "LORAMUX_REAL_GOLDEN"];
    let [Some(gguf), Some(adapters), Some(golden_file)] = names.map(variable) else {
        println!("SKIPPED: quantised weights were not compared with transformers + PEFT: set {}", names.join(", "));
        return;
    };
    let cases = golden(&golden_file);
    let compared = check(&gguf, &adapters, &cases, &QUANTISED);
    assert!(compared * 2 > tokens(&cases), "only {compared} tokens were equal before a near tie");
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
