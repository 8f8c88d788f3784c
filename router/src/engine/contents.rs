//! Which adapter contents the shard's host memory holds, and where each came from. Owned by the engine thread.
//!
//! A content is *host* (the scheduler may upload it), *preparing* (the shard reads it) or *cold* (dropped to stay within
//! the host budget, or lost with a shard): a request for a cold one parks until it is back.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::adapters::PreparedAdapter;
use super::types::ContentId;

/// Directories remembered for one content.
const DIRS_MAX: usize = 16;

/// Where a content's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Residency {
    Host,
    Preparing,
    Cold,
}

/// One content the engine has seen.
#[derive(Debug)]
pub(super) struct Content {
    /// Every directory that held it when it was read, the latest last. More than one, because two names may have one
    /// content and later part.
    pub(super) dirs: Vec<PathBuf>,
    /// Preparations with ids up to this were asked for before the shard was last told to drop the content: their reports
    /// may be older than the drop.
    pub(super) dropped_after: u64,
    pub(super) host_bytes: u64,
    pub(super) residency: Residency,
    /// Tick of the last request that named it.
    pub(super) last_used: u64,
}

/// All contents of this process.
#[derive(Default)]
pub(super) struct Contents {
    known: HashMap<ContentId, Content>,
    tick: u64,
}

impl Contents {
    pub(super) fn get(&self, content: &ContentId) -> Option<&Content> {
        self.known.get(content)
    }

    /// Notes what the shard packed. True if it was not in the host memory before.
    pub(super) fn packed(&mut self, prepared: &PreparedAdapter, dir: PathBuf) -> bool {
        self.tick += 1;
        let last_used = self.tick;
        let known = self.known.entry(prepared.content).or_insert_with(|| Content {
            dirs: Vec::new(),
            dropped_after: 0,
            host_bytes: prepared.host_bytes,
            residency: Residency::Cold,
            last_used,
        });
        known.dirs.retain(|other| *other != dir);
        if known.dirs.len() >= DIRS_MAX {
            known.dirs.remove(0);
        }
        known.dirs.push(dir);
        known.last_used = last_used;
        std::mem::replace(&mut known.residency, Residency::Host) != Residency::Host
    }

    pub(super) fn touch(&mut self, content: &ContentId) {
        self.tick += 1;
        if let Some(known) = self.known.get_mut(content) {
            known.last_used = self.tick;
        }
    }

    pub(super) fn set(&mut self, content: &ContentId, residency: Residency) {
        if let Some(known) = self.known.get_mut(content) {
            known.residency = residency;
        }
    }

    /// A directory does not hold the content any more. True if another one may. The last one is kept: the next request tries
    /// it again, and finds the content if its files are back.
    pub(super) fn moved_away(&mut self, content: &ContentId, dir: &Path) -> bool {
        self.known.get_mut(content).is_some_and(|known| {
            known.residency = Residency::Cold;
            let others = known.dirs.iter().any(|other| other != dir);
            if others {
                known.dirs.retain(|other| other != dir);
            }
            others
        })
    }

    /// The shard was told to drop it, when preparations up to `prepare` had been asked for.
    pub(super) fn dropped(&mut self, content: &ContentId, prepare: u64) {
        if let Some(known) = self.known.get_mut(content) {
            known.residency = Residency::Cold;
            known.dropped_after = prepare;
        }
    }

    /// A shard died: nothing is in host memory.
    pub(super) fn all_cold(&mut self) {
        for known in self.known.values_mut() {
            known.residency = Residency::Cold;
        }
    }

    /// Adapters and bytes in host memory.
    pub(super) fn host(&self) -> (u32, u64) {
        let host = self.known.values().filter(|c| c.residency == Residency::Host);
        host.fold((0, 0), |(n, bytes), c| (n + 1, bytes + c.host_bytes))
    }

    /// Host contents, least recently used first.
    pub(super) fn oldest_first(&self) -> Vec<ContentId> {
        let mut host: Vec<_> = self
            .known
            .iter()
            .filter(|(_, c)| c.residency == Residency::Host)
            .map(|(id, c)| (c.last_used, *id))
            .collect();
        host.sort_unstable();
        host.into_iter().map(|(_, id)| id).collect()
    }
}
