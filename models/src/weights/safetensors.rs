//! The safetensors header, parsed within limits and checked against the file's size before a tensor is touched.
//!
//! Layout (safetensors format document): `u64` little-endian header size, a JSON object `name -> {dtype, shape,
//! data_offsets}`, then the data. Tensors must cover the data exactly: no gap, no overlap, no trailing byte. Duplicate
//! names are refused; a JSON parser that keeps the last of two lets a scanner and a loader see different files.

use half::{bf16, f16};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

/// Bounds on what a header may ask for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeaderLimits {
    pub(crate) header_bytes_max: u64,
    pub(crate) tensors_max: usize,
    /// Dimensions of one tensor.
    pub(crate) dims_max: usize,
}

/// Why a header was refused.
#[derive(Debug, PartialEq)]
pub(crate) enum HeaderFault {
    Invalid(String),
    TooLarge { what: &'static str, found: u64, limit: u64 },
}

/// Element type of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    F32,
    F16,
    Bf16,
    /// Anything else, by its name in the file; refused where it is used.
    Other(String),
}

impl Element {
    fn from_name(name: String) -> Self {
        match name.as_str() {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            _ => Self::Other(name),
        }
    }

    /// The name in the file.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Other(name) => name,
        }
    }

    fn bytes(&self) -> Option<u64> {
        match self {
            Self::F32 => Some(4),
            Self::F16 | Self::Bf16 => Some(2),
            Self::Other(_) => None,
        }
    }
}

/// Where a tensor lies. `start..start + bytes` is inside the file: the header check saw to it.
#[derive(Clone, Debug)]
pub(crate) struct TensorInfo {
    pub(crate) element: Element,
    pub(crate) shape: Vec<usize>,
    /// From the start of the file.
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

/// A tensor's elements in host memory, as stored.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum TensorData {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl TensorData {
    /// Reads little-endian elements; `None` for an element type that is not served.
    pub(crate) fn decode(element: &Element, bytes: &[u8]) -> Option<Self> {
        let (pairs, quads) = (bytes.as_chunks::<2>().0, bytes.as_chunks::<4>().0);
        match element {
            Element::F32 => Some(Self::F32(quads.iter().map(|&b| f32::from_le_bytes(b)).collect())),
            Element::F16 => Some(Self::F16(pairs.iter().map(|&b| f16::from_le_bytes(b)).collect())),
            Element::Bf16 => Some(Self::Bf16(pairs.iter().map(|&b| bf16::from_le_bytes(b)).collect())),
            Element::Other(_) => None,
        }
    }

    /// Elements `range` in f32.
    ///
    /// # Panics
    /// If there are fewer.
    pub(crate) fn slice_f32(&self, range: Range<usize>) -> Vec<f32> {
        match self {
            Self::F32(values) => values[range].to_vec(),
            Self::F16(values) => values[range].iter().map(|value| value.to_f32()).collect(),
            Self::Bf16(values) => values[range].iter().map(|value| value.to_f32()).collect(),
        }
    }

    /// The first element that `is` holds for, and where it is.
    pub(crate) fn position(&self, is: impl Fn(f32) -> bool) -> Option<(usize, f32)> {
        let find = |values: &mut dyn Iterator<Item = f32>| values.enumerate().find(|(_, value)| is(*value));
        match self {
            Self::F32(values) => find(&mut values.iter().copied()),
            Self::F16(values) => find(&mut values.iter().map(|value| value.to_f32())),
            Self::Bf16(values) => find(&mut values.iter().map(|value| value.to_f32())),
        }
    }

    pub(crate) fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(values) => values,
            Self::F16(values) => values.into_iter().map(f16::to_f32).collect(),
            Self::Bf16(values) => values.into_iter().map(bf16::to_f32).collect(),
        }
    }
}

/// The header's size in bytes from the first eight, checked against the limit and the file.
pub(crate) fn header_bytes(prefix: [u8; 8], file_bytes: u64, limits: &HeaderLimits) -> Result<u64, HeaderFault> {
    let bytes = u64::from_le_bytes(prefix);
    if bytes > limits.header_bytes_max {
        return Err(HeaderFault::TooLarge {
            what: "the header's size in bytes",
            found: bytes,
            limit: limits.header_bytes_max,
        });
    }
    if bytes > file_bytes.saturating_sub(8) {
        return Err(HeaderFault::Invalid(format!("the header claims {bytes} bytes in a file of {file_bytes}")));
    }
    Ok(bytes)
}

/// Parses the JSON of a header (without the size before it) of a file of `file_bytes` in all.
pub(crate) fn parse_header(
    json: &[u8],
    file_bytes: u64,
    limits: &HeaderLimits,
) -> Result<BTreeMap<String, TensorInfo>, HeaderFault> {
    let invalid = |reason: String| Err(HeaderFault::Invalid(reason));
    if json.first() != Some(&b'{') {
        return invalid("the header does not start with `{`".to_owned());
    }
    let raw: RawHeader = match serde_json::from_slice(json) {
        Ok(raw) => raw,
        Err(error) => return invalid(format!("the header is not valid: {error}")),
    };
    if raw.0.len() > limits.tensors_max {
        let (found, limit) = (raw.0.len() as u64, limits.tensors_max as u64);
        return Err(HeaderFault::TooLarge { what: "the number of tensors", found, limit });
    }
    let data_start = 8 + json.len() as u64;
    let data_bytes = file_bytes.saturating_sub(data_start);
    let mut spans = Vec::with_capacity(raw.0.len());
    let mut tensors = BTreeMap::new();
    for (name, tensor) in raw.0 {
        let info = match place(&tensor, data_start, data_bytes, limits) {
            Ok(info) => info,
            Err(reason) => return invalid(format!("tensor `{name}`: {reason}")),
        };
        spans.push((tensor.data_offsets.0, tensor.data_offsets.1, name.clone()));
        tensors.insert(name, info);
    }
    check_cover(spans, data_bytes).map_err(HeaderFault::Invalid)?;
    Ok(tensors)
}

fn place(tensor: &RawTensor, data_start: u64, data_bytes: u64, limits: &HeaderLimits) -> Result<TensorInfo, String> {
    let (begin, end) = tensor.data_offsets;
    if begin > end || end > data_bytes {
        return Err(format!("data_offsets [{begin}, {end}] are outside the {data_bytes} bytes of data"));
    }
    if tensor.shape.len() > limits.dims_max {
        return Err(format!("{} dimensions, accepted are at most {}", tensor.shape.len(), limits.dims_max));
    }
    let element = Element::from_name(tensor.dtype.clone());
    let count = tensor.shape.iter().try_fold(1u64, |count, &extent| count.checked_mul(extent));
    if let Some(size) = element.bytes() {
        let want = count.and_then(|count| count.checked_mul(size));
        if want != Some(end - begin) {
            let want = want.map_or_else(|| "more than 2^64".to_owned(), |bytes| bytes.to_string());
            return Err(format!(
                "shape {:?} of {} is {want} bytes, the file has {}",
                tensor.shape,
                tensor.dtype,
                end - begin
            ));
        }
    }
    let shape = tensor.shape.iter().map(|&extent| usize::try_from(extent).ok()).collect::<Option<Vec<_>>>();
    let shape = shape.ok_or_else(|| format!("shape {:?} does not fit this machine", tensor.shape))?;
    Ok(TensorInfo { element, shape, start: data_start + begin, bytes: end - begin })
}

fn check_cover(mut spans: Vec<(u64, u64, String)>, data_bytes: u64) -> Result<(), String> {
    spans.sort();
    let mut covered = 0;
    for (begin, end, name) in spans {
        match begin.cmp(&covered) {
            std::cmp::Ordering::Less => return Err(format!("tensor `{name}` overlaps another at byte {begin}")),
            std::cmp::Ordering::Greater => return Err(format!("bytes {covered}..{begin} belong to no tensor")),
            std::cmp::Ordering::Equal => covered = end,
        }
    }
    match covered == data_bytes {
        true => Ok(()),
        false => Err(format!("{} bytes after the last tensor belong to no tensor", data_bytes - covered)),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's object with duplicate names refused.
struct RawHeader(BTreeMap<String, RawTensor>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawHeaderVisitor)
    }
}

struct RawHeaderVisitor;

impl<'de> Visitor<'de> for RawHeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let (mut tensors, mut metadata_seen) = (BTreeMap::new(), false);
        while let Some(name) = map.next_key::<String>()? {
            let duplicate = if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                std::mem::replace(&mut metadata_seen, true)
            } else {
                let tensor =
                    map.next_value::<RawTensor>().map_err(|error| A::Error::custom(format!("`{name}`: {error}")))?;
                tensors.insert(name.clone(), tensor).is_some()
            };
            if duplicate {
                return Err(A::Error::custom(format!("`{name}` appears twice")));
            }
        }
        Ok(RawHeader(tensors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HeaderLimits = HeaderLimits { header_bytes_max: 1 << 20, tensors_max: 64, dims_max: 4 };

    fn next(state: &mut u64) -> usize {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) as usize
    }

    /// The reference crate as an oracle: it may accept more (unknown fields, a duplicate name), never less.
    fn check(json: &[u8], data_bytes: usize) -> bool {
        let file_bytes = 8 + json.len() + data_bytes;
        let Ok(tensors) = parse_header(json, file_bytes as u64, &LIMITS) else { return false };
        let file = [&(json.len() as u64).to_le_bytes()[..], json, &vec![0; data_bytes]].concat();
        let text = String::from_utf8_lossy(json);
        if tensors.values().all(|info| info.element.bytes().is_some()) {
            let theirs =
                ::safetensors::SafeTensors::deserialize(&file).unwrap_or_else(|error| panic!("{error}: {text}"));
            for (name, info) in &tensors {
                let view = theirs.tensor(name).unwrap_or_else(|error| panic!("{error}: {text}"));
                assert_eq!(view.shape(), info.shape, "{text}");
                assert_eq!(view.data().len() as u64, info.bytes, "{text}");
            }
        }
        let inside =
            |info: &TensorInfo| info.start >= 8 + json.len() as u64 && info.start + info.bytes <= file_bytes as u64;
        assert!(tensors.values().all(inside), "{text}");
        true
    }

    #[test]
    fn whatever_is_accepted_lies_inside_the_file_and_is_accepted_by_the_reference() {
        const SEED: u64 = 0x5AFE_7E50;
        let good: &[u8] = br#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}"#;
        assert!(check(good, 32));
        let pool: &[u8] = b"0123456789{}[]\",:.-eEF ab\\\0\xff";
        let (mut state, mut accepted) = (SEED, 0);
        for _ in 0..50_000 {
            let mut json = good.to_vec();
            for _ in 0..1 + next(&mut state) % 3 {
                let at = next(&mut state) % json.len();
                match next(&mut state) % 3 {
                    0 => json[at] = pool[next(&mut state) % pool.len()],
                    1 => drop(json.remove(at)),
                    _ => json.insert(at, pool[next(&mut state) % pool.len()]),
                }
            }
            let data_bytes = if next(&mut state).is_multiple_of(4) { next(&mut state) % 64 } else { 32 };
            accepted += usize::from(check(&json, data_bytes));
        }
        assert!(accepted > 100, "only {accepted} mutants were accepted, seed {SEED:#x}: the test shows little");
    }
}
