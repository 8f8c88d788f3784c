//! One file while it is downloaded: written and hashed in one go.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use crc_fast::{CrcAlgorithm, Digest as Crc};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::Shared;
use super::error::StoreError;
use super::record::FileRecord;
use crate::adapters::types::{FileDigest, FileName, RemoteFile};

/// Bytes read at once when a partial file is hashed again.
const READ_BYTES: usize = 1 << 20;

/// A file being written. Blocking; meant for a thread that may wait for the disk.
pub(crate) struct FileSink {
    shared: Arc<Shared>,
    path: PathBuf,
    file: File,
    hashes: Hashes,
    name: FileName,
    declared_bytes: u64,
}

/// A file that is complete and durable, not yet compared with anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) record: FileRecord,
    /// Of the kind that the source promised; `None` if it promised nothing.
    pub(crate) digest: Option<FileDigest>,
}

impl FileSink {
    /// Goes on after `start` bytes of `path`, which are hashed first, or makes a new file where `start` is 0.
    pub(super) fn open(
        shared: &Arc<Shared>,
        path: PathBuf,
        planned: &RemoteFile,
        start: u64,
    ) -> Result<Self, StoreError> {
        let disk = &shared.disk;
        let opened = if start == 0 { disk.create(&path) } else { disk.reopen(&path) };
        let mut file = opened.map_err(|error| StoreError::from_io(&error, "open a download's file", &path))?;
        let mut hashes = Hashes::new(planned);
        hashes
            .read(&mut file, start)
            .map_err(|error| StoreError::from_io(&error, "read a download's first part", &path))?;
        let shared = Arc::clone(shared);
        Ok(Self { shared, path, file, hashes, name: planned.name, declared_bytes: planned.bytes })
    }

    /// Appends. The caller has checked that no more comes than was declared.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let written = self.shared.disk.write(&mut self.file, bytes);
        written.map_err(|error| self.error(&error, "write an adapter's file"))?;
        self.hashes.update(bytes);
        Ok(())
    }

    /// Forgets every byte.
    pub(crate) fn restart(&mut self) -> Result<(), StoreError> {
        let emptied = self.shared.disk.truncate(&self.file).and_then(|()| io::Seek::rewind(&mut self.file));
        emptied.map_err(|error| self.error(&error, "empty a download's file"))?;
        self.hashes.restart();
        Ok(())
    }

    /// Makes the file durable.
    pub(crate) fn finish(&mut self) -> Result<Written, StoreError> {
        self.shared.disk.sync(&self.file).map_err(|error| self.error(&error, "make an adapter's file durable"))?;
        let (sha256, digest) = self.hashes.finish();
        Ok(Written { record: FileRecord { name: self.name, bytes: self.hashes.bytes, sha256 }, digest })
    }

    fn error(&self, error: &io::Error, doing: &str) -> StoreError {
        StoreError::from_io(error, doing, &self.path).needing(self.declared_bytes.saturating_sub(self.hashes.bytes))
    }
}

/// Running hashes: SHA-256 for our own record, and the source's kind.
struct Hashes {
    bytes: u64,
    sha256: Sha256,
    promised: Promised,
    /// For git, whose hash starts with the length.
    declared_bytes: u64,
}

enum Promised {
    Nothing,
    Sha256,
    GitSha1(Sha1),
    Crc32c(Crc),
}

impl Hashes {
    fn new(planned: &RemoteFile) -> Self {
        let promised = match planned.digest {
            None => Promised::Nothing,
            Some(FileDigest::Sha256(_)) => Promised::Sha256,
            Some(FileDigest::GitSha1(_)) => Promised::GitSha1(git_start(planned.bytes)),
            Some(FileDigest::Crc32c(_)) => Promised::Crc32c(Crc::new(CrcAlgorithm::Crc32Iscsi)),
        };
        Self { bytes: 0, sha256: Sha256::new(), promised, declared_bytes: planned.bytes }
    }

    fn update(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.sha256.update(bytes);
        match &mut self.promised {
            Promised::Nothing | Promised::Sha256 => {}
            Promised::GitSha1(hash) => hash.update(bytes),
            Promised::Crc32c(hash) => hash.update(bytes),
        }
    }

    fn restart(&mut self) {
        self.bytes = 0;
        self.sha256 = Sha256::new();
        match &mut self.promised {
            Promised::Nothing | Promised::Sha256 => {}
            Promised::GitSha1(hash) => *hash = git_start(self.declared_bytes),
            Promised::Crc32c(hash) => hash.reset(),
        }
    }

    /// Takes in the first `bytes` of `file`; its position is behind them afterwards.
    fn read(&mut self, file: &mut File, bytes: u64) -> io::Result<()> {
        let mut left = bytes;
        let mut buffer = vec![0; READ_BYTES.min(usize::try_from(bytes).unwrap_or(READ_BYTES))];
        while left > 0 {
            let want = buffer.len().min(usize::try_from(left).unwrap_or(READ_BYTES));
            let part = buffer.get_mut(..want).unwrap_or_default();
            file.read_exact(part)?;
            self.update(part);
            left -= part.len() as u64;
        }
        Ok(())
    }

    fn finish(&self) -> ([u8; 32], Option<FileDigest>) {
        let sha256: [u8; 32] = self.sha256.clone().finalize().into();
        let digest = match &self.promised {
            Promised::Nothing => None,
            Promised::Sha256 => Some(FileDigest::Sha256(sha256)),
            Promised::GitSha1(hash) => Some(FileDigest::GitSha1(hash.clone().finalize().into())),
            // CRC-32C has 32 bits; the crate's answer for every CRC is a u64.
            Promised::Crc32c(hash) => Some(FileDigest::Crc32c(((hash.finalize() & 0xffff_ffff) as u32).to_be_bytes())),
        };
        (sha256, digest)
    }
}

fn git_start(bytes: u64) -> Sha1 {
    Sha1::new().chain_update(format!("blob {bytes}\0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest_of(promised: FileDigest, bytes: &[u8]) -> Option<FileDigest> {
        let planned = RemoteFile {
            name: FileName::Config,
            bytes: bytes.len() as u64,
            digest: Some(promised),
            etag: None,
            locator: String::new(),
        };
        let mut hashes = Hashes::new(&planned);
        hashes.update(b"thrown away");
        hashes.restart();
        bytes.chunks(3).for_each(|part| hashes.update(part));
        hashes.finish().1
    }

    #[test]
    fn hashes_are_those_of_git_sha256sum_and_the_crc_catalogue() {
        let git =
            FileDigest::GitSha1(*b"\xce\x01\x36\x25\x03\x0b\xa8\xdb\xa9\x06\xf7\x56\x96\x7f\x9e\x9c\xa3\x94\x46\x4a");
        assert_eq!(digest_of(git, b"hello\n"), Some(git)); // `echo hello | git hash-object --stdin`
        let crc = FileDigest::Crc32c(0xe306_9283_u32.to_be_bytes());
        assert_eq!(digest_of(crc, b"123456789"), Some(crc)); // the check value of CRC-32C
        let sha = FileDigest::Sha256(*b"\xba\x78\x16\xbf\x8f\x01\xcf\xea\x41\x41\x40\xde\x5d\xae\x22\x23\xb0\x03\x61\xa3\x96\x17\x7a\x9c\xb4\x10\xff\x61\xf2\x00\x15\xad");
        assert_eq!(digest_of(sha, b"abc"), Some(sha)); // FIPS 180-4
    }
}
