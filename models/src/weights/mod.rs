//! Loading a base model: find the files, check every name and shape, then read, convert and pack tensor by tensor, so
//! that peak memory is the weights plus one tensor.

mod base;
mod checkpoint;
mod dummy;
pub(crate) mod gguf_header;
pub(crate) mod gguf_tokenizer;
pub(crate) mod gguf_weights;
pub(crate) mod safetensors;
mod store;

use crate::error::ModelError;
use crate::families::{TensorId, TensorKind};
use crate::files::{self, FileFault};
use crate::spec::DecoderSpec;
use loramux_kernels::{Dtype, HostData, QuantFormat, QuantPart, WeightPart};
use safetensors::TensorData;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use base::BaseFiles;
pub(crate) use base::BaseReader;
pub use store::{CpuStore, WeightStore};

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// Safetensors if the directory has them, else GGUF.
    #[default]
    Auto,
    /// `model.safetensors`, or the shards of `model.safetensors.index.json`.
    Safetensors,
    /// A `.gguf` file, or the only one in the directory.
    Gguf,
    /// Seeded random weights of the shapes in `config.json`; for benchmarks.
    Dummy,
}

/// How to load a model.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Storage type of the weights. `None`: f32 for a checkpoint in f32, else bf16; and quantised matrices stay as the file has
    /// them where the store can hold them.
    pub dtype: Option<Dtype>,
    /// Where the weights come from.
    pub format: LoadFormat,
    /// Seed of [`LoadFormat::Dummy`].
    pub seed: u64,
}

/// How far a load is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The tensor group being packed.
    pub what: String,
    /// Bytes of the files read so far.
    pub done_bytes: u64,
    /// Bytes to read in all.
    pub total_bytes: u64,
}

/// A loaded model: weights where a [`WeightStore`] put them.
pub struct Model<S: WeightStore = CpuStore> {
    /// Architecture.
    pub spec: DecoderSpec,
    /// Packed tensors.
    pub weights: Weights<S>,
    /// Storage type of the weights that are not quantised.
    pub dtype: Dtype,
    /// The format that most bytes of quantised weights are in; `None` if no weight is.
    pub quantised: Option<QuantFormat>,
    /// Memory of the packed weights in bytes.
    pub weight_bytes: u64,
    /// Number of parameters; a tied head counts once.
    pub parameters: u64,
    /// SHA-256 over the config and every file's name, size and header: the base model's identity.
    pub content_id: [u8; 32],
}

/// Packed tensors of a decoder.
pub struct Weights<S: WeightStore> {
    /// `[vocab, hidden]`.
    pub embedding: S::Matrix,
    /// `[vocab, hidden]`; `None` when the head is the embedding.
    pub head: Option<S::Matrix>,
    /// `[hidden]`.
    pub final_norm: S::Vector,
    /// In order.
    pub layers: Vec<LayerWeights<S>>,
}

/// Packed tensors of one layer; q, k and v are one matrix, gate and up another.
pub struct LayerWeights<S: WeightStore> {
    /// `[hidden]`.
    pub attention_norm: S::Vector,
    /// `[q + 2 kv, hidden]`.
    pub qkv: S::Matrix,
    /// `[q + 2 kv]`.
    pub qkv_bias: Option<S::Vector>,
    /// `[hidden, q]`.
    pub output: S::Matrix,
    /// `[hidden]`.
    pub mlp_norm: S::Vector,
    /// `[2 intermediate, hidden]`.
    pub gate_up: S::Matrix,
    /// `[hidden, intermediate]`.
    pub down: S::Matrix,
}

/// Loads a model from a Hugging Face directory or a GGUF file, calling `progress` after each group of tensors.
///
/// # Errors
/// [`ModelError`]; names and shapes of all tensors are checked before any is read, so a missing or unread tensor
/// is reported at once and with the full list.
pub fn load(path: &Path, options: &LoadOptions, progress: &mut dyn FnMut(Progress)) -> Result<Model, ModelError> {
    let keeps_quantised = options.dtype.is_none();
    load_into(path, options, progress, |_, dtype| Ok(CpuStore { dtype, keeps_quantised }))
}

/// As [`load`], into the store that `store` makes for the model's shape and the storage type asked for.
///
/// # Errors
/// As [`load`], and those of the store.
pub fn load_into<S: WeightStore>(
    path: &Path,
    options: &LoadOptions,
    progress: &mut dyn FnMut(Progress),
    store: impl FnOnce(&DecoderSpec, Dtype) -> Result<S, ModelError>,
) -> Result<Model<S>, ModelError> {
    let mut source: Box<dyn WeightSource> = match locate(path, options.format)? {
        Location::Checkpoint(dir) => Box::new(checkpoint::Checkpoint::open(&dir)?),
        Location::Gguf(file) => Box::new(gguf_weights::GgufWeights::open(&file)?),
        Location::Dummy(dir) => Box::new(dummy::DummyWeights::open(&dir, options.seed)?),
    };
    build(&mut *source, options.dtype, progress, store)
}

/// A place tensors are read from.
pub(crate) trait WeightSource {
    /// Architecture, from the config or the header.
    fn spec(&self) -> &DecoderSpec;
    /// Identity of the model.
    fn content_id(&self) -> [u8; 32];
    /// What [`LoadOptions::dtype`] `None` means here.
    fn natural_dtype(&self) -> Dtype;
    /// Bytes that [`WeightSource::read`] will read in all.
    fn total_bytes(&self) -> u64;
    /// Bytes that [`WeightSource::read`] has read.
    fn done_bytes(&self) -> u64;
    /// Checks that exactly `expected` is there, each in its shape.
    fn check(&self, expected: &[Expected]) -> Result<(), ModelError>;
    /// The format of one matrix of those checked, if [`WeightSource::read_blocks`] can read it.
    fn quant_format(&self, expected: &Expected) -> Option<QuantFormat> {
        let _ = expected;
        None
    }
    /// Reads the blocks of one matrix that has a [`WeightSource::quant_format`].
    fn read_blocks(&mut self, expected: &Expected) -> Result<Vec<u8>, ModelError> {
        Err(ModelError::invalid(expected.id.hugging_face(), "is not quantised"))
    }
    /// Reads one tensor of those checked.
    fn read(&mut self, expected: &Expected) -> Result<TensorData, ModelError>;
    /// Reads some rows (of a vector: elements) of one tensor of those checked, in f32, and little more than these.
    fn read_rows(&mut self, expected: &Expected, rows: Range<usize>) -> Result<Vec<f32>, ModelError>;
}

/// A tensor that the decoder reads, and its shape `[d_out, d_in]` or `[width]`.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) id: TensorId,
    pub(crate) shape: Vec<usize>,
}

impl Expected {
    fn count(&self) -> u64 {
        self.shape.iter().map(|&extent| extent as u64).product()
    }

    /// Elements of a row; a vector's rows are its elements.
    fn width(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }
}

/// Shape of one tensor of a model.
fn shape(spec: &DecoderSpec, kind: TensorKind) -> Vec<usize> {
    use TensorKind as K;
    match kind {
        K::Embedding | K::Head => vec![spec.vocab, spec.hidden],
        K::FinalNorm | K::AttentionNorm | K::MlpNorm => vec![spec.hidden],
        K::Query => vec![spec.q_width(), spec.hidden],
        K::Key | K::Value => vec![spec.kv_width(), spec.hidden],
        K::QueryBias => vec![spec.q_width()],
        K::KeyBias | K::ValueBias => vec![spec.kv_width()],
        K::Output => vec![spec.hidden, spec.q_width()],
        K::Gate | K::Up => vec![spec.intermediate, spec.hidden],
        K::Down => vec![spec.hidden, spec.intermediate],
    }
}

/// Every tensor the decoder reads.
fn expected(spec: &DecoderSpec) -> Vec<Expected> {
    use TensorKind as K;
    let mut ids = vec![TensorId::global(K::Embedding), TensorId::global(K::FinalNorm)];
    if !spec.tied_head {
        ids.push(TensorId::global(K::Head));
    }
    let in_layer =
        [K::AttentionNorm, K::Query, K::Key, K::Value, K::Output, K::MlpNorm, K::Gate, K::Up, K::Down].into_iter();
    let biases = if spec.qkv_bias { &[K::QueryBias, K::KeyBias, K::ValueBias][..] } else { &[] };
    let kinds: Vec<TensorKind> = in_layer.chain(biases.iter().copied()).collect();
    for layer in 0..spec.layers {
        ids.extend(kinds.iter().map(|&kind| TensorId::in_layer(layer, kind)));
    }
    ids.into_iter().map(|id| Expected { id, shape: shape(spec, id.kind) }).collect()
}

fn build<S: WeightStore>(
    source: &mut dyn WeightSource,
    dtype: Option<Dtype>,
    progress: &mut dyn FnMut(Progress),
    store: impl FnOnce(&DecoderSpec, Dtype) -> Result<S, ModelError>,
) -> Result<Model<S>, ModelError> {
    let spec = source.spec().clone();
    let expected = expected(&spec);
    source.check(&expected)?;
    let parameters = expected.iter().map(Expected::count).sum();
    let dtype = dtype.unwrap_or_else(|| source.natural_dtype());
    let store = store(&spec, dtype)?;
    let quant_bytes = BTreeMap::new();
    let mut packer = Packer { source, spec: &spec, store, weight_bytes: 0, quant_bytes, progress };
    let weights = packer.weights()?;
    let Packer { weight_bytes, quant_bytes, .. } = packer;
    let quantised = quant_bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(format, _)| format);
    let content_id = source.content_id();
    Ok(Model { spec, weights, dtype, quantised, weight_bytes, parameters, content_id })
}

/// Reads tensors in the order of the forward pass and packs them.
struct Packer<'a, S> {
    source: &'a mut dyn WeightSource,
    spec: &'a DecoderSpec,
    store: S,
    weight_bytes: u64,
    /// Bytes of the file by format, of what stays quantised.
    quant_bytes: BTreeMap<QuantFormat, u64>,
    progress: &'a mut dyn FnMut(Progress),
}

impl<S: WeightStore> Packer<'_, S> {
    fn weights(&mut self) -> Result<Weights<S>, ModelError> {
        use TensorKind as K;
        let embedding = self.matrix(0, &[K::Embedding])?;
        let layers = (0..self.spec.layers).map(|layer| self.layer(layer)).collect::<Result<Vec<_>, _>>()?;
        let final_norm = self.vector(0, &[K::FinalNorm])?;
        let head = if self.spec.tied_head { None } else { Some(self.matrix(0, &[K::Head])?) };
        self.report("head");
        Ok(Weights { embedding, head, final_norm, layers })
    }

    fn layer(&mut self, layer: usize) -> Result<LayerWeights<S>, ModelError> {
        use TensorKind as K;
        let weights = LayerWeights {
            attention_norm: self.vector(layer, &[K::AttentionNorm])?,
            qkv: self.matrix(layer, &[K::Query, K::Key, K::Value])?,
            qkv_bias: match self.spec.qkv_bias {
                true => Some(self.vector(layer, &[K::QueryBias, K::KeyBias, K::ValueBias])?),
                false => None,
            },
            output: self.matrix(layer, &[K::Output])?,
            mlp_norm: self.vector(layer, &[K::MlpNorm])?,
            gate_up: self.matrix(layer, &[K::Gate, K::Up])?,
            down: self.matrix(layer, &[K::Down])?,
        };
        self.report(&format!("layer {layer}"));
        Ok(weights)
    }

    fn expected(&self, layer: usize, kind: TensorKind) -> Expected {
        Expected { id: TensorId::in_layer(layer, kind), shape: shape(self.spec, kind) }
    }

    fn read(&mut self, layer: usize, kind: TensorKind) -> Result<TensorData, ModelError> {
        let expected = self.expected(layer, kind);
        self.source.read(&expected)
    }

    fn matrix(&mut self, layer: usize, kinds: &[TensorKind]) -> Result<S::Matrix, ModelError> {
        let format = |kind: &TensorKind| self.source.quant_format(&self.expected(layer, *kind));
        if let Some(formats) = kinds.iter().map(format).collect::<Option<Vec<_>>>()
            && self.store.takes_quantised(&formats)
        {
            return self.quantised(layer, kinds, &formats);
        }
        let tensors = kinds.iter().map(|&kind| self.read(layer, kind)).collect::<Result<Vec<_>, _>>()?;
        let parts: Vec<WeightPart> = kinds
            .iter()
            .zip(&tensors)
            .map(|(&kind, data)| {
                let shape = shape(self.spec, kind);
                WeightPart { data: host_data(data), d_out: shape[0], d_in: shape[1] }
            })
            .collect();
        let (matrix, bytes) = self.store.matrix(&parts)?;
        self.weight_bytes += bytes;
        Ok(matrix)
    }

    fn quantised(
        &mut self,
        layer: usize,
        kinds: &[TensorKind],
        formats: &[QuantFormat],
    ) -> Result<S::Matrix, ModelError> {
        let mut blocks = Vec::new();
        for (&kind, &format) in kinds.iter().zip(formats) {
            let expected = self.expected(layer, kind);
            let data = self.source.read_blocks(&expected)?;
            *self.quant_bytes.entry(format).or_default() += data.len() as u64;
            blocks.push((data, expected.shape));
        }
        let parts: Vec<QuantPart> = blocks
            .iter()
            .zip(formats)
            .map(|((data, shape), &format)| QuantPart { data, format, d_out: shape[0], d_in: shape[1] })
            .collect();
        let (matrix, bytes) = self.store.quantised(&parts)?;
        self.weight_bytes += bytes;
        Ok(matrix)
    }

    fn vector(&mut self, layer: usize, kinds: &[TensorKind]) -> Result<S::Vector, ModelError> {
        let mut values = Vec::new();
        for &kind in kinds {
            values.extend(self.read(layer, kind)?.into_f32());
        }
        self.weight_bytes += 4 * values.len() as u64;
        self.store.vector(values)
    }

    fn report(&mut self, what: &str) {
        let (done_bytes, total_bytes) = (self.source.done_bytes(), self.source.total_bytes());
        (self.progress)(Progress { what: what.to_owned(), done_bytes, total_bytes });
    }
}

fn host_data(data: &TensorData) -> HostData<'_> {
    match data {
        TensorData::F32(values) => HostData::F32(values),
        TensorData::F16(values) => HostData::F16(values),
        TensorData::Bf16(values) => HostData::Bf16(values),
    }
}

/// What a path turned out to be.
#[derive(Debug, PartialEq)]
pub(crate) enum Location {
    Checkpoint(PathBuf),
    Gguf(PathBuf),
    Dummy(PathBuf),
}

/// Decides what `path` is, without reading weights.
pub(crate) fn locate(path: &Path, format: LoadFormat) -> Result<Location, ModelError> {
    let not_found = |reason: &str| ModelError::NotFound { path: path.to_owned(), reason: reason.to_owned() };
    let metadata = std::fs::metadata(path).map_err(|_| not_found("no such file or directory"))?;
    if !metadata.is_dir() {
        return match format {
            LoadFormat::Auto | LoadFormat::Gguf => Ok(Location::Gguf(path.to_owned())),
            LoadFormat::Safetensors | LoadFormat::Dummy => {
                Err(not_found("a directory with config.json is wanted here"))
            }
        };
    }
    if format == LoadFormat::Dummy {
        return Ok(Location::Dummy(path.to_owned()));
    }
    let has = |name: &str| path.join(name).exists();
    let checkpoint = has(checkpoint::SINGLE) || has(checkpoint::INDEX);
    if checkpoint && format != LoadFormat::Gguf {
        return Ok(Location::Checkpoint(path.to_owned()));
    }
    if format != LoadFormat::Safetensors {
        let mut ggufs = gguf_files(path)?;
        match (ggufs.pop(), ggufs.is_empty()) {
            (Some(file), true) => return Ok(Location::Gguf(file)),
            (Some(_), false) => return Err(not_found("several .gguf files: name the one to load")),
            (None, _) => {}
        }
    }
    if has("pytorch_model.bin") || has("pytorch_model.bin.index.json") {
        let reason = "pickle files can run code; convert the checkpoint to safetensors";
        return Err(ModelError::unsupported(path.display().to_string(), "pytorch_model.bin", reason));
    }
    Err(not_found("holds neither model.safetensors, model.safetensors.index.json nor a .gguf file"))
}

fn gguf_files(dir: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let io = |source| ModelError::Io { path: dir.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Reads a whole small file of a model directory.
pub(crate) fn read_small(path: &Path, bytes_max: u64) -> Result<Vec<u8>, ModelError> {
    files::read_bounded(path, bytes_max).map_err(|fault| model_fault(path, bytes_max, fault))
}

/// As [`read_small`], for text.
pub(crate) fn read_text(path: &Path, bytes_max: u64) -> Result<String, ModelError> {
    String::from_utf8(read_small(path, bytes_max)?).map_err(|_| ModelError::invalid(file_name(path), "not UTF-8"))
}

pub(crate) fn model_fault(path: &Path, bytes_max: u64, fault: FileFault) -> ModelError {
    match fault {
        FileFault::Absent => ModelError::NotFound { path: path.to_owned(), reason: "no such file".to_owned() },
        FileFault::NotRegular => ModelError::invalid(file_name(path), "not a regular file"),
        FileFault::TooLarge { bytes } => ModelError::TooLarge {
            file: file_name(path),
            what: "the file's size in bytes".to_owned(),
            found: bytes,
            limit: bytes_max,
        },
        FileFault::Io(source) => ModelError::Io { path: path.to_owned(), source },
    }
}

/// The last component of a path, for messages.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
