use super::*;
use serde_json::json;

fn base() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": true
    })
}

/// The base config with some fields replaced; `null` stays as null.
fn with(changes: Value) -> Result<DecoderSpec, ModelError> {
    let mut config = base();
    for (key, value) in changes.as_object().expect("an object") {
        config[key] = value.clone();
    }
    DecoderSpec::from_config(&config.to_string())
}

fn without(field: &str) -> Result<DecoderSpec, ModelError> {
    let mut config = base();
    config.as_object_mut().expect("an object").remove(field);
    DecoderSpec::from_config(&config.to_string())
}

#[test]
fn a_llama_config_is_read_whole() {
    let spec = with(json!({})).expect("valid");
    let rope = RopeSpec { theta: 10_000.0, scaling: RopeScaling::None, rotary_dim: 16 };
    let want = DecoderSpec {
        family: "llama".to_owned(),
        hidden: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        intermediate: 96,
        vocab: 100,
        context: 256,
        rms_eps: 1e-5,
        rope,
        window: None,
        qkv_bias: false,
        tied_head: true,
        bos: Some(1),
        eos: vec![2],
    };
    assert_eq!(spec, want);
}

#[test]
fn absent_fields_take_the_defaults_of_their_family() {
    let kv_heads = |model_type: &str| {
        let mut config = base();
        config["model_type"] = json!(model_type);
        config["num_attention_heads"] = json!(32);
        config["hidden_size"] = json!(512);
        config.as_object_mut().expect("an object").remove("num_key_value_heads");
        DecoderSpec::from_config(&config.to_string()).expect("valid").kv_heads
    };
    assert_eq!(["llama", "mistral", "qwen2"].map(kv_heads), [32, 8, 32]);
    assert_eq!(with(json!({"head_dim": 32})).expect("valid").q_width(), 128);
    assert_eq!(with(json!({"eos_token_id": [2, 3]})).expect("valid").eos, [2, 3]);
    assert_eq!(with(json!({"eos_token_id": null})).expect("valid").eos, Vec::<u32>::new());
    assert!(!without("tie_word_embeddings").expect("valid").tied_head);
}

#[test]
fn windows_follow_each_family() {
    let window = |changes: Value| with(changes).expect("valid").window;
    assert_eq!(window(json!({"sliding_window": 8})), None, "llama has none");
    assert_eq!(window(json!({"model_type": "mistral"})), Some(4096), "absent is transformers' default");
    assert_eq!(window(json!({"model_type": "mistral", "sliding_window": null})), None);
    assert_eq!(window(json!({"model_type": "mistral", "sliding_window": 8})), Some(8));
    assert_eq!(window(json!({"model_type": "qwen2", "sliding_window": 8})), None, "off unless used");
    let used = |layers: u32| json!({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": true, "max_window_layers": layers});
    assert_eq!(window(used(0)), Some(8));
    assert_eq!(window(used(2)), None);
    assert_eq!(with(used(1)).expect_err("a mix").code(), "model_unsupported");
    assert!(with(json!({"model_type": "qwen2"})).expect("valid").qkv_bias);
}

#[test]
fn rope_is_read_from_both_spellings() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 128});
    let want = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 128 };
    assert_eq!(with(json!({"rope_scaling": llama3})).expect("valid").rope.scaling, want);
    let mut nested = llama3;
    nested["rope_theta"] = json!(5e5);
    let spec = with(json!({"rope_parameters": nested})).expect("valid");
    assert_eq!((spec.rope.scaling, spec.rope.theta), (want, 5e5));
    let linear = with(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})).expect("valid");
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    assert_eq!(
        with(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})).expect("valid").rope.scaling,
        RopeScaling::None
    );
}

#[test]
fn a_config_that_is_not_served_is_refused_by_name() {
    let (unsupported, invalid) = ("model_unsupported", "model_invalid");
    let cases = [
        (json!({"model_type": "gemma3"}), unsupported, "gemma3"),
        (json!({"model_type": "mixtral"}), unsupported, "mixtral"),
        (json!({"model_type": 7}), invalid, "model_type"),
        (json!({"quantization_config": {"bits": 4}}), unsupported, "quantization_config"),
        (json!({"attention_bias": true}), unsupported, "attention_bias"),
        (json!({"mlp_bias": true}), unsupported, "mlp_bias"),
        (json!({"rope_interleaved": true}), unsupported, "rope_interleaved"),
        (json!({"hidden_act": "gelu"}), unsupported, "gelu"),
        (json!({"partial_rotary_factor": 0.5}), unsupported, "partial_rotary_factor"),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), unsupported, "partial_rotary_factor"),
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), unsupported, "yarn"),
        (json!({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}), unsupported, "dynamic"),
        (json!({"rope_scaling": {"rope_type": "longrope"}}), unsupported, "longrope"),
        (json!({"rope_scaling": {"rope_type": "linear"}}), invalid, "`factor`"),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}), invalid, "`factor`"),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}}),
            invalid,
            "high_freq_factor",
        ),
        (json!({"rope_scaling": "linear"}), invalid, "rope_scaling"),
        (json!({"layer_types": ["full_attention", "sliding_attention"]}), unsupported, "layer_types"),
        (json!({"hidden_size": 0}), invalid, "hidden_size"),
        (json!({"hidden_size": -64}), invalid, "hidden_size"),
        (json!({"hidden_size": 64.5}), invalid, "hidden_size"),
        (json!({"hidden_size": "64"}), invalid, "hidden_size"),
        (json!({"hidden_size": 1u64 << 40}), invalid, "hidden_size"),
        (json!({"hidden_size": 66}), invalid, "not a multiple"),
        (json!({"num_hidden_layers": 100_000}), invalid, "num_hidden_layers"),
        (json!({"vocab_size": u64::MAX}), invalid, "vocab_size"),
        (json!({"num_key_value_heads": 3}), invalid, "not a multiple"),
        (json!({"head_dim": 15}), invalid, "odd"),
        (json!({"rms_norm_eps": 0.0}), invalid, "rms_norm_eps"),
        (json!({"rms_norm_eps": "small"}), invalid, "rms_norm_eps"),
        (json!({"rope_theta": -1.0}), invalid, "rope_theta"),
        (json!({"eos_token_id": 100}), invalid, "outside the vocabulary"),
        (json!({"eos_token_id": "</s>"}), invalid, "eos_token_id"),
        (json!({"bos_token_id": -1}), invalid, "bos_token_id"),
        (json!({"tie_word_embeddings": "yes"}), invalid, "tie_word_embeddings"),
    ];
    for (changes, code, text) in cases {
        let error = with(changes.clone()).expect_err(&format!("{changes} was accepted"));
        assert_eq!(error.code(), code, "{changes}: {error}");
        assert!(error.to_string().contains(text), "{changes}: `{error}` does not say `{text}`");
    }
    let required = [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ];
    for field in required {
        let error = without(field).expect_err(&format!("accepted without {field}"));
        assert!(error.to_string().contains(&format!("`{field}` is missing")), "{error}");
    }
}

#[test]
fn text_that_is_no_config_is_refused() {
    let deep = "[".repeat(200_000);
    let huge = " ".repeat(CONFIG_BYTES_MAX as usize + 1);
    for text in ["", "null", "[]", "{", "{\"model_type\":\"llama\"", "\u{0}", "{\"hidden_size\":1e999}", &deep, &huge] {
        let error = DecoderSpec::from_config(text).expect_err("accepted");
        assert!(["model_invalid", "model_too_large"].contains(&error.code()), "{error}");
    }
}
