//! Names -> local directories -> content ids.
//!
//! 1. A name is looked up: registered on the command line, or a sub-directory of an adapter directory.
//! 2. Its two files are looked at. The same (inode, mtime, size) as when it was prepared: that content is used.
//! 3. Otherwise one attempt prepares it, however many requests wait; it goes on when they leave.
//! 4. A failure is shared for [`FAILURE_KEPT`], unless the files change.
//!
//! Requests hold a content id, never a name: a name that gets new content does not touch what runs.

mod settings;
mod types;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{Semaphore, watch};

pub use settings::{AdapterSettings, Files, FilesHere, RegistryError, Supply};
pub use types::{
    AdapterCard, AdapterState, AdapterView, AliasAsk, AliasView, Ask, ErrorView, ListFilter, LoadAsk, MergeSpec,
    NextView, ResolvedAdapter, StickyBy, UnloadAsk, Wait, Weighted,
};

use super::name::is_valid_segment;
use super::{AdapterRef, Credential, SourceKind};
use crate::access::Caller;
use crate::engine::{AdapterCheck, AdapterFailure, ContentId, PinLevel, PreparedAdapter};
use crate::http::Backend;

/// How long a failed attempt answers for the next requests.
const FAILURE_KEPT: Duration = Duration::from_secs(5);
/// Adapters that are prepared at the same time.
const LOADS_MAX: usize = 8;
/// Names with a state. Beyond it, names of adapter directories are refused until one goes away.
const ENTRIES_MAX: usize = 65_536;

/// Inode, mtime (ns) and size of the two files of an adapter.
type Fingerprint = [Option<(u64, i128, u64)>; 2];
type Outcome = Result<Arc<PreparedAdapter>, AdapterFailure>;

struct Entry {
    dir: PathBuf,
    ready: Option<Ready>,
    attempt: Attempt,
}

struct Ready {
    files: Fingerprint,
    prepared: Arc<PreparedAdapter>,
    created: u64,
}

enum Attempt {
    None,
    Running { files: Fingerprint, outcome: watch::Receiver<Option<Outcome>> },
    Failed { files: Fingerprint, failure: AdapterFailure, until: Instant },
}

/// All adapters of this process. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    settings: AdapterSettings,
    engine: Arc<dyn Backend>,
    entries: Mutex<Entries>,
    loads: Semaphore,
}

#[derive(Default)]
struct Entries {
    by_name: HashMap<String, Entry>,
    /// Counts up whenever a card appears, changes or goes.
    version: u64,
    failures: HashMap<String, u64>,
}

impl Registry {
    /// No adapter is read yet; see [`Self::preload`].
    pub fn new(settings: AdapterSettings, engine: Arc<dyn Backend>) -> Self {
        let entries = Mutex::default();
        Self { inner: Arc::new(Inner { settings, engine, entries, loads: Semaphore::new(LOADS_MAX) }) }
    }

    /// Starts to prepare every adapter of the command line, so that it is listed once it can serve.
    pub fn preload(&self) {
        for (name, _) in &self.inner.settings.registered {
            let (registry, name) = (self.clone(), name.clone());
            tokio::spawn(async move {
                if let Err(failure) = registry
                    .resolve(&Caller::default(), &Ask::plain(&name, Wait::Until(Duration::from_secs(3600))))
                    .await
                {
                    tracing::warn!(adapter = name, code = failure.code, "adapter is not usable: {failure}");
                }
            });
        }
    }

    /// True if `name` may be resolved: registered, or a valid name when there are adapter directories.
    pub fn is_candidate(&self, _caller: &Caller, name: &str, source: Option<SourceKind>) -> bool {
        let settings = &self.inner.settings;
        source.is_none_or(|source| source == SourceKind::Local)
            && settings.registered.iter().any(|(known, _)| known == name)
            || (!settings.dirs.is_empty() && is_valid_segment(name))
    }

    /// The content `name` stands for now, prepared.
    ///
    /// # Errors
    /// `model_not_found`, `adapter_loading` (deadline, or [`Wait::Fail`]), or what the shard found.
    pub async fn resolve(&self, _caller: &Caller, ask: &Ask<'_>) -> Result<ResolvedAdapter, AdapterFailure> {
        let (name, wait) = (ask.name, ask.wait);
        let Some((dir, files)) = self.locate(name).await else {
            self.forget(name);
            return Err(failure("model_not_found", format!("no adapter is called `{name}`")));
        };
        let mut outcome = match self.ready_or_attempt(name, dir, files)? {
            Found::Ready(prepared) => return Ok(resolved(name, prepared)),
            Found::Attempt(outcome) => outcome,
        };
        let loading =
            |text: &str| failure("adapter_loading", format!("it is still loading {text}; the load goes on, try again"));
        let Wait::Until(limit) = wait else { return Err(loading("and `adapter_wait` is `fail`")) };
        let done = tokio::time::timeout(limit, outcome.wait_for(Option::is_some)).await;
        let done = done.map_err(|_| loading(&format!("after {} ms", limit.as_millis())))?;
        let gone = || failure("adapter_load_failed", "service unavailable: the load was given up".into());
        let result = done.map_err(|_| gone())?.clone().ok_or_else(gone)?;
        result.map(|prepared| resolved(name, prepared))
    }

    /// Adapters this caller may use and that can serve, by name, and a version that changes when any such list does.
    pub fn cards(&self, _caller: &Caller) -> (u64, Vec<AdapterCard>) {
        let entries = self.entries();
        let card = |(name, entry): (&String, &Entry)| {
            let ready = entry.ready.as_ref()?;
            let prepared = Arc::clone(&ready.prepared);
            Some(AdapterCard {
                name: name.clone(),
                root: entry.dir.display().to_string(),
                created: ready.created,
                prepared,
            })
        };
        let mut cards: Vec<_> = entries.by_name.iter().filter_map(card).collect();
        cards.sort_by(|a, b| a.name.cmp(&b.name));
        (entries.version, cards)
    }

    /// The card of one name, if this caller may use it and it can serve.
    pub fn card(&self, caller: &Caller, name: &str) -> Option<AdapterCard> {
        self.cards(caller).1.into_iter().find(|card| card.name == name)
    }

    /// Opens the registry with everything it can do: sources, a disk store, registrations of the last run.
    ///
    /// # Errors
    /// The durable part cannot be opened.
    pub fn open(
        settings: AdapterSettings,
        engine: Arc<dyn Backend>,
        _supply: Option<Supply>,
    ) -> Result<Self, RegistryError> {
        Ok(Self::new(settings, engine))
    }

    /// Registers and loads. Waits for the outcome as long as `ask` says; the load goes on beyond that.
    ///
    /// # Errors
    /// `adapter_exists`, `precondition_failed`, `name_is_base_model`, `invalid_value` (name), `adapter_loading`, or why the
    /// load failed.
    pub async fn load(&self, _ask: LoadAsk) -> Result<AdapterView, AdapterFailure> {
        Err(not_yet())
    }

    /// Takes a name away. After it no request resolves to what the name stood for.
    ///
    /// # Errors
    /// `model_not_found`.
    pub async fn unload(&self, _ask: UnloadAsk) -> Result<AdapterView, AdapterFailure> {
        Err(not_yet())
    }

    /// One registered adapter.
    pub fn get(&self, _namespace: &str, _name: &str) -> Option<AdapterView> {
        None
    }

    /// One page of registered adapters by (namespace, name), and what `after` has to be for the next one.
    pub fn list(&self, _filter: &ListFilter) -> (Vec<AdapterView>, Option<String>) {
        (Vec::new(), None)
    }

    /// Keeps an adapter in host memory or on the device, or (`None`) no longer.
    ///
    /// # Errors
    /// `model_not_found`, `precondition_failed` (too much would be pinned).
    pub async fn pin(
        &self,
        _namespace: &str,
        _name: &str,
        _level: Option<PinLevel>,
    ) -> Result<AdapterView, AdapterFailure> {
        Err(not_yet())
    }

    /// One alias.
    pub fn alias(&self, _namespace: &str, _name: &str) -> Option<AliasView> {
        None
    }

    /// All aliases, by (namespace, name).
    pub fn aliases(&self) -> Vec<AliasView> {
        Vec::new()
    }

    /// Makes or changes an alias in one step.
    ///
    /// # Errors
    /// `invalid_value`, `precondition_failed`, `adapter_exists` (an adapter has the name), `name_is_base_model`.
    pub async fn set_alias(&self, _ask: AliasAsk) -> Result<AliasView, AdapterFailure> {
        Err(not_yet())
    }

    /// Takes an alias away.
    ///
    /// # Errors
    /// `model_not_found`, `precondition_failed`.
    pub async fn delete_alias(
        &self,
        _namespace: &str,
        _name: &str,
        _expected_version: Option<u64>,
    ) -> Result<AliasView, AdapterFailure> {
        Err(not_yet())
    }

    /// The versions before the last change come back, under a new version number.
    ///
    /// # Errors
    /// `model_not_found`, `precondition_failed` (there is no version before).
    pub async fn rollback_alias(&self, _namespace: &str, _name: &str) -> Result<AliasView, AdapterFailure> {
        Err(not_yet())
    }

    /// A dry run: fetches, checks, keeps and registers nothing.
    ///
    /// # Errors
    /// What the source says. A bad adapter is no error, but a report with refusals.
    pub async fn validate(
        &self,
        _reference: &AdapterRef,
        _credential: Credential,
    ) -> Result<AdapterCheck, AdapterFailure> {
        Err(not_yet())
    }

    /// Several adapters as one. Each is resolved for this caller first; the merge is kept by their contents.
    ///
    /// # Errors
    /// As [`Self::resolve`]; `adapter_unsupported` for what cannot be merged.
    pub async fn merge(
        &self,
        _caller: &Caller,
        _spec: &MergeSpec,
        _ask: &Ask<'_>,
    ) -> Result<ResolvedAdapter, AdapterFailure> {
        Err(not_yet())
    }

    /// Every adapter the server needs before it takes requests was usable once.
    pub fn is_ready(&self) -> bool {
        self.waiting_for().is_empty()
    }

    /// Adapters that [`Self::is_ready`] waits for, with what is wrong, at most 16.
    pub fn waiting_for(&self) -> Vec<String> {
        Vec::new()
    }

    /// Changes when [`Self::cards`] would.
    pub fn version(&self) -> u64 {
        self.entries().version
    }

    /// Names whose content is in `contents`, in that order, each content once.
    pub fn names_of(&self, contents: &[ContentId]) -> Vec<String> {
        let mut by_content: HashMap<ContentId, Option<&String>> = contents.iter().map(|id| (*id, None)).collect();
        let entries = self.entries();
        for (name, entry) in &entries.by_name {
            let Some(ready) = &entry.ready else { continue };
            if let Some(slot) = by_content.get_mut(&ready.prepared.content) {
                *slot = Some(slot.map_or(name, |known| known.min(name))); // of two names of one content, always the same one
            }
        }
        let shown = |id: &ContentId| by_content.get(id).copied().flatten().map_or_else(|| id.short(), String::clone);
        contents.iter().map(shown).collect()
    }

    /// How many adapters are in each state.
    pub fn states(&self) -> [(AdapterState, usize); 8] {
        let entries = self.entries();
        let state = |entry: &Entry| match (&entry.ready, &entry.attempt) {
            (_, Attempt::Running { .. }) => AdapterState::Preparing,
            (Some(_), _) => AdapterState::Ready,
            (None, Attempt::Failed { .. }) => AdapterState::Failed,
            (None, Attempt::None) => AdapterState::Registered,
        };
        let untouched =
            self.inner.settings.registered.iter().filter(|(name, _)| !entries.by_name.contains_key(name)).count();
        AdapterState::ALL.map(|row| {
            let seen = entries.by_name.values().filter(|entry| state(entry) == row).count();
            (row, if row == AdapterState::Registered { seen + untouched } else { seen })
        })
    }

    /// Failed attempts by code.
    pub fn failures(&self) -> Vec<(String, u64)> {
        let mut failures: Vec<_> = self.entries().failures.iter().map(|(code, n)| (code.clone(), *n)).collect();
        failures.sort();
        failures
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.inner.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where `name` lies and what its files look like; `None` if nothing has this name.
    async fn locate(&self, name: &str) -> Option<(PathBuf, Fingerprint)> {
        let registered = self
            .inner
            .settings
            .registered
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, reference)| PathBuf::from(&reference.locator));
        let dirs =
            if registered.is_none() && is_valid_segment(name) { self.inner.settings.dirs.clone() } else { Vec::new() };
        let name = name.to_owned();
        let look = move || {
            let dir = registered.or_else(|| dirs.iter().find_map(|root| child(root, &name)))?;
            let files = fingerprint(&dir);
            Some((dir, files))
        };
        tokio::task::spawn_blocking(look).await.ok()?
    }

    fn forget(&self, name: &str) {
        let mut entries = self.entries();
        if entries.by_name.remove(name).is_some_and(|entry| entry.ready.is_some()) {
            entries.version += 1;
        }
    }

    fn ready_or_attempt(&self, name: &str, dir: PathBuf, files: Fingerprint) -> Result<Found, AdapterFailure> {
        let mut entries = self.entries();
        if !entries.by_name.contains_key(name) && entries.by_name.len() >= ENTRIES_MAX {
            return Err(failure(
                "adapter_load_failed",
                format!("this server keeps track of {ENTRIES_MAX} adapters at most"),
            ));
        }
        let entry = entries.by_name.entry(name.to_owned()).or_insert_with(|| Entry {
            dir: dir.clone(),
            ready: None,
            attempt: Attempt::None,
        });
        entry.dir.clone_from(&dir);
        if let Some(ready) = entry.ready.as_ref().filter(|ready| ready.files == files) {
            return Ok(Found::Ready(Arc::clone(&ready.prepared)));
        }
        match &entry.attempt {
            // `has_changed` is an error when the attempt died without a word.
            Attempt::Running { files: tried, outcome } if *tried == files && outcome.has_changed().is_ok() => {
                return Ok(Found::Attempt(outcome.clone()));
            }
            Attempt::Failed { files: tried, failure, until } if *tried == files && Instant::now() < *until => {
                return Err(failure.clone());
            }
            _ => {}
        }
        let (report, outcome) = watch::channel(None);
        entry.attempt = Attempt::Running { files, outcome: outcome.clone() };
        let (registry, name) = (self.clone(), name.to_owned());
        tokio::spawn(async move { registry.attempt(name, dir, files, report).await });
        Ok(Found::Attempt(outcome))
    }

    /// Prepares one directory and notes the outcome. Runs to its end whoever waits.
    async fn attempt(&self, name: String, dir: PathBuf, files: Fingerprint, report: watch::Sender<Option<Outcome>>) {
        let _permit = self.inner.loads.acquire().await;
        let started = Instant::now();
        let outcome = self.inner.engine.prepare_adapter(dir).await.map(Arc::new);
        tracing::info!(
            adapter = name,
            ok = outcome.is_ok(),
            ms = started.elapsed().as_millis() as u64,
            "adapter prepared"
        );
        self.note(&name, files, &outcome);
        report.send_replace(Some(outcome));
    }

    fn note(&self, name: &str, files: Fingerprint, outcome: &Outcome) {
        let mut guard = self.entries();
        let entries = &mut *guard;
        if let Err(failure) = outcome {
            *entries.failures.entry(failure.code.clone()).or_default() += 1;
        }
        // The entry may be gone, or a newer attempt may run because the files changed again.
        let Some(entry) = entries.by_name.get_mut(name) else { return };
        if !matches!(&entry.attempt, Attempt::Running { files: tried, .. } if *tried == files) {
            return;
        }
        match outcome {
            Ok(prepared) => {
                let created = entry.ready.as_ref().map_or_else(unix_seconds, |ready| ready.created);
                entry.ready = Some(Ready { files, prepared: Arc::clone(prepared), created });
                entry.attempt = Attempt::None;
                entries.version += 1;
            }
            Err(failure) => {
                // The old content, if any, does not answer for the new files.
                entry.attempt =
                    Attempt::Failed { files, failure: failure.clone(), until: Instant::now() + FAILURE_KEPT };
                if entry.ready.take().is_some() {
                    entries.version += 1;
                }
            }
        }
    }
}

enum Found {
    Ready(Arc<PreparedAdapter>),
    Attempt(watch::Receiver<Option<Outcome>>),
}

fn not_yet() -> AdapterFailure {
    AdapterFailure::new("adapter_load_failed", "not available yet")
}

fn resolved(name: &str, prepared: Arc<PreparedAdapter>) -> ResolvedAdapter {
    ResolvedAdapter {
        name: name.to_owned(),
        prepared,
        source: SourceKind::Local,
        revision: Arc::from(""),
        scale: 1.0,
        hold: types::Hold::of(Vec::new()),
    }
}

fn failure(code: &str, message: String) -> AdapterFailure {
    AdapterFailure::new(code, message)
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The sub-directory `name` of `root`, if it is one and no link leads out of `root`.
fn child(root: &Path, name: &str) -> Option<PathBuf> {
    debug_assert!(is_valid_segment(name), "only valid segments are joined to a path");
    let root = root.canonicalize().ok()?;
    let dir = root.join(name).canonicalize().ok()?;
    let inside = |path: &Path| path.starts_with(&root) && path != root;
    let files_inside = FILES.iter().all(|file| dir.join(file).canonicalize().map_or(true, |path| inside(&path)));
    (dir.is_dir() && inside(&dir) && files_inside).then_some(dir)
}

/// The two files that make an adapter.
const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

fn fingerprint(dir: &Path) -> Fingerprint {
    use std::os::unix::fs::MetadataExt;
    FILES.map(|file| {
        let data = std::fs::metadata(dir.join(file)).ok()?;
        Some((data.ino(), i128::from(data.mtime()) * 1_000_000_000 + i128::from(data.mtime_nsec()), data.size()))
    })
}

#[cfg(test)]
mod tests;
