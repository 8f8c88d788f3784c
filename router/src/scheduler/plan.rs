//! Plans one forward pass.
//!
//! The budget of positions goes to decodes first, then to running prefills, then to sequences that start. A running
//! prefill whose pair was served more than one that waits keeps to half of what is left, so no long prompt shuts the
//! door. Beside decodes, prompts keep to a bound of their own, so none delays the others' next tokens by much. Memory is made writable in the order of start, so who is preempted has not been planned yet.

use loramux_proto::{AdapterRef, AdapterUpload, BlockCopy, Chunk, SeqStart, Step};

use super::adapters::{Residency, Upload};
use super::ids::{BlockId, SeqKey};
use super::load::Claim;
use super::{InFlight, Member, Scheduler};
use crate::engine::Pooling;

/// A step in the making.
#[derive(Default)]
pub(super) struct Draft {
    /// Positions left.
    pub(super) budget: usize,
    pub(super) members: Vec<Member>,
    pub(super) copies: Vec<BlockCopy>,
    /// Keep their references until the copies were made.
    pub(super) copy_sources: Vec<BlockId>,
    pub(super) uploads: Vec<Upload>,
    pub(super) upload_pages: u32,
    pub(super) solo: Option<SeqKey>,
    /// Waiting sequences whose prefix somebody else is computing.
    pub(super) held: Vec<SeqKey>,
    /// Blocks that running sequences still need for tokens they have.
    pub(super) outstanding_blocks: u64,
    /// Somebody gave up memory in this plan, or waits for it: nobody starts in it.
    pub(super) no_starts: bool,
    /// Somebody waits for memory that a sequence of a step in flight holds. Whoever started later waits, too: it would
    /// stay in flight, and never be there to give way.
    pub(super) stalled: bool,
}

impl Draft {
    fn is_empty(&self) -> bool {
        self.members.is_empty() && self.uploads.is_empty()
    }
}

impl Scheduler {
    /// Plans one step, or None if nothing can run now or enough steps are in flight. Fails requests whose deadline passed.
    ///
    /// A step without chunks carries uploads, or only asks for the report of one that is under way.
    pub fn plan(&mut self, now_ms: u64) -> Option<Step> {
        self.expire(now_ms);
        // With a second step in flight, nobody could say which of them killed the shard.
        let depth = if self.suspects.is_empty() { self.limits.depth() } else { 1 };
        if self.in_flight.len() >= depth || (self.requests.is_empty() && !self.wants_upload()) {
            return None;
        }
        self.plans += 1;
        self.pool.set_plan(self.plans);
        self.adapters.set_plan(self.plans);
        let mut draft = Draft { budget: self.limits.step_tokens as usize, ..Draft::default() };
        let solo_first = !self.last_was_solo;
        if !(solo_first && self.plan_solo(&mut draft)) {
            self.plan_batch(&mut draft);
            if draft.is_empty() && !solo_first {
                self.plan_solo(&mut draft);
            }
        }
        self.last_was_solo = draft.solo.is_some();
        let asks_for_report = self.adapters.is_uploading() && self.in_flight.is_empty();
        if draft.is_empty() && !asks_for_report {
            return None;
        }
        Some(self.seal(draft))
    }

    /// A step with nobody but the suspect whose turn it is, and the upload of its adapters.
    fn plan_solo(&mut self, draft: &mut Draft) -> bool {
        // The one that was begun with goes on: it runs, or its adapters are kept for it. While it waits for a mask, another
        // may be tried.
        let find = |wanted: &dyn Fn(&SeqKey) -> bool| self.suspects.iter().copied().find(wanted);
        let running = find(&|key| self.seq(*key).is_running() && !self.seq(*key).pending().is_empty());
        let begun = running.or_else(|| find(&|key| self.claims.contains(key)));
        let ready = |key: &SeqKey| {
            let seq = self.seq(*key);
            !seq.is_running() && self.adapters.residency(&seq.job.contents) != Residency::Parked
        };
        let Some(key) = begun.or_else(|| find(&ready)) else { return false };
        if running.is_none() && !self.start_suspect(key, draft) {
            return draft.solo.is_some();
        }
        let len = self.seq(key).pending().len().min(draft.budget);
        if len == 0 || !self.plan_chunk(key, len, true, draft) {
            return false;
        }
        draft.solo = Some(key);
        true
    }

    /// True if it runs now. Its adapters' upload makes the step its own, too.
    fn start_suspect(&mut self, key: SeqKey, draft: &mut Draft) -> bool {
        if self.adapters.residency(&self.seq(key).job.contents) == Residency::Loading {
            match self.claim(key, draft) {
                Claim::Given => draft.solo = Some(key),
                Claim::Later => {}
                Claim::NoRoom => self.note_starving(key),
            }
            return false;
        }
        draft.outstanding_blocks = self.outstanding_blocks();
        let has_seat = self.running.len() < self.limits.seats();
        let started = has_seat && self.admit(key, draft);
        if !started {
            self.note_starving(key);
        }
        started
    }

    fn plan_batch(&mut self, draft: &mut Draft) {
        let decodes = self.decodes();
        if decodes > 0 {
            // Each running sequence gets a position, whatever the bound.
            let beside = decodes.saturating_add(self.limits.prefill_tokens_beside as usize);
            draft.budget = draft.budget.min(beside.max(self.running.len()));
        }
        for (key, len) in self.share_budget(draft.budget) {
            if draft.stalled {
                break;
            }
            // An older one may have taken its memory by now.
            if self.seq(key).is_running() {
                self.plan_chunk(key, len, true, draft);
            }
        }
        draft.outstanding_blocks = self.outstanding_blocks();
        if !draft.no_starts {
            self.upload_kept(draft);
        }
        self.admit_waiting(draft);
        if !draft.no_starts {
            self.load_adapters(draft);
            self.prefetch(draft);
        }
        self.use_up_budget(draft);
    }

    /// Running sequences that want one position: their clients wait for the next token.
    fn decodes(&self) -> usize {
        let decodes = |key: &&SeqKey| {
            let seq = self.seq(**key);
            seq.suspect.is_none() && seq.pending().len() == 1 && seq.pending().start >= seq.prompt_tokens()
        };
        self.running.iter().filter(decodes).count()
    }

    fn outstanding_blocks(&self) -> u64 {
        self.running.iter().map(|key| self.blocks_lacking(*key)).sum()
    }

    /// Blocks that a running sequence still needs for tokens it has, or will have once the steps in flight are done.
    pub(super) fn blocks_lacking(&self, key: SeqKey) -> u64 {
        let seq = self.seq(key);
        let held = seq.holding().map_or(0, |holding| holding.blocks.len());
        let end = if seq.leaving { 0 } else { seq.end_in_sight() };
        self.limits.blocks_for(end).saturating_sub(held) as u64
    }

    /// Positions for each running sequence that is no suspect and does not end in a step in flight, in the order of start.
    fn share_budget(&self, mut budget: usize) -> Vec<(SeqKey, usize)> {
        let mut shares = Vec::with_capacity(self.running.len());
        let mut prefills = Vec::new();
        for &key in &self.running {
            let seq = self.seq(key);
            let pending = seq.pending().len();
            if seq.suspect.is_some() || pending == 0 {
                continue;
            }
            if pending > 1 {
                prefills.push((self.queue.served(seq.key), shares.len()));
            }
            shares.push((key, 1));
            budget = budget.saturating_sub(1);
        }
        prefills.sort_unstable();
        let has_seat = self.running.len() < self.limits.seats();
        let waiting = self.queue.first_resident().filter(|_| has_seat).map(|(served, _)| served);
        let mut contested = budget.div_ceil(2);
        for (served, at) in prefills {
            let wanted = self.seq(shares[at].0).pending().len() - 1;
            let mut more = wanted.min(budget);
            if waiting.is_some_and(|waiting| waiting < served) {
                more = more.min(contested);
                contested -= more;
            }
            shares[at].1 += more;
            budget -= more;
        }
        shares
    }

    /// Makes the memory of the next `len` positions of a running sequence writable and puts them into the step.
    pub(super) fn plan_chunk(&mut self, key: SeqKey, len: usize, may_preempt: bool, draft: &mut Draft) -> bool {
        let start = self.seq(key).pending().start;
        debug_assert!(len > 0 && len <= draft.budget, "a chunk has positions, within the budget");
        if !self.secure(key, start, start + len, may_preempt, draft) {
            return false;
        }
        draft.budget -= len;
        draft.members.push(Member { key, start, len, samples: false });
        self.charge(key, start + len);
        true
    }

    /// Positions up to `end` are served. What a preemption or a replay computes again costs nothing.
    fn charge(&mut self, key: SeqKey, end: usize) {
        let seq = self.seq_mut(key);
        let fair = seq.key;
        let new = end.saturating_sub(seq.charged);
        seq.charged = seq.charged.max(end);
        if new > 0 {
            self.queue.charge(fair, new as u64);
        }
    }

    /// What nobody else took goes to prefills that could use it, if their memory is there.
    fn use_up_budget(&mut self, draft: &mut Draft) {
        for at in 0..draft.members.len() {
            if draft.budget == 0 {
                break;
            }
            let Member { key, start, len, .. } = draft.members[at];
            let end = start + len;
            let more = (self.seq(key).pending().end - end).min(draft.budget);
            if more > 0 && self.secure(key, end, end + more, false, draft) {
                draft.members[at].len += more;
                draft.budget -= more;
                self.charge(key, end + more);
            }
        }
    }

    /// Draft -> Step; from here on it is in flight.
    fn seal(&mut self, draft: Draft) -> Step {
        let mut step = Step { id: self.next_step, ..Step::default() };
        self.next_step += 1;
        step.finishes = std::mem::take(&mut self.finishes);
        let Draft { mut members, copies, uploads, solo, copy_sources, .. } = draft;
        step.copies = copies;
        step.uploads = uploads.into_iter().map(wire_upload).collect();
        let mut chunks = Vec::with_capacity(members.len());
        for member in &mut members {
            let logprobs = self.owes_logprobs(member);
            let blocks = self.limits.blocks_for(member.start + member.len);
            let seq = self.seq_mut(member.key);
            let is_last = member.start + member.len == seq.end_in_sight();
            member.samples = is_last && seq.job.request.max_tokens > 0;
            let mask = if member.samples { seq.mask_bytes() } else { None };
            let pool = is_last && seq.job.request.pooling.is_some();
            seq.depart(member.len, member.samples);
            let start = seq.holding().is_some_and(|holding| !holding.announced).then(|| seq_start(seq));
            let holding = seq.holding_mut().expect("a member of a step runs");
            holding.announced = true;
            let sent = holding.sent_blocks.min(blocks);
            holding.sent_blocks = blocks;
            let chunk = Chunk {
                seq: holding.seq.0,
                start: member.start as u32,
                len: member.len as u32,
                blocks: holding.blocks[sent..blocks].iter().map(|block| block.0).collect(),
                blocks_from: sent as u32,
                adapters: std::mem::take(&mut holding.adapters), // lent, to be sorted by
                sample: member.samples,
                prompt_logprobs: logprobs,
                mask,
                pool,
            };
            chunks.push((member.key, chunk));
            step.starts.extend(start);
        }
        sort_by_adapters(&mut chunks);
        step.chunks.reserve(chunks.len());
        for (key, mut chunk) in chunks {
            let adapters = std::mem::take(&mut chunk.adapters);
            if chunk.blocks_from == 0 {
                chunk.adapters.clone_from(&adapters); // else the shard knows them from the chunk before
            }
            self.seq_mut(key).holding_mut().expect("a member of a step runs").adapters = adapters;
            step.chunks.push(chunk);
        }
        let loading = self.loading(solo);
        self.in_flight.push_back(InFlight { id: step.id, members, solo, loading, copy_sources });
        step
    }

    /// Waiting sequences whose adapters are being uploaded during this step.
    fn loading(&self, solo: Option<SeqKey>) -> Vec<SeqKey> {
        let loads = |key: &SeqKey| self.adapters.residency(&self.seq(*key).job.contents) != Residency::Resident;
        self.claims.iter().copied().filter(|key| solo.is_none_or(|solo| solo == *key) && loads(key)).collect()
    }

    fn owes_logprobs(&self, member: &Member) -> bool {
        let seq = self.seq(member.key);
        member.start < seq.prompt_tokens()
            && self.requests.get(&seq.job.id).is_some_and(super::requests::Request::owes_logprobs)
    }
}

/// Each set of adapters becomes one contiguous segment; rows without an adapter come first.
fn sort_by_adapters(chunks: &mut [(SeqKey, Chunk)]) {
    let parts = |used: &AdapterRef| (used.slot, used.generation, used.scale.to_bits());
    chunks.sort_by(|(_, a), (_, b)| a.adapters.iter().map(parts).cmp(b.adapters.iter().map(parts)));
}

fn wire_upload(upload: Upload) -> AdapterUpload {
    AdapterUpload {
        content_id: upload.content.0.to_vec(),
        slot: upload.slot.slot,
        generation: upload.slot.generation,
        pages: upload.pages,
    }
}

fn seq_start(seq: &super::sequence::Sequence) -> SeqStart {
    let mut sampling = seq.job.request.sampling.clone();
    sampling.seed = sampling.seed.wrapping_add(u64::from(seq.index));
    SeqStart {
        seq: seq.holding().map_or(0, |holding| holding.seq.0),
        tokens: seq.tokens(),
        prompt_tokens: seq.prompt_tokens() as u32,
        sampling: Some(sampling),
        pooling: match seq.job.request.pooling {
            None => loramux_proto::Pooling::None,
            Some(Pooling::Mean) => loramux_proto::Pooling::Mean,
            Some(Pooling::Last) => loramux_proto::Pooling::Last,
        }
        .into(),
    }
}
