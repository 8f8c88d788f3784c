//! What is known of an identity, and where things lie: `<data-dir>/store/`
//!
//! - `<2 hex>/<hex files id>/` the two files of one content
//! - `index/<hex SHA-256 of the identity>.json` one [`Record`]; its modification time is its last use
//! - `tmp/<n>/` a download, with `partial.json` beside its files; whatever else lies in `tmp/` is removed at the start
//! - `lock` held by the process that has the store

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

use crate::adapters::types::{FileDigest, FileName, RemoteFile};

/// SHA-256 over (file name, NUL, SHA-256 of the file) of both files, in the order of their names.
pub(crate) type FilesId = [u8; 32];

/// One file as it was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileRecord {
    pub(crate) name: FileName,
    pub(crate) bytes: u64,
    #[serde(with = "hex")]
    pub(crate) sha256: [u8; 32],
}

/// What an identity was when it was downloaded. Outlives its bytes, so that the next download must give the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) identity: String,
    pub(super) files: [FileRecord; 2],
    /// Whose account its bytes are on.
    pub(super) tenant: u64,
    /// What the shard made of it: `ContentId`.
    #[serde(default, with = "optional_hex")]
    pub(super) content: Option<[u8; 32]>,
}

impl Record {
    pub(super) fn files_id(&self) -> FilesId {
        files_id(&self.files)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// `None` if the text is no record, or not that of the file it lies in.
    pub(super) fn parse(text: &[u8], stem: &str) -> Option<Self> {
        let record: Self = serde_json::from_slice(text).ok()?;
        let names = record.files.map(|file| file.name) == FileName::ALL;
        (names && identity_key(&record.identity) == stem).then_some(record)
    }
}

/// See [`FilesId`].
pub(crate) fn files_id(files: &[FileRecord; 2]) -> FilesId {
    let mut hash = Sha256::new();
    for file in files {
        hash.update(file.name.as_str());
        hash.update([0]);
        hash.update(file.sha256);
    }
    hash.finalize().into()
}

/// One file of a partial download: its bytes go on only where this still holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PartialFile {
    name: FileName,
    bytes: u64,
    digest: Option<FileDigest>,
    etag: Option<String>,
}

impl PartialFile {
    pub(super) fn new(file: &RemoteFile) -> Self {
        Self { name: file.name, bytes: file.bytes, digest: file.digest, etag: file.etag.clone() }
    }

    /// True if a part of the one is a part of the other.
    pub(super) fn is_same_as(&self, file: &RemoteFile) -> bool {
        let same = (self.name, self.bytes) == (file.name, file.bytes);
        same && self.digest == file.digest && self.etag == file.etag && (self.digest.is_some() || self.etag.is_some())
    }
}

/// `partial.json`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PartialRecord {
    pub(super) identity: String,
    pub(super) tenant: u64,
    pub(super) files: Vec<PartialFile>,
}

impl PartialRecord {
    pub(super) const FILE: &str = "partial.json";

    /// Bytes of each file that may be kept after a restart. Only a digest of the source can tell whether the disk kept them
    /// through a power cut, so files without one start again.
    pub(super) fn kept_bytes(&self, dir: &Path) -> [u64; 2] {
        FileName::ALL.map(|name| {
            let planned = self.files.iter().find(|file| file.name == name && file.digest.is_some());
            let found = planned.and_then(|_| super::disk::file_bytes(&dir.join(name.as_str())));
            found.filter(|bytes| planned.is_some_and(|file| *bytes <= file.bytes)).unwrap_or(0)
        })
    }
}

/// The folders of one store.
pub(super) struct Layout {
    pub(super) root: PathBuf,
}

impl Layout {
    pub(super) fn index(&self) -> PathBuf {
        self.root.join("index")
    }

    pub(super) fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    pub(super) fn record(&self, identity: &str) -> PathBuf {
        self.index().join(identity_key(identity) + ".json")
    }

    /// The folder that [`Self::content`] lies in.
    pub(super) fn fan(&self, id: &FilesId) -> PathBuf {
        let [first, ..] = id;
        self.root.join(format!("{first:02x}"))
    }

    pub(super) fn content(&self, id: &FilesId) -> PathBuf {
        self.fan(id).join(hex::encode(id))
    }
}

/// The only form in which an identity becomes part of a path.
pub(super) fn identity_key(identity: &str) -> String {
    hex::encode(&Sha256::digest(identity).into())
}

/// 32 bytes as 64 lower-case hex digits.
pub(super) mod hex {
    use super::*;

    pub(in super::super) fn encode(bytes: &[u8; 32]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(in super::super) fn decode(text: &str) -> Option<[u8; 32]> {
        let is_plain = text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate().take(if is_plain { 32 } else { 0 }) {
            *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
        }
        is_plain.then_some(bytes)
    }

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 32], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(from)?;
        decode(&text).ok_or_else(|| serde::de::Error::custom("not 64 hex digits"))
    }
}

mod optional_hex {
    use super::*;

    pub(super) fn serialize<S: Serializer>(bytes: &Option<[u8; 32]>, to: S) -> Result<S::Ok, S::Error> {
        bytes.as_ref().map(hex::encode).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<[u8; 32]>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        let bytes = |text: String| hex::decode(&text).ok_or_else(|| serde::de::Error::custom("not 64 hex digits"));
        text.map(bytes).transpose()
    }
}
