//! [`DecoderSpec`]: everything the one decoder stack must know about a model, read from `config.json` or a GGUF header.

use crate::error::ModelError;
use crate::families::{Family, WindowRule};
use serde_json::{Map, Value};

/// The differences between Llama-architecture models, as data.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// `model_type` of the config: `llama`, `mistral` or `qwen2`.
    pub family: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub intermediate: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Positions the model was trained for.
    pub context: usize,
    /// Epsilon of every RMSNorm.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: RopeSpec,
    /// Sliding window of every layer in positions: position p sees (p - window, p].
    pub window: Option<usize>,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the head is the embedding.
    pub tied_head: bool,
    /// First token of a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// Rotary position embedding (arXiv:2104.09864), rotate-half form.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f32,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
    /// Leading columns of a head that rotate.
    pub rotary_dim: usize,
}

/// Context extension of the rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Every frequency is divided by `factor`.
    Linear {
        /// The divisor, > 0.
        factor: f32,
    },
    /// Llama 3.1: low frequencies are divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// The divisor, > 0.
        factor: f32,
        /// Below `original_context / low_freq_factor` periods the frequency is divided.
        low_freq_factor: f32,
        /// Above `original_context / high_freq_factor` periods it is kept.
        high_freq_factor: f32,
        /// Positions of the first training stage.
        original_context: usize,
    },
    /// One divisor per frequency: `rope_freqs.weight` of a GGUF file, `rotary_dim / 2` long.
    Factors(Vec<f32>),
}

/// Largest `config.json` that is parsed.
pub(crate) const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Upper bounds of a spec, checked before anything is allocated from it.
struct Bounds;

impl Bounds {
    const HIDDEN: usize = 1 << 16;
    const LAYERS: usize = 1 << 10;
    const HEADS: usize = 1 << 10;
    const HEAD_DIM: usize = 1 << 10;
    const INTERMEDIATE: usize = 1 << 19;
    const VOCAB: usize = 1 << 22;
    const CONTEXT: usize = 1 << 27;
}

impl DecoderSpec {
    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] for malformed JSON, a missing field or a value out of bounds;
    /// [`ModelError::Unsupported`] names a `model_type` or a feature that the decoder does not have.
    pub fn from_config(json: &str) -> Result<Self, ModelError> {
        if json.len() as u64 > CONFIG_BYTES_MAX {
            return Err(ModelError::TooLarge {
                file: FILE.to_owned(),
                what: "the file's size in bytes".to_owned(),
                found: json.len() as u64,
                limit: CONFIG_BYTES_MAX,
            });
        }
        let root: Map<String, Value> = serde_json::from_str(json)
            .map_err(|error| ModelError::invalid(FILE, format!("not a JSON object: {error}")))?;
        let fields = Fields(&root);
        let model_type = fields.text("model_type")?.ok_or_else(|| missing("model_type"))?;
        let family = Family::by_model_type(model_type).ok_or_else(|| {
            ModelError::unsupported(
                FILE,
                format!("model_type `{model_type}`"),
                format!("accepted are {}", Family::names()),
            )
        })?;
        refuse_unsupported(&fields)?;
        let hidden = fields.size("hidden_size", Bounds::HIDDEN)?.ok_or_else(|| missing("hidden_size"))?;
        let layers = fields.size("num_hidden_layers", Bounds::LAYERS)?.ok_or_else(|| missing("num_hidden_layers"))?;
        let heads = fields.size("num_attention_heads", Bounds::HEADS)?.ok_or_else(|| missing("num_attention_heads"))?;
        let head_dim = match fields.size("head_dim", Bounds::HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(bad(format!("hidden_size {hidden} is not a multiple of num_attention_heads {heads}"))),
        };
        let spec = Self {
            family: family.model_type.to_owned(),
            hidden,
            layers,
            heads,
            kv_heads: fields
                .size("num_key_value_heads", Bounds::HEADS)?
                .unwrap_or(family.kv_heads_default.unwrap_or(heads)),
            head_dim,
            intermediate: fields
                .size("intermediate_size", Bounds::INTERMEDIATE)?
                .ok_or_else(|| missing("intermediate_size"))?,
            vocab: fields.size("vocab_size", Bounds::VOCAB)?.ok_or_else(|| missing("vocab_size"))?,
            context: fields
                .size("max_position_embeddings", Bounds::CONTEXT)?
                .ok_or_else(|| missing("max_position_embeddings"))?,
            rms_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope: rope(&fields, head_dim)?,
            window: window(&fields, family, layers)?,
            qkv_bias: family.qkv_bias,
            tied_head: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            bos: fields.token_ids("bos_token_id")?.first().copied(),
            eos: fields.token_ids("eos_token_id")?,
        };
        spec.check(FILE)?;
        Ok(spec)
    }

    /// Checks the extents against each other and against the bounds; `file` names the source in messages.
    pub(crate) fn check(&self, file: &str) -> Result<(), ModelError> {
        let sizes = [
            ("hidden_size", self.hidden, Bounds::HIDDEN),
            ("num_hidden_layers", self.layers, Bounds::LAYERS),
            ("num_attention_heads", self.heads, Bounds::HEADS),
            ("num_key_value_heads", self.kv_heads, Bounds::HEADS),
            ("head_dim", self.head_dim, Bounds::HEAD_DIM),
            ("intermediate_size", self.intermediate, Bounds::INTERMEDIATE),
            ("vocab_size", self.vocab, Bounds::VOCAB),
            ("max_position_embeddings", self.context, Bounds::CONTEXT),
        ];
        for (name, value, max) in sizes {
            if value == 0 || value > max {
                return Err(ModelError::invalid(file, format!("{name} is {value}, accepted is 1..={max}")));
            }
        }
        let Self { heads, kv_heads, head_dim, rms_eps, .. } = *self;
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}");
            return Err(ModelError::invalid(file, reason));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(ModelError::invalid(
                file,
                format!("head_dim {head_dim} is odd: rotary pairs need an even one"),
            ));
        }
        if self.rope.rotary_dim != head_dim {
            let reason = format!("accepted is the whole head, {head_dim} columns");
            return Err(ModelError::unsupported(file, format!("a rotary width of {}", self.rope.rotary_dim), reason));
        }
        if !(rms_eps > 0.0 && rms_eps < 1.0) {
            return Err(ModelError::invalid(file, format!("rms_norm_eps is {rms_eps}, accepted is 0 < eps < 1")));
        }
        if !(self.rope.theta.is_finite() && self.rope.theta > 1.0) {
            return Err(ModelError::invalid(file, format!("rope_theta is {}, accepted is > 1", self.rope.theta)));
        }
        for &id in self.eos.iter().chain(&self.bos) {
            if id as usize >= self.vocab {
                let reason = format!("token id {id} of bos or eos is outside the vocabulary of {}", self.vocab);
                return Err(ModelError::invalid(file, reason));
            }
        }
        Ok(())
    }

    /// Columns of q: `heads * head_dim`.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of k, and of v: `kv_heads * head_dim`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

const FILE: &str = "config.json";

fn missing(field: &str) -> ModelError {
    bad(format!("`{field}` is missing"))
}

fn bad(reason: String) -> ModelError {
    ModelError::invalid(FILE, reason)
}

/// Typed reads of config fields; `null` counts as absent, as in transformers.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn size(&self, name: &str, max: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64() {
            Some(size) if size >= 1 && size <= max as u64 => Ok(Some(size as usize)),
            _ => Err(bad(format!("`{name}` is {value}, accepted is an integer in 1..={max}"))),
        }
    }

    fn number(&self, name: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| bad(format!("`{name}` is {value}, accepted is a number")))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| bad(format!("`{name}` is {value}, accepted is true or false")))
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| bad(format!("`{name}` is {value}, accepted is a string")))
    }

    fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let object = value.as_object().ok_or_else(|| bad(format!("`{name}` is {value}, accepted is an object")))?;
        Ok(Some(Fields(object)))
    }

    /// One id, a list of ids, or nothing.
    fn token_ids(&self, name: &str) -> Result<Vec<u32>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        ids.iter()
            .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect::<Option<Vec<u32>>>()
            .ok_or_else(|| bad(format!("`{name}` is {value}, accepted is a token id or a list of them")))
    }
}

/// Features that would change the arithmetic and that the decoder does not have.
fn refuse_unsupported(fields: &Fields) -> Result<(), ModelError> {
    let refuse = |what: &str, reason: &str| Err(ModelError::unsupported(FILE, what, reason));
    if fields.get("quantization_config").is_some() {
        return refuse("quantization_config", "use the unquantised checkpoint or a GGUF file");
    }
    for (name, reason) in [
        ("attention_bias", "a bias on the output projection is not served"),
        ("mlp_bias", "biases in the feed-forward layer are not served"),
        ("rope_interleaved", "only the rotate-half form is served"),
    ] {
        if fields.flag(name)?.unwrap_or(false) {
            return refuse(name, reason);
        }
    }
    match fields.text("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(other) => return refuse(&format!("hidden_act `{other}`"), "accepted is `silu`"),
    }
    match fields.number("partial_rotary_factor")? {
        None | Some(1.0) => {}
        Some(other) => return refuse(&format!("partial_rotary_factor {other}"), "accepted is 1"),
    }
    Ok(())
}

/// `rope_theta` and `rope_scaling`, or `rope_parameters` as transformers 5 writes them.
fn rope(fields: &Fields, head_dim: usize) -> Result<RopeSpec, ModelError> {
    let nested = fields.object("rope_parameters")?;
    let theta = match nested.as_ref().map(|object| object.number("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => fields.number("rope_theta")?.unwrap_or(10_000.0),
    };
    let scaling = match nested {
        Some(object) => scaling(&object, fields)?,
        None => match fields.object("rope_scaling")? {
            Some(object) => scaling(&object, fields)?,
            None => RopeScaling::None,
        },
    };
    Ok(RopeSpec { theta: theta as f32, scaling, rotary_dim: head_dim })
}

fn scaling(object: &Fields, config: &Fields) -> Result<RopeScaling, ModelError> {
    if let Some(factor) = object.number("partial_rotary_factor")?.filter(|&factor| factor != 1.0) {
        return Err(ModelError::unsupported(FILE, format!("partial_rotary_factor {factor}"), "accepted is 1"));
    }
    let kind = match object.text("rope_type")? {
        Some(kind) => Some(kind),
        None => object.text("type")?,
    };
    let positive = |name: &str| match object.number(name)? {
        Some(value) if value.is_finite() && value > 0.0 => Ok(value as f32),
        Some(value) => Err(bad(format!("`{name}` of the rope scaling is {value}, accepted is > 0"))),
        None => Err(bad(format!("`{name}` of the rope scaling is missing"))),
    };
    match kind {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: positive("factor")? }),
        Some("llama3") => {
            let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
            if high <= low {
                return Err(bad(format!("`high_freq_factor` {high} must be above `low_freq_factor` {low}")));
            }
            let original_context = match object.size("original_max_position_embeddings", Bounds::CONTEXT)? {
                Some(original) => original,
                None => config
                    .size("max_position_embeddings", Bounds::CONTEXT)?
                    .ok_or_else(|| missing("original_max_position_embeddings"))?,
            };
            let factor = positive("factor")?;
            Ok(RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_context })
        }
        Some(other) => Err(ModelError::unsupported(
            FILE,
            format!("rope scaling `{other}`"),
            "accepted are `default`, `linear` and `llama3`",
        )),
    }
}

fn window(fields: &Fields, family: &Family, layers: usize) -> Result<Option<usize>, ModelError> {
    let window = match family.window {
        WindowRule::Never => None,
        // Absent means transformers' default; null means none.
        WindowRule::Always { default } if !fields.0.contains_key("sliding_window") => Some(default),
        WindowRule::Always { .. } => fields.size("sliding_window", Bounds::CONTEXT)?,
        WindowRule::WhenUsed if !fields.flag("use_sliding_window")?.unwrap_or(false) => None,
        WindowRule::WhenUsed => match fields.get("max_window_layers").and_then(Value::as_u64) {
            Some(0) => fields.size("sliding_window", Bounds::CONTEXT)?,
            Some(full) if full >= layers as u64 => None,
            other => {
                let reason =
                    format!("max_window_layers is {other:?} of {layers} layers; accepted is all layers or none");
                return Err(ModelError::unsupported(FILE, "use_sliding_window in some layers", reason));
            }
        },
    };
    check_layer_types(fields, window.is_some())?;
    Ok(window)
}

/// `layer_types` may say per layer what the fields above say for all; a mix is another model.
fn check_layer_types(fields: &Fields, windowed: bool) -> Result<(), ModelError> {
    let Some(types) = fields.get("layer_types") else { return Ok(()) };
    let types = types.as_array().ok_or_else(|| bad("`layer_types` is not a list".to_owned()))?;
    let want = if windowed { "sliding_attention" } else { "full_attention" };
    match types.iter().find(|kind| kind.as_str() != Some(want)) {
        None => Ok(()),
        Some(other) => Err(ModelError::unsupported(
            FILE,
            format!("layer_types with {other}"),
            format!("every layer must be `{want}`"),
        )),
    }
}

#[cfg(test)]
mod tests;
