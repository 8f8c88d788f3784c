//! Adapter files on disk, by content: one directory for equal bytes, whoever and however many identities stand for them.
//!
//! - A content appears at once and complete: written in `tmp/`, made durable, renamed. After a crash each is absent or whole.
//! - Room is reserved before a download. What is on disk plus what is reserved never exceeds the quota.
//! - What nobody holds ([`Stored`]) and no pin keeps is evicted, the longest unused first. Its hashes stay known: the same
//!   identity must give the same bytes when it comes back.
//! - No text from outside is part of a path: contents lie under a hash of their bytes, records under one of their identity.
//!
//! [`Store`]'s methods wait for no disk: they change what is known at once and leave files to a blocking thread.
//! Where the files lie is in `record.rs`, who counts which bytes in `state.rs`.

mod accounts;
mod disk;
mod download;
mod error;
mod open;
mod record;
mod sink;
mod state;
mod sweep;
#[cfg(test)]
mod tests;
mod verify;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::adapters::types::RemoteFile;
use crate::engine::ContentId;

#[cfg(test)]
pub(crate) use disk::Faults;
pub(crate) use download::Download;
pub use error::StoreError;
pub(crate) use record::{FileRecord, FilesId};
pub(crate) use sink::{FileSink, Written};

use super::fetch::Tenant;
use disk::Disk;
use record::{Layout, Record};
use state::State;

/// Identities remembered, with or without bytes. Beyond it the longest unused without bytes are forgotten.
const RECORDS_MAX: usize = 65_536;
/// How old the last use on disk may be. It only orders evictions after a restart.
const USE_NOTED_EVERY: Duration = Duration::from_secs(60);

/// Where the store stands, for the admin API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStatus {
    /// Contents that can be used.
    pub contents: usize,
    /// Contents in use now: they cannot be evicted.
    pub held: usize,
    /// Bytes of the files, stopped downloads and files about to be removed included.
    pub bytes: u64,
    /// Bytes that running downloads have written or may still write.
    pub reserved_bytes: u64,
    /// `bytes + reserved_bytes` never exceed this.
    pub quota_bytes: u64,
}

/// The files of one adapter. While a clone lives they are not removed.
#[derive(Clone)]
pub struct Stored {
    dir: Arc<Path>,
    /// SHA-256 over the sorted (file name, SHA-256 of the file).
    pub files_id: FilesId,
    /// Size of both files.
    pub bytes: u64,
    _held: Arc<Held>,
}

impl Stored {
    /// The directory with the two files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl std::fmt::Debug for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stored").field("dir", &self.dir).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// One content is in use. All its [`Stored`] share it.
struct Held {
    shared: Arc<Shared>,
    files_id: FilesId,
}

impl Drop for Held {
    fn drop(&mut self) {
        let state = self.shared.state();
        let dead = state.contents.get(&self.files_id).is_some_and(|content| !content.live);
        drop(state);
        if dead {
            in_background(&self.shared, |shared| shared.sweep());
        }
    }
}

/// What the store, its downloads and its holders share.
struct Shared {
    layout: Layout,
    disk: Disk,
    /// Never held while waiting for the disk, so that [`Store::get`] may be called anywhere.
    state: Mutex<State>,
    /// Held while a content's directory gets or loses its place.
    namespace: Mutex<()>,
    /// Held while the index is written.
    index: Mutex<()>,
    /// Held by the one thread that unlinks.
    sweeping: Mutex<()>,
    /// Next name in `tmp/`.
    scratch: AtomicU64,
    /// The lock is the open file's; it ends with the process.
    _lock: File,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn namespace(&self) -> MutexGuard<'_, ()> {
        lock(&self.namespace)
    }

    /// A path in `tmp/` that nothing has.
    fn scratch(&self) -> PathBuf {
        self.layout.tmp().join(self.scratch.fetch_add(1, Ordering::Relaxed).to_string())
    }

    /// A guard on a content, if it is here.
    fn hold(self: &Arc<Self>, files_id: &FilesId, only_live: bool) -> Option<Stored> {
        let mut state = self.state();
        let content = state.contents.get_mut(files_id).filter(|content| content.live || !only_live)?;
        let held = content.guard.upgrade().unwrap_or_else(|| {
            let held = Arc::new(Held { shared: Arc::clone(self), files_id: *files_id });
            content.guard = Arc::downgrade(&held);
            held
        });
        let bytes = content.bytes;
        drop(state); // before `held` can go: its drop takes the same lock
        Some(Stored { dir: self.layout.content(files_id).into(), files_id: *files_id, bytes, _held: held })
    }

    /// Writes the record as it is in memory now, if it is. Later calls write later states, whatever thread they run on.
    fn save_record(&self, identity: &str) {
        let record = self.state().known.get(identity).map(|known| known.record.clone());
        if let Some(record) = record {
            let _ = self.write_record(&record); // logged; the old one stays, which only forgets a content id
        }
    }

    fn write_record(&self, record: &Record) -> Result<(), StoreError> {
        let _index = lock(&self.index);
        let path = self.layout.record(&record.identity);
        let text = serde_json::to_vec(record).map_err(io::Error::from);
        let written = text.and_then(|text| self.disk.replace(&path, &self.scratch(), &text));
        written.map_err(|error| StoreError::from_io(&error, "write the index", &path))
    }
}

/// The content store of one data directory. Share it by `Arc`.
pub struct Store {
    shared: Arc<Shared>,
}

impl Store {
    /// Opens `<data_dir>/store`, makes it if needed, and removes what a crash left behind. Waits for the disk.
    ///
    /// # Errors
    /// Another process has it, or the directory cannot be read or written; the text says what to change.
    pub fn open(data_dir: &Path, quota_bytes: u64) -> io::Result<Self> {
        Self::open_with(data_dir, quota_bytes, Box::new(disk::NoFaults))
    }

    /// As [`Self::open`], on a disk that fails when `faults` says so.
    pub(crate) fn open_with(data_dir: &Path, quota_bytes: u64, faults: Box<dyn disk::Faults>) -> io::Result<Self> {
        Ok(Self { shared: open::open(data_dir, quota_bytes, Disk::new(faults))? })
    }

    /// The files of `identity`, if they are here.
    pub fn get(&self, identity: &str) -> Option<Stored> {
        let mut state = self.shared.state();
        let now = state.tick(now_ns());
        let known = state.known.get_mut(identity)?;
        let files_id = known.files_id;
        known.last_used = now;
        let note = now.saturating_sub(known.noted) > USE_NOTED_EVERY.as_nanos() as u64;
        if note {
            known.noted = now;
        }
        if let Some(content) = state.contents.get_mut(&files_id) {
            content.last_used = now;
        }
        drop(state);
        let stored = self.shared.hold(&files_id, true)?;
        if note {
            let path = self.shared.layout.record(identity);
            in_background(&self.shared, move |shared| shared.disk.touch(&path, SystemTime::now()));
        }
        Some(stored)
    }

    /// Drops `identity` and all that is known of it. Its files go at once, or when their last holder leaves, unless
    /// another identity has the same. Returns their bytes.
    pub fn forget(&self, identity: &str) -> u64 {
        let mut state = self.shared.state();
        let partial = state.trash_partial(identity);
        let known = state.unlearn(identity);
        let freed = known.map_or(0, |known| {
            state.forgotten.push(identity.into());
            let is_used = state.by_files.contains_key(&known.files_id);
            state.retire_unless(&known.files_id, is_used)
        });
        drop(state);
        in_background(&self.shared, |shared| shared.sweep());
        partial + freed
    }

    /// The shard read other bytes than were stored: the files go as with [`Self::forget`], for every identity that has
    /// them, but their hashes stay known, so that the next download must match them.
    pub fn quarantine(&self, identity: &str) -> u64 {
        let mut state = self.shared.state();
        let Some(files_id) = state.known.get(identity).map(|known| known.files_id) else { return 0 };
        let freed = state.retire(&files_id);
        if let Some(content) = state.contents.get_mut(&files_id) {
            content.damaged = true;
        }
        drop(state);
        tracing::error!(identity, bytes = freed, "stored adapter does not have the bytes that were stored; removed");
        in_background(&self.shared, |shared| shared.sweep());
        freed
    }

    /// Keeps the files of `identity`, present or to come, from eviction until it is called with `false`. Not remembered over
    /// a restart.
    pub fn set_pinned(&self, identity: &str, pinned: bool) {
        let mut state = self.shared.state();
        if pinned {
            state.pinned.insert(identity.into())
        } else {
            state.pinned.remove(identity)
        };
    }

    /// Notes what the shard made of the files of `identity`.
    pub fn note_content(&self, identity: &str, content: ContentId) {
        let mut state = self.shared.state();
        let Some(known) = state.known.get_mut(identity) else { return };
        if known.record.content.replace(content.0) == Some(content.0) {
            return;
        }
        drop(state);
        let identity = identity.to_owned();
        in_background(&self.shared, move |shared| shared.save_record(&identity));
    }

    /// What [`Self::note_content`] noted, also in an earlier run.
    pub fn expected_content(&self, identity: &str) -> Option<ContentId> {
        self.shared.state().known.get(identity)?.record.content.map(ContentId)
    }

    /// Bytes of all files, see [`StoreStatus::bytes`].
    pub fn bytes(&self) -> u64 {
        self.shared.state().accounts.used()
    }

    /// Bytes on disk and reserved on the account of one tenant.
    pub fn tenant_bytes(&self, tenant: u64) -> u64 {
        self.shared.state().accounts.of(tenant)
    }

    /// Where it stands.
    pub fn status(&self) -> StoreStatus {
        let state = self.shared.state();
        StoreStatus {
            contents: state.contents.values().filter(|content| content.live).count(),
            held: state.contents.values().filter(|content| content.guard.strong_count() > 0).count(),
            bytes: state.accounts.used(),
            reserved_bytes: state.accounts.reserved(),
            quota_bytes: state.quota_bytes,
        }
    }

    /// Downloads that stopped and may go on.
    #[cfg(test)]
    pub(crate) fn partials(&self) -> usize {
        self.shared.state().partials.len()
    }

    /// The files as they were when `identity` was first downloaded, whether they are here or not.
    pub(crate) fn recorded(&self, identity: &str) -> Option<[FileRecord; 2]> {
        self.shared.state().known.get(identity).map(|known| known.record.files)
    }

    /// Reserves room for a download and makes its directory. Waits for the disk.
    ///
    /// # Errors
    /// No room for this tenant or anybody, or the file system's.
    pub(crate) fn begin(
        &self,
        identity: &str,
        tenant: Tenant,
        files: &[RemoteFile; 2],
    ) -> Result<Download, StoreError> {
        Download::begin(&self.shared, identity, tenant, files)
    }

    /// Unlinks what waits for it. Waits for the disk.
    pub(crate) fn sweep(&self) {
        self.shared.sweep();
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("root", &self.shared.layout.root).finish_non_exhaustive()
    }
}

/// Runs `work` on a thread that may wait for the disk; here and now where there is no runtime.
fn in_background(shared: &Arc<Shared>, work: impl FnOnce(&Shared) + Send + 'static) {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => {
            let shared = Arc::clone(shared);
            runtime.spawn_blocking(move || work(&shared));
        }
        Err(_) => work(shared),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
