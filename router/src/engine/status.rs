//! A snapshot of the engine for `/health`, `/metrics` and the start-up summary.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use loramux_proto::Info;

use super::adapters::{ContentStatus, Tier};
use super::contents::{Content, Contents, Residency};
use super::prepare::Parked;
use super::run::PUBLISH_EVERY;
use super::types::ContentId;
use crate::metrics::EngineMeters;
use crate::scheduler::Scheduler;

/// What the engine is doing, renewed at most every 50 ms.
#[derive(Clone, Debug, Default)]
pub struct EngineStatus {
    /// A request can be served now: the shard is up, answers, and its last step moved.
    pub ready: bool,
    /// The shard was ready at least once.
    pub started: bool,
    /// No new requests are taken.
    pub draining: bool,
    /// What the shard said of itself.
    pub shard: Info,
    /// Sequences that hold device memory.
    pub running: u32,
    /// Sequences that wait for it, and requests that wait for their adapter's bytes.
    pub waiting: u32,
    /// Free pages of the arena.
    pub pages_free: u32,
    /// Pages that hold KV blocks, referenced or cached.
    pub pages_kv: u32,
    /// Pages that hold adapters.
    pub pages_adapters: u32,
    /// KV blocks that a sequence uses.
    pub blocks_used: u32,
    /// KV blocks that only the prefix cache holds.
    pub blocks_cached: u32,
    /// KV blocks that the arena could hold.
    pub blocks_total: u32,
    /// Who runs and who waits, by set of adapters, as of at most a moment ago. Shared like [`Self::contents`].
    pub batch: Arc<Vec<BatchShare>>,
    /// Adapters on the device, most recently used first.
    pub resident: Vec<ContentId>,
    /// Adapters that a waiting sequence needs.
    pub waiting_for_load: Vec<ContentId>,
    /// Every content the engine knows, as of at most a moment ago. Shared by snapshots that saw no change.
    pub contents: Arc<HashMap<ContentId, ContentStatus>>,
    /// Pages of contents that are pinned on the device, resident or not.
    pub pages_pinned: u32,
    /// Adapters in the shard's host memory.
    pub host_adapters: u32,
    /// Their bytes.
    pub host_bytes: u64,
    /// Bytes of adapters that the shard may keep there.
    pub host_bytes_max: u64,
    /// Times of steps and masks; the same for every snapshot.
    pub meters: Arc<EngineMeters>,
    /// Counters that only grow.
    pub counters: EngineCounters,
}

/// The sequences of one set of adapters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchShare {
    /// Each once; empty = the base model.
    pub contents: Vec<ContentId>,
    /// Sequences that hold device memory.
    pub running: u32,
    /// Sequences that wait for it, and those of requests that wait for their adapter's bytes.
    pub waiting: u32,
    /// Tokens of the running ones, prompts included.
    pub running_tokens: u64,
}

/// Counters since the start of the process.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineCounters {
    /// Prompt tokens of admitted requests.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Steps executed.
    pub steps: u64,
    /// Positions computed over all steps.
    pub step_tokens: u64,
    /// Time the shard spent on them, us.
    pub step_us: u64,
    /// Positions that were computed for sequences that had ended meanwhile.
    pub wasted_positions: u64,
    /// Sequences that gave their memory back and were computed again.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Adapter uploads to the device.
    pub adapter_uploads: u64,
    /// Arena pages that these filled.
    pub adapter_upload_pages: u64,
    /// Of these, the ones fetched ahead of any sequence's turn.
    pub adapter_prefetches: u64,
    /// Adapters evicted from the device.
    pub adapter_evictions: u64,
    /// Shards started after the first.
    pub shard_restarts: u64,
    /// Requests that were running when a shard died, and went on.
    pub replayed: u64,
}

/// The last lists that were made: making them takes a look at each content and sequence, so it is done seldom and shared.
#[derive(Default)]
pub(super) struct ContentsView {
    made: Option<Instant>,
    list: Arc<HashMap<ContentId, ContentStatus>>,
    batch: Arc<Vec<BatchShare>>,
}

impl ContentsView {
    /// The lists, at most [`PUBLISH_EVERY`] old.
    pub(super) fn get(
        &mut self,
        contents: &Contents,
        parked: &[Parked],
        scheduler: Option<&Scheduler>,
    ) -> (Arc<HashMap<ContentId, ContentStatus>>, Arc<Vec<BatchShare>>) {
        if self.made.is_none_or(|made| made.elapsed() >= PUBLISH_EVERY) {
            let list = list_contents(contents, parked, scheduler);
            if *self.list != list {
                self.list = Arc::new(list);
            }
            let batch = list_batch(parked, scheduler);
            if *self.batch != batch {
                self.batch = Arc::new(batch);
            }
            self.made = Some(Instant::now());
        }
        (Arc::clone(&self.list), Arc::clone(&self.batch))
    }
}

fn list_batch(parked: &[Parked], scheduler: Option<&Scheduler>) -> Vec<BatchShare> {
    let mut shares = scheduler.map(Scheduler::batch).unwrap_or_default();
    for Parked { new, .. } in parked {
        let mut contents = Vec::new();
        for used in &new.request.adapters {
            if !contents.contains(&used.content) {
                contents.push(used.content);
            }
        }
        let waiting = new.request.n.max(1);
        match shares.iter_mut().find(|share| share.contents == contents) {
            Some(share) => share.waiting += waiting,
            None => shares.push(BatchShare { contents, waiting, ..BatchShare::default() }),
        }
    }
    shares
}

fn list_contents(
    contents: &Contents,
    parked: &[Parked],
    scheduler: Option<&Scheduler>,
) -> HashMap<ContentId, ContentStatus> {
    let mut list: HashMap<ContentId, ContentStatus> = contents
        .iter()
        .map(|(content, known)| {
            let tier = if known.residency == Residency::Host { Tier::Host } else { Tier::Disk };
            let Content { pinned, draining, host_bytes, .. } = *known;
            let pages = scheduler.map_or(0, |scheduler| scheduler.pages_of(content));
            (*content, ContentStatus { tier, pinned, draining, running: 0, waiting: 0, pages, host_bytes })
        })
        .collect();
    for used in parked.iter().flat_map(|parked| &parked.new.request.adapters) {
        if let Some(status) = list.get_mut(&used.content) {
            status.waiting += 1;
        }
    }
    let Some(scheduler) = scheduler else { return list };
    for content in scheduler.contents_resident() {
        if let Some(status) = list.get_mut(&content) {
            status.tier = Tier::Device;
        }
    }
    for (content, running, waiting) in scheduler.content_uses() {
        if let Some(status) = list.get_mut(&content) {
            status.running += running;
            status.waiting += waiting;
        }
    }
    list
}
