//! One download for an identity at a time: who runs, who joined, and which failures are still everybody's answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use secrecy::ExposeSecret;
use tokio::sync::{oneshot, watch};

use super::error::FetchError;
use super::progress::Counters;
use super::queue::{Permit, Waiter};
use super::{Outcome, Stored};
use crate::adapters::types::{Credential, SourceError};

/// Failures remembered; when there are more, the next ones are not shared.
const FAILURES_MAX: usize = 4096;
/// Identities whose last download was damaged.
const DAMAGED_MAX: usize = 4096;
/// How long a failure of this machine's disk is shared: it may be over once somebody unloads something.
const LOCAL_FAILURE_KEPT: Duration = Duration::from_secs(1);

/// Who asks: failures that depend on it are shared only with the same. Holds no secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asker {
    /// Keyed hash of the credential.
    credential: [u8; 32],
    pub(super) tenant: u64,
}

impl Asker {
    /// True if `error` came of who this is, and `other` may fare better.
    pub(super) fn fails_alone(&self, error: &FetchError, other: &Self) -> bool {
        match error {
            FetchError::Source(SourceError::Absent) => self.credential != other.credential,
            FetchError::Quota { .. } => self.tenant != other.tenant,
            _ => false,
        }
    }
}

/// What a caller waits for.
pub(super) struct Landing {
    pub(super) counters: Arc<Counters>,
    pub(super) outcome: watch::Receiver<Option<Outcome>>,
    pub(super) starter: Asker,
}

/// What a flight itself gets.
pub(super) struct Start {
    pub(super) permit: oneshot::Receiver<Permit>,
    pub(super) cancelled: watch::Receiver<bool>,
    pub(super) report: watch::Sender<Option<Outcome>>,
    pub(super) end: End,
}

/// For [`super::Fetcher::fetch`].
pub(super) enum Boarding {
    Stored(Stored),
    Flight(Landing),
}

/// For who starts flights.
pub(super) enum Boarded {
    Stored(Stored),
    Joined(Landing, Waiter),
    Started(Landing, Start),
}

/// Takes the flight out of the list, also when it ends by a panic.
pub(super) struct End {
    list: Arc<Mutex<List>>,
    /// `None` once it is out of the list: another flight may be in its place by now.
    identity: Option<Arc<str>>,
    starter: Asker,
}

impl Drop for End {
    fn drop(&mut self) {
        if let Some(identity) = self.identity.take() {
            lock(&self.list).running.remove(&identity);
        }
    }
}

struct Running {
    counters: Arc<Counters>,
    outcome: watch::Receiver<Option<Outcome>>,
    cancel: watch::Sender<bool>,
    waiter: Waiter,
    starter: Asker,
}

struct Failure {
    error: FetchError,
    starter: Asker,
    until: Instant,
}

#[derive(Default)]
struct List {
    running: HashMap<Arc<str>, Running>,
    failures: HashMap<Arc<str>, Failure>,
    damaged: HashMap<Arc<str>, ()>,
}

/// All flights of a fetcher.
pub(super) struct Flights {
    list: Arc<Mutex<List>>,
    /// Makes the hashes of credentials worthless outside of this process.
    key: [u8; 32],
}

impl Default for Flights {
    fn default() -> Self {
        let [first, second] = [uuid::Uuid::new_v4(), uuid::Uuid::new_v4()].map(uuid::Uuid::into_bytes);
        let mut key = [0; 32];
        key.iter_mut().zip(first.into_iter().chain(second)).for_each(|(to, from)| *to = from);
        Self { list: Arc::default(), key }
    }
}

impl Flights {
    pub(super) fn asker(&self, credential: &Credential, tenant: u64) -> Asker {
        let mut hash = blake3::Hasher::new_keyed(&self.key);
        match credential {
            Credential::Anonymous => hash.update(b"anonymous"),
            Credential::Server => hash.update(b"server"),
            Credential::Token(token) => hash.update(b"token:").update(token.expose_secret().as_bytes()),
        };
        Asker { credential: hash.finalize().into(), tenant }
    }

    /// The flight of `identity`, a shared failure, what `stored` has, or a new flight with what `enter` gives.
    ///
    /// `stored` is asked while no flight can land, so a caller never starts one for what has just arrived.
    pub(super) fn board(
        &self,
        identity: &str,
        asker: Asker,
        stored: impl FnOnce() -> Option<Stored>,
        enter: impl FnOnce() -> Result<(Waiter, oneshot::Receiver<Permit>), FetchError>,
    ) -> Result<Boarded, FetchError> {
        let mut list = lock(&self.list);
        if let Some(running) = list.running.get(identity) {
            let Running { counters, outcome, starter, waiter, .. } = running;
            let landing = Landing { counters: Arc::clone(counters), outcome: outcome.clone(), starter: *starter };
            return Ok(Boarded::Joined(landing, waiter.clone()));
        }
        if let Some(stored) = stored() {
            return Ok(Boarded::Stored(stored));
        }
        if let Some(failure) = list.failures.get(identity).filter(|failure| Instant::now() < failure.until)
            && !failure.starter.fails_alone(&failure.error, &asker)
        {
            return Err(failure.error.clone());
        }
        let identity: Arc<str> = identity.into();
        let (waiter, permit) = enter()?;
        let (report, outcome) = watch::channel(None);
        let (cancel, cancelled) = watch::channel(false);
        let counters = Arc::<Counters>::default();
        let running =
            Running { counters: Arc::clone(&counters), outcome: outcome.clone(), cancel, waiter, starter: asker };
        list.running.insert(Arc::clone(&identity), running);
        let end = End { list: Arc::clone(&self.list), identity: Some(identity), starter: asker };
        let landing = Landing { counters, outcome, starter: asker };
        Ok(Boarded::Started(landing, Start { permit, cancelled, report, end }))
    }

    /// The flight is over: its failure is shared for a while, and the next caller may start another. What to report.
    pub(super) fn finish(&self, identity: &str, mut end: End, outcome: Outcome, kept: Duration) -> Outcome {
        let mut list = lock(&self.list);
        let key: Arc<str> = identity.into();
        let outcome = match outcome {
            Err(FetchError::Corrupt { file, reason, .. }) => {
                let room = list.damaged.len() < DAMAGED_MAX;
                let again = list.damaged.contains_key(identity);
                if room {
                    list.damaged.insert(Arc::clone(&key), ());
                }
                Err(FetchError::Corrupt { file, reason, again })
            }
            other => other,
        };
        match &outcome {
            Ok(_) => {
                list.failures.remove(identity);
                list.damaged.remove(identity);
            }
            Err(error) => list.share(key, error, end.starter, kept),
        }
        list.running.remove(identity);
        end.identity = None;
        drop(list);
        outcome
    }

    /// Stops the flight of `identity` and waits until it is over.
    pub(super) async fn cancel(&self, identity: &str) {
        let mut outcome = {
            let mut list = lock(&self.list);
            list.failures.remove(identity);
            list.damaged.remove(identity);
            let Some(running) = list.running.get(identity) else { return };
            running.cancel.send_replace(true);
            running.outcome.clone()
        };
        let _ = outcome.wait_for(Option::is_some).await; // an error says that it is over too
    }

    pub(super) fn forgive(&self, identity: &str) {
        lock(&self.list).failures.remove(identity);
    }
}

impl List {
    fn share(&mut self, identity: Arc<str>, error: &FetchError, starter: Asker, kept: Duration) {
        let kept = match error {
            FetchError::Cancelled | FetchError::Busy { .. } => return,
            FetchError::DiskFull { .. } | FetchError::Quota { .. } | FetchError::Storage { .. } => {
                kept.min(LOCAL_FAILURE_KEPT)
            }
            FetchError::Source(_) | FetchError::TooLarge { .. } | FetchError::Corrupt { .. } => kept,
        };
        let now = Instant::now();
        if self.failures.len() >= FAILURES_MAX {
            self.failures.retain(|_, failure| now < failure.until);
        }
        if self.failures.len() < FAILURES_MAX {
            self.failures.insert(identity, Failure { error: error.clone(), starter, until: now + kept });
        }
    }
}

fn lock(list: &Mutex<List>) -> MutexGuard<'_, List> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}
