//! `tokenizer.json` from a GGUF header, for files that have none beside them.
//!
//! Two kinds exist in Llama-architecture files: `gpt2` (byte-level BPE; the split before it is named by
//! `tokenizer.ggml.pre`) and `llama` (SentencePiece BPE with byte fallback, whose merges follow from the scores).
//! Sources: llama.cpp `src/llama-vocab.cpp`; the tokenizer.json files of SmolLM2, Llama 3, Qwen2.5 and Llama 2;
//! transformers `convert_slow_tokenizer.py` for merges from scores.

use super::gguf_header::GgufFile;
use super::gguf_weights::numbers;
use crate::error::ModelError;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// A GGUF's tokenizer in the files a Hugging Face directory has.
#[derive(Debug)]
pub(crate) struct GgufTokenizer {
    pub(crate) tokenizer_json: String,
    pub(crate) tokenizer_config: String,
}

const SPACE: &str = "\u{2581}";

/// `tokenizer.ggml.token_type` (llama.cpp `llama_token_type`).
const NORMAL: i64 = 1;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Letters, digits in runs of at most three, punctuation, spaces: Llama 3's split.
const LLAMA3_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// The same with single digits: Qwen2's split.
const QWEN2_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Builds the tokenizer files.
///
/// # Errors
/// [`ModelError::Unsupported`] names a tokenizer kind or pre-tokenizer that is not known; [`ModelError::Invalid`] for
/// missing or inconsistent arrays.
pub(crate) fn synthesise(gguf: &GgufFile) -> Result<GgufTokenizer, ModelError> {
    let vocabulary = Vocabulary::read(gguf)?;
    let kind = gguf.text("tokenizer.ggml.model")?.ok_or_else(|| gguf.missing("tokenizer.ggml.model"))?;
    let (mut root, adds_bos) = match kind {
        "gpt2" => byte_level(gguf, &vocabulary)?,
        "llama" => sentence_piece(gguf, &vocabulary)?,
        other => {
            let what = format!("tokenizer `{other}`");
            return Err(ModelError::unsupported(&gguf.name, what, "accepted are `gpt2` and `llama`"));
        }
    };
    let add_bos = gguf.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
    let add_eos = gguf.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let bos = vocabulary.special(gguf, "bos")?;
    let eos = vocabulary.special(gguf, "eos")?;
    let first = if add_bos { bos } else { None };
    root.insert("version".to_owned(), json!("1.0"));
    root.insert("truncation".to_owned(), Value::Null);
    root.insert("padding".to_owned(), Value::Null);
    root.insert("added_tokens".to_owned(), vocabulary.added_tokens());
    root.insert("post_processor".to_owned(), template(first, if add_eos { eos } else { None }));
    let mut config = Map::new();
    config.insert("add_bos_token".to_owned(), json!(first.is_some()));
    for (name, token) in [
        ("bos_token", bos),
        ("eos_token", eos),
        ("unk_token", vocabulary.special(gguf, "unknown")?),
        ("pad_token", vocabulary.special(gguf, "padding")?),
    ] {
        if let Some((_, text)) = token {
            config.insert(name.to_owned(), json!(text));
        }
    }
    Ok(GgufTokenizer {
        tokenizer_json: Value::Object(root).to_string(),
        tokenizer_config: Value::Object(config).to_string(),
    })
}

struct Vocabulary<'a> {
    tokens: &'a [String],
    types: Vec<i64>,
    ids: HashMap<&'a str, usize>,
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a GgufFile) -> Result<Self, ModelError> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        const TYPES: &str = "tokenizer.ggml.token_type";
        let tokens = gguf.texts(TOKENS)?.ok_or_else(|| gguf.missing(TOKENS))?;
        let types = match numbers(gguf, TYPES)? {
            None => vec![NORMAL; tokens.len()],
            Some(types) if types.len() == tokens.len() => types.into_iter().map(|kind| kind as i64).collect(),
            Some(types) => {
                let reason = format!("{} token types for {} tokens", types.len(), tokens.len());
                return Err(ModelError::invalid(&gguf.name, reason));
            }
        };
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token.as_str(), id) {
                let reason = format!("tokens {first} and {id} are both `{token}`");
                return Err(ModelError::invalid(&gguf.name, reason));
            }
        }
        Ok(Self { tokens, types, ids })
    }

    /// The token that `tokenizer.ggml.<name>_token_id` names.
    fn special(&self, gguf: &GgufFile, name: &str) -> Result<Option<(usize, &'a str)>, ModelError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = gguf.unsigned(&key)? else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id).map(|token| (id, token.as_str())));
        token.map(Some).ok_or_else(|| gguf.wrong(&key, "an id of the vocabulary"))
    }

    fn vocab(&self) -> Value {
        Value::Object(self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect())
    }

    fn added_tokens(&self) -> Value {
        let added = self.tokens.iter().zip(&self.types).enumerate();
        let added = added.filter(|(_, (_, kind))| [CONTROL, USER_DEFINED].contains(kind));
        let entry = |(id, (token, kind)): (usize, (&String, &i64))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": *kind == CONTROL})
        };
        Value::Array(added.map(entry).collect())
    }
}

type Root = (Map<String, Value>, bool);

fn byte_level(gguf: &GgufFile, vocabulary: &Vocabulary) -> Result<Root, ModelError> {
    const MERGES: &str = "tokenizer.ggml.merges";
    let merges = gguf.texts(MERGES)?.ok_or_else(|| gguf.missing(MERGES))?;
    if let Some(bad) = merges.iter().find(|merge| merge.split(' ').filter(|part| !part.is_empty()).count() != 2) {
        return Err(ModelError::invalid(&gguf.name, format!("merge `{bad}` is not two tokens and a space")));
    }
    let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |regex: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
    };
    let (normalizer, pre_tokenizer, ignore_merges, adds_bos) = match pre {
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            (Value::Null, json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]}), false, false)
        }
        "llama-bpe" | "llama3" | "llama-v3" => (Value::Null, split(LLAMA3_SPLIT), true, true),
        "qwen2" => (json!({"type": "NFC"}), split(QWEN2_SPLIT), false, false),
        "default" | "gpt-2" => (Value::Null, bytes(true), false, false),
        other => {
            let accepted = "accepted are `smollm`, `llama-bpe`, `qwen2`, `gpt-2` and `default`; or put tokenizer.json beside the file";
            return Err(ModelError::unsupported(&gguf.name, format!("pre-tokenizer `{other}`"), accepted));
        }
    };
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
        "vocab": vocabulary.vocab(), "merges": merges,
    });
    let mut root = Map::new();
    root.insert("normalizer".to_owned(), normalizer);
    root.insert("pre_tokenizer".to_owned(), pre_tokenizer);
    root.insert("decoder".to_owned(), bytes(true));
    root.insert("model".to_owned(), model);
    Ok((root, adds_bos))
}

fn sentence_piece(gguf: &GgufFile, vocabulary: &Vocabulary) -> Result<Root, ModelError> {
    const SCORES: &str = "tokenizer.ggml.scores";
    let scores = numbers(gguf, SCORES)?.ok_or_else(|| gguf.missing(SCORES))?;
    if scores.len() != vocabulary.tokens.len() || scores.iter().any(|score| score.is_nan()) {
        let reason = format!("{} scores for {} tokens, or a score is NaN", scores.len(), vocabulary.tokens.len());
        return Err(ModelError::invalid(&gguf.name, reason));
    }
    let prefix = gguf.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let mut normalizers = vec![spaces];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = vocabulary.special(gguf, "unknown")?.map(|(_, token)| token);
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
        "vocab": vocabulary.vocab(), "merges": merges_from_scores(gguf, vocabulary, &scores)?,
    });
    let mut root = Map::new();
    root.insert("normalizer".to_owned(), json!({"type": "Sequence", "normalizers": normalizers}));
    root.insert("pre_tokenizer".to_owned(), Value::Null);
    root.insert("decoder".to_owned(), json!({"type": "Sequence", "decoders": decoders}));
    root.insert("model".to_owned(), model);
    Ok((root, true))
}

/// SentencePiece joins the neighbours whose joined piece scores best. As merges: every split of every piece into two
/// pieces, best score first; equal scores in the order of the parts' ids.
fn merges_from_scores(gguf: &GgufFile, vocabulary: &Vocabulary, scores: &[f64]) -> Result<Vec<Value>, ModelError> {
    const PIECE_BYTES_MAX: usize = 1 << 10;
    let mut merges = Vec::new();
    for (id, piece) in vocabulary.tokens.iter().enumerate() {
        if ![NORMAL, USER_DEFINED].contains(&vocabulary.types[id]) {
            continue;
        }
        if piece.len() > PIECE_BYTES_MAX {
            return Err(ModelError::TooLarge {
                file: gguf.name.clone(),
                what: format!("the size of token {id} in bytes"),
                found: piece.len() as u64,
                limit: PIECE_BYTES_MAX as u64,
            });
        }
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(&left), Some(&right)) = (vocabulary.ids.get(left), vocabulary.ids.get(right)) {
                merges.push((id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then((a.1, a.2).cmp(&(b.1, b.2))));
    let tokens = vocabulary.tokens;
    Ok(merges.into_iter().map(|(_, left, right)| json!([tokens[left], tokens[right]])).collect())
}

/// A post-processor that puts `first` before and `last` after a text; `null` when there is neither.
fn template(first: Option<(usize, &str)>, last: Option<(usize, &str)>) -> Value {
    if first.is_none() && last.is_none() {
        return Value::Null;
    }
    let special = |token: (usize, &str), sequence: u32| json!({"SpecialToken": {"id": token.1, "type_id": sequence}});
    let around = |name: &str, sequence: u32| {
        let text = json!({"Sequence": {"id": name, "type_id": sequence}});
        let first = first.map(|token| special(token, sequence));
        let last = last.map(|token| special(token, sequence));
        first.into_iter().chain([text]).chain(last).collect::<Vec<_>>()
    };
    let tokens: Map<String, Value> = first
        .into_iter()
        .chain(last)
        .map(|(id, token)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})))
        .collect();
    let pair: Vec<Value> = around("A", 0).into_iter().chain(around("B", 1)).collect();
    json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": tokens})
}
