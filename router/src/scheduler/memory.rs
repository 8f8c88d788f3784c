//! Making room: what is evicted, who is preempted, when a block is copied.
//!
//! Cache goes first, least recently used first, whether it is a cached block or an idle adapter. A running sequence that
//! grows may also take adapters that are kept for waiting ones, and then the memory of sequences that started after it.
//! Nothing else preempts; an adapter's load never does.

use loramux_proto::BlockCopy;

use super::Scheduler;
use super::ids::{BlockId, SeqKey};
use super::plan::Draft;

impl Scheduler {
    /// Blocks that can be had without touching claims or running sequences.
    pub(super) fn blocks_obtainable(&self) -> u64 {
        let idle = u64::from(self.adapters.idle_pages()) * u64::from(self.limits.blocks_per_page);
        self.pool.blocks_obtainable() + idle
    }

    /// Room for `blocks` KV blocks and `pages` adapter pages beside all that was promised: to running prefills, to
    /// claims other than `but`, to pinned adapters that are not there, and one block of growth for each running sequence.
    pub(super) fn has_room(&self, blocks: u64, pages: u32, but: Option<SeqKey>, draft: &Draft) -> bool {
        if self.pins_hold() {
            return false;
        }
        let pages = u64::from(pages + self.adapters.kept_missing_pages()) * u64::from(self.limits.blocks_per_page);
        self.blocks_obtainable() >= blocks + pages + self.promised_blocks(but, draft)
    }

    /// Room for the pages of one pinned adapter beside what was promised to sequences.
    pub(super) fn has_room_for_kept(&self, pages: u32, draft: &Draft) -> bool {
        let blocks = u64::from(pages) * u64::from(self.limits.blocks_per_page);
        self.blocks_obtainable() >= blocks + self.promised_blocks(None, draft)
    }

    fn promised_blocks(&self, but: Option<SeqKey>, draft: &Draft) -> u64 {
        let claimed = self.claims.iter().filter(|key| Some(**key) != but);
        let claimed: u64 = claimed.map(|key| self.limits.blocks_for(self.seq(*key).len_tokens()) as u64).sum();
        claimed + draft.outstanding_blocks + self.running.len() as u64
    }

    /// A block, at the cost of cache only.
    fn make_block(&mut self) -> Option<BlockId> {
        loop {
            if let Some(block) = self.pool.take_block() {
                return Some(block);
            }
            if !self.evict_oldest(self.pool.oldest_cached_plan()) && !self.pool.forget_oldest_cached() {
                return None;
            }
        }
    }

    /// Free pages, at the cost of cache only. False if there are not enough; then some may have been freed.
    pub(super) fn make_pages(&mut self, count: u32) -> bool {
        while self.pool.pages_free() < count {
            if !self.evict_oldest(self.pool.oldest_reclaimable_plan()) && !self.pool.reclaim_page() {
                return false;
            }
        }
        true
    }

    /// Evicts an idle adapter unless the cached KV, last used in plan `kv`, is older.
    fn evict_oldest(&mut self, kv: Option<u64>) -> bool {
        match self.adapters.victim() {
            Some((slot, last_used)) if kv.is_none_or(|kv| last_used < kv) => {
                self.evict_slot(slot);
                true
            }
            _ => false,
        }
    }

    pub(super) fn evict_slot(&mut self, slot: u32) {
        let content = self.adapters.evict(slot, &mut self.pool);
        self.content_moved(&content);
    }

    /// Makes positions `start..end` of a running sequence writable: blocks that are missing, and copies of those that
    /// others read. All or nothing. With `may_preempt`, younger sequences give way; the youngest gives way itself. One that
    /// is in flight cannot: then all wait for its step.
    pub(super) fn secure(
        &mut self,
        key: SeqKey,
        start: usize,
        end: usize,
        may_preempt: bool,
        draft: &mut Draft,
    ) -> bool {
        loop {
            let (shared, missing) = self.blocks_to_write(key, start, end, draft);
            let wanted = shared.len() + missing;
            if self.blocks_obtainable() >= wanted as u64 {
                self.write_blocks(key, start, &shared, missing, draft);
                return true;
            }
            if !may_preempt {
                return false;
            }
            if let Some(last) = self.claims.last().copied() {
                self.drop_claim(last);
                continue;
            }
            match self.running.last().copied() {
                Some(youngest) if self.seq(youngest).is_in_flight() => {
                    (draft.stalled, draft.no_starts) = (true, true);
                    return false;
                }
                Some(youngest) if youngest != key => self.preempt(youngest, draft),
                // Alone, it waits for an upload that holds the rest.
                Some(_) if self.running.len() > 1 => {
                    self.preempt(key, draft);
                    return false;
                }
                _ => return false,
            }
        }
    }

    /// (indices of blocks in the table that others read too, number of blocks that are missing).
    fn blocks_to_write(&self, key: SeqKey, start: usize, end: usize, draft: &Draft) -> (Vec<usize>, usize) {
        let Some(holding) = self.seq(key).holding() else { return (Vec::new(), 0) };
        let (first, after) = (start / self.limits.block_tokens as usize, self.limits.blocks_for(end));
        let held = holding.blocks.len();
        let shared = (first..after.min(held)).filter(|at| self.is_shared(holding.blocks[*at], draft)).collect();
        (shared, after.saturating_sub(held))
    }

    /// Writing into it would change what another sequence reads. The copies of a step are made before anything of it is
    /// written, and steps run one after the other, so a block that is only kept to be copied is not in the way.
    fn is_shared(&self, block: BlockId, draft: &Draft) -> bool {
        let in_flight = self.in_flight.iter().flat_map(|flight| &flight.copy_sources);
        let copies = in_flight.chain(&draft.copy_sources).filter(|source| **source == block).count();
        self.pool.holders(block) - copies > 1
    }

    fn write_blocks(&mut self, key: SeqKey, start: usize, shared: &[usize], missing: usize, draft: &mut Draft) {
        let block_tokens = self.limits.block_tokens as usize;
        let holding = self.seq(key).holding().expect("only a running sequence writes");
        // A sibling that computes the last prompt position again may be the last holder of a published block.
        if let Some(block) = holding.blocks.get(start / block_tokens).copied()
            && !self.is_shared(block, draft)
        {
            self.pool.unpublish(block);
        }
        for &at in shared {
            let new = self.make_block().expect("counted as obtainable");
            let holding = self.seq_mut(key).holding_mut().expect("only a running sequence writes");
            let old = std::mem::replace(&mut holding.blocks[at], new);
            holding.sent_blocks = holding.sent_blocks.min(at);
            if at * block_tokens < start {
                // It begins with positions that are computed. The source stays until the copy was made.
                draft.copies.push(BlockCopy { src: old.0, dst: new.0 });
                draft.copy_sources.push(old);
            } else {
                self.pool.release(old);
            }
        }
        for _ in 0..missing {
            let new = self.make_block().expect("counted as obtainable");
            self.seq_mut(key).holding_mut().expect("only a running sequence writes").blocks.push(new);
        }
    }

    /// Running -> Waiting: blocks and pins come back, tokens stay.
    pub(super) fn preempt(&mut self, key: SeqKey, draft: &mut Draft) {
        let seq = self.sequences[key.0 as usize].as_mut().expect("a key in use names a sequence");
        debug_assert!(!seq.is_in_flight(), "nothing is preempted under a step in flight");
        if let Some(run) = seq.preempt(&mut self.pool, &mut self.adapters) {
            self.finishes.push(run.0);
        }
        let (fair, turn, suspect) = (seq.key, seq.turn(key), seq.suspect.is_some());
        self.running.retain(|other| *other != key);
        if !suspect {
            self.queue.push(fair, turn);
        }
        self.counters.preemptions += 1;
        draft.no_starts = true;
    }
}
