//! Small tokenizers for tests, built here so that no file is needed.

use serde_json::{Map, Value, json};

use super::{TextFiles, TextModel};

/// `<|endoftext|>`, `<|im_start|>`, `<|im_end|>` are ids 0, 1, 2.
pub(crate) const IM_END: u32 = 2;
/// The token of byte b is `FIRST_BYTE + b`.
pub(crate) const FIRST_BYTE: u32 = 3;

/// ChatML, as many small models ship it.
pub(crate) const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// GPT-2's alphabet.
fn byte_chars() -> Vec<char> {
    let plain = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100;
    let char_of = |b: u8| {
        if plain(b) {
            char::from(b)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap()
        }
    };
    (0..=255u8).map(char_of).collect()
}

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special})
}

/// 3 special tokens, 256 bytes, some merges (a few of them end inside a UTF-8 sequence), 2 added tokens that are plain text.
pub(crate) fn byte_level_json() -> String {
    let chars = byte_chars();
    let mut vocab = Map::new();
    let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    for text in specials.iter().map(|s| (*s).to_owned()).chain(chars.iter().map(char::to_string)) {
        vocab.insert(text, json!(vocab.len()));
    }
    let merges: [(&[u8], &[u8]); 11] = [
        (b"h", b"e"),
        (b"l", b"l"),
        (b"he", b"ll"),
        (b"hell", b"o"),
        (b" ", b"w"),
        (b"o", b"r"),
        (b" w", b"or"),
        (b"\xC3", b"\xA9"),
        (b"\xF0", b"\x9F"),
        (b"\xF0\x9F", b"\x98"),
        (b"\x80", b"a"),
    ];
    let spell = |bytes: &[u8]| bytes.iter().map(|&b| chars[b as usize]).collect::<String>();
    let mut pairs = Vec::new();
    for (left, right) in merges {
        pairs.push(json!([spell(left), spell(right)]));
        vocab.insert(spell(left) + &spell(right), json!(vocab.len()));
    }
    let next = vocab.len() as u32;
    let mut tokens: Vec<_> = specials.iter().enumerate().map(|(id, text)| added(id as u32, text, true)).collect();
    tokens.extend([added(next, "<think>", false), added(next + 1, "<|tool▁call|>", false)]);
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": tokens, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": pairs},
    })
    .to_string()
}

/// `<unk>`, `<s>`, `</s>`, 256 byte tokens, then pieces; adds `<s>` in front.
pub(crate) fn sentencepiece_json(decoder: Value) -> String {
    let mut vocab = Map::new();
    let bytes = (0..=255u8).map(|b| format!("<0x{b:02X}>"));
    let pieces = ["▁", "▁the", "▁a", "e", "h", "t", "é", "▁▁", "x", "the", "日", "th", "▁t"].map(str::to_owned);
    for text in ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(bytes).chain(pieces) {
        vocab.insert(text, json!(vocab.len()));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
                  "merges": [["t", "h"], ["th", "e"], ["▁", "the"]]},
    })
    .to_string()
}

/// The decoder of Llama-2.
pub(crate) fn llama_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

pub(crate) fn byte_level_files() -> TextFiles {
    let config = json!({"eos_token": "<|im_end|>", "bos_token": null, "chat_template": CHATML});
    TextFiles { tokenizer_json: byte_level_json(), tokenizer_config: Some(config.to_string()), ..TextFiles::default() }
}

/// The byte-level tokenizer with ChatML.
pub(crate) fn byte_level() -> TextModel {
    TextModel::new(byte_level_files()).unwrap()
}

/// The tokens of `text`, byte by byte.
pub(crate) fn bytes_of(text: &str) -> Vec<u32> {
    text.bytes().map(|b| FIRST_BYTE + u32::from(b)).collect()
}
