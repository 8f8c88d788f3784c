//! Downloads: from a source into the store, once however many ask.
//!
//! 1. [`Fetcher::fetch`] looks into the store, then joins the *flight* of the identity (`flights.rs`), or starts it.
//! 2. A flight is a thread of control of its own: callers come and go, it runs to its end. Only [`Fetcher::forget`] stops it.
//! 3. It waits for its turn (`queue.rs`), reserves room, receives both files at once (`file.rs`, `writer.rs`), compares
//!    sizes and hashes, and publishes.
//! 4. A short hiccup is bridged inside the flight. Other failures are everybody's answer for a few seconds; when to try
//!    again is the registry's to say.

mod error;
mod file;
mod flights;
mod limits;
mod progress;
mod queue;
#[cfg(test)]
mod tests;
mod writer;

use std::sync::Arc;

use tokio::sync::watch;

pub use error::FetchError;
pub use limits::{FetchLimits, Tenant};
pub use progress::{Phase, Progress, ProgressNow};

use super::store::{Download, FileRecord, Store, Stored};
use super::types::{Credential, FileName, Origin, RemoteFile, Resolved, Source, SourceError};
use file::{Arrival, Job};
use flights::{Asker, Boarding, Flights};
use progress::Counters;
use queue::Queue;
use writer::Writer;

/// How often a caller joins a flight that fails for a reason of somebody else's, before it gives up.
const JOINS_MAX: usize = 4;

/// What a flight ends with.
type Outcome = Result<Stored, FetchError>;

/// Brings adapters into the store. Cheap to clone.
#[derive(Clone)]
pub struct Fetcher {
    inner: Arc<Inner>,
}

struct Inner {
    source: Arc<dyn Source>,
    store: Arc<Store>,
    limits: FetchLimits,
    queue: Arc<Queue>,
    flights: Flights,
}

/// Where downloads stand, for the admin API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchStatus {
    /// Downloads that have their turn.
    pub running: usize,
    /// Places taken in the queue.
    pub waiting: usize,
}

impl Fetcher {
    /// Downloads from `source` into `store`.
    pub fn new(source: Arc<dyn Source>, store: Arc<Store>, limits: FetchLimits) -> Self {
        let queue = Queue::new(limits.clone());
        Self { inner: Arc::new(Inner { source, store, limits, queue, flights: Flights::default() }) }
    }

    /// The files of `resolved` in the store: from there, or by one download that all callers share. That `credential` may
    /// have them was settled when it resolved the reference.
    ///
    /// # Errors
    /// See [`FetchError`]. A reference to a directory of this machine is an error: it is read where it lies.
    pub async fn fetch(
        &self,
        resolved: &Resolved,
        credential: &Credential,
        who: impl Into<Tenant>,
        progress: &Progress,
    ) -> Result<Stored, FetchError> {
        let who = who.into();
        let files = planned(resolved)?;
        check_sizes(&files, &self.inner.limits)?;
        check_quota(&files, self.inner.store.status().quota_bytes)?;
        let asker = self.inner.flights.asker(credential, who.id);
        let mut last = FetchError::Cancelled;
        for _ in 0..JOINS_MAX {
            let mut landing = match self.board(resolved, &files, credential, who, asker)? {
                Boarding::Stored(stored) => {
                    progress.follow(&Counters::stored(stored.bytes));
                    return Ok(stored);
                }
                Boarding::Flight(landing) => landing,
            };
            progress.follow(&landing.counters);
            let outcome = landing.outcome.wait_for(Option::is_some).await;
            let outcome = outcome.ok().and_then(|outcome| outcome.clone()).unwrap_or(Err(FetchError::Cancelled));
            match outcome {
                // The one who started it was refused; we were not.
                Err(error) if landing.starter.fails_alone(&error, &asker) => last = error,
                outcome => return outcome,
            }
        }
        Err(match last {
            FetchError::Source(SourceError::Absent) => {
                SourceError::retryable("other callers' downloads of this adapter were refused; try again").into()
            }
            other => other,
        })
    }

    /// Ends a running download of `identity`, drops its files and what is known of it. Bytes that this frees, at once or when
    /// the last holder leaves.
    pub async fn forget(&self, identity: &str) -> u64 {
        self.inner.flights.cancel(identity).await;
        let freed = self.inner.store.forget(identity);
        let store = Arc::clone(&self.inner.store);
        let _ = tokio::task::spawn_blocking(move || store.sweep()).await; // a panic is logged where it happens
        freed
    }

    /// True if the stored files of `identity` are still what was downloaded; to be asked when the shard cannot read them, or
    /// reads another content than [`Store::expected_content`]. Damaged files are gone afterwards: the next fetch downloads them
    /// again.
    pub async fn verify(&self, identity: &str) -> bool {
        let (store, identity) = (Arc::clone(&self.inner.store), identity.to_owned());
        tokio::task::spawn_blocking(move || store.verify(&identity)).await.unwrap_or(false)
    }

    /// Forgets a shared failure of `identity`, so that the next fetch asks the source.
    pub fn forgive(&self, identity: &str) {
        self.inner.flights.forgive(identity);
    }

    /// Where downloads stand.
    pub fn status(&self) -> FetchStatus {
        let (running, waiting) = self.inner.queue.counts();
        FetchStatus { running, waiting }
    }

    /// The store's answer, the running flight, or a new one.
    fn board(
        &self,
        resolved: &Resolved,
        files: &[RemoteFile; 2],
        credential: &Credential,
        who: Tenant,
        asker: Asker,
    ) -> Result<Boarding, FetchError> {
        let inner = &self.inner;
        let line = (who.id, resolved.reference.source);
        let boarding = inner.flights.board(
            &resolved.identity,
            asker,
            || inner.store.get(&resolved.identity),
            || inner.queue.enter(line).map_err(|waiting| FetchError::Busy { waiting }),
        )?;
        let (landing, start) = match boarding {
            flights::Boarded::Stored(stored) => return Ok(Boarding::Stored(stored)),
            flights::Boarded::Joined(landing, waiter) => {
                if landing.starter.tenant != who.id {
                    inner.queue.also(line, &waiter); // so that it need not wait behind the starter's backlog
                }
                return Ok(Boarding::Flight(landing));
            }
            flights::Boarded::Started(landing, start) => (landing, start),
        };
        let flight = Flight {
            inner: Arc::clone(inner),
            resolved: resolved.clone(),
            files: files.clone(),
            credential: credential.clone(),
            who,
            counters: Arc::clone(&landing.counters),
        };
        tokio::spawn(flight.run(start));
        Ok(Boarding::Flight(landing))
    }
}

/// One download, from its place in line to its outcome.
struct Flight {
    inner: Arc<Inner>,
    resolved: Resolved,
    files: [RemoteFile; 2],
    credential: Credential,
    who: Tenant,
    counters: Arc<Counters>,
}

impl Flight {
    async fn run(self, start: flights::Start) {
        let flights::Start { permit, cancelled, report, end } = start;
        self.counters.set_total(self.files.iter().map(|file| file.bytes).sum());
        self.counters.set_phase(Phase::Queued);
        let mut cancel = cancelled.clone();
        let permit = tokio::select! {
            permit = permit => permit.ok(),
            () = is_cancelled(&mut cancel) => None,
        };
        let outcome = if permit.is_some() { self.download(cancelled).await } else { Err(FetchError::Cancelled) };
        drop(permit);
        let outcome = self.inner.flights.finish(&self.resolved.identity, end, outcome, self.inner.limits.failure_kept);
        if let Err(error) = &outcome {
            tracing::warn!(
                identity = self.resolved.identity,
                code = error.code(),
                "adapter was not downloaded: {error}"
            );
        }
        report.send_replace(Some(outcome));
    }

    async fn download(&self, cancelled: watch::Receiver<bool>) -> Outcome {
        let (store, identity, files) =
            (Arc::clone(&self.inner.store), self.resolved.identity.clone(), self.files.clone());
        let who = self.who;
        self.counters.set_phase(Phase::Fetching);
        let download = blocking(move || store.begin(&identity, who, &files)).await?;
        let download = Arc::new(download);
        let outcome = self.receive(&download, cancelled).await;
        let Some(download) = Arc::into_inner(download) else {
            return Err(FetchError::Storage { reason: "a writing thread outlived its download".into() });
        };
        match outcome {
            Ok(files) => {
                self.counters.set_phase(Phase::Verifying);
                let stored = blocking(move || download.publish(files)).await?;
                self.counters.set_phase(Phase::Stored);
                Ok(stored)
            }
            Err(error) => {
                let keep = matches!(error, FetchError::Source(SourceError::Retryable { .. }));
                // Dropping it removes the files and gives back the room.
                let end = move || if keep { download.keep() } else { drop(download) };
                let _ = tokio::task::spawn_blocking(end).await;
                Err(error)
            }
        }
    }

    /// Both files at once. No thread writes any more when this returns.
    async fn receive(
        &self,
        download: &Arc<Download>,
        mut cancelled: watch::Receiver<bool>,
    ) -> Result<[FileRecord; 2], FetchError> {
        let mut writers = self.files.each_ref().map(|file| {
            let (download, file) = (Arc::clone(download), file.clone());
            Writer::start(move || download.open(&file))
        });
        let recorded = self.inner.store.recorded(&self.resolved.identity);
        let job = |file| Job {
            source: &*self.inner.source,
            limits: &self.inner.limits,
            resolved: &self.resolved,
            credential: &self.credential,
            counters: &self.counters,
            file,
            recorded: recorded.and_then(|files| files.into_iter().find(|known| known.name == file.name)),
        };
        let outcome = {
            let [config, weights] = &self.files;
            let [config_writer, weights_writer] = &mut writers;
            let start = [download.start(config.name), download.start(weights.name)];
            self.counters.add_done(start.iter().sum());
            let [config_start, weights_start] = start;
            let both = futures_util::future::try_join(
                Arrival::new(job(config), config_writer, config_start).run(),
                Arrival::new(job(weights), weights_writer, weights_start).run(),
            );
            tokio::select! {
                outcome = both => outcome,
                () = is_cancelled(&mut cancelled) => Err(FetchError::Cancelled),
            }
        };
        for writer in writers {
            writer.close().await;
        }
        outcome.map(|(config, weights)| [config, weights])
    }
}

/// Returns once `cancelled` is true; never when nobody can set it any more.
async fn is_cancelled(cancelled: &mut watch::Receiver<bool>) {
    if cancelled.wait_for(|cancelled| *cancelled).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Runs `work` on a thread that may wait for the disk.
async fn blocking<T: Send + 'static, E: Into<FetchError> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, FetchError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome.map_err(Into::into),
        Err(_) => Err(FetchError::Storage { reason: "a thread that waits for the disk ended early".into() }),
    }
}

/// The two files, in the order they are hashed.
fn planned(resolved: &Resolved) -> Result<[RemoteFile; 2], FetchError> {
    let Origin::Remote(files) = &resolved.origin else {
        let message = "a directory of this machine is read where it lies, not downloaded";
        return Err(SourceError::permanent("adapter_invalid", message).into());
    };
    let find = |name: FileName| {
        let message = || format!("the source has no {}", name.as_str());
        let file = files.iter().find(|file| file.name == name).cloned();
        file.ok_or_else(|| SourceError::permanent("adapter_invalid", message()))
    };
    let [config, weights] = FileName::ALL;
    Ok([find(config)?, find(weights)?])
}

/// What can never fit is refused at once; waiting is for room that may come free.
fn check_quota(files: &[RemoteFile; 2], limit_bytes: u64) -> Result<(), FetchError> {
    let bytes: u64 = files.iter().map(|file| file.bytes).fold(0, u64::saturating_add);
    if bytes <= limit_bytes {
        return Ok(());
    }
    let flag = "the whole quota, --adapter-disk-quota";
    Err(FetchError::TooLarge { file: FileName::Weights, bytes, limit_bytes, flag })
}

/// Before anything is asked for. What arrives is counted against the same sizes.
fn check_sizes(files: &[RemoteFile; 2], limits: &FetchLimits) -> Result<(), FetchError> {
    for file in files {
        let (limit_bytes, flag) = match file.name {
            FileName::Config => (limits.config_bytes_max, "fixed"),
            FileName::Weights => (limits.weights_bytes_max, "--adapter-max-bytes"),
        };
        if file.bytes > limit_bytes {
            return Err(FetchError::TooLarge { file: file.name, bytes: file.bytes, limit_bytes, flag });
        }
    }
    Ok(())
}
