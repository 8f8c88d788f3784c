//! `adapter_config.json`: what is not served is refused by name, what is malformed with the exact code, and what is served
//! means what it means in PEFT.

mod support;

use loramux_models::adapter::{self, AdapterLimits};
use serde_json::{Value, json};
use support::adapter::{
    INVALID, SEED, TARGETS, TOO_LARGE, UNSUPPORTED, config, good_weights, read_files, refused, spec,
};
use support::{ALL_MODULES, Stored, Tensors, adapter_weights, changed, safetensors, tiny_config};

#[test]
fn config_features_are_refused_by_name() {
    let cases = [
        ("peft_type", json!("LOHA"), "LOHA"),
        ("peft_type", json!("lora"), "`lora`"),
        ("task_type", json!("SEQ_CLS"), "SEQ_CLS"),
        ("bias", json!("vera_only"), "bias"),
        ("modules_to_save", json!(["score"]), "`score`"),
        ("modules_to_save", json!(["lm_head", "norm"]), "`norm`"),
        ("fan_in_fan_out", json!(true), "fan_in_fan_out"),
        ("trainable_token_indices", json!([1, 2]), "trainable_token_indices"),
        ("trainable_token_indices", json!({"embed_tokens": [1]}), "trainable_token_indices"),
        ("layer_replication", json!([[0, 2], [1, 3]]), "layer_replication"),
        ("alora_invocation_tokens", json!([5]), "alora_invocation_tokens"),
        ("target_parameters", json!(["mlp.experts.gate_up_proj"]), "target_parameters"),
        ("use_qalora", json!(true), "use_qalora"),
        ("use_bdlora", json!({"nblocks": 2}), "use_bdlora"),
        ("megatron_config", json!({"tp": 2}), "megatron_config"),
        ("arrow_config", json!({"top_k": 2}), "arrow_config"),
        ("kasa_config", json!({"x": 1}), "kasa_config"),
        ("velora_config", json!({"x": 1}), "velora_config"),
        ("monteclora_config", json!({"x": 1}), "monteclora_config"),
        ("lora_ga_config", json!({"x": 1}), "lora_ga_config"),
        ("corda_config", json!({"x": 1}), "corda_config"),
        ("auto_map", json!({"AutoModel": "evil.py"}), "auto_map"),
        ("a_field_of_next_year", json!(1), "a_field_of_next_year"),
        ("init_lora_weights", json!("pissa"), "pissa"),
        ("init_lora_weights", json!("olora"), "olora"),
        ("init_lora_weights", json!("loftq"), "loftq"),
        ("init_lora_weights", json!("corda"), "corda"),
        ("layers_pattern", json!("blocks"), "layers_pattern"),
        ("target_modules", json!("(?=q)q_proj"), "look-around"),
        ("rank_pattern", json!({"(q": 4}), "(q"),
        ("alpha_pattern", json!({"a)|(b": 4}), "a)|(b"),
    ];
    for (field, value, text) in cases {
        let config = changed(config(), json!({field: value}));
        refused(&config.to_string(), read_files(config.to_string(), good_weights()), UNSUPPORTED, text);
    }
}

#[test]
fn unset_features_and_inert_fields_are_accepted() {
    let config = changed(
        config(),
        json!({
            "use_dora": false, "modules_to_save": [], "layer_replication": null, "corda_config": {}, "lora_bias": null,
            "a_field_of_next_year": null, "another_one": false, "init_lora_weights": "gaussian", "peft_version": "0.21.2",
            "qalora_group_size": 16, "megatron_core": "megatron.core", "revision": "main", "lora_dropout": 0.05,
            "layers_pattern": "layers", "eva_config": {"rho": 2.0}, "auto_mapping": {"parent_library": "transformers"},
        }),
    );
    read_files(config.to_string(), good_weights()).expect("nothing here changes the arithmetic");
}

#[test]
fn malformed_config_values_are_refused() {
    let cases = [
        ("r", json!(0), INVALID, "`r` is 0"),
        ("r", json!(-1), INVALID, "`r` is -1"),
        ("r", json!(8.0), INVALID, "`r` is 8.0"),
        ("r", json!(8.5), INVALID, "`r` is 8.5"),
        ("r", json!("8"), INVALID, "`r` is \"8\""),
        ("r", json!(true), INVALID, "`r` is true"),
        ("r", json!(null), INVALID, "`r` is null"),
        ("r", json!(1e300), INVALID, "`r` is 1e+300"),
        ("r", json!(513), "adapter_rank_limit", "up to 512"),
        ("r", json!(1_000_000_000u64), "adapter_rank_limit", "1000000000"),
        ("r", json!(8), INVALID, "rank 8"),
        ("rank_pattern", json!({"q_proj": 0}), INVALID, "rank_pattern[\"q_proj\"]"),
        ("rank_pattern", json!({"q_proj": 600}), "adapter_rank_limit", "rank_pattern[\"q_proj\"]"),
        ("rank_pattern", json!({"q_proj": 8}), INVALID, "rank 8"),
        ("rank_pattern", json!(["q_proj"]), INVALID, "rank_pattern"),
        ("rank_pattern", json!({"(((a{99}){99}){99}){99}": 4}), INVALID, "compiled"),
        ("alpha_pattern", json!({"q_proj": "big"}), INVALID, "alpha_pattern[\"q_proj\"]"),
        ("lora_alpha", json!("16"), INVALID, "lora_alpha"),
        ("lora_alpha", json!(null), INVALID, "lora_alpha"),
        ("lora_alpha", json!(1e30), INVALID, "lora_alpha"),
        ("use_rslora", json!("yes"), INVALID, "use_rslora"),
        ("peft_type", json!(7), INVALID, "peft_type"),
        ("target_modules", json!(null), INVALID, "target_modules"),
        ("target_modules", json!([]), INVALID, "target_modules"),
        ("target_modules", json!(5), INVALID, "target_modules"),
        ("target_modules", json!(["q_proj", 5]), INVALID, "target_modules"),
        ("target_modules", json!("(((q{99}){99}){99}){99}"), INVALID, "compiled"),
        ("target_modules", json!(["q_proj"]), INVALID, "does not target"),
        ("target_modules", json!(["q_proj", "v_proj", "k_proj"]), INVALID, "are missing"),
        ("target_modules", json!("all-linear"), INVALID, "are missing"),
        ("target_modules", json!(["q_proj", "v_proj", "lm_head"]), INVALID, "lm_head.lora_A.weight"),
        ("target_modules", json!(["q_proj", "v_proj", "embed_tokens"]), INVALID, "embed_tokens.lora_embedding_A"),
        ("use_dora", json!(true), INVALID, "q_proj.lora_magnitude_vector"),
        ("lora_bias", json!(true), INVALID, "q_proj.lora_B.bias"),
        ("modules_to_save", json!(["lm_head"]), INVALID, "base_model.model.lm_head.weight"),
        ("modules_to_save", json!("lm_head"), INVALID, "a list of names"),
        ("modules_to_save", json!([5]), INVALID, "a list of names"),
        ("exclude_modules", json!(["v_proj"]), INVALID, "does not target"),
        ("exclude_modules", json!(5), INVALID, "exclude_modules"),
        ("layers_to_transform", json!([0, 1]), INVALID, "does not target"),
        ("layers_to_transform", json!("all"), INVALID, "layers_to_transform"),
        ("layers_to_transform", json!([-1]), INVALID, "layers_to_transform"),
        ("base_model_name_or_path", json!(5), INVALID, "base_model_name_or_path"),
    ];
    for (field, value, code, text) in cases {
        let config = changed(config(), json!({field: value}));
        refused(&config.to_string(), read_files(config.to_string(), good_weights()), code, text);
    }
    for field in ["peft_type", "r", "lora_alpha", "target_modules"] {
        let mut config = config();
        config.as_object_mut().expect("an object").remove(field);
        refused(field, read_files(config.to_string(), good_weights()), INVALID, &format!("`{field}` is missing"));
    }
    let patterns: serde_json::Map<String, Value> = (0..257).map(|i| (format!("m{i}"), json!(4))).collect();
    let config = changed(config(), json!({"rank_pattern": patterns}));
    refused("257 patterns", read_files(config.to_string(), good_weights()), INVALID, "257 patterns");
}

#[test]
fn text_that_is_no_config_is_refused() {
    let twice = config().to_string().replacen("\"r\":4", "\"r\":4,\"r\":400", 1);
    let twice_deep = config().to_string().replacen("\"rank_pattern\":{}", "\"rank_pattern\":{\"a\":1,\"a\":2}", 1);
    let cases: [(&[u8], &str); 12] = [
        (b"", "not valid JSON"),
        (b"null", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"{\"r\": 4", "not valid JSON"),
        (b"{\"r\": 4} x", "not valid JSON"),
        (b"{\"r\": NaN}", "not valid JSON"),
        (b"{\"lora_alpha\": 1e999}", "not valid JSON"),
        (b"{\"a\": \"\xff\xfe\"}", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (twice.as_bytes(), "`r` appears twice"),
        (twice_deep.as_bytes(), "`a` appears twice"),
        (&[b'['; 60_000], "not valid JSON"),
    ];
    for (text, reason) in cases {
        refused(&String::from_utf8_lossy(text), read_files(text, good_weights()), INVALID, reason);
    }
    let long = format!("{}{}", config(), " ".repeat(64 << 10));
    refused("64 KiB of spaces", read_files(long, good_weights()), TOO_LARGE, "65536");
}

#[test]
fn target_modules_follow_the_rules_of_peft() {
    let spec = spec();
    let all = adapter_weights(&tiny_config("llama"), &ALL_MODULES, SEED, |_, _| 4);
    let fits = |changes: Value, keep: &dyn Fn(&str) -> bool| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let tensors: Tensors = all.iter().filter(|(name, _)| keep(name)).map(|(n, t)| (n.clone(), t.clone())).collect();
        let config = changed(config(), changes.clone());
        support::write_adapter(dir.path(), &config, &tensors, Stored::Bf16);
        let adapter = adapter::read(dir.path(), &spec, &AdapterLimits::default());
        adapter.unwrap_or_else(|error| panic!("{changes}: {error}")).modules.len()
    };
    let any = |parts: &'static [&'static str]| move |name: &str| parts.iter().any(|part| name.contains(part));
    assert_eq!(fits(json!({"target_modules": "all-linear"}), &|_| true), 21);
    assert_eq!(fits(json!({"target_modules": ALL_MODULES}), &|_| true), 21);
    assert_eq!(fits(json!({"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}), &any(&["q_proj", "up_proj"])), 6);
    assert_eq!(
        fits(json!({"target_modules": ["model.layers.1.mlp.up_proj", "absent"]}), &any(&["layers.1.mlp.up_proj"])),
        1
    );
    assert_eq!(fits(json!({"target_modules": ".*\\.(q|v)_proj"}), &any(&["q_proj", "v_proj"])), 6);
    assert_eq!(
        fits(
            json!({"target_modules": "model\\.layers\\.[02]\\..*down_proj"}),
            &any(&["0.mlp.down_proj", "2.mlp.down_proj"])
        ),
        2
    );
    let excluded = json!({"target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj", "o_proj"]});
    assert_eq!(fits(excluded, &|name| !name.contains("layers.0.mlp.up_proj") && !name.contains("o_proj")), 17);
    let excluded = json!({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ".*\\.k_proj"});
    assert_eq!(fits(excluded, &any(&["q_proj"])), 3);
    assert_eq!(fits(json!({"layers_to_transform": 1}), &any(&["1.self_attn.q_proj", "1.self_attn.v_proj"])), 2);
    assert_eq!(
        fits(
            json!({"layers_to_transform": [0, 2], "layers_pattern": ["layers"]}),
            &any(&["0.self_attn.q_proj", "0.self_attn.v_proj", "2.self_attn.q_proj", "2.self_attn.v_proj"])
        ),
        4
    );
    assert_eq!(fits(json!({"layers_to_transform": []}), &any(&["q_proj", "v_proj"])), 6);
}

#[test]
fn the_first_pattern_in_the_files_order_wins() {
    let base = tiny_config("llama");
    let rank_of = |layer: usize, module: &str| match (layer, module) {
        (0, "q_proj") => 6,
        (_, "q_proj") => 2,
        _ => 4,
    };
    let weights = safetensors(&adapter_weights(&base, &TARGETS, SEED, rank_of), Stored::F32);
    let patterns =
        |order: &str| config().to_string().replacen("\"rank_pattern\":{}", &format!("\"rank_pattern\":{order}"), 1);
    let specific_first = patterns("{\"layers.0.self_attn.q_proj\":6,\"q_proj\":2,\"proj\":99}");
    let adapter = read_files(specific_first, &weights).expect("the specific one is asked first");
    let ranks: Vec<usize> = adapter.modules.iter().map(|module| module.rank).collect();
    assert_eq!(ranks, [6, 4, 2, 4, 2, 4], "`proj` alone is no end of `q_proj` after a dot");
    assert_eq!(adapter.modules[0].scale, 8.0 / 6.0);
    let general_first = patterns("{\"q_proj\":2,\"layers.0.self_attn.q_proj\":6}");
    refused("general first", read_files(general_first, &weights), INVALID, "rank 2");
}

#[test]
fn features_that_exclude_each_other_are_refused_as_peft_refuses_them() {
    let both = changed(config(), json!({"use_dora": true, "lora_bias": true}));
    refused("both", read_files(both.to_string(), good_weights()), INVALID, "exclude each other");
    let embedding = changed(config(), json!({"lora_bias": true, "target_modules": ["q_proj", "embed_tokens"]}));
    refused("embedding", read_files(embedding.to_string(), good_weights()), INVALID, "exclude each other");
    let tied = changed(config(), json!({"ensure_weight_tying": true, "modules_to_save": ["lm_head"]}));
    refused("tied", read_files(tied.to_string(), good_weights()), UNSUPPORTED, "ensure_weight_tying");
    let unused = changed(config(), json!({"ensure_weight_tying": true}));
    read_files(unused.to_string(), good_weights()).expect("it concerns nothing that this adapter has");
    let trained = changed(config(), json!({"bias": "all"}));
    read_files(trained.to_string(), good_weights()).expect("this base has no biases, so none were trained");
}
