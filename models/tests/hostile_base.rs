//! Malformed base models: safetensors directories and GGUF files. Each is refused with the exact code before any weight is
//! read, and the message names the cause.

mod support;

use loramux_models::{LoadFormat, LoadOptions, ModelError, load, text_files};
use serde_json::json;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use support::gguf::{Entry, Gguf, Meta, convert};
use support::{Stored, Tensors, changed, raw_safetensors, safetensors, tiny_config, tiny_weights, write, write_model};

const SEED: u64 = 0xBAD0_0002;
const INVALID: &str = "model_invalid";
const UNSUPPORTED: &str = "model_unsupported";
const TOO_LARGE: &str = "model_too_large";
const NOT_FOUND: &str = "model_not_found";

fn error_of(path: &Path, format: LoadFormat) -> ModelError {
    let options = LoadOptions { format, ..LoadOptions::default() };
    match load(path, &options, &mut |_| ()) {
        Ok(_) => panic!("{} was accepted", path.display()),
        Err(error) => error,
    }
}

fn refused(case: &str, error: &ModelError, code: &str, text: &str) {
    assert_eq!(error.code(), code, "{case}: {error}");
    assert!(error.to_string().contains(text), "{case}: `{error}` does not say `{text}`");
}

fn weights() -> Tensors {
    tiny_weights(&tiny_config("llama"), SEED)
}

#[test]
fn tensors_that_are_not_the_configs_are_listed() {
    let config = tiny_config("llama");
    let q = "model.layers.1.self_attn.q_proj.weight";
    type Change = fn(&mut Tensors);
    let cases: [(&str, Change, &str, &str); 6] = [
        (
            "one missing",
            |t| drop(t.remove("model.layers.1.self_attn.q_proj.weight")),
            INVALID,
            "1 tensors are missing: `model.layers.1.self_attn.q_proj.weight`",
        ),
        ("a layer missing", |t| t.retain(|name, _| !name.contains("layers.2.")), INVALID, "9 tensors are missing"),
        ("no head", |t| drop(t.remove("lm_head.weight")), INVALID, "`lm_head.weight`"),
        (
            "one more",
            |t| {
                let q = t["model.layers.1.self_attn.q_proj.weight"].clone();
                t.insert("model.layers.3.self_attn.q_proj.weight".into(), q);
            },
            INVALID,
            "1 tensors match nothing in this model: `model.layers.3.self_attn.q_proj.weight`",
        ),
        (
            "a norm on q",
            |t| {
                let n = t["model.norm.weight"].clone();
                t.insert("model.layers.0.self_attn.q_norm.weight".into(), n);
            },
            INVALID,
            "q_norm",
        ),
        (
            "another shape",
            |t| t.get_mut("model.layers.1.self_attn.q_proj.weight").expect("q").shape = vec![24, 96],
            INVALID,
            "has shape [24, 96], config.json wants [48, 48]",
        ),
    ];
    for (case, change, code, text) in cases {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut tensors = weights();
        change(&mut tensors);
        write_model(dir.path(), &config, &tensors, Stored::F32);
        refused(case, &error_of(dir.path(), LoadFormat::Auto), code, text);
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut many = weights();
    many.retain(|name, _| !name.contains("proj"));
    write_model(dir.path(), &config, &many, Stored::F32);
    match error_of(dir.path(), LoadFormat::Auto) {
        ModelError::MissingTensors { names, .. } => assert!(names.len() == 21 && names.contains(&q.to_owned())),
        other => panic!("{other}"),
    }
}

#[test]
fn malformed_checkpoints_are_refused() {
    let good = safetensors(&weights(), Stored::F32);
    let mut truncated = good.clone();
    truncated.truncate(good.len() - 4);
    let f64s =
        String::from_utf8_lossy(&good[8..]).split_once("}}").expect("a header").0.replacen("F32", "I64", 1) + "}}";
    let data: usize = weights().values().map(|tensor| 4 * tensor.values.len()).sum();
    let cases: Vec<(&str, Vec<u8>, &str, &str)> = vec![
        ("empty", vec![], INVALID, "0 bytes"),
        ("a lying header", [&1000u64.to_le_bytes()[..], b"{}"].concat(), INVALID, "claims 1000 bytes"),
        ("a huge header", [&u64::MAX.to_le_bytes()[..], b"{}"].concat(), TOO_LARGE, "header"),
        ("not JSON", raw_safetensors("{\"a\":", b""), INVALID, "not valid"),
        ("nothing inside", raw_safetensors("{}", b""), INVALID, "tensors are missing"),
        ("cut short", truncated, INVALID, "outside"),
        ("trailing bytes", [&good[..], b"x"].concat(), INVALID, "after the last tensor"),
        ("whole numbers", raw_safetensors(&f64s, &vec![0; data]), UNSUPPORTED, "dtype I64"),
    ];
    for (case, file, code, text) in cases {
        let dir = tempfile::tempdir().expect("a temporary directory");
        write(dir.path(), "config.json", tiny_config("llama").to_string());
        write(dir.path(), "model.safetensors", file);
        refused(case, &error_of(dir.path(), LoadFormat::Auto), code, text);
    }
}

#[test]
fn malformed_shard_indexes_are_refused() {
    let map = |file: &str| json!({"weight_map": {"model.norm.weight": file}}).to_string();
    let cases = [
        ("not JSON", "{".to_owned(), INVALID, "weight_map"),
        ("no map", "{}".to_owned(), INVALID, "weight_map"),
        ("a map of numbers", json!({"weight_map": {"a": 1}}).to_string(), INVALID, "weight_map"),
        ("a way out", map("../model.safetensors"), INVALID, "plain file name"),
        ("an absolute path", map("/etc/passwd"), INVALID, "plain file name"),
        ("a directory", map("sub/model.safetensors"), INVALID, "plain file name"),
        ("dots", map(".."), INVALID, "plain file name"),
        ("no name", map(""), INVALID, "plain file name"),
        ("pickle", map("pytorch_model-1.bin"), INVALID, "ends in .safetensors"),
        ("an absent shard", map("absent.safetensors"), NOT_FOUND, "absent.safetensors"),
        (
            "a tensor that is elsewhere",
            json!({"weight_map": {"model.absent": "a.safetensors"}}).to_string(),
            INVALID,
            "in no shard",
        ),
    ];
    for (case, index, code, text) in cases {
        let dir = tempfile::tempdir().expect("a temporary directory");
        write(dir.path(), "config.json", tiny_config("llama").to_string());
        write(dir.path(), "a.safetensors", safetensors(&weights(), Stored::F32));
        write(dir.path(), "model.safetensors.index.json", index);
        refused(case, &error_of(dir.path(), LoadFormat::Auto), code, text);
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let tensors = weights();
    let names: serde_json::Map<_, _> = tensors.keys().map(|name| (name.clone(), json!("a.safetensors"))).collect();
    let index = changed(json!({"weight_map": names}), json!({}));
    let mut index = index;
    index["weight_map"]["model.norm.weight"] = json!("b.safetensors");
    write(dir.path(), "config.json", tiny_config("llama").to_string());
    write(dir.path(), "a.safetensors", safetensors(&tensors, Stored::F32));
    write(dir.path(), "b.safetensors", safetensors(&tensors, Stored::F32));
    write(dir.path(), "model.safetensors.index.json", index.to_string());
    refused("a tensor in two shards", &error_of(dir.path(), LoadFormat::Auto), INVALID, "in another shard too");
}

#[test]
fn paths_that_hold_no_model_say_what_was_looked_for() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    refused("absent", &error_of(&dir.path().join("absent"), LoadFormat::Auto), NOT_FOUND, "no such file");
    refused("empty", &error_of(dir.path(), LoadFormat::Auto), NOT_FOUND, "holds neither");
    refused("no config", &error_of(dir.path(), LoadFormat::Dummy), NOT_FOUND, "config.json");
    write(dir.path(), "pytorch_model.bin", b"\x80\x02");
    refused("pickle", &error_of(dir.path(), LoadFormat::Auto), UNSUPPORTED, "pytorch_model.bin");
    write(dir.path(), "a.gguf", b"");
    write(dir.path(), "b.gguf", b"");
    refused("two", &error_of(dir.path(), LoadFormat::Auto), NOT_FOUND, "several .gguf files");
    refused("asked for safetensors", &error_of(dir.path(), LoadFormat::Safetensors), UNSUPPORTED, "pytorch_model.bin");
    refused(
        "a file as a checkpoint",
        &error_of(&dir.path().join("a.gguf"), LoadFormat::Safetensors),
        NOT_FOUND,
        "directory",
    );
    write(dir.path(), "model.safetensors", b"");
    refused("no config beside the weights", &error_of(dir.path(), LoadFormat::Auto), NOT_FOUND, "config.json");
}

/// A small, well-formed GGUF of the llama architecture.
fn good_gguf() -> Gguf {
    let key = |rest: &str| format!("llama.{rest}");
    let metadata = vec![
        ("general.architecture".to_owned(), Meta::Text("llama".to_owned())),
        (key("block_count"), Meta::U32(3)),
        (key("context_length"), Meta::U32(128)),
        (key("embedding_length"), Meta::U32(48)),
        (key("feed_forward_length"), Meta::U32(88)),
        (key("attention.head_count"), Meta::U32(6)),
        (key("attention.head_count_kv"), Meta::U32(2)),
        (key("attention.layer_norm_rms_epsilon"), Meta::F32(1e-5)),
        (key("vocab_size"), Meta::U32(101)),
    ];
    Gguf::new(metadata, convert(&weights(), Some((6, 2)), |_| 0).0)
}

fn gguf_error(gguf: &[u8]) -> ModelError {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "model.gguf", gguf);
    error_of(&dir.path().join("model.gguf"), LoadFormat::Auto)
}

fn put(gguf: &mut Gguf, key: &str, value: Meta) {
    gguf.metadata.retain(|(name, _)| name != key);
    gguf.metadata.push((key.to_owned(), value));
}

/// A change to the good file, and the code and text it is refused with.
type Spoiled = (&'static str, fn(&mut Gguf), &'static str, &'static str);

fn check_spoiled(cases: &[Spoiled]) {
    for (case, change, code, text) in cases {
        let mut gguf = good_gguf();
        change(&mut gguf);
        refused(case, &gguf_error(&gguf.bytes()), code, text);
    }
}

#[test]
fn malformed_gguf_values_are_refused() {
    let string = |size: u64| [&size.to_le_bytes()[..], b"abc"].concat();
    let array = |kind: u32, count: u64, rest: &[u8]| [&kind.to_le_bytes()[..], &count.to_le_bytes(), rest].concat();
    let raws: Vec<(&str, Meta, &str, &str)> = vec![
        ("a bool of 2", Meta::Raw(7, vec![2]), INVALID, "metadata `x`: a bool is 2"),
        ("a type of 13", Meta::Raw(13, vec![]), INVALID, "value type 13"),
        ("a long string", Meta::Raw(8, string(1 << 20)), INVALID, "more than the"),
        ("a string of 2^64", Meta::Raw(8, string(u64::MAX)), TOO_LARGE, "size of a string"),
        ("a string over the limit", Meta::Raw(8, string((16 << 20) + 1)), TOO_LARGE, "16777216"),
        ("not UTF-8", Meta::Raw(8, [&2u64.to_le_bytes()[..], b"\xff\xfe"].concat()), INVALID, "not UTF-8"),
        ("an array of arrays", Meta::Raw(9, array(9, 1, &array(4, 0, b""))), INVALID, "array of arrays"),
        ("an array of type 99", Meta::Raw(9, array(99, 0, b"")), INVALID, "value type 99"),
        ("a long array", Meta::Raw(9, array(8, 1 << 22, b"")), INVALID, "more than the"),
        ("an array of 2^64", Meta::Raw(9, array(6, u64::MAX, b"")), TOO_LARGE, "size of an array"),
        ("a number over 63 bits", Meta::Raw(9, array(10, 1, &u64::MAX.to_le_bytes())), INVALID, "63 bits"),
        ("an array of bools of 3", Meta::Raw(9, array(7, 1, &[3])), INVALID, "a bool is 3"),
    ];
    for (case, value, code, text) in raws {
        let mut gguf = good_gguf();
        put(&mut gguf, "x", value);
        refused(case, &gguf_error(&gguf.bytes()), code, text);
    }
}

#[test]
fn malformed_gguf_headers_are_refused() {
    let cases: Vec<Spoiled> = vec![
        ("another magic", |g| g.magic = *b"GGML", INVALID, "`GGUF`"),
        ("version 1", |g| g.version = 1, UNSUPPORTED, "version 1"),
        ("version 4", |g| g.version = 4, UNSUPPORTED, "version 4"),
        ("big endian", |g| g.version = 3u32.swap_bytes(), UNSUPPORTED, "big-endian"),
        ("2^64 tensors", |g| g.tensor_count = Some(u64::MAX), TOO_LARGE, "number of tensors"),
        ("more tensors than bytes", |g| g.tensor_count = Some(100_000), INVALID, "number of tensors"),
        (
            "one tensor too many",
            |g| g.tensor_count = Some(g.tensors.len() as u64 + 1),
            TOO_LARGE,
            "the size of a string",
        ),
        ("2^64 entries", |g| g.metadata_count = Some(u64::MAX), TOO_LARGE, "metadata entries"),
        ("more entries than bytes", |g| g.metadata_count = Some(60_000), INVALID, "metadata entries"),
        ("a key twice", |g| g.metadata.push(g.metadata[1].clone()), INVALID, "appears twice"),
        ("alignment 3", |g| put(g, "general.alignment", Meta::U32(3)), INVALID, "general.alignment"),
        ("alignment 0", |g| put(g, "general.alignment", Meta::U32(0)), INVALID, "general.alignment"),
        ("alignment 2^31", |g| put(g, "general.alignment", Meta::U32(1 << 31)), INVALID, "general.alignment"),
    ];
    check_spoiled(&cases);
}

#[test]
fn gguf_metadata_that_is_not_served_is_refused() {
    let cases: Vec<Spoiled> = vec![
        ("no architecture", |g| drop(g.metadata.remove(0)), INVALID, "`general.architecture` is missing"),
        ("gemma", |g| put(g, "general.architecture", Meta::Text("gemma3".to_owned())), UNSUPPORTED, "`gemma3`"),
        (
            "an architecture that is a number",
            |g| put(g, "general.architecture", Meta::U32(1)),
            INVALID,
            "is not a string",
        ),
        (
            "no layers",
            |g| g.metadata.retain(|(key, _)| key != "llama.block_count"),
            INVALID,
            "`llama.block_count` is missing",
        ),
        ("no epsilon", |g| g.metadata.retain(|(key, _)| !key.ends_with("epsilon")), INVALID, "epsilon` is missing"),
        ("2^32 layers", |g| put(g, "llama.block_count", Meta::U32(u32::MAX)), INVALID, "num_hidden_layers"),
        ("0 heads", |g| put(g, "llama.attention.head_count", Meta::U32(0)), INVALID, "num_attention_heads"),
        (
            "heads per layer",
            |g| put(g, "llama.attention.head_count", Meta::Ints(vec![6, 6, 6])),
            INVALID,
            "whole number",
        ),
        (
            "a layer count that is text",
            |g| put(g, "llama.block_count", Meta::Text("3".to_owned())),
            INVALID,
            "whole number",
        ),
        ("experts", |g| put(g, "llama.expert_count", Meta::U32(8)), UNSUPPORTED, "expert_count"),
        ("parts", |g| put(g, "split.count", Meta::U32(2)), UNSUPPORTED, "split.count"),
        ("yarn", |g| put(g, "llama.rope.scaling.type", Meta::Text("yarn".to_owned())), UNSUPPORTED, "yarn"),
        (
            "linear without a factor",
            |g| put(g, "llama.rope.scaling.type", Meta::Text("linear".to_owned())),
            INVALID,
            "factor",
        ),
        (
            "half a head rotates",
            |g| put(g, "llama.rope.dimension_count", Meta::U32(4)),
            UNSUPPORTED,
            "rotary width of 4",
        ),
        ("other values", |g| put(g, "llama.attention.value_length", Meta::U32(4)), UNSUPPORTED, "value_length"),
    ];
    check_spoiled(&cases);
}

#[test]
fn gguf_tensors_that_do_not_fit_are_refused() {
    let cases: Vec<Spoiled> = vec![
        ("a tensor twice", |g| g.tensors.push(g.tensors[0].clone()), INVALID, "appears twice"),
        ("a tensor missing", |g| drop(g.tensors.remove(3)), INVALID, "1 tensors are missing"),
        ("a tensor too many", |g| g.tensors[0].name = "blk.0.attn_q_norm.weight".to_owned(), INVALID, "match nothing"),
        (
            "a bias",
            |g| g.tensors.push(Entry { name: "blk.0.attn_q.bias".to_owned(), ..vector(48) }),
            INVALID,
            "match nothing",
        ),
        ("0 dimensions", |g| g.tensors[0].dims.clear(), INVALID, "0 dimensions"),
        ("5 dimensions", |g| g.tensors[0].dims = vec![1; 5], INVALID, "5 dimensions"),
        ("an extent of 0", |g| g.tensors[0].dims[0] = 0, INVALID, "empty"),
        ("an extent of 2^63", |g| g.tensors[0].dims[0] = 1 << 63, INVALID, "too many"),
        ("an overflowing product", |g| g.tensors[0].dims = vec![1 << 40, 1 << 40], INVALID, "too many"),
        ("past the end", |g| g.tensors.last_mut().expect("one").offset = Some(1 << 40), INVALID, "pass the file's end"),
        (
            "an offset of 2^64",
            |g| g.tensors.last_mut().expect("one").offset = Some(u64::MAX - 31),
            INVALID,
            "pass the file's end",
        ),
        ("an odd offset", |g| g.tensors.last_mut().expect("one").offset = Some(33), INVALID, "no multiple of 32"),
        ("an overlap", |g| g.tensors.last_mut().expect("one").offset = Some(0), INVALID, "overlap"),
        ("an i-quant", |g| g.tensors[0].kind = 16, UNSUPPORTED, "IQ2_XXS"),
        ("a type of 999", |g| g.tensors[0].kind = 999, UNSUPPORTED, "type 999"),
        ("rows of half a block", |g| g.tensors[0].kind = 2, INVALID, "no whole blocks"),
        ("another shape", |g| g.tensors[0].dims.reverse(), INVALID, "the metadata wants"),
        (
            "bad rope factors",
            |g| g.tensors.push(Entry { name: "rope_freqs.weight".to_owned(), ..vector(3) }),
            INVALID,
            "rope_freqs.weight",
        ),
        (
            "rope factors of 0",
            |g| g.tensors.push(Entry { name: "rope_freqs.weight".to_owned(), ..vector(4) }),
            INVALID,
            "not > 0",
        ),
    ];
    check_spoiled(&cases);
}

/// A vector of zeros.
fn vector(count: u64) -> Entry {
    Entry { name: String::new(), dims: vec![count], kind: 0, data: vec![0; 4 * count as usize], offset: None }
}

#[test]
fn a_gguf_cut_at_any_byte_is_refused() {
    let whole = good_gguf().bytes();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, &whole).expect("a file");
    let file = std::fs::File::options().write(true).open(&path).expect("the file");
    let step = (whole.len() / 400).max(1);
    for cut in (200..whole.len()).rev().step_by(step).chain((0..200).rev()) {
        file.set_len(cut as u64).expect("a shorter file");
        let error = error_of(&path, LoadFormat::Auto);
        assert!([INVALID, TOO_LARGE].contains(&error.code()), "cut at {cut}: {error}");
    }
}

#[test]
fn flipped_bytes_never_panic() {
    // Every byte of the header becomes each of a few hostile values. `text_files` parses the same header and packs
    // nothing, and the data may be a hole in the file.
    let whole = good_gguf().bytes();
    let data: usize = good_gguf().tensors.iter().map(|tensor| tensor.data.len().next_multiple_of(32)).sum();
    let header = &whole[..whole.len() - data];
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, header).expect("a file");
    let mut file = std::fs::File::options().write(true).open(&path).expect("the file");
    file.set_len(whole.len() as u64).expect("a hole");
    let mut put = |at: usize, value: u8| {
        file.seek(SeekFrom::Start(at as u64)).and_then(|_| file.write_all(&[value])).expect("a byte");
    };
    for (at, &original) in header.iter().enumerate() {
        for value in [0x00, 0x7f, 0xff] {
            put(at, value);
            let error =
                text_files(&path).expect_err("a file without a tokenizer has no text side, whatever else it has");
            assert!([INVALID, TOO_LARGE, UNSUPPORTED].contains(&error.code()), "byte {at} = {value}: {error}");
        }
        put(at, original);
    }
}

#[cfg(unix)]
#[test]
fn only_regular_files_are_opened() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let fifo = dir.path().join("model.gguf");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().expect("mkfifo runs").success());
    refused("a FIFO", &error_of(&fifo, LoadFormat::Auto), INVALID, "not a regular file");
    refused("a device", &error_of(Path::new("/dev/zero"), LoadFormat::Auto), INVALID, "not a regular file");
    write(dir.path(), "config.json", tiny_config("llama").to_string());
    std::os::unix::fs::symlink("/dev/zero", dir.path().join("model.safetensors")).expect("a link");
    refused("a device behind a link", &error_of(dir.path(), LoadFormat::Auto), INVALID, "not a regular file");
}
