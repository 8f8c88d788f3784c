//! The files that turn text into tokens and chats into text, from a directory or out of a GGUF header.

use crate::error::ModelError;
use crate::spec::{CONFIG_BYTES_MAX, DecoderSpec};
use crate::weights::gguf_header::GgufFile;
use crate::weights::{LoadFormat, Location, file_name, gguf_tokenizer, gguf_weights, locate, read_text};
use serde_json::Value;
use std::path::Path;

/// The text side of a model. Contents, not paths: a GGUF has no such files.
#[derive(Clone, Debug, PartialEq)]
pub struct TextFiles {
    /// `tokenizer.json`.
    pub tokenizer_json: String,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<String>,
    /// `generation_config.json`.
    pub generation_config: Option<String>,
    /// The chat template: `chat_template.jinja`, else the one in `tokenizer_config.json` or the GGUF.
    pub chat_template: Option<String>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<String>,
    /// Tokens that end a text, from `config.json` or the GGUF.
    pub config_eos: Vec<u32>,
    /// First token of a text, from `config.json` or the GGUF.
    pub config_bos: Option<u32>,
}

const TOKENIZER_BYTES_MAX: u64 = 128 << 20;
const SMALL_BYTES_MAX: u64 = 16 << 20;
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

/// Reads the text side of a model: a directory, a GGUF file, or a GGUF file with `tokenizer.json` beside it.
///
/// # Errors
/// [`ModelError::NotFound`] without a tokenizer; [`ModelError::Unsupported`] for a GGUF tokenizer of another kind.
pub fn text_files(path: &Path) -> Result<TextFiles, ModelError> {
    // A directory without weights is still a tokenizer (`--load-format dummy`).
    let location = match locate(path, LoadFormat::Auto) {
        Err(_) if path.join("config.json").is_file() => Location::Dummy(path.to_owned()),
        other => other?,
    };
    match location {
        Location::Checkpoint(dir) | Location::Dummy(dir) => {
            let spec = DecoderSpec::from_config(&read_text(&dir.join("config.json"), CONFIG_BYTES_MAX)?)?;
            from_directory(&dir, spec.bos, spec.eos)
        }
        Location::Gguf(file) => {
            let gguf = GgufFile::open(&file)?;
            let (config_bos, config_eos) = gguf_weights::end_tokens(&gguf)?;
            match file.parent() {
                Some(dir) if dir.join("tokenizer.json").is_file() => from_directory(dir, config_bos, config_eos),
                _ => from_gguf(&gguf, config_bos, config_eos),
            }
        }
    }
}

fn from_directory(dir: &Path, config_bos: Option<u32>, config_eos: Vec<u32>) -> Result<TextFiles, ModelError> {
    let tokenizer = dir.join("tokenizer.json");
    if !tokenizer.exists() {
        let reason = match dir.join("tokenizer.model").exists() {
            true => "no such file; tokenizer.model is there: save the tokenizer in its fast form",
            false => "no such file",
        };
        return Err(ModelError::NotFound { path: tokenizer, reason: reason.to_owned() });
    }
    let optional = |name: &str, bytes_max: u64| -> Result<Option<String>, ModelError> {
        let path = dir.join(name);
        if path.exists() { read_text(&path, bytes_max).map(Some) } else { Ok(None) }
    };
    let tokenizer_config = optional("tokenizer_config.json", SMALL_BYTES_MAX)?;
    let chat_template = match optional("chat_template.jinja", TEMPLATE_BYTES_MAX)? {
        Some(template) => Some(template),
        None => tokenizer_config.as_deref().map(template_of).transpose()?.flatten(),
    };
    Ok(TextFiles {
        tokenizer_json: read_text(&tokenizer, TOKENIZER_BYTES_MAX)?,
        tokenizer_config,
        generation_config: optional("generation_config.json", SMALL_BYTES_MAX)?,
        chat_template,
        special_tokens_map: optional("special_tokens_map.json", SMALL_BYTES_MAX)?,
        config_eos,
        config_bos,
    })
}

/// `chat_template` of a `tokenizer_config.json`: a string, or a list of named ones of which `default` is taken.
fn template_of(config: &str) -> Result<Option<String>, ModelError> {
    let config: Value = serde_json::from_str(config)
        .map_err(|error| ModelError::invalid("tokenizer_config.json", format!("not JSON: {error}")))?;
    let template = match config.get("chat_template") {
        Some(Value::Array(named)) => {
            let default = named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
            default.and_then(|entry| entry.get("template"))
        }
        other => other,
    };
    Ok(template.and_then(Value::as_str).map(str::to_owned))
}

fn from_gguf(gguf: &GgufFile, config_bos: Option<u32>, config_eos: Vec<u32>) -> Result<TextFiles, ModelError> {
    let tokenizer = gguf_tokenizer::synthesise(gguf)?;
    let chat_template = gguf.text("tokenizer.chat_template")?.map(str::to_owned);
    if let Some(bytes) =
        chat_template.as_ref().map(|template| template.len() as u64).filter(|&b| b > TEMPLATE_BYTES_MAX)
    {
        let what = "the size of tokenizer.chat_template in bytes".to_owned();
        return Err(ModelError::TooLarge {
            file: file_name(&gguf.path),
            what,
            found: bytes,
            limit: TEMPLATE_BYTES_MAX,
        });
    }
    Ok(TextFiles {
        tokenizer_json: tokenizer.tokenizer_json,
        tokenizer_config: Some(tokenizer.tokenizer_config),
        generation_config: None,
        chat_template,
        special_tokens_map: None,
        config_eos,
        config_bos,
    })
}
