//! Random LoRA adapters of all seven linear modules, for a server that has none. The same arguments make the same bytes.

use std::fs;
use std::path::Path;

use anyhow::Context;
use loramux_models::DecoderSpec;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::json;

use super::rng::Rng;

/// Writes `dir/a0` .. and gives their names.
pub(super) fn write(dir: &Path, spec: &DecoderSpec, count: usize, rank: usize) -> anyhow::Result<Vec<String>> {
    let names: Vec<String> = (0..count).map(|i| format!("a{i}")).collect();
    for (index, name) in names.iter().enumerate() {
        let folder = dir.join(name);
        write_one(&folder, spec, rank, &mut Rng::new(&[6, index as u64]))
            .with_context(|| format!("cannot write a random adapter to {}", folder.display()))?;
    }
    Ok(names)
}

/// Path below a layer, outputs, inputs.
fn modules(spec: &DecoderSpec) -> [(&'static str, usize, usize); 7] {
    let (hidden, inner) = (spec.hidden, spec.intermediate);
    [
        ("self_attn.q_proj", spec.q_width(), hidden),
        ("self_attn.k_proj", spec.kv_width(), hidden),
        ("self_attn.v_proj", spec.kv_width(), hidden),
        ("self_attn.o_proj", hidden, spec.q_width()),
        ("mlp.gate_proj", inner, hidden),
        ("mlp.up_proj", inner, hidden),
        ("mlp.down_proj", hidden, inner),
    ]
}

fn write_one(folder: &Path, spec: &DecoderSpec, rank: usize, rng: &mut Rng) -> anyhow::Result<()> {
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for layer in 0..spec.layers {
        for (module, outputs, inputs) in modules(spec) {
            let prefix = format!("base_model.model.model.layers.{layer}.{module}");
            // Each product keeps the size of its input, so the delta is as large as what it is added to.
            tensors.push((format!("{prefix}.lora_A.weight"), vec![rank, inputs], bf16(rng, rank * inputs, inputs)));
            tensors.push((format!("{prefix}.lora_B.weight"), vec![outputs, rank], bf16(rng, outputs * rank, rank)));
        }
    }
    let mut views = Vec::with_capacity(tensors.len());
    for (name, shape, bytes) in &tensors {
        views.push((name, TensorView::new(Dtype::BF16, shape.clone(), bytes)?));
    }
    let names: Vec<&str> = modules(spec).iter().map(|(path, ..)| path.rsplit('.').next().unwrap_or(path)).collect();
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "random", "r": rank, "lora_alpha": rank,
        "target_modules": names, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": false, "inference_mode": true,
    });
    fs::create_dir_all(folder)?;
    fs::write(folder.join("adapter_model.safetensors"), serialize(views, None)?)?;
    fs::write(folder.join("adapter_config.json"), config.to_string())?;
    Ok(())
}

/// `count` numbers of a uniform distribution with a root mean square of `inputs`^-0.5.
fn bf16(rng: &mut Rng, count: usize, inputs: usize) -> Vec<u8> {
    let largest = (3.0 / inputs.max(1) as f64).sqrt();
    let number = || {
        let value = (largest * (2.0 * rng.unit() - 1.0)) as f32;
        // The upper half of an f32 is the bf16 next to it towards zero.
        ((value.to_bits() >> 16) as u16).to_le_bytes()
    };
    std::iter::repeat_with(number).take(count).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use loramux_models::adapter::{self, AdapterLimits};

    #[test]
    fn adapters_fit_their_model_repeat_and_differ() {
        let spec =
            loramux_models::describe(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo/base"))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(write(dir.path(), &spec, 2, 5).unwrap(), ["a0", "a1"]);
        let bytes = |name: &str| fs::read(dir.path().join(name).join("adapter_model.safetensors")).unwrap();
        let (first, second) = (bytes("a0"), bytes("a1"));
        assert_ne!(first, second);
        write(dir.path(), &spec, 1, 5).unwrap();
        assert_eq!(bytes("a0"), first);
        let found = adapter::check(&dir.path().join("a1"), &spec, &AdapterLimits::default());
        assert!(found.refusals.is_empty(), "{:?}", found.refusals);
        assert_eq!((found.tensors_matched, found.adapter.unwrap().rank_max), (spec.layers * 14, 5));
    }
}
