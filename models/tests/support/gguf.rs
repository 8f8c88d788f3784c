//! A GGUF writer for tests: any header, well formed or not; quantised data by candle.

use super::{Stored, Tensor, Tensors};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor as CandleTensor};

/// A metadata value with its type.
#[derive(Clone, Debug)]
pub(crate) enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Ints(Vec<i32>),
    /// Type number and raw bytes.
    Raw(u32, Vec<u8>),
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Meta {
    fn write(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, kind: u32, count: usize| {
            out.extend(9u32.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((count as u64).to_le_bytes());
        };
        match self {
            Self::U32(value) => {
                out.extend(4u32.to_le_bytes());
                out.extend(value.to_le_bytes());
            }
            Self::F32(value) => {
                out.extend(6u32.to_le_bytes());
                out.extend(value.to_le_bytes());
            }
            Self::Bool(value) => {
                out.extend(7u32.to_le_bytes());
                out.push((*value).into());
            }
            Self::Text(text) => {
                out.extend(8u32.to_le_bytes());
                string(out, text);
            }
            Self::Texts(texts) => {
                array(out, 8, texts.len());
                texts.iter().for_each(|text| string(out, text));
            }
            Self::Floats(values) => {
                array(out, 6, values.len());
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
            }
            Self::Ints(values) => {
                array(out, 5, values.len());
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
            }
            Self::Raw(kind, bytes) => {
                out.extend(kind.to_le_bytes());
                out.extend(bytes);
            }
        }
    }
}

/// A tensor entry and its data.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// In the file's order: fastest first.
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
    /// Instead of the offset that follows from the entries before.
    pub(crate) offset: Option<u64>,
}

/// A whole file; every field may lie.
#[derive(Clone, Debug)]
pub(crate) struct Gguf {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    pub(crate) tensor_count: Option<u64>,
    pub(crate) metadata_count: Option<u64>,
    pub(crate) metadata: Vec<(String, Meta)>,
    pub(crate) tensors: Vec<Entry>,
}

impl Gguf {
    pub(crate) fn new(metadata: Vec<(String, Meta)>, tensors: Vec<Entry>) -> Self {
        Self { magic: *b"GGUF", version: 3, tensor_count: None, metadata_count: None, metadata, tensors }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        const ALIGNMENT: usize = 32;
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.metadata_count.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            string(&mut out, key);
            value.write(&mut out);
        }
        let (mut data, mut entries) = (Vec::new(), Vec::new());
        for entry in &self.tensors {
            string(&mut entries, &entry.name);
            entries.extend((entry.dims.len() as u32).to_le_bytes());
            entry.dims.iter().for_each(|dim| entries.extend(dim.to_le_bytes()));
            entries.extend(entry.kind.to_le_bytes());
            entries.extend(entry.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&entry.data);
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        }
        out.extend(entries);
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.extend(data);
        out
    }
}

/// A tensor type by its ggml number, and the values a reader gets back.
pub(crate) fn encode(tensor: &Tensor, kind: u32) -> (Vec<u8>, Vec<f32>) {
    let stored = match kind {
        0 => Some(Stored::F32),
        1 => Some(Stored::F16),
        30 => Some(Stored::Bf16),
        _ => None,
    };
    if let Some(stored) = stored {
        return (stored.bytes(&tensor.values), stored.round(&tensor.values));
    }
    let dtype = match kind {
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        other => panic!("no writer for type {other}"),
    };
    let source = CandleTensor::from_vec(tensor.values.clone(), tensor.shape.clone(), &Device::Cpu).expect("a tensor");
    let quantised = QTensor::quantize(&source, dtype).expect("whole blocks");
    let back = quantised.dequantize(&Device::Cpu).and_then(|t| t.flatten_all()?.to_vec1::<f32>()).expect("values");
    (quantised.data().expect("bytes on the CPU").to_vec(), back)
}

/// llama.cpp's `permute`: each head's two halves of rows become neighbouring pairs.
pub(crate) fn permute(values: &[f32], heads: usize, width: usize) -> Vec<f32> {
    let head_dim = values.len() / heads / width;
    let mut out = vec![0.0; values.len()];
    for head in 0..heads {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                let from = (head * head_dim + half * head_dim / 2 + pair) * width;
                let to = (head * head_dim + 2 * pair + half) * width;
                out[to..to + width].copy_from_slice(&values[from..from + width]);
            }
        }
    }
    out
}

/// The llama.cpp name of a Hugging Face tensor.
pub(crate) fn gguf_name(name: &str) -> String {
    let fixed = [
        ("model.embed_tokens.", "token_embd."),
        ("model.norm.", "output_norm."),
        ("lm_head.", "output."),
        ("model.layers.", "blk."),
        ("self_attn.q_proj.", "attn_q."),
        ("self_attn.k_proj.", "attn_k."),
        ("self_attn.v_proj.", "attn_v."),
        ("self_attn.o_proj.", "attn_output."),
        ("mlp.gate_proj.", "ffn_gate."),
        ("mlp.up_proj.", "ffn_up."),
        ("mlp.down_proj.", "ffn_down."),
        ("input_layernorm.", "attn_norm."),
        ("post_attention_layernorm.", "ffn_norm."),
    ];
    fixed.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// Converts a model as llama.cpp's converter does: matrices in the type `kind_of` gives, vectors in f32, q and k
/// permuted for `llama`. Returns the entries and the weights that a correct reader sees.
pub(crate) fn convert(
    tensors: &Tensors,
    heads: Option<(usize, usize)>,
    kind_of: impl Fn(&str) -> u32,
) -> (Vec<Entry>, Tensors) {
    let (mut entries, mut seen) = (Vec::new(), Tensors::new());
    for (name, tensor) in tensors {
        let kind = if tensor.shape.len() == 1 { 0 } else { kind_of(name) };
        let permuted = match heads {
            Some((q, _)) if name.contains("q_proj.weight") => Some(q),
            Some((_, kv)) if name.contains("k_proj.weight") => Some(kv),
            _ => None,
        };
        let values = match permuted {
            Some(heads) => permute(&tensor.values, heads, tensor.shape[1]),
            None => tensor.values.clone(),
        };
        let (data, back) = encode(&Tensor { shape: tensor.shape.clone(), values }, kind);
        let back = match permuted {
            // Quantisation works along a row, so permuting rows back is exact.
            Some(heads) => unpermute(&back, heads, tensor.shape[1]),
            None => back,
        };
        seen.insert(name.clone(), Tensor { shape: tensor.shape.clone(), values: back });
        let dims = tensor.shape.iter().rev().map(|&dim| dim as u64).collect();
        entries.push(Entry { name: gguf_name(name), dims, kind, data, offset: None });
    }
    (entries, seen)
}

fn unpermute(values: &[f32], heads: usize, width: usize) -> Vec<f32> {
    // Permuting the row numbers themselves says where each row went.
    let rows: Vec<f32> = (0..values.len() / width).map(|row| row as f32).collect();
    let mut out = vec![0.0; values.len()];
    for (stored, original) in permute(&rows, heads, 1).into_iter().enumerate() {
        let original = original as usize;
        out[original * width..][..width].copy_from_slice(&values[stored * width..][..width]);
    }
    out
}
