//! Why the store did not take something, in words for the API (no path) and for the log (with the path).

use std::io;
use std::path::Path;

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

impl StoreError {
    /// The class of `error`, met while `doing` something with `path`. The path goes to the log only: tenants read the rest.
    pub(super) fn from_io(error: &io::Error, doing: &str, path: &Path) -> Self {
        tracing::warn!(path = %path.display(), "adapter store: cannot {doing}: {error}");
        match error.kind() {
            io::ErrorKind::StorageFull => {
                Self::Full { need_bytes: 0, reason: "the disk of the data directory is full".into() }
            }
            io::ErrorKind::QuotaExceeded => Self::Full {
                need_bytes: 0,
                reason: "the disk quota of the user that runs the server is used up".into(),
            },
            kind => Self::Io { reason: format!("cannot {doing}: {}", advice(kind)) },
        }
    }

    /// Sets what was asked for, where the place that failed could not know it.
    pub(super) fn needing(self, bytes: u64) -> Self {
        match self {
            Self::Full { need_bytes: 0, reason } => Self::Full { need_bytes: bytes, reason },
            other => other,
        }
    }
}

/// What to change about an error, as far as its kind says it.
fn advice(kind: io::ErrorKind) -> String {
    match kind {
        io::ErrorKind::ReadOnlyFilesystem => {
            "the data directory is on a read-only file system; point --data-dir to a writable one".into()
        }
        io::ErrorKind::PermissionDenied => {
            "the data directory may not be written by the user that runs the server; change its owner or --data-dir"
                .into()
        }
        kind => kind.to_string(),
    }
}

/// The error of [`super::Store::open`]: read by the operator, so it names the path and both users.
pub(super) fn open_error(error: &io::Error, doing: &str, path: &Path) -> io::Error {
    let mut text = format!("--data-dir: cannot {doing} {}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::PermissionDenied => text.push_str(&owners(path)),
        io::ErrorKind::ReadOnlyFilesystem => text.push_str("; point --data-dir to a writable directory"),
        io::ErrorKind::StorageFull => text.push_str("; free some space there or point --data-dir elsewhere"),
        _ => {}
    }
    io::Error::new(error.kind(), text)
}

/// Whose directory it is and who asks.
fn owners(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let uid = |path: &Path| std::fs::metadata(path).ok().map(|found| found.uid());
    let owner = path.ancestors().find_map(uid);
    match (owner, uid(Path::new("/proc/self"))) {
        (Some(owner), Some(own)) if owner != own => format!(
            "; it belongs to user {owner} and this server runs as user {own}: change the owner (chown) or --data-dir"
        ),
        _ => "; change its permissions or --data-dir".into(),
    }
}
