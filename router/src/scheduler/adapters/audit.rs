//! Invariants of the table, recounted from scratch.

use std::collections::{BTreeMap, BTreeSet};

use super::{AdapterTable, SlotState};
use crate::engine::ContentId;
use crate::scheduler::ids::SlotRef;

impl AdapterTable {
    /// (content, slot, pages, pins, resident) of every slot that is not free.
    pub(in super::super) fn held(&self) -> impl Iterator<Item = (Option<ContentId>, SlotRef, &[u32], u32, bool)> {
        self.slots.iter().enumerate().filter(|(_, s)| s.state != SlotState::Free).map(|(at, s)| {
            let slot = SlotRef { slot: at as u32, generation: s.generation };
            (s.content, slot, s.pages.as_slice(), s.pins, s.state == SlotState::Resident)
        })
    }

    pub(in super::super) fn users(&self) -> impl Iterator<Item = (&ContentId, u32)> {
        self.contents.iter().map(|(id, content)| (id, content.users))
    }

    /// Panics unless counters and lists agree with the slots themselves.
    pub(in super::super) fn audit(&self) {
        let idle: BTreeSet<_> = (0..self.slots.len() as u32)
            .filter(|&s| self.is_idle(s))
            .map(|s| (self.slots[s as usize].last_used, s))
            .collect();
        assert_eq!(idle, self.idle);
        let pages: usize = idle.iter().map(|(_, s)| self.slots[*s as usize].pages.len()).sum();
        assert_eq!(pages as u32, self.idle_pages);
        let uploading = self.slots.iter().filter(|s| s.state == SlotState::Uploading).count();
        assert_eq!(uploading as u32, self.uploading);
        let free = self.slots.iter().filter(|s| s.state == SlotState::Free).count();
        assert_eq!(free, self.free_slots.len());
        for (id, content) in &self.contents {
            if let Some(slot) = content.slot {
                assert_eq!(self.slots[slot as usize].content, Some(*id));
                assert_ne!(self.slots[slot as usize].state, SlotState::Free);
            }
        }
        let kept: BTreeSet<_> = self.contents.iter().filter(|(_, c)| c.kept).map(|(id, _)| *id).collect();
        assert_eq!(kept, self.kept);
        let pages = |missing: bool| {
            let kept = kept.iter().map(|id| &self.contents[id]).filter(|c| !missing || c.slot.is_none());
            kept.map(|c| c.pages_needed).sum::<u32>()
        };
        assert_eq!((pages(false), pages(true)), (self.kept_pages, self.kept_missing_pages), "pages of kept adapters");
        for slot in &self.slots {
            assert!(slot.pins == 0 || slot.state == SlotState::Resident, "a pinned adapter is resident");
        }
    }

    /// Panics unless each slot has the claims of `claims` and one if it is kept.
    pub(in super::super) fn audit_claims(&self, claims: &BTreeMap<ContentId, u32>) {
        for slot in self.slots.iter().filter(|s| s.state != SlotState::Free) {
            let own =
                slot.content.map_or(0, |c| claims.get(&c).copied().unwrap_or(0) + u32::from(self.kept.contains(&c)));
            assert_eq!(slot.claims, own, "claims on {:?}", slot.content);
        }
    }
}
