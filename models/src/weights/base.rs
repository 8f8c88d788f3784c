//! The base model's files, opened again while it is served: some adapters change weights by what they are.

use super::{
    Expected, LoadFormat, LoadOptions, Location, WeightSource, checkpoint, dummy, expected, gguf_weights, locate, shape,
};
use crate::error::ModelError;
use crate::families::{TensorId, TensorKind};
use crate::spec::DecoderSpec;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Where the base model's weights were read from.
#[derive(Clone, Debug)]
pub struct BaseFiles {
    path: PathBuf,
    format: LoadFormat,
    seed: u64,
    content_id: [u8; 32],
}

impl BaseFiles {
    /// The files that `load(path, options, ..)` read a model of this content from.
    pub fn new(path: &Path, options: &LoadOptions, content_id: [u8; 32]) -> Self {
        Self { path: path.to_owned(), format: options.format, seed: options.seed, content_id }
    }

    /// Opens them; nothing but headers is read.
    ///
    /// # Errors
    /// [`ModelError`] if they cannot be read, or are no longer those that were loaded.
    pub(crate) fn open(&self) -> Result<BaseReader, ModelError> {
        let source: Box<dyn WeightSource> = match locate(&self.path, self.format)? {
            Location::Checkpoint(dir) => Box::new(checkpoint::Checkpoint::open(&dir)?),
            Location::Gguf(file) => Box::new(gguf_weights::GgufWeights::open(&file)?),
            Location::Dummy(dir) => Box::new(dummy::DummyWeights::open(&dir, self.seed)?),
        };
        if source.content_id() != self.content_id {
            let reason = "the files have changed since the model was loaded; restart the server";
            return Err(ModelError::invalid(self.path.display().to_string(), reason));
        }
        let spec = source.spec().clone();
        source.check(&expected(&spec))?;
        Ok(BaseReader { source, spec })
    }
}

/// Weights as the files hold them, in f32, some rows at a time.
pub(crate) struct BaseReader {
    source: Box<dyn WeightSource>,
    spec: DecoderSpec,
}

impl BaseReader {
    /// Rows of a matrix, or elements of a vector.
    ///
    /// # Errors
    /// [`ModelError`] if they cannot be read.
    pub(crate) fn rows(&mut self, layer: usize, kind: TensorKind, rows: Range<usize>) -> Result<Vec<f32>, ModelError> {
        // A tied head is the embedding.
        let kind = if kind == TensorKind::Head && self.spec.tied_head { TensorKind::Embedding } else { kind };
        let expected = Expected { id: TensorId::in_layer(layer, kind), shape: shape(&self.spec, kind) };
        self.source.read_rows(&expected, rows)
    }
}
