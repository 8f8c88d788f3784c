//! Bounds of downloads, and on whose account they run.

use std::time::Duration;

use crate::access::Caller;

/// Bounds of all downloads of a server.
#[derive(Clone, Debug)]
pub struct FetchLimits {
    /// Adapters downloaded at once (`--adapter-loads`).
    pub total: usize,
    /// Of these, from one kind of source, so that a slow one leaves room for the others.
    pub per_source: usize,
    /// Of these, on one tenant's account. More than `per_source`: where all callers are one tenant, a slow source must not
    /// take all that this tenant may have.
    pub per_tenant: usize,
    /// Adapters that wait for their turn.
    pub waiting_max: usize,
    /// Of these, on one tenant's account.
    pub waiting_per_tenant_max: usize,
    /// Largest `adapter_config.json`, bytes.
    pub config_bytes_max: u64,
    /// Largest `adapter_model.safetensors`, bytes (`--adapter-max-bytes`).
    pub weights_bytes_max: u64,
    /// Tries of one file within one fetch after its first.
    pub retries: u32,
    /// Mean pause before such a try; the real one is drawn between half and one and a half of it.
    pub retry_pause: Duration,
    /// How long a failure answers for the next callers without asking the source.
    pub failure_kept: Duration,
}

impl Default for FetchLimits {
    fn default() -> Self {
        Self {
            total: 8,
            per_source: 4,
            per_tenant: 6,
            waiting_max: 32_768,
            waiting_per_tenant_max: 16_384,
            config_bytes_max: 64 << 10,
            weights_bytes_max: 2 << 30,
            retries: 2,
            retry_pause: Duration::from_millis(200),
            failure_kept: Duration::from_secs(5),
        }
    }
}

impl FetchLimits {
    /// The defaults with `total` downloads at once: of them at most half for one source kind, three quarters for one tenant.
    pub fn with_total(total: usize) -> Self {
        let total = total.max(1);
        Self { total, per_source: total.div_ceil(2), per_tenant: total - total / 4, ..Self::default() }
    }
}

/// On whose account something is downloaded and kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tenant {
    /// [`Caller::tenant`].
    pub id: u64,
    /// Bytes it may keep on disk; `None` = no limit but the store's.
    pub disk_bytes_max: Option<u64>,
}

impl From<u64> for Tenant {
    fn from(id: u64) -> Self {
        Self { id, disk_bytes_max: None }
    }
}

impl From<&Caller> for Tenant {
    fn from(caller: &Caller) -> Self {
        Self { id: caller.tenant, disk_bytes_max: caller.policy.disk_bytes_max }
    }
}
