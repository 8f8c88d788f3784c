//! What a model is, without its weights.

use crate::error::ModelError;
use crate::spec::{CONFIG_BYTES_MAX, DecoderSpec};
use crate::weights::gguf_header::GgufFile;
use crate::weights::{LoadFormat, Location, gguf_weights, locate, read_text};
use std::path::Path;

/// Reads the spec of the model at `path`: a directory with `config.json`, or a GGUF file.
///
/// # Errors
/// As for the weights, as far as the config or the header shows it.
pub fn describe(path: &Path) -> Result<DecoderSpec, ModelError> {
    let location = match locate(path, LoadFormat::Auto) {
        // Weights are not needed.
        Err(_) if path.join("config.json").is_file() => Location::Dummy(path.to_owned()),
        other => other?,
    };
    match location {
        Location::Checkpoint(dir) | Location::Dummy(dir) => {
            DecoderSpec::from_config(&read_text(&dir.join("config.json"), CONFIG_BYTES_MAX)?)
        }
        Location::Gguf(file) => Ok(gguf_weights::spec(&GgufFile::open(&file)?)?.0),
    }
}
