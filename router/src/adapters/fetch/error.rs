//! Why an adapter is not in the store.

use std::time::Duration;

use crate::adapters::store::StoreError;
use crate::adapters::types::{FileName, SourceError};

/// Why a fetch failed. Cloned to everybody who waited for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The source did not give the bytes.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The disk or the quota of the store has no room, and nothing that may be evicted makes enough.
    #[error("no room on disk for {need_bytes} bytes of this adapter: {reason}")]
    DiskFull {
        /// Bytes that were asked for.
        need_bytes: u64,
        /// Which limit, and what to change.
        reason: String,
    },
    /// The caller's key may not keep that much on this server's disk.
    #[error(
        "{need_bytes} bytes more would pass the {limit_bytes} bytes of disk that this key may use ({used_bytes} in use)"
    )]
    Quota {
        /// Bytes that were asked for.
        need_bytes: u64,
        /// What this key's adapters take that cannot be evicted now.
        used_bytes: u64,
        /// The key's limit.
        limit_bytes: u64,
    },
    /// A file is larger than this server takes.
    #[error("{} has {bytes} bytes; this server takes up to {limit_bytes} ({flag})", file.as_str())]
    TooLarge {
        /// Which file.
        file: FileName,
        /// What the source says.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
        /// What sets the limit.
        flag: &'static str,
    },
    /// The bytes are not those that were promised, twice in a row.
    #[error("{} is damaged: {reason}; it was downloaded twice", file.as_str())]
    Corrupt {
        /// Which file.
        file: FileName,
        /// Which promise was broken.
        reason: String,
        /// It was so at the fetch before this one too: trying again will not help.
        again: bool,
    },
    /// The store could not be written, for another reason than room.
    #[error("the adapter store cannot be written: {reason}")]
    Storage {
        /// What failed and what to change.
        reason: String,
    },
    /// Too many adapters wait for their download.
    #[error("service unavailable: {waiting} downloads wait already; try again")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// The adapter was forgotten while it was fetched.
    #[error("service unavailable: the download was given up because the adapter was removed")]
    Cancelled,
}

impl FetchError {
    /// The API's code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Source(SourceError::Absent) => "model_not_found",
            Self::Source(SourceError::Permanent { code, .. }) => code,
            Self::DiskFull { .. } => "disk_full",
            Self::Quota { .. } => "quota_exceeded",
            Self::TooLarge { .. } => "adapter_too_large",
            Self::Corrupt { again: true, .. } => "adapter_invalid",
            Self::Source(SourceError::Retryable { .. })
            | Self::Corrupt { .. }
            | Self::Storage { .. }
            | Self::Busy { .. }
            | Self::Cancelled => "adapter_load_failed",
        }
    }

    /// True if the same fetch may succeed later without anybody changing anything.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Source(SourceError::Absent | SourceError::Permanent { .. }) | Self::TooLarge { .. } => false,
            Self::Corrupt { again, .. } => !again,
            Self::Source(SourceError::Retryable { .. })
            | Self::DiskFull { .. }
            | Self::Quota { .. }
            | Self::Storage { .. }
            | Self::Busy { .. }
            | Self::Cancelled => true,
        }
    }

    /// The text for operators, where it says more than the error's own ([`SourceError::detail`]).
    pub fn detail(&self) -> Option<String> {
        match self {
            Self::Source(error) => error.detail().map(str::to_owned),
            _ => None,
        }
    }

    /// When the source said to come back.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Source(SourceError::Retryable { retry_after, .. }) => *retry_after,
            _ => None,
        }
    }
}

impl From<StoreError> for FetchError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Full { need_bytes, reason } => Self::DiskFull { need_bytes, reason },
            StoreError::Quota { need_bytes, used_bytes, limit_bytes } => {
                Self::Quota { need_bytes, used_bytes, limit_bytes }
            }
            StoreError::Io { reason } => Self::Storage { reason },
        }
    }
}
