//! What an operator wants of contents: pinned, forgotten, or brought near before they are needed.

use super::adapters::{ForgetMode, PinLevel, PinRefused};
use super::contents::{PinReply, Residency};
use super::run::Engine;
use super::types::ContentId;

/// Share of the host budget that pinned contents may take, (parts, of).
const PINNED_PARTS: (u64, u64) = (3, 4);

impl Engine {
    /// Decides a pin now, or once the content is in host memory.
    pub(super) fn pin(&mut self, content: ContentId, level: Option<PinLevel>, reply: PinReply) {
        let Some(known) = self.contents.get_mut(&content).filter(|known| !known.draining) else {
            let _ = reply.send(Err(PinRefused::Unknown(content.short())));
            return;
        };
        match level {
            Some(level) if known.residency != Residency::Host => {
                known.pin_asks.push((level, reply));
                self.bring_back(content);
            }
            Some(level) => drop(reply.send(self.try_pin(content, level))),
            None => {
                for (_, waiting) in std::mem::take(&mut known.pin_asks) {
                    let _ = waiting.send(Ok(())); // pinned, and unpinned again
                }
                self.set_pin(&content, None);
                let _ = reply.send(Ok(()));
            }
        }
    }

    /// The content is in host memory.
    fn try_pin(&mut self, content: ContentId, level: PinLevel) -> Result<(), PinRefused> {
        let Some(known) = self.contents.get(&content) else { return Err(PinRefused::Unknown(content.short())) };
        if known.pinned.is_none() {
            let (parts, of) = PINNED_PARTS;
            let wanted = self.contents.pinned_bytes().saturating_add(known.host_bytes);
            let allowed = self.options.host_adapter_bytes / of * parts;
            if wanted > allowed {
                return Err(PinRefused::HostBytes { wanted, allowed });
            }
        }
        if level == PinLevel::Device
            && let Some(scheduler) = &mut self.scheduler
        {
            scheduler.adapter_pin(content)?;
        }
        self.set_pin(&content, Some(level));
        Ok(())
    }

    /// Notes the level; less than the device is less for the scheduler, too.
    pub(super) fn set_pin(&mut self, content: &ContentId, level: Option<PinLevel>) {
        if let Some(known) = self.contents.get_mut(content) {
            known.pinned = level;
        }
        if level != Some(PinLevel::Device)
            && let Some(scheduler) = &mut self.scheduler
        {
            scheduler.adapter_unpin(*content);
        }
    }

    /// Contents whose upload killed shards stay in host memory only.
    pub(super) fn note_lost_pins(&mut self) {
        let lost = self.scheduler.as_mut().map(crate::scheduler::Scheduler::take_unpinned);
        for content in lost.unwrap_or_default() {
            tracing::warn!(content = content.short(), "shards died while a pinned adapter was uploaded: unpinned");
            self.set_pin(&content, Some(PinLevel::Host));
        }
    }

    pub(super) fn forget(&mut self, content: ContentId, mode: ForgetMode) {
        let Some(known) = self.contents.get_mut(&content) else { return };
        known.wanted = false;
        for (_, reply) in std::mem::take(&mut known.pin_asks) {
            let _ = reply.send(Err(PinRefused::Unknown(content.short())));
        }
        self.set_pin(&content, None);
        self.contents.set_draining(&content, true);
        if mode == ForgetMode::Now {
            self.fail_users(content, "it was unloaded");
        }
    }

    /// Forgets what drains and is used by nobody any more.
    pub(super) fn settle_drains(&mut self) {
        if self.contents.draining().is_empty() {
            return;
        }
        for content in self.contents.draining().clone() {
            if self.parked.iter().any(|parked| parked.uses(&content)) {
                continue;
            }
            if self.scheduler.as_mut().is_none_or(|scheduler| scheduler.adapter_forget(content).is_ok()) {
                self.drop_from_host(content);
                self.contents.remove(&content);
            }
        }
    }

    /// Empties the prefix cache of the shard that runs; a new one has none.
    pub(super) fn forget_prefixes(&mut self) {
        if let Some(scheduler) = &mut self.scheduler {
            scheduler.forget_prefixes();
        }
    }

    /// A request for it is expected.
    pub(super) fn prefetch(&mut self, content: ContentId) {
        self.contents.touch(&content);
        let Some(known) = self.contents.get_mut(&content).filter(|known| !known.draining) else { return };
        if known.residency == Residency::Host {
            if let Some(scheduler) = &mut self.scheduler {
                scheduler.adapter_prefetch(content);
            }
        } else {
            known.wanted = true;
            self.bring_back(content);
        }
    }
}
