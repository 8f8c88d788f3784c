//! Which adapters are brought to the device, and for whom.
//!
//! A *claim* keeps a waiting sequence's adapters on the device until it starts, and promises it the KV it needs to. Claims
//! are given in order of fairness, only if both fit beside everything promised before, so a load never preempts and two
//! waiting sequences never evict each other's adapters in turns. Growth of running sequences may eat what was promised;
//! once they ended it is all there again, so every claim is redeemed.

use super::adapters::Residency;
use super::ids::SeqKey;
use super::limits::{CLAIMS_MAX, STARVING_PLANS, UPLOAD_PAGES_PER_STEP};
use super::plan::Draft;
use super::{Scheduler, Starving};
use crate::engine::ContentId;

/// What came of asking for a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// Given; its uploads ride in this step.
    Given,
    /// Nothing to do now: another upload brings the adapters, or this step carries enough.
    Later,
    /// Memory or slots are lacking.
    NoRoom,
}

impl Scheduler {
    /// Starts loads for the least served pairs that wait for one.
    pub(super) fn load_adapters(&mut self, draft: &mut Draft) {
        let hold = self.hold();
        let waiting: Vec<SeqKey> = match hold {
            Some(key) => vec![key],
            None => self.queue.loading().take(2 * CLAIMS_MAX).collect(),
        };
        for key in waiting {
            let seq = self.seq(key);
            let is_waiting = !seq.is_running() && seq.suspect.is_none();
            if !is_waiting || self.queue.residency(seq.key) != Residency::Loading {
                continue;
            }
            match self.claim(key, draft) {
                Claim::Given | Claim::Later => {}
                Claim::NoRoom => {
                    self.note_starving(key);
                    break;
                }
            }
        }
    }

    /// Claims the adapters of a waiting sequence and uploads those that are missing.
    pub(super) fn claim(&mut self, key: SeqKey, draft: &mut Draft) -> Claim {
        let fair = self.seq(key).key;
        if self.claims.len() >= CLAIMS_MAX || self.claims.iter().any(|c| *c == key || self.seq(*c).key == fair) {
            return Claim::Later;
        }
        let contents = self.seq(key).job.contents.clone();
        let (missing, pages) = self.adapters.missing(&contents);
        if missing.is_empty() || (draft.upload_pages > 0 && draft.upload_pages + pages > UPLOAD_PAGES_PER_STEP) {
            return Claim::Later;
        }
        let (own_slots, own_pages) = self.adapters.idle_among(&contents);
        let slots = self.adapters.slots_obtainable() - own_slots;
        let obtainable = self.pool.pages_obtainable() + self.adapters.idle_pages() - own_pages;
        let blocks = self.limits.blocks_for(self.seq(key).len_tokens()) as u64;
        // Those of pinned adapters are promised already.
        let new_pages = own_pages + self.adapters.pages_not_kept(&missing);
        if slots < missing.len() || obtainable < pages || !self.has_room(blocks, new_pages, Some(key), draft) {
            return Claim::NoRoom;
        }
        let present: Vec<ContentId> = contents.iter().copied().filter(|c| !missing.contains(c)).collect();
        self.adapters.claim(&present); // first: making room must not evict them
        assert!(self.make_pages(pages), "counted as obtainable");
        while self.adapters.slots_free() < missing.len() {
            let (slot, _) = self.adapters.victim().expect("counted as obtainable");
            self.evict_slot(slot);
        }
        for content in &missing {
            draft.uploads.push(self.adapters.start_upload(*content, &mut self.pool));
            self.content_moved(content);
        }
        draft.upload_pages += pages;
        self.adapters.claim(&missing);
        self.claims.push(key);
        self.no_longer_starving(key);
        Claim::Given
    }

    /// The claim's adapters become ordinary cache.
    pub(super) fn drop_claim(&mut self, key: SeqKey) {
        let contents = self.seq(key).job.contents.clone();
        self.unclaim(key, &contents);
    }

    pub(super) fn unclaim(&mut self, key: SeqKey, contents: &[ContentId]) {
        if let Some(at) = self.claims.iter().position(|c| *c == key) {
            self.claims.remove(at);
            self.adapters.unclaim(contents);
        }
    }

    pub(super) fn note_starving(&mut self, key: SeqKey) {
        self.starving.get_or_insert(Starving { key, since_plan: self.plans });
    }

    pub(super) fn no_longer_starving(&mut self, key: SeqKey) {
        if self.starving.is_some_and(|starving| starving.key == key) {
            self.starving = None;
        }
    }

    /// The sequence that was passed over for so long that nobody else is admitted before it.
    pub(super) fn hold(&self) -> Option<SeqKey> {
        let starving = self.starving?;
        (self.plans - starving.since_plan >= STARVING_PLANS).then_some(starving.key)
    }
}
