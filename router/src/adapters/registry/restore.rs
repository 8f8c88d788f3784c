//! What the command line and the last run left: registered before anything is asked, loaded when needed.

use std::sync::Arc;

use super::contents::{From, Until, Wanted};
use super::names::{Entry, Key, Made, Version};
use super::resolve::Found;
use super::*;
use crate::adapters::Origin;
use crate::adapters::durable::{Facts, Record, Restored, VersionRecord};

/// How long the start goes on trying to read an adapter that was usable before. Requests try again anyway.
const WARM: Duration = Duration::from_secs(3600);

impl Registry {
    /// Names of `--adapter`. Directories are looked at when asked for; the server waits for the others.
    pub(super) fn register_flags(&self) {
        let now = self.inner.clock.unix_seconds();
        let mut names = self.names();
        for (name, reference) in &self.inner.settings.registered {
            let key: Key = (Arc::from(""), Arc::from(name.as_str()));
            let id = names.new_id();
            names.insert(&key, Entry { made: Made::Flag, ..Entry::new(id, reference.clone(), now) });
            if reference.source != SourceKind::Local {
                names.awaited.insert(key);
            }
        }
    }

    pub(super) fn restore(&self, restored: Restored) {
        let mut names = self.names();
        for (namespace, name, record) in restored.adapters {
            let key: Key = (Arc::from(namespace), Arc::from(name));
            let flag = names.get(&key.0, &key.1).map(|entry| entry.reference.clone());
            if flag.as_ref().map_or(record.by_flag, |reference| *reference != record.reference) {
                continue; // the command line says otherwise now
            }
            let made = if flag.is_some() { Made::Flag } else { Made::Load };
            let current = record.version.as_ref().and_then(|version| self.version_of(&record.reference, version));
            if let Some(current) = &current {
                self.inner.contents.adopt_unloaded(&current.wanted.identity, current.wanted.source);
            }
            if record.pin.is_some() {
                names.awaited.insert(key.clone());
            }
            let id = names.new_id();
            let error = (record.own_credential && current.is_none()).then(|| names::Noted {
                failure: credential_lost(),
                reference: record.reference.clone(),
                at: self.inner.clock.now(),
                next_try: None,
            });
            let entry = Entry {
                made,
                scale: record.scale,
                pin: record.pin,
                own_credential: record.own_credential,
                generation: record.generation,
                current,
                error,
                ..Entry::new(id, record.reference, record.created)
            };
            names.insert(&key, entry);
        }
        for (namespace, name, alias) in restored.aliases {
            names.put_alias(&(Arc::from(namespace), Arc::from(name)), Some(alias));
        }
    }

    /// What a name stood for, if its bytes are here still. No network is needed to serve it.
    fn version_of(&self, reference: &AdapterRef, version: &VersionRecord) -> Option<Version> {
        if reference.source == SourceKind::Local {
            return None; // looked at when asked for
        }
        let files = &self.inner.supply.as_ref()?.files;
        files.here(&version.identity)?;
        let resolved = Resolved {
            reference: reference.clone(),
            identity: version.identity.clone(),
            revision: version.revision.clone(),
            origin: Origin::Remote(Vec::new()),
        };
        let wanted: Wanted = self.wanted_of(Arc::new(resolved), &Credential::Server, 0.into());
        let facts = Arc::new(version.facts.clone().prepared());
        Some(Version { wanted, revision: Arc::from(version.revision.as_str()), facts })
    }

    /// Starts to load what the command line names and what is pinned. Needs a tokio runtime.
    pub fn preload(&self) {
        self.inner.revivals.run_here();
        let keys: Vec<(Key, u64)> = {
            let names = self.names();
            let flags =
                self.inner.settings.registered.iter().map(|(name, _)| (Arc::from(""), Arc::from(name.as_str())));
            let all: std::collections::BTreeSet<Key> = flags.chain(names.awaited.iter().cloned()).collect();
            all.into_iter()
                .filter_map(|key| names.get(&key.0, &key.1).map(|entry| entry.id).map(|id| (key, id)))
                .collect()
        };
        for (key, id) in keys {
            let registry = self.clone();
            tokio::spawn(async move { registry.warm(Found { key, id, tenant: 0.into() }).await });
        }
    }

    async fn warm(&self, found: Found) {
        let until = Until::At(self.inner.clock.now() + WARM);
        loop {
            match self.serve(&found, until).await {
                Ok(Some(served)) => return self.pin_again(&found, served.prepared.content).await,
                Ok(None) => {
                    if self.names().get(&found.key.0, &found.key.1).is_none_or(|entry| entry.id != found.id) {
                        return;
                    }
                }
                Err(failed) => {
                    tracing::warn!(adapter = &*found.key.1, code = failed.code, "adapter is not usable: {failed}");
                    let at = self.inner.clock.now();
                    let mut names = self.names();
                    let made = names.update(&found.key, |entry| {
                        let reference = entry.reference.clone();
                        entry.error.get_or_insert(names::Noted { failure: failed, reference, at, next_try: None });
                        entry.made
                    });
                    // Whoever writes a name on the command line wants no server without it. One that somebody pinned in an
                    // earlier run and that is gone for good would take all the others with it.
                    if made != Some(Made::Flag) {
                        names.awaited.remove(&found.key);
                    }
                    return;
                }
            }
        }
    }

    async fn pin_again(&self, found: &Found, content: ContentId) {
        let pinned = self.names().get(&found.key.0, &found.key.1).and_then(|entry| {
            let identity = entry.current.as_ref().map(|version| Arc::clone(&version.wanted.identity));
            Some((entry.pin?, identity?))
        });
        let Some((level, identity)) = pinned else { return };
        if let Err(refused) = self.pin_content(&identity, content, Some(level)).await {
            tracing::warn!(adapter = &*found.key.1, "it could not be pinned again: {refused}");
        }
    }

    /// Writes what the table says of a name now.
    pub(super) async fn write_adapter(&self, key: &Key) -> Result<(), AdapterFailure> {
        let Some(durable) = self.inner.durable.clone() else { return Ok(()) };
        let _writing = self.inner.writing.lock().await;
        let record = self.names().get(&key.0, &key.1).and_then(record_of);
        let key = key.clone();
        let write = move || durable.put_adapter(&key.0, &key.1, record.as_ref());
        written(tokio::task::spawn_blocking(write).await)
    }

    /// Writes what the table says of an alias now.
    pub(super) async fn write_alias(&self, key: &Key) -> Result<(), AdapterFailure> {
        let Some(durable) = self.inner.durable.clone() else { return Ok(()) };
        let _writing = self.inner.writing.lock().await;
        let alias = self.names().alias(&key.0, &key.1).cloned();
        let key = key.clone();
        let write = move || durable.put_alias(&key.0, &key.1, alias.as_ref());
        written(tokio::task::spawn_blocking(write).await)
    }
}

/// `None`: nothing that is worth keeping.
fn record_of(entry: &Entry) -> Option<Record> {
    let is_kept = match entry.made {
        Made::Load => true,
        Made::Flag => entry.reference.source != SourceKind::Local,
        Made::Folder => false,
    };
    let version = entry.current.as_ref().and_then(|version| match &version.wanted.from {
        From::Source(resolved) => Some(VersionRecord {
            identity: resolved.identity.clone(),
            revision: version.revision.to_string(),
            facts: Facts::of(&version.facts),
        }),
        From::Merge(_) => None,
    });
    is_kept.then(|| Record {
        reference: entry.reference.clone(),
        by_flag: entry.made == Made::Flag,
        scale: entry.scale,
        pin: entry.pin,
        created: entry.created,
        generation: entry.generation,
        own_credential: entry.own_credential,
        version,
    })
}

/// Of an adapter whose bytes are not here any more either.
pub(super) fn credential_lost() -> AdapterFailure {
    let message =
        "it was loaded with a credential of its own, which is not kept over a restart; load it again with one";
    failure("adapter_invalid", message.into())
}

fn written(outcome: Result<Result<(), String>, tokio::task::JoinError>) -> Result<(), AdapterFailure> {
    let reason = match outcome {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(reason)) => reason,
        Err(_) => "the writer died".to_owned(),
    };
    tracing::error!("registry.redb cannot be written: {reason}");
    let message =
        format!("service unavailable: it is in force, but could not be written and ends with a restart: {reason}");
    Err(failure("disk_full", message))
}
