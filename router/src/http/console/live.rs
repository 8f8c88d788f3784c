//! `GET /admin/v1/live`: what happens now, small enough to be asked once a second with 10,000 adapters.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Query, State};
use serde::{Deserialize, Serialize};

use super::record::{Minute, Point, Rates};
use crate::adapters::StoreStatus;
use crate::engine::{BatchShare, ContentId, ContentStatus, EngineStatus, PinLevel, Tier};
use crate::http::App;
use crate::http::error::ApiError;

/// Entries of each list; the rest is summed up.
const TOP_MAX: usize = 32;

/// Query parameters, as sent.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct LiveQuery {
    since: Option<String>,
}

/// The reply.
#[derive(Debug, Serialize)]
pub(crate) struct Live {
    /// Unix time, ms.
    time_ms: u64,
    version: &'static str,
    build: Build,
    /// First served name.
    model: String,
    /// Of this process: points of another one are not these.
    started: u64,
    uptime_s: u64,
    ready: bool,
    draining: bool,
    /// Adapters that readiness waits for, at most 16.
    waiting_for: Vec<String>,
    batch: Batch,
    pages: Pages,
    tiers: Tiers,
    rates: Rates,
    minute: Minute,
    totals: Totals,
    points: Vec<Point>,
    /// What `since` has to be for the next ones.
    next: u64,
}

/// What runs where, as the shard says it.
#[derive(Debug, Serialize)]
struct Build {
    architecture: String,
    device: String,
    dtype: String,
    weight_bytes: u64,
    context_tokens: u32,
}

/// Who runs and who waits.
#[derive(Debug, Default, Serialize)]
struct Batch {
    running: u32,
    waiting: u32,
    /// Most sequences first.
    shares: Vec<Share>,
    /// All that are not listed.
    others: Others,
    /// Adapters that waiting sequences need and the device does not have: the number, and some of them.
    loading: usize,
    loading_names: Vec<Named>,
}

/// Sequences of one set of adapters.
#[derive(Debug, Serialize)]
struct Share {
    /// Empty = the base model.
    adapters: Vec<Named>,
    running: u32,
    waiting: u32,
    running_tokens: u64,
}

#[derive(Debug, Default, Serialize)]
struct Others {
    shares: usize,
    running: u32,
    waiting: u32,
    running_tokens: u64,
}

/// An adapter as operators know it.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Named {
    /// Absent for what a caller named by reference: then there is only the content.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    namespace: String,
    /// The first 16 hex digits of the content id.
    content: String,
}

/// The arena.
#[derive(Debug, Default, Serialize)]
struct Pages {
    total: u32,
    free: u32,
    kv: u32,
    adapter: u32,
    pinned: u32,
    /// Of one page.
    bytes: u64,
    /// KV blocks.
    blocks_used: u32,
    blocks_cached: u32,
    blocks_total: u32,
    /// Who has adapter pages: in use first, then the largest.
    adapters: Vec<OnDevice>,
    /// Adapters on the device that are not listed, and their pages.
    other_adapters: usize,
    other_pages: u32,
}

#[derive(Debug, Serialize)]
struct OnDevice {
    #[serde(flatten)]
    named: Named,
    pages: u32,
    running: u32,
    pinned: bool,
}

/// Adapter contents by the fastest place that has them.
#[derive(Debug, Default, Serialize)]
struct Tiers {
    device: TierView,
    host: TierView,
    disk: TierView,
    /// In host memory, those on the device included.
    host_bytes: u64,
    host_bytes_max: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    store: Option<StoreView>,
}

#[derive(Debug, Default, Serialize)]
struct TierView {
    adapters: u32,
    /// What they take in host memory, or would.
    bytes: u64,
    pinned: u32,
    in_use: u32,
}

/// Downloads on the disk.
#[derive(Debug, Serialize)]
struct StoreView {
    contents: usize,
    bytes: u64,
    reserved_bytes: u64,
    quota_bytes: u64,
}

/// Since the start of the process.
#[derive(Debug, Default, Serialize)]
struct Totals {
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

/// The handler.
pub(crate) async fn live(State(app): State<App>, Query(query): Query<LiveQuery>) -> Result<Json<Live>, ApiError> {
    let since = match query.since.as_deref() {
        None => 0,
        Some(text) => text.parse::<u64>().map_err(|_| ApiError::invalid("since", "an integer of at least 0", text))?,
    };
    let status = app.engine.status();
    let points = app.recorder.points(since);
    Ok(Json(Live {
        time_ms: unix_ms(),
        version: env!("CARGO_PKG_VERSION"),
        build: build(&status),
        model: app.base_name().to_owned(),
        started: app.started,
        uptime_s: (unix_ms() / 1000).saturating_sub(app.started),
        ready: status.ready && app.registry.is_ready() && !app.is_draining(),
        draining: app.is_draining() || status.draining,
        waiting_for: app.registry.waiting_for().into_iter().map(|(name, _)| name).collect(),
        batch: batch(&app, &status),
        pages: pages(&app, &status),
        tiers: tiers(&status, app.registry.disk_status()),
        rates: app.recorder.points(0).last().map(|point| point.rates).unwrap_or_default(),
        minute: app.recorder.minute(),
        totals: totals(&status),
        next: points.last().map_or(since, |point| point.seq + 1),
        points,
    }))
}

/// The time, ms.
pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn named<'a>(app: &App, contents: impl Iterator<Item = &'a ContentId> + Clone) -> Vec<Named> {
    let keys = app.registry.keys_of(contents.clone());
    let named = keys.into_iter().zip(contents).map(|(key, content)| {
        let (namespace, name) = key.map_or_else(Default::default, |(namespace, name)| (namespace, Some(name)));
        Named { name, namespace, content: content.short() }
    });
    named.collect()
}

fn build(status: &EngineStatus) -> Build {
    let shard = &status.shard;
    Build {
        architecture: shard.architecture.clone(),
        device: shard.device.clone(),
        dtype: shard.dtype.clone(),
        weight_bytes: shard.weight_bytes,
        context_tokens: shard.context_tokens,
    }
}

fn batch(app: &App, status: &EngineStatus) -> Batch {
    let mut shares: Vec<&BatchShare> = status.batch.iter().collect();
    shares.sort_by(|a, b| (b.running, b.waiting, &a.contents).cmp(&(a.running, a.waiting, &b.contents)));
    let (listed, rest) = shares.split_at(shares.len().min(TOP_MAX));
    let mut others = Others { shares: rest.len(), ..Others::default() };
    for share in rest {
        others.running += share.running;
        others.waiting += share.waiting;
        others.running_tokens += share.running_tokens;
    }
    let shares = listed.iter().map(|share| Share {
        adapters: named(app, share.contents.iter()),
        running: share.running,
        waiting: share.waiting,
        running_tokens: share.running_tokens,
    });
    Batch {
        running: status.running,
        waiting: status.waiting,
        shares: shares.collect(),
        others,
        loading: status.waiting_for_load.len(),
        loading_names: named(app, status.waiting_for_load.iter().take(TOP_MAX)),
    }
}

fn pages(app: &App, status: &EngineStatus) -> Pages {
    let unknown = ContentStatus {
        tier: Tier::Device,
        pinned: None,
        draining: false,
        running: 0,
        waiting: 0,
        pages: 0,
        host_bytes: 0,
    };
    let facts = |content: &ContentId| status.contents.get(content).copied().unwrap_or(unknown);
    let mut resident: Vec<(&ContentId, ContentStatus)> = status.resident.iter().map(|id| (id, facts(id))).collect();
    resident.sort_by_key(|(id, facts)| (std::cmp::Reverse((facts.running > 0, facts.pages)), **id));
    let (listed, rest) = resident.split_at(resident.len().min(TOP_MAX));
    let names = named(app, listed.iter().map(|(id, _)| *id));
    let on_device = names.into_iter().zip(listed).map(|(named, (_, facts))| OnDevice {
        named,
        pages: facts.pages,
        running: facts.running,
        pinned: facts.pinned == Some(PinLevel::Device),
    });
    let adapters: Vec<OnDevice> = on_device.collect();
    let listed_pages = adapters.iter().map(|adapter| adapter.pages).sum::<u32>();
    Pages {
        total: status.shard.pages_total,
        free: status.pages_free,
        kv: status.pages_kv,
        adapter: status.pages_adapters,
        pinned: status.pages_pinned,
        bytes: status.shard.page_bytes,
        blocks_used: status.blocks_used,
        blocks_cached: status.blocks_cached,
        blocks_total: status.blocks_total,
        adapters,
        other_adapters: rest.len(),
        other_pages: status.pages_adapters.saturating_sub(listed_pages),
    }
}

fn tiers(status: &EngineStatus, store: Option<StoreStatus>) -> Tiers {
    let mut tiers = Tiers { host_bytes: status.host_bytes, host_bytes_max: status.host_bytes_max, ..Tiers::default() };
    for content in status.contents.values() {
        let tier = match content.tier {
            Tier::Device => &mut tiers.device,
            Tier::Host => &mut tiers.host,
            Tier::Disk => &mut tiers.disk,
        };
        tier.adapters += 1;
        tier.bytes += content.host_bytes;
        tier.pinned += u32::from(content.pinned.is_some());
        tier.in_use += u32::from(content.running > 0);
    }
    tiers.store = store.map(|StoreStatus { contents, bytes, reserved_bytes, quota_bytes, .. }| StoreView {
        contents,
        bytes,
        reserved_bytes,
        quota_bytes,
    });
    tiers
}

fn totals(status: &EngineStatus) -> Totals {
    let of = &status.counters;
    Totals {
        prompt_tokens: of.prompt_tokens,
        generation_tokens: of.generation_tokens,
        steps: of.steps,
        preemptions: of.preemptions,
        prefix_queries: of.prefix_queries,
        prefix_hits: of.prefix_hits,
        adapter_uploads: of.adapter_uploads,
        adapter_evictions: of.adapter_evictions,
        shard_restarts: of.shard_restarts,
        replayed_requests: of.replayed,
    }
}
