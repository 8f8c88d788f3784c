//! One file of a download: received, counted, compared with every promise about it.

use std::time::Duration;

use futures_util::StreamExt;

use super::error::FetchError;
use super::limits::FetchLimits;
use super::progress::{Counters, Phase};
use super::writer::Writer;
use crate::adapters::store::{FileRecord, Written};
use crate::adapters::types::{ByteStream, Credential, RemoteFile, Resolved, Source, SourceError};

/// A source that asks for a longer pause than this is not waited for inside a fetch.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long a source may take to end a body whose bytes are all here. More bytes in it mean that its size was a lie.
const END_WAIT: Duration = Duration::from_millis(500);

/// What a file's download needs to know.
pub(super) struct Job<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) limits: &'a FetchLimits,
    pub(super) resolved: &'a Resolved,
    pub(super) credential: &'a Credential,
    pub(super) counters: &'a Counters,
    pub(super) file: &'a RemoteFile,
    /// What the same identity gave earlier.
    pub(super) recorded: Option<FileRecord>,
}

/// One file on its way.
pub(super) struct Arrival<'a> {
    job: Job<'a>,
    writer: &'a mut Writer,
    done: u64,
    tries_left: u32,
}

/// Why a file is not here yet.
enum Flaw {
    /// No byte was wrong.
    Failed(FetchError),
    /// The bytes so far cannot be the file; the reason.
    Wrong(String),
}

impl<E: Into<FetchError>> From<E> for Flaw {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl<'a> Arrival<'a> {
    /// The first `done` bytes are with the writer already.
    pub(super) fn new(job: Job<'a>, writer: &'a mut Writer, done: u64) -> Self {
        let tries_left = job.limits.retries;
        Self { job, writer, done, tries_left }
    }

    /// Receives the file. Wrong bytes are thrown away and asked for once more, from the start.
    pub(super) async fn run(mut self) -> Result<FileRecord, FetchError> {
        let mut is_second = false;
        loop {
            match self.receive_and_check().await {
                Ok(record) => return Ok(record),
                Err(Flaw::Failed(error)) => return Err(error),
                Err(Flaw::Wrong(reason)) if is_second => {
                    return Err(FetchError::Corrupt { file: self.job.file.name, reason, again: false });
                }
                Err(Flaw::Wrong(reason)) => {
                    let identity = &self.job.resolved.identity;
                    tracing::warn!(identity, file = self.job.file.name.as_str(), "wrong bytes, once again: {reason}");
                    self.restart().await?;
                    is_second = true;
                }
            }
        }
    }

    async fn receive_and_check(&mut self) -> Result<FileRecord, Flaw> {
        while self.done < self.job.file.bytes {
            match self.receive().await {
                Ok(()) => {}
                Err(Flaw::Failed(error)) if self.tries_left > 0 && is_hiccup(&error) => {
                    self.tries_left -= 1;
                    tokio::time::sleep(jittered(self.job.limits.retry_pause)).await;
                }
                Err(flaw) => return Err(flaw),
            }
        }
        let written = self.writer.finish().await?;
        self.check(&written)?;
        Ok(written.record)
    }

    /// One connection's worth of bytes.
    async fn receive(&mut self) -> Result<(), Flaw> {
        let total = self.job.file.bytes;
        let mut stream = self.open().await?;
        while self.done < total {
            let Some(chunk) = stream.next().await else {
                let message = format!("the source ended {} after {} of {total} bytes", self.name(), self.done);
                return Err(SourceError::retryable(message).into());
            };
            let chunk = chunk?;
            let bytes = chunk.len() as u64;
            if bytes > total - self.done {
                return Err(self.overlong());
            }
            self.writer.write(chunk).await?;
            self.done += bytes;
            self.job.counters.add_done(bytes);
        }
        match tokio::time::timeout(END_WAIT, stream.next()).await {
            Ok(Some(Ok(more))) if !more.is_empty() => Err(self.overlong()),
            _ => Ok(()),
        }
    }

    /// The bytes from where we are; from the start, where the source cannot begin there.
    async fn open(&mut self) -> Result<ByteStream, Flaw> {
        let Job { source, resolved, file, credential, .. } = self.job;
        if self.done > 0 && file.digest.is_none() && file.etag.is_none() {
            self.restart().await?; // nothing would tell that the rest belongs to this beginning
        }
        match source.open(resolved, file, self.done, credential).await {
            Err(SourceError::Retryable { retry_after: None, .. }) if self.done > 0 => {
                // An outage looks the same. Then this fails too, and what we have is kept.
                let stream = source.open(resolved, file, 0, credential).await?;
                self.restart().await?;
                Ok(stream)
            }
            opened => Ok(opened?),
        }
    }

    async fn restart(&mut self) -> Result<(), FetchError> {
        self.writer.restart().await?;
        self.job.counters.take_back(self.done);
        self.job.counters.set_phase(Phase::Fetching);
        self.done = 0;
        Ok(())
    }

    fn check(&self, written: &Written) -> Result<(), Flaw> {
        if self.job.file.digest.is_some() && written.digest != self.job.file.digest {
            return Err(Flaw::Wrong("its hash is not the one that the source promised".into()));
        }
        if self.job.recorded.is_some_and(|recorded| recorded != written.record) {
            return Err(Flaw::Wrong("the same revision had other bytes when it was downloaded before".into()));
        }
        Ok(())
    }

    fn overlong(&self) -> Flaw {
        Flaw::Wrong(format!("the source sends more than the {} bytes that it declared", self.job.file.bytes))
    }

    fn name(&self) -> &'static str {
        self.job.file.name.as_str()
    }
}

/// Worth a second try within this fetch.
fn is_hiccup(error: &FetchError) -> bool {
    match error {
        FetchError::Source(SourceError::Retryable { retry_after, .. }) => {
            retry_after.is_none_or(|pause| pause <= PAUSE_MAX)
        }
        _ => false,
    }
}

/// Between half of `mean` and one and a half, so that many who failed together do not come back together.
fn jittered(mean: Duration) -> Duration {
    let draw = uuid::Uuid::new_v4().as_u128() as u32; // the low 32 bits of a v4 id are random
    mean.mul_f64(0.5 + f64::from(draw) / f64::from(u32::MAX))
}
