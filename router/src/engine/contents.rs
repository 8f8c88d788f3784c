//! Which adapter contents the shard's host memory holds, and where each came from. Owned by the engine thread.
//!
//! A content is *host* (the scheduler may upload it), *preparing* (the shard reads it) or *cold* (dropped to stay within
//! the host budget, or lost with a shard): a request for a cold one parks until it is back. One that *drains* takes no new
//! request and goes with its last. Cold ones that nobody named for long are forgotten beyond a cap.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use tokio::sync::oneshot;

use super::adapters::{PinLevel, PinRefused, PreparedAdapter};
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

/// Who is told what came of a pin.
pub(super) type PinReply = oneshot::Sender<Result<(), PinRefused>>;

/// One content the engine has seen.
#[derive(Debug)]
pub(super) struct Content {
    /// Every directory that held it when it was read, the latest last. More than one, because two names may have one
    /// content and later part.
    pub(super) dirs: Vec<PathBuf>,
    pub(super) host_bytes: u64,
    pub(super) residency: Residency,
    /// Tick of the last request that named it.
    pub(super) last_used: u64,
    pub(super) pinned: Option<PinLevel>,
    /// Pins that are decided once it is in host memory again.
    pub(super) pin_asks: Vec<(PinLevel, PinReply)>,
    /// No new request may name it.
    pub(super) draining: bool,
    /// A request is expected: to be uploaded as soon as it is in host memory.
    pub(super) wanted: bool,
}

/// All contents of this process.
#[derive(Default)]
pub(super) struct Contents {
    known: HashMap<ContentId, Content>,
    draining: BTreeSet<ContentId>,
    /// The last preparation that had been asked for when the shard was told to drop a content: reports up to it may be
    /// older than the drop.
    drops: HashMap<ContentId, u64>,
    tick: u64,
}

impl Contents {
    pub(super) fn get(&self, content: &ContentId) -> Option<&Content> {
        self.known.get(content)
    }

    pub(super) fn get_mut(&mut self, content: &ContentId) -> Option<&mut Content> {
        self.known.get_mut(content)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&ContentId, &Content)> {
        self.known.iter()
    }

    /// Notes what the shard packed. True if it was not in the host memory before.
    pub(super) fn packed(&mut self, prepared: &PreparedAdapter, dir: PathBuf) -> bool {
        self.tick += 1;
        let last_used = self.tick;
        let known = self.known.entry(prepared.content).or_insert_with(|| Content {
            dirs: Vec::new(),
            host_bytes: prepared.host_bytes,
            residency: Residency::Cold,
            last_used,
            pinned: None,
            pin_asks: Vec::new(),
            draining: false,
            wanted: false,
        });
        known.dirs.retain(|other| *other != dir);
        if known.dirs.len() >= DIRS_MAX {
            known.dirs.remove(0);
        }
        known.dirs.push(dir);
        known.last_used = last_used;
        known.host_bytes = prepared.host_bytes;
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
        self.set(content, Residency::Cold);
        self.drops.insert(*content, prepare);
    }

    /// A report on the content may be older than the last word to drop it.
    pub(super) fn is_stale(&self, content: &ContentId, prepare: u64) -> bool {
        self.drops.get(content).is_some_and(|last| prepare <= *last)
    }

    /// No preparation before `prepare` is open any more: drops before it need not be remembered.
    pub(super) fn forget_drops(&mut self, prepare: u64) {
        self.drops.retain(|_, last| *last >= prepare);
    }

    /// It takes no new request from now on (true), or does again. True if that is a change.
    pub(super) fn set_draining(&mut self, content: &ContentId, draining: bool) -> bool {
        let Some(known) = self.known.get_mut(content).filter(|known| known.draining != draining) else { return false };
        known.draining = draining;
        if draining {
            self.draining.insert(*content);
        } else {
            self.draining.remove(content);
        }
        true
    }

    pub(super) fn draining(&self) -> &BTreeSet<ContentId> {
        &self.draining
    }

    /// Takes it out of the books.
    pub(super) fn remove(&mut self, content: &ContentId) {
        self.draining.remove(content);
        self.known.remove(content);
    }

    /// Beyond `known_max` contents, forgets cold ones that are not `needed`, longest unused first.
    pub(super) fn bound(&mut self, known_max: usize, needed: impl Fn(&ContentId) -> bool) {
        if self.known.len() <= known_max {
            return;
        }
        let idle =
            |c: &Content| c.residency == Residency::Cold && c.pinned.is_none() && c.pin_asks.is_empty() && !c.draining;
        let cold = self.known.iter().filter(|(id, c)| idle(c) && !needed(id));
        let mut cold: Vec<_> = cold.map(|(id, c)| (c.last_used, *id)).collect();
        cold.sort_unstable();
        // A few more, so that this is not done again for the very next one.
        let surplus = self.known.len() - (known_max - known_max / 16);
        for (_, content) in cold.into_iter().take(surplus) {
            self.known.remove(&content);
        }
    }

    /// A shard died: nothing is in host memory.
    pub(super) fn all_cold(&mut self) {
        for known in self.known.values_mut() {
            known.residency = Residency::Cold;
        }
        self.drops.clear();
    }

    /// Adapters and bytes in host memory.
    pub(super) fn host(&self) -> (u32, u64) {
        let host = self.known.values().filter(|c| c.residency == Residency::Host);
        host.fold((0, 0), |(n, bytes), c| (n + 1, bytes + c.host_bytes))
    }

    /// Bytes of pinned contents, in host memory or not.
    pub(super) fn pinned_bytes(&self) -> u64 {
        self.known.values().filter(|c| c.pinned.is_some()).map(|c| c.host_bytes).sum()
    }

    /// Contents that shall be in host memory though no request waits for them.
    pub(super) fn wanted(&self) -> Vec<ContentId> {
        let wanted = |c: &Content| c.pinned.is_some() || !c.pin_asks.is_empty() || c.wanted;
        self.known.iter().filter(|(_, c)| wanted(c)).map(|(id, _)| *id).collect()
    }

    /// Host contents that may go, least recently used first.
    pub(super) fn oldest_first(&self) -> Vec<ContentId> {
        let mut host: Vec<_> = self
            .known
            .iter()
            .filter(|(_, c)| c.residency == Residency::Host && c.pinned.is_none())
            .map(|(id, c)| (c.last_used, *id))
            .collect();
        host.sort_unstable();
        host.into_iter().map(|(_, id)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(id: u16) -> PreparedAdapter {
        let mut content = [0; 32];
        content[..2].copy_from_slice(&id.to_le_bytes());
        PreparedAdapter {
            content: ContentId(content),
            pages_needed: 1,
            rank_blocks: 1,
            ranks: (8, 8),
            modules: Vec::new(),
            base_model: String::new(),
            host_bytes: 10,
            features: Vec::new(),
        }
    }

    #[test]
    fn only_cold_contents_that_nobody_needs_are_forgotten_the_longest_unused_first() {
        let mut contents = Contents::default();
        let ids: Vec<_> = (0..40).map(|id| prepared(id).content).collect();
        for id in 0..40 {
            contents.packed(&prepared(id), PathBuf::from(format!("/{id}")));
            if id != 3 {
                contents.dropped(&ids[id as usize], 0);
            }
        }
        contents.get_mut(&ids[5]).expect("known").pinned = Some(PinLevel::Host);
        contents.set_draining(&ids[6], true);
        contents.touch(&ids[0]);
        contents.bound(32, |content| *content == ids[4]);
        let left: Vec<u16> = (0..40).filter(|id| contents.get(&ids[*id as usize]).is_some()).collect();
        // 30 stay: 3 is in host memory, 4 is needed, 5 is pinned, 6 drains, 0 was used again.
        assert_eq!(left, [&[0, 3, 4, 5, 6][..], &(15..40).collect::<Vec<_>>()].concat());
        contents.bound(32, |_| false);
        assert_eq!(contents.iter().count(), 30);
    }

    #[test]
    fn a_report_that_may_be_older_than_a_drop_is_told_apart_until_no_such_report_is_open() {
        let mut contents = Contents::default();
        let content = prepared(1).content;
        contents.packed(&prepared(1), PathBuf::from("/1"));
        contents.dropped(&content, 7);
        contents.remove(&content);
        assert!(contents.is_stale(&content, 7) && !contents.is_stale(&content, 8));
        contents.forget_drops(7);
        assert!(contents.is_stale(&content, 7));
        contents.forget_drops(8);
        assert!(!contents.is_stale(&content, 7));
    }
}
