//! GGUF files against the directory with the same, dequantised weights; and their tokenizers against known ids.

mod support;

use loramux_kernels::{ArenaDtype, Dtype, Matrix, QuantFormat};
use loramux_models::adapter::{self, AdapterLimits};
use loramux_models::{LoadFormat, LoadOptions, RopeScaling, load, text_files};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use support::gguf::{Entry, Gguf, Meta, convert};
use support::runner::Runner;
use support::{
    Random, Stored, Tensor, Tensors, adapter_config, adapter_weights, changed, tiny_config, tiny_weights, write,
    write_adapter, write_model,
};
use tokenizers::Tokenizer;

const SEED: u64 = 0x660F_0001;

/// Every extent a multiple of 256, the block of the K-quants.
fn config(model_type: &str) -> Value {
    changed(
        tiny_config(model_type),
        json!({"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 512, "num_hidden_layers": 2}),
    )
}

fn metadata(architecture: &str, config: &Value) -> Vec<(String, Meta)> {
    let number = |field: &str| Meta::U32(config[field].as_u64().expect("a size") as u32);
    let key = |rest: &str| format!("{architecture}.{rest}");
    vec![
        ("general.architecture".to_owned(), Meta::Text(architecture.to_owned())),
        (key("block_count"), number("num_hidden_layers")),
        (key("context_length"), number("max_position_embeddings")),
        (key("embedding_length"), number("hidden_size")),
        (key("feed_forward_length"), number("intermediate_size")),
        (key("attention.head_count"), number("num_attention_heads")),
        (key("attention.head_count_kv"), number("num_key_value_heads")),
        (key("attention.layer_norm_rms_epsilon"), Meta::F32(1e-5)),
        (key("rope.freq_base"), Meta::F32(10_000.0)),
        (key("vocab_size"), number("vocab_size")),
        ("tokenizer.ggml.bos_token_id".to_owned(), Meta::U32(1)),
        ("tokenizer.ggml.eos_token_id".to_owned(), Meta::U32(2)),
    ]
}

/// Loads the file and the directory and compares logits bit for bit: dequantised values are the same numbers.
fn check(name: &str, config: &Value, gguf: &Gguf, seen: &Tensors, dtype: Dtype) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "model.gguf", gguf.bytes());
    let hf = dir.path().join("hf");
    std::fs::create_dir(&hf).expect("a directory");
    write_model(&hf, config, seen, Stored::F32);
    let mut random = Random(SEED);
    let tokens: Vec<u32> = (0..17).map(|_| random.below(101) as u32).collect();
    let mut from_gguf = Runner::new(&dir.path().join("model.gguf"), Some(dtype), 64 << 10, 256);
    let mut from_directory = Runner::new(&hf, Some(dtype), 64 << 10, 256);
    assert_eq!(from_gguf.decoder.spec(), from_directory.decoder.spec(), "{name}");
    let (found, want) = (from_gguf.whole(&tokens, &[]), from_directory.whole(&tokens, &[]));
    assert!(want.iter().flatten().any(|logit| logit.abs() > 0.5), "{name}: logits too small to show anything");
    assert_eq!(found, want, "{name}, seed {SEED:#x}");
    write_dora(&dir.path().join("dora"), config, seen);
    let with_adapter = |runner: &mut Runner| {
        let adapter = adapter::read(&dir.path().join("dora"), runner.decoder.spec(), &AdapterLimits::default());
        let slot = runner.publish(&adapter.unwrap_or_else(|error| panic!("{name}: {error}")));
        runner.whole(&tokens, &[slot])
    };
    let (found, changed) = (with_adapter(&mut from_gguf), with_adapter(&mut from_directory));
    assert_ne!(changed, want, "{name}: the adapter does nothing");
    assert_eq!(found, changed, "{name}: an adapter that reads the base's rows, seed {SEED:#x}");
}

/// An adapter whose magnitudes and head are resolved against the base's rows, which a GGUF file has in blocks and, of q and
/// k, in another order.
fn write_dora(dir: &Path, config: &Value, base: &Tensors) {
    let targets = ["q_proj", "k_proj", "down_proj"];
    let mut tensors = adapter_weights(config, &targets, SEED, |_, _| 3);
    let pairs: Vec<(String, usize)> = tensors
        .iter()
        .filter_map(|(name, b)| Some((name.strip_suffix(".lora_B.weight")?.to_owned(), b.shape[0])))
        .collect();
    for (module, d_out) in pairs {
        let values = (0..d_out).map(|o| 1.0 + o as f32 / d_out as f32).collect();
        tensors.insert(format!("{module}.lora_magnitude_vector"), Tensor { shape: vec![d_out], values });
    }
    let mut head = base.get("lm_head.weight").unwrap_or(&base["model.embed_tokens.weight"]).clone();
    head.values.iter_mut().for_each(|value| *value *= 1.25);
    tensors.insert("base_model.model.lm_head.weight".to_owned(), head);
    let config = changed(adapter_config(3, &targets), json!({"use_dora": true, "modules_to_save": ["lm_head"]}));
    write_adapter(dir, &config, &tensors, Stored::F32);
}

#[test]
fn every_tensor_type_equals_its_dequantised_directory() {
    let config = config("llama");
    let weights = tiny_weights(&config, SEED);
    for kind in [0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 30] {
        let (entries, seen) = convert(&weights, Some((8, 2)), |_| kind);
        check(&format!("type {kind}"), &config, &Gguf::new(metadata("llama", &config), entries), &seen, Dtype::F32);
    }
}

#[test]
fn mixed_types_a_tied_head_and_bf16_storage() {
    let config = changed(config("llama"), json!({"tie_word_embeddings": true}));
    let weights = tiny_weights(&config, SEED);
    // As llama.cpp's Q4_K_M: most in Q4_K, values and down in Q6_K, the embedding in Q8_0.
    let kind_of = |name: &str| match name {
        name if name.contains("embed") => 8,
        name if name.contains("v_proj") || name.contains("down_proj") => 14,
        _ => 12,
    };
    let (entries, seen) = convert(&weights, Some((8, 2)), kind_of);
    check("mixed", &config, &Gguf::new(metadata("llama", &config), entries), &seen, Dtype::Bf16);
}

#[test]
fn qwen2_files_keep_their_row_order_and_biases() {
    let config = config("qwen2");
    let weights = tiny_weights(&config, SEED);
    let (entries, seen) = convert(&weights, None, |_| 8);
    check("qwen2", &config, &Gguf::new(metadata("qwen2", &config), entries), &seen, Dtype::F32);
}

#[test]
fn rope_factors_equal_the_scaling_they_were_made_from() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64});
    let scaled = changed(config("llama"), json!({"rope_scaling": scaling}));
    let weights = tiny_weights(&scaled, SEED);
    let (mut entries, seen) = convert(&weights, Some((8, 2)), |_| 0);
    // llama.cpp's converter writes plain frequency / scaled frequency.
    let spec = loramux_models::DecoderSpec::from_config(&scaled.to_string()).expect("valid");
    let plain = loramux_models::RopeSpec { scaling: RopeScaling::None, ..spec.rope.clone() };
    let factors: Vec<f32> = loramux_models::inv_freq(&plain)
        .iter()
        .zip(loramux_models::inv_freq(&spec.rope))
        .map(|(plain, scaled)| plain / scaled)
        .collect();
    let data = Stored::F32.bytes(&factors);
    entries.push(Entry { name: "rope_freqs.weight".to_owned(), dims: vec![16], kind: 0, data, offset: None });
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "model.gguf", Gguf::new(metadata("llama", &scaled), entries).bytes());
    write_model(dir.path(), &scaled, &seen, Stored::F32);
    let mut from_gguf = Runner::new(&dir.path().join("model.gguf"), Some(Dtype::F32), 64 << 10, 256);
    let mut from_directory = Runner::new(dir.path(), Some(Dtype::F32), 64 << 10, 256);
    assert_eq!(from_gguf.decoder.spec().rope.scaling, RopeScaling::Factors(factors));
    let tokens: Vec<u32> = (0..60).map(|i| (i * 7) % 101).collect();
    let (found, want) = (from_gguf.whole(&tokens, &[]), from_directory.whole(&tokens, &[]));
    // The factor is rounded once more than the frequency.
    assert!(support::runner::max_difference(&found, &want) < 1e-3);
}

#[test]
fn a_directory_with_one_gguf_and_a_load_report() {
    let config = config("llama");
    let (entries, _) = convert(&tiny_weights(&config, SEED), Some((8, 2)), |_| 8);
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "tiny.gguf", Gguf::new(metadata("llama", &config), entries).bytes());
    let mut reports = Vec::new();
    let model = load(dir.path(), &LoadOptions::default(), &mut |report| reports.push(report)).expect("loads");
    assert_eq!(model.dtype, Dtype::Bf16, "a GGUF is stored as bf16 unless asked otherwise");
    let last = reports.last().expect("a report per group");
    assert_eq!((last.done_bytes, reports.len()), (last.total_bytes, 3));
    assert!(reports.windows(2).all(|pair| pair[0].done_bytes < pair[1].done_bytes));
}

/// Byte-level characters of the GPT-2 vocabulary.
fn byte_characters() -> Vec<String> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    (0..256u32)
        .map(|b| {
            let code = if printable(b) {
                b
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("a character").to_string()
        })
        .collect()
}

fn tokenizer(metadata: Vec<(&str, Meta)>) -> (Tokenizer, loramux_models::TextFiles) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let metadata = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    write(dir.path(), "t.gguf", Gguf::new(metadata, vec![]).bytes());
    let text = text_files(&dir.path().join("t.gguf")).unwrap_or_else(|error| panic!("{error}"));
    (text.tokenizer_json.parse().unwrap_or_else(|error| panic!("{error}")), text)
}

fn gpt2(pre: &str, extra: Vec<(&'static str, Meta)>) -> (Tokenizer, loramux_models::TextFiles) {
    let mut tokens = byte_characters();
    tokens.extend(["he", "ll", "hell", "Ġhell", "12", "<|end|>", "<think>"].map(str::to_owned));
    let mut types = vec![1; tokens.len()];
    let count = types.len();
    (types[count - 2], types[count - 1]) = (3, 4);
    let merges = ["h e", "l l", "he ll", "Ġ hell", "1 2"].map(str::to_owned).to_vec();
    let mut metadata = vec![
        ("tokenizer.ggml.model", Meta::Text("gpt2".to_owned())),
        ("tokenizer.ggml.pre", Meta::Text(pre.to_owned())),
        ("tokenizer.ggml.tokens", Meta::Texts(tokens)),
        ("tokenizer.ggml.token_type", Meta::Ints(types)),
        ("tokenizer.ggml.merges", Meta::Texts(merges)),
        ("tokenizer.ggml.eos_token_id", Meta::U32(261)),
        ("tokenizer.chat_template", Meta::Text("{{ messages }}".to_owned())),
    ];
    metadata.extend(extra);
    tokenizer(metadata)
}

#[test]
fn byte_level_tokenizers_split_as_their_name_says() {
    let ids = |tokenizer: &Tokenizer, text: &str| tokenizer.encode(text, true).expect("encodes").get_ids().to_vec();
    let (one, two) = (u32::from(b'1'), u32::from(b'2'));
    for (pre, numbers) in [
        ("smollm", vec![one, two]),
        ("qwen2", vec![one, two]),
        ("llama-bpe", vec![260]),
        ("gpt-2", vec![260]),
        ("default", vec![260]),
    ] {
        let (tokenizer, text) = gpt2(pre, vec![]);
        assert_eq!(ids(&tokenizer, "12"), numbers, "{pre}");
        assert_eq!(ids(&tokenizer, " hell<|end|>"), [259, 261], "{pre}");
        assert_eq!(
            tokenizer.decode(&ids(&tokenizer, "hell hell <think>é\n"), true).expect("decodes"),
            "hell hell <think>é\n"
        );
        assert_eq!(
            tokenizer.decode(&[261, 262], true).expect("decodes"),
            "<think>",
            "{pre}: only control tokens are special"
        );
        assert_eq!((text.config_bos, &text.config_eos[..]), (None, &[261][..]));
        assert_eq!(text.chat_template.as_deref(), Some("{{ messages }}"));
        let config: Value = serde_json::from_str(&text.tokenizer_config.expect("synthesised")).expect("JSON");
        assert_eq!(config["eos_token"], "<|end|>");
    }
}

#[test]
fn begin_and_end_tokens_are_added_when_the_file_says_so() {
    let extra = vec![
        ("tokenizer.ggml.bos_token_id", Meta::U32(262)),
        ("tokenizer.ggml.eot_token_id", Meta::U32(262)),
        ("tokenizer.ggml.add_bos_token", Meta::Bool(true)),
        ("tokenizer.ggml.add_eos_token", Meta::Bool(true)),
    ];
    let (tokenizer, text) = gpt2("gpt-2", extra);
    assert_eq!(tokenizer.encode("he", true).expect("encodes").get_ids(), [262, 256, 261]);
    assert_eq!(tokenizer.encode("he", false).expect("encodes").get_ids(), [256]);
    assert_eq!((text.config_bos, text.config_eos), (Some(262), vec![261, 262]));
}

/// A SentencePiece vocabulary: unk, bos, eos, 256 bytes, then pieces by falling score.
fn sentence_piece() -> (Vec<(&'static str, Meta)>, BTreeMap<&'static str, u32>) {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    let mut types = vec![2, 3, 3];
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    types.extend([6; 256]);
    let mut scores = vec![0.0; tokens.len()];
    let mut ids = BTreeMap::new();
    for (i, piece) in
        ["▁t", "he", "▁the", "hello", "▁hello", "ll", "llo", "▁", "t", "h", "e", "l", "o"].into_iter().enumerate()
    {
        ids.insert(piece, tokens.len() as u32);
        tokens.push(piece.to_owned());
        types.push(1);
        scores.push(-(i as f32));
    }
    let metadata = vec![
        ("tokenizer.ggml.model", Meta::Text("llama".to_owned())),
        ("tokenizer.ggml.tokens", Meta::Texts(tokens)),
        ("tokenizer.ggml.token_type", Meta::Ints(types)),
        ("tokenizer.ggml.scores", Meta::Floats(scores)),
        ("tokenizer.ggml.bos_token_id", Meta::U32(1)),
        ("tokenizer.ggml.eos_token_id", Meta::U32(2)),
        ("tokenizer.ggml.unknown_token_id", Meta::U32(0)),
    ];
    (metadata, ids)
}

#[test]
fn sentence_piece_tokenizers_merge_by_score_and_fall_back_to_bytes() {
    let (metadata, ids) = sentence_piece();
    let (tokenizer, _) = tokenizer(metadata);
    let encode = |text: &str| tokenizer.encode(text, true).expect("encodes").get_ids().to_vec();
    assert_eq!(encode("the"), [1, ids["▁the"]]);
    assert_eq!(encode("hello the"), [1, ids["▁hello"], ids["▁the"]]);
    assert_eq!(encode("té"), [1, ids["▁t"], 3 + 0xC3, 3 + 0xA9], "a character without a piece becomes its bytes");
    for text in ["hello the", "té 漢", "  the", "the "] {
        assert_eq!(tokenizer.decode(&encode(text), true).expect("decodes"), text);
    }
}

#[test]
fn tokenizers_of_other_kinds_are_refused_by_name() {
    let error = |key: &'static str, value: Option<Meta>, from: Vec<(&'static str, Meta)>| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut metadata: Vec<_> = from.into_iter().filter(|(name, _)| *name != key).collect();
        metadata.extend(value.map(|value| (key, value)));
        let metadata = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        write(dir.path(), "t.gguf", Gguf::new(metadata, vec![]).bytes());
        let error = text_files(&dir.path().join("t.gguf")).expect_err("accepted");
        format!("{}: {error}", error.code())
    };
    let spm = || sentence_piece().0;
    let text = |text: &str| Some(Meta::Text(text.to_owned()));
    let cases = [
        (error("tokenizer.ggml.model", text("bert"), spm()), "model_unsupported", "`bert`"),
        (error("tokenizer.ggml.model", None, spm()), "model_invalid", "tokenizer.ggml.model"),
        (error("tokenizer.ggml.tokens", None, spm()), "model_invalid", "tokenizer.ggml.tokens"),
        (error("tokenizer.ggml.tokens", Some(Meta::Ints(vec![1])), spm()), "model_invalid", "array of strings"),
        (
            error("tokenizer.ggml.tokens", Some(Meta::Texts(vec!["a".into(), "a".into()])), spm()),
            "model_invalid",
            "types for 2 tokens",
        ),
        (error("tokenizer.ggml.scores", None, spm()), "model_invalid", "tokenizer.ggml.scores"),
        (error("tokenizer.ggml.scores", Some(Meta::Floats(vec![0.0])), spm()), "model_invalid", "1 scores"),
        (error("tokenizer.ggml.eos_token_id", Some(Meta::U32(99_999)), spm()), "model_invalid", "vocabulary"),
        (error("tokenizer.ggml.model", text("gpt2"), spm()), "model_invalid", "tokenizer.ggml.merges"),
    ];
    for (found, code, text) in cases {
        assert!(found.starts_with(code) && found.contains(text), "`{found}` is not {code} with {text}");
    }
    let gpt2 = |pre: &str, merge: &str| {
        vec![
            ("tokenizer.ggml.model", Meta::Text("gpt2".to_owned())),
            ("tokenizer.ggml.tokens", Meta::Texts(vec!["a".to_owned()])),
            ("tokenizer.ggml.merges", Meta::Texts(vec![merge.to_owned()])),
            ("tokenizer.ggml.pre", Meta::Text(pre.to_owned())),
        ]
    };
    assert!(error("-", None, gpt2("deepseek-llm", "a a")).contains("pre-tokenizer `deepseek-llm`"));
    assert!(error("-", None, gpt2("gpt-2", "aa")).contains("merge `aa`"));
}

#[test]
fn a_tokenizer_beside_the_file_wins() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let metadata = sentence_piece().0.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    write(dir.path(), "t.gguf", Gguf::new(metadata, vec![]).bytes());
    write(dir.path(), "tokenizer.json", "{\"of\":\"the directory\"}");
    write(
        dir.path(),
        "tokenizer_config.json",
        json!({"chat_template": [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]})
            .to_string(),
    );
    let text = text_files(&dir.path().join("t.gguf")).expect("read");
    assert_eq!(text.tokenizer_json, "{\"of\":\"the directory\"}");
    assert_eq!((text.chat_template.as_deref(), &text.config_eos[..]), (Some("yes"), &[2][..]));
    write(dir.path(), "chat_template.jinja", "from the file");
    assert_eq!(text_files(&dir.path().join("t.gguf")).expect("read").chat_template.as_deref(), Some("from the file"));
}

#[test]
fn dummy_weights_depend_on_the_seed_only() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "config.json", config("qwen2").to_string());
    let model = |seed: u64| {
        let options = LoadOptions { dtype: None, format: LoadFormat::Dummy, seed };
        load(dir.path(), &options, &mut |_| ()).expect("loads")
    };
    let (first, again, other) = (model(1), model(1), model(2));
    assert_eq!(first.dtype, Dtype::Bf16);
    assert_eq!(first.content_id, again.content_id);
    assert_ne!(first.content_id, other.content_id);
    let tokens: Vec<u32> = (1..20).collect();
    let mut logits = [first, again, other].map(|model| Runner::from_model(model, 64 << 10, 64).whole(&tokens, &[]));
    assert_eq!(logits[0], logits[1]);
    assert_ne!(logits[0], logits[2]);
    assert!(logits.iter_mut().flatten().flatten().all(|logit| logit.is_finite()));
}

/// How far the logits of a GGUF whose weights stay quantised are from those of the dequantised ones: root mean squares,
/// relative. Formats are ggml's numbers.
fn distance(kind_of: impl Fn(&str) -> u32) -> f32 {
    let config = config("llama");
    let weights = tiny_weights(&config, SEED);
    let (entries, _) = convert(&weights, Some((8, 2)), kind_of);
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "model.gguf", Gguf::new(metadata("llama", &config), entries).bytes());
    let mut random = Random(SEED);
    let tokens: Vec<u32> = (0..17).map(|_| random.below(101) as u32).collect();
    let [kept, plain] = [None, Some(Dtype::F32)].map(|dtype| {
        let path = dir.path().join("model.gguf");
        let logits = Runner::new(&path, dtype, 64 << 10, 256).with_kv(ArenaDtype::F32).whole(&tokens, &[]);
        logits.into_iter().flatten().collect::<Vec<f32>>()
    });
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
    (square(&mut kept.iter().zip(&plain).map(|(a, b)| a - b)) / square(&mut plain.iter().copied())).sqrt()
}

#[test]
fn weights_that_stay_quantised_give_the_dequantised_ones_logits() {
    for kind in [2, 3, 6, 7, 8, 12, 13, 14] {
        let distance = distance(|_| kind);
        // The activations are rounded to 8 bits, eight products deep.
        assert!(distance > 0.0 && distance < 0.06, "type {kind}: {distance}");
    }
    // As llama.cpp's Q4_K_M: q and k in one format, v in another.
    let distance = distance(|name| if name.contains("v_proj") || name.contains("down") { 14 } else { 12 });
    assert!(distance > 0.0 && distance < 0.06, "mixed: {distance}");
}

#[track_caller]
fn assert_elements(matrix: &Matrix, parts: &[&Tensor]) {
    let Matrix::Quant(weight) = matrix else { panic!("it was dequantised") };
    let mut row = 0;
    for values in parts.iter().flat_map(|part| part.values.chunks(part.shape[1])) {
        let found: Vec<f32> = (0..values.len()).map(|k| weight.element(row, k)).collect();
        assert_eq!(found, values, "row {row}");
        row += 1;
    }
    assert_eq!(row, weight.d_out());
}

#[test]
fn elements_of_quantised_weights_are_the_dequantised_ones() {
    let config = config("llama");
    let weights = tiny_weights(&config, SEED);
    for kind in [2, 3, 6, 7, 8, 12, 13, 14] {
        let (entries, seen) = convert(&weights, Some((8, 2)), |name| if name.contains("v_proj") { 8 } else { kind });
        let dir = tempfile::tempdir().expect("a temporary directory");
        write(dir.path(), "model.gguf", Gguf::new(metadata("llama", &config), entries).bytes());
        let model = load(dir.path(), &LoadOptions::default(), &mut |_| ()).expect("loads");
        let of = |name: &str| &seen[&format!("model.layers.1.{name}.weight")];
        let layer = &model.weights.layers[1];
        assert_elements(&model.weights.embedding, &[&seen["model.embed_tokens.weight"]]);
        let qkv = ["q_proj", "k_proj", "v_proj"].map(|name| of(&format!("self_attn.{name}")));
        assert_elements(&layer.qkv, &qkv);
        assert_elements(&layer.down, &[of("mlp.down_proj")]);
        assert_elements(&layer.gate_up, &[of("mlp.gate_proj"), of("mlp.up_proj")]);
    }
}

#[test]
fn quantised_weights_take_as_much_memory_as_in_the_file() {
    let config = config("llama");
    let (entries, _) = convert(&tiny_weights(&config, SEED), Some((8, 2)), |_| 12);
    let file_bytes: usize = entries.iter().map(|entry| entry.data.len()).sum();
    let dir = tempfile::tempdir().expect("a temporary directory");
    write(dir.path(), "model.gguf", Gguf::new(metadata("llama", &config), entries).bytes());
    let load = |dtype| load(dir.path(), &LoadOptions { dtype, ..LoadOptions::default() }, &mut |_| ()).expect("loads");
    let (kept, dequantised) = (load(None), load(Some(Dtype::Bf16)));
    assert_eq!((kept.quantised, dequantised.quantised), (Some(QuantFormat::Q4_K), None));
    let (kept, dequantised) = (kept.weight_bytes as f64, dequantised.weight_bytes as f64);
    // The vocabulary of 101 fills the panels of the embedding and the head badly.
    assert!(kept < 1.1 * file_bytes as f64 && kept < dequantised / 3.0, "{kept} of {file_bytes}, {dequantised}");
}
