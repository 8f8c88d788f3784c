//! What the operator said about adapters, and the parts the registry works with.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use globset::GlobSet;

use crate::adapters::{
    AdapterRef, Credential, FetchError, Fetcher, Progress, Resolved, Source, SourceDefaults, SourceKind, Store,
    StoreStatus, Stored, Tenant,
};
use crate::engine::ContentId;
use crate::text::TextModel;

/// What the operator set.
#[derive(Clone, Debug)]
pub struct AdapterSettings {
    /// Name and reference, from `--adapter name=ref`. Directories are read when first asked for; the others at the start,
    /// and the server is ready once they are.
    pub registered: Vec<(String, AdapterRef)>,
    /// Directories whose sub-directories are adapters (`--adapter-dir`).
    pub dirs: Vec<PathBuf>,
    /// Places where bare names are looked for, in order: a directory, `s3://bucket/loras/`, `hf://org`. They are the
    /// operator's, so the server's credentials answer.
    pub source_prefixes: Vec<String>,
    /// Names of the base model: no adapter may have one.
    pub base_names: Vec<String>,
    /// Where `org/repo` and bare names are looked for when the request names no source.
    pub default_source: SourceKind,
    /// Where bare names lie when `adapter_source` says `s3`.
    pub source_defaults: SourceDefaults,
    /// `--allow-adapters`: what may be resolved dynamically, by name or printed reference; `None` = everything.
    pub allowed: Option<GlobSet>,
    /// The server's hub token answers for callers without one.
    pub share_hub_token: bool,
    /// Holds `registry.redb` and the files of merges; `None` = registrations are forgotten at the end.
    pub data_dir: Option<PathBuf>,
    /// Adapters that are loaded at the same time.
    pub loads_max: usize,
    /// What the tokens that an adapter adds are compared with; `None`: they are not looked at.
    pub tokenizer: Option<TextModel>,
    /// 1; less in tests: the registry's clock runs that much faster, deadlines of requests included.
    pub time_scale: f64,
}

impl Default for AdapterSettings {
    fn default() -> Self {
        Self {
            registered: Vec::new(),
            dirs: Vec::new(),
            source_prefixes: Vec::new(),
            base_names: Vec::new(),
            default_source: SourceKind::Hub,
            source_defaults: SourceDefaults::default(),
            allowed: None,
            share_hub_token: false,
            data_dir: None,
            loads_max: 8,
            tokenizer: None,
            time_scale: 1.0,
        }
    }
}

/// Where adapters come from. Without it, directories that the operator named are the only ones.
#[derive(Clone)]
pub struct Supply {
    /// Says what a reference stands for, and whether it may be read.
    pub source: Arc<dyn Source>,
    /// Kinds that the operator set up.
    pub kinds: Vec<SourceKind>,
    /// Brings bytes to this machine's disk.
    pub files: Arc<dyn Files>,
}

/// Bytes of adapters on this machine's disk.
pub trait Files: Send + Sync + 'static {
    /// The files of `resolved`, downloaded if they are not here. One download for an identity, however many ask.
    fn fetch<'a>(
        &'a self,
        resolved: &'a Resolved,
        credential: &'a Credential,
        tenant: Tenant,
        progress: &'a Progress,
    ) -> BoxFuture<'a, Result<FilesHere, FetchError>>;
    /// The files of this identity, if they are here.
    fn here(&self, identity: &str) -> Option<FilesHere>;
    /// Deletes them, once nobody holds them. Bytes that this frees.
    fn forget<'a>(&'a self, identity: &'a str) -> BoxFuture<'a, u64>;
    /// The shard read this content from them.
    fn note_content(&self, identity: &str, content: ContentId);
    /// What the shard read from them before, also in an earlier run.
    fn expected_content(&self, identity: &str) -> Option<ContentId>;
    /// False if they are not what was downloaded. Then they are gone: the next fetch downloads them again. Reads them.
    fn verify<'a>(&'a self, identity: &'a str) -> BoxFuture<'a, bool>;
    /// Bytes that it may keep; `None` = no limit.
    fn disk_bytes_max(&self) -> Option<u64> {
        None
    }
    /// How full the disk store is, if there is one.
    fn disk_status(&self) -> Option<StoreStatus> {
        None
    }
    /// The disk keeps them, whatever else it drops.
    fn set_pinned(&self, identity: &str, is_pinned: bool);
}

/// The disk store and the downloads into it.
struct Downloads {
    fetcher: Fetcher,
    store: Arc<Store>,
}

impl Files for Downloads {
    fn fetch<'a>(
        &'a self,
        resolved: &'a Resolved,
        credential: &'a Credential,
        tenant: Tenant,
        progress: &'a Progress,
    ) -> BoxFuture<'a, Result<FilesHere, FetchError>> {
        Box::pin(async move { self.fetcher.fetch(resolved, credential, tenant, progress).await.map(FilesHere::stored) })
    }

    fn here(&self, identity: &str) -> Option<FilesHere> {
        self.store.get(identity).map(FilesHere::stored)
    }

    fn forget<'a>(&'a self, identity: &'a str) -> BoxFuture<'a, u64> {
        Box::pin(self.fetcher.forget(identity))
    }

    fn note_content(&self, identity: &str, content: ContentId) {
        self.store.note_content(identity, content);
    }

    fn expected_content(&self, identity: &str) -> Option<ContentId> {
        self.store.expected_content(identity)
    }

    fn verify<'a>(&'a self, identity: &'a str) -> BoxFuture<'a, bool> {
        Box::pin(self.fetcher.verify(identity))
    }

    fn disk_bytes_max(&self) -> Option<u64> {
        Some(self.store.status().quota_bytes)
    }

    fn disk_status(&self) -> Option<StoreStatus> {
        Some(self.store.status())
    }

    fn set_pinned(&self, identity: &str, is_pinned: bool) {
        self.store.set_pinned(identity, is_pinned);
    }
}

impl Supply {
    /// Sources of these kinds, with downloads into `store`.
    pub fn new(source: Arc<dyn Source>, kinds: Vec<SourceKind>, fetcher: Fetcher, store: Arc<Store>) -> Self {
        Self { source, kinds, files: Arc::new(Downloads { fetcher, store }) }
    }
}

/// A directory with the two files of an adapter.
#[derive(Clone)]
pub struct FilesHere {
    /// Where.
    pub dir: PathBuf,
    /// Keeps the directory while it lives.
    pub guard: Option<Arc<dyn Any + Send + Sync>>,
}

impl FilesHere {
    fn stored(stored: Stored) -> Self {
        Self { dir: stored.dir().to_owned(), guard: Some(Arc::new(stored)) }
    }
}

/// Why the registry could not start.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// `registry.redb` cannot be opened or read.
    #[error("{path}: {reason}; another server may use this data directory (--data-dir)")]
    Durable {
        /// The file.
        path: String,
        /// What the database says.
        reason: String,
    },
}
