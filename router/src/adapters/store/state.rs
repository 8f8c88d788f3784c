//! What the store has, in memory. No call in here touches the disk, so it may be asked from anywhere.
//!
//! Bytes are in one of four places, and each byte in exactly one: a *content*, an idle *partial* download, the *trash*
//! (to be unlinked), or the reservation of a running download. Contents and partials give way; trash only waits.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use super::accounts::Accounts;
use super::error::StoreError;
use super::record::{FilesId, Record};
use super::{Held, RECORDS_MAX};
use crate::adapters::fetch::Tenant;

/// A record and when it was used.
pub(super) struct Known {
    pub(super) record: Record,
    pub(super) files_id: FilesId,
    /// Nanoseconds since 1970, made unique.
    pub(super) last_used: u64,
    /// The last use that the disk knows of.
    pub(super) noted: u64,
}

/// A directory with two files.
pub(super) struct Content {
    pub(super) bytes: u64,
    pub(super) tenant: u64,
    /// False once it was evicted, forgotten or found damaged: nobody gets it any more.
    pub(super) live: bool,
    /// Its files are not what was stored: who brings the same content anew replaces them.
    pub(super) damaged: bool,
    pub(super) guard: Weak<Held>,
    pub(super) last_used: u64,
}

/// A download that stopped; another one may go on from it.
#[derive(Clone, Debug)]
pub(super) struct Partial {
    pub(super) dir: PathBuf,
    pub(super) bytes: u64,
    pub(super) tenant: u64,
    pub(super) last_used: u64,
}

/// Something to unlink.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Trash {
    pub(super) bytes: u64,
    pub(super) tenant: u64,
}

/// What [`State::plan_room`] found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// The bytes are reserved.
    Reserved,
    /// Something has to be unlinked first; then ask again.
    SweepFirst,
}

/// See the module.
pub(super) struct State {
    pub(super) quota_bytes: u64,
    pub(super) known: HashMap<Arc<str>, Known>,
    /// Identities by content.
    pub(super) by_files: HashMap<FilesId, Vec<Arc<str>>>,
    pub(super) contents: HashMap<FilesId, Content>,
    pub(super) partials: HashMap<Arc<str>, Partial>,
    pub(super) pinned: HashSet<Arc<str>>,
    /// To be unlinked, by path.
    pub(super) trash: HashMap<PathBuf, Trash>,
    /// Records of the index to unlink.
    pub(super) forgotten: Vec<Arc<str>>,
    pub(super) accounts: Accounts,
    clock: u64,
}

impl State {
    pub(super) fn new(quota_bytes: u64) -> Self {
        Self {
            quota_bytes,
            known: HashMap::new(),
            by_files: HashMap::new(),
            contents: HashMap::new(),
            partials: HashMap::new(),
            pinned: HashSet::new(),
            trash: HashMap::new(),
            forgotten: Vec::new(),
            accounts: Accounts::default(),
            clock: 0,
        }
    }

    /// A time no use had before, `now_ns` if that is one.
    pub(super) fn tick(&mut self, now_ns: u64) -> u64 {
        self.clock = now_ns.max(self.clock + 1);
        self.clock
    }

    /// Notes what `record` says, in place of an earlier one of its identity.
    pub(super) fn learn(&mut self, record: Record, last_used: u64) {
        let identity: Arc<str> = record.identity.as_str().into();
        let files_id = record.files_id();
        if let Some(old) = self.unlearn(&identity).map(|known| known.files_id) {
            let is_used = old == files_id || self.by_files.contains_key(&old);
            self.retire_unless(&old, is_used);
        }
        self.by_files.entry(files_id).or_default().push(Arc::clone(&identity));
        self.known.insert(identity, Known { record, files_id, last_used, noted: last_used });
        if self.known.len() > RECORDS_MAX {
            self.unlearn_oldest();
        }
    }

    /// Forgets a record; its content stays.
    pub(super) fn unlearn(&mut self, identity: &str) -> Option<Known> {
        let known = self.known.remove(identity)?;
        if let Some(identities) = self.by_files.get_mut(&known.files_id) {
            identities.retain(|other| **other != *identity);
            if identities.is_empty() {
                self.by_files.remove(&known.files_id);
            }
        }
        Some(known)
    }

    /// The oldest record whose bytes are not here makes room for a new one.
    fn unlearn_oldest(&mut self) {
        let is_here = |known: &Known| self.contents.get(&known.files_id).is_some_and(|content| content.live);
        let away = self.known.iter().filter(|(_, known)| !is_here(known));
        let oldest = away.min_by_key(|(_, known)| known.last_used).map(|(identity, _)| Arc::clone(identity));
        if let Some(identity) = oldest {
            self.unlearn(&identity);
            self.forgotten.push(identity);
        }
    }

    /// Nobody gets this content any more; it is unlinked once nobody has it. Bytes that this will free.
    pub(super) fn retire(&mut self, files_id: &FilesId) -> u64 {
        let content = self.contents.get_mut(files_id).filter(|content| content.live);
        content.map_or(0, |content| {
            content.live = false;
            content.bytes
        })
    }

    /// [`Self::retire`], unless some identity still stands for it.
    pub(super) fn retire_unless(&mut self, files_id: &FilesId, is_used: bool) -> u64 {
        if is_used { 0 } else { self.retire(files_id) }
    }

    /// True if something waits to be unlinked and nobody has it.
    pub(super) fn has_dead(&self) -> bool {
        !self.trash.is_empty()
            || !self.forgotten.is_empty()
            || self.contents.values().any(|content| !content.live && content.guard.strong_count() == 0)
    }

    /// What nobody gets and nobody has.
    pub(super) fn dead(&self) -> Vec<FilesId> {
        let is_dead = |content: &Content| !content.live && content.guard.strong_count() == 0;
        self.contents.iter().filter(|(_, content)| is_dead(content)).map(|(id, _)| *id).collect()
    }

    /// A content's directory is at `path` now, waiting to be unlinked.
    pub(super) fn trash_content(&mut self, files_id: &FilesId, path: PathBuf) {
        if let Some(Content { bytes, tenant, .. }) = self.contents.remove(files_id) {
            self.trash.insert(path, Trash { bytes, tenant });
        }
    }

    /// `path` is unlinked.
    pub(super) fn untrash(&mut self, path: &Path) {
        if let Some(Trash { bytes, tenant }) = self.trash.remove(path) {
            self.accounts.remove(tenant, bytes);
        }
    }

    fn is_pinned(&self, files_id: &FilesId) -> bool {
        let identities = self.by_files.get(files_id).map(Vec::as_slice).unwrap_or_default();
        !self.pinned.is_empty() && identities.iter().any(|identity| self.pinned.contains(identity))
    }

    /// Reserves `need_bytes` for `who`, or chooses what gives way for them: idle partials first, then contents that nobody
    /// has and no pin keeps, the longest unused first. Chooses nothing where that would not be enough.
    pub(super) fn plan_room(&mut self, who: Tenant, need_bytes: u64) -> Result<Room, StoreError> {
        if need_bytes > self.quota_bytes {
            let reason = format!("the whole quota is {} bytes (--adapter-disk-quota)", self.quota_bytes);
            return Err(StoreError::Full { need_bytes, reason });
        }
        let over = |total: u64, limit: u64| total.saturating_add(need_bytes).saturating_sub(limit);
        let over_all = over(self.accounts.total(), self.quota_bytes);
        let over_own = who.disk_bytes_max.map_or(0, |limit| over(self.accounts.of(who.id), limit));
        if over_all == 0 && over_own == 0 {
            self.accounts.reserve(who.id, need_bytes);
            return Ok(Room::Reserved);
        }
        let own = self.give_way(over_own, |tenant| tenant == who.id);
        let own = own.map_err(|free| StoreError::Quota {
            need_bytes,
            used_bytes: self.accounts.of(who.id).saturating_sub(free),
            limit_bytes: who.disk_bytes_max.unwrap_or(0),
        })?;
        let all = self.give_way(over_all, |_| true).map_err(|free| {
            let stuck = self.accounts.total().saturating_sub(free);
            let reason = format!(
                "{stuck} of {} bytes are in use, pinned or being downloaded (--adapter-disk-quota)",
                self.quota_bytes
            );
            StoreError::Full { need_bytes, reason }
        })?;
        for victim in own.into_iter().chain(all) {
            self.drop_victim(victim);
        }
        Ok(Room::SweepFirst)
    }

    /// Chooses as [`Self::plan_room`] does, for a disk that lacks `bytes`. False if nothing can give way.
    pub(super) fn plan_free(&mut self, bytes: u64) -> bool {
        let victims = self.give_way(bytes, |_| true).unwrap_or_default();
        let found = !victims.is_empty();
        victims.into_iter().for_each(|victim| self.drop_victim(victim));
        found || self.has_dead()
    }

    /// What gives way to free `bytes` among the things of the tenants that `whose` takes. `Err` with the bytes that could be
    /// freed when these are too few. What already waits to be unlinked counts, and is no victim again.
    fn give_way(&self, bytes: u64, whose: impl Fn(u64) -> bool) -> Result<Vec<Victim>, u64> {
        let trash = self.trash.values().filter(|trash| whose(trash.tenant)).map(|trash| trash.bytes);
        let dead = self.contents.values().filter(|content| !content.live && content.guard.strong_count() == 0);
        let dead = dead.filter(|content| whose(content.tenant)).map(|content| content.bytes);
        let mut free: u64 = trash.chain(dead).sum();
        let mut candidates: Vec<(bool, u64, u64, Victim)> = Vec::new();
        if free < bytes {
            let partials = self.partials.iter().filter(|(_, partial)| whose(partial.tenant));
            candidates.extend(partials.map(|(identity, partial)| {
                (false, partial.last_used, partial.bytes, Victim::Partial(Arc::clone(identity)))
            }));
            let idle = self.contents.iter().filter(|(_, content)| content.live && content.guard.strong_count() == 0);
            let idle = idle.filter(|(id, content)| whose(content.tenant) && !self.is_pinned(id));
            candidates.extend(idle.map(|(id, content)| (true, content.last_used, content.bytes, Victim::Content(*id))));
            candidates.sort_unstable_by_key(|(is_content, last_used, ..)| (*is_content, *last_used));
        }
        let mut victims = Vec::new();
        for (_, _, size, victim) in candidates {
            if free >= bytes {
                break;
            }
            free += size;
            victims.push(victim);
        }
        if free >= bytes { Ok(victims) } else { Err(free) }
    }

    fn drop_victim(&mut self, victim: Victim) {
        match victim {
            Victim::Partial(identity) => {
                self.trash_partial(&identity);
            }
            Victim::Content(id) => {
                self.retire(&id);
            }
        }
    }

    /// Moves an idle partial to the trash. Its bytes.
    pub(super) fn trash_partial(&mut self, identity: &str) -> u64 {
        self.partials.remove(identity).map_or(0, |Partial { dir, bytes, tenant, .. }| {
            self.trash.insert(dir, Trash { bytes, tenant });
            bytes
        })
    }

    /// Sums everything again; what the accounts must say.
    #[cfg(test)]
    pub(super) fn recount(&self) -> u64 {
        let contents = self.contents.values().map(|content| content.bytes);
        let partials = self.partials.values().map(|partial| partial.bytes);
        contents.chain(partials).chain(self.trash.values().map(|trash| trash.bytes)).sum()
    }
}

/// What gives way.
enum Victim {
    Partial(Arc<str>),
    Content(FilesId),
}
