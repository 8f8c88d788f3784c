//! Downloads: from a source into the store, once however many ask.

mod error;
mod limits;
mod progress;

use std::sync::Arc;

pub use error::FetchError;
pub use limits::{FetchLimits, Tenant};
pub use progress::{Phase, Progress, ProgressNow};

use super::store::{Store, Stored};
use super::types::{Credential, Resolved, Source};

/// Brings adapters into the store. Cheap to share.
pub struct Fetcher {
    store: Arc<Store>,
}

impl Fetcher {
    /// Downloads from `sources` into `store`.
    pub fn new(_sources: Arc<dyn Source>, store: Arc<Store>, _limits: FetchLimits) -> Self {
        Self { store }
    }

    /// The files of `resolved` in the store: from there, or by one download that all callers share.
    ///
    /// # Errors
    /// See [`FetchError`].
    pub async fn fetch(
        &self,
        resolved: &Resolved,
        _credential: &Credential,
        _who: impl Into<Tenant>,
        _progress: &Progress,
    ) -> Result<Stored, FetchError> {
        let absent = FetchError::Storage { reason: "downloads are not available yet".into() };
        self.store.get(&resolved.identity).ok_or(absent)
    }

    /// Ends a running download of `identity` and removes its files. Bytes that this frees, at once or when their last
    /// holder leaves.
    pub async fn forget(&self, identity: &str) -> u64 {
        self.store.forget(identity)
    }
}
