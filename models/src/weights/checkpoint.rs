//! A Hugging Face directory: `config.json` and one or several safetensors files.

use super::safetensors::{self, HeaderFault, HeaderLimits, TensorData, TensorInfo};
use super::{Expected, WeightSource, file_name, model_fault, read_small, read_text};
use crate::error::ModelError;
use crate::files;
use crate::spec::{CONFIG_BYTES_MAX, DecoderSpec};
use loramux_kernels::Dtype;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// A base checkpoint is the operator's own choice, so these are generous; they bound mistakes.
const HEADER_LIMITS: HeaderLimits = HeaderLimits { header_bytes_max: 64 << 20, tensors_max: 1 << 18, dims_max: 8 };
const INDEX_BYTES_MAX: u64 = 64 << 20;
const SHARDS_MAX: usize = 4096;

pub(super) struct Checkpoint {
    spec: DecoderSpec,
    content_id: [u8; 32],
    shards: Vec<Shard>,
    /// Name -> shard and place.
    tensors: BTreeMap<String, (usize, TensorInfo)>,
    /// Where the message points: the file, or the index.
    label: String,
    total_bytes: u64,
    done_bytes: u64,
}

struct Shard {
    name: String,
    path: std::path::PathBuf,
    file: File,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    pub(super) fn open(dir: &Path) -> Result<Self, ModelError> {
        let config = read_text(&dir.join("config.json"), CONFIG_BYTES_MAX)?;
        let spec = DecoderSpec::from_config(&config)?;
        let mut hash = Sha256::new();
        hash.update(b"loramux base checkpoint 1\0");
        hash.update((config.len() as u64).to_le_bytes());
        hash.update(&config);
        let index = match dir.join(SINGLE).exists() {
            true => None,
            false => Some(read_index(dir)?),
        };
        let names: BTreeSet<String> = match &index {
            None => BTreeSet::from([SINGLE.to_owned()]),
            Some(index) => index.weight_map.values().cloned().collect(),
        };
        let (mut shards, mut tensors) = (Vec::new(), BTreeMap::new());
        for name in names {
            let shard = open_shard(dir, name, &mut hash, &mut |shard, name, info| match tensors
                .insert(name.clone(), (shards.len(), info))
            {
                None => Ok(()),
                Some(_) => Err(ModelError::invalid(shard, format!("tensor `{name}` is in another shard too"))),
            })?;
            shards.push(shard);
        }
        if let Some(index) = &index {
            check_index(index, &shards, &tensors)?;
        }
        let label = if index.is_some() { INDEX } else { SINGLE }.to_owned();
        let content_id = hash.finalize().into();
        Ok(Self { spec, content_id, shards, tensors, label, total_bytes: 0, done_bytes: 0 }.with_total())
    }

    fn with_total(mut self) -> Self {
        self.total_bytes =
            self.tensors.iter().filter(|(name, _)| !self.ignorable(name)).map(|(_, (_, t))| t.bytes).sum();
        self
    }

    /// Tensors that old tools save and that carry nothing: frequencies the config already says, a head that is tied.
    fn ignorable(&self, name: &str) -> bool {
        name.ends_with(".rotary_emb.inv_freq") || (self.spec.tied_head && name == "lm_head.weight")
    }
}

impl WeightSource for Checkpoint {
    fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    fn content_id(&self) -> [u8; 32] {
        self.content_id
    }

    fn natural_dtype(&self) -> Dtype {
        let is_f32 =
            |name: &String, info: &TensorInfo| info.element == safetensors::Element::F32 || self.ignorable(name);
        match self.tensors.iter().all(|(name, (_, info))| is_f32(name, info)) {
            true => Dtype::F32,
            false => Dtype::Bf16,
        }
    }

    fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    fn done_bytes(&self) -> u64 {
        self.done_bytes
    }

    fn check(&self, expected: &[Expected]) -> Result<(), ModelError> {
        let (mut missing, mut read) = (Vec::new(), BTreeSet::new());
        for tensor in expected {
            let name = tensor.id.hugging_face();
            let Some((shard, info)) = self.tensors.get(&name) else {
                missing.push(name);
                continue;
            };
            let file = || self.shards.get(*shard).map_or_else(String::new, |shard| shard.name.clone());
            if info.shape != tensor.shape {
                let reason =
                    format!("tensor `{name}` has shape {:?}, config.json wants {:?}", info.shape, tensor.shape);
                return Err(ModelError::invalid(file(), reason));
            }
            if let safetensors::Element::Other(element) = &info.element {
                let what = format!("dtype {element} of tensor `{name}`");
                return Err(ModelError::unsupported(file(), what, "accepted are F32, F16 and BF16"));
            }
            read.insert(name);
        }
        if !missing.is_empty() {
            missing.sort();
            return Err(ModelError::MissingTensors { file: self.label.clone(), names: missing });
        }
        let unread: Vec<String> =
            self.tensors.keys().filter(|name| !read.contains(*name) && !self.ignorable(name)).cloned().collect();
        match unread.is_empty() {
            true => Ok(()),
            false => Err(ModelError::UnreadTensors { file: self.label.clone(), names: unread }),
        }
    }

    fn read(&mut self, expected: &Expected) -> Result<TensorData, ModelError> {
        self.read_part(expected, |info| (0, info.bytes))
    }

    fn read_rows(&mut self, expected: &Expected, rows: Range<usize>) -> Result<Vec<f32>, ModelError> {
        let count = expected.count().max(1);
        let part = |info: &TensorInfo| {
            let row_bytes = info.bytes / count * expected.width() as u64;
            (rows.start as u64 * row_bytes, rows.len() as u64 * row_bytes)
        };
        self.read_part(expected, part).map(TensorData::into_f32)
    }
}

impl Checkpoint {
    /// Reads the bytes `part` says, counted from the tensor's start.
    fn read_part(
        &mut self,
        expected: &Expected,
        part: impl Fn(&TensorInfo) -> (u64, u64),
    ) -> Result<TensorData, ModelError> {
        let name = expected.id.hugging_face();
        let (shard, info) = self.tensors.get(&name).expect("`check` saw every expected tensor");
        let shard = &mut self.shards[*shard];
        let io = |source| ModelError::Io { path: shard.path.clone(), source };
        let (first, bytes) = part(info);
        assert!(first + bytes <= info.bytes, "rows past the end of `{name}`");
        // The header check put the tensor inside the file, so this allocation is bounded by the file's size.
        let mut data = vec![0; bytes as usize];
        shard.file.seek(SeekFrom::Start(info.start + first)).map_err(io)?;
        shard.file.read_exact(&mut data).map_err(io)?;
        self.done_bytes += bytes;
        Ok(TensorData::decode(&info.element, &data).expect("`check` refused other element types"))
    }
}

fn read_index(dir: &Path) -> Result<Index, ModelError> {
    let bytes = read_small(&dir.join(INDEX), INDEX_BYTES_MAX)?;
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|error| ModelError::invalid(INDEX, format!("not an object with a `weight_map`: {error}")))?;
    let files: BTreeSet<&String> = index.weight_map.values().collect();
    if files.len() > SHARDS_MAX {
        let (found, limit) = (files.len() as u64, SHARDS_MAX as u64);
        return Err(ModelError::TooLarge {
            file: INDEX.to_owned(),
            what: "the number of shards".to_owned(),
            found,
            limit,
        });
    }
    for file in files {
        let plain = Path::new(file).file_name().is_some_and(|name| name == file.as_str());
        if !plain || !file.ends_with(".safetensors") {
            let reason = format!("shard `{file}` is not a plain file name that ends in .safetensors");
            return Err(ModelError::invalid(INDEX, reason));
        }
    }
    Ok(index)
}

type Place<'a> = dyn FnMut(&str, String, TensorInfo) -> Result<(), ModelError> + 'a;

/// Opens one file, hashes its name, size and header, and hands every tensor of it to `place`.
fn open_shard(dir: &Path, name: String, hash: &mut Sha256, place: &mut Place) -> Result<Shard, ModelError> {
    let path = dir.join(&name);
    let (mut file, file_bytes) = files::open_regular(&path).map_err(|fault| model_fault(&path, u64::MAX, fault))?;
    let io = |source| ModelError::Io { path: path.clone(), source };
    if file_bytes < 8 {
        return Err(ModelError::invalid(name, format!("{file_bytes} bytes: too short for a safetensors header")));
    }
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(io)?;
    let header_bytes =
        safetensors::header_bytes(prefix, file_bytes, &HEADER_LIMITS).map_err(|fault| header_error(&name, fault))?;
    let mut header = vec![0; header_bytes as usize];
    file.read_exact(&mut header).map_err(io)?;
    let tensors =
        safetensors::parse_header(&header, file_bytes, &HEADER_LIMITS).map_err(|fault| header_error(&name, fault))?;
    for part in [name.as_bytes(), &file_bytes.to_le_bytes(), &header] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    for (tensor, info) in tensors {
        place(&name, tensor, info)?;
    }
    Ok(Shard { name: file_name(&path), path, file })
}

fn check_index(
    index: &Index,
    shards: &[Shard],
    tensors: &BTreeMap<String, (usize, TensorInfo)>,
) -> Result<(), ModelError> {
    for (tensor, want) in &index.weight_map {
        let found = tensors.get(tensor).and_then(|(shard, _)| shards.get(*shard)).map(|shard| &shard.name);
        if found != Some(want) {
            let found = found.map_or("in no shard".to_owned(), |found| format!("in `{found}`"));
            return Err(ModelError::invalid(
                INDEX,
                format!("tensor `{tensor}` is said to be in `{want}` and is {found}"),
            ));
        }
    }
    Ok(())
}

fn header_error(file: &str, fault: HeaderFault) -> ModelError {
    match fault {
        HeaderFault::Invalid(reason) => ModelError::invalid(file, reason),
        HeaderFault::TooLarge { what, found, limit } => {
            ModelError::TooLarge { file: file.to_owned(), what: what.to_owned(), found, limit }
        }
    }
}
