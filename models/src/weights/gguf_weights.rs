//! Weights and architecture from a GGUF file: dequantised through candle's block formats, with llama.cpp's row order of
//! q and k undone.

use super::gguf_header::{GgufFile, TensorInfo, Value};
use super::safetensors::{Element, TensorData};
use super::{Expected, WeightSource};
use crate::error::ModelError;
use crate::families::{GgufArchitecture, TensorKind};
use crate::spec::{DecoderSpec, RopeScaling, RopeSpec};
use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use loramux_kernels::{Dtype, QuantFormat};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

/// Divisors of the rotary frequencies (Llama 3.1 and later).
const ROPE_FACTORS: &str = "rope_freqs.weight";

pub(super) struct GgufWeights {
    gguf: GgufFile,
    spec: DecoderSpec,
    permuted_qk: bool,
    done_bytes: u64,
}

impl GgufWeights {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let mut gguf = GgufFile::open(path)?;
        let (mut spec, architecture) = spec(&gguf)?;
        if let Some(info) = gguf.tensors.get(ROPE_FACTORS).cloned() {
            spec.rope.scaling = RopeScaling::Factors(rope_factors(&mut gguf, &info, spec.head_dim)?);
        }
        Ok(Self { gguf, spec, permuted_qk: architecture.permuted_qk, done_bytes: 0 })
    }
}

/// The architecture a GGUF header describes. Rope factors, which are a tensor, are not in it yet.
pub(crate) fn spec(gguf: &GgufFile) -> Result<(DecoderSpec, &'static GgufArchitecture), ModelError> {
    let name = gguf.text("general.architecture")?.ok_or_else(|| gguf.missing("general.architecture"))?;
    let architecture = GgufArchitecture::by_name(name).ok_or_else(|| {
        let accepted = format!("accepted are {}", GgufArchitecture::names());
        ModelError::unsupported(&gguf.name, format!("architecture `{name}`"), accepted)
    })?;
    let key = |rest: &str| format!("{name}.{rest}");
    let size = |rest: &str| -> Result<Option<usize>, ModelError> {
        let Some(number) = gguf.unsigned(&key(rest))? else { return Ok(None) };
        usize::try_from(number).map(Some).map_err(|_| gguf.wrong(&key(rest), "a size"))
    };
    let required = |rest: &str| size(rest)?.ok_or_else(|| gguf.missing(&key(rest)));
    refuse_unsupported(gguf, name)?;
    let (hidden, heads) = (required("embedding_length")?, required("attention.head_count")?);
    let head_dim = match size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => hidden.checked_div(heads).unwrap_or(0),
    };
    if size("attention.value_length")?.is_some_and(|value| value != head_dim) {
        let what = "attention.value_length other than key_length";
        return Err(ModelError::unsupported(&gguf.name, what, "keys and values must be equally wide"));
    }
    let vocab = match gguf.texts("tokenizer.ggml.tokens")? {
        Some(tokens) => tokens.len(),
        None => required("vocab_size")?,
    };
    let (bos, eos) = end_tokens(gguf)?;
    let spec = DecoderSpec {
        family: architecture.family.to_owned(),
        hidden,
        layers: required("block_count")?,
        heads,
        kv_heads: size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        intermediate: required("feed_forward_length")?,
        vocab,
        context: required("context_length")?,
        rms_eps: gguf
            .float(&key("attention.layer_norm_rms_epsilon"))?
            .ok_or_else(|| gguf.missing(&key("attention.layer_norm_rms_epsilon")))? as f32,
        rope: RopeSpec {
            theta: gguf.float(&key("rope.freq_base"))?.unwrap_or(10_000.0) as f32,
            scaling: scaling(gguf, name)?,
            rotary_dim: size("rope.dimension_count")?.unwrap_or(head_dim),
        },
        window: size("attention.sliding_window")?.filter(|&window| window > 0),
        qkv_bias: architecture.qkv_bias,
        tied_head: !gguf.tensors.contains_key("output.weight"),
        bos,
        eos,
    };
    spec.check(&gguf.name)?;
    Ok((spec, architecture))
}

fn refuse_unsupported(gguf: &GgufFile, architecture: &str) -> Result<(), ModelError> {
    if gguf.unsigned(&format!("{architecture}.expert_count"))?.is_some_and(|experts| experts > 0) {
        return Err(ModelError::unsupported(&gguf.name, "expert_count", "mixtures of experts are not served"));
    }
    if gguf.unsigned("split.count")?.is_some_and(|count| count > 1) {
        let reason = "merge the parts into one file (llama-gguf-split --merge)";
        return Err(ModelError::unsupported(&gguf.name, "split.count", reason));
    }
    Ok(())
}

fn scaling(gguf: &GgufFile, architecture: &str) -> Result<RopeScaling, ModelError> {
    let key = |rest: &str| format!("{architecture}.rope.scaling.{rest}");
    match gguf.text(&key("type"))? {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => match gguf.float(&key("factor"))? {
            Some(factor) if factor.is_finite() && factor > 0.0 => Ok(RopeScaling::Linear { factor: factor as f32 }),
            _ => Err(gguf.wrong(&key("factor"), "a float > 0")),
        },
        Some(other) => {
            let accepted = "accepted are `none`, `linear` and rope_freqs.weight";
            Err(ModelError::unsupported(&gguf.name, format!("rope scaling `{other}`"), accepted))
        }
    }
}

/// First token, and every token that ends a turn.
pub(crate) fn end_tokens(gguf: &GgufFile) -> Result<(Option<u32>, Vec<u32>), ModelError> {
    let id = |name: &str| -> Result<Option<u32>, ModelError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = gguf.unsigned(&key)? else { return Ok(None) };
        u32::try_from(id).map(Some).map_err(|_| gguf.wrong(&key, "a token id"))
    };
    let mut eos = Vec::new();
    for id in [id("eos")?, id("eot")?, id("eom")?].into_iter().flatten() {
        if !eos.contains(&id) {
            eos.push(id);
        }
    }
    Ok((id("bos")?, eos))
}

fn rope_factors(gguf: &mut GgufFile, info: &TensorInfo, rotary_dim: usize) -> Result<Vec<f32>, ModelError> {
    if info.dtype != GgmlDType::F32 || info.shape != [rotary_dim / 2] {
        let reason =
            format!("`{ROPE_FACTORS}` is {:?} {:?}, accepted is F32 [{}]", info.dtype, info.shape, rotary_dim / 2);
        return Err(ModelError::invalid(&gguf.name, reason));
    }
    let factors = read_tensor(gguf, info)?.into_f32();
    match factors.iter().all(|factor| factor.is_finite() && *factor > 0.0) {
        true => Ok(factors),
        false => Err(ModelError::invalid(&gguf.name, format!("`{ROPE_FACTORS}` has a factor that is not > 0"))),
    }
}

impl WeightSource for GgufWeights {
    fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    fn content_id(&self) -> [u8; 32] {
        self.gguf.content_id
    }

    fn natural_dtype(&self) -> Dtype {
        Dtype::Bf16
    }

    fn total_bytes(&self) -> u64 {
        self.gguf.tensors.values().map(|info| info.bytes).sum()
    }

    fn done_bytes(&self) -> u64 {
        self.done_bytes
    }

    fn check(&self, expected: &[Expected]) -> Result<(), ModelError> {
        let file = || self.gguf.name.clone();
        let (mut missing, mut read) = (Vec::new(), BTreeSet::from([ROPE_FACTORS.to_owned()]));
        for tensor in expected {
            let name = tensor.id.gguf();
            match self.gguf.tensors.get(&name) {
                None => missing.push(name),
                Some(info) if info.shape != tensor.shape => {
                    let reason =
                        format!("tensor `{name}` has shape {:?}, the metadata wants {:?}", info.shape, tensor.shape);
                    return Err(ModelError::invalid(file(), reason));
                }
                Some(_) => {
                    read.insert(name);
                }
            }
        }
        if !missing.is_empty() {
            missing.sort();
            return Err(ModelError::MissingTensors { file: file(), names: missing });
        }
        let unread: Vec<String> = self.gguf.tensors.keys().filter(|name| !read.contains(*name)).cloned().collect();
        match unread.is_empty() {
            true => Ok(()),
            false => Err(ModelError::UnreadTensors { file: file(), names: unread }),
        }
    }

    fn quant_format(&self, expected: &Expected) -> Option<QuantFormat> {
        quant_format(self.gguf.tensors.get(&expected.id.gguf())?.dtype)
    }

    fn read_blocks(&mut self, expected: &Expected) -> Result<Vec<u8>, ModelError> {
        let info = self.gguf.tensors.get(&expected.id.gguf()).expect("`check` saw every expected tensor").clone();
        let blocks = read_bytes(&mut self.gguf, &info)?;
        self.done_bytes += info.bytes;
        if !self.is_permuted(expected.id.kind) {
            return Ok(blocks);
        }
        // A row is whole blocks, so rows move as they are.
        let row_bytes = blocks.len() / expected.shape[0].max(1);
        let heads = expected.shape[0] / self.spec.head_dim;
        Ok(halves_from_pairs(&blocks, heads, self.spec.head_dim, row_bytes))
    }

    fn read(&mut self, expected: &Expected) -> Result<TensorData, ModelError> {
        let info = self.gguf.tensors.get(&expected.id.gguf()).expect("`check` saw every expected tensor").clone();
        let data = read_tensor(&mut self.gguf, &info)?;
        self.done_bytes += info.bytes;
        if !self.is_permuted(expected.id.kind) {
            return Ok(data);
        }
        let (heads, values) = (expected.shape[0] / self.spec.head_dim, data.into_f32());
        Ok(TensorData::F32(halves_from_pairs(&values, heads, self.spec.head_dim, expected.shape[1])))
    }

    fn read_rows(&mut self, expected: &Expected, rows: Range<usize>) -> Result<Vec<f32>, ModelError> {
        let info = self.gguf.tensors.get(&expected.id.gguf()).expect("`check` saw every expected tensor").clone();
        let (width, head_dim) = (expected.width(), self.spec.head_dim);
        if !self.is_permuted(expected.id.kind) {
            return read_tensor(&mut self.gguf, &part_of(&info, expected, rows)).map(TensorData::into_f32);
        }
        // Rows move within their head only.
        let heads = rows.start / head_dim..rows.end.div_ceil(head_dim);
        let part = part_of(&info, expected, heads.start * head_dim..heads.end * head_dim);
        let values = read_tensor(&mut self.gguf, &part)?.into_f32();
        let values = halves_from_pairs(&values, heads.len(), head_dim, width);
        Ok(values[(rows.start - heads.start * head_dim) * width..][..rows.len() * width].to_vec())
    }
}

impl GgufWeights {
    fn is_permuted(&self, kind: TensorKind) -> bool {
        self.permuted_qk && matches!(kind, TensorKind::Query | TensorKind::Key)
    }
}

/// Where some rows of a tensor lie. A row is whole blocks of its element type.
fn part_of(info: &TensorInfo, expected: &Expected, rows: Range<usize>) -> TensorInfo {
    let row_bytes = info.bytes / expected.shape[0].max(1) as u64;
    let mut shape = expected.shape.clone();
    shape[0] = rows.len();
    let (start, bytes) = (info.start + rows.start as u64 * row_bytes, rows.len() as u64 * row_bytes);
    TensorInfo { shape, start, bytes, ..info.clone() }
}

/// llama.cpp rotates neighbouring rows, so its converter stores the rows of each head as pairs (0, d/2), (1, d/2 + 1),
/// ...; this puts them back into two halves. `values` is `[heads * head_dim, width]`.
fn halves_from_pairs<T: Copy>(values: &[T], heads: usize, head_dim: usize, width: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for row in 0..head_dim {
            let (half, pair) = (row / (head_dim / 2), row % (head_dim / 2));
            let stored = head * head_dim + 2 * pair + half;
            out.extend_from_slice(&values[stored * width..][..width]);
        }
    }
    out
}

/// The formats that the CPU's products take as they are.
const fn quant_format(dtype: GgmlDType) -> Option<QuantFormat> {
    match dtype {
        GgmlDType::Q4_0 => Some(QuantFormat::Q4_0),
        GgmlDType::Q4_1 => Some(QuantFormat::Q4_1),
        GgmlDType::Q5_0 => Some(QuantFormat::Q5_0),
        GgmlDType::Q5_1 => Some(QuantFormat::Q5_1),
        GgmlDType::Q8_0 => Some(QuantFormat::Q8_0),
        GgmlDType::Q4K => Some(QuantFormat::Q4_K),
        GgmlDType::Q5K => Some(QuantFormat::Q5_K),
        GgmlDType::Q6K => Some(QuantFormat::Q6_K),
        _ => None,
    }
}

/// Reads one tensor as it is stored. Bounded by the file's size: the header check put the tensor inside the file.
fn read_bytes(gguf: &mut GgufFile, info: &TensorInfo) -> Result<Vec<u8>, ModelError> {
    seek(gguf, info)?;
    let mut bytes = vec![0; info.bytes as usize];
    read_exact(gguf, &mut bytes)?;
    Ok(bytes)
}

fn seek(gguf: &mut GgufFile, info: &TensorInfo) -> Result<(), ModelError> {
    let place = SeekFrom::Start(info.start);
    gguf.file.seek(place).map(drop).map_err(|source| ModelError::Io { path: gguf.path.clone(), source })
}

/// Reads and, if quantised, dequantises one tensor.
fn read_tensor(gguf: &mut GgufFile, info: &TensorInfo) -> Result<TensorData, ModelError> {
    let element = match info.dtype {
        GgmlDType::F32 => Some(Element::F32),
        GgmlDType::F16 => Some(Element::F16),
        GgmlDType::BF16 => Some(Element::Bf16),
        _ => None,
    };
    if let Some(element) = element {
        let bytes = read_bytes(gguf, info)?;
        return Ok(TensorData::decode(&element, &bytes).expect("the three float types are served"));
    }
    seek(gguf, info)?;
    let count: usize = info.shape.iter().product();
    let mut values = Vec::with_capacity(count);
    let block_bytes = info.dtype.type_size();
    // In pieces, so that the intermediate tensors of the dequantiser stay small beside the result.
    let piece_bytes = block_bytes * (1 << 16);
    let mut left = info.bytes as usize;
    while left > 0 {
        let bytes = left.min(piece_bytes);
        let mut blocks = vec![0; bytes];
        read_exact(gguf, &mut blocks)?;
        let piece = dequantise(blocks, info.dtype, bytes / block_bytes * info.dtype.block_size())
            .map_err(|error| ModelError::invalid(&gguf.name, format!("cannot dequantise {:?}: {error}", info.dtype)))?;
        values.extend_from_slice(&piece);
        left -= bytes;
    }
    Ok(TensorData::F32(values))
}

fn read_exact(gguf: &mut GgufFile, bytes: &mut [u8]) -> Result<(), ModelError> {
    gguf.file.read_exact(bytes).map_err(|source| ModelError::Io { path: gguf.path.clone(), source })
}

fn dequantise(blocks: Vec<u8>, dtype: GgmlDType, count: usize) -> candle_core::Result<Vec<f32>> {
    let storage = QStorage::from_data(Cow::Owned(blocks), &Device::Cpu, dtype)?;
    QTensor::new(storage, count)?.dequantize(&Device::Cpu)?.to_vec1::<f32>()
}

/// Scores or types of tokens: one number per token, as f32 or i64.
pub(crate) fn numbers(gguf: &GgufFile, key: &str) -> Result<Option<Vec<f64>>, ModelError> {
    match gguf.metadata.get(key) {
        None => Ok(None),
        Some(Value::Floats(values)) => Ok(Some(values.iter().map(|&value| f64::from(value)).collect())),
        Some(Value::Signeds(values)) => Ok(Some(values.iter().map(|&value| value as f64).collect())),
        Some(_) => Err(gguf.wrong(key, "an array of numbers")),
    }
}
