//! Waiting -> Running: from the prefix cache, from a sibling's blocks, or from nothing.

use super::Scheduler;
use super::adapters::Residency;
use super::ids::{BlockId, SeqId, SeqKey};
use super::limits::HELD_MAX;
use super::plan::Draft;
use super::prefix;
use crate::engine::{FinishReason, Pooling};

/// KV that a sequence starts with.
struct Head {
    blocks: Vec<BlockId>,
    computed: usize,
    from_cache: bool,
}

impl Scheduler {
    /// Starts waiting sequences, least served pair first, while there are seats, budget and memory.
    pub(super) fn admit_waiting(&mut self, draft: &mut Draft) {
        let hold = self.hold();
        if let Some(key) = hold.filter(|key| self.seq(*key).suspect.is_none()) {
            self.admit_now(key, draft);
        }
        while hold.is_none() && self.can_admit(draft) {
            let Some(key) = self.queue.first_resident_but(&draft.held) else { break };
            if self.waits_for_prefix(key) && draft.held.len() < HELD_MAX {
                draft.held.push(key);
            } else if !self.admit_now(key, draft) {
                self.note_starving(key);
                break;
            }
        }
        // Claims were promised their memory: they need not wait behind one that lacks it.
        for key in self.claims.clone() {
            if self.can_admit(draft) && self.seq(key).suspect.is_none() && !self.waits_for_prefix(key) {
                self.admit_now(key, draft);
            }
        }
    }

    fn can_admit(&self, draft: &Draft) -> bool {
        draft.budget > 0 && self.running.len() < self.limits.seats() && !draft.no_starts
    }

    /// Admits and plans the first chunk.
    fn admit_now(&mut self, key: SeqKey, draft: &mut Draft) -> bool {
        self.can_admit(draft) && self.admit(key, draft) && {
            let pending = self.seq(key).pending();
            let len = pending.len().min(draft.budget);
            if len > 0 {
                self.plan_chunk(key, len, false, draft);
            }
            draft.outstanding_blocks += self.blocks_lacking(key);
            true
        }
    }

    /// Waiting -> Running if its adapters are resident and there is room for all its known tokens.
    pub(super) fn admit(&mut self, key: SeqKey, draft: &mut Draft) -> bool {
        let seq = self.seq(key);
        if seq.is_running() || self.adapters.residency(&seq.job.contents) != Residency::Resident {
            return false;
        }
        let head = self.fork_source(key).unwrap_or_else(|| self.cached_head(key));
        let seq = self.seq(key);
        let total = self.limits.blocks_for(seq.len_tokens());
        let held = head.blocks.iter().filter(|block| self.pool.is_referenced(**block)).count();
        let copied = usize::from(head.computed < head.blocks.len() * self.limits.block_tokens as usize);
        let (_, own_pages) = self.adapters.idle_among(&seq.job.contents);
        if !self.has_room((total - held + copied) as u64, own_pages, Some(key), draft) {
            return false;
        }
        let looked_up = seq.len_tokens() as u64;
        let cached_tokens = if head.from_cache { head.computed } else { 0 };
        if self.limits.prefix_caching && head.from_cache {
            self.counters.prefix_queries_tokens += looked_up;
            self.counters.prefix_hit_tokens += cached_tokens as u64;
        }
        self.start(key, head);
        let id = self.seq(key).job.id;
        self.note_admitted(id, cached_tokens);
        true
    }

    fn start(&mut self, key: SeqKey, head: Head) {
        let seq = self.seq(key);
        if seq.suspect.is_none() && !seq.waits_for_leader() {
            self.queue.remove(seq.key, &seq.turn(key));
        }
        for block in &head.blocks {
            self.pool.retain(*block);
        }
        let run = SeqId(self.next_seq);
        self.next_seq += 1;
        let seq = self.sequences[key.0 as usize].as_mut().expect("a key in use names a sequence");
        let published = head.computed / self.limits.block_tokens as usize;
        seq.start(run, head.blocks, head.computed, published, &mut self.adapters);
        let fair = seq.key;
        self.running.push(key);
        self.no_longer_starving(key);
        self.ask_first_mask(key);
        // Pins keep the adapters now.
        let served: Vec<SeqKey> = self.claims.iter().copied().filter(|c| self.seq(*c).key == fair).collect();
        for claim in served {
            self.drop_claim(claim);
        }
    }

    /// Blocks of a running sibling whose prompt is computed; the last prompt position is computed again, since its
    /// logits are what the first own token is drawn from.
    fn fork_source(&self, key: SeqKey) -> Option<Head> {
        let seq = self.seq(key);
        let siblings = &self.requests.get(&seq.job.id)?.sequences;
        let prompt = seq.prompt_tokens();
        let ready = |other: &SeqKey| *other != key && self.seq(*other).computed >= prompt && !self.seq(*other).leaving;
        let source = siblings.iter().flatten().copied().find(ready)?;
        let blocks = self.limits.blocks_for(prompt - 1);
        let blocks = self.seq(source).holding()?.blocks[..blocks].to_vec();
        Some(Head { blocks, computed: prompt - 1, from_cache: false })
    }

    /// It may begin with cached blocks. Hidden states of cached positions are not known any more.
    fn may_use_cache(&self, key: SeqKey) -> bool {
        let seq = self.seq(key);
        let owes_logprobs = self.requests.get(&seq.job.id).is_some_and(super::requests::Request::owes_logprobs);
        self.limits.prefix_caching && !owes_logprobs && seq.job.request.pooling != Some(Pooling::Mean)
    }

    /// Full blocks of its tokens without the last one, which is always computed; their keys are known then.
    fn full_blocks(&mut self, key: SeqKey) -> usize {
        let full = (self.seq(key).len_tokens() - 1) / self.limits.block_tokens as usize;
        self.extend_prefix_keys(key, full);
        full
    }

    /// Somebody who runs is about to compute most of what this sequence lacks: starting now would compute it twice.
    ///
    /// It waits for no longer than that takes, which it would have to wait for its own, too. Where the common part is the
    /// smaller one, starting at once is sooner.
    fn waits_for_prefix(&mut self, key: SeqKey) -> bool {
        if self.seq(key).suspect.is_some() || !self.may_use_cache(key) || self.fork_source(key).is_some() {
            return false;
        }
        let full = self.full_blocks(key);
        let seq = self.seq(key);
        let cached = seq.prefix_keys.iter().take(full).take_while(|key| self.pool.find(key).is_some()).count();
        let wanted = seq.prefix_keys.get(cached..full).unwrap_or_default();
        let block_tokens = self.limits.block_tokens as usize;
        let lacking = seq.len_tokens() - cached * block_tokens;
        let computes = |other: &SeqKey| {
            let other = self.seq(*other);
            let is_on_its_way = other.computed < other.prompt_tokens() && other.suspect.is_none() && !other.leaving;
            let theirs = other.prefix_keys.get(cached..).filter(|_| is_on_its_way).unwrap_or_default();
            let common = wanted.iter().zip(theirs).take_while(|(a, b)| a == b).count();
            common * block_tokens * 2 >= lacking
        };
        !wanted.is_empty() && self.running.iter().any(computes)
    }

    /// The longest run of cached blocks that this sequence's tokens begin with. The last token is always computed.
    fn cached_head(&mut self, key: SeqKey) -> Head {
        let mut head = Head { blocks: Vec::new(), computed: 0, from_cache: true };
        if !self.may_use_cache(key) {
            return head;
        }
        let full = self.full_blocks(key);
        let keys = &self.seq(key).prefix_keys[..full];
        head.blocks = keys.iter().map_while(|key| self.pool.find(key)).collect();
        head.computed = head.blocks.len() * self.limits.block_tokens as usize;
        head
    }

    fn extend_prefix_keys(&mut self, key: SeqKey, blocks: usize) {
        let block_tokens = self.limits.block_tokens as usize;
        let seq = self.sequences[key.0 as usize].as_mut().expect("a key in use names a sequence");
        while seq.prefix_keys.len() < blocks {
            let at = seq.prefix_keys.len();
            let parent = seq.prefix_keys.last().unwrap_or(&seq.job.prefix_root);
            let tokens = (at * block_tokens..(at + 1) * block_tokens).map(|position| seq.token(position));
            let next = prefix::child(&self.limits.prefix_key, parent, tokens);
            seq.prefix_keys.push(next);
        }
    }

    /// Full blocks of committed steps enter the prefix index.
    pub(super) fn publish_blocks(&mut self, key: SeqKey) {
        let full = self.seq(key).computed / self.limits.block_tokens as usize;
        let Some(from) = self.seq(key).holding().map(|holding| holding.published) else { return };
        if !self.limits.prefix_caching || from >= full {
            return;
        }
        self.extend_prefix_keys(key, full);
        let seq = self.sequences[key.0 as usize].as_mut().expect("a key in use names a sequence");
        let keys = std::mem::take(&mut seq.prefix_keys);
        let holding = seq.holding_mut().expect("only a running sequence publishes");
        holding.published = full;
        for (block, key) in holding.blocks[from..full].iter().zip(&keys[from..full]) {
            self.pool.publish(*block, *key);
        }
        self.seq_mut(key).prefix_keys = keys;
    }

    /// The leader's prompt is computed: its siblings share its blocks, as many as there are seats; the others queue.
    pub(super) fn release_siblings(&mut self, leader: SeqKey) {
        let job = std::sync::Arc::clone(&self.seq(leader).job);
        if job.request.n <= 1 {
            return;
        }
        let Some(request) = self.requests.get(&job.id) else { return };
        let waiting = request.sequences.iter().flatten().copied().filter(|key| self.seq(*key).waits_for_leader());
        let waiting: Vec<_> = waiting.collect();
        let suspect = self.seq(leader).suspect;
        for key in waiting {
            if job.request.max_tokens == 0 {
                self.finish_index(job.id, self.seq(key).index, FinishReason::Length);
            } else if let Some(suspect) = suspect {
                // The shard died with the leader's first decode in flight, which theirs may be like.
                self.inherit_suspicion(key, suspect.until);
            } else if self.running.len() < self.limits.seats()
                && let Some(head) = self.fork_source(key)
            {
                let keys = self.seq(leader).prefix_keys.clone();
                self.start(key, head);
                self.seq_mut(key).prefix_keys = keys;
            } else {
                self.take_turn(key);
            }
        }
    }
}
