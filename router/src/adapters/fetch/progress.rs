//! How far a download is. Written by the download, read by anyone at any time.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// What a download does now. Only ever moves down this list, except back to [`Self::Fetching`] when bytes were wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// The source is asked what the reference stands for. The fetcher never sets this: it starts after it.
    #[default]
    Resolving,
    /// It waits for its turn.
    Queued,
    /// Bytes arrive.
    Fetching,
    /// All bytes are here; hashes are compared and the files made durable.
    Verifying,
    /// In the store.
    Stored,
}

/// One reading of [`Progress`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgressNow {
    /// What it does.
    pub phase: Phase,
    /// Bytes received and kept so far, over all files.
    pub bytes_done: u64,
    /// Bytes of all files; 0 until the source has said it.
    pub bytes_total: u64,
}

/// The numbers of one download. All its callers' [`Progress`] point here.
#[derive(Debug, Default)]
pub(super) struct Counters {
    phase: AtomicU8,
    bytes_done: AtomicU64,
    bytes_total: AtomicU64,
}

impl Counters {
    /// Those of a download that ended long ago.
    pub(super) fn stored(bytes: u64) -> Arc<Self> {
        let counters = Self { bytes_done: bytes.into(), bytes_total: bytes.into(), ..Self::default() };
        counters.set_phase(Phase::Stored);
        Arc::new(counters)
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(super) fn set_total(&self, bytes: u64) {
        self.bytes_total.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_done(&self, bytes: u64) {
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A file starts again: what it had counts no more.
    pub(super) fn take_back(&self, bytes: u64) {
        self.bytes_done.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn now(&self) -> ProgressNow {
        let phase = [Phase::Resolving, Phase::Queued, Phase::Fetching, Phase::Verifying, Phase::Stored]
            .into_iter()
            .find(|phase| *phase as u8 == self.phase.load(Ordering::Relaxed));
        ProgressNow {
            phase: phase.unwrap_or_default(),
            bytes_done: self.bytes_done.load(Ordering::Relaxed),
            bytes_total: self.bytes_total.load(Ordering::Relaxed),
        }
    }
}

/// Shows how far a download is, its own or the one that was joined. Clones show the same.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    counters: Arc<RwLock<Arc<Counters>>>,
}

impl Progress {
    /// The state of this moment.
    pub fn now(&self) -> ProgressNow {
        self.counters.read().unwrap_or_else(PoisonError::into_inner).now()
    }

    /// From now on this shows the download that `counters` belongs to.
    pub(super) fn follow(&self, counters: &Arc<Counters>) {
        *self.counters.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(counters);
    }
}
