//! The GGUF header: metadata and the place of every tensor, parsed within limits and checked against the file's size
//! before anything is allocated from it.
//!
//! Source: the GGUF specification (ggml `docs/gguf.md`), versions 2 and 3, little-endian.

use super::{file_name, model_fault};
use crate::error::ModelError;
use crate::files;
use candle_core::quantized::GgmlDType;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

const HEADER_BYTES_MAX: u64 = 512 << 20;
const METADATA_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 17;
const NAME_BYTES_MAX: u64 = 1 << 10;
const STRING_BYTES_MAX: u64 = 16 << 20;
const DIMS_MAX: u32 = 4;
const ALIGNMENT_MAX: u64 = 1 << 20;

/// A metadata value. Arrays of numbers are widened; arrays of arrays do not occur in model files and are refused.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Flag(bool),
    Text(String),
    Signeds(Vec<i64>),
    Floats(Vec<f32>),
    Texts(Vec<String>),
}

/// Where a tensor lies. `start..start + bytes` is inside the file.
#[derive(Clone, Debug)]
pub(crate) struct TensorInfo {
    pub(crate) dtype: GgmlDType,
    /// Row-major, slowest first: the reverse of the order in the file.
    pub(crate) shape: Vec<usize>,
    /// From the start of the file.
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

/// A parsed header and the open file behind it.
#[derive(Debug)]
pub(crate) struct GgufFile {
    pub(crate) path: PathBuf,
    pub(crate) name: String,
    pub(crate) file: File,
    pub(crate) metadata: BTreeMap<String, Value>,
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
    /// SHA-256 over the file's size and header.
    pub(crate) content_id: [u8; 32],
}

impl GgufFile {
    /// Opens a file and parses its header.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let (file, file_bytes) = files::open_regular(path).map_err(|fault| model_fault(path, u64::MAX, fault))?;
        let name = file_name(path);
        let mut hash = Sha256::new();
        hash.update(b"loramux base gguf 1\0");
        hash.update(file_bytes.to_le_bytes());
        let mut reader = HeaderReader { inner: BufReader::new(&file), position: 0, file_bytes, hash };
        let parsed = parse(&mut reader).map_err(|fault| match fault {
            Fault::Invalid(reason) => ModelError::invalid(&name, reason),
            Fault::Unsupported(what, reason) => ModelError::unsupported(&name, what, reason),
            Fault::TooLarge(what, found, limit) => {
                ModelError::TooLarge { file: name.clone(), what: what.to_owned(), found, limit }
            }
            Fault::Io(source) => ModelError::Io { path: path.to_owned(), source },
        })?;
        let content_id = reader.hash.finalize().into();
        let (metadata, tensors) = parsed;
        Ok(Self { path: path.to_owned(), name, file, metadata, tensors, content_id })
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    pub(crate) fn unsigned(&self, key: &str) -> Result<Option<u64>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Unsigned(number)) => Ok(Some(number)),
            Some(&Value::Signed(number)) if number >= 0 => Ok(Some(number as u64)),
            Some(_) => Err(self.wrong(key, "a whole number >= 0")),
        }
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Float(number)) => Ok(Some(number)),
            Some(_) => Err(self.wrong(key, "a float")),
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Flag(flag)) => Ok(Some(flag)),
            Some(_) => Err(self.wrong(key, "a bool")),
        }
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Option<&[String]>, ModelError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            Some(_) => Err(self.wrong(key, "an array of strings")),
        }
    }

    pub(crate) fn missing(&self, key: &str) -> ModelError {
        ModelError::invalid(&self.name, format!("metadata `{key}` is missing"))
    }

    pub(crate) fn wrong(&self, key: &str, want: &str) -> ModelError {
        ModelError::invalid(&self.name, format!("metadata `{key}` is not {want}"))
    }
}

enum Fault {
    Invalid(String),
    Unsupported(String, String),
    TooLarge(&'static str, u64, u64),
    Io(std::io::Error),
}

fn invalid<T>(reason: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Invalid(reason.into()))
}

type Parsed = (BTreeMap<String, Value>, BTreeMap<String, TensorInfo>);

fn parse(reader: &mut HeaderReader) -> Result<Parsed, Fault> {
    if reader.file_bytes < 24 || reader.array::<4>()? != *b"GGUF" {
        return invalid("does not start with `GGUF`");
    }
    match reader.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() <= 3 => {
            return Err(Fault::Unsupported("big-endian byte order".to_owned(), "accepted is little-endian".to_owned()));
        }
        version => {
            return Err(Fault::Unsupported(format!("GGUF version {version}"), "accepted are 2 and 3".to_owned()));
        }
    }
    // A tensor entry takes at least 24 bytes and a metadata entry 13, so a count past that is a lie.
    let tensors = reader.count("the number of tensors", TENSORS_MAX, 24)?;
    let entries = reader.count("the number of metadata entries", METADATA_MAX, 13)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..entries {
        let key = reader.string(NAME_BYTES_MAX)?;
        let kind = reader.u32()?;
        let value = reader.value(kind).map_err(|fault| in_key(fault, &key))?;
        if metadata.insert(key.clone(), value).is_some() {
            return invalid(format!("metadata `{key}` appears twice"));
        }
    }
    let mut raw = Vec::new();
    for _ in 0..tensors {
        raw.push(raw_tensor(reader)?);
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(&Value::Unsigned(alignment)) if alignment.is_power_of_two() && alignment <= ALIGNMENT_MAX => alignment,
        Some(_) => return invalid(format!("general.alignment is not a power of two up to {ALIGNMENT_MAX}")),
    };
    let data_start = reader.position.next_multiple_of(alignment);
    Ok((metadata, place(raw, data_start, alignment, reader.file_bytes)?))
}

fn in_key(fault: Fault, key: &str) -> Fault {
    match fault {
        Fault::Invalid(reason) => Fault::Invalid(format!("metadata `{key}`: {reason}")),
        other => other,
    }
}

struct RawTensor {
    name: String,
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

fn raw_tensor(reader: &mut HeaderReader) -> Result<RawTensor, Fault> {
    let name = reader.string(NAME_BYTES_MAX)?;
    let dims = reader.u32()?;
    if dims == 0 || dims > DIMS_MAX {
        return invalid(format!("tensor `{name}` has {dims} dimensions, accepted are 1..={DIMS_MAX}"));
    }
    let dims = (0..dims).map(|_| reader.u64()).collect::<Result<Vec<_>, _>>()?;
    Ok(RawTensor { name, dims, kind: reader.u32()?, offset: reader.u64()? })
}

/// Turns offsets into places in the file; two tensors may not share a byte.
fn place(
    raw: Vec<RawTensor>,
    data_start: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<BTreeMap<String, TensorInfo>, Fault> {
    let mut tensors = BTreeMap::new();
    let mut spans = Vec::with_capacity(raw.len());
    for tensor in raw {
        let name = tensor.name;
        let dtype = ggml_dtype(tensor.kind).map_err(|kind| {
            let accepted = "accepted are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K";
            Fault::Unsupported(format!("type {kind} of tensor `{name}`"), accepted.to_owned())
        })?;
        let Some(bytes) = tensor_bytes(&tensor.dims, dtype) else {
            let what = format!("dimensions {:?} of {dtype:?}", tensor.dims);
            return invalid(format!("tensor `{name}`: {what} are empty, too many, or rows are no whole blocks"));
        };
        if !tensor.offset.is_multiple_of(alignment) {
            return invalid(format!("tensor `{name}`: offset {} is no multiple of {alignment}", tensor.offset));
        }
        let start = data_start.saturating_add(tensor.offset);
        match start.checked_add(bytes) {
            Some(end) if end <= file_bytes => spans.push((start, end, name.clone())),
            _ => {
                return invalid(format!(
                    "tensor `{name}`: {bytes} bytes at {start} pass the file's end at {file_bytes}"
                ));
            }
        }
        let shape = tensor.dims.iter().rev().map(|&extent| extent as usize).collect();
        if tensors.insert(name.clone(), TensorInfo { dtype, shape, start, bytes }).is_some() {
            return invalid(format!("tensor `{name}` appears twice"));
        }
    }
    spans.sort();
    match spans.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        None => Ok(tensors),
        Some(pair) => invalid(format!("tensors `{}` and `{}` overlap", pair[0].2, pair[1].2)),
    }
}

fn tensor_bytes(dims: &[u64], dtype: GgmlDType) -> Option<u64> {
    let block = dtype.block_size() as u64;
    let whole_rows = dims.first().is_some_and(|&row| row > 0 && row.is_multiple_of(block));
    let count = dims.iter().try_fold(1u64, |count, &extent| count.checked_mul(extent)).filter(|&count| count > 0);
    // `usize` on a 64-bit machine; the product with the file's size was not compared yet.
    let count = count.filter(|_| whole_rows).filter(|&count| count <= isize::MAX as u64)?;
    (count / block).checked_mul(dtype.type_size() as u64)
}

/// ggml type numbers, from `ggml.h`. Types that only exist inside a matmul, and the i-quants, are not served.
fn ggml_dtype(kind: u32) -> Result<GgmlDType, String> {
    Ok(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
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
        30 => GgmlDType::BF16,
        other => return Err(ggml_type_name(other)),
    })
}

fn ggml_type_name(kind: u32) -> String {
    const NAMES: [(u32, &str); 15] = [
        (9, "Q8_1"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (39, "MXFP4"),
    ];
    NAMES.iter().find(|(number, _)| *number == kind).map_or(kind.to_string(), |(_, name)| (*name).to_owned())
}

/// Reads the header and hashes what it reads; never asks for more than the file has left.
struct HeaderReader<'a> {
    inner: BufReader<&'a File>,
    position: u64,
    file_bytes: u64,
    hash: Sha256,
}

impl HeaderReader<'_> {
    fn left(&self) -> u64 {
        self.file_bytes.min(HEADER_BYTES_MAX).saturating_sub(self.position)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Fault> {
        let want = bytes.len() as u64;
        if want > self.left() {
            return invalid(format!("the header ends at byte {} and wants {want} more", self.position));
        }
        self.inner.read_exact(bytes).map_err(Fault::Io)?;
        self.hash.update(&*bytes);
        self.position += want;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things that take at least `bytes_min` bytes each.
    fn count(&mut self, what: &'static str, max: u64, bytes_min: u64) -> Result<u64, Fault> {
        let count = self.u64()?;
        if count > max {
            return Err(Fault::TooLarge(what, count, max));
        }
        match count.checked_mul(bytes_min) {
            Some(bytes) if bytes <= self.left() => Ok(count),
            _ => invalid(format!("{what} is {count}, more than the {} bytes left can hold", self.left())),
        }
    }

    fn string(&mut self, bytes_max: u64) -> Result<String, Fault> {
        let bytes = self.count("the size of a string", bytes_max, 1)?;
        let mut text = vec![0; bytes as usize];
        self.fill(&mut text)?;
        String::from_utf8(text).or_else(|_| invalid("a string is not UTF-8"))
    }

    fn value(&mut self, kind: u32) -> Result<Value, Fault> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>()?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => match self.array::<1>()? {
                [0] => Value::Flag(false),
                [1] => Value::Flag(true),
                [other] => return invalid(format!("a bool is {other}")),
            },
            8 => Value::Text(self.string(STRING_BYTES_MAX)?),
            9 => self.array_value()?,
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return invalid(format!("value type {other} does not exist")),
        })
    }

    fn array_value(&mut self) -> Result<Value, Fault> {
        const COUNT: &str = "the size of an array";
        const COUNT_MAX: u64 = 1 << 26;
        let kind = self.u32()?;
        Ok(match kind {
            8 => {
                let count = self.count(COUNT, COUNT_MAX, 8)?;
                Value::Texts((0..count).map(|_| self.string(STRING_BYTES_MAX)).collect::<Result<_, _>>()?)
            }
            6 => {
                let count = self.count(COUNT, COUNT_MAX, 4)?;
                let floats = (0..count).map(|_| Ok(f32::from_le_bytes(self.array()?)));
                Value::Floats(floats.collect::<Result<_, Fault>>()?)
            }
            12 => {
                let count = self.count(COUNT, COUNT_MAX, 8)?;
                let floats = (0..count).map(|_| Ok(f64::from_le_bytes(self.array()?) as f32));
                Value::Floats(floats.collect::<Result<_, Fault>>()?)
            }
            0..=5 | 7 | 10 | 11 => {
                let count = self.count(COUNT, COUNT_MAX, 1)?;
                let whole = |value| match value {
                    Value::Unsigned(number) => i64::try_from(number).ok(),
                    Value::Signed(number) => Some(number),
                    Value::Flag(flag) => Some(flag.into()),
                    _ => None,
                };
                let mut numbers = Vec::new();
                for _ in 0..count {
                    match whole(self.value(kind)?) {
                        Some(number) => numbers.push(number),
                        None => return invalid("a number does not fit 63 bits"),
                    }
                }
                Value::Signeds(numbers)
            }
            9 => return invalid("an array of arrays"),
            other => return invalid(format!("value type {other} does not exist")),
        })
    }
}
