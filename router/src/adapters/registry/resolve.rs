//! A request's name to a content: aliases and registered names. What is not found here is dynamic.

use std::sync::Arc;

use tokio::sync::watch;

use super::contents::{From, NO_SOURCE, Until, Usable, Wanted};
use super::names::{Entry, Key, Made, Names, Noted, Step, Version};
use super::stage::Stage;
use super::types::Hold;
use super::*;
use crate::adapters::Tenant;
use crate::adapters::life::is_retryable;

/// How often a request looks again because the name got other content while it waited.
pub(super) const ROUNDS_MAX: usize = 16;

/// An entry that a request found.
pub(super) struct Found {
    pub(super) key: Key,
    pub(super) id: u64,
    /// Whose name the download runs in.
    pub(super) tenant: Tenant,
}

enum Lookup {
    Entry(Found),
    /// Nothing; the name that was looked for, and whether an alias chose it.
    Nothing(Arc<str>, bool),
}

/// What a look into the adapter directories gave.
enum Folder {
    None,
    Served(Box<ResolvedAdapter>),
    /// The name was registered or unloaded meanwhile, or another request had the same idea.
    Changed,
}

/// What a request has to do for an entry.
enum Plan {
    Gone,
    Follow,
    Use(Version),
    Wait(watch::Receiver<Step>, Arc<Stage>),
    Load,
    Fail(AdapterFailure),
}

impl Registry {
    /// True if `name` may be resolved for this caller, as far as that can be said without asking a source. Says nothing
    /// about other namespaces.
    pub fn is_candidate(&self, caller: &Caller, name: &str, source: Option<SourceKind>) -> bool {
        if !self.may_ask(caller, name) {
            return false;
        }
        let (names, is_local) = (self.names(), source.is_none_or(|source| source == SourceKind::Local));
        let is_registered = names
            .meant(&caller.namespace, name)
            .is_some_and(|(_, entry)| source.is_none_or(|source| source == entry.reference.source));
        is_registered
            || names.alias(&caller.namespace, name).is_some()
            || names.alias("", name).is_some()
            || (is_local && self.may_be_folder(&names, name))
            || !self.places(name, source, None).is_empty()
    }

    /// The content `ask.name` stands for now for this caller, loaded.
    ///
    /// # Errors
    /// `model_not_found` (unknown and not yours are one answer), `source_forbidden`, `adapter_auth_unavailable`,
    /// `adapter_loading`, `adapter_load_failed`, or what is wrong with the adapter.
    pub async fn resolve(&self, caller: &Caller, ask: &Ask<'_>) -> Result<ResolvedAdapter, AdapterFailure> {
        if !self.may_ask(caller, ask.name) {
            return Err(not_found(ask.name));
        }
        let until = self.until(ask.wait);
        for _ in 0..ROUNDS_MAX {
            let found = match self.find(caller, ask) {
                Lookup::Entry(found) => found,
                Lookup::Nothing(name, by_alias) => {
                    let is_local = ask.source.is_none_or(|source| source == SourceKind::Local);
                    match if is_local { self.folder(&name, until).await? } else { Folder::None } {
                        Folder::Served(served) => return Ok(*served),
                        Folder::Changed => continue,
                        Folder::None => {}
                    }
                    if by_alias {
                        return Err(not_found(ask.name));
                    }
                    return self.dynamic(caller, ask, until).await;
                }
            };
            if let Some(served) = self.serve(&found, until).await? {
                return Ok(served);
            }
        }
        Err(failure("adapter_loading", "its name changed hands again and again; try again".into()))
    }

    /// The key's list of adapters, applied to the text of the request alone.
    fn may_ask(&self, caller: &Caller, name: &str) -> bool {
        caller.policy.adapters.is_none()
            || caller.may_use_adapter(name)
            || AdapterRef::parse(name).is_ok_and(|reference| caller.may_use_adapter(&reference.to_string()))
    }

    fn find(&self, caller: &Caller, ask: &Ask<'_>) -> Lookup {
        let names = self.names();
        let alias = names.alias(&caller.namespace, ask.name).map(|alias| (&*caller.namespace, alias));
        let alias = alias.or_else(|| names.alias("", ask.name).map(|alias| ("", alias)));
        let picked = alias.and_then(|(space, alias)| {
            let sticky = match alias.set.sticky_by {
                StickyBy::Key => Some(&*caller.name),
                StickyBy::User => ask.sticky,
                StickyBy::None => None,
            };
            let sticky = sticky.filter(|value| !value.is_empty());
            let version = alias.set.pick(ask.name, sticky, self.inner.clock.random())?;
            Some((space, version.adapter.as_str()))
        });
        let (space, name) = picked.unwrap_or((&*caller.namespace, ask.name));
        match names.meant(space, name) {
            Some((key, entry)) if ask.source.is_none_or(|source| source == entry.reference.source) => {
                Lookup::Entry(Found { key, id: entry.id, tenant: Tenant::from(caller) })
            }
            _ => Lookup::Nothing(Arc::from(name), picked.is_some()),
        }
    }

    /// One look at an entry, and what it asks for. `None`: it changed meanwhile, look again.
    pub(super) async fn serve(&self, found: &Found, until: Until) -> Result<Option<ResolvedAdapter>, AdapterFailure> {
        match self.plan(found) {
            Plan::Gone => Ok(None),
            Plan::Fail(failure) => Err(failure),
            Plan::Follow => self.follow(found, until).await,
            Plan::Use(version) => {
                match self.inner.contents.usable(&version.wanted, &Arc::default(), until).await {
                    Ok(usable) => Ok(self.confirm(found, &version, usable)),
                    // Its files went between two looks: its source is asked.
                    Err(failed) if failed.state == Some(NO_SOURCE) => Ok(None),
                    Err(failed) => Err(failed),
                }
            }
            Plan::Wait(step, stage) => {
                self.wait_for_step(step, &stage, until).await?;
                Ok(None)
            }
            Plan::Load => {
                self.load_again(found);
                Ok(None)
            }
        }
    }

    fn plan(&self, found: &Found) -> Plan {
        let names = self.names();
        let Some(entry) = names.get(&found.key.0, &found.key.1).filter(|entry| entry.id == found.id) else {
            return Plan::Gone;
        };
        match (&entry.current, &entry.next) {
            (Some(version), next) => match (&version.wanted.from, next) {
                _ if entry.follows_files() => Plan::Follow,
                // Of the last run: where its bytes are is not known any more. It needs its files, or a look at its source.
                (_, next) if version.wanted.is_bare() && !self.has_files(&version.wanted) => match next {
                    Some(next) => Plan::Wait(next.step.clone(), Arc::clone(&next.stage)),
                    None if entry.lacks_credential() => Plan::Fail(restore::credential_lost()),
                    None => Plan::Load,
                },
                _ => Plan::Use(version.clone()),
            },
            (None, Some(next)) => Plan::Wait(next.step.clone(), Arc::clone(&next.stage)),
            (None, None) if entry.made != Made::Load && entry.follows_files() => Plan::Follow,
            (None, None) => match &entry.error {
                Some(noted) if !is_retryable(&noted.failure.code) => {
                    Plan::Fail(AdapterFailure { state: Some(AdapterState::Failed.name()), ..noted.failure.clone() })
                }
                _ if entry.follows_files() => Plan::Follow,
                _ => Plan::Load,
            },
        }
    }

    fn has_files(&self, wanted: &Wanted) -> bool {
        let files = self.inner.supply.as_ref().map(|supply| &supply.files);
        files.is_some_and(|files| files.here(&wanted.identity).is_some())
    }

    /// Waits for a load, at most until its next try would come too late.
    pub(super) async fn wait_for_step(
        &self,
        mut step: watch::Receiver<Step>,
        stage: &Stage,
        until: Until,
    ) -> Result<(), AdapterFailure> {
        let Until::At(until) = until else { return Ok(()) };
        let clock = &self.inner.clock;
        let is_decided = |step: &Step| match step {
            Step::Trying => false,
            Step::Waiting(_, next_try) => *next_try > until,
            Step::Done(_) => true,
        };
        let left = until.saturating_sub(clock.now());
        let decided = tokio::select! {
            biased;
            decided = step.wait_for(is_decided) => decided.map(|step| step.clone()),
            () = clock.sleep(left) => Ok(Step::Trying),
        };
        match decided {
            Ok(Step::Done(Ok(()))) => Ok(()),
            Ok(Step::Done(Err(failure))) => Err(failure),
            Ok(Step::Waiting(failure, next_try)) => Err(AdapterFailure {
                retry_after: Some(next_try.saturating_sub(clock.now()).max(Duration::from_secs(1))),
                state: Some(AdapterState::Failed.name()),
                ..failure
            }),
            Ok(Step::Trying) => {
                let state = stage.state().name();
                Err(AdapterFailure {
                    retry_after: Some(Duration::from_secs(1)),
                    state: Some(state),
                    ..failure(
                        "adapter_loading",
                        format!("it is still loading (state `{state}`); the load goes on, try again"),
                    )
                })
            }
            // The name went, or its load was replaced by another one: look again.
            Err(_) => Ok(()),
        }
    }

    /// The last word: the name stands for this content now, not only when the wait began.
    fn confirm(&self, found: &Found, version: &Version, usable: Usable) -> Option<ResolvedAdapter> {
        let mut names = self.names();
        let entry = names.get(&found.key.0, &found.key.1).filter(|entry| entry.id == found.id)?;
        let current = entry.current.as_ref().filter(|current| current.wanted.identity == version.wanted.identity)?;
        // The same bytes may be another content to this loader than to the one of the last run.
        let is_other = current.facts.content != usable.prepared.content;
        if is_other {
            let facts = Arc::clone(&usable.prepared);
            names.update(&found.key, |entry| {
                if let Some(current) = &mut entry.current {
                    current.facts = facts;
                }
            });
        }
        names.awaited.remove(&found.key);
        let scale = names.used(&found.key, self.inner.clock.unix_seconds(), usable.loaded_ms)?;
        drop(names);
        Some(self.served(&found.key.1, &version.revision, &version.wanted, scale, usable))
    }

    /// A directory that the operator or an admin named: its files are looked at now.
    async fn follow(&self, found: &Found, until: Until) -> Result<Option<ResolvedAdapter>, AdapterFailure> {
        let Some((made, reference, credential)) = self
            .names()
            .get(&found.key.0, &found.key.1)
            .map(|entry| (entry.made, entry.reference.clone(), entry.credential.clone()))
        else {
            return Ok(None);
        };
        let resolved = match made {
            Made::Flag => directory::named(reference.locator.clone().into()).await,
            Made::Folder => {
                let resolved = directory::folder(self.inner.settings.dirs.clone(), found.key.1.to_string()).await;
                if resolved.is_none() {
                    self.take_away(&found.key, found.id);
                    return Ok(None);
                }
                resolved
            }
            Made::Load => {
                let at = if let Until::At(at) = until { Some(at) } else { None };
                let asked = self.inner.authoriser.ask(&reference, &credential, at).await;
                Some(asked.map_err(|error| source_failure(&error, &found.key.1))?)
            }
        };
        let resolved = resolved.ok_or_else(|| not_found(&found.key.1))?;
        let version = self.wanted_of(resolved, &credential, found.tenant);
        match self.inner.contents.usable(&version, &Arc::default(), until).await {
            Ok(usable) => {
                let version =
                    Version { revision: revision_of(&version), facts: Arc::clone(&usable.prepared), wanted: version };
                self.note_followed(&found.key, found.id, Some((&version, &usable)), None);
                Ok(self.confirm(found, &version, usable))
            }
            Err(failure) => {
                let is_final = failure.code != "adapter_loading";
                self.note_followed(&found.key, found.id, None, is_final.then_some(&failure));
                Err(failure)
            }
        }
    }

    /// Removes an entry and lets go of its content. What it was.
    pub(super) fn take_away(&self, key: &Key, id: u64) -> Option<Entry> {
        let mut names = self.names();
        names.get(&key.0, &key.1).filter(|entry| entry.id == id)?;
        let entry = names.remove(key)?;
        drop(names);
        if let Some(driver) = entry.next.as_ref().and_then(|next| next.driver.as_ref()) {
            driver.abort();
        }
        if let Some(version) = &entry.current {
            self.inner.contents.release(&version.wanted.identity);
        }
        Some(entry)
    }

    /// The files of an entry gave this version, or (`None`) do not serve: then nothing does.
    fn note_followed(&self, key: &Key, id: u64, version: Option<(&Version, &Usable)>, failed: Option<&AdapterFailure>) {
        let mut names = self.names();
        let Some(entry) = names.get(&key.0, &key.1).filter(|entry| entry.id == id) else { return };
        let was = entry.current.as_ref().map(|current| Arc::clone(&current.wanted.identity));
        let now = self.inner.clock.now();
        match (version, failed) {
            (Some((version, _)), _) if was.as_ref() == Some(&version.wanted.identity) => return,
            (None, None) => return,
            (Some((version, usable)), _) => {
                self.inner.contents.adopt(&version.wanted, usable);
                names.update(key, |entry| {
                    entry.current = Some(version.clone());
                    entry.generation += 1;
                    entry.loaded_ms = Some(usable.loaded_ms);
                    entry.error = None;
                });
            }
            (None, Some(failure)) => {
                names.update(key, |entry| {
                    entry.current = None;
                    let reference = entry.reference.clone();
                    entry.error = Some(Noted { failure: failure.clone(), reference, at: now, next_try: None });
                });
            }
        }
        drop(names);
        if let Some(was) = was {
            self.inner.contents.release(&was);
        }
    }

    /// `name` as a sub-directory of an adapter directory.
    async fn folder(&self, name: &str, until: Until) -> Result<Folder, AdapterFailure> {
        if !self.may_be_folder(&self.names(), name) {
            return Ok(Folder::None);
        }
        let (key, credential) = ((Arc::from(""), Arc::from(name)), Credential::Server);
        let Some(resolved) = directory::folder(self.inner.settings.dirs.clone(), name.to_owned()).await else {
            return Ok(Folder::None);
        };
        let reference = resolved.reference.clone();
        let wanted = self.wanted_of(resolved, &credential, Tenant::from(0));
        let usable = self.inner.contents.usable(&wanted, &Arc::default(), until).await?;
        let version = Version { revision: revision_of(&wanted), facts: Arc::clone(&usable.prepared), wanted };
        let mut names = self.names();
        if !self.may_be_folder(&names, name) || names.get("", name).is_some() {
            return Ok(Folder::Changed);
        }
        if names.len() < names::NAMES_MAX {
            let now = self.inner.clock.unix_seconds();
            let id = names.new_id();
            let entry = Entry {
                made: Made::Folder,
                current: Some(version.clone()),
                loaded_ms: Some(usable.loaded_ms),
                last_used: now,
                generation: 1,
                ..Entry::new(id, reference, now)
            };
            self.inner.contents.adopt(&version.wanted, &usable);
            names.insert(&key, entry);
        }
        Ok(Folder::Served(self.served(&key.1, &version.revision, &version.wanted, 1.0, usable).into()))
    }

    pub(super) fn may_be_folder(&self, names: &Names, name: &str) -> bool {
        !self.inner.settings.dirs.is_empty()
            && crate::adapters::name::is_valid_segment(name)
            && !names.hidden.contains(name)
    }

    /// What a request gets.
    pub(super) fn served(
        &self,
        name: &str,
        revision: &Arc<str>,
        wanted: &Wanted,
        scale: f32,
        usable: Usable,
    ) -> ResolvedAdapter {
        let mut kept: Vec<Arc<dyn std::any::Any + Send + Sync>> = vec![usable.hold];
        kept.extend(usable.files.and_then(|files| files.guard));
        let wanted = Arc::new(wanted.clone());
        self.inner.contents.note_user(usable.prepared.content, &wanted);
        ResolvedAdapter {
            name: name.to_owned(),
            prepared: usable.prepared,
            source: wanted.source,
            revision: Arc::clone(revision),
            scale,
            wanted,
            hold: Hold::of(kept),
        }
    }

    /// How to get what `resolved` is.
    pub(super) fn wanted_of(&self, resolved: Arc<Resolved>, credential: &Credential, tenant: Tenant) -> Wanted {
        Wanted {
            identity: Arc::from(resolved.identity.as_str()),
            source: resolved.reference.source,
            from: From::Source(resolved),
            credential: credential.clone(),
            mac: self.inner.authoriser.mac(credential),
            tenant,
            is_explicit: false,
            needs_files: false,
        }
    }
}

pub(super) fn revision_of(wanted: &Wanted) -> Arc<str> {
    match &wanted.from {
        From::Source(resolved) => Arc::from(resolved.revision.as_str()),
        From::Merge(_) => Arc::from(""),
    }
}
