//! The table of contents: what is loaded, what is being loaded, and what goes when there are too many.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::watch;

use super::contents::{Outcome, Usable, Wanted};
use super::failure;
use super::holds::ContentHold;
use super::merged_dir::Made;
use super::settings::FilesHere;
use super::stage::Stage;
use crate::adapters::SourceKind;
use crate::adapters::authorise::Mac;
use crate::adapters::life::Retry;
use crate::engine::{AdapterFailure, ContentId, PreparedAdapter};

/// Contents that no name stands for.
pub(super) const UNNAMED_MAX: usize = 4096;
/// Of these, merges: their files are not in the store.
const MERGES_MAX: usize = 256;

/// A content as one identity has it. Two identities may have the same content; who uses which is counted apart.
pub(super) struct Lease(#[expect(dead_code, reason = "held, never read")] pub(super) Arc<ContentHold>);

/// Loaded.
#[derive(Clone)]
pub(super) struct Ready {
    pub(super) prepared: Arc<PreparedAdapter>,
    pub(super) hold: Arc<Lease>,
    pub(super) at: Duration,
    pub(super) loaded_ms: u64,
}

/// In whose name an attempt is made.
#[derive(Clone, Copy)]
pub(super) struct Asker {
    pub(super) mac: Mac,
    pub(super) tenant: u64,
}

impl Asker {
    /// True if this failure says nothing to another one: what a credential may not have, how often it may ask, and how much
    /// of the disk is a tenant's are its own affairs.
    pub(super) fn fails_alone(&self, failure: &AdapterFailure, other: &Self) -> bool {
        match failure.code.as_str() {
            "quota_exceeded" => self.tenant != other.tenant,
            "model_not_found" => self.mac != other.mac,
            _ => failure.retry_after.is_some() && self.mac != other.mac,
        }
    }
}

/// What became of the last attempt.
pub(super) enum Attempt {
    None,
    Running { outcome: watch::Receiver<Option<Outcome>>, stage: Arc<Stage>, asker: Asker },
    Failed { failure: AdapterFailure, at: Duration, until: Duration, asker: Asker },
}

/// What is known of one identity.
pub(super) struct Content {
    pub(super) source: SourceKind,
    /// Names that stand for it.
    pub(super) names: usize,
    pub(super) used: Duration,
    pub(super) ready: Option<Ready>,
    pub(super) attempt: Attempt,
    pub(super) retry: Retry,
    /// The directory of a merge, which goes with it.
    pub(super) made: Option<Arc<Made>>,
}

/// All of them.
#[derive(Default)]
pub(super) struct Table {
    pub(super) by_identity: HashMap<Arc<str>, Content>,
    pub(super) unnamed: usize,
    /// What requests that run, or ran lately, were given.
    pub(super) users: HashMap<ContentId, Vec<Weak<Wanted>>>,
    pub(super) failures: HashMap<(SourceKind, String), u64>,
}

impl Content {
    pub(super) fn new(source: SourceKind, now: Duration) -> Self {
        let (attempt, retry) = (Attempt::None, Retry::default());
        Self { source, names: 0, used: now, ready: None, attempt, retry, made: None }
    }

    /// Nobody but this table wants it.
    fn is_idle(&self) -> bool {
        let is_used = self.ready.as_ref().is_some_and(|ready| Arc::strong_count(&ready.hold) > 1);
        self.names == 0 && !is_used && !matches!(self.attempt, Attempt::Running { .. })
    }
}

impl Ready {
    pub(super) fn usable(self, files: Option<FilesHere>) -> Usable {
        Usable { prepared: self.prepared, hold: self.hold, files, loaded_ms: self.loaded_ms }
    }
}

impl Table {
    pub(super) fn entry(&mut self, wanted: &Wanted, now: Duration) -> Result<&mut Content, AdapterFailure> {
        if !self.by_identity.contains_key(&wanted.identity) {
            if self.unnamed >= UNNAMED_MAX {
                in_background(self.forget_idle(UNNAMED_MAX / 16, |_| true));
            }
            let is_merge = |content: &Content| content.source == SourceKind::Merge;
            if wanted.source == SourceKind::Merge
                && self.by_identity.values().filter(|content| is_merge(content)).count() >= MERGES_MAX
            {
                in_background(self.forget_idle(MERGES_MAX / 16, is_merge));
            }
            if self.unnamed >= UNNAMED_MAX {
                let message =
                    format!("service unavailable: {UNNAMED_MAX} adapters without a name are in use; try again");
                return Err(failure("adapter_load_failed", message));
            }
            self.unnamed += 1;
        }
        let source = wanted.source;
        Ok(self.by_identity.entry(Arc::clone(&wanted.identity)).or_insert_with(|| Content::new(source, now)))
    }

    /// Forgets the merge that nobody has used for longest. Dropping it unlinks its files.
    pub(super) fn forget_idle_merge(&mut self) -> Option<Arc<Made>> {
        self.forget_idle(1, |content| content.made.is_some()).pop()
    }

    /// Forgets up to `count` idle ones that are `meant`, least recently used first. What is to be unlinked of them.
    fn forget_idle(&mut self, count: usize, meant: impl Fn(&Content) -> bool) -> Vec<Arc<Made>> {
        let idle = self.by_identity.iter().filter(|(_, content)| content.is_idle() && meant(content));
        let mut idle: Vec<_> = idle.map(|(identity, content)| (content.used, Arc::clone(identity))).collect();
        idle.sort();
        let mut made = Vec::new();
        for (_, identity) in idle.into_iter().take(count) {
            let gone = self.by_identity.remove(&identity);
            self.unnamed -= 1;
            made.extend(gone.and_then(|content| content.made));
        }
        made
    }
}

/// Unlinks without making anybody wait.
fn in_background(made: Vec<Arc<Made>>) {
    if !made.is_empty() {
        std::thread::spawn(move || drop(made));
    }
}
