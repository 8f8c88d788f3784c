//! Adapter contents and the device's slots.
//!
//! A content is known from `adapter_ready` until it is forgotten or, once its bytes left the host slab, until its last
//! user left. A slot is free -> uploading -> resident -> free; a new generation with each upload, never repeated, not
//! even across shards. A resident slot is *pinned* by running sequences, *claimed* for waiting ones, or *idle*: cache.
//!
//! A content that an operator pinned is *kept*: its slot counts one claim that no sequence holds, so it never is idle.

#[cfg(test)]
mod audit;

use std::collections::{BTreeMap, BTreeSet};

use super::ids::SlotRef;
use super::limits::EVICTION_LOOKS;
use super::pages::PagePool;
use crate::engine::ContentId;

#[derive(Debug)]
pub(super) struct Content {
    pub(super) pages_needed: u32,
    /// The shard's host slab holds it, so it can be uploaded.
    pub(super) in_host: bool,
    /// Unfinished sequences that use it.
    pub(super) users: u32,
    slot: Option<u32>,
    /// An operator wants it on the device.
    kept: bool,
    /// Shards that died while it was being uploaded, one after another.
    deaths: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotState {
    Free,
    Uploading,
    Resident,
}

#[derive(Debug)]
struct Slot {
    state: SlotState,
    generation: u64,
    /// None for a free slot, and for one whose content was forgotten while it was uploading: it is freed when the
    /// shard reports the end of that upload, since until then the shard writes its pages.
    content: Option<ContentId>,
    pages: Vec<u32>,
    pins: u32,
    claims: u32,
    /// Plan in which it was last pinned or unpinned.
    last_used: u64,
}

/// Where a set of adapters is; decides what a waiting sequence waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Residency {
    /// All on the device.
    Resident,
    /// All at least in the host slab.
    Loading,
    /// One is not even there.
    Parked,
}

/// One upload of a step.
pub(super) struct Upload {
    pub(super) content: ContentId,
    pub(super) slot: SlotRef,
    pub(super) pages: Vec<u32>,
}

pub(super) struct AdapterTable {
    contents: BTreeMap<ContentId, Content>,
    slots: Vec<Slot>,
    free_slots: Vec<u32>,
    /// Resident, not pinned, not claimed; least recently used first.
    idle: BTreeSet<(u64, u32)>,
    idle_pages: u32,
    uploading: u32,
    kept: BTreeSet<ContentId>,
    /// Pages of all kept contents, and of those that no slot holds.
    kept_pages: u32,
    kept_missing_pages: u32,
    next_generation: u64,
    plan: u64,
    pub(super) uploads: u64,
    pub(super) upload_pages: u64,
    pub(super) evictions: u64,
}

impl AdapterTable {
    pub(super) fn new(slots_max: u32) -> Self {
        let free = || Slot {
            state: SlotState::Free,
            generation: 0,
            content: None,
            pages: Vec::new(),
            pins: 0,
            claims: 0,
            last_used: 0,
        };
        Self {
            contents: BTreeMap::new(),
            slots: (0..slots_max).map(|_| free()).collect(),
            free_slots: (0..slots_max).rev().collect(),
            idle: BTreeSet::new(),
            idle_pages: 0,
            uploading: 0,
            kept: BTreeSet::new(),
            kept_pages: 0,
            kept_missing_pages: 0,
            next_generation: 1,
            plan: 0,
            uploads: 0,
            upload_pages: 0,
            evictions: 0,
        }
    }

    pub(super) fn set_plan(&mut self, plan: u64) {
        self.plan = plan;
    }

    pub(super) fn get(&self, content: &ContentId) -> Option<&Content> {
        self.contents.get(content)
    }

    /// The content is in the host slab.
    pub(super) fn ready(&mut self, content: ContentId, pages_needed: u32) {
        let new = Content { pages_needed, in_host: true, users: 0, slot: None, kept: false, deaths: 0 };
        let known = self.contents.entry(content).or_insert(new);
        known.in_host = true;
        if known.slot.is_none() {
            let before = std::mem::replace(&mut known.pages_needed, pages_needed);
            if known.kept {
                self.kept_pages = self.kept_pages - before + pages_needed;
                self.kept_missing_pages = self.kept_missing_pages - before + pages_needed;
            }
        }
    }

    pub(super) fn add_user(&mut self, content: &ContentId) {
        self.contents.get_mut(content).expect("a sequence uses known contents only").users += 1;
    }

    /// One unfinished sequence less. A content that is in no host slab and has no user is forgotten, unless it is kept.
    pub(super) fn remove_user(&mut self, content: &ContentId, pool: &mut PagePool) {
        let known = self.contents.get_mut(content).expect("a used content stays known");
        known.users -= 1;
        if known.users == 0 && !known.in_host && !known.kept {
            self.forget(content, pool);
        }
    }

    /// Drops it and its copy on the device. Nobody may use it.
    pub(super) fn forget(&mut self, content: &ContentId, pool: &mut PagePool) {
        self.unkeep(content);
        let Some(known) = self.contents.remove(content) else { return };
        debug_assert_eq!(known.users, 0, "a content in use is never forgotten");
        let Some(slot) = known.slot else { return };
        if self.slots[slot as usize].state == SlotState::Uploading {
            self.slots[slot as usize].content = None;
        } else {
            self.free_slot(slot, pool);
        }
    }

    /// The host slab lost it, but it is still used: no new upload until it is ready again.
    pub(super) fn left_host(&mut self, content: &ContentId) {
        if let Some(known) = self.contents.get_mut(content) {
            known.in_host = false;
        }
    }

    /// A new shard: nothing is resident, nothing in the host slab. Contents nobody uses are forgotten.
    pub(super) fn reset(&mut self) {
        for slot in &mut self.slots {
            if slot.state == SlotState::Uploading
                && let Some(content) = slot.content.and_then(|content| self.contents.get_mut(&content))
            {
                content.deaths += 1;
            }
            slot.state = SlotState::Free;
            slot.content = None;
            slot.pages.clear();
            (slot.pins, slot.claims) = (0, 0);
        }
        self.free_slots = (0..self.slots.len() as u32).rev().collect();
        self.idle.clear();
        (self.idle_pages, self.uploading) = (0, 0);
        self.contents.retain(|_, content| content.users > 0 || content.kept);
        self.kept_missing_pages = self.kept_pages;
        for content in self.contents.values_mut() {
            content.in_host = false;
            content.slot = None;
        }
    }

    pub(super) fn residency<'a>(&self, contents: impl IntoIterator<Item = &'a ContentId>) -> Residency {
        let mut all = Residency::Resident;
        for content in contents {
            match self.contents.get(content) {
                Some(content) if content.slot.is_some_and(|s| self.is_resident(s)) => {}
                Some(content) if content.in_host || content.slot.is_some() => all = Residency::Loading,
                _ => return Residency::Parked,
            }
        }
        all
    }

    fn is_resident(&self, slot: u32) -> bool {
        self.slots[slot as usize].state == SlotState::Resident
    }

    /// Pages of idle slots: what eviction can give.
    pub(super) fn idle_pages(&self) -> u32 {
        self.idle_pages
    }

    pub(super) fn slots_free(&self) -> usize {
        self.free_slots.len()
    }

    /// Slots that are free or idle.
    pub(super) fn slots_obtainable(&self) -> usize {
        self.free_slots.len() + self.idle.len()
    }

    /// (slots, pages) of these contents that are idle now: they stop being obtainable once claimed or pinned.
    pub(super) fn idle_among(&self, contents: &[ContentId]) -> (usize, u32) {
        let idle = contents.iter().filter_map(|c| self.contents.get(c)?.slot).filter(|s| self.is_idle(*s));
        idle.fold((0, 0), |(slots, pages), s| (slots + 1, pages + self.slots[s as usize].pages.len() as u32))
    }

    fn is_idle(&self, slot: u32) -> bool {
        let slot = &self.slots[slot as usize];
        slot.state == SlotState::Resident && slot.pins == 0 && slot.claims == 0
    }

    /// Those that no slot holds, and the pages they take.
    pub(super) fn missing(&self, contents: &[ContentId]) -> (Vec<ContentId>, u32) {
        let missing: Vec<_> =
            contents.iter().copied().filter(|c| self.contents.get(c).is_some_and(|c| c.slot.is_none())).collect();
        let pages = missing.iter().map(|c| self.contents[c].pages_needed).sum();
        (missing, pages)
    }

    pub(super) fn is_uploading(&self) -> bool {
        self.uploading > 0
    }

    /// Pins the slot of a resident content for a running sequence.
    pub(super) fn pin(&mut self, content: &ContentId) -> SlotRef {
        let slot = self.slot_of(content);
        self.change(slot, |s| s.pins += 1);
        SlotRef { slot, generation: self.slots[slot as usize].generation }
    }

    pub(super) fn unpin(&mut self, pin: SlotRef) {
        debug_assert_eq!(self.slots[pin.slot as usize].generation, pin.generation, "a pinned slot was reused");
        self.change(pin.slot, |s| s.pins -= 1);
    }

    /// Keeps the slots that hold these contents for a waiting sequence.
    pub(super) fn claim(&mut self, contents: &[ContentId]) {
        for content in contents {
            let slot = self.slot_of(content);
            self.change(slot, |s| s.claims += 1);
        }
    }

    pub(super) fn unclaim(&mut self, contents: &[ContentId]) {
        for content in contents {
            if let Some(slot) = self.contents.get(content).and_then(|c| c.slot) {
                self.change(slot, |s| s.claims = s.claims.saturating_sub(1));
            }
        }
    }

    /// Keeps it on the device from the moment it is there. The caller made sure that requests still fit.
    pub(super) fn keep(&mut self, content: &ContentId) {
        let Some(known) = self.contents.get_mut(content).filter(|known| !known.kept) else { return };
        known.kept = true;
        let (slot, pages) = (known.slot, known.pages_needed);
        self.kept.insert(*content);
        self.kept_pages += pages;
        match slot {
            Some(slot) => self.change(slot, |s| s.claims += 1),
            None => self.kept_missing_pages += pages,
        }
    }

    /// It becomes ordinary cache. False if it was that already.
    pub(super) fn unkeep(&mut self, content: &ContentId) -> bool {
        let Some(known) = self.contents.get_mut(content).filter(|known| known.kept) else { return false };
        known.kept = false;
        let (slot, pages) = (known.slot, known.pages_needed);
        self.kept.remove(content);
        self.kept_pages -= pages;
        match slot {
            Some(slot) => self.change(slot, |s| s.claims -= 1),
            None => self.kept_missing_pages -= pages,
        }
        true
    }

    /// Kept contents.
    pub(super) fn kept(&self) -> &BTreeSet<ContentId> {
        &self.kept
    }

    pub(super) fn is_kept(&self, content: &ContentId) -> bool {
        self.contents.get(content).is_some_and(|known| known.kept)
    }

    /// Pages of all kept contents.
    pub(super) fn kept_pages(&self) -> u32 {
        self.kept_pages
    }

    /// Pages that kept contents still have to be given.
    pub(super) fn kept_missing_pages(&self) -> u32 {
        self.kept_missing_pages
    }

    /// Pages of those that are not kept.
    pub(super) fn pages_not_kept(&self, contents: &[ContentId]) -> u32 {
        let known = contents.iter().filter_map(|content| self.contents.get(content));
        known.filter(|known| !known.kept).map(|known| known.pages_needed).sum()
    }

    /// Pages it would take now; None if it is on the device, or on its way, or cannot be uploaded.
    pub(super) fn pages_to_upload(&self, content: &ContentId) -> Option<u32> {
        let known = self.contents.get(content)?;
        (known.in_host && known.slot.is_none()).then_some(known.pages_needed)
    }

    /// Shards that died during its last uploads.
    pub(super) fn deaths(&self, content: &ContentId) -> u32 {
        self.contents.get(content).map_or(0, |known| known.deaths)
    }

    fn slot_of(&self, content: &ContentId) -> u32 {
        self.contents.get(content).and_then(|c| c.slot).expect("the content has a slot")
    }

    /// Applies a change of pins or claims and keeps `idle` true.
    fn change(&mut self, slot: u32, change: impl FnOnce(&mut Slot)) {
        let was_idle = self.is_idle(slot);
        let plan = self.plan;
        let entry = &mut self.slots[slot as usize];
        let (before, pages) = (entry.last_used, entry.pages.len() as u32);
        change(entry);
        entry.last_used = plan;
        if was_idle {
            self.idle.remove(&(before, slot));
            self.idle_pages -= pages;
        }
        if self.is_idle(slot) {
            self.idle.insert((plan, slot));
            self.idle_pages += pages;
        }
    }

    /// The idle adapter to evict: of the longest unused ones, the one whose reload is cheapest for its age. Returns the
    /// slot and the plan in which it was last used.
    pub(super) fn victim(&self) -> Option<(u32, u64)> {
        let cost = |slot: u32| 1 + self.slots[slot as usize].pages.len() as u128;
        let age = |at: u64| u128::from(self.plan.saturating_sub(at)) + 1;
        let oldest = self.idle.iter().take(EVICTION_LOOKS);
        let best = oldest.reduce(|a, b| if age(b.0) * cost(a.1) > age(a.0) * cost(b.1) { b } else { a });
        best.map(|&(at, slot)| (slot, at))
    }

    /// Frees an idle slot and returns the content that lost it.
    pub(super) fn evict(&mut self, slot: u32, pool: &mut PagePool) -> ContentId {
        assert!(self.is_idle(slot), "a slot in use is never evicted");
        let content = self.slots[slot as usize].content.expect("an idle slot holds a content");
        self.evictions += 1;
        self.free_slot(slot, pool);
        if let Some(known) = self.contents.get_mut(&content) {
            known.slot = None;
        }
        content
    }

    fn free_slot(&mut self, slot: u32, pool: &mut PagePool) {
        let was_idle = self.is_idle(slot);
        let entry = &mut self.slots[slot as usize];
        assert_eq!((entry.pins, entry.claims), (0, 0), "a slot in use is never freed");
        if was_idle {
            self.idle.remove(&(entry.last_used, slot));
            self.idle_pages -= entry.pages.len() as u32;
        }
        pool.give_adapter_pages(&entry.pages);
        entry.pages.clear();
        entry.content = None;
        entry.state = SlotState::Free;
        self.free_slots.push(slot);
    }

    /// Starts an upload into a free slot and free pages, which the caller made sure of.
    pub(super) fn start_upload(&mut self, content: ContentId, pool: &mut PagePool) -> Upload {
        let slot = self.free_slots.pop().expect("the caller made room for the slot");
        let known = self.contents.get_mut(&content).expect("only a known content is uploaded");
        let pages = pool.take_adapter_pages(known.pages_needed).expect("the caller made room for the pages");
        known.slot = Some(slot);
        if known.kept {
            self.kept_missing_pages -= known.pages_needed;
        }
        let kept = u32::from(known.kept);
        let generation = self.next_generation;
        self.next_generation += 1;
        let entry = &mut self.slots[slot as usize];
        entry.state = SlotState::Uploading;
        entry.generation = generation;
        entry.content = Some(content);
        entry.pages.clone_from(&pages);
        entry.claims = kept;
        entry.last_used = self.plan;
        self.uploading += 1;
        self.uploads += 1;
        self.upload_pages += pages.len() as u64;
        Upload { content, slot: SlotRef { slot, generation }, pages }
    }

    /// The shard published an upload. Returns the content that is resident from now on; None for a report that means
    /// no upload of ours and for a content that was forgotten meanwhile.
    pub(super) fn uploaded(&mut self, at: SlotRef, pool: &mut PagePool) -> Option<ContentId> {
        let slot = self.slots.get_mut(at.slot as usize)?;
        if slot.state != SlotState::Uploading || slot.generation != at.generation {
            return None;
        }
        self.uploading -= 1;
        let Some(content) = slot.content else {
            self.free_slot(at.slot, pool);
            return None;
        };
        slot.state = SlotState::Resident;
        slot.last_used = self.plan;
        if let Some(known) = self.contents.get_mut(&content) {
            known.deaths = 0;
        }
        if self.is_idle(at.slot) {
            self.idle.insert((self.plan, at.slot));
            self.idle_pages += self.slots[at.slot as usize].pages.len() as u32;
        }
        Some(content)
    }

    /// Contents on the device, most recently used first.
    pub(super) fn resident(&self) -> Vec<ContentId> {
        let mut resident: Vec<_> = self
            .slots
            .iter()
            .filter(|slot| slot.state == SlotState::Resident)
            .filter_map(|slot| Some((std::cmp::Reverse(slot.last_used), slot.content?)))
            .collect();
        resident.sort_unstable();
        resident.into_iter().map(|(_, content)| content).collect()
    }

    /// Contents that unfinished sequences use.
    pub(super) fn used(&self) -> impl Iterator<Item = (&ContentId, &Content)> {
        self.contents.iter().filter(|(_, content)| content.users > 0)
    }

    /// Used and not on the device.
    pub(super) fn waited_for(&self) -> Vec<ContentId> {
        self.used().filter(|(_, c)| !c.slot.is_some_and(|s| self.is_resident(s))).map(|(id, _)| *id).collect()
    }
}
