//! Model families as data: a row each. What differs between them is read into [`crate::DecoderSpec`]; the decoder never
//! asks for a family.

/// One family of Llama-architecture models.
pub(crate) struct Family {
    /// `model_type` in `config.json`.
    pub(crate) model_type: &'static str,
    /// transformers' default for `num_key_value_heads`; `None` = as many as query heads.
    pub(crate) kv_heads_default: Option<usize>,
    /// Whether q, k and v have a bias.
    pub(crate) qkv_bias: bool,
    /// When a sliding window is in force.
    pub(crate) window: WindowRule,
}

/// How a family's config asks for sliding-window attention.
pub(crate) enum WindowRule {
    /// It has none.
    Never,
    /// `sliding_window`, with transformers' default when the key is absent.
    Always { default: usize },
    /// `sliding_window`, only when `use_sliding_window` is true.
    WhenUsed,
}

/// Sources: transformers `configuration_{llama,mistral,qwen2}.py`.
const FAMILIES: [Family; 3] = [
    Family { model_type: "llama", kv_heads_default: None, qkv_bias: false, window: WindowRule::Never },
    Family {
        model_type: "mistral",
        kv_heads_default: Some(8),
        qkv_bias: false,
        window: WindowRule::Always { default: 4096 },
    },
    Family { model_type: "qwen2", kv_heads_default: Some(32), qkv_bias: true, window: WindowRule::WhenUsed },
];

impl Family {
    pub(crate) fn by_model_type(model_type: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.model_type == model_type)
    }

    /// The accepted names, for messages.
    pub(crate) fn names() -> String {
        FAMILIES.iter().map(|family| format!("`{}`", family.model_type)).collect::<Vec<_>>().join(", ")
    }
}

/// A GGUF `general.architecture` and how llama.cpp's converter writes it.
pub(crate) struct GgufArchitecture {
    /// `general.architecture`; also the prefix of its metadata keys.
    pub(crate) name: &'static str,
    /// The family it becomes.
    pub(crate) family: &'static str,
    /// Whether the converter interleaved the rotary halves of q and k (to be undone).
    pub(crate) permuted_qk: bool,
    /// Whether q, k and v have a bias.
    pub(crate) qkv_bias: bool,
}

/// Source: llama.cpp `convert_hf_to_gguf.py` (`LlamaModel`, `Qwen2Model`).
const GGUF_ARCHITECTURES: [GgufArchitecture; 2] = [
    GgufArchitecture { name: "llama", family: "llama", permuted_qk: true, qkv_bias: false },
    GgufArchitecture { name: "qwen2", family: "qwen2", permuted_qk: false, qkv_bias: true },
];

impl GgufArchitecture {
    pub(crate) fn by_name(name: &str) -> Option<&'static Self> {
        GGUF_ARCHITECTURES.iter().find(|architecture| architecture.name == name)
    }

    /// The accepted names, for messages.
    pub(crate) fn names() -> String {
        GGUF_ARCHITECTURES.iter().map(|row| format!("`{}`", row.name)).collect::<Vec<_>>().join(", ")
    }
}

/// A tensor of the decoder, whatever a file calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TensorKind {
    Embedding,
    FinalNorm,
    Head,
    AttentionNorm,
    Query,
    Key,
    Value,
    QueryBias,
    KeyBias,
    ValueBias,
    Output,
    MlpNorm,
    Gate,
    Up,
    Down,
}

/// A tensor and, for those inside a layer, the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TensorId {
    pub(crate) kind: TensorKind,
    pub(crate) layer: usize,
}

impl TensorId {
    pub(crate) fn global(kind: TensorKind) -> Self {
        Self { kind, layer: 0 }
    }

    pub(crate) fn in_layer(layer: usize, kind: TensorKind) -> Self {
        Self { kind, layer }
    }

    /// The name in a Hugging Face checkpoint: the same for every family here.
    pub(crate) fn hugging_face(self) -> String {
        use TensorKind as K;
        let rest = match self.kind {
            K::Embedding => return "model.embed_tokens.weight".to_owned(),
            K::FinalNorm => return "model.norm.weight".to_owned(),
            K::Head => return "lm_head.weight".to_owned(),
            K::AttentionNorm => "input_layernorm.weight",
            K::Query => "self_attn.q_proj.weight",
            K::Key => "self_attn.k_proj.weight",
            K::Value => "self_attn.v_proj.weight",
            K::QueryBias => "self_attn.q_proj.bias",
            K::KeyBias => "self_attn.k_proj.bias",
            K::ValueBias => "self_attn.v_proj.bias",
            K::Output => "self_attn.o_proj.weight",
            K::MlpNorm => "post_attention_layernorm.weight",
            K::Gate => "mlp.gate_proj.weight",
            K::Up => "mlp.up_proj.weight",
            K::Down => "mlp.down_proj.weight",
        };
        format!("model.layers.{}.{rest}", self.layer)
    }

    /// The name in a GGUF file (llama.cpp `gguf-py/gguf/constants.py`).
    pub(crate) fn gguf(self) -> String {
        use TensorKind as K;
        let rest = match self.kind {
            K::Embedding => return "token_embd.weight".to_owned(),
            K::FinalNorm => return "output_norm.weight".to_owned(),
            K::Head => return "output.weight".to_owned(),
            K::AttentionNorm => "attn_norm.weight",
            K::Query => "attn_q.weight",
            K::Key => "attn_k.weight",
            K::Value => "attn_v.weight",
            K::QueryBias => "attn_q.bias",
            K::KeyBias => "attn_k.bias",
            K::ValueBias => "attn_v.bias",
            K::Output => "attn_output.weight",
            K::MlpNorm => "ffn_norm.weight",
            K::Gate => "ffn_gate.weight",
            K::Up => "ffn_up.weight",
            K::Down => "ffn_down.weight",
        };
        format!("blk.{}.{rest}", self.layer)
    }
}
