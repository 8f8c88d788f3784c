//! Pins and dry runs.

use std::sync::Arc;

use super::contents::{NO_SOURCE, Until};
use super::names::{Key, Version};
use super::resolve::Found;
use super::revive::PATIENCE;
use super::*;
use crate::adapters::{Origin, Progress};
use crate::engine::{AdapterCheck, PinLevel};

impl Registry {
    /// Keeps an adapter in host memory or on the device (and on disk), or (`None`) no longer.
    ///
    /// # Errors
    /// `model_not_found`; `precondition_failed` if too much would be pinned; why it could not be loaded.
    pub async fn pin(
        &self,
        namespace: &str,
        name: &str,
        level: Option<PinLevel>,
    ) -> Result<AdapterView, AdapterFailure> {
        let key: Key = (Arc::from(namespace), Arc::from(name));
        let (id, current) = {
            let names = self.names();
            let entry = names.get(namespace, name).ok_or_else(|| not_found(name))?;
            (entry.id, entry.current.clone())
        };
        if let Some(version) = current {
            let (identity, content) = match level {
                // The engine may not know a content of the last run yet.
                Some(_) => self.loaded(&Found { key: key.clone(), id, tenant: 0.into() }, &version).await?,
                None => (version.wanted.identity, version.facts.content),
            };
            self.pin_content(&identity, content, level).await?;
        } else if level.is_some() {
            return Err(failure("precondition_failed", format!("`{name}` is not loaded; load it first")));
        }
        self.names().update(&key, |entry| entry.pin = level).ok_or_else(|| not_found(name))?;
        self.write_adapter(&key).await?;
        self.get(namespace, name).ok_or_else(|| not_found(name))
    }

    /// What an entry stands for, once the engine knows it.
    async fn loaded(&self, found: &Found, version: &Version) -> Result<(Arc<str>, ContentId), AdapterFailure> {
        match self.inner.contents.usable(&version.wanted, &Arc::default(), Until::AttemptEnds).await {
            Ok(usable) => Ok((Arc::clone(&version.wanted.identity), usable.prepared.content)),
            Err(failed) if failed.state == Some(NO_SOURCE) => {
                let until = Until::At(self.inner.clock.now().saturating_add(PATIENCE));
                let served = self.serve_by(found, until).await?.ok_or_else(|| not_found(&found.key.1))?;
                Ok((Arc::clone(&served.wanted.identity), served.prepared.content))
            }
            Err(failed) => Err(failed),
        }
    }

    pub(super) async fn pin_content(
        &self,
        identity: &str,
        content: ContentId,
        level: Option<PinLevel>,
    ) -> Result<(), AdapterFailure> {
        let pinned = self.inner.engine.pin_adapter(content, level).await;
        pinned.map_err(|refused| failure("precondition_failed", refused.to_string()))?;
        self.pin_files(identity, level.is_some());
        Ok(())
    }

    pub(super) fn pin_files(&self, identity: &str, is_pinned: bool) {
        if let Some(supply) = &self.inner.supply {
            supply.files.set_pinned(identity, is_pinned);
        }
    }

    /// A dry run: fetches, checks, keeps and registers nothing.
    ///
    /// # Errors
    /// What the source says. A bad adapter is no error, but a report with refusals.
    pub async fn validate(
        &self,
        reference: &AdapterRef,
        credential: Credential,
    ) -> Result<(String, AdapterCheck), AdapterFailure> {
        let name = reference.to_string();
        let resolved = self.inner.authoriser.ask_anew(reference, &credential).await;
        let resolved = self.explained(resolved, reference, &credential, &name).await?;
        let revision = resolved.revision.clone();
        if let Origin::Directory(dir) = &resolved.origin {
            return Ok((revision, self.inner.engine.check_adapter(dir.clone()).await?));
        }
        let no_store = || failure("adapter_load_failed", "this server keeps no downloads (--data-dir)".into());
        let files = Arc::clone(&self.inner.supply.as_ref().ok_or_else(no_store)?.files);
        let was_here = files.here(&resolved.identity).is_some();
        let fetched = files.fetch(&resolved, &credential, 0.into(), &Progress::default()).await;
        let fetched = fetched.map_err(|error| AdapterFailure {
            retry_after: error.retry_after(),
            detail: error.detail(),
            ..failure(error.code(), error.to_string())
        });
        let checked = match fetched {
            Ok(here) => self.inner.engine.check_adapter(here.dir.clone()).await,
            Err(failed) => Err(failed),
        };
        if !was_here && !self.inner.contents.is_known(&resolved.identity) {
            files.forget(&resolved.identity).await;
        }
        Ok((revision, checked?))
    }
}
