//! A small good adapter, ways to spoil it, and the check that it is refused for the right reason.

use super::{Stored, Tensors, adapter_config, adapter_weights, safetensors, tiny_config, write};
use loramux_models::DecoderSpec;
use loramux_models::adapter::{self, AdapterError, AdapterLimits, PeftAdapter};
use serde_json::Value;
use std::path::Path;

pub(crate) const SEED: u64 = 0xBAD0_0001;
pub(crate) const TARGETS: [&str; 2] = ["q_proj", "v_proj"];
pub(crate) const Q0_A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
pub(crate) const Q0_B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

pub(crate) const INVALID: &str = "adapter_invalid";
pub(crate) const UNSUPPORTED: &str = "adapter_unsupported";
pub(crate) const MISMATCH: &str = "adapter_base_mismatch";
pub(crate) const TOO_LARGE: &str = "adapter_too_large";

pub(crate) fn spec() -> DecoderSpec {
    DecoderSpec::from_config(&tiny_config("llama").to_string()).expect("valid")
}

pub(crate) fn weights() -> Tensors {
    adapter_weights(&tiny_config("llama"), &TARGETS, SEED, |_, _| 4)
}

pub(crate) fn config() -> Value {
    adapter_config(4, &TARGETS)
}

pub(crate) fn good_weights() -> Vec<u8> {
    safetensors(&weights(), Stored::F32)
}

pub(crate) fn read(dir: &Path) -> Result<PeftAdapter, AdapterError> {
    adapter::read(dir, &spec(), &AdapterLimits::default())
}

/// Reads an adapter of these two files.
pub(crate) fn read_files(config: impl AsRef<[u8]>, weights: impl AsRef<[u8]>) -> Result<PeftAdapter, AdapterError> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "adapter_config.json", config);
    write(dir.path(), "adapter_model.safetensors", weights);
    read(dir.path())
}

pub(crate) fn refused(case: &str, result: Result<PeftAdapter, AdapterError>, code: &str, text: &str) {
    let error = result.err().unwrap_or_else(|| panic!("{case} was accepted"));
    assert_eq!(error.code(), code, "{case}: {error}");
    assert!(error.to_string().contains(text), "{case}: `{error}` does not say `{text}`");
}

/// The good tensors after a change.
pub(crate) fn tensors(change: impl FnOnce(&mut Tensors)) -> Vec<u8> {
    let mut tensors = weights();
    change(&mut tensors);
    safetensors(&tensors, Stored::F32)
}

/// The good tensors with one under another name.
pub(crate) fn rename(from: &str, to: &str) -> Vec<u8> {
    tensors(|tensors| {
        let tensor = tensors.remove(from).expect("it is there");
        tensors.insert(to.to_owned(), tensor);
    })
}

/// The good tensors and one more.
pub(crate) fn extra(name: &str) -> Vec<u8> {
    tensors(|tensors| {
        let tensor = tensors[Q0_A].clone();
        tensors.insert(name.to_owned(), tensor);
    })
}

/// The good tensors with one in another shape.
pub(crate) fn reshaped(name: &str, shape: &[usize]) -> Vec<u8> {
    tensors(|tensors| {
        let tensor = tensors.get_mut(name).expect("it is there");
        tensor.shape = shape.to_vec();
        tensor.values.resize(shape.iter().product(), 0.5);
    })
}

/// The good tensors with one value replaced.
pub(crate) fn poisoned(name: &str, at: usize, value: f32) -> Vec<u8> {
    tensors(|tensors| tensors.get_mut(name).expect("it is there").values[at] = value)
}
