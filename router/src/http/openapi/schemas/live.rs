//! `/admin/v1/live`.

use serde::Serialize;
use utoipa::ToSchema;

/// What happens now. Lists have at most 32 entries; the rest is summed up.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct Live {
    /// Unix time.
    time_ms: u64,
    version: String,
    build: LiveBuild,
    model: String,
    /// Unix seconds.
    started: u64,
    uptime_s: u64,
    ready: bool,
    draining: bool,
    waiting_for: Vec<String>,
    batch: LiveBatch,
    pages: LivePages,
    tiers: LiveTiers,
    rates: LiveRates,
    minute: LiveMinute,
    totals: LiveTotals,
    points: Vec<LivePoint>,
    /// Send it as `since` for the points after these.
    next: u64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveBuild {
    architecture: String,
    device: String,
    dtype: String,
    weight_bytes: u64,
    context_tokens: u32,
}

/// Who runs and who waits.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveBatch {
    running: u32,
    waiting: u32,
    shares: Vec<LiveShare>,
    others: LiveOthers,
    loading: u64,
    loading_names: Vec<LiveName>,
}

/// Sequences of one set of adapters; none: the base model.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveShare {
    adapters: Vec<LiveName>,
    running: u32,
    waiting: u32,
    running_tokens: u64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveOthers {
    shares: u64,
    running: u32,
    waiting: u32,
    running_tokens: u64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveName {
    /// Absent for what a caller named by reference.
    #[schema(nullable = false)]
    name: Option<String>,
    #[schema(nullable = false)]
    namespace: Option<String>,
    content: String,
}

/// The arena.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LivePages {
    total: u32,
    free: u32,
    kv: u32,
    adapter: u32,
    pinned: u32,
    /// Of one page.
    bytes: u64,
    blocks_used: u32,
    blocks_cached: u32,
    blocks_total: u32,
    adapters: Vec<LiveOnDevice>,
    other_adapters: u64,
    other_pages: u32,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveOnDevice {
    #[schema(nullable = false)]
    name: Option<String>,
    #[schema(nullable = false)]
    namespace: Option<String>,
    content: String,
    pages: u32,
    running: u32,
    pinned: bool,
}

/// Adapters by the fastest place that has them.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveTiers {
    device: LiveTier,
    host: LiveTier,
    disk: LiveTier,
    host_bytes: u64,
    host_bytes_max: u64,
    #[schema(nullable = false)]
    store: Option<LiveStore>,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveTier {
    adapters: u32,
    bytes: u64,
    pinned: u32,
    in_use: u32,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveStore {
    contents: u64,
    bytes: u64,
    reserved_bytes: u64,
    quota_bytes: u64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveRates {
    prompt_tokens_per_s: f64,
    generation_tokens_per_s: f64,
    steps_per_s: f64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveMinute {
    window_s: f64,
    first_token: LiveQuantiles,
    inter_token: LiveQuantiles,
}

/// Seconds; absent where nothing was measured.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveQuantiles {
    count: u64,
    #[schema(nullable = false)]
    p50: Option<f64>,
    #[schema(nullable = false)]
    p90: Option<f64>,
    #[schema(nullable = false)]
    p99: Option<f64>,
}

/// Since the start of the process.
#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LiveTotals {
    prompt_tokens: u64,
    generation_tokens: u64,
    steps: u64,
    preemptions: u64,
    prefix_queries: u64,
    prefix_hits: u64,
    adapter_uploads: u64,
    adapter_evictions: u64,
    shard_restarts: u64,
    replayed_requests: u64,
}

#[derive(Serialize, ToSchema)]
pub(in crate::http::openapi) struct LivePoint {
    seq: u64,
    time_ms: u64,
    running: u32,
    waiting: u32,
    prompt_tokens_per_s: f64,
    generation_tokens_per_s: f64,
    steps_per_s: f64,
    /// p50 and p99 in seconds.
    #[schema(required = true)]
    first_token: Option<Vec<f64>>,
    #[schema(required = true)]
    inter_token: Option<Vec<f64>>,
}
