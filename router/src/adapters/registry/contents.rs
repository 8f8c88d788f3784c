//! Contents by identity: loaded once however many names and callers want them, tried again by schedule, forgotten when
//! nobody uses them. Who may use one is decided before anyone comes here.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use super::holds::Holds;
use super::merged_dir::MergedDirs;
use super::settings::{AdapterSettings, Files, FilesHere};
use super::stage::Stage;
use super::table::{Asker, Attempt, Content, Lease, Ready, Table};
use super::{AdapterState, failure};
use crate::adapters::authorise::Mac;
use crate::adapters::life::{Clock, EXPLICIT_EVERY, Retry, is_retryable};
use crate::adapters::{Credential, Origin, Resolved, SourceKind, Tenant};
use crate::engine::{AdapterFailure, ContentId, MergeAsk, PreparedAdapter, Tier};
use crate::http::Backend;
use crate::metrics::LoadTimes;
use crate::text::TextModel;

/// How long "not there" and other failures of a moment answer for the next requests.
const FAILURE_KEPT: Duration = Duration::from_secs(5);
/// The same for bytes that are wrong and cannot change: an identity means exact bytes.
const REFUSAL_KEPT: Duration = Duration::from_secs(300);
/// An engine that has not published a new content yet is not one that has forgotten it.
const SNAPSHOT_AGE: Duration = Duration::from_secs(1);

/// What is wanted, and how to get it.
#[derive(Clone)]
pub(super) struct Wanted {
    pub(super) identity: Arc<str>,
    pub(super) source: SourceKind,
    pub(super) from: From,
    pub(super) credential: Credential,
    /// Of the credential: what a source says to one is not told to another.
    pub(super) mac: Mac,
    pub(super) tenant: Tenant,
    /// Tries at once although the last attempt failed, if that was some time ago.
    pub(super) is_explicit: bool,
    /// The directory is needed, not just the content.
    pub(super) needs_files: bool,
}

impl Wanted {
    fn asker(&self) -> Asker {
        Asker { mac: self.mac, tenant: self.tenant.id }
    }

    /// For logs, which know an identity as little as people do.
    fn reference(&self) -> Option<String> {
        match &self.from {
            From::Source(resolved) => Some(resolved.reference.to_string()),
            From::Merge(_) => None,
        }
    }
}

impl std::fmt::Debug for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wanted").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl Wanted {
    /// Downloaded bytes that no hash of the source vouches for.
    pub(super) fn is_unverified(&self) -> bool {
        match &self.from {
            From::Source(resolved) => {
                matches!(&resolved.origin, Origin::Remote(files) if files.iter().any(|file| file.digest.is_none()))
            }
            From::Merge(_) => false,
        }
    }

    /// Of the last run: it says which bytes, but not where its source has them.
    pub(super) fn is_bare(&self) -> bool {
        match &self.from {
            From::Source(resolved) => matches!(&resolved.origin, Origin::Remote(files) if files.is_empty()),
            From::Merge(_) => false,
        }
    }
}

/// Where the bytes are.
#[derive(Clone)]
pub(super) enum From {
    Source(Arc<Resolved>),
    Merge(Arc<Merge>),
}

/// A merge, with what its parts need to stay.
pub(super) struct Merge {
    pub(super) ask: MergeAsk,
    pub(super) parts: Vec<Usable>,
}

/// A content that can be used now.
#[derive(Clone)]
pub(super) struct Usable {
    pub(super) prepared: Arc<PreparedAdapter>,
    pub(super) hold: Arc<Lease>,
    /// Absent when the bytes are in memory only.
    pub(super) files: Option<FilesHere>,
    pub(super) loaded_ms: u64,
}

/// How long somebody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Until this moment of the registry's clock, over as many attempts as fit.
    At(Duration),
    /// Until the attempt that runs, or is begun, has ended.
    AttemptEnds,
}

pub(super) type Outcome = Result<Usable, AdapterFailure>;

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(super) struct Contents {
    pub(super) shared: Arc<Shared>,
}

pub(super) struct Shared {
    pub(super) engine: Arc<dyn Backend>,
    pub(super) files: Option<Arc<dyn Files>>,
    pub(super) merges: Arc<MergedDirs>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) holds: Arc<Holds>,
    pub(super) prepares: Semaphore,
    /// What the tokens that an adapter adds are compared with.
    pub(super) tokenizer: Option<TextModel>,
    pub(super) times: LoadTimes,
    table: Mutex<Table>,
}

enum Look {
    Ready(Ready),
    Running { outcome: watch::Receiver<Option<Outcome>>, stage: Arc<Stage>, asker: Asker },
    Failed { failure: AdapterFailure, next_try: Option<Duration> },
}

impl Contents {
    pub(super) fn new(
        engine: Arc<dyn Backend>,
        files: Option<Arc<dyn Files>>,
        merges: Arc<MergedDirs>,
        clock: Arc<dyn Clock>,
        settings: &AdapterSettings,
    ) -> Self {
        let (holds, prepares) = (Holds::new(Arc::clone(&engine)), Semaphore::new(settings.loads_max.max(1)));
        Self {
            shared: Arc::new(Shared {
                engine,
                files,
                merges,
                clock,
                holds,
                prepares,
                tokenizer: settings.tokenizer.clone(),
                times: LoadTimes::default(),
                table: Mutex::default(),
            }),
        }
    }

    /// The content, loaded if it is not. Retries by schedule go on while somebody waits.
    ///
    /// # Errors
    /// `adapter_loading` when the wait is over; `adapter_load_failed` and its kin when the next try is later than that; what is wrong
    /// with the bytes.
    pub(super) async fn usable(&self, wanted: &Wanted, stage: &Arc<Stage>, until: Until) -> Outcome {
        loop {
            match self.look(wanted, stage)? {
                Look::Ready(ready) => match self.files_of_ready(wanted, &ready) {
                    Some(files) => return Ok(ready.usable(files)),
                    None => self.not_ready_any_more(&wanted.identity, &ready),
                },
                Look::Running { outcome, stage, asker } => match self.wait(outcome, &stage, until).await {
                    // The answer to another credential or tenant: ask with this one.
                    Err(failure) if asker.fails_alone(&failure, &wanted.asker()) => {}
                    // It was the attempt of somebody who knows no source.
                    Err(failure) if failure.state == Some(NO_SOURCE) && !wanted.is_bare() => {}
                    Err(failure) if is_retryable(&failure.code) && failure.state == Some(RETRY) => {}
                    outcome => return outcome,
                },
                Look::Failed { failure, next_try: None } => return Err(failure),
                Look::Failed { mut failure, next_try: Some(at) } => {
                    let now = self.shared.clock.now();
                    if !matches!(until, Until::At(until) if at <= until) {
                        failure.retry_after = Some(at.saturating_sub(now).max(Duration::from_secs(1)));
                        failure.state = Some(AdapterState::Failed.name());
                        return Err(failure);
                    }
                    self.shared.clock.sleep(at.saturating_sub(now)).await;
                }
            }
        }
    }

    async fn wait(&self, mut outcome: watch::Receiver<Option<Outcome>>, stage: &Stage, until: Until) -> Outcome {
        let given_up =
            || failure("adapter_load_failed", "service unavailable: the load was given up; try again".into());
        let clock = &self.shared.clock;
        let done = if let Until::At(until) = until {
            let left = until.saturating_sub(clock.now());
            tokio::select! {
                biased;
                done = outcome.wait_for(Option::is_some) => done,
                () = clock.sleep(left) => return Err(still_loading(stage.state())),
            }
        } else {
            outcome.wait_for(Option::is_some).await
        };
        done.map_err(|_| given_up())?.clone().unwrap_or_else(|| Err(given_up()))
    }

    /// What there is now; begins an attempt if there is nothing.
    fn look(&self, wanted: &Wanted, stage: &Arc<Stage>) -> Result<Look, AdapterFailure> {
        let now = self.shared.clock.now();
        let mut table = self.table();
        let content = table.entry(wanted, now)?;
        content.used = now;
        if let Some(ready) = &content.ready {
            return Ok(Look::Ready(ready.clone()));
        }
        match &content.attempt {
            // `has_changed` is an error when the attempt died without a word.
            Attempt::Running { outcome, stage: theirs, asker } if outcome.has_changed().is_ok() => {
                stage.follow(theirs);
                return Ok(Look::Running { outcome: outcome.clone(), stage: Arc::clone(theirs), asker: *asker });
            }
            Attempt::Failed { failure, at, until, asker } => {
                let is_told = !asker.fails_alone(failure, &wanted.asker());
                let is_forced = wanted.is_explicit && now >= *at + EXPLICIT_EVERY;
                if now < *until && is_told && !is_forced {
                    let next_try = is_retryable(&failure.code).then_some(*until);
                    return Ok(Look::Failed { failure: failure.clone(), next_try });
                }
            }
            _ => {}
        }
        let (report, outcome) = watch::channel(None);
        let mine = Arc::new(Stage::default());
        mine.set(AdapterState::Fetching);
        stage.follow(&mine);
        content.attempt =
            Attempt::Running { outcome: outcome.clone(), stage: Arc::clone(&mine), asker: wanted.asker() };
        let asker = wanted.asker();
        let (contents, wanted, theirs) = (self.clone(), wanted.clone(), Arc::clone(&mine));
        tokio::spawn(async move { contents.attempt(wanted, theirs, report).await });
        Ok(Look::Running { outcome, stage: mine, asker })
    }

    /// One attempt. Runs to its end whoever waits.
    async fn attempt(self, wanted: Wanted, stage: Arc<Stage>, report: watch::Sender<Option<Outcome>>) {
        let started = self.shared.clock.now();
        let outcome = self.load(&wanted, &stage).await;
        let took = self.shared.clock.now().saturating_sub(started);
        let loaded_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        tracing::info!(
            identity = &*wanted.identity,
            ok = outcome.is_ok(),
            reference = wanted.reference(),
            code = outcome.as_ref().err().map(|failure| failure.code.as_str()),
            why = outcome.as_ref().err().map(AdapterFailure::for_operators),
            ms = loaded_ms,
            "adapter loaded"
        );
        let outcome = outcome.map(|(prepared, hold, files)| Usable { prepared, hold, files: Some(files), loaded_ms });
        let outcome = self.note(&wanted, outcome);
        report.send_replace(Some(outcome));
    }

    /// Writes down how an attempt ended, and what those who wait are told.
    fn note(&self, wanted: &Wanted, outcome: Outcome) -> Outcome {
        let (clock, now) = (&*self.shared.clock, self.shared.clock.now());
        let mut guard = self.table();
        let table = &mut *guard;
        if let Err(failure) = &outcome
            && failure.state != Some(NO_SOURCE)
        {
            *table.failures.entry((wanted.source, failure.code.clone())).or_default() += 1;
        }
        // Forgotten while it was loaded: those who waited may use it, nobody else knows it.
        let Some(content) = table.by_identity.get_mut(&wanted.identity) else { return outcome };
        match outcome {
            Ok(usable) => {
                let (prepared, hold) = (Arc::clone(&usable.prepared), Arc::clone(&usable.hold));
                content.ready = Some(Ready { prepared, hold, at: now, loaded_ms: usable.loaded_ms });
                content.attempt = Attempt::None;
                content.retry = Retry::default();
                Ok(usable)
            }
            // The next one may know where to fetch it from.
            Err(failure) if failure.state == Some(NO_SOURCE) => {
                content.attempt = Attempt::None;
                Err(failure)
            }
            Err(mut failure) => {
                let kept = match failure.code.as_str() {
                    // One tenant's, or one token's: it says nothing of the source, so nobody else waits longer for it.
                    "quota_exceeded" => FAILURE_KEPT,
                    code if is_retryable(code) && matches!(wanted.credential, Credential::Token(_)) => {
                        Retry::default().after_failure(clock, failure.retry_after)
                    }
                    code if is_retryable(code) => content.retry.after_failure(clock, failure.retry_after),
                    "model_not_found" => FAILURE_KEPT,
                    _ if matches!(&wanted.from, From::Source(resolved) if matches!(resolved.origin, Origin::Directory(_))) => {
                        FAILURE_KEPT
                    }
                    _ => REFUSAL_KEPT,
                };
                content.attempt =
                    Attempt::Failed { failure: failure.clone(), at: now, until: now + kept, asker: wanted.asker() };
                failure.state = Some(if is_retryable(&failure.code) { RETRY } else { AdapterState::Failed.name() });
                Err(failure)
            }
        }
    }

    /// The files of a content that was loaded before: `Some(None)` if it can do without, `None` if it has to be loaded
    /// again because they were evicted or the engine does not know it any more.
    fn files_of_ready(&self, wanted: &Wanted, ready: &Ready) -> Option<Option<FilesHere>> {
        let shared = &self.shared;
        let status = shared.engine.status();
        let engine = status.contents.get(&ready.prepared.content);
        let is_old = shared.clock.now().saturating_sub(ready.at) > SNAPSHOT_AGE;
        if is_old && engine.is_none() && !status.contents.is_empty() {
            return None;
        }
        let files = match &wanted.from {
            From::Source(resolved) => match &resolved.origin {
                Origin::Directory(dir) => Some(FilesHere { dir: dir.clone(), guard: None }),
                Origin::Remote(_) => shared.files.as_ref().and_then(|files| files.here(&wanted.identity)),
            },
            From::Merge(merge) => Some(FilesHere { dir: merge.ask.out_dir.clone(), guard: None }),
        };
        let in_memory = engine.is_some_and(|content| content.tier > Tier::Disk);
        (files.is_some() || (in_memory && !wanted.needs_files)).then_some(files)
    }

    fn not_ready_any_more(&self, identity: &str, seen: &Ready) {
        let mut table = self.table();
        let Some(content) = table.by_identity.get_mut(identity) else { return };
        if content.ready.as_ref().is_some_and(|ready| Arc::ptr_eq(&ready.hold, &seen.hold) && ready.at == seen.at) {
            content.ready = None;
        }
    }

    /// One more name stands for it.
    pub(super) fn adopt(&self, wanted: &Wanted, usable: &Usable) {
        let now = self.shared.clock.now();
        let mut guard = self.table();
        let table = &mut *guard;
        let content = table.by_identity.entry(Arc::clone(&wanted.identity)).or_insert_with(|| {
            table.unnamed += 1;
            Content::new(wanted.source, now)
        });
        if content.names == 0 {
            table.unnamed -= 1;
        }
        content.names += 1;
        if content.ready.is_none() && matches!(content.attempt, Attempt::None) {
            let (prepared, hold) = (Arc::clone(&usable.prepared), Arc::clone(&usable.hold));
            content.ready = Some(Ready { prepared, hold, at: now, loaded_ms: usable.loaded_ms });
        }
    }

    /// The same for a content of the last run, which nobody has loaded yet.
    pub(super) fn adopt_unloaded(&self, identity: &Arc<str>, source: SourceKind) {
        let now = self.shared.clock.now();
        let mut table = self.table();
        // Before any request: nothing is without a name yet.
        table.by_identity.entry(Arc::clone(identity)).or_insert_with(|| Content::new(source, now)).names += 1;
    }

    /// One name less. The last one takes the content with it: it is loaded again if somebody else wants it. True if it
    /// was the last.
    pub(super) fn release(&self, identity: &str) -> bool {
        let mut guard = self.table();
        let table = &mut *guard;
        let Some(content) = table.by_identity.get_mut(identity) else { return false };
        content.names = content.names.saturating_sub(1);
        if content.names > 0 {
            return false;
        }
        let gone = table.by_identity.remove(identity);
        drop(guard);
        drop(gone); // lets go of its content, which speaks to the engine
        true
    }

    /// Ends the requests that run under a content, unless something else stands for it.
    pub(super) fn forget_now(&self, content: ContentId) {
        let is_wanted = {
            let table = self.table();
            table.by_identity.values().any(|known| known.ready.as_ref().is_some_and(|r| r.prepared.content == content))
        };
        if !is_wanted {
            self.shared.holds.forget_now(content);
        }
    }

    /// True if it is loaded, or being loaded.
    pub(super) fn is_known(&self, identity: &str) -> bool {
        self.table().by_identity.contains_key(identity)
    }

    /// States of the attempts that run.
    pub(super) fn running(&self) -> Vec<AdapterState> {
        let table = self.table();
        let state = |content: &Content| match &content.attempt {
            Attempt::Running { stage, .. } => Some(stage.state()),
            _ => None,
        };
        table.by_identity.values().filter_map(state).collect()
    }

    /// A source that did not say where the bytes are.
    pub(super) fn count_failure(&self, source: SourceKind, code: &str) {
        *self.table().failures.entry((source, code.to_owned())).or_default() += 1;
    }

    /// Failed attempts by source and code.
    pub(super) fn times(&self) -> &LoadTimes {
        &self.shared.times
    }

    pub(super) fn failures(&self) -> Vec<(SourceKind, String, u64)> {
        let table = self.table();
        let mut all: Vec<_> = table.failures.iter().map(|((source, code), n)| (*source, code.clone(), *n)).collect();
        all.sort();
        all
    }

    /// A request runs under it. Should its files be missing one day, this says how to get them again, as long as the request
    /// lives: a caller's token is not kept longer.
    pub(super) fn note_user(&self, content: ContentId, wanted: &Arc<Wanted>) {
        let mut guard = self.table();
        let table = &mut *guard;
        if table.users.len() > 64 + 2 * table.by_identity.len() {
            table.users.retain(|_, users| users.iter().any(|user| user.strong_count() > 0));
        }
        let users = table.users.entry(content).or_default();
        if users.len() == users.capacity() {
            users.retain(|user| user.strong_count() > 0); // before it grows: it stays as long as the requests are many
        }
        users.push(Arc::downgrade(wanted));
    }

    /// The requests that run under a content, one for each identity, and what kept it until now. Whoever asks for it from
    /// now on has it prepared again.
    pub(super) fn doubt(&self, content: ContentId) -> (Vec<Arc<Wanted>>, Vec<Arc<Lease>>) {
        let mut guard = self.table();
        let table = &mut *guard;
        let is_it = |ready: &mut Ready| ready.prepared.content == content;
        let known = table.by_identity.values_mut().filter_map(|known| known.ready.take_if(is_it));
        let leases = known.map(|ready| ready.hold).collect();
        let users = table.users.get(&content).into_iter().flatten().filter_map(std::sync::Weak::upgrade);
        let users: std::collections::BTreeMap<_, _> = users.map(|user| (Arc::clone(&user.identity), user)).collect();
        (users.into_values().collect(), leases)
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Marks a failure after which there will be another try.
const RETRY: &str = "retrying";
/// Marks the failure of a [`Wanted`] that is bare, and whose files are not here any more.
pub(super) const NO_SOURCE: &str = "registered";

fn still_loading(state: AdapterState) -> AdapterFailure {
    AdapterFailure {
        retry_after: Some(Duration::from_secs(1)),
        state: Some(state.name()),
        ..failure(
            "adapter_loading",
            format!("it is still loading (state `{}`); the load goes on, try again", state.name()),
        )
    }
}
