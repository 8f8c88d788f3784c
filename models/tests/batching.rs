//! What a batch may not change: a row gets what it gets alone, however it is cut and whoever is beside it; and an adapter
//! applied beside the base is the model with the adapter merged in.

mod support;

use loramux_kernels::{Dtype, SlotScale};
use loramux_models::adapter::{self, AdapterLimits, PeftAdapter};
use serde_json::json;
use std::path::Path;
use support::runner::{Runner, Sequence, max_difference};
use support::{
    ALL_MODULES, Random, Stored, adapter_config, adapter_weights, changed, merged, tiny_config, tiny_weights,
};

const SEED: u64 = 0x10AD_0001;

/// The adapters of these tests: ranks below, at and above a rank block, all modules and few, both scales.
const ADAPTERS: [(&str, usize, &[&str]); 6] = [
    ("r1-qv", 1, &["q_proj", "v_proj"]),
    ("r8-all", 8, &ALL_MODULES),
    ("r16-mlp", 16, &["gate_proj", "up_proj", "down_proj"]),
    ("r17-all", 17, &ALL_MODULES),
    ("r33-ko", 33, &["k_proj", "o_proj"]),
    ("r64-all", 64, &ALL_MODULES),
];

fn prompt(random: &mut Random, tokens: usize) -> Vec<u32> {
    (0..tokens).map(|_| random.below(101) as u32).collect()
}

fn read(dir: &Path, runner: &Runner) -> PeftAdapter {
    adapter::read(dir, runner.decoder.spec(), &AdapterLimits::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// A tiny model with all of [`ADAPTERS`] published.
fn world(dir: &Path, model_type: &str, dtype: Dtype) -> (Runner, Vec<SlotScale>) {
    let config = changed(
        tiny_config(model_type),
        json!({"sliding_window": if model_type == "mistral" { Some(7) } else { None }}),
    );
    support::write_model(dir, &config, &tiny_weights(&config, SEED), Stored::F32);
    let mut runner = Runner::tiny(dir, dtype);
    let mut slots = Vec::new();
    for (i, (name, rank, targets)) in ADAPTERS.iter().enumerate() {
        let weights = adapter_weights(&config, targets, SEED + i as u64, |_, _| *rank);
        support::write_adapter(&dir.join(name), &adapter_config(*rank, targets), &weights, Stored::F32);
        let adapter = read(&dir.join(name), &runner);
        slots.push(runner.publish(&adapter));
    }
    (runner, slots)
}

#[test]
fn a_row_in_a_mixed_batch_equals_that_row_alone_bit_for_bit() {
    for (model_type, dtype) in [("llama", Dtype::F32), ("mistral", Dtype::Bf16), ("qwen2", Dtype::F32)] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (mut runner, slots) = world(dir.path(), model_type, dtype);
        let mut random = Random(SEED);
        // Base rows, each adapter once, one adapter twice, and two adapters on one row.
        let mut mixes: Vec<Vec<SlotScale>> =
            vec![vec![], vec![slots[3]], vec![slots[3]], vec![slots[1], slots[4]], vec![]];
        mixes.extend(slots.iter().map(|slot| vec![SlotScale { scale: 0.7, ..*slot }]));
        let prompts: Vec<Vec<u32>> =
            mixes.iter().map(|_| 1 + random.below(21)).map(|n| prompt(&mut Random(n as u64), n)).collect();
        let alone: Vec<Vec<Vec<f32>>> =
            prompts.iter().zip(&mixes).map(|(prompt, mix)| runner.whole(prompt, mix)).collect();
        let mut sequences: Vec<Sequence> =
            prompts.iter().zip(&mixes).map(|(prompt, mix)| Sequence::new(prompt, mix)).collect();
        let mut chunks: Vec<(&mut Sequence, usize)> = sequences
            .iter_mut()
            .map(|sequence| {
                let rows = sequence.tokens.len();
                (sequence, rows)
            })
            .collect();
        let together = runner.step(&mut chunks);
        let mut first = 0;
        for (i, alone) in alone.iter().enumerate() {
            assert_eq!(
                alone[..],
                together[first..first + alone.len()],
                "{model_type} {dtype:?}: sequence {i}, seed {SEED:#x}"
            );
            first += alone.len();
        }
    }
}

#[test]
fn decoding_beside_others_equals_decoding_alone_bit_for_bit() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (mut runner, slots) = world(dir.path(), "llama", Dtype::Bf16);
    let mut random = Random(SEED);
    let texts: Vec<Vec<u32>> = (0..slots.len()).map(|_| prompt(&mut random, 15)).collect();
    let alone: Vec<Vec<Vec<f32>>> = texts.iter().zip(&slots).map(|(text, slot)| runner.whole(text, &[*slot])).collect();
    let mut sequences: Vec<Sequence> =
        texts.iter().zip(&slots).map(|(text, slot)| Sequence::new(text, &[*slot])).collect();
    // Each starts its decode one step after the one before, so prefills and decodes share every step.
    for step in 0..12 + slots.len() {
        let mut chunks: Vec<(&mut Sequence, usize)> = Vec::new();
        let mut rows = Vec::new();
        for (i, sequence) in sequences.iter_mut().enumerate() {
            let count = if step == i { 3 } else { 1 };
            if step >= i && sequence.computed + count <= sequence.tokens.len() {
                rows.extend((sequence.computed..sequence.computed + count).map(|row| (i, row)));
                chunks.push((sequence, count));
            }
        }
        if chunks.is_empty() {
            continue;
        }
        for ((i, row), logits) in rows.into_iter().zip(runner.step(&mut chunks)) {
            assert_eq!(logits, alone[i][row], "sequence {i} row {row} step {step}, seed {SEED:#x}");
        }
    }
    assert!(sequences.iter().all(|sequence| sequence.computed == 15));
}

#[test]
fn a_prefill_in_chunks_equals_one_shot_bit_for_bit() {
    for (model_type, dtype) in [("llama", Dtype::F32), ("mistral", Dtype::Bf16)] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (mut runner, slots) = world(dir.path(), model_type, dtype);
        let text = prompt(&mut Random(SEED), 37);
        for adapters in [&[][..], &slots[3..4]] {
            let whole = runner.whole(&text, adapters);
            for chunk in [1, 3, 4, 5, 16, 36] {
                let mut sequence = Sequence::new(&text, adapters);
                let mut cut = Vec::new();
                while sequence.computed < text.len() {
                    let rows = chunk.min(text.len() - sequence.computed);
                    cut.extend(runner.step(&mut [(&mut sequence, rows)]));
                }
                assert_eq!(whole, cut, "{model_type} {dtype:?}: chunks of {chunk}, seed {SEED:#x}");
            }
        }
    }
}

#[test]
fn a_batch_with_adapters_equals_models_with_merged_weights() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (mut runner, slots) = world(dir.path(), "qwen2", Dtype::F32);
    let config = tiny_config("qwen2");
    let base = tiny_weights(&config, SEED);
    let text = prompt(&mut Random(SEED), 23);
    let base_logits = runner.whole(&text, &[]);
    let mut sequences: Vec<Sequence> = slots.iter().map(|slot| Sequence::new(&text, &[*slot])).collect();
    let mut chunks: Vec<(&mut Sequence, usize)> = sequences.iter_mut().map(|sequence| (sequence, text.len())).collect();
    let together = runner.step(&mut chunks);
    for (i, (name, rank, targets)) in ADAPTERS.iter().enumerate() {
        let weights = adapter_weights(&config, targets, SEED + i as u64, |_, _| *rank);
        let merged_dir = dir.path().join(format!("merged-{name}"));
        std::fs::create_dir(&merged_dir).expect("a directory");
        support::write_model(&merged_dir, &config, &merged(&base, &weights, |_, _| 2.0), Stored::F32);
        let want = Runner::tiny(&merged_dir, Dtype::F32).whole(&text, &[]);
        let found = &together[i * text.len()..][..text.len()];
        let difference = max_difference(found, &want);
        assert!(difference < 2e-4, "{name}: merged differs by {difference}, seed {SEED:#x}");
        let effect = max_difference(found, &base_logits);
        assert!(effect > 0.05, "{name} changes the logits by {effect} only: the test shows nothing");
    }
}

#[test]
fn patterns_and_rslora_reach_the_arithmetic() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let config = tiny_config("llama");
    let base = tiny_weights(&config, SEED);
    support::write_model(dir.path(), &config, &base, Stored::F32);
    let rank_of = |layer: usize, module: &str| match (layer, module) {
        (_, "down_proj") => 3,
        (1, "q_proj") => 20,
        _ => 8,
    };
    let mut weights = adapter_weights(&config, &ALL_MODULES, SEED, rank_of);
    // Layer 2 is left out by layers_to_transform.
    weights.retain(|name, _| !name.contains(".layers.2."));
    let adapter = changed(
        adapter_config(8, &ALL_MODULES),
        json!({
            "lora_alpha": 4.5, "use_rslora": true, "layers_to_transform": [0, 1],
            "rank_pattern": {"mlp.down_proj": 3, "layers.1.self_attn.q_proj": 20},
            "alpha_pattern": {"[kv]_proj": 2, "model.layers.0.self_attn.o_proj": 1.5},
        }),
    );
    support::write_adapter(&dir.path().join("adapter"), &adapter, &weights, Stored::F32);
    let scale_of = |path: &str, rank: usize| {
        let alpha = match path {
            path if path.ends_with("k_proj") || path.ends_with("v_proj") => 2.0,
            "model.layers.0.self_attn.o_proj" => 1.5,
            _ => 4.5,
        };
        alpha / (rank as f64).sqrt()
    };
    let merged_dir = dir.path().join("merged");
    std::fs::create_dir(&merged_dir).expect("a directory");
    support::write_model(&merged_dir, &config, &merged(&base, &weights, scale_of), Stored::F32);
    let text = prompt(&mut Random(SEED), 19);
    let mut runner = Runner::tiny(dir.path(), Dtype::F32);
    let adapter = read(&dir.path().join("adapter"), &runner);
    assert_eq!((adapter.rank_min, adapter.rank_max, adapter.modules.len()), (3, 20, 14));
    let slot = runner.publish(&adapter);
    let found = runner.whole(&text, &[slot]);
    let want = Runner::tiny(&merged_dir, Dtype::F32).whole(&text, &[]);
    assert!(max_difference(&found, &want) < 2e-4, "differs by {}", max_difference(&found, &want));
}

#[test]
fn two_adapters_on_one_row_add_up() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (mut runner, slots) = world(dir.path(), "llama", Dtype::F32);
    let config = tiny_config("llama");
    let mut weights = tiny_weights(&config, SEED);
    for (i, scale) in [(1, 0.5), (4, 1.25)] {
        let (_, rank, targets) = ADAPTERS[i];
        let adapter = adapter_weights(&config, targets, SEED + i as u64, |_, _| rank);
        weights = merged(&weights, &adapter, |_, _| 2.0 * scale);
    }
    let merged_dir = dir.path().join("merged");
    std::fs::create_dir(&merged_dir).expect("a directory");
    support::write_model(&merged_dir, &config, &weights, Stored::F32);
    let text = prompt(&mut Random(SEED), 19);
    let pair = [SlotScale { scale: 0.5, ..slots[1] }, SlotScale { scale: 1.25, ..slots[4] }];
    let difference =
        max_difference(&runner.whole(&text, &pair), &Runner::tiny(&merged_dir, Dtype::F32).whole(&text, &[]));
    assert!(difference < 2e-4, "differs by {difference}");
}

#[test]
fn adapter_weights_are_rounded_to_the_storage_type() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let config = tiny_config("llama");
    support::write_model(dir.path(), &config, &tiny_weights(&config, SEED), Stored::Bf16);
    let weights = adapter_weights(&config, &ALL_MODULES, SEED, |_, _| 8);
    for (name, stored) in [("f32", Stored::F32), ("bf16", Stored::Bf16), ("f16", Stored::F16)] {
        support::write_adapter(&dir.path().join(name), &adapter_config(8, &ALL_MODULES), &weights, stored);
    }
    let text = prompt(&mut Random(SEED), 9);
    let mut runner = Runner::tiny(dir.path(), Dtype::Bf16);
    let mut logits = |name: &str| {
        let adapter = read(&dir.path().join(name), &runner);
        let slot = runner.publish(&adapter);
        runner.whole(&text, &[slot])
    };
    let (f32, bf16, f16) = (logits("f32"), logits("bf16"), logits("f16"));
    assert_eq!(f32, bf16, "f32 values round to the bf16 that the other file has");
    assert!(max_difference(&f32, &f16) < 0.2, "f16 in the file has rounded before and stays near");
}
