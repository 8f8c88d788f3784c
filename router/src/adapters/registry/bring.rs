//! One attempt to get a content: its files onto this machine, and from there into the engine.

use std::sync::Arc;

use super::contents::{Contents, From, NO_SOURCE, Wanted};
use super::settings::FilesHere;
use super::stage::Stage;
use super::table::Lease;
use super::{AdapterState, failure};
use crate::adapters::Origin;
use crate::adapters::life::is_retryable;
use crate::engine::{AdapterFailure, PreparedAdapter};
use crate::metrics::LoadPhase;

/// A content that the engine has, and the files it was read from.
pub(super) type Loaded = (Arc<PreparedAdapter>, Arc<Lease>, FilesHere);

impl Contents {
    pub(super) async fn load(&self, wanted: &Wanted, stage: &Stage) -> Result<Loaded, AdapterFailure> {
        let (files, was_here) = self.fetch(wanted, stage).await?;
        let prepared = self.prepare(wanted, stage, files).await;
        if !was_here {
            if prepared.as_ref().is_err_and(|failure| !is_retryable(&failure.code)) && wanted.is_unverified() {
                self.forget_files(wanted).await;
            }
            return self.settled(wanted, prepared?);
        }
        if !self.is_damaged(wanted, &prepared).await {
            return self.settled(wanted, prepared?);
        }
        drop(prepared); // it may keep the damaged files
        let (files, _) = self.fetch(wanted, stage).await?;
        let prepared = self.prepare(wanted, stage, files).await?;
        self.settled(wanted, prepared)
    }

    /// No hash says whether the source has these bytes, or the way here changed them: the next try asks it again.
    async fn forget_files(&self, wanted: &Wanted) {
        if let Some(files) = &self.shared.files {
            files.forget(&wanted.identity).await;
        }
    }

    /// True if the shard did not find what it found before, and that is because the files have changed on disk. They are gone
    /// then. Files that are what was downloaded are not: it is the loader that changed, or the adapter is bad.
    async fn is_damaged(&self, wanted: &Wanted, prepared: &Result<Loaded, AdapterFailure>) -> bool {
        let Some(files) = &self.shared.files else { return false };
        let is_odd = match prepared {
            Ok((prepared, ..)) => {
                files.expected_content(&wanted.identity).is_some_and(|known| known != prepared.content)
            }
            Err(_) => true,
        };
        is_odd && !files.verify(&wanted.identity).await
    }

    fn settled(&self, wanted: &Wanted, loaded: Loaded) -> Result<Loaded, AdapterFailure> {
        if let (From::Source(_), Some(files)) = (&wanted.from, &self.shared.files) {
            files.note_content(&wanted.identity, loaded.0.content);
        }
        Ok(loaded)
    }

    async fn prepare(&self, wanted: &Wanted, stage: &Stage, files: FilesHere) -> Result<Loaded, AdapterFailure> {
        let shared = &self.shared;
        let began = shared.clock.now();
        stage.set(AdapterState::Preparing);
        if let Some(tokenizer) = &shared.tokenizer {
            let checked = tokenizer.check_added_tokens(files.dir.clone()).await;
            let broken =
                |_| failure("adapter_load_failed", "service unavailable: its text files cannot be read".into());
            checked.map_err(broken)?.map_err(|why| failure("adapter_unsupported", why))?;
        }
        let _permit = shared.prepares.acquire().await;
        for _ in 0..3 {
            let asked_at = shared.holds.moment();
            let prepared = shared.engine.prepare_adapter(files.dir.clone()).await?;
            if let Some(hold) = shared.holds.take(prepared.content, asked_at) {
                let took = shared.clock.now().saturating_sub(began);
                shared.times.observe(wanted.source, LoadPhase::Prepare, took);
                return Ok((Arc::new(prepared), Arc::new(Lease(hold)), files));
            }
        }
        Err(failure("adapter_load_failed", "service unavailable: its content was forgotten while it was loaded".into()))
    }

    /// The files, and whether the store had them already.
    async fn fetch(&self, wanted: &Wanted, stage: &Stage) -> Result<(FilesHere, bool), AdapterFailure> {
        let began = self.shared.clock.now();
        let files = match &wanted.from {
            From::Source(resolved) => {
                if let Origin::Directory(dir) = &resolved.origin {
                    return Ok((FilesHere { dir: dir.clone(), guard: None }, false));
                }
                let files = self.shared.files.as_ref().ok_or_else(|| {
                    failure("adapter_load_failed", "this server keeps no downloads (--data-dir)".into())
                })?;
                if let Some(here) = files.here(&wanted.identity) {
                    return Ok((here, true));
                }
                if wanted.is_bare() {
                    let message = "service unavailable: its files are not on disk any more; try again";
                    let gone = failure("adapter_load_failed", message.into());
                    return Err(AdapterFailure { state: Some(NO_SOURCE), ..gone });
                }
                stage.set(AdapterState::Fetching);
                let fetched = files.fetch(resolved, &wanted.credential, wanted.tenant, stage.progress()).await;
                fetched.map_err(|error| AdapterFailure {
                    retry_after: error.retry_after(),
                    detail: error.detail(),
                    ..AdapterFailure::new(error.code(), error.to_string())
                })?
            }
            From::Merge(merge) => self.write_merge(wanted, merge).await?,
        };
        self.shared.times.observe(wanted.source, LoadPhase::Fetch, self.shared.clock.now().saturating_sub(began));
        Ok((files, false))
    }

    async fn write_merge(&self, wanted: &Wanted, merge: &super::contents::Merge) -> Result<FilesHere, AdapterFailure> {
        debug_assert!(!merge.parts.is_empty(), "what it is made of stays until here");
        let made = self.table().by_identity.get(&wanted.identity).and_then(|content| content.made.clone());
        let made = match made {
            Some(made) => made,
            None => {
                let (shared, forget_idle) = (&self.shared, || self.table().forget_idle_merge());
                shared.merges.make(&*shared.engine, wanted.tenant.id, merge, forget_idle).await?
            }
        };
        if let Some(content) = self.table().by_identity.get_mut(&wanted.identity) {
            content.made = Some(Arc::clone(&made));
        }
        Ok(FilesHere { dir: made.dir().to_owned(), guard: Some(made) })
    }
}
