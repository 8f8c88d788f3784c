//! A base model into a directory: a few files at once, resumed where they were left, hashed before they get their name.
//!
//! Runs before anything is served, so writing and hashing happen on the threads that download.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crc_fast::{CrcAlgorithm, Digest as Crc};
use futures_util::{StreamExt, TryStreamExt, stream};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::Sources;
use super::model::{ModelFile, ModelListing};
use crate::adapters::types::{FileDigest, SourceError};

/// Files at once.
const FILES_MAX: usize = 4;
/// Failures in a row, without a byte between, until the download is given up.
const TRIES_MAX: u32 = 6;
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Behind the name of a file that is not complete.
const PARTIAL: &str = ".part";
const READ_BYTES: usize = 1 << 20;

impl Sources {
    /// Downloads every file of `listing` that `dir` does not hold; `done` counts the bytes that are there.
    ///
    /// A file has its name only once it is complete and its hash is right. Until then `.part` stands behind it.
    ///
    /// # Errors
    /// [`SourceError`]; what is there stays for the next attempt.
    pub async fn download_model(
        &self,
        listing: &ModelListing,
        dir: &Path,
        done: &AtomicU64,
    ) -> Result<(), SourceError> {
        std::fs::create_dir_all(dir).map_err(|error| disk(&error))?;
        let files = stream::iter(&listing.files).map(|file| {
            let arrival = Arrival { sources: self, listing, file, path: dir.join(&file.name), done };
            arrival.run()
        });
        files.buffer_unordered(FILES_MAX).try_collect::<()>().await
    }
}

/// One file on its way.
struct Arrival<'a> {
    sources: &'a Sources,
    listing: &'a ModelListing,
    file: &'a ModelFile,
    path: PathBuf,
    done: &'a AtomicU64,
}

impl Arrival<'_> {
    async fn run(self) -> Result<(), SourceError> {
        if self.path.metadata().is_ok_and(|found| found.is_file() && found.len() == self.file.bytes) {
            self.done.fetch_add(self.file.bytes, Ordering::Relaxed);
            return Ok(());
        }
        let mut is_second = false;
        while !self.receive().await? {
            if is_second {
                let message = format!(
                    "{} does not have the hash that its source promises, also when loaded again",
                    self.file.name
                );
                return Err(SourceError::permanent("model_invalid", message));
            }
            is_second = true;
        }
        Ok(())
    }

    /// The whole file. False if its hash is wrong; nothing of it is left then.
    async fn receive(&self) -> Result<bool, SourceError> {
        let mut partial = Partial::open(self.path.with_file_name(format!("{}{PARTIAL}", self.file.name)), self.file)
            .map_err(|error| disk(&error))?;
        self.done.fetch_add(partial.bytes, Ordering::Relaxed);
        let mut tries = 0;
        while partial.bytes < self.file.bytes {
            let before = partial.bytes;
            let Err(error) = self.append(&mut partial).await else { break };
            let SourceError::Retryable { retry_after, .. } = &error else { return Err(error) };
            tries = if partial.bytes > before { 1 } else { tries + 1 };
            if tries >= TRIES_MAX {
                return Err(error);
            }
            tracing::warn!(file = self.file.name, "{error}; trying again");
            let pause = retry_after.unwrap_or(Duration::from_millis(250 << tries));
            tokio::time::sleep(pause.min(PAUSE_MAX)).await;
        }
        let bytes = partial.bytes;
        let is_right = partial.finish(&self.path).map_err(|error| disk(&error))?;
        if !is_right {
            self.done.fetch_sub(bytes, Ordering::Relaxed);
        }
        Ok(is_right)
    }

    async fn append(&self, partial: &mut Partial) -> Result<(), SourceError> {
        if !self.file.can_resume && partial.bytes > 0 {
            self.done.fetch_sub(partial.bytes, Ordering::Relaxed);
            partial.restart().map_err(|error| disk(&error))?;
        }
        let mut body = self.sources.open_model(self.listing, self.file, partial.bytes).await?;
        while let Some(chunk) = body.try_next().await? {
            partial.write(&chunk).map_err(|error| disk(&error))?;
            self.done.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The bytes so far, with their hash.
struct Partial {
    path: PathBuf,
    file: File,
    bytes: u64,
    expected: Option<FileDigest>,
    hash: Hash,
}

impl Partial {
    /// Goes on with what is there, if that may be.
    fn open(path: PathBuf, planned: &ModelFile) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path)?;
        let bytes = file.metadata()?.len();
        let mut hash = Hash::new(planned);
        let mut start =
            Self { path, file: file.try_clone()?, bytes: 0, expected: planned.digest, hash: Hash::new(planned) };
        if !planned.can_resume || bytes > planned.bytes {
            start.restart()?;
            return Ok(start);
        }
        let mut chunk = vec![0; READ_BYTES];
        loop {
            let len = file.read(&mut chunk)?;
            let Some(read) = chunk.get(..len).filter(|read| !read.is_empty()) else { break };
            hash.update(read);
            start.bytes += len as u64;
        }
        start.hash = hash;
        Ok(start)
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.bytes = 0;
        self.hash = self.hash.fresh();
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Gives the file its name if its hash is right, and removes it otherwise.
    fn finish(self, path: &Path) -> io::Result<bool> {
        if self.hash.finish() != self.expected {
            std::fs::remove_file(&self.path)?;
            return Ok(false);
        }
        self.file.sync_all()?;
        std::fs::rename(&self.path, path)?;
        if let Some(dir) = path.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok(true)
    }
}

/// The hash that the source promised, of the bytes so far.
enum Hash {
    None,
    Sha256(Sha256),
    Git { sha1: Sha1, bytes: u64 },
    Crc32c(Crc),
}

impl Hash {
    fn new(planned: &ModelFile) -> Self {
        match planned.digest {
            None => Self::None,
            Some(FileDigest::Sha256(_)) => Self::Sha256(Sha256::new()),
            Some(FileDigest::GitSha1(_)) => Self::git(planned.bytes),
            Some(FileDigest::Crc32c(_)) => Self::Crc32c(Crc::new(CrcAlgorithm::Crc32Iscsi)),
        }
    }

    fn git(bytes: u64) -> Self {
        let mut sha1 = Sha1::new();
        sha1.update(format!("blob {bytes}\0"));
        Self::Git { sha1, bytes }
    }

    /// The same kind, of no bytes.
    fn fresh(&self) -> Self {
        match self {
            Self::None => Self::None,
            Self::Sha256(_) => Self::Sha256(Sha256::new()),
            Self::Git { bytes, .. } => Self::git(*bytes),
            Self::Crc32c(_) => Self::Crc32c(Crc::new(CrcAlgorithm::Crc32Iscsi)),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::None => {}
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git { sha1, .. } => sha1.update(bytes),
            Self::Crc32c(hash) => hash.update(bytes),
        }
    }

    fn finish(self) -> Option<FileDigest> {
        Some(match self {
            Self::None => return None,
            Self::Sha256(hash) => FileDigest::Sha256(hash.finalize().into()),
            Self::Git { sha1, .. } => FileDigest::GitSha1(sha1.finalize().into()),
            // 32 bits in a u64: the lower half is all of it.
            Self::Crc32c(hash) => {
                let [_, _, _, _, sum @ ..] = hash.finalize().to_be_bytes();
                FileDigest::Crc32c(sum)
            }
        })
    }
}

fn disk(error: &io::Error) -> SourceError {
    SourceError::permanent("disk_full", format!("the model cannot be written: {error}"))
}
