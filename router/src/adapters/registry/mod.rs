//! Names -> references -> contents that the engine has.
//!
//! 1. A name is looked up: alias, registered name of the caller's namespace, shared one, sub-directory of an adapter
//!    directory ([`resolve`]).
//! 2. What nobody registered is a reference, if the operator and the key permit it: the source is asked in the caller's
//!    name, each time or at most 60 s ago ([`dynamic`]).
//! 3. Either way it ends at an identity: exact bytes at a source. Its content is loaded once, however many want it
//!    ([`contents`]).
//! 4. A request holds the content it runs under, never a name ([`holds`]): a name that gets new content, or goes, does not
//!    touch what runs.
//!
//! No lock is held while anything is waited for. `names` comes before `contents`, and that before `holds`.

mod admin;
mod alias;
mod bring;
mod contents;
mod directory;
mod dynamic;
mod holds;
mod load;
mod merge;
mod merged_dir;
mod names;
mod ranked;
mod resolve;
mod restore;
mod revive;
mod settings;
mod stage;
mod table;
mod types;
mod view;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use ranked::{RankBy, RankedFilter};
pub use settings::{AdapterSettings, Files, FilesHere, RegistryError, Supply};
pub use types::{
    AdapterCard, AdapterState, AdapterView, AliasAsk, AliasView, Ask, ErrorView, ListFilter, LoadAsk, MergeSpec,
    NextView, ResolvedAdapter, StickyBy, UnloadAsk, Wait, Weighted,
};

use super::authorise::Authoriser;
use super::durable::Durable;
use super::life::{Clock, SystemClock};
use super::{AdapterRef, Credential, Resolved, Source, SourceError, SourceKind};
use crate::access::Caller;
use crate::engine::{AdapterFailure, ContentId};
use crate::http::Backend;
use contents::{Contents, Until};
use merged_dir::MergedDirs;
use names::{Key, Names};

/// All adapters of this process. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    settings: AdapterSettings,
    /// Places of `source_prefixes`, as printed, with a `/` at the end.
    prefixes: Vec<String>,
    engine: Arc<dyn Backend>,
    supply: Option<Supply>,
    clock: Arc<dyn Clock>,
    authoriser: Authoriser,
    contents: Contents,
    names: Mutex<Names>,
    durable: Option<Durable>,
    /// One writer at a time, so that the file ends with what the table ended with.
    writing: tokio::sync::Mutex<()>,
    /// Registered adapters whose sources are asked at the same time, by kind: a slow one holds up its own.
    lookups: [tokio::sync::Semaphore; SourceKind::Merge as usize + 1],
    was_ready: AtomicBool,
    revivals: revive::Revivals,
    /// Merges are written here.
    merged: PathBuf,
}

/// See [`Inner::lookups`].
const LOOKUPS_MAX: usize = 32;

impl Registry {
    /// Over the directories of `settings` alone, remembering nothing. No adapter is read yet; see [`Self::preload`].
    pub fn new(settings: AdapterSettings, engine: Arc<dyn Backend>) -> Self {
        let settings = AdapterSettings { data_dir: None, ..settings };
        let clock = Arc::new(SystemClock::scaled(settings.time_scale));
        Self::build(settings, engine, None, clock, None)
    }

    /// With everything it can do: sources, a disk store, registrations of the last run.
    ///
    /// # Errors
    /// The file of registrations cannot be opened or read.
    pub fn open(
        settings: AdapterSettings,
        engine: Arc<dyn Backend>,
        supply: Option<Supply>,
    ) -> Result<Self, RegistryError> {
        let clock = Arc::new(SystemClock::scaled(settings.time_scale));
        Self::open_with(settings, engine, supply, clock)
    }

    /// [`Self::open`] on another clock.
    ///
    /// # Errors
    /// The file of registrations cannot be opened or read.
    pub(super) fn open_with(
        settings: AdapterSettings,
        engine: Arc<dyn Backend>,
        supply: Option<Supply>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, RegistryError> {
        let opened = settings.data_dir.as_deref().map(|dir| {
            Durable::open(dir).map_err(|reason| RegistryError::Durable {
                path: dir.join("registry.redb").display().to_string(),
                reason,
            })
        });
        let (durable, restored) = opened.transpose()?.unzip();
        let registry = Self::build(settings, engine, supply, clock, durable);
        registry.restore(restored.unwrap_or_default());
        Ok(registry)
    }

    fn build(
        settings: AdapterSettings,
        engine: Arc<dyn Backend>,
        supply: Option<Supply>,
        clock: Arc<dyn Clock>,
        durable: Option<Durable>,
    ) -> Self {
        let source: Arc<dyn Source> = match &supply {
            Some(supply) => Arc::clone(&supply.source),
            None => Arc::new(NoSource),
        };
        let files = supply.as_ref().map(|supply| Arc::clone(&supply.files));
        let merges = MergedDirs::new(files.as_ref().and_then(|files| files.disk_bytes_max()));
        let contents = Contents::new(Arc::clone(&engine), files, merges, Arc::clone(&clock), &settings);
        let prefixes =
            settings.source_prefixes.iter().map(|prefix| format!("{}/", prefix.trim_end_matches('/'))).collect();
        let merged = match &settings.data_dir {
            Some(dir) => dir.join("merged"),
            None => std::env::temp_dir().join(format!("loramux-merged-{}", uuid::Uuid::new_v4())),
        };
        let _ = std::fs::remove_dir_all(&merged); // of the last run; a merge can be made again
        let inner = Inner {
            prefixes,
            engine,
            supply,
            authoriser: Authoriser::new(source, Arc::clone(&clock)),
            clock,
            contents,
            names: Mutex::default(),
            durable,
            writing: tokio::sync::Mutex::default(),
            lookups: std::array::from_fn(|_| tokio::sync::Semaphore::new(LOOKUPS_MAX)),
            was_ready: AtomicBool::new(false),
            revivals: revive::Revivals::default(),
            merged,
            settings,
        };
        let registry = Self { inner: Arc::new(inner) };
        registry.register_flags();
        registry.listen();
        registry
    }

    /// Every adapter the server needs before it takes requests was usable once. Stays true from then on.
    pub fn is_ready(&self) -> bool {
        if self.inner.was_ready.load(Ordering::Relaxed) {
            return true;
        }
        let is_ready = self.names().awaited.is_empty();
        self.inner.was_ready.fetch_or(is_ready, Ordering::Relaxed);
        is_ready
    }

    /// Adapters that [`Self::is_ready`] waits for and what is wrong with them, at most 16.
    pub fn waiting_for(&self) -> Vec<(String, Option<String>)> {
        let names = self.names();
        let why = |key: &Key| {
            let error = names.get(&key.0, &key.1).and_then(|entry| entry.error.as_ref());
            (key.1.to_string(), error.map(|error| error.failure.for_operators().to_owned()))
        };
        names.awaited.iter().take(16).map(why).collect()
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.inner.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A source's answer about `reference`, which the operator calls `name`.
    async fn explained(
        &self,
        resolved: Result<Arc<Resolved>, SourceError>,
        reference: &AdapterRef,
        credential: &Credential,
        name: &str,
    ) -> Result<Arc<Resolved>, AdapterFailure> {
        let error = match resolved {
            Ok(resolved) => return Ok(resolved),
            Err(error) => error.at(&reference.to_string()),
        };
        let failed = source_failure(&error, name);
        Err(match (&error, &self.inner.supply) {
            (SourceError::Absent, Some(supply)) => {
                let why = supply.source.why_absent(reference, credential).await;
                AdapterFailure { detail: Some(why), ..failed }
            }
            _ => failed,
        })
    }

    fn until(&self, wait: Wait) -> Until {
        let now = self.inner.clock.now();
        Until::At(match wait {
            Wait::Until(limit) => now.saturating_add(limit),
            Wait::Fail => now,
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.merged);
    }
}

/// Of a server without sources.
struct NoSource;

impl Source for NoSource {
    fn resolve<'a>(
        &'a self,
        _: &'a AdapterRef,
        _: &'a Credential,
    ) -> futures_util::future::BoxFuture<'a, Result<Resolved, SourceError>> {
        Box::pin(async { Err(SourceError::Absent) })
    }

    fn open<'a>(
        &'a self,
        _: &'a Resolved,
        _: &'a super::RemoteFile,
        _: u64,
        _: &'a Credential,
    ) -> futures_util::future::BoxFuture<'a, Result<super::ByteStream, SourceError>> {
        Box::pin(async { Err(SourceError::Absent) })
    }
}

fn failure(code: &str, message: String) -> AdapterFailure {
    AdapterFailure::new(code, message)
}

/// Unknown and not yours are one answer.
fn not_found(name: &str) -> AdapterFailure {
    failure("model_not_found", format!("no adapter is called `{name}`"))
}

/// What a source said of what the operator named `name`.
fn source_failure(error: &SourceError, name: &str) -> AdapterFailure {
    let failed = match error {
        SourceError::Absent => not_found(name),
        SourceError::Permanent { code, message, .. } => failure(code, message.clone()),
        SourceError::Retryable { message, retry_after, .. } => AdapterFailure {
            retry_after: *retry_after,
            ..failure("adapter_load_failed", format!("service unavailable: {message}"))
        },
    };
    AdapterFailure { detail: error.detail().map(str::to_owned), ..failed }
}

#[cfg(test)]
mod tests;
