//! How far a load is. Written by the load, read by anyone at any time.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::AdapterState;
use crate::adapters::{Phase, Progress};

/// One load, or one that waits for another.
#[derive(Default)]
pub(super) struct Stage {
    /// Index in [`AdapterState::ALL`].
    state: AtomicU8,
    progress: Progress,
    followed: Mutex<Option<Arc<Stage>>>,
}

impl Stage {
    pub(super) fn set(&self, state: AdapterState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// From now on this one shows how far `other` is.
    pub(super) fn follow(&self, other: &Arc<Self>) {
        *self.followed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(other));
    }

    /// It goes its own way again.
    pub(super) fn unfollow(&self) {
        *self.followed.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    fn followed(&self) -> Option<Arc<Self>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The state of this moment.
    pub(super) fn state(&self) -> AdapterState {
        if let Some(followed) = self.followed() {
            return followed.state();
        }
        let state = AdapterState::ALL.get(usize::from(self.state.load(Ordering::Relaxed))).copied();
        match (state.unwrap_or(AdapterState::Registered), self.progress.now().phase) {
            (AdapterState::Fetching, Phase::Verifying) => AdapterState::Verifying,
            (state, _) => state,
        }
    }

    /// Bytes downloaded, and bytes to download.
    pub(super) fn bytes(&self) -> (u64, u64) {
        if let Some(followed) = self.followed() {
            return followed.bytes();
        }
        let now = self.progress.now();
        (now.bytes_done, now.bytes_total)
    }
}
