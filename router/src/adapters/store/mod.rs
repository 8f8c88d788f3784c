//! Adapter files on disk, by content.

use std::io;
use std::path::{Path, PathBuf};

use crate::engine::ContentId;

/// Why the store did not take something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No room.
    #[error("no room for {need_bytes} bytes: {reason}")]
    Full {
        /// Bytes that were asked for.
        need_bytes: u64,
        /// Which limit, and what to change.
        reason: String,
    },
    /// A tenant's own limit.
    #[error("{need_bytes} bytes more would pass this tenant's {limit_bytes} ({used_bytes} in use)")]
    Quota {
        /// Bytes that were asked for.
        need_bytes: u64,
        /// What its adapters take that cannot be evicted now.
        used_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The file system refused.
    #[error("{reason}")]
    Io {
        /// What failed and what to change.
        reason: String,
    },
}

/// Where the store stands, for the admin API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStatus {
    /// Contents that can be used.
    pub contents: usize,
    /// Of these, in use now: they cannot be evicted.
    pub held: usize,
    /// Bytes of the files, partial downloads included.
    pub bytes: u64,
    /// Bytes that running downloads may still write.
    pub reserved_bytes: u64,
    /// `bytes + reserved_bytes` never exceed this.
    pub quota_bytes: u64,
}

/// The files of one adapter. While a clone lives they are not removed.
#[derive(Clone, Debug)]
pub struct Stored {
    dir: PathBuf,
    /// SHA-256 over the sorted (file name, SHA-256 of the file).
    pub files_id: [u8; 32],
    /// Size of both files.
    pub bytes: u64,
}

impl Stored {
    /// The directory with the two files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// The content store of one data directory. Share it by `Arc`.
pub struct Store {
    quota_bytes: u64,
}

impl Store {
    /// Opens `<data_dir>/store`, makes it if needed, and removes what a crash left behind.
    ///
    /// # Errors
    /// Another process has it, or the directory cannot be read or written; the text says what to change.
    pub fn open(_data_dir: &Path, quota_bytes: u64) -> io::Result<Self> {
        Ok(Self { quota_bytes })
    }

    /// The files of `identity`, if they are here.
    pub fn get(&self, _identity: &str) -> Option<Stored> {
        None
    }

    /// Drops `identity` and all that is known of it. Its files go at once, or when their last holder leaves, unless
    /// another identity has the same. Returns their bytes.
    pub fn forget(&self, _identity: &str) -> u64 {
        0
    }

    /// The shard read other bytes than were stored: the files go as with [`Self::forget`], for every identity that has
    /// them, but their hashes stay known, so that the next download must match them.
    pub fn quarantine(&self, _identity: &str) -> u64 {
        0
    }

    /// Keeps the files of `identity`, present or to come, from eviction until it is called with `false`.
    pub fn set_pinned(&self, _identity: &str, _pinned: bool) {}

    /// Notes what the shard made of the files of `identity`.
    pub fn note_content(&self, _identity: &str, _content: ContentId) {}

    /// What [`Self::note_content`] noted, also in an earlier run.
    pub fn expected_content(&self, _identity: &str) -> Option<ContentId> {
        None
    }

    /// Bytes of all files, partial downloads included.
    pub fn bytes(&self) -> u64 {
        0
    }

    /// Where it stands.
    pub fn status(&self) -> StoreStatus {
        StoreStatus { quota_bytes: self.quota_bytes, ..StoreStatus::default() }
    }
}
