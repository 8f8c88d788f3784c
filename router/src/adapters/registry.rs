//! Names -> local directories -> content ids.
//!
//! 1. A name is looked up: registered on the command line, or a sub-directory of an adapter directory.
//! 2. Its two files are looked at. The same (inode, mtime, size) as when it was prepared: that content is used.
//! 3. Otherwise one attempt prepares it, however many requests wait; it goes on when they leave.
//! 4. A failure is shared for [`FAILURE_KEPT`], unless the files change.
//!
//! Requests hold a content id, never a name: a name that gets new content does not touch what runs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{Semaphore, watch};

use super::name::is_valid_segment;
use crate::engine::{AdapterFailure, ContentId, PreparedAdapter};
use crate::http::Backend;

/// How long a failed attempt answers for the next requests.
const FAILURE_KEPT: Duration = Duration::from_secs(5);
/// Adapters that are prepared at the same time.
const LOADS_MAX: usize = 8;
/// Names with a state. Beyond it, names of adapter directories are refused until one goes away.
const ENTRIES_MAX: usize = 65_536;

/// What the operator registered.
#[derive(Clone, Debug, Default)]
pub struct AdapterSettings {
    /// Name and directory, from `--adapter name=path`.
    pub registered: Vec<(String, PathBuf)>,
    /// Directories whose sub-directories are adapters.
    pub dirs: Vec<PathBuf>,
}

/// How long a request waits for an adapter that is not prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// At most this long; then `adapter_loading`.
    Until(Duration),
    /// Not at all; the load goes on.
    Fail,
}

/// An adapter that can be used now.
#[derive(Clone, Debug)]
pub struct ResolvedAdapter {
    /// The name that was asked for.
    pub name: String,
    /// What the shard read.
    pub prepared: Arc<PreparedAdapter>,
}

/// What `/v1/models` shows of an adapter.
#[derive(Clone, Debug)]
pub struct AdapterCard {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub root: String,
    /// Unix seconds at which it was first usable.
    pub created: u64,
    /// What the shard read.
    pub prepared: Arc<PreparedAdapter>,
}

/// One line of the adapter overview, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AdapterRow {
    /// Not asked for yet.
    Registered,
    /// An attempt runs.
    Preparing,
    /// Usable.
    Ready,
    /// The last attempt failed.
    Failed,
}

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
                if let Err(failure) = registry.resolve(&name, Wait::Until(Duration::from_secs(3600))).await {
                    tracing::warn!(adapter = name, code = failure.code, "adapter is not usable: {failure}");
                }
            });
        }
    }

    /// True if `name` may be resolved: registered, or a valid name when there are adapter directories.
    pub fn is_candidate(&self, name: &str) -> bool {
        let settings = &self.inner.settings;
        settings.registered.iter().any(|(known, _)| known == name)
            || (!settings.dirs.is_empty() && is_valid_segment(name))
    }

    /// The content `name` stands for now, prepared.
    ///
    /// # Errors
    /// `model_not_found`, `adapter_loading` (deadline, or [`Wait::Fail`]), or what the shard found.
    pub async fn resolve(&self, name: &str, wait: Wait) -> Result<ResolvedAdapter, AdapterFailure> {
        let Some((dir, files)) = self.locate(name).await else {
            self.forget(name);
            return Err(failure("model_not_found", format!("no adapter is called `{name}`")));
        };
        let mut outcome = match self.ready_or_attempt(name, dir, files)? {
            Found::Ready(prepared) => return Ok(ResolvedAdapter { name: name.to_owned(), prepared }),
            Found::Attempt(outcome) => outcome,
        };
        let loading =
            |text: &str| failure("adapter_loading", format!("it is still loading {text}; the load goes on, try again"));
        let Wait::Until(limit) = wait else { return Err(loading("and `adapter_wait` is `fail`")) };
        let done = tokio::time::timeout(limit, outcome.wait_for(Option::is_some)).await;
        let done = done.map_err(|_| loading(&format!("after {} ms", limit.as_millis())))?;
        let gone = || failure("adapter_load_failed", "service unavailable: the load was given up".into());
        let result = done.map_err(|_| gone())?.clone().ok_or_else(gone)?;
        result.map(|prepared| ResolvedAdapter { name: name.to_owned(), prepared })
    }

    /// Adapters that can serve, by name, and a version that changes when the list does.
    pub fn cards(&self) -> (u64, Vec<AdapterCard>) {
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
    pub fn states(&self) -> [(AdapterRow, usize); 4] {
        let entries = self.entries();
        let state = |entry: &Entry| match (&entry.ready, &entry.attempt) {
            (_, Attempt::Running { .. }) => AdapterRow::Preparing,
            (Some(_), _) => AdapterRow::Ready,
            (None, Attempt::Failed { .. }) => AdapterRow::Failed,
            (None, Attempt::None) => AdapterRow::Registered,
        };
        let count = |row| entries.by_name.values().filter(|entry| state(entry) == row).count();
        let untouched =
            self.inner.settings.registered.iter().filter(|(name, _)| !entries.by_name.contains_key(name)).count();
        [
            (AdapterRow::Registered, count(AdapterRow::Registered) + untouched),
            (AdapterRow::Preparing, count(AdapterRow::Preparing)),
            (AdapterRow::Ready, count(AdapterRow::Ready)),
            (AdapterRow::Failed, count(AdapterRow::Failed)),
        ]
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
        let registered =
            self.inner.settings.registered.iter().find(|(known, _)| known == name).map(|(_, dir)| dir.clone());
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
