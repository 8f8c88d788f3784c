//! Pins, drains and fetching ahead in a simulated world, and what must hold for them.

use std::collections::{BTreeMap, BTreeSet};

use super::world::World;
use crate::engine::{ContentId, PinRefused};

/// Steps in which pinned adapters must be on the device once nothing else runs.
const PIN_STEPS_MAX: u64 = 1_000;

/// What the operator of a world asked for.
#[derive(Default)]
pub(super) struct Keeping {
    /// Where each pinned content was first seen resident.
    pub(super) pinned: BTreeMap<ContentId, Option<(u32, u64)>>,
    pub(super) draining: BTreeSet<ContentId>,
}

impl Keeping {
    /// Nobody may expect anything of the content any more.
    pub(super) fn forgotten(&mut self, content: &ContentId) {
        self.pinned.remove(content);
        self.draining.remove(content);
    }
}

impl World {
    pub(super) fn keeping_messages(&mut self) {
        if self.rng.chance(self.weather.pin) {
            self.pin_or_unpin();
        }
        let (content, _) = *self.rng.pick(&self.contents);
        if self.rng.chance(self.weather.drain) && !self.keeping.draining.contains(&content) {
            self.scheduler.adapter_unpin(content);
            self.keeping.forgotten(&content);
            self.keeping.draining.insert(content);
        }
        if self.rng.chance(self.weather.end_now) {
            self.lose_content(content);
            self.drop_content(content);
            if !self.preparing.iter().any(|(c, _)| *c == content) {
                self.prepare(content);
            }
            self.totals.ends_now += 1;
        }
        if self.rng.chance(self.weather.fetch) {
            self.scheduler.adapter_prefetch(content);
        }
    }

    fn pin_or_unpin(&mut self) {
        let (content, pages) = *self.rng.pick(&self.contents);
        if self.keeping.draining.contains(&content) {
            return;
        }
        if self.rng.chance(400) {
            self.scheduler.adapter_unpin(content);
            self.keeping.pinned.remove(&content);
            return;
        }
        let before = self.scheduler.pinned_pages();
        match self.scheduler.adapter_pin(content) {
            Ok(()) => {
                self.keeping.pinned.entry(content).or_insert(None);
                self.totals.pins += 1;
            }
            Err(PinRefused::Pages { wanted, allowed, total }) => {
                assert_eq!((wanted, total), (before + pages, self.limits.pages_total));
                assert!(wanted > allowed && allowed == total * 3 / 4);
            }
            Err(PinRefused::Slots { wanted, allowed }) => {
                assert!(wanted > allowed && allowed == self.limits.slots_max * 3 / 4);
            }
            Err(PinRefused::Busy) => assert!(!self.scheduler.is_idle(), "nobody is there to be in the way"),
            Err(PinRefused::Unknown(_)) => assert!(self.preparing.iter().any(|(c, _)| *c == content)),
            Err(other) => panic!("{other:?}"),
        }
    }

    /// Forgets what drains as soon as nobody uses it; until then its users go on.
    pub(super) fn settle_drains(&mut self) {
        for content in self.keeping.draining.clone() {
            let used = self.clients.values().any(|c| c.request.adapters.iter().any(|a| a.content == content));
            if self.scheduler.adapter_forget(content).is_err() {
                assert!(!self.scheduler.is_idle(), "a drained content stays for nobody");
                continue;
            }
            assert!(!used, "a running request lost its adapter");
            self.keeping.forgotten(&content);
            self.drop_content(content);
            self.totals.drains += 1;
            if !self.preparing.iter().any(|(c, _)| *c == content) {
                self.prepare(content);
            }
        }
    }

    pub(super) fn keeping_lost_shard(&mut self) {
        for place in self.keeping.pinned.values_mut() {
            *place = None;
        }
        for content in self.scheduler.take_unpinned() {
            assert!(self.keeping.pinned.remove(&content).is_some(), "only what is pinned loses its pin");
            self.totals.unpinned += 1;
        }
    }

    /// A pinned adapter that is on the device stays in its place.
    pub(super) fn audit_keeping(&mut self) {
        let pages_of = |content| self.contents.iter().find(|(c, _)| c == content).map_or(0, |(_, pages)| *pages);
        let pages: u32 = self.keeping.pinned.keys().map(pages_of).sum();
        assert_eq!(pages, self.scheduler.pinned_pages(), "pages of pinned adapters");
        assert!(pages <= self.limits.pages_total * 3 / 4);
        for (content, seen) in &mut self.keeping.pinned {
            let place = self.scheduler.place_of(content).filter(|(_, resident)| *resident).map(|(place, _)| place);
            assert!(seen.is_none() || *seen == place, "a pinned adapter was evicted");
            *seen = place;
        }
    }

    /// With nothing else to do, every pinned adapter that can be uploaded is.
    pub(super) fn check_pins_arrive(&mut self) {
        let mut steps = 0;
        while self.scheduler.wants_upload() || !self.preparing.is_empty() || !self.sent.is_empty() {
            self.tick();
            steps += 1;
            assert!(steps < PIN_STEPS_MAX, "pinned adapters still wait: {}", self.scheduler.describe());
        }
        for content in self.keeping.pinned.keys() {
            let resident = self.scheduler.place_of(content).is_some_and(|(_, resident)| resident);
            assert!(resident, "a pinned adapter is not on the device: {}", self.scheduler.describe());
        }
    }
}
