//! Adapters that come to the device though no sequence's turn has come: pinned by an operator, or fetched ahead of need.
//!
//! Pinned ones get their pages before anybody starts, at the cost of cache only; what they still lack is promised to them
//! like a claim. If they wait for too long, nobody starts until they are there. Fetching ahead takes nothing but free
//! pages. Nobody answers for such an upload, so there is none while a suspect is tried, and an adapter whose upload killed
//! a shard is not fetched ahead again, and unpinned at the second death.

use super::Scheduler;
use super::limits::{CLAIMS_MAX, PREFETCH_HINTS_MAX, PREFETCH_LOOKS, STARVING_PLANS, UPLOAD_PAGES_PER_STEP};
use super::limits::{PIN_DEATHS_MAX, PINNED_PARTS};
use super::plan::Draft;
use crate::engine::{ContentId, PinRefused};

impl Scheduler {
    /// Keeps a content that is in the host slab on the device, from the next plans on.
    ///
    /// # Errors
    /// [`PinRefused`]: too little of the arena would be left, or not enough for an unfinished request; nothing changed.
    pub fn adapter_pin(&mut self, content: ContentId) -> Result<(), PinRefused> {
        let known = self.adapters.get(&content).filter(|known| known.in_host);
        let pages = known.map(|known| known.pages_needed);
        let Some(pages) = pages else { return Err(PinRefused::Unknown(content.short())) };
        if self.adapters.is_kept(&content) {
            return Ok(());
        }
        let (total, slots) = (self.limits.pages_total, self.limits.slots_max);
        let (wanted, allowed) = (self.adapters.kept_pages().saturating_add(pages), most(total));
        if wanted > allowed {
            return Err(PinRefused::Pages { wanted, allowed, total });
        }
        let (wanted, allowed) = (self.adapters.kept().len() as u32 + 1, most(slots));
        if wanted > allowed {
            return Err(PinRefused::Slots { wanted, allowed });
        }
        self.adapters.keep(&content);
        if self.requests.values().any(|request| self.check_fits(&request.job).is_err()) {
            self.adapters.unkeep(&content);
            return Err(PinRefused::Busy);
        }
        self.drop_claims();
        Ok(())
    }

    /// What was promised with the claims may just have been pinned: they are asked for again.
    pub(super) fn drop_claims(&mut self) {
        for key in self.claims.clone() {
            self.drop_claim(key);
        }
    }

    /// The content becomes ordinary cache of the device.
    pub fn adapter_unpin(&mut self, content: ContentId) {
        self.adapters.unkeep(&content);
        self.note_pins_served();
    }

    /// A request for a content in the host slab is expected: it is uploaded with the next plan if pages are free then.
    pub fn adapter_prefetch(&mut self, content: ContentId) {
        if self.adapters.pages_to_upload(&content).is_none() || self.hints.contains(&content) {
            return;
        }
        if self.hints.len() >= PREFETCH_HINTS_MAX {
            self.hints.pop_front();
        }
        self.hints.push_back(content);
    }

    /// Contents that lost their pin because shards died while they were uploaded.
    pub fn take_unpinned(&mut self) -> Vec<ContentId> {
        std::mem::take(&mut self.unpinned)
    }

    /// Something is to be uploaded though nobody waits for it.
    pub(super) fn wants_upload(&self) -> bool {
        self.adapters.is_uploading()
            || self.suspects.is_empty() && (!self.hints.is_empty() || self.kept_to_upload().next().is_some())
    }

    fn kept_to_upload(&self) -> impl Iterator<Item = (ContentId, u32)> {
        let kept = self.adapters.kept().iter();
        kept.filter_map(|content| Some((*content, self.adapters.pages_to_upload(content)?)))
    }

    /// Uploads pinned contents that are not there.
    pub(super) fn upload_kept(&mut self, draft: &mut Draft) {
        if !self.suspects.is_empty() {
            return;
        }
        let waiting: Vec<_> = self.kept_to_upload().take(CLAIMS_MAX).collect();
        if waiting.is_empty() {
            self.pins_wait_since = None;
            return;
        }
        let plans = self.plans;
        self.pins_wait_since.get_or_insert(plans);
        let held = self.pins_hold();
        if held {
            self.drop_claims();
        }
        for (content, pages) in waiting {
            let slots = self.adapters.slots_obtainable();
            let obtainable = self.pool.pages_obtainable() + self.adapters.idle_pages();
            if slots == 0 || obtainable < pages || !(held || self.has_room_for_kept(pages, draft)) {
                return;
            }
            if !self.fits_step(pages, draft) {
                return;
            }
            assert!(self.make_pages(pages), "counted as obtainable");
            while self.adapters.slots_free() == 0 {
                let (slot, _) = self.adapters.victim().expect("counted as obtainable");
                self.evict_slot(slot);
            }
            self.upload_for_nobody(content, pages, draft);
            self.pins_wait_since = None;
        }
    }

    /// Empties the prefix cache. Running sequences keep what they hold.
    pub fn forget_prefixes(&mut self) {
        self.pool.forget_prefixes();
    }

    /// Uploads what waiting sequences, then what hints name, into pages that hold nothing.
    pub(super) fn prefetch(&mut self, draft: &mut Draft) {
        if !self.suspects.is_empty() {
            return;
        }
        let hints = std::mem::take(&mut self.hints);
        let is_free = self.adapters.slots_free() > 0 && self.pool.pages_free() > 0;
        if !is_free || self.starving.is_some() || self.pins_wait_since.is_some() {
            return; // what is free is somebody's
        }
        let waiting: Vec<_> = self.queue.loading().take(PREFETCH_LOOKS).collect();
        let queued = waiting.into_iter().flat_map(|key| self.seq(key).job.contents.clone()).collect::<Vec<_>>();
        for content in queued.into_iter().chain(hints) {
            let Some(pages) = self.adapters.pages_to_upload(&content) else { continue };
            let is_free = self.adapters.slots_free() > 0 && self.pool.pages_free() >= pages;
            if !is_free || self.adapters.deaths(&content) > 0 || !self.has_room(0, pages, None, draft) {
                continue;
            }
            if !self.fits_step(pages, draft) {
                break;
            }
            self.upload_for_nobody(content, pages, draft);
            self.counters.adapter_prefetches += 1;
        }
    }

    fn fits_step(&self, pages: u32, draft: &Draft) -> bool {
        draft.upload_pages == 0 || draft.upload_pages + pages <= UPLOAD_PAGES_PER_STEP
    }

    fn upload_for_nobody(&mut self, content: ContentId, pages: u32, draft: &mut Draft) {
        draft.uploads.push(self.adapters.start_upload(content, &mut self.pool));
        draft.upload_pages += pages;
        self.content_moved(&content);
    }

    /// A pinned content waited for so long that nobody starts until it is there. Only while it can be uploaded.
    pub(super) fn pins_hold(&self) -> bool {
        self.suspects.is_empty() && self.pins_wait_since.is_some_and(|since| self.plans - since >= STARVING_PLANS)
    }

    fn note_pins_served(&mut self) {
        if self.kept_to_upload().next().is_none() {
            self.pins_wait_since = None;
        }
    }

    /// After a shard's death: an adapter that was being uploaded at two in a row loses its pin.
    pub(super) fn unpin_suspects(&mut self) {
        let kept = self.adapters.kept().iter();
        let lost: Vec<_> = kept.copied().filter(|c| self.adapters.deaths(c) >= PIN_DEATHS_MAX).collect();
        for content in lost {
            self.adapters.unkeep(&content);
            self.unpinned.push(content);
        }
        self.hints.clear();
        self.pins_wait_since = None;
    }
}

/// What pins may take of `total`.
fn most(total: u32) -> u32 {
    let (parts, of) = PINNED_PARTS;
    (u64::from(total) * parts / of) as u32
}
