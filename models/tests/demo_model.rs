//! The demo model of this repository and its adapters against transformers + PEFT (`demo/golden.json`): base rows and rows
//! of every adapter in one batch. Needs nothing but the repository.

mod support;

use loramux_kernels::{ArenaDtype, Dtype};
use loramux_models::text_files;
use serde_json::Value;
use std::path::{Path, PathBuf};
use support::golden::{Case, Tolerance, check, ids, tokens};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo")
}

fn golden() -> Value {
    let text = std::fs::read_to_string(demo().join("golden.json")).expect("demo/golden.json");
    serde_json::from_str(&text).expect("JSON")
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

/// The log-probability of every chosen token is compared.
fn case(case: &Value) -> Case {
    let output = ids(&case["ids"]);
    let chosen = output.iter().zip(numbers(&case["logprobs"])).map(|(&id, logprob)| vec![(id, logprob as f32)]);
    Case {
        adapter: case["adapter"].as_str().map(str::to_owned),
        prompt: ids(&case["prompt_ids"]),
        margin: numbers(&case["margins"]),
        top: chosen.collect(),
        output,
    }
}

#[test]
fn greedy_tokens_and_logprobs_equal_transformers_and_peft() {
    let cases: Vec<Case> = golden()["cases"].as_array().expect("cases").iter().map(case).collect();
    assert!(cases.iter().any(|case| case.adapter.is_none()) && cases.iter().any(|case| case.adapter.is_some()));
    let tolerance = Tolerance { dtype: Some(Dtype::F32), kv: ArenaDtype::F32, margin: 1e-3, logprob: 1e-3 };
    let compared = check(&demo().join("base"), &demo().join("adapters"), &cases, &tolerance);
    assert!(compared * 10 > tokens(&cases) * 9, "only {compared} tokens were equal before a near tie");
}

#[test]
fn the_tokenizer_gives_the_golden_ids() {
    let text = text_files(&demo().join("base")).unwrap_or_else(|error| panic!("{error}"));
    let tokenizer: tokenizers::Tokenizer = text.tokenizer_json.parse().unwrap_or_else(|error| panic!("{error}"));
    for case in golden()["cases"].as_array().expect("cases") {
        let prompt = case["prompt"].as_str().expect("text");
        let found = tokenizer.encode(prompt, true).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(found.get_ids(), ids(&case["prompt_ids"]), "{prompt}");
    }
}
