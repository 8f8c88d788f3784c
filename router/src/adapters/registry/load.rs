//! Registering names, giving them new content, taking them away.
//!
//! A load of a name runs beside what the name stands for: its source is asked, the bytes are fetched and prepared, and
//! then the name switches in one step. A failed one leaves the old content serving and is tried again by schedule.

use std::sync::Arc;

use tokio::sync::watch;

use super::contents::{Until, Usable, Wanted};
use super::names::{Entry, Key, Made, NAMES_MAX, Names, Next, Noted, Step, Version};
use super::resolve::{Found, revision_of};
use super::stage::Stage;
use super::*;
use crate::adapters::is_valid_name;
use crate::adapters::life::{EXPLICIT_EVERY, Retry, is_retryable};
use crate::engine::{ForgetMode, PinLevel};

/// What one load does.
#[derive(Clone)]
struct Job {
    key: Key,
    /// Of the entry.
    id: u64,
    /// Of the load.
    load: u64,
    reference: AdapterRef,
    credential: Credential,
    scale: Option<f32>,
    pin: Option<Option<PinLevel>>,
    keep: bool,
    stage: Arc<Stage>,
    /// The commit of the last run, for a name that comes back.
    commit: Option<String>,
    is_explicit: bool,
}

/// A load to be waited for.
type Begun = (Key, u64, watch::Receiver<Step>, Arc<Stage>);

impl Registry {
    /// Registers and loads. Waits for the outcome as long as `ask` says; the load goes on beyond that. A second identical
    /// load joins the first.
    ///
    /// # Errors
    /// `invalid_value` (name or scale), `name_is_base_model`, `adapter_exists`, `precondition_failed`, `adapter_loading`,
    /// or why the load failed.
    pub async fn load(&self, ask: LoadAsk) -> Result<AdapterView, AdapterFailure> {
        let (namespace, name) = (ask.namespace.clone(), ask.name.clone());
        let until = self.until(ask.wait);
        let (key, _, step, stage) = self.begin_load(ask)?;
        let outcome = self.wait_for_step(step, &stage, until).await;
        if outcome.as_ref().is_err_and(|failure| failure.code == "adapter_loading") {
            // Between two tries: the last failure says more.
            if let Some(noted) = self.names().get(&key.0, &key.1).and_then(|entry| entry.error.clone()) {
                let now = self.inner.clock.now();
                let left = noted.next_try.map(|at| at.saturating_sub(now).max(Duration::from_secs(1)));
                return Err(AdapterFailure {
                    retry_after: left,
                    state: Some(AdapterState::Failed.name()),
                    ..noted.failure
                });
            }
        }
        outcome?;
        let gone = || failure("adapter_load_failed", "service unavailable: it was unloaded while it was loaded".into());
        self.get(&namespace, &name).ok_or_else(gone)
    }

    fn begin_load(&self, ask: LoadAsk) -> Result<Begun, AdapterFailure> {
        self.check_name(&ask.name)?;
        if ask.scale.is_some_and(|scale| !(-8.0..=8.0).contains(&scale)) {
            return Err(failure("invalid_value", "`scale` must be a number in -8..8".into()));
        }
        let key: Key = (Arc::from(ask.namespace.as_str()), Arc::from(ask.name.as_str()));
        let mut names = self.names();
        let known = names.get(&key.0, &key.1).filter(|entry| entry.made != Made::Folder);
        check_conditions(&ask, known)?;
        if let Some(known) = known {
            let is_young = |noted: &&Noted| self.inner.clock.now() < noted.at + EXPLICIT_EVERY;
            if let Some(next) = known.next.as_ref().filter(|next| next.reference == ask.reference) {
                if known.error.as_ref().filter(is_young).is_none() {
                    next.wake();
                }
                return Ok((key, known.id, next.step.clone(), Arc::clone(&next.stage)));
            }
            if !ask.in_place && (known.current.is_some() || known.next.is_some() || known.error.is_none()) {
                let found = known.next.as_ref().map_or(&known.reference, |next| &next.reference);
                let message =
                    format!("the name `{}` is taken by {found}; load it in place, or unload it first", ask.name);
                return Err(failure("adapter_exists", message));
            }
            if let Some(noted) = known.error.as_ref().filter(is_young).filter(|noted| noted.reference == ask.reference)
            {
                let left = (noted.at + EXPLICIT_EVERY).saturating_sub(self.inner.clock.now());
                let retry_after = is_retryable(&noted.failure.code).then_some(left.max(Duration::from_secs(1)));
                return Err(AdapterFailure { retry_after, ..noted.failure.clone() });
            }
        } else {
            self.make_entry(&mut names, &key, &ask)?;
        }
        Ok(self.start(&mut names, &key, ask))
    }

    fn make_entry(&self, names: &mut Names, key: &Key, ask: &LoadAsk) -> Result<(), AdapterFailure> {
        if names.len() >= NAMES_MAX {
            return Err(failure("adapter_load_failed", format!("this server registers {NAMES_MAX} adapters at most")));
        }
        let id = names.new_id();
        let entry = Entry::new(id, ask.reference.clone(), self.inner.clock.unix_seconds());
        names.hidden.remove(&key.1);
        let was = names.insert(key, entry);
        if let Some(version) = was.and_then(|was| was.current) {
            self.inner.contents.release(&version.wanted.identity);
        }
        Ok(())
    }

    /// Begins the load of an entry that exists. What the name stands for stays.
    fn start(&self, names: &mut Names, key: &Key, ask: LoadAsk) -> Begun {
        let (load, stage) = (names.new_id(), Arc::new(Stage::default()));
        stage.set(AdapterState::Resolving);
        let (report, step) = watch::channel(Step::Trying);
        let id = names.get(&key.0, &key.1).map_or(0, |entry| entry.id);
        let job = Job {
            key: key.clone(),
            id,
            load,
            reference: ask.reference.clone(),
            credential: ask.credential,
            scale: ask.scale,
            pin: ask.pinned.map(|pinned| pinned.then_some(PinLevel::Host)),
            keep: ask.keep,
            stage: Arc::clone(&stage),
            commit: None,
            is_explicit: true,
        };
        self.drive(names, job, report, step.clone());
        (key.clone(), id, step, stage)
    }

    /// Loads a registered name once more, as it is registered.
    pub(super) fn load_again(&self, found: &Found) {
        let mut names = self.names();
        let Some(entry) = names.get(&found.key.0, &found.key.1).filter(|entry| entry.id == found.id) else { return };
        if entry.next.is_some() {
            return;
        }
        let is_hub = entry.reference.source == SourceKind::Hub;
        let commit = entry.current.as_ref().filter(|_| is_hub).map(|version| version.revision.to_string());
        let (reference, credential, stage) =
            (entry.reference.clone(), entry.credential.clone(), Arc::<Stage>::default());
        stage.set(AdapterState::Resolving);
        let (report, step) = watch::channel(Step::Trying);
        let (key, id) = (found.key.clone(), found.id);
        let job = Job {
            key,
            id,
            load: names.new_id(),
            reference,
            credential,
            scale: None,
            pin: None,
            keep: true,
            stage,
            commit,
            is_explicit: false,
        };
        self.drive(&mut names, job, report, step);
    }

    fn drive(&self, names: &mut Names, job: Job, report: watch::Sender<Step>, step: watch::Receiver<Step>) {
        let (registry, driven) = (self.clone(), job.clone());
        let report = Arc::new(report);
        let wakes = Arc::downgrade(&report);
        let driver = tokio::spawn(async move { registry.run(driven, report).await }).abort_handle();
        let next = Next {
            id: job.load,
            reference: job.reference,
            stage: job.stage,
            step,
            report: wakes,
            driver: Some(driver),
        };
        let before = names.update(&job.key, |entry| {
            entry.error = None;
            entry.next.replace(next)
        });
        if let Some(driver) = before.flatten().and_then(|before| before.driver) {
            driver.abort(); // those who wait for it look again
        }
    }

    /// Tries until it works, cannot work, or the name goes.
    async fn run(self, job: Job, report: Arc<watch::Sender<Step>>) {
        let mut retry = Retry::default();
        let mut is_explicit = job.is_explicit;
        loop {
            let failed = match self.attempt(&job, is_explicit).await {
                Ok((version, usable)) => {
                    let outcome = self.commit(&job, version, usable).await;
                    report.send_replace(Step::Done(outcome));
                    return;
                }
                Err(failed) => failed,
            };
            let clock = &self.inner.clock;
            let pause = retry.after_failure(&**clock, failed.retry_after);
            let is_over = !is_retryable(&failed.code) || (retry.is_open() && !job.keep);
            let (reference, why) = (&job.reference, failed.for_operators());
            tracing::warn!(adapter = &*job.key.1, %reference, code = failed.code, "adapter is not usable: {why}");
            let next_try = clock.now() + pause;
            if !self.note_failed(&job, &failed, (!is_over).then_some(next_try)) {
                return;
            }
            if is_over {
                report.send_replace(Step::Done(Err(failed)));
                return;
            }
            let mut woken = report.subscribe();
            report.send_replace(Step::Waiting(failed, next_try));
            is_explicit = tokio::select! {
                biased;
                _ = woken.wait_for(|step| matches!(step, Step::Trying)) => true,
                () = clock.sleep(pause) => false,
            };
            report.send_replace(Step::Trying);
        }
    }

    async fn attempt(&self, job: &Job, is_explicit: bool) -> Result<(Version, Usable), AdapterFailure> {
        job.stage.unfollow();
        job.stage.set(AdapterState::Resolving);
        let mut reference = job.reference.clone();
        if reference.revision.is_none() {
            reference.revision.clone_from(&job.commit);
        }
        let resolved = {
            let _permit = match self.inner.lookups.get(reference.source as usize) {
                Some(lookups) => lookups.acquire().await.ok(),
                None => None,
            };
            self.inner.authoriser.ask_anew(&reference, &job.credential).await
        };
        let resolved = self.explained(resolved, &reference, &job.credential, &job.key.1).await;
        let resolved =
            resolved.inspect_err(|failed| self.inner.contents.count_failure(reference.source, &failed.code))?;
        let mut wanted = self.wanted_of(resolved, &job.credential, 0.into());
        wanted.is_explicit = is_explicit;
        let usable = self.inner.contents.usable(&wanted, &job.stage, Until::AttemptEnds).await?;
        let version = Version { revision: revision_of(&wanted), facts: Arc::clone(&usable.prepared), wanted };
        Ok((version, usable))
    }

    /// The name switches. Its old content goes when the last request that runs under it ends.
    async fn commit(&self, job: &Job, version: Version, usable: Usable) -> Result<(), AdapterFailure> {
        let contents = &self.inner.contents;
        let wanted: Wanted = version.wanted.clone();
        contents.adopt(&wanted, &usable);
        let switched = {
            let mut names = self.names();
            let is_due = names
                .get(&job.key.0, &job.key.1)
                .is_some_and(|entry| entry.id == job.id && entry.next.as_ref().is_some_and(|next| next.id == job.load));
            let switch = |entry: &mut Entry| {
                entry.reference = job.reference.clone();
                entry.credential = job.credential.clone();
                entry.own_credential = matches!(job.credential, Credential::Token(_));
                entry.scale = job.scale.unwrap_or(entry.scale);
                entry.pin = job.pin.unwrap_or(entry.pin);
                entry.generation += 1;
                (entry.next, entry.error) = (None, None);
                entry.loaded_ms = Some(usable.loaded_ms);
                (entry.current.replace(version), entry.pin)
            };
            let switched = if is_due { names.update(&job.key, switch) } else { None };
            names.awaited.remove(&job.key);
            switched
        };
        let Some((before, pin)) = switched else {
            contents.release(&wanted.identity);
            return Err(failure(
                "adapter_load_failed",
                "service unavailable: it was unloaded while it was loaded".into(),
            ));
        };
        if let Some(before) = before {
            contents.release(&before.wanted.identity);
        }
        let pinned = match pin {
            Some(_) => self.pin_content(&wanted.identity, usable.prepared.content, pin).await,
            None => Ok(()),
        };
        self.write_adapter(&job.key).await.and(pinned)
    }

    /// False if the name, or this load of it, is gone.
    fn note_failed(&self, job: &Job, failed: &AdapterFailure, next_try: Option<Duration>) -> bool {
        let mut names = self.names();
        let Some(entry) = names.get(&job.key.0, &job.key.1).filter(|entry| entry.id == job.id) else { return false };
        if entry.next.as_ref().is_none_or(|next| next.id != job.load) {
            return false;
        }
        if next_try.is_none() && !job.keep && entry.current.is_none() {
            names.remove(&job.key);
            return true;
        }
        let at = self.inner.clock.now();
        names.update(&job.key, |entry| {
            let reference = job.reference.clone();
            entry.error = Some(Noted { failure: failed.clone(), reference, at, next_try });
            if next_try.is_none() {
                entry.next = None;
            }
        });
        true
    }

    /// Takes a name away. From its answer on no request resolves to what the name stood for.
    ///
    /// # Errors
    /// `model_not_found`; `disk_full` and its kin if that could not be written (the name is gone, but comes back with a
    /// restart).
    pub async fn unload(&self, ask: UnloadAsk) -> Result<AdapterView, AdapterFailure> {
        let mut view = self.get(&ask.namespace, &ask.name).ok_or_else(|| not_found(&ask.name))?;
        let key: Key = (Arc::from(ask.namespace.as_str()), Arc::from(ask.name.as_str()));
        let id = {
            let mut names = self.names();
            let entry = names.get(&key.0, &key.1).ok_or_else(|| not_found(&ask.name))?;
            let (id, hides) = (entry.id, key.0.is_empty() && !self.inner.settings.dirs.is_empty());
            if hides && names.hidden.len() < NAMES_MAX {
                names.hidden.insert(Arc::clone(&key.1));
            }
            id
        };
        let entry = self.take_away(&key, id).ok_or_else(|| not_found(&ask.name))?;
        if let Some(version) = &entry.current {
            let content = version.facts.content;
            let is_last = !self.names().is_named(&content);
            if is_last && entry.pin.is_some() {
                self.pin_files(&version.wanted.identity, false);
            }
            if is_last && ask.mode == ForgetMode::Now {
                self.inner.contents.forget_now(content);
            }
            let identity = &version.wanted.identity;
            if is_last
                && ask.purge
                && !self.inner.contents.is_known(identity)
                && let Some(supply) = &self.inner.supply
            {
                supply.files.forget(identity).await;
            }
        }
        view.state = AdapterState::Draining;
        self.write_adapter(&key).await?;
        Ok(view)
    }

    /// A name that an adapter or alias may have.
    pub(super) fn check_name(&self, name: &str) -> Result<(), AdapterFailure> {
        if self.inner.settings.base_names.iter().any(|base| base == name) {
            return Err(failure(
                "name_is_base_model",
                format!("`{name}` is the name of the base model; choose another"),
            ));
        }
        if !is_valid_name(name) {
            let message = "a name is letters, digits, `.`, `_` and `-`, with at most one `/`".to_owned();
            return Err(failure("invalid_value", message));
        }
        Ok(())
    }
}

fn check_conditions(ask: &LoadAsk, known: Option<&Entry>) -> Result<(), AdapterFailure> {
    let stale = |what: &str, found: String| {
        Err(failure("precondition_failed", format!("`{}` has {what} {found} now; read it again", ask.name)))
    };
    if let Some(expected) = ask.if_generation {
        let generation = known.map_or(0, |entry| entry.generation);
        if generation != expected {
            return stale("generation", generation.to_string());
        }
    }
    if let Some(expected) = &ask.if_content_id {
        let content = known.and_then(Entry::content).map(|content| view::hex(&content));
        let is_met = match &content {
            None => expected.is_empty(),
            Some(content) => expected.len() >= 8 && content.starts_with(&expected.to_ascii_lowercase()),
        };
        if !is_met {
            return stale("content", content.unwrap_or_else(|| "none".into()));
        }
    }
    Ok(())
}
