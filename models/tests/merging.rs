//! Merged adapters through real files: what goes in, what comes out, and what is refused.

mod support;

use loramux_models::adapter::{self, AdapterLimits, LoraModule, MergeSpec, MergeStrategy, PeftAdapter};
use serde_json::json;
use std::path::{Path, PathBuf};
use support::adapter::{Q0_A, SEED, read, spec};
use support::{Stored, adapter_config, adapter_weights, changed, tiny_config, write_adapter};
use tempfile::TempDir;

fn linear(weights: &[f32]) -> MergeSpec {
    MergeSpec {
        weights: weights.to_vec(),
        strategy: MergeStrategy::Linear,
        density: None,
        sign_by_frequency: false,
        seed: 0,
    }
}

fn dare(weights: &[f32], seed: u64) -> MergeSpec {
    MergeSpec { strategy: MergeStrategy::DareTies, density: Some(0.5), seed, ..linear(weights) }
}

/// An adapter on `targets` in `root/name`.
fn part(root: &TempDir, name: &str, rank: usize, targets: &[&str], seed: u64) -> PathBuf {
    let dir = root.path().join(name);
    std::fs::create_dir_all(&dir).expect("a folder");
    let weights = adapter_weights(&tiny_config("llama"), targets, seed, |_, _| rank);
    write_adapter(&dir, &adapter_config(rank, targets), &weights, Stored::F32);
    dir
}

fn merge(dirs: &[PathBuf], spec_of: &MergeSpec, out: &Path) -> Result<PeftAdapter, adapter::MergeError> {
    adapter::merge(dirs, spec_of, out, &spec(), &AdapterLimits::default())?;
    Ok(read(out).expect("what was merged can be served"))
}

/// `scale * B A`, `[d_out, d_in]`.
fn delta(module: &LoraModule) -> Vec<f64> {
    let LoraModule { rank, d_in, d_out, .. } = *module;
    let mut out = vec![0.0; d_out * d_in];
    for row in 0..d_out {
        for r in 0..rank {
            let b = f64::from(module.b[row * rank + r]) * f64::from(module.scale);
            for column in 0..d_in {
                out[row * d_in + column] += b * f64::from(module.a[r * d_in + column]);
            }
        }
    }
    out
}

fn assert_near(have: &[f64], want: &[f64], what: &str) {
    assert_eq!(have.len(), want.len());
    let largest = want.iter().fold(0.0f64, |max, value| max.max(value.abs()));
    assert!(largest > 0.0, "{what}: nothing to compare");
    for (have, want) in have.iter().zip(want) {
        assert!((have - want).abs() <= 1e-5 * largest, "{what}: {have}, wanted {want}");
    }
}

#[test]
fn one_part_alone_gives_its_weight_times_its_delta_and_is_scaled_by_one() {
    let root = TempDir::new().expect("a folder");
    let one = part(&root, "one", 4, &["q_proj", "v_proj"], SEED);
    let alone = read(&one).expect("good");
    for weight in [1.0, 0.3, -0.5] {
        let out = root.path().join(format!("out {weight}"));
        let merged = merge(std::slice::from_ref(&one), &linear(&[weight]), &out).expect("one is enough");
        assert_eq!(merged.module_names, alone.module_names);
        for (have, want) in merged.modules.iter().zip(&alone.modules) {
            assert_eq!((have.layer, have.slice, have.scale), (want.layer, want.slice, 1.0));
            let want: Vec<f64> = delta(want).iter().map(|value| value * f64::from(weight)).collect();
            assert_near(&delta(have), &want, &format!("weight {weight}"));
        }
    }
}

#[test]
fn factors_of_unequal_ranks_meet_at_their_first_components() {
    let root = TempDir::new().expect("a folder");
    let dirs = [part(&root, "small", 2, &["q_proj"], 1), part(&root, "large", 4, &["q_proj", "v_proj"], 2)];
    let parts = [read(&dirs[0]).expect("good"), read(&dirs[1]).expect("good")];
    let merged = merge(&dirs, &linear(&[1.0, 0.5]), &root.path().join("out")).expect("ranks may differ");
    assert_eq!((merged.rank_min, merged.rank_max), (4, 4));
    assert_eq!(merged.module_names, ["q_proj", "v_proj"]);
    let (small, large) = (&parts[0].modules[0], &parts[1].modules[0]);
    let q = &merged.modules[0];
    let roots = [small.scale.sqrt(), (0.5 * large.scale).sqrt()];
    for (at, value) in q.a.iter().enumerate() {
        let own = small.a.get(at).map_or(0.0, |value| roots[0] * value);
        assert!((value - own - roots[1] * large.a[at]).abs() < 1e-5);
    }
    for (at, value) in q.b.iter().enumerate() {
        let (row, r) = (at / 4, at % 4);
        let own = if r < 2 { roots[0] * small.b[row * 2 + r] } else { 0.0 };
        assert!((value - own - roots[1] * large.b[at]).abs() < 1e-5);
    }
    // A module that one part has is that part's alone.
    let v = |adapter: &PeftAdapter| delta(adapter.modules.last().expect("v_proj comes last"));
    let want: Vec<f64> = v(&parts[1]).iter().map(|value| value * 0.5).collect();
    assert_near(&v(&merged), &want, "v_proj");
}

#[test]
fn the_same_contents_and_numbers_give_the_same_bytes_wherever_they_lie() {
    let bytes = |root: &TempDir, spec_of: &MergeSpec| {
        let dirs = [part(root, "a", 4, &["q_proj"], 1), part(root, "b", 4, &["q_proj"], 2)];
        let out = root.path().join("out");
        let merged = merge(&dirs, spec_of, &out).expect("good");
        let files = ["adapter_config.json", "adapter_model.safetensors"].map(|name| std::fs::read(out.join(name)));
        (files.map(|file| file.expect("written")), merged.content_id)
    };
    let (here, there) = (TempDir::new().expect("a folder"), TempDir::new().expect("a folder"));
    let first = bytes(&here, &dare(&[1.0, 0.5], 3));
    assert_eq!(first, bytes(&there, &dare(&[1.0, 0.5], 3)));
    for other in [dare(&[1.0, 0.5], 4), dare(&[0.5, 1.0], 3)] {
        assert_ne!(first.1, bytes(&there, &other).1, "{other:?}");
    }
    let left: Vec<_> = std::fs::read_dir(here.path().join("out")).expect("a folder").collect();
    assert_eq!(left.len(), 2, "nothing but the two files: {left:?}");
}

#[test]
fn layers_that_only_some_modules_adapt_are_named_one_by_one() {
    let root = TempDir::new().expect("a folder");
    let dir = part(&root, "one", 4, &["q_proj"], 1);
    let config = changed(adapter_config(4, &["q_proj"]), json!({"layers_to_transform": [1]}));
    let mut weights = adapter_weights(&tiny_config("llama"), &["q_proj"], 1, |_, _| 4);
    weights.retain(|name, _| name.contains("layers.1."));
    write_adapter(&dir, &config, &weights, Stored::F16);
    let out = root.path().join("out");
    let merged = merge(&[dir], &linear(&[1.0]), &out).expect("good");
    assert_eq!(merged.modules.iter().map(|module| module.layer).collect::<Vec<_>>(), [1]);
    let file = std::fs::read(out.join("adapter_model.safetensors")).expect("written");
    assert!(String::from_utf8_lossy(&file[8..200]).contains("F16"), "stored as its parts are");
}

#[test]
fn what_does_not_fit_together_is_refused_and_leaves_no_file() {
    let root = TempDir::new().expect("a folder");
    let good = part(&root, "good", 4, &["q_proj"], 1);
    let bias = part(&root, "bias", 4, &["q_proj"], 2);
    let mut weights = adapter_weights(&tiny_config("llama"), &["q_proj"], 2, |_, _| 4);
    let biases: Vec<_> = weights.iter().filter(|(name, _)| name.contains("lora_B")).collect();
    let bias_of = |(name, b): (&String, &support::Tensor)| {
        let shape = vec![b.shape[0]];
        (name.replace(".weight", ".bias"), support::Tensor { values: vec![0.5; shape[0]], shape })
    };
    let biases: Vec<_> = biases.into_iter().map(bias_of).collect();
    weights.extend(biases);
    let config = changed(adapter_config(4, &["q_proj"]), json!({"lora_bias": true}));
    write_adapter(&bias, &config, &weights, Stored::F32);
    let out = root.path().join("out");
    let no_density = MergeSpec { strategy: MergeStrategy::Ties, ..linear(&[1.0]) };
    let cases = [
        (vec![], linear(&[]), "adapter_invalid", "0 adapters"),
        (vec![good.clone(); 9], linear(&[1.0; 9]), "adapter_invalid", "accepted are 1..8"),
        (vec![good.clone()], linear(&[1.0, 1.0]), "adapter_invalid", "2 weights for 1"),
        (vec![good.clone()], linear(&[f32::NAN]), "adapter_invalid", "NaN"),
        (vec![good.clone()], no_density.clone(), "adapter_invalid", "density is missing"),
        (vec![good.clone()], MergeSpec { density: Some(1.5), ..no_density }, "adapter_invalid", "1.5"),
        (vec![good.clone()], linear(&[3e38]), "adapter_invalid", "finite"),
        (vec![good.clone(), root.path().join("absent")], linear(&[1.0, 1.0]), "model_not_found", "adapter 1"),
    ];
    for (dirs, spec_of, code, text) in cases {
        let error = merge(&dirs, &spec_of, &out).expect_err(text);
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains(text), "{error} does not say {text}");
    }
    let error = merge(&[good, bias], &linear(&[1.0, 1.0]), &out).expect_err("a bias on B");
    let text = "merged adapter 1: lora_bias cannot be merged";
    assert!(error.to_string().starts_with(text) && error.code() == "adapter_unsupported", "{error}");
    assert!(!out.exists() || std::fs::read_dir(&out).expect("a folder").next().is_none());
}

#[test]
fn a_check_finds_every_fault_it_can() {
    let root = TempDir::new().expect("a folder");
    let dir = part(&root, "one", 4, &["q_proj", "v_proj"], 1);
    let look = || adapter::check(&dir, &spec(), &AdapterLimits::default());
    let good = look();
    assert!(good.refusals.is_empty() && good.adapter.is_some() && good.base_matches, "{:?}", good.refusals);
    assert_eq!((good.tensors_matched, good.tensors_unmatched.len()), (12, 0));
    assert_eq!(good.content_id, good.adapter.map(|adapter| adapter.content_id));

    let asked = json!({"target_parameters": ["w"], "use_qalora": true, "use_rslora": true});
    let config = changed(adapter_config(4, &["q_proj", "v_proj"]), asked);
    let mut weights = adapter_weights(&tiny_config("llama"), &["q_proj", "v_proj"], 1, |_, _| 4);
    let stray = weights[Q0_A].clone();
    weights.insert(Q0_A.replace("layers.0", "layers.9"), stray);
    write_adapter(&dir, &config, &weights, Stored::F32);
    let bad = look();
    let codes: Vec<_> = bad.refusals.iter().map(|refusal| refusal.code).collect();
    assert_eq!(codes, ["adapter_unsupported", "adapter_unsupported", "adapter_base_mismatch"], "{:?}", bad.refusals);
    assert!(bad.adapter.is_none() && !bad.base_matches && bad.content_id.is_some());
    assert_eq!((bad.tensors_matched, bad.features), (12, vec!["rslora"]));
    assert_eq!(bad.tensors_unmatched, [Q0_A.replace("layers.0", "layers.9")]);

    std::fs::remove_file(dir.join("adapter_model.safetensors")).expect("removed");
    assert_eq!(look().refusals.len(), 3, "two of the config, one of the missing file");
    std::fs::remove_dir_all(&dir).expect("removed");
    assert_eq!(look().refusals[0].code, "model_not_found");
}
