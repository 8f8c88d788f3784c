//! What is said to the engine about adapters: prepare, check, merge, pin, forget. Plain data.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::types::ContentId;

/// What preparing an adapter directory gave.
#[derive(Clone, Debug)]
pub struct PreparedAdapter {
    /// The content that the shard read.
    pub content: ContentId,
    /// Arena pages it takes while resident.
    pub pages_needed: u32,
    /// Blocks of 16 ranks over all its modules: what its pages are made of.
    pub rank_blocks: u32,
    /// Smallest and largest rank over its modules.
    pub ranks: (u32, u32),
    /// Module names it adapts, such as `q_proj`.
    pub modules: Vec<String>,
    /// `base_model_name_or_path` of its config.
    pub base_model: String,
    /// Bytes in the host slab.
    pub host_bytes: u64,
    /// PEFT features it uses beyond plain LoRA: `rslora`, `dora`, `bias`, `lm_head`, `embed_tokens`, `modules_to_save`.
    pub features: Vec<String>,
}

/// Why an adapter cannot be used; `code` is the API's stable code and decides the status.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct AdapterFailure {
    /// `adapter_invalid`, `adapter_unsupported`, `adapter_base_mismatch`, `adapter_too_large`, `adapter_rank_limit`,
    /// `model_not_found`, `adapter_load_failed`.
    pub code: String,
    /// What was found, what is accepted, what to change.
    pub message: String,
    /// When to ask again, if that may help.
    pub retry_after: Option<Duration>,
    /// State of the adapter's life cycle at the failure, as the API spells it.
    pub state: Option<&'static str>,
    /// The message as operators read it, with host and cause. Never for callers of the main port.
    pub detail: Option<String>,
}

impl AdapterFailure {
    /// What the admin API, the command line and logs say.
    pub fn for_operators(&self) -> &str {
        self.detail.as_deref().unwrap_or(&self.message)
    }

    /// A failure that says nothing about when to come back.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), retry_after: None, state: None, detail: None }
    }
}

/// One reason why an adapter cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The API's code, as in [`AdapterFailure::code`].
    pub code: String,
    /// What was found, what is accepted, what to change.
    pub message: String,
}

/// What a dry run found: everything that can be said without keeping the adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterCheck {
    /// The content; `None` if a file could not be read at all.
    pub content: Option<ContentId>,
    /// `base_model_name_or_path` of its config.
    pub base_model: String,
    /// Every tensor names a module of the served base and has its extents.
    pub base_matches: bool,
    /// Smallest and largest rank over its modules; (0, 0) if unknown.
    pub ranks: (u32, u32),
    /// Module names it adapts.
    pub modules: Vec<String>,
    /// Tensors that belong to a module of this base.
    pub tensors_matched: u32,
    /// Names of the others, sorted; at most 64 of them.
    pub tensors_unmatched: Vec<String>,
    /// Bytes of the weights file.
    pub weight_bytes: u64,
    /// Bytes it would take in the host slab; 0 unless it is [`Self::is_ok`].
    pub host_bytes: u64,
    /// Blocks of 16 ranks; 0 unless it is [`Self::is_ok`].
    pub rank_blocks: u32,
    /// Arena pages it would take; 0 unless it is [`Self::is_ok`].
    pub pages_needed: u32,
    /// As in [`PreparedAdapter::features`].
    pub features: Vec<String>,
    /// Why it cannot be served, every reason that could be found.
    pub refusals: Vec<Refusal>,
    /// What a person should know, though it can be served.
    pub warnings: Vec<String>,
}

impl AdapterCheck {
    /// It would be served.
    pub fn is_ok(&self) -> bool {
        self.refusals.is_empty()
    }
}

/// How several adapters become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergeStrategy {
    /// The weighted sum.
    Linear,
    /// Keep the largest, elect a sign, sum what agrees with it (arXiv:2306.01708).
    Ties,
    /// Drop at random and rescale, then the weighted sum (arXiv:2311.03099).
    DareLinear,
    /// Drop at random and rescale, then elect a sign and sum what agrees with it.
    DareTies,
}

/// How `ties` and `dare_ties` elect a sign.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MajoritySign {
    /// The sign of the sum of values.
    #[default]
    Total,
    /// The sign that occurs more often.
    Frequency,
}

/// One merge. The result depends on the contents read and on this, not on where anything lies.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeAsk {
    /// Directories of the parts, in the order of `weights`.
    pub dirs: Vec<PathBuf>,
    /// One for each part; finite.
    pub weights: Vec<f32>,
    /// How.
    pub strategy: MergeStrategy,
    /// Share of values that stay, 0 < density <= 1; every strategy but `linear` needs it.
    pub density: Option<f32>,
    /// For `ties` and `dare_ties`.
    pub majority_sign: MajoritySign,
    /// Another one gives another draw of `dare_*`; the same one the same, for the same contents.
    pub seed: u64,
    /// An empty directory, or one that can be made: gets `adapter_config.json` and `adapter_model.safetensors`.
    pub out_dir: PathBuf,
}

/// Where a pinned adapter stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PinLevel {
    /// In the shard's host memory: it is never read from disk again, but may leave the device.
    Host,
    /// On the device (and in host memory).
    Device,
}

/// Why an adapter was not pinned. Nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PinRefused {
    /// It was never prepared, or was forgotten.
    #[error("adapter content {0} is not known; load it first")]
    Unknown(String),
    /// Pinned adapters must leave requests a quarter of the arena.
    #[error(
        "pinning it on the device would take {wanted} of {total} pages; at most {allowed} may be pinned, so that requests keep a quarter"
    )]
    Pages {
        /// Pages that would be pinned.
        wanted: u32,
        /// Pages that may be.
        allowed: u32,
        /// Pages of the arena.
        total: u32,
    },
    /// Pinned adapters must leave requests a quarter of the adapter slots.
    #[error("pinning it on the device would take {wanted} adapter slots; at most {allowed} may be pinned")]
    Slots {
        /// Slots that would be pinned.
        wanted: u32,
        /// Slots that may be.
        allowed: u32,
    },
    /// Pinned adapters must leave others a quarter of the host budget.
    #[error("pinning it would take {wanted} bytes of host memory; at most {allowed} may be pinned")]
    HostBytes {
        /// Bytes that would be pinned.
        wanted: u64,
        /// Bytes that may be.
        allowed: u64,
    },
    /// An unfinished request needs what would be left.
    #[error("a request that runs or waits needs the memory; try again when it has ended")]
    Busy,
    /// The engine ends.
    #[error("the server is shutting down")]
    Draining,
}

/// What happens to the requests that use a content which is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForgetMode {
    /// They finish; then its memory is free. No new request may name the content.
    Drain,
    /// They end with [`super::Failure::AdapterGone`], and its memory is free.
    Now,
}

/// Where a content's bytes are, the fastest place counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Only in the directories it was read from.
    Disk,
    /// In the shard's host memory.
    Host,
    /// In the arena.
    Device,
}

impl Tier {
    /// As the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Host => "host",
            Self::Device => "device",
        }
    }
}

/// One content in a snapshot of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentStatus {
    /// Where it is.
    pub tier: Tier,
    /// Where it is kept.
    pub pinned: Option<PinLevel>,
    /// It goes once its last request ended.
    pub draining: bool,
    /// Sequences that run under it.
    pub running: u32,
    /// Sequences that wait to, and requests that wait for its bytes.
    pub waiting: u32,
    /// Arena pages it takes while on the device; 0 = not known to the scheduler yet.
    pub pages: u32,
    /// Bytes it takes in host memory.
    pub host_bytes: u64,
}
