//! Checkpoints in their several forms are the same model.

mod support;

use loramux_kernels::{ArenaDtype, Dtype};
use loramux_models::{LoadFormat, LoadOptions, Model, load, text_files};
use serde_json::{Value, json};
use std::path::Path;
use support::runner::Runner;
use support::{Stored, Tensor, Tensors, changed, safetensors, tiny_config, tiny_weights, write, write_model};

const SEED: u64 = 0x10AD_0002;

fn model(dir: &Path) -> Model {
    load(dir, &LoadOptions::default(), &mut |_| ()).unwrap_or_else(|error| panic!("{error}"))
}

fn logits(model: Model) -> Vec<Vec<f32>> {
    let tokens: Vec<u32> = (3..20).collect();
    Runner::from_model(model, 64 << 10, 64).whole(&tokens, &[])
}

/// Writes a model in `count` shards, tensor i in shard i modulo `count`.
fn write_shards(dir: &Path, config: &Value, tensors: &Tensors, count: usize) {
    let mut map = serde_json::Map::new();
    for shard in 0..count {
        let name = format!("model-{:05}-of-{count:05}.safetensors", shard + 1);
        let part: Tensors = tensors.iter().skip(shard).step_by(count).map(|(n, t)| (n.clone(), t.clone())).collect();
        part.keys().for_each(|tensor| drop(map.insert(tensor.clone(), json!(name))));
        write(dir, &name, safetensors(&part, Stored::F32));
    }
    write(dir, "config.json", config.to_string());
    write(dir, "model.safetensors.index.json", json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string());
}

#[test]
fn shards_equal_a_single_file() {
    let config = tiny_config("qwen2");
    let tensors = tiny_weights(&config, SEED);
    let single = tempfile::tempdir().expect("a temporary directory");
    write_model(single.path(), &config, &tensors, Stored::F32);
    let want = logits(model(single.path()));
    for count in [1, 2, 5] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        write_shards(dir.path(), &config, &tensors, count);
        assert_eq!(logits(model(dir.path())), want, "{count} shards");
    }
}

#[test]
fn the_storage_type_follows_the_file_unless_asked() {
    let config = tiny_config("llama");
    let tensors = tiny_weights(&config, SEED);
    for (stored, want) in [(Stored::F32, Dtype::F32), (Stored::F16, Dtype::Bf16), (Stored::Bf16, Dtype::Bf16)] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        write_model(dir.path(), &config, &tensors, stored);
        assert_eq!(model(dir.path()).dtype, want, "{stored:?}");
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let options = LoadOptions { dtype: Some(dtype), ..LoadOptions::default() };
            let found = load(dir.path(), &options, &mut |_| ()).expect("loads");
            assert_eq!(found.dtype, dtype);
            // The same numbers, written as f32 after rounding.
            let rounded: Tensors = tensors
                .iter()
                .map(|(name, t)| (name.clone(), Tensor { shape: t.shape.clone(), values: stored.round(&t.values) }))
                .collect();
            let other = tempfile::tempdir().expect("a temporary directory");
            write_model(other.path(), &config, &rounded, Stored::F32);
            let want = load(other.path(), &options, &mut |_| ()).expect("loads");
            assert_eq!(logits(found), logits(want), "{stored:?} as {dtype:?}");
        }
    }
}

#[test]
fn tensors_that_carry_nothing_are_ignored_and_only_those() {
    let config = changed(tiny_config("llama"), json!({"tie_word_embeddings": true}));
    let plain = tempfile::tempdir().expect("a temporary directory");
    let mut tensors = tiny_weights(&config, SEED);
    write_model(plain.path(), &config, &tensors, Stored::F32);
    let extra = tempfile::tempdir().expect("a temporary directory");
    let vector = |count: usize| Tensor { shape: vec![count], values: vec![1.0; count] };
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), vector(4));
    tensors.insert("lm_head.weight".to_owned(), tensors["model.embed_tokens.weight"].clone());
    write_model(extra.path(), &config, &tensors, Stored::F32);
    assert_eq!(logits(model(plain.path())), logits(model(extra.path())));
    tensors.insert("model.layers.0.self_attn.rope.inv_freq".to_owned(), vector(4));
    write_model(extra.path(), &config, &tensors, Stored::F32);
    let error = load(extra.path(), &LoadOptions::default(), &mut |_| ()).err().expect("refused");
    assert!(error.to_string().contains("`model.layers.0.self_attn.rope.inv_freq`"), "{error}");
}

#[test]
fn a_model_reports_its_size_and_identity() {
    let config = tiny_config("llama");
    let tensors = tiny_weights(&config, SEED);
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_model(dir.path(), &config, &tensors, Stored::Bf16);
    let first = model(dir.path());
    let count: usize = tensors.values().map(|tensor| tensor.values.len()).sum();
    assert_eq!(first.parameters, count as u64);
    assert!(first.weight_bytes >= 2 * count as u64, "{} bytes for {count} parameters", first.weight_bytes);
    assert_eq!(first.content_id, model(dir.path()).content_id);
    write(dir.path(), "config.json", changed(config, json!({"eos_token_id": 3})).to_string());
    assert_ne!(first.content_id, model(dir.path()).content_id);
}

#[test]
fn a_batch_that_disagrees_with_itself_is_an_error() {
    use loramux_kernels::{AdapterTable, Arena, AttnChunk, KvSlot};
    use loramux_models::{Batch, Decoder, DecoderLimits};
    let config = tiny_config("llama");
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_model(dir.path(), &config, &tiny_weights(&config, SEED), Stored::F32);
    let limits = DecoderLimits { step_tokens_max: 4, logits_rows_max: 2 };
    let mut decoder = Decoder::new(model(dir.path()), limits);
    let layout = decoder.kv_layout(4, 64 << 10, ArenaDtype::F32);
    let (mut arena, table) = (Arena::new(64 << 10, 2).expect("memory"), AdapterTable::new(1));
    let good = || {
        let mut batch = Batch::default();
        batch.tokens.extend([1, 2]);
        batch.positions.extend([0, 1]);
        batch.kv_slots.extend([KvSlot { block: 0, offset: 0 }, KvSlot { block: 0, offset: 1 }]);
        batch.block_table.push(0);
        batch.chunks.push(AttnChunk { first_row: 0, len: 2, start: 0, blocks: 0..1 });
        batch
    };
    type Change = fn(&mut Batch);
    let cases: [(&str, Change); 8] = [
        ("a token outside the vocabulary", |b| b.tokens[1] = 101),
        ("a position too few", |b| b.positions.truncate(1)),
        ("a slot too few", |b| b.kv_slots.truncate(1)),
        ("a slot outside the arena", |b| b.kv_slots[0].block = 1 << 20),
        ("a slot outside its block", |b| b.kv_slots[0].offset = 4),
        ("a chunk past the rows", |b| b.chunks[0].len = 3),
        ("a block outside the table", |b| b.chunks[0].blocks = 0..2),
        ("more rows than the limit", |b| {
            b.tokens.extend([1; 3]);
            b.positions.extend([0; 3]);
            b.kv_slots.extend([KvSlot { block: 0, offset: 2 }; 3]);
        }),
    ];
    for (case, change) in cases {
        let mut batch = good();
        change(&mut batch);
        assert!(decoder.forward(&batch, &layout, &mut arena, &table).is_err(), "{case}");
    }
    decoder.forward(&good(), &layout, &mut arena, &table).expect("the batch is good");
    let mut logits = |rows: &[u32]| decoder.logits(rows, &good(), &arena, &table).map(|logits| logits.rows());
    assert_eq!(logits(&[1, 0]).expect("rows of the step"), 2);
    assert!(logits(&[2]).is_err(), "a row outside the step");
    assert!(logits(&[0, 1, 0]).is_err(), "more rows than the limit");
}

#[test]
fn text_files_of_a_directory() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let config = changed(tiny_config("llama"), json!({"eos_token_id": [2, 5]}));
    write(dir.path(), "config.json", config.to_string());
    let error = text_files(dir.path()).expect_err("no tokenizer");
    assert!(error.code() == "model_not_found" && error.to_string().contains("tokenizer.json"), "{error}");
    write(dir.path(), "tokenizer.model", b"\x0a");
    assert!(text_files(dir.path()).expect_err("no fast tokenizer").to_string().contains("tokenizer.model is there"));
    write(dir.path(), "tokenizer.json", "{}");
    write(dir.path(), "generation_config.json", "{\"eos_token_id\":7}");
    write(dir.path(), "special_tokens_map.json", "{}");
    write(dir.path(), "tokenizer_config.json", json!({"chat_template": "from the config"}).to_string());
    let text = text_files(dir.path()).expect("read");
    assert_eq!((text.config_bos, &text.config_eos[..]), (Some(1), &[2, 5][..]));
    assert_eq!(text.chat_template.as_deref(), Some("from the config"));
    assert_eq!(text.generation_config.as_deref(), Some("{\"eos_token_id\":7}"));
    write(dir.path(), "tokenizer_config.json", "not JSON");
    assert_eq!(text_files(dir.path()).expect_err("malformed").code(), "model_invalid");
    let options = LoadOptions { format: LoadFormat::Dummy, ..LoadOptions::default() };
    load(dir.path(), &options, &mut |_| ()).expect("a config is enough for dummy weights");
}
