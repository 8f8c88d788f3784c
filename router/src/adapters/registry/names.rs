//! The table of names: what each stands for, and the indexes that keep lookups and counts cheap with 10,000 of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::AdapterState;
use super::contents::Wanted;
use super::stage::Stage;
use crate::adapters::alias::Alias;
use crate::adapters::{AdapterRef, Credential, SourceKind};
use crate::engine::{AdapterFailure, ContentId, PinLevel, PreparedAdapter};

/// Registered names, and sub-directories that were used.
pub(super) const NAMES_MAX: usize = 65_536;

/// Namespace and name.
pub(super) type Key = (Arc<str>, Arc<str>);

/// Who made an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// `--adapter`.
    Flag,
    /// A load of the admin API or of a runtime route.
    Load,
    /// A sub-directory of `--adapter-dir` that was asked for.
    Folder,
}

/// One name.
pub(super) struct Entry {
    /// Of this registration: the same name registered again has another one.
    pub(super) id: u64,
    pub(super) made: Made,
    pub(super) reference: AdapterRef,
    pub(super) scale: f32,
    pub(super) pin: Option<PinLevel>,
    pub(super) credential: Credential,
    /// It was loaded with a credential of its own; after a restart that is known, but not the credential.
    pub(super) own_credential: bool,
    /// Unix seconds.
    pub(super) created: u64,
    pub(super) generation: u64,
    pub(super) current: Option<Version>,
    pub(super) next: Option<Next>,
    pub(super) error: Option<Noted>,
    /// Unix seconds; 0 = never.
    pub(super) last_used: u64,
    pub(super) loaded_ms: Option<u64>,
}

/// What a name stands for.
#[derive(Clone)]
pub(super) struct Version {
    pub(super) wanted: Wanted,
    pub(super) revision: Arc<str>,
    pub(super) facts: Arc<PreparedAdapter>,
}

/// What it will stand for.
pub(super) struct Next {
    pub(super) id: u64,
    pub(super) reference: AdapterRef,
    pub(super) stage: Arc<Stage>,
    pub(super) step: watch::Receiver<Step>,
    /// The driver's; see [`Self::wake`].
    pub(super) report: Weak<watch::Sender<Step>>,
    /// Ends the load when the name goes.
    pub(super) driver: Option<AbortHandle>,
}

impl Next {
    /// Ends a pause between two tries. Who looks at `step` from now on waits for what the next one brings.
    pub(super) fn wake(&self) {
        let Some(report) = self.report.upgrade() else { return };
        report.send_if_modified(|step| {
            let is_paused = matches!(step, Step::Waiting(..));
            if is_paused {
                *step = Step::Trying;
            }
            is_paused
        });
    }
}

/// How a load goes.
#[derive(Clone)]
pub(super) enum Step {
    /// An attempt runs.
    Trying,
    /// The last one failed; the next one begins at this moment.
    Waiting(AdapterFailure, Duration),
    /// No more attempts.
    Done(Result<(), AdapterFailure>),
}

/// A failed attempt.
#[derive(Clone)]
pub(super) struct Noted {
    pub(super) failure: AdapterFailure,
    /// What was to be loaded.
    pub(super) reference: AdapterRef,
    pub(super) at: Duration,
    pub(super) next_try: Option<Duration>,
}

impl Entry {
    /// Nothing is known but where it is.
    pub(super) fn new(id: u64, reference: AdapterRef, created: u64) -> Self {
        Self {
            id,
            made: Made::Load,
            reference,
            scale: 1.0,
            pin: None,
            credential: Credential::Server,
            own_credential: false,
            created,
            generation: 0,
            current: None,
            next: None,
            error: None,
            last_used: 0,
            loaded_ms: None,
        }
    }

    pub(super) fn state(&self) -> AdapterState {
        match (&self.current, &self.next, &self.error) {
            (Some(_), _, _) => AdapterState::Ready,
            (None, _, Some(_)) => AdapterState::Failed,
            (None, Some(next), None) => next.stage.state(),
            (None, None, None) => AdapterState::Registered,
        }
    }

    /// What it was loaded with was lost with the last run.
    pub(super) fn lacks_credential(&self) -> bool {
        self.own_credential && !matches!(self.credential, Credential::Token(_))
    }

    pub(super) fn content(&self) -> Option<ContentId> {
        self.current.as_ref().map(|version| version.facts.content)
    }

    /// Its files are looked at with each request.
    pub(super) fn follows_files(&self) -> bool {
        self.reference.source == SourceKind::Local
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Names {
    spaces: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Entry>>,
    aliases: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Alias>>,
    by_content: HashMap<ContentId, BTreeSet<Key>>,
    /// Sub-directories that were unloaded: not looked for until they are loaded again.
    pub(super) hidden: BTreeSet<Arc<str>>,
    /// The server is not ready before these are.
    pub(super) awaited: BTreeSet<Key>,
    len: usize,
    counts: [usize; AdapterState::ALL.len()],
    version: u64,
    next_id: u64,
}

/// What the indexes know of an entry.
#[derive(PartialEq)]
struct Face {
    state: AdapterState,
    content: Option<ContentId>,
    reference: Option<AdapterRef>,
}

impl Face {
    fn of(entry: &Entry) -> Self {
        // A load moves on without the table: its states are counted by those who run it.
        let state = match (&entry.current, &entry.next, &entry.error) {
            (Some(_), _, _) => AdapterState::Ready,
            (None, _, Some(_)) => AdapterState::Failed,
            (None, Some(_), None) => AdapterState::Resolving,
            (None, None, None) => AdapterState::Registered,
        };
        let content = entry.content();
        Self { state, content, reference: content.map(|_| entry.reference.clone()) }
    }
}

impl Names {
    /// A number that was never given before.
    pub(super) fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(super) fn get(&self, namespace: &str, name: &str) -> Option<&Entry> {
        self.spaces.get(namespace)?.get(name)
    }

    /// The entry a caller of `namespace` means: its own, else the shared one.
    pub(super) fn meant(&self, namespace: &str, name: &str) -> Option<(Key, &Entry)> {
        let own = self.spaces.get_key_value(namespace).and_then(|(space, names)| {
            names.get_key_value(name).map(|(name, entry)| ((Arc::clone(space), Arc::clone(name)), entry))
        });
        if own.is_some() || namespace.is_empty() { own } else { self.meant("", name) }
    }

    /// Changes one entry; the indexes follow.
    pub(super) fn update<T>(&mut self, key: &Key, change: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let entry = self.spaces.get_mut(&key.0)?.get_mut(&key.1)?;
        let before = Face::of(entry);
        let result = change(entry);
        let after = Face::of(entry);
        self.reindex(key, Some(before), Some(after));
        Some(result)
    }

    /// A request runs under it; its scale. No index knows of that.
    pub(super) fn used(&mut self, key: &Key, unix_seconds: u64, loaded_ms: u64) -> Option<f32> {
        let entry = self.spaces.get_mut(&key.0)?.get_mut(&key.1)?;
        entry.last_used = unix_seconds;
        entry.loaded_ms.get_or_insert(loaded_ms);
        Some(entry.scale)
    }

    /// Adds an entry in the place of what has its name.
    pub(super) fn insert(&mut self, key: &Key, entry: Entry) -> Option<Entry> {
        let after = Face::of(&entry);
        let before = self.spaces.entry(Arc::clone(&key.0)).or_default().insert(Arc::clone(&key.1), entry);
        self.len += usize::from(before.is_none());
        self.reindex(key, before.as_ref().map(Face::of), Some(after));
        before
    }

    pub(super) fn remove(&mut self, key: &Key) -> Option<Entry> {
        let names = self.spaces.get_mut(&key.0)?;
        let entry = names.remove(&key.1)?;
        if names.is_empty() && !key.0.is_empty() {
            self.spaces.remove(&key.0);
        }
        self.len -= 1;
        self.awaited.remove(key);
        self.reindex(key, Some(Face::of(&entry)), None);
        Some(entry)
    }

    fn reindex(&mut self, key: &Key, before: Option<Face>, after: Option<Face>) {
        if before == after {
            return;
        }
        for (face, sign) in [(&before, false), (&after, true)] {
            let Some(face) = face else { continue };
            if let Some(count) = self.counts.get_mut(face.state as usize) {
                *count = if sign { *count + 1 } else { *count - 1 };
            }
        }
        let content = |face: &Option<Face>| face.as_ref().and_then(|face| face.content);
        if let Some(old) = content(&before)
            && let Some(keys) = self.by_content.get_mut(&old)
        {
            keys.remove(key);
            if keys.is_empty() {
                self.by_content.remove(&old);
            }
        }
        if let Some(new) = content(&after) {
            self.by_content.entry(new).or_default().insert(key.clone());
        }
        if content(&before).is_some() || content(&after).is_some() {
            self.version += 1;
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Changes when a list of usable adapters does.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Entries in this state; all states of a load are counted as resolving.
    pub(super) fn count(&self, state: AdapterState) -> usize {
        self.counts.get(state as usize).copied().unwrap_or(0)
    }

    /// The first name of a content that everybody may know.
    pub(super) fn name_of(&self, content: &ContentId) -> Option<&Arc<str>> {
        self.by_content.get(content)?.iter().find(|(namespace, _)| namespace.is_empty()).map(|(_, name)| name)
    }

    pub(super) fn key_of(&self, content: &ContentId) -> Option<&Key> {
        self.by_content.get(content)?.first()
    }

    pub(super) fn is_named(&self, content: &ContentId) -> bool {
        self.by_content.contains_key(content)
    }

    /// All entries of a namespace, by name, from `after` on.
    pub(super) fn of<'a>(
        &'a self,
        namespace: &str,
        after: Option<&str>,
    ) -> impl Iterator<Item = (&'a Arc<str>, &'a Entry)> + use<'a> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let names = self.spaces.get(namespace);
        names.map(|names| names.range::<str, _>((from, Bound::Unbounded))).into_iter().flatten()
    }

    /// All namespaces, sorted.
    pub(super) fn namespaces(&self) -> impl Iterator<Item = &Arc<str>> {
        self.spaces.keys()
    }

    pub(super) fn alias(&self, namespace: &str, name: &str) -> Option<&Alias> {
        self.aliases.get(namespace)?.get(name)
    }

    /// All aliases with namespace and name.
    pub(super) fn aliases(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>, &Alias)> {
        self.aliases.iter().flat_map(|(space, names)| names.iter().map(move |(name, alias)| (space, name, alias)))
    }

    /// Sets or (`None`) removes an alias.
    pub(super) fn put_alias(&mut self, key: &Key, alias: Option<Alias>) -> Option<Alias> {
        self.version += 1;
        let Some(alias) = alias else {
            let names = self.aliases.get_mut(&key.0)?;
            let was = names.remove(&key.1);
            if names.is_empty() {
                self.aliases.remove(&key.0);
            }
            return was;
        };
        self.aliases.entry(Arc::clone(&key.0)).or_default().insert(Arc::clone(&key.1), alias)
    }

    /// The indexes agree with the entries.
    #[cfg(test)]
    pub(super) fn assert_consistent(&self) {
        let mut counts = [0; AdapterState::ALL.len()];
        let mut named = 0;
        let mut len = 0;
        for (space, names) in &self.spaces {
            for (name, entry) in names {
                let face = Face::of(entry);
                counts[face.state as usize] += 1;
                len += 1;
                if let Some(content) = face.content {
                    named += 1;
                    assert!(self.by_content[&content].contains(&(Arc::clone(space), Arc::clone(name))));
                }
            }
        }
        assert_eq!((self.counts, self.len), (counts, len));
        assert_eq!(self.by_content.values().map(BTreeSet::len).sum::<usize>(), named);
    }
}
