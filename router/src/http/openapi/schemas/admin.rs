//! The admin API.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

/// One page of adapters, by name.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AdapterPage {
    data: Vec<Adapter>,
    /// Send it as `after` for the next page; absent on the last one.
    #[schema(nullable = false)]
    next: Option<String>,
    /// How many there are; only with `contains`, `sort` or `offset`.
    #[schema(nullable = false)]
    total: Option<u64>,
}

/// A registered adapter.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Adapter {
    name: String,
    /// Absent: shared by all keys.
    #[schema(nullable = false)]
    namespace: Option<String>,
    #[schema(rename = "ref")]
    reference: String,
    source: SourceKind,
    /// Counts up with every change of the name's content.
    generation: u64,
    /// What the source calls the files that serve now.
    #[schema(nullable = false)]
    revision: Option<String>,
    #[schema(nullable = false, pattern = "^[0-9a-f]{64}$")]
    content_id: Option<String>,
    state: AdapterState,
    /// The content that will take the place of what serves now.
    #[schema(nullable = false)]
    next: Option<NextContent>,
    /// Where it is, while it is ready.
    #[schema(nullable = false)]
    residency: Option<Residency>,
    pinned: bool,
    #[schema(nullable = false)]
    pin: Option<PinResidency>,
    scale: f32,
    /// Unix seconds.
    created: u64,
    rank_min: u32,
    rank_max: u32,
    /// In host memory.
    bytes: u64,
    /// On the device.
    pages: u32,
    /// Sequences.
    running: u32,
    /// Sequences.
    waiting: u32,
    /// Unix seconds; absent: never.
    #[schema(nullable = false)]
    last_used: Option<u64>,
    /// How long the last load took.
    #[schema(nullable = false)]
    loaded_ms: Option<u64>,
    /// The last failure, until a load succeeds.
    #[schema(nullable = false)]
    error: Option<AdapterError>,
    /// Loaded with a credential of its own, which is not stored: after a restart it is needed again.
    #[schema(nullable = false)]
    own_credential: Option<bool>,
}

/// Where an adapter comes from.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum SourceKind {
    Hub,
    S3,
    Gcs,
    Http,
    Local,
    Merge,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum AdapterState {
    Registered,
    Resolving,
    Fetching,
    Verifying,
    Preparing,
    Ready,
    Draining,
    Failed,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum Residency {
    Disk,
    Host,
    Device,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum PinResidency {
    Host,
    Device,
}

/// Content on its way.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct NextContent {
    #[schema(rename = "ref")]
    reference: String,
    state: AdapterState,
    bytes_done: u64,
    /// 0: not known yet.
    bytes_total: u64,
}

/// Why a load failed.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AdapterError {
    code: String,
    message: String,
    retryable: bool,
    /// Unix seconds.
    #[schema(nullable = false)]
    next_try: Option<u64>,
}

/// The whole registration: what is absent gets its default.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http::openapi) struct PutAdapterRequest {
    /// A reference or an absolute path.
    #[schema(rename = "ref", min_length = 1, example = "hf://org/repo")]
    reference: String,
    /// Of a hub reference.
    revision: Option<String>,
    #[schema(minimum = -8, maximum = 8, default = 1)]
    scale: Option<f64>,
    /// Keep it in host memory or on the device.
    pinned: Option<bool>,
    /// Whose name this is; empty: shared by all keys.
    #[schema(pattern = "^[A-Za-z0-9._-]*$")]
    namespace: Option<String>,
    /// Go on only if the name has this content now.
    if_content_id: Option<String>,
    /// Go on only if the name has this generation now.
    #[schema(minimum = 0)]
    if_generation: Option<u64>,
}

/// A reference to check.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http::openapi) struct ValidateAdapterRequest {
    #[schema(rename = "ref", min_length = 1, example = "hf://org/repo")]
    reference: String,
    revision: Option<String>,
    /// Must be false: files are checked, not run.
    self_test: Option<bool>,
}

/// What a dry run found.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AdapterReport {
    ok: bool,
    #[schema(nullable = false)]
    content_id: Option<String>,
    #[schema(nullable = false)]
    revision: Option<String>,
    base: ReportedBase,
    /// Smallest and largest.
    #[schema(min_items = 2, max_items = 2)]
    ranks: Vec<u32>,
    modules: Vec<String>,
    tensors_matched: u32,
    tensors_unmatched: Vec<String>,
    bytes: u64,
    host_bytes: u64,
    rank_blocks: u32,
    pages_needed: u32,
    features: BTreeMap<String, bool>,
    refusals: Vec<Refusal>,
    warnings: Vec<String>,
}

/// The base model that the adapter's config names.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ReportedBase {
    declared: String,
    matches: bool,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Refusal {
    code: String,
    message: String,
}

/// Where to keep an adapter.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http::openapi) struct PinRequest {
    residency: PinResidency,
}

/// All aliases.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AliasList {
    data: Vec<Alias>,
}

/// A name for weighted versions.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Alias {
    name: String,
    /// Absent: shared by all keys.
    #[schema(nullable = false)]
    namespace: Option<String>,
    /// Counts up with every change.
    version: u64,
    versions: Vec<AliasVersion>,
    sticky_by: StickyBy,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AliasVersion {
    adapter: String,
    weight: f64,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http::openapi) enum StickyBy {
    Key,
    User,
    None,
}

/// All versions of an alias, changed in one step.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http::openapi) struct PutAliasRequest {
    #[schema(min_items = 1, max_items = 16)]
    versions: Vec<PutAliasVersion>,
    sticky_by: Option<StickyBy>,
    /// Go on only if the alias has this version; 0: only if it does not exist.
    #[schema(minimum = 0)]
    expected_version: Option<u64>,
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http::openapi) struct PutAliasVersion {
    adapter: String,
    #[schema(exclusive_minimum = 0, maximum = 1_000_000_000.0, default = 1)]
    weight: Option<f64>,
}

/// What the server holds and does.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Status {
    version: String,
    model: String,
    ready: bool,
    draining: bool,
    /// Adapters that must be usable before the server is ready.
    waiting_for: Vec<WaitingFor>,
    pages: Pages,
    sequences: Sequences,
    adapters: AdapterCounts,
    shard: ShardCounts,
    uptime_s: u64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct WaitingFor {
    name: String,
    /// Why it is not, if that is known.
    #[schema(required = true)]
    error: Option<String>,
}

/// Pages of the device's arena.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Pages {
    total: u64,
    free: u64,
    kv: u64,
    adapter: u64,
    pinned: u64,
    /// Of one page.
    bytes: u64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Sequences {
    running: u64,
    waiting: u64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct AdapterCounts {
    states: BTreeMap<String, u64>,
    device: u64,
    host: u64,
    host_bytes: u64,
    waiting_for_load: u64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ShardCounts {
    restarts: u64,
    replayed_requests: u64,
}

/// The server drains.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Drained {
    draining: bool,
}

/// Caches to empty.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http::openapi) struct CacheResetRequest {
    /// Keys and values of prompts.
    prefix: bool,
    /// Must be false: files of adapters make room by themselves.
    disk: Option<bool>,
}

/// What was emptied.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct CacheReset {
    prefix: bool,
    disk: bool,
}

/// What every flag came to.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct ServerInfo {
    version: String,
    served_names: Vec<String>,
    /// By flag; secrets are `***`.
    settings: serde_json::Value,
}
