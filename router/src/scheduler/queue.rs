//! Who goes next: token-weighted fairness over (tenant, adapter set).
//!
//! Every pair has a counter of positions served, *served*; the least served pair that can start goes first. A pair that
//! appears or comes back starts at the least of those that want service now, so nobody saves up credit by being away and
//! nobody waits behind a flood. Within a pair: priority, then arrival.

use std::collections::{BTreeMap, BTreeSet};

use super::adapters::Residency;
use super::ids::{FairKey, SeqKey};
use super::limits::RETIRED_KEYS_MAX;
use crate::engine::{AdapterUse, ContentId};

/// Place in a pair's own queue: smaller first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    pub(super) priority: i32,
    /// Arrival of the request.
    pub(super) arrival: u64,
    /// Sibling.
    pub(super) index: u32,
    pub(super) seq: SeqKey,
}

/// Tenant and adapter set (scales as bits, in the order of the request).
type Pair = (u64, Vec<(ContentId, u32)>);

struct Entry {
    pair: Pair,
    served: u64,
    waiting: BTreeSet<Turn>,
    residency: Residency,
    /// Unfinished sequences, waiting or not.
    members: u32,
}

#[derive(Default)]
pub(super) struct FairQueue {
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    by_pair: BTreeMap<Pair, FairKey>,
    /// Pairs with a waiting sequence whose adapters are all resident; least served first.
    resident: BTreeSet<(u64, FairKey)>,
    /// The same for adapters that are at least in the host slab.
    loading: BTreeSet<(u64, FairKey)>,
    /// Pairs without members that were served more than `floor`.
    retired: BTreeSet<(u64, FairKey)>,
    by_content: BTreeMap<ContentId, BTreeSet<FairKey>>,
    /// The least served of those that wanted service, as last known.
    floor: u64,
    waiting: u32,
}

impl FairQueue {
    fn entry(&self, key: FairKey) -> &Entry {
        self.entries[key.0 as usize].as_ref().expect("a key in use has an entry")
    }

    fn entry_mut(&mut self, key: FairKey) -> &mut Entry {
        self.entries[key.0 as usize].as_mut().expect("a key in use has an entry")
    }

    pub(super) fn served(&self, key: FairKey) -> u64 {
        self.entry(key).served
    }

    /// One more unfinished sequence of this pair. `running_min`: the least served pair that runs.
    pub(super) fn join(
        &mut self,
        tenant: u64,
        adapters: &[AdapterUse],
        residency: Residency,
        running_min: impl FnOnce(&Self) -> Option<u64>,
    ) -> FairKey {
        let pair: Pair = (tenant, adapters.iter().map(|a| (a.content, a.scale.to_bits())).collect());
        if let Some(&key) = self.by_pair.get(&pair) {
            if self.entry(key).members == 0 {
                self.retired.remove(&(self.served(key), key));
                self.raise_floor(running_min);
                let floor = self.floor;
                let entry = self.entry_mut(key);
                entry.served = entry.served.max(floor);
                entry.residency = residency;
            }
            self.entry_mut(key).members += 1;
            return key;
        }
        self.raise_floor(running_min);
        let served = self.floor;
        for (content, _) in &pair.1 {
            self.by_content.entry(*content).or_default();
        }
        let entry = Entry { pair: pair.clone(), served, waiting: BTreeSet::new(), residency, members: 1 };
        let key = match self.free.pop() {
            Some(at) => FairKey(at),
            None => {
                self.entries.push(None);
                FairKey(self.entries.len() as u32 - 1)
            }
        };
        for (content, _) in &pair.1 {
            self.by_content.entry(*content).or_default().insert(key);
        }
        self.entries[key.0 as usize] = Some(entry);
        self.by_pair.insert(pair, key);
        key
    }

    fn raise_floor(&mut self, running_min: impl FnOnce(&Self) -> Option<u64>) {
        let waiting = [self.resident.first(), self.loading.first()].into_iter().flatten().map(|(served, _)| *served);
        if let Some(least) = waiting.chain(running_min(self)).min() {
            self.floor = self.floor.max(least);
        }
    }

    /// One unfinished sequence less. What the pair was served is remembered while that is more than the floor.
    pub(super) fn leave(&mut self, key: FairKey) {
        let floor = self.floor;
        let entry = self.entry_mut(key);
        entry.members -= 1;
        if entry.members > 0 {
            return;
        }
        debug_assert!(entry.waiting.is_empty(), "a pair without members has nobody waiting");
        let served = entry.served;
        if served > floor {
            self.retired.insert((served, key));
        } else {
            self.drop_entry(key);
        }
        while let Some(&(served, oldest)) = self.retired.first() {
            if served > floor && self.retired.len() <= RETIRED_KEYS_MAX {
                break;
            }
            self.retired.remove(&(served, oldest));
            self.drop_entry(oldest);
        }
    }

    fn drop_entry(&mut self, key: FairKey) {
        let Some(entry) = self.entries[key.0 as usize].take() else { return };
        for (content, _) in &entry.pair.1 {
            if let Some(keys) = self.by_content.get_mut(content) {
                keys.remove(&key);
                if keys.is_empty() {
                    self.by_content.remove(content);
                }
            }
        }
        self.by_pair.remove(&entry.pair);
        self.free.push(key.0);
    }

    fn ready_set(&mut self, residency: Residency) -> Option<&mut BTreeSet<(u64, FairKey)>> {
        match residency {
            Residency::Resident => Some(&mut self.resident),
            Residency::Loading => Some(&mut self.loading),
            Residency::Parked => None,
        }
    }

    pub(super) fn push(&mut self, key: FairKey, turn: Turn) {
        let entry = self.entry_mut(key);
        let (served, residency) = (entry.served, entry.residency);
        assert!(entry.waiting.insert(turn), "a sequence waits once");
        self.waiting += 1;
        if let Some(set) = self.ready_set(residency) {
            set.insert((served, key));
        }
    }

    pub(super) fn remove(&mut self, key: FairKey, turn: &Turn) {
        let entry = self.entry_mut(key);
        assert!(entry.waiting.remove(turn), "a sequence leaves the queue it is in");
        let (served, residency, empty) = (entry.served, entry.residency, entry.waiting.is_empty());
        self.waiting -= 1;
        if empty && let Some(set) = self.ready_set(residency) {
            set.remove(&(served, key));
        }
    }

    /// Adds `positions` to what the pair was served.
    pub(super) fn charge(&mut self, key: FairKey, positions: u64) {
        let entry = self.entry_mut(key);
        let (before, residency, waits) = (entry.served, entry.residency, !entry.waiting.is_empty());
        entry.served += positions;
        let after = entry.served;
        if waits && let Some(set) = self.ready_set(residency) {
            set.remove(&(before, key));
            set.insert((after, key));
        }
    }

    /// A content moved: pairs that use it are sorted anew. One that could not be served until now does not cash in.
    pub(super) fn content_moved(&mut self, content: &ContentId, residency: impl Fn(&[(ContentId, u32)]) -> Residency) {
        self.raise_floor(|_| None);
        let Some(keys) = self.by_content.get(content) else { return };
        for key in keys.iter().copied().collect::<Vec<_>>() {
            let floor = self.floor;
            let entry = self.entry_mut(key);
            let (before, old) = (entry.served, entry.residency);
            let new = residency(&entry.pair.1);
            if old == new || entry.members == 0 {
                entry.residency = new;
                continue;
            }
            entry.residency = new;
            if old == Residency::Parked {
                entry.served = entry.served.max(floor);
            }
            let (after, waits) = (entry.served, !entry.waiting.is_empty());
            if waits {
                if let Some(set) = self.ready_set(old) {
                    set.remove(&(before, key));
                }
                if let Some(set) = self.ready_set(new) {
                    set.insert((after, key));
                }
            }
        }
    }

    /// The least served pair whose adapters are resident, and its next sequence.
    pub(super) fn first_resident(&self) -> Option<(u64, SeqKey)> {
        let &(served, key) = self.resident.first()?;
        Some((served, self.entry(key).waiting.first()?.seq))
    }

    /// The next sequence whose adapters are resident, least served pair first, that is not among `held`.
    pub(super) fn first_resident_but(&self, held: &[SeqKey]) -> Option<SeqKey> {
        let pairs = self.resident.iter().map(|(_, key)| &self.entry(*key).waiting);
        pairs.flatten().map(|turn| turn.seq).find(|seq| !held.contains(seq))
    }

    /// Next sequence of each pair that waits for an upload, least served first.
    pub(super) fn loading(&self) -> impl Iterator<Item = SeqKey> {
        self.loading.iter().filter_map(|(_, key)| Some(self.entry(*key).waiting.first()?.seq))
    }

    pub(super) fn residency(&self, key: FairKey) -> Residency {
        self.entry(key).residency
    }
}

#[cfg(test)]
impl FairQueue {
    /// Every waiting sequence with its key.
    pub(super) fn all(&self) -> impl Iterator<Item = (FairKey, SeqKey)> {
        let keys = self.entries.iter().enumerate().filter_map(|(at, e)| Some((FairKey(at as u32), e.as_ref()?)));
        keys.flat_map(|(key, entry)| entry.waiting.iter().map(move |turn| (key, turn.seq)))
    }

    /// Panics unless the sorted sets agree with the entries, and `residency` with each.
    pub(super) fn audit(&self, residency: impl Fn(&[(ContentId, u32)]) -> Residency) {
        let (mut resident, mut loading, mut waiting) = (BTreeSet::new(), BTreeSet::new(), 0);
        for (at, entry) in self.entries.iter().enumerate() {
            let Some(entry) = entry else { continue };
            let key = FairKey(at as u32);
            waiting += entry.waiting.len() as u32;
            if entry.members == 0 {
                assert!(self.retired.contains(&(entry.served, key)));
                continue;
            }
            assert_eq!(entry.residency, residency(&entry.pair.1), "residency of a pair");
            if !entry.waiting.is_empty() {
                match entry.residency {
                    Residency::Resident => drop(resident.insert((entry.served, key))),
                    Residency::Loading => drop(loading.insert((entry.served, key))),
                    Residency::Parked => {}
                }
            }
        }
        assert_eq!((resident, loading, waiting), (self.resident.clone(), self.loading.clone(), self.waiting));
    }
}
