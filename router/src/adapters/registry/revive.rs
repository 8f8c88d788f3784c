//! Contents that the engine needs and no directory holds any more: the disk quota took the files, they were damaged, or they
//! were changed.
//!
//! What is in host memory may serve without files. When that memory is lost, by a shard's death or to other adapters, the
//! engine asks for the files, and the requests that need them wait meanwhile.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tokio::runtime::Handle;

use super::contents::Until;
use super::resolve::{Found, ROUNDS_MAX};
use super::*;

/// How long the requests wait, at most.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// What is being brought back.
#[derive(Default)]
pub(super) struct Revivals {
    runtime: OnceLock<Handle>,
    /// True: it was reported again meanwhile.
    running: Mutex<HashMap<ContentId, bool>>,
}

impl Revivals {
    /// The engine's thread has no runtime of its own.
    pub(super) fn run_here(&self) {
        if let Ok(runtime) = Handle::try_current() {
            let _ = self.runtime.set(runtime);
        }
    }

    /// True if nobody works on it yet.
    fn begin(&self, content: ContentId) -> bool {
        self.running().insert(content, true).is_none()
    }

    /// One round begins.
    fn take(&self, content: ContentId) -> bool {
        let mut running = self.running();
        let is_due = running.insert(content, false) == Some(true);
        if !is_due {
            running.remove(&content);
        }
        is_due
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<ContentId, bool>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registry {
    /// From now on the engine says what it misses.
    pub(super) fn listen(&self) {
        self.inner.revivals.run_here();
        let registry = Arc::downgrade(&self.inner);
        self.inner.engine.on_missing(Box::new(move |content, reason| {
            if let Some(inner) = registry.upgrade() {
                Self { inner }.is_missing(content, reason.to_owned());
            }
        }));
    }

    fn is_missing(&self, content: ContentId, reason: String) {
        let Some(runtime) = self.inner.revivals.runtime.get() else {
            return self.inner.engine.give_up_adapter(content, reason);
        };
        if !self.inner.revivals.begin(content) {
            return;
        }
        let registry = self.clone();
        runtime.spawn(async move {
            while registry.inner.revivals.take(content) {
                let outcome = registry.revive(content).await;
                tracing::warn!(content = content.short(), ok = outcome.is_ok(), "its files were gone: {reason}");
                if let Err(failed) = outcome {
                    let failed = failed.map_or_else(|| reason.clone(), |failed| failed.message);
                    registry.inner.engine.give_up_adapter(content, failed);
                }
            }
        });
    }

    /// Has the engine prepare it again, fetched if need be. `None`: whoever asks for it gets something else now.
    async fn revive(&self, content: ContentId) -> Result<(), Option<AdapterFailure>> {
        let until = Until::At(self.inner.clock.now().saturating_add(PATIENCE));
        let (users, _kept) = self.inner.contents.doubt(content);
        let mut last = None;
        let named = {
            let names = self.names();
            let key = names.key_of(&content).cloned();
            key.and_then(|key| Some(Found { id: names.get(&key.0, &key.1)?.id, key, tenant: 0.into() }))
        };
        if let Some(found) = named {
            match self.serve_by(&found, until).await {
                Ok(Some(served)) if served.prepared.content == content => return Ok(()),
                Ok(_) => {}
                Err(failed) => last = Some(failed),
            }
        }
        for wanted in users {
            match self.inner.contents.usable(&wanted, &Arc::default(), until).await {
                Ok(usable) if usable.prepared.content == content => return Ok(()),
                Ok(_) => {}
                Err(failed) => last = Some(failed),
            }
        }
        Err(last)
    }

    /// An entry, however often it changes while it is looked at. `None`: too often, or it is gone.
    pub(super) async fn serve_by(
        &self,
        found: &Found,
        until: Until,
    ) -> Result<Option<ResolvedAdapter>, AdapterFailure> {
        for _ in 0..ROUNDS_MAX {
            if let Some(served) = self.serve(found, until).await? {
                return Ok(Some(served));
            }
        }
        Ok(None)
    }
}
