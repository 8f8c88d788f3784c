//! Models whose weights are made up, and the bounds that no implementation passes on them.

use loramux_models::{DecoderSpec, ModelError};
use serde_json::json;

use super::Ceilings;
use crate::doctor::adapters::parameters_per_rank;
use crate::doctor::args::ShapeChoice;

/// A model by its widths.
#[derive(Clone, Copy, Debug)]
pub(super) struct BenchModel {
    pub(super) name: &'static str,
    family: &'static str,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    tied_head: bool,
}

impl BenchModel {
    pub(super) fn new(choice: ShapeChoice) -> Self {
        let (name, family, widths, tied_head) = match choice {
            ShapeChoice::Llama8b => ("llama-3.1-8b", "llama", [4096, 14_336, 32, 32, 8, 128, 128_256], false),
            ShapeChoice::Qwen05b => ("qwen2.5-0.5b", "qwen2", [896, 4864, 24, 14, 2, 64, 151_936], true),
            ShapeChoice::Smol135m => ("smollm2-135m", "llama", [576, 1536, 30, 9, 3, 64, 49_152], true),
            ShapeChoice::Tiny => ("tiny", "llama", [192, 512, 2, 6, 2, 32, 2048], true),
        };
        let [hidden, intermediate, layers, heads, kv_heads, head_dim, vocab] = widths;
        Self { name, family, hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied_head }
    }

    /// Its `config.json`.
    pub(super) fn config(&self) -> String {
        let architecture = if self.family == "qwen2" { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" };
        json!({
            "architectures": [architecture], "model_type": self.family, "torch_dtype": "bfloat16",
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "max_position_embeddings": 32_768,
            "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "tie_word_embeddings": self.tied_head,
        })
        .to_string()
    }

    pub(super) fn spec(&self) -> Result<DecoderSpec, ModelError> {
        DecoderSpec::from_config(&self.config())
    }
}

/// The least time of a step, from the bytes and operations that it cannot do without.
#[derive(Clone, Copy, Debug)]
pub(super) struct Roofline {
    /// Parameters of the linear layers and of the head.
    linear: f64,
    head: f64,
    kv_bytes_per_token: f64,
    lora_per_rank: f64,
    attention_width: f64,
    ceilings: Ceilings,
}

/// Bytes of a weight, an activation or a cached value.
const ELEM_BYTES: f64 = 2.0;

impl Roofline {
    pub(super) fn new(spec: &DecoderSpec, ceilings: Ceilings) -> Self {
        let (hidden, wide) = (spec.hidden, spec.intermediate);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * wide;
        Self {
            linear: (spec.layers * layer) as f64,
            head: (spec.vocab * hidden) as f64,
            kv_bytes_per_token: (2 * spec.layers * kv) as f64 * ELEM_BYTES,
            lora_per_rank: parameters_per_rank(spec) as f64,
            attention_width: (spec.layers * q) as f64,
            ceilings,
        }
    }

    /// Microseconds of a decode of `batch` rows that see `context` positions each, under adapters of these ranks.
    pub(super) fn decode_us(&self, batch: usize, context: usize, ranks: &[usize]) -> f64 {
        let Ceilings { bytes_per_s, flop_per_s } = self.ceilings;
        let (parameters, batch) = (self.linear + self.head, batch as f64);
        let weights = (ELEM_BYTES * parameters / bytes_per_s).max(2.0 * batch * parameters / flop_per_s);
        let cache = batch * context as f64 * self.kv_bytes_per_token / bytes_per_s;
        let adapters = ranks.iter().sum::<usize>() as f64 * self.lora_per_rank * ELEM_BYTES / bytes_per_s;
        1e6 * (weights + cache + adapters)
    }

    /// Microseconds of a prompt of `tokens` under one adapter of `rank`, or none of 0.
    pub(super) fn prefill_us(&self, tokens: usize, rank: usize) -> f64 {
        let tokens = tokens as f64;
        let flop = 2.0 * tokens * self.linear
            + 2.0 * tokens * tokens * self.attention_width
            + 2.0 * self.head
            + 2.0 * tokens * rank as f64 * self.lora_per_rank;
        1e6 * flop / self.ceilings.flop_per_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_of_the_8b_model_are_those_of_a_hand_calculation() {
        let spec = BenchModel::new(ShapeChoice::Llama8b).spec().unwrap();
        let roofline = Roofline::new(&spec, Ceilings { bytes_per_s: 4.3e12, flop_per_s: 790e12 });
        // 6.979e9 + 0.525e9 parameters, 131,072 bytes of cache a token, 2.62e6 parameters a rank.
        let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 0.005, "{got} is not {want}");
        near(roofline.decode_us(1, 512, &[]), 3510.0);
        near(roofline.decode_us(64, 512, &[]), 4490.0);
        near(roofline.decode_us(64, 512, &[16; 64]) / roofline.decode_us(64, 512, &[]), 1.278);
        near(roofline.decode_us(256, 2048, &[]), 20_850.0);
        near(roofline.prefill_us(2048, 0), 37_600.0);
    }

    #[test]
    fn every_made_up_model_has_a_config_that_is_read() {
        for choice in [ShapeChoice::Llama8b, ShapeChoice::Qwen05b, ShapeChoice::Smol135m, ShapeChoice::Tiny] {
            let model = BenchModel::new(choice);
            let spec = model.spec().unwrap();
            assert_eq!((spec.hidden, spec.layers, spec.tied_head), (model.hidden, model.layers, model.tied_head));
        }
    }
}
