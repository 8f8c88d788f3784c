//! What the metrics page shows.

use std::collections::BTreeMap;

use super::Scheduler;
use crate::engine::{BatchShare, ContentId};

/// Totals since the start.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counters {
    pub(super) preemptions: u64,
    pub(super) prefix_queries_tokens: u64,
    pub(super) prefix_hit_tokens: u64,
    pub(super) wasted_positions: u64,
    pub(super) adapter_prefetches: u64,
}

/// A snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences that hold device memory.
    pub running: u32,
    /// Sequences that wait: for their turn, memory, an adapter or a sibling's prompt.
    pub waiting: u32,
    /// Cost of the requests that were never admitted, as the queue's bound counts it.
    pub waiting_tokens: u64,
    /// Pages that hold nothing.
    pub pages_free: u32,
    /// Pages that hold KV blocks.
    pub pages_kv: u32,
    /// Pages that hold adapters.
    pub pages_adapters: u32,
    /// Pages of pinned adapters, on the device or still to come.
    pub pages_pinned: u32,
    /// KV blocks that running sequences hold.
    pub blocks_used: u32,
    /// KV blocks that only the prefix cache holds.
    pub blocks_cached: u32,
    /// KV blocks of the whole arena.
    pub blocks_total: u32,
    /// Adapters on the device, most recently used first.
    pub resident: Vec<ContentId>,
    /// Used by unfinished sequences and not on the device.
    pub waiting_for_adapter: Vec<ContentId>,
    /// Running sequences that gave their memory to older ones.
    pub preemptions: u64,
    /// Tokens of admitted sequences that were looked up in the prefix cache.
    pub prefix_queries_tokens: u64,
    /// Of these, tokens whose KV was found.
    pub prefix_hit_tokens: u64,
    /// Positions computed for sequences that had ended by the time the result came: cancelled ones, and with two steps in
    /// flight those whose end could not be foreseen.
    pub wasted_positions: u64,
    /// Adapters brought to the device.
    pub adapter_uploads: u64,
    /// Of these, the ones that no sequence's turn had asked for.
    pub adapter_prefetches: u64,
    /// Arena pages that uploads filled.
    pub adapter_upload_pages: u64,
    /// Adapters that lost their slot to somebody else.
    pub adapter_evictions: u64,
}

impl Scheduler {
    /// Counts in O(slots + contents + pending siblings); meant for some tens of calls per second.
    pub fn stats(&self) -> SchedulerStats {
        let unfinished = self.sequences.len() - self.free_sequences.len();
        SchedulerStats {
            running: self.running.len() as u32,
            waiting: (unfinished - self.running.len()) as u32,
            waiting_tokens: self.queued_tokens,
            pages_free: self.pool.pages_free(),
            pages_kv: self.pool.pages_kv(),
            pages_adapters: self.pool.pages_adapters(),
            pages_pinned: self.adapters.kept_pages(),
            blocks_used: self.pool.blocks_used(),
            blocks_cached: self.pool.blocks_cached(),
            blocks_total: u32::try_from(self.limits.blocks_total()).unwrap_or(u32::MAX),
            resident: self.adapters.resident(),
            waiting_for_adapter: self.adapters.waited_for(),
            preemptions: self.counters.preemptions,
            prefix_queries_tokens: self.counters.prefix_queries_tokens,
            prefix_hit_tokens: self.counters.prefix_hit_tokens,
            wasted_positions: self.counters.wasted_positions,
            adapter_uploads: self.adapters.uploads,
            adapter_prefetches: self.counters.adapter_prefetches,
            adapter_upload_pages: self.adapters.upload_pages,
            adapter_evictions: self.adapters.evictions,
        }
    }

    /// Contents on the device, most recently used first.
    pub fn contents_resident(&self) -> Vec<ContentId> {
        self.adapters.resident()
    }

    /// Arena pages that a content takes on the device; 0 for one that was not reported ready.
    pub fn pages_of(&self, content: &ContentId) -> u32 {
        self.adapters.get(content).map_or(0, |known| known.pages_needed)
    }

    /// Unfinished sequences by their set of adapters, in O(sequences).
    pub fn batch(&self) -> Vec<BatchShare> {
        let mut shares: BTreeMap<&[ContentId], BatchShare> = BTreeMap::new();
        for seq in self.sequences.iter().flatten().filter(|seq| !seq.leaving) {
            let contents = &seq.job.contents;
            let share = shares
                .entry(contents)
                .or_insert_with(|| BatchShare { contents: contents.clone(), ..BatchShare::default() });
            if seq.is_running() {
                share.running += 1;
                share.running_tokens += seq.len_tokens() as u64;
            } else {
                share.waiting += 1;
            }
        }
        shares.into_values().collect()
    }

    /// (content, sequences that run under it, sequences that wait to) of every content that is used.
    pub fn content_uses(&self) -> Vec<(ContentId, u32, u32)> {
        let mut running: BTreeMap<ContentId, u32> = BTreeMap::new();
        for content in self.running.iter().flat_map(|key| &self.seq(*key).job.contents) {
            *running.entry(*content).or_default() += 1;
        }
        let uses = self.adapters.used().map(|(content, known)| {
            let running = running.get(content).copied().unwrap_or(0);
            (*content, running, known.users - running)
        });
        uses.collect()
    }
}
