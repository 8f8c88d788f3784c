//! Adapter files from strangers: each malformed one is refused with the exact code, and the message names the cause.

mod support;

use loramux_kernels::device::Elem;
use loramux_kernels::{Dtype, ImageLayout};
use loramux_models::adapter::{self, AdapterLimits};
use serde_json::{Value, json};
use support::adapter::{
    INVALID, MISMATCH, Q0_A, Q0_B, TARGETS, TOO_LARGE, UNSUPPORTED, config, extra, good_weights, poisoned, read,
    read_files, refused, rename, reshaped, spec, tensors, weights,
};
use support::{Stored, Tensor, changed, raw_safetensors, safetensors, write};

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
fn tensors_of_other_modules_and_features_are_refused_by_name() {
    let layer0 = "base_model.model.model.layers.0.self_attn";
    let neither = tensors(|tensors| tensors.retain(|name, _| name != Q0_A && name != Q0_B));
    let stranger = rename(Q0_A, "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight");
    let cases = [
        ("a module of another model", stranger, MISMATCH, "c_attn"),
        ("a layer past the last", extra(&Q0_A.replace("layers.0", "layers.3")), MISMATCH, "layers.3"),
        ("no prefix", rename(Q0_A, "model.layers.0.self_attn.q_proj.lora_A.weight"), INVALID, "are not named"),
        ("an adapter name inside", rename(Q0_A, &Q0_A.replace("lora_A", "lora_A.default")), INVALID, "are not named"),
        ("a tensor of nothing", extra("hello"), INVALID, "`hello`"),
        ("no A", tensors(|tensors| drop(tensors.remove(Q0_A))), INVALID, Q0_A),
        ("no B", tensors(|tensors| drop(tensors.remove(Q0_B))), INVALID, Q0_B),
        ("neither", neither, INVALID, "2 tensors of targeted modules are missing"),
        ("an untargeted pair", extra(&Q0_A.replace("q_proj", "k_proj")), INVALID, "does not target"),
        ("dora", extra(&format!("{layer0}.q_proj.lora_magnitude_vector")), INVALID, "does not target"),
        ("lora bias", extra(&format!("{layer0}.q_proj.lora_B.bias")), INVALID, "q_proj.lora_B.bias"),
        ("bias", extra(&format!("{layer0}.q_proj.bias")), INVALID, "q_proj.bias"),
        ("head", extra("base_model.model.lm_head.lora_A.weight"), INVALID, "lm_head"),
        ("trained head", extra("base_model.model.lm_head.weight"), INVALID, "lm_head"),
        ("embedding", extra("base_model.model.model.embed_tokens.lora_embedding_A"), INVALID, "embed_tokens"),
        ("an embedding's A on a head", extra("base_model.model.lm_head.lora_embedding_A"), INVALID, "are not named"),
        ("a copy without LoRA", extra("base_model.model.lm_head.base_layer.weight"), INVALID, "lm_head.base_layer"),
        ("a norm", extra("base_model.model.model.norm.weight"), MISMATCH, "model.norm"),
        ("saved module", extra("base_model.model.score.modules_to_save.weight"), UNSUPPORTED, "modules_to_save"),
    ];
    for (case, weights, code, text) in cases {
        refused(case, read_files(config().to_string(), weights), code, text);
    }
}

#[test]
fn tensors_of_wrong_shapes_or_values_are_refused_with_what_was_found() {
    let rank = "rank 4 of adapter_config.json wants";
    let cases = [
        ("wrong d_in", reshaped(Q0_A, &[4, 24]), MISMATCH, "shape [4, 24], this base model wants [4, 48]".to_owned()),
        ("wrong d_out", reshaped(Q0_B, &[24, 4]), MISMATCH, "shape [24, 4], this base model wants [48, 4]".to_owned()),
        ("wrong rank in A", reshaped(Q0_A, &[2, 48]), INVALID, format!("shape [2, 48], {rank} [4, 48]")),
        ("wrong rank in B", reshaped(Q0_B, &[48, 2]), INVALID, format!("shape [48, 2], {rank} [48, 4]")),
        ("one dimension", reshaped(Q0_A, &[192]), INVALID, "has shape [192]".to_owned()),
        ("a scalar", reshaped(Q0_A, &[]), INVALID, "has shape []".to_owned()),
        ("an empty matrix", reshaped(Q0_A, &[0, 48]), INVALID, "shape [0, 48]".to_owned()),
        ("three dimensions", reshaped(Q0_A, &[4, 6, 8]), INVALID, "3 dimensions".to_owned()),
        ("NaN", poisoned(Q0_A, 7, f32::NAN), INVALID, "the value NaN at element 7".to_owned()),
        ("infinity", poisoned(Q0_B, 0, f32::INFINITY), INVALID, "the value inf at element 0".to_owned()),
        ("minus infinity", poisoned(Q0_B, 1, f32::NEG_INFINITY), INVALID, "the value -inf at element 1".to_owned()),
    ];
    for (case, weights, code, text) in cases {
        refused(case, read_files(config().to_string(), weights), code, &text);
    }
}

/// One entry of a safetensors header.
fn entry(dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!("{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}")
}

#[test]
fn malformed_headers_are_refused() {
    let sized = |size: u64, rest: &[u8]| [&size.to_le_bytes()[..], rest].concat();
    let raw = |header: &str, data: &[u8]| raw_safetensors(header, data);
    let good = entry("F32", "[1,2]", 0, 8);
    let flood: String = (0..65_537).map(|i| format!("\"t{i}\":{},", entry("F32", "[0]", 0, 0))).collect();
    let flood = format!("{{{}}}", flood.trim_end_matches(','));
    let deep = format!("{{\"__metadata__\":{}", "[".repeat(100_000));
    let strange = format!("{{\"a\":{}}}", good.replace('}', ",\"x\":1}"));
    let twice = format!("{{\"a\":{good},\"a\":{good}}}");
    let bare = "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}";
    let cases = [
        ("empty", vec![], INVALID, "0 bytes"),
        ("seven bytes", vec![0; 7], INVALID, "7 bytes"),
        ("no header", sized(0, b""), INVALID, "does not start with"),
        ("a header past the end", sized(100, b"{}"), INVALID, "claims 100 bytes in a file of 10"),
        ("a header of 2^64", sized(u64::MAX, b"{}"), TOO_LARGE, "18446744073709551615"),
        ("a header over the limit", sized((16 << 20) + 1, b"{}"), TOO_LARGE, "16777217"),
        ("not JSON", raw("{hello", b""), INVALID, "not valid"),
        ("an array", raw("[]", b""), INVALID, "does not start with"),
        ("a space first", raw(" {}", b""), INVALID, "does not start with"),
        ("two objects", raw("{}{}", b""), INVALID, "not valid"),
        ("deep JSON", raw(&deep, b""), INVALID, "not valid"),
        ("no data_offsets", raw(bare, b""), INVALID, "data_offsets"),
        ("a stranger's field", raw(&strange, &[0; 8]), INVALID, "`x`"),
        ("a name twice", raw(&twice, &[0; 8]), INVALID, "`a` appears twice"),
        ("metadata twice", raw("{\"__metadata__\":{},\"__metadata__\":{}}", b""), INVALID, "appears twice"),
        ("a tensor flood", raw(&flood, b""), TOO_LARGE, "65537"),
    ];
    for (case, weights, code, text) in cases {
        refused(case, read_files(config().to_string(), weights), code, text);
    }
}

#[test]
fn tensors_that_do_not_cover_the_data_are_refused() {
    let one = |shape: &str, begin: u64, end: u64| format!("{{\"{Q0_A}\":{}}}", entry("F32", shape, begin, end));
    let two = |begin: u64, end: u64| {
        format!("{{\"a\":{},\"b\":{}}}", entry("F32", "[1,2]", 0, 8), entry("F32", "[1,2]", begin, end))
    };
    let (huge, product) = (u64::MAX, "[4294967296,4294967296]");
    let cases = [
        ("a negative extent", one("[-1,2]", 0, 8), 8, "not valid"),
        ("a fractional extent", one("[1.5,2]", 0, 8), 8, "not valid"),
        ("an overflowing shape", one(product, 0, 8), 8, "more than 2^64"),
        ("a shape over its bytes", one("[2,2]", 0, 8), 8, "is 16 bytes, the file has 8"),
        ("offsets reversed", one("[1,2]", 8, 0), 8, "outside"),
        ("offsets past the end", one("[1,2]", 0, 8), 4, "outside the 4 bytes"),
        ("offsets of 2^64", one("[1,2]", huge - 7, huge), 8, "outside"),
        ("trailing bytes", one("[1,2]", 0, 8), 9, "1 bytes after the last tensor"),
        ("a gap", one("[1,2]", 4, 12), 12, "bytes 0..4 belong to no tensor"),
        ("an overlap", two(4, 12), 12, "overlaps"),
        ("the same bytes twice", two(0, 8), 8, "overlaps"),
    ];
    for (case, header, data_bytes, text) in cases {
        let file = raw_safetensors(&header, &vec![0; data_bytes]);
        refused(case, read_files(config().to_string(), file), INVALID, text);
    }
}

#[test]
fn other_element_types_are_refused_by_name() {
    for dtype in ["F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "GARBAGE"] {
        let header = String::from_utf8_lossy(&good_weights()[8..]).replacen("F32", dtype, 1);
        let header = header.split_once("}}").expect("the header ends").0.to_owned() + "}}";
        let data = vec![0; weights().values().map(|tensor| 4 * tensor.values.len()).sum()];
        let file = raw_safetensors(&header, &data);
        refused(dtype, read_files(config().to_string(), file), UNSUPPORTED, &format!("dtype {dtype}"));
    }
}

#[test]
fn what_the_device_cannot_hold_is_refused_when_it_is_packed() {
    let big = poisoned(Q0_A, 3, f32::MAX);
    let adapter = read_files(config().to_string(), big).expect("finite as f32");
    adapter.pack(Dtype::F32, 64 << 10).expect("f32 holds it");
    let error = adapter.pack(ImageLayout::Device(Elem::F16), 64 << 10).expect_err("f16 would make it infinite");
    assert!(error.code() == INVALID && error.to_string().contains("layer 0 Q has the value"), "{error}");
    let error = adapter.pack(Dtype::F32, 256).expect_err("a block does not fit");
    assert_eq!(error.code(), TOO_LARGE, "{error}");
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
fn tensors_of_features_have_the_shapes_of_the_base() {
    let layer0 = "base_model.model.model.layers.0";
    let cases = [
        ("use_dora", json!(true), format!("{layer0}.self_attn.q_proj.lora_magnitude_vector"), "wants [48]"),
        ("lora_bias", json!(true), format!("{layer0}.self_attn.q_proj.lora_B.bias"), "wants [48]"),
        ("modules_to_save", json!(["lm_head"]), "base_model.model.lm_head.weight".to_owned(), "wants [101, 48]"),
        ("bias", json!("all"), format!("{layer0}.self_attn.q_proj.bias"), "match no module"),
    ];
    for (field, value, name, text) in cases {
        let config = changed(config(), json!({field: value}));
        let weights = tensors(|tensors| {
            for layer in 0..3 {
                for module in ["q_proj", "v_proj"] {
                    let d_out = if module == "q_proj" { 48 } else { 16 };
                    let shape = vec![d_out];
                    let path = format!("base_model.model.model.layers.{layer}.self_attn.{module}");
                    let ending = match field {
                        "use_dora" => ".lora_magnitude_vector",
                        "lora_bias" => ".lora_B.bias",
                        _ => continue,
                    };
                    tensors.insert(path + ending, Tensor { shape, values: vec![1.0; d_out] });
                }
            }
            tensors.insert(name.clone(), Tensor { shape: vec![47], values: vec![1.0; 47] });
        });
        refused(field, read_files(config.to_string(), weights), MISMATCH, text);
    }
}
