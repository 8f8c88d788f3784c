//! The words that sources, disk store, loader and registry share. Plain data and two traits.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

/// Where adapters come from. The spelling is the API's (`adapter_source`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// The Hugging Face Hub, or another server that speaks its API.
    Hub,
    /// S3 and compatible object stores.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Plain HTTP(S), hosts listed by the operator.
    Http,
    /// A directory of this machine, below an allowed root or named by the operator.
    Local,
    /// Made here from other adapters (`merged_adapters`).
    Merge,
}

impl SourceKind {
    /// As the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hub => "hub",
            Self::S3 => "s3",
            Self::Gcs => "gcs",
            Self::Http => "http",
            Self::Local => "local",
            Self::Merge => "merge",
        }
    }
}

/// What a person writes to mean an adapter: source, place there, revision. Says nothing about content.
///
/// Parsed and printed in `reference.rs`. `locator` is `org/repo` (hub), `bucket/prefix` (object stores), the whole URL
/// without credentials (http) or an absolute path (local); it never holds a secret.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AdapterRef {
    /// Where to look.
    pub source: SourceKind,
    /// Where it lies there.
    pub locator: String,
    /// Branch, tag or commit; hub only. `None` = `main`.
    pub revision: Option<String>,
}

impl AdapterRef {
    /// A directory of this machine, named by the operator.
    pub fn directory(path: &Path) -> Self {
        Self { source: SourceKind::Local, locator: path.display().to_string(), revision: None }
    }
}

/// The files an adapter may have. Nothing else is ever asked for, and no remote string becomes part of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileName {
    /// `adapter_config.json`
    Config,
    /// `adapter_model.safetensors`
    Weights,
}

impl FileName {
    /// Both, in the order they are hashed.
    pub const ALL: [Self; 2] = [Self::Config, Self::Weights];

    /// The name on disk and at every source.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Config => "adapter_config.json",
            Self::Weights => "adapter_model.safetensors",
        }
    }
}

/// A hash that the source promises for a file's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FileDigest {
    /// SHA-256 of the bytes (hub LFS oid, `x-amz-checksum-sha256`).
    Sha256([u8; 32]),
    /// SHA-1 of `blob <len>\0` + the bytes: what git calls a small file.
    GitSha1([u8; 20]),
    /// CRC-32C of the bytes, big endian (`x-goog-hash`, `x-amz-checksum-crc32c`).
    Crc32c([u8; 4]),
}

/// One file at a source, as it was when the reference was resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Which of the two.
    pub name: FileName,
    /// Its size.
    pub bytes: u64,
    /// Its hash, if the source gives one.
    pub digest: Option<FileDigest>,
    /// Strong entity tag or object version: a resumed download goes on only where it still matches.
    pub etag: Option<String>,
    /// What the source needs to find it again (URL path, object key). Opaque to everyone else.
    pub locator: String,
}

/// What a reference stands for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// What was asked for.
    pub reference: AdapterRef,
    /// Names these exact bytes at their source, such as `hub:<endpoint>/<org>/<repo>@<commit>`. Two equal identities are the
    /// same bytes; downloads and their failures are shared by it. Never holds a secret.
    pub identity: String,
    /// Shown to people and in `x-adapter-revision`: commit, entity tag, or for a directory the time of its newest file.
    pub revision: String,
    /// Where the bytes are.
    pub origin: Origin,
}

/// See [`Resolved::origin`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// To be downloaded: one entry for each [`FileName`].
    Remote(Vec<RemoteFile>),
    /// A directory of this machine, read where it lies.
    Directory(PathBuf),
}

/// In whose name a source is asked.
#[derive(Clone, Debug)]
pub enum Credential {
    /// Nobody's: only what everyone may read.
    Anonymous,
    /// The server's own, for what the operator named.
    Server,
    /// The caller's own token. Goes to the configured endpoint only.
    Token(SecretString),
}

/// Why a source did not give what was asked for. The class decides what happens next; texts never do.
///
/// A `detail` is the message as operators read it, with host and cause: for the admin API, the command line and logs. Callers
/// of the main port never see it, and it holds neither a secret nor an upstream's text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// Not there, or not for this credential: 401, 403, 404, 410 and their kin are one answer.
    #[error("not found, or not readable with this credential")]
    Absent,
    /// Stays wrong until somebody changes something. `code` is the API's.
    #[error("{message}")]
    Permanent {
        /// `adapter_invalid`, `adapter_unsupported`, `adapter_too_large`, `source_forbidden`.
        code: &'static str,
        /// What was found, what is accepted, what to change. Never an upstream's text.
        message: String,
        /// For operators.
        detail: Option<String>,
    },
    /// May go away by itself.
    #[error("{message}")]
    Retryable {
        /// What happened, without upstream text.
        message: String,
        /// The source said when to come back.
        retry_after: Option<Duration>,
        /// For operators.
        detail: Option<String>,
    },
}

impl SourceError {
    /// A failure that stays; `code` is the API's.
    pub fn permanent(code: &'static str, message: impl Into<String>) -> Self {
        Self::Permanent { code, message: message.into(), detail: None }
    }

    /// A failure that may go away by itself.
    pub fn retryable(message: impl Into<String>) -> Self {
        Self::Retryable { message: message.into(), retry_after: None, detail: None }
    }

    /// What operators read, unless something nearer to the cause has said it.
    #[must_use]
    pub fn with_detail(mut self, text: impl FnOnce(&str) -> String) -> Self {
        if let Self::Permanent { message, detail, .. } | Self::Retryable { message, detail, .. } = &mut self
            && detail.is_none()
        {
            *detail = Some(text(message));
        }
        self
    }

    /// It happened at `place`, such as `https://host`.
    #[must_use]
    pub fn at(self, place: &str) -> Self {
        self.with_detail(|message| format!("{place}: {message}"))
    }

    /// What operators read; `None` = the message says all.
    pub fn detail(&self) -> Option<&str> {
        match self {
            Self::Permanent { detail, .. } | Self::Retryable { detail, .. } => detail.as_deref(),
            Self::Absent => None,
        }
    }
}

/// Bytes of one file from some offset on. No content encoding is ever undone.
pub type ByteStream = BoxStream<'static, Result<Bytes, SourceError>>;

/// One kind of place that adapters come from. Implementations wrap every call in a deadline of their own and log no secret.
pub trait Source: Send + Sync + 'static {
    /// What `reference` stands for now, asked with `credential`: this is the authorisation too.
    fn resolve<'a>(
        &'a self,
        reference: &'a AdapterRef,
        credential: &'a Credential,
    ) -> BoxFuture<'a, Result<Resolved, SourceError>>;

    /// The bytes of `file` from `offset` on. Fails if the file is not the resolved one any more, or if the source cannot
    /// start at an offset above 0 ([`SourceError::Permanent`] never; the caller then starts at 0).
    fn open<'a>(
        &'a self,
        resolved: &'a Resolved,
        file: &'a RemoteFile,
        offset: u64,
        credential: &'a Credential,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>>;

    /// What may be behind [`SourceError::Absent`], for the operator who named `reference`.
    fn why_absent<'a>(&'a self, reference: &'a AdapterRef, _credential: &'a Credential) -> BoxFuture<'a, String> {
        Box::pin(async move { format!("{reference}: not found, or not readable with this credential") })
    }
}
