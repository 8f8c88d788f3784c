//! Who has how many bytes of the disk. Pure arithmetic; what it counts is in `state.rs`.

use std::collections::HashMap;

/// Bytes on disk and bytes promised to running downloads, in all and by tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Accounts {
    /// On disk.
    used: u64,
    /// Promised.
    reserved: u64,
    /// Both, by tenant; none is zero, so this has no more entries than there are things on disk.
    by_tenant: HashMap<u64, u64>,
}

impl Accounts {
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    pub(super) fn reserved(&self) -> u64 {
        self.reserved
    }

    /// On disk and promised.
    pub(super) fn total(&self) -> u64 {
        self.used.saturating_add(self.reserved)
    }

    pub(super) fn of(&self, tenant: u64) -> u64 {
        self.by_tenant.get(&tenant).copied().unwrap_or(0)
    }

    pub(super) fn add(&mut self, tenant: u64, bytes: u64) {
        self.used += bytes;
        self.charge(tenant, bytes);
    }

    pub(super) fn remove(&mut self, tenant: u64, bytes: u64) {
        self.used -= bytes;
        self.discharge(tenant, bytes);
    }

    pub(super) fn reserve(&mut self, tenant: u64, bytes: u64) {
        self.reserved += bytes;
        self.charge(tenant, bytes);
    }

    pub(super) fn release(&mut self, tenant: u64, bytes: u64) {
        self.reserved -= bytes;
        self.discharge(tenant, bytes);
    }

    fn charge(&mut self, tenant: u64, bytes: u64) {
        if bytes > 0 {
            *self.by_tenant.entry(tenant).or_default() += bytes;
        }
    }

    fn discharge(&mut self, tenant: u64, bytes: u64) {
        let Some(held) = self.by_tenant.get_mut(&tenant) else { return };
        *held -= bytes;
        if *held == 0 {
            self.by_tenant.remove(&tenant);
        }
    }
}
