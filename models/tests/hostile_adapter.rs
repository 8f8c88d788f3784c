//! Malformed and unserved adapters: each is refused with the exact code, and the message names the cause.

mod support;

use loramux_models::DecoderSpec;
use loramux_models::adapter::{self, AdapterError, AdapterLimits, PeftAdapter};
use serde_json::{Value, json};
use std::path::Path;
use support::{
    ALL_MODULES, Stored, Tensors, adapter_config, adapter_weights, changed, raw_safetensors, safetensors, tiny_config,
    write,
};

const SEED: u64 = 0xBAD0_0001;
const TARGETS: [&str; 2] = ["q_proj", "v_proj"];
const Q0_A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

const INVALID: &str = "adapter_invalid";
const UNSUPPORTED: &str = "adapter_unsupported";
const MISMATCH: &str = "adapter_base_mismatch";
const TOO_LARGE: &str = "adapter_too_large";

fn spec() -> DecoderSpec {
    DecoderSpec::from_config(&tiny_config("llama").to_string()).expect("valid")
}

fn weights() -> Tensors {
    adapter_weights(&tiny_config("llama"), &TARGETS, SEED, |_, _| 4)
}

fn config() -> Value {
    adapter_config(4, &TARGETS)
}

fn read(dir: &Path) -> Result<PeftAdapter, AdapterError> {
    adapter::read(dir, &spec(), &AdapterLimits::default())
}

/// Reads an adapter of these two files.
fn read_files(config: impl AsRef<[u8]>, weights: impl AsRef<[u8]>) -> Result<PeftAdapter, AdapterError> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "adapter_config.json", config);
    write(dir.path(), "adapter_model.safetensors", weights);
    read(dir.path())
}

fn good_weights() -> Vec<u8> {
    safetensors(&weights(), Stored::F32)
}

fn refused(case: &str, result: Result<PeftAdapter, AdapterError>, code: &str, text: &str) {
    let error = result.err().unwrap_or_else(|| panic!("{case} was accepted"));
    assert_eq!(error.code(), code, "{case}: {error}");
    assert!(error.to_string().contains(text), "{case}: `{error}` does not say `{text}`");
}

#[test]
fn a_good_adapter_is_read_whole() {
    let adapter = read_files(config().to_string(), good_weights()).expect("good");
    assert_eq!(adapter.module_names, TARGETS);
    assert_eq!((adapter.rank_min, adapter.rank_max, adapter.modules.len()), (4, 4, 6));
    assert_eq!(adapter.base_model, "tiny");
    let first = &adapter.modules[0];
    assert_eq!((first.layer, first.rank, first.scale, first.d_out, first.d_in), (0, 4, 2.0, 48, 48));
    assert_eq!(first.a, weights()[Q0_A].values);
}

#[test]
fn every_storage_type_is_read_as_it_was_rounded() {
    for stored in [Stored::F32, Stored::F16, Stored::Bf16] {
        let adapter = read_files(config().to_string(), safetensors(&weights(), stored)).expect("good");
        assert_eq!(adapter.modules[0].a, stored.round(&weights()[Q0_A].values), "{stored:?}");
    }
}

#[test]
fn config_features_are_refused_by_name() {
    let cases = [
        ("peft_type", json!("LOHA"), "LOHA"),
        ("peft_type", json!("lora"), "`lora`"),
        ("task_type", json!("SEQ_CLS"), "SEQ_CLS"),
        ("bias", json!("all"), "bias"),
        ("bias", json!("lora_only"), "bias"),
        ("use_dora", json!(true), "use_dora"),
        ("lora_bias", json!(true), "lora_bias"),
        ("modules_to_save", json!(["lm_head"]), "modules_to_save"),
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
        ("target_modules", json!(["q_proj", "lm_head"]), "lm_head"),
        ("target_modules", json!(["model.embed_tokens"]), "embed_tokens"),
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

/// A file whose tensors are changed before it is written.
fn tensors(change: impl FnOnce(&mut Tensors)) -> Vec<u8> {
    let mut tensors = weights();
    change(&mut tensors);
    safetensors(&tensors, Stored::F32)
}

fn rename(from: &str, to: &str) -> Vec<u8> {
    tensors(|tensors| {
        let tensor = tensors.remove(from).expect("it is there");
        tensors.insert(to.to_owned(), tensor);
    })
}

fn extra(name: &str) -> Vec<u8> {
    tensors(|tensors| {
        let tensor = tensors[Q0_A].clone();
        tensors.insert(name.to_owned(), tensor);
    })
}

#[test]
fn tensors_that_do_not_fit_are_refused_with_name_and_shapes() {
    let layer0 = "base_model.model.model.layers.0.self_attn";
    let b = Q0_A.replace("lora_A", "lora_B");
    let cases = [
        (
            "a module of another model",
            rename(Q0_A, "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"),
            MISMATCH,
            "c_attn",
        ),
        ("a layer past the last", extra(&Q0_A.replace("layers.0", "layers.3")), MISMATCH, "layers.3"),
        ("no prefix", rename(Q0_A, "model.layers.0.self_attn.q_proj.lora_A.weight"), INVALID, "are not named"),
        ("an adapter name inside", rename(Q0_A, &Q0_A.replace("lora_A", "lora_A.default")), INVALID, "are not named"),
        ("a tensor of nothing", extra("hello"), INVALID, "`hello`"),
        ("no A", tensors(|t| drop(t.remove(Q0_A))), INVALID, Q0_A),
        ("no B", tensors(|t| drop(t.remove(&b))), INVALID, &b),
        (
            "neither",
            tensors(|t| {
                t.remove(Q0_A);
                t.remove(&b);
            }),
            INVALID,
            "2 tensors of targeted modules are missing",
        ),
        ("an untargeted pair", extra(&Q0_A.replace("q_proj", "k_proj")), INVALID, "does not target"),
        ("dora", extra(&format!("{layer0}.q_proj.lora_magnitude_vector")), UNSUPPORTED, "use_dora"),
        ("lora bias", extra(&format!("{layer0}.q_proj.lora_B.bias")), UNSUPPORTED, "lora_bias"),
        ("bias", extra(&format!("{layer0}.q_proj.bias")), UNSUPPORTED, "bias"),
        ("head", extra("base_model.model.lm_head.lora_A.weight"), UNSUPPORTED, "lm_head"),
        ("trained head", extra("base_model.model.lm_head.weight"), UNSUPPORTED, "lm_head"),
        ("embedding", extra("base_model.model.model.embed_tokens.lora_embedding_A"), UNSUPPORTED, "embed_tokens"),
        ("saved module", extra("base_model.model.score.modules_to_save.weight"), UNSUPPORTED, "modules_to_save"),
        (
            "wrong d_in",
            tensors(|t| {
                let a = t.get_mut(Q0_A).expect("A");
                a.shape = vec![4, 24];
                a.values.truncate(96);
            }),
            MISMATCH,
            "shape [4, 24], this base model wants [4, 48]",
        ),
        (
            "wrong d_out",
            tensors(|t| {
                let b = t.get_mut(&b).expect("B");
                b.shape = vec![24, 4];
                b.values.truncate(96);
            }),
            MISMATCH,
            "shape [24, 4], this base model wants [48, 4]",
        ),
        (
            "wrong rank in A",
            tensors(|t| {
                let a = t.get_mut(Q0_A).expect("A");
                a.shape = vec![2, 48];
                a.values.truncate(96);
            }),
            INVALID,
            "shape [2, 48], rank 4 of adapter_config.json wants [4, 48]",
        ),
        (
            "wrong rank in B",
            tensors(|t| {
                let b = t.get_mut(&b).expect("B");
                b.shape = vec![48, 2];
                b.values.truncate(96);
            }),
            INVALID,
            "shape [48, 2], rank 4 of adapter_config.json wants [48, 4]",
        ),
        ("one dimension", tensors(|t| t.get_mut(Q0_A).expect("A").shape = vec![192]), INVALID, "has shape [192]"),
        (
            "a scalar",
            tensors(|t| {
                let a = t.get_mut(Q0_A).expect("A");
                a.shape = vec![];
                a.values.truncate(1);
            }),
            INVALID,
            "has shape []",
        ),
        (
            "an empty matrix",
            tensors(|t| {
                let a = t.get_mut(Q0_A).expect("A");
                a.shape = vec![0, 48];
                a.values.clear();
            }),
            INVALID,
            "shape [0, 48]",
        ),
        ("three dimensions", tensors(|t| t.get_mut(Q0_A).expect("A").shape = vec![4, 6, 8]), INVALID, "3 dimensions"),
        ("NaN", tensors(|t| t.get_mut(Q0_A).expect("A").values[7] = f32::NAN), INVALID, "the value NaN at element 7"),
        (
            "infinity",
            tensors(|t| t.get_mut(&b).expect("B").values[0] = f32::INFINITY),
            INVALID,
            "the value inf at element 0",
        ),
        (
            "minus infinity",
            tensors(|t| t.get_mut(&b).expect("B").values[1] = f32::NEG_INFINITY),
            INVALID,
            "the value -inf",
        ),
    ];
    for (case, weights, code, text) in cases {
        refused(case, read_files(config().to_string(), weights), code, text);
    }
}

#[test]
fn malformed_safetensors_files_are_refused() {
    let entry = |dtype: &str, shape: &str, begin: u64, end: u64| {
        format!("{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}")
    };
    let one =
        |dtype: &str, shape: &str, begin: u64, end: u64| format!("{{\"{Q0_A}\":{}}}", entry(dtype, shape, begin, end));
    let good = entry("F32", "[1,2]", 0, 8);
    let huge = u64::MAX;
    let flood: String = (0..65_537).map(|i| format!("\"t{i}\":{},", entry("F32", "[0]", 0, 0))).collect();
    let flood = format!("{{{}}}", flood.trim_end_matches(','));
    let sized = |size: u64, rest: &[u8]| [&size.to_le_bytes()[..], rest].concat();
    let cases: Vec<(&str, Vec<u8>, &str, &str)> = vec![
        ("empty", vec![], INVALID, "0 bytes"),
        ("seven bytes", vec![0; 7], INVALID, "7 bytes"),
        ("no header", sized(0, b""), INVALID, "does not start with"),
        ("a header past the end", sized(100, b"{}"), INVALID, "claims 100 bytes in a file of 10"),
        ("a header of 2^64", sized(huge, b"{}"), TOO_LARGE, "18446744073709551615"),
        ("a header over the limit", sized((16 << 20) + 1, b"{}"), TOO_LARGE, "16777217"),
        ("not JSON", raw_safetensors("{hello", b""), INVALID, "not valid"),
        ("an array", raw_safetensors("[]", b""), INVALID, "does not start with"),
        ("a space first", raw_safetensors(" {}", b""), INVALID, "does not start with"),
        ("two objects", raw_safetensors("{}{}", b""), INVALID, "not valid"),
        (
            "deep JSON",
            raw_safetensors(&format!("{{\"__metadata__\":{}", "[".repeat(100_000)), b""),
            INVALID,
            "not valid",
        ),
        ("no data_offsets", raw_safetensors("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", b""), INVALID, "data_offsets"),
        (
            "a stranger's field",
            raw_safetensors(&format!("{{\"a\":{}", good.replace('}', ",\"x\":1}}")), &[0; 8]),
            INVALID,
            "`x`",
        ),
        (
            "a name twice",
            raw_safetensors(&format!("{{\"a\":{good},\"a\":{good}}}"), &[0; 8]),
            INVALID,
            "`a` appears twice",
        ),
        ("metadata twice", raw_safetensors("{\"__metadata__\":{},\"__metadata__\":{}}", b""), INVALID, "appears twice"),
        ("a negative extent", raw_safetensors(&one("F32", "[-1,2]", 0, 8), &[0; 8]), INVALID, "not valid"),
        ("a fractional extent", raw_safetensors(&one("F32", "[1.5,2]", 0, 8), &[0; 8]), INVALID, "not valid"),
        (
            "an overflowing shape",
            raw_safetensors(&one("F32", "[4294967296,4294967296]", 0, 8), &[0; 8]),
            INVALID,
            "more than 2^64",
        ),
        (
            "a shape over its bytes",
            raw_safetensors(&one("F32", "[2,2]", 0, 8), &[0; 8]),
            INVALID,
            "is 16 bytes, the file has 8",
        ),
        ("offsets reversed", raw_safetensors(&one("F32", "[1,2]", 8, 0), &[0; 8]), INVALID, "outside"),
        ("offsets past the end", raw_safetensors(&one("F32", "[1,2]", 0, 8), &[0; 4]), INVALID, "outside the 4 bytes"),
        ("offsets of 2^64", raw_safetensors(&one("F32", "[1,2]", huge - 7, huge), &[0; 8]), INVALID, "outside"),
        (
            "trailing bytes",
            raw_safetensors(&one("F32", "[1,2]", 0, 8), &[0; 9]),
            INVALID,
            "1 bytes after the last tensor",
        ),
        ("a gap", raw_safetensors(&one("F32", "[1,2]", 4, 12), &[0; 12]), INVALID, "bytes 0..4 belong to no tensor"),
        (
            "an overlap",
            raw_safetensors(&format!("{{\"a\":{good},\"b\":{}}}", entry("F32", "[1,2]", 4, 12)), &[0; 12]),
            INVALID,
            "overlaps",
        ),
        (
            "the same bytes twice",
            raw_safetensors(&format!("{{\"a\":{good},\"b\":{good}}}"), &[0; 8]),
            INVALID,
            "overlaps",
        ),
        ("a tensor flood", raw_safetensors(&flood, b""), TOO_LARGE, "65537"),
    ];
    for (case, weights, code, text) in cases {
        refused(case, read_files(config().to_string(), weights), code, text);
    }
    for dtype in ["F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "GARBAGE"] {
        let header = String::from_utf8_lossy(&good_weights()[8..]).replacen("F32", dtype, 1);
        let header = header.split_once("}}").expect("the header ends").0.to_owned() + "}}";
        let data = vec![0; weights().values().map(|tensor| 4 * tensor.values.len()).sum()];
        let file = raw_safetensors(&header, &data);
        refused(dtype, read_files(config().to_string(), file), UNSUPPORTED, &format!("dtype {dtype}"));
    }
}

#[test]
fn limits_of_the_server_are_kept() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "adapter_config.json", config().to_string());
    write(dir.path(), "adapter_model.safetensors", good_weights());
    let with = |limits: AdapterLimits| adapter::read(dir.path(), &spec(), &limits);
    let default = AdapterLimits::default();
    refused("a small file limit", with(AdapterLimits { bytes_max: 100, ..default }), TOO_LARGE, "the limit is 100");
    refused("few tensors", with(AdapterLimits { tensors_max: 11, ..default }), TOO_LARGE, "is 12, the limit is 11");
    refused("a small header", with(AdapterLimits { header_bytes_max: 64, ..default }), TOO_LARGE, "the limit is 64");
    refused("small ranks", with(AdapterLimits { rank_max: 3, ..default }), "adapter_rank_limit", "up to 3");
    with(AdapterLimits { rank_max: 4, tensors_max: 12, ..default }).expect("at the limits");
}

#[test]
fn a_directory_without_the_two_files_says_which_is_missing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    refused("absent", read(&dir.path().join("absent")), "model_not_found", "does not exist");
    refused("empty", read(dir.path()), INVALID, "adapter_config.json: the file is missing");
    write(dir.path(), "adapter_config.json", config().to_string());
    refused("no weights", read(dir.path()), INVALID, "adapter_model.safetensors: the file is missing");
    write(dir.path(), "adapter_model.bin", b"\x80\x02cos\nsystem\n");
    refused("pickle", read(dir.path()), UNSUPPORTED, "adapter_model.bin");
    refused("a file", read(&dir.path().join("adapter_config.json")), "model_not_found", "does not exist");
}

#[cfg(unix)]
#[test]
fn only_regular_files_are_opened() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let weights = dir.path().join("adapter_model.safetensors");
    write(dir.path(), "adapter_config.json", config().to_string());
    // A FIFO would hold the thread for ever if it were opened as a file is.
    let made = std::process::Command::new("mkfifo").arg(&weights).status().expect("mkfifo runs");
    assert!(made.success());
    refused("a FIFO", read(dir.path()), INVALID, "not a regular file");
    std::fs::remove_file(&weights).expect("removable");
    symlink("/dev/zero", &weights).expect("a link");
    refused("a device behind a link", read(dir.path()), INVALID, "not a regular file");
    std::fs::remove_file(&weights).expect("removable");
    std::fs::create_dir(&weights).expect("a directory");
    refused("a directory", read(dir.path()), INVALID, "not a regular file");
    std::fs::remove_dir(&weights).expect("removable");
    symlink("nowhere", &weights).expect("a link");
    refused("a dangling link", read(dir.path()), INVALID, "the file is missing");
    std::fs::remove_file(&weights).expect("removable");
    // The Hub's cache is made of links to blobs.
    write(dir.path(), "blob", good_weights());
    symlink("blob", &weights).expect("a link");
    read(dir.path()).expect("a link to a regular file");
}

#[test]
fn the_content_id_depends_on_content_only() {
    let id = |config: &str, weights: &[u8]| read_files(config, weights).expect("good").content_id;
    let base = id(&config().to_string(), &good_weights());
    let pretty = serde_json::to_string_pretty(&config()).expect("JSON");
    assert_eq!(base, id(&pretty, &good_weights()), "spaces mean nothing");
    let mut reversed = serde_json::Map::new();
    let original = config();
    original
        .as_object()
        .expect("an object")
        .iter()
        .rev()
        .for_each(|(k, v)| drop(reversed.insert(k.clone(), v.clone())));
    assert_eq!(base, id(&Value::Object(reversed).to_string(), &good_weights()), "nor does the order of keys");
    let other = changed(config(), json!({"lora_alpha": 9}));
    assert_ne!(base, id(&other.to_string(), &good_weights()));
    let nudged = tensors(|t| t.get_mut(Q0_A).expect("A").values[0] += 1.0);
    assert_ne!(base, id(&config().to_string(), &nudged));
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
    let config = tiny_config("llama");
    let rank_of = |layer: usize, module: &str| match (layer, module) {
        (0, "q_proj") => 6,
        (_, "q_proj") => 2,
        _ => 4,
    };
    let weights = safetensors(&adapter_weights(&config, &TARGETS, SEED, rank_of), Stored::F32);
    let patterns = |order: &str| {
        self::config().to_string().replacen("\"rank_pattern\":{}", &format!("\"rank_pattern\":{order}"), 1)
    };
    let specific_first = patterns("{\"layers.0.self_attn.q_proj\":6,\"q_proj\":2,\"proj\":99}");
    let adapter = read_files(specific_first, &weights).expect("the specific one is asked first");
    let ranks: Vec<usize> = adapter.modules.iter().map(|module| module.rank).collect();
    assert_eq!(ranks, [6, 4, 2, 4, 2, 4], "`proj` alone is no end of `q_proj` after a dot");
    assert_eq!(adapter.modules[0].scale, 8.0 / 6.0);
    let general_first = patterns("{\"q_proj\":2,\"layers.0.self_attn.q_proj\":6}");
    refused("general first", read_files(general_first, &weights), INVALID, "rank 2");
}
