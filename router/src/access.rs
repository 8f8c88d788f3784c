//! Who asks, and what their key allows.

use std::sync::Arc;

use globset::GlobSet;

use crate::adapters::{AdapterRef, SourceKind};

/// Whose request this is. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Border of fairness, prefix sharing and quotas: 0 on an open server, else derived from the key.
    pub tenant: u64,
    /// What the key is called in logs and lists; never the key.
    pub name: Arc<str>,
    /// Adapters and aliases of this namespace come before the shared ones (namespace ``).
    pub namespace: Arc<str>,
    /// What the key allows.
    pub policy: Arc<KeyPolicy>,
    /// An admin key, or the admin listener.
    pub is_admin: bool,
}

/// What a key allows. The default allows everything.
#[derive(Clone, Debug, Default)]
pub struct KeyPolicy {
    /// Names and references of adapters it may use; `None` = all.
    pub adapters: Option<GlobSet>,
    /// Sources it may name in dynamic references; `None` = all that the server has.
    pub sources: Option<Vec<SourceKind>>,
    /// Requests at once.
    pub concurrent_max: Option<u32>,
    /// Requests a minute.
    pub requests_per_minute: Option<u32>,
    /// Tokens (prompt and completion) a minute.
    pub tokens_per_minute: Option<u64>,
    /// Bytes of its private adapters on this server's disk.
    pub disk_bytes_max: Option<u64>,
    /// Share of the device relative to other tenants; 1 = normal.
    pub weight: Option<u32>,
}

impl Default for Caller {
    fn default() -> Self {
        Self { tenant: 0, name: Arc::from(""), namespace: Arc::from(""), policy: Arc::default(), is_admin: false }
    }
}

impl Caller {
    /// True if the key's list of adapters has this name, or this reference as printed.
    pub fn may_use_adapter(&self, name: &str) -> bool {
        self.policy.adapters.as_ref().is_none_or(|globs| globs.is_match(name))
    }

    /// True for a key that is not the operator's own: one with a namespace, a list or a quota. The server's credentials never
    /// answer for it.
    pub fn is_restricted(&self) -> bool {
        let policy = &self.policy;
        let is_limited = policy.adapters.is_some() || policy.sources.is_some() || policy.disk_bytes_max.is_some();
        !self.is_admin && (is_limited || !self.namespace.is_empty())
    }

    /// True if the key's list of adapters has this reference, in any of its spellings.
    pub fn may_use_reference(&self, reference: &AdapterRef) -> bool {
        self.may_use_adapter(&reference.to_string()) || self.may_use_adapter(&reference.locator)
    }

    /// True if the key may name references of this source.
    pub fn may_use_source(&self, source: SourceKind) -> bool {
        self.policy.sources.as_ref().is_none_or(|sources| sources.contains(&source))
    }
}
