//! Adapters of random numbers, as files: what the checks and benchmarks serve.

use std::path::Path;

use loramux_kernels::device::Elem;
use loramux_kernels::device::check::Random;
use loramux_models::DecoderSpec;
use serde_json::{Map, json};

/// A random adapter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RandomAdapter {
    pub(crate) rank: usize,
    pub(crate) seed: u64,
    /// How large the change of an output is, relative to the input.
    pub(crate) gain: f32,
}

/// The linear layers of one decoder layer: name, outputs, inputs.
fn linears(spec: &DecoderSpec) -> [(&'static str, usize, usize); 7] {
    let (hidden, wide) = (spec.hidden, spec.intermediate);
    let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    [
        ("self_attn.q_proj", q, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, q),
        ("mlp.gate_proj", wide, hidden),
        ("mlp.up_proj", wide, hidden),
        ("mlp.down_proj", hidden, wide),
    ]
}

/// Parameters for each unit of rank, over all layers.
pub(crate) fn parameters_per_rank(spec: &DecoderSpec) -> usize {
    spec.layers * linears(spec).iter().map(|(_, outputs, inputs)| outputs + inputs).sum::<usize>()
}

impl RandomAdapter {
    /// Writes `adapter_config.json` and `adapter_model.safetensors` in bf16 for every linear layer of the model.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn write(&self, dir: &Path, spec: &DecoderSpec) -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        let modules: Vec<&str> = linears(spec).iter().filter_map(|(name, ..)| name.split('.').nth(1)).collect();
        let config = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "doctor", "r": self.rank,
            "lora_alpha": self.gain * self.rank as f32, "target_modules": modules, "bias": "none",
        });
        std::fs::write(dir.join("adapter_config.json"), config.to_string())?;
        let mut random = Random::new(self.seed);
        let (mut header, mut data) = (Map::new(), Vec::<u8>::new());
        for layer in 0..spec.layers {
            for (name, outputs, inputs) in linears(spec) {
                let prefix = format!("base_model.model.model.layers.{layer}.{name}");
                // Uniform in (-s, s) has a root mean square of s / sqrt(3): A keeps the size of its input, and so does B.
                for (part, rows, columns, fan_in) in
                    [("lora_A", self.rank, inputs, inputs), ("lora_B", outputs, self.rank, self.rank)]
                {
                    let from = data.len();
                    let values = random.elems(Elem::Bf16, rows * columns, (3.0 / fan_in as f32).sqrt());
                    data.extend(values.iter().flat_map(|bits| bits.to_le_bytes()));
                    let entry =
                        json!({ "dtype": "BF16", "shape": [rows, columns], "data_offsets": [from, data.len()] });
                    header.insert(format!("{prefix}.{part}.weight"), entry);
                }
            }
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.append(&mut header);
        file.append(&mut data);
        std::fs::write(dir.join("adapter_model.safetensors"), file)
    }
}
