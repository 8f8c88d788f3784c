//! Requests come, are cancelled, run late, and end; contents come and go.

use std::sync::Arc;

use super::ids::{RequestId, SeqKey};
use super::prefix;
use super::sequence::{Job, Sequence, Wait};
use super::{InUse, NewRequest, Scheduler, SchedulerEvent};
use crate::engine::{ContentId, Failure, FinishReason, GenerateEvent};

/// One request and its unfinished sequences.
pub(super) struct Request {
    pub(super) job: Arc<Job>,
    /// By sibling; None = ended.
    pub(super) sequences: Vec<Option<SeqKey>>,
    pub(super) admitted: bool,
    /// What it adds to the bound of the queue until it is admitted.
    cost_tokens: u64,
    deadline_at_ms: Option<u64>,
    /// The first prompt position whose logprob was not delivered yet. Survives replays, so none is delivered twice.
    pub(super) logprobs_next: usize,
    /// Points of blame of its sequences, those that ended included. Progress of a suspect takes its own part back.
    pub(super) strikes: u32,
}

impl Request {
    /// Prompt logprobs are still owed.
    pub(super) fn owes_logprobs(&self) -> bool {
        let request = &self.job.request;
        request.sampling.prompt_logprobs.is_some() && self.logprobs_next < request.prompt.len()
    }
}

impl Scheduler {
    /// Takes one request in. It starts in a later [`Self::plan`].
    ///
    /// # Errors
    /// [`Failure::TooLarge`] if it cannot fit the arena even alone, [`Failure::AdapterGone`] if a content of it was not
    /// reported ready, [`Failure::QueueFull`].
    pub fn submit(&mut self, now_ms: u64, new: NewRequest) -> Result<(), Failure> {
        let NewRequest { id, request, deadline_at_ms } = new;
        assert!(!self.requests.contains_key(&id), "request ids are never reused");
        let mut contents: Vec<ContentId> = Vec::new();
        for used in &request.adapters {
            if self.adapters.get(&used.content).is_none() {
                return Err(Failure::AdapterGone(used.content.short(), "it is not loaded".into()));
            }
            if !contents.contains(&used.content) {
                contents.push(used.content);
            }
        }
        let prefix_root = prefix::root(&self.limits.prefix_key, &request);
        let job = Job { id, request, contents, arrival: self.next_arrival, prefix_root };
        self.check_fits(&job)?;
        if deadline_at_ms.is_some_and(|at| at <= now_ms) {
            return Err(Failure::DeadlineExceeded);
        }
        let siblings = job.request.n.max(1);
        let each = job.request.prompt.len() as u64 + u64::from(job.request.max_tokens);
        let cost_tokens = each * u64::from(siblings);
        let over = self.queued_tokens.saturating_add(cost_tokens) > self.limits.queued_tokens_max;
        if self.queued_requests >= self.limits.queued_requests_max || (over && self.queued_requests > 0) {
            let limit = self.limits.queued_requests_max;
            return Err(Failure::QueueFull { waiting: self.queued_requests, limit });
        }
        self.next_arrival += 1;
        self.queued_requests += 1;
        self.queued_tokens += cost_tokens;
        if let Some(at) = deadline_at_ms {
            self.deadlines.insert((at, id));
        }
        let job = Arc::new(job);
        let sequences = (0..siblings).map(|index| Some(self.add_sequence(&job, index))).collect();
        let request =
            Request { job, sequences, admitted: false, cost_tokens, deadline_at_ms, logprobs_next: 1, strikes: 0 };
        let leader = request.sequences.first().copied().flatten();
        self.requests.insert(id, request);
        // It will start at once: its prompt need not be computed in two parts.
        if let Some(leader) = leader.filter(|_| self.running.len() + self.queued_requests <= self.limits.seats()) {
            self.ask_first_mask(leader);
        }
        Ok(())
    }

    pub(super) fn check_fits(&self, job: &Job) -> Result<(), Failure> {
        let limits = &self.limits;
        let prompt = job.request.prompt.len();
        // What is pinned takes its pages from everybody.
        let own = || job.contents.iter().filter(|c| !self.adapters.is_kept(c)).filter_map(|c| self.adapters.get(c));
        let pages = own().map(|c| u64::from(c.pages_needed)).sum::<u64>() + u64::from(self.adapters.kept_pages());
        let slots = own().count() + self.adapters.kept().len();
        let blocks = limits.blocks_for(job.positions_max()) as u64;
        let needed = blocks + pages * u64::from(limits.blocks_per_page);
        let too_long = prompt + job.request.max_tokens as usize > limits.context_tokens as usize;
        if prompt == 0 || too_long || needed > limits.blocks_total() || slots > limits.slots_max as usize {
            let total = usize::try_from(limits.blocks_total()).unwrap_or(usize::MAX);
            return Err(Failure::TooLarge { needed: usize::try_from(needed).unwrap_or(usize::MAX), total });
        }
        Ok(())
    }

    fn add_sequence(&mut self, job: &Arc<Job>, index: u32) -> SeqKey {
        let residency = self.adapters.residency(&job.contents);
        let (running, sequences) = (&self.running, &self.sequences);
        let fair = self.queue.join(job.request.tenant, &job.request.adapters, residency, |queue| {
            let running = running.iter().filter_map(|key| sequences[key.0 as usize].as_ref());
            running.map(|seq| queue.served(seq.key)).min()
        });
        for content in &job.contents {
            self.adapters.add_user(content);
        }
        let key = match self.free_sequences.pop() {
            Some(at) => SeqKey(at),
            None => {
                self.sequences.push(None);
                SeqKey(self.sequences.len() as u32 - 1)
            }
        };
        let wait = if index == 0 { Wait::Turn } else { Wait::Leader };
        let seq = Sequence::new(Arc::clone(job), index, fair, wait);
        if wait == Wait::Turn {
            self.queue.push(fair, seq.turn(key));
        }
        self.sequences[key.0 as usize] = Some(seq);
        key
    }

    /// The client left. No event follows. Unknown ids are ignored: the request may have ended meanwhile.
    pub fn cancel(&mut self, id: RequestId) {
        self.drop_request(id);
    }

    /// One sequence ends without an event: its stop string was found.
    pub fn finish_sequence(&mut self, id: RequestId, index: u32) {
        self.end_index(id, index);
    }

    /// Fails everything: the drain deadline passed.
    pub fn fail_all(&mut self, failure: Failure) {
        for id in self.requests.keys().copied().collect::<Vec<_>>() {
            self.fail_request(id, failure.clone());
        }
    }

    /// Fails what is late. [`Self::plan`] does it too; between shards, when nothing is planned, the caller does.
    pub fn expire(&mut self, now_ms: u64) {
        while let Some(&(at, id)) = self.deadlines.first() {
            if at > now_ms {
                break;
            }
            self.deadlines.remove(&(at, id));
            self.fail_request(id, Failure::DeadlineExceeded);
        }
    }

    /// When [`Self::expire`] has something to do next.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Nothing waits, nothing runs, nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.in_flight.is_empty()
    }

    pub(super) fn emit(&mut self, request: RequestId, event: GenerateEvent) {
        self.events.push(SchedulerEvent { request, event });
    }

    pub(super) fn fail_request(&mut self, id: RequestId, failure: Failure) {
        if self.drop_request(id) {
            self.emit(id, GenerateEvent::Failed(failure));
        }
    }

    fn drop_request(&mut self, id: RequestId) -> bool {
        let Some(request) = self.forget_request(id) else { return false };
        for key in request.sequences.into_iter().flatten() {
            self.end_sequence(key);
        }
        true
    }

    /// Takes the request out of the books; its sequences are the caller's to end.
    fn forget_request(&mut self, id: RequestId) -> Option<Request> {
        let mut request = self.requests.remove(&id)?;
        if let Some(at) = request.deadline_at_ms {
            self.deadlines.remove(&(at, id));
        }
        if !request.admitted {
            self.leave_queue(&mut request);
        }
        Some(request)
    }

    fn leave_queue(&mut self, request: &mut Request) {
        request.admitted = true;
        self.queued_requests -= 1;
        self.queued_tokens -= request.cost_tokens;
    }

    /// Says once that the request holds memory and its adapters are resident; a replay says nothing again.
    pub(super) fn note_admitted(&mut self, id: RequestId, cached_tokens: usize) {
        let Some(mut request) = self.requests.remove(&id) else { return };
        if !request.admitted {
            self.leave_queue(&mut request);
            self.emit(id, GenerateEvent::Admitted { cached_tokens: cached_tokens as u32 });
        }
        self.requests.insert(id, request);
    }

    /// The sequence got its last token.
    pub(super) fn finish_index(&mut self, id: RequestId, index: u32, reason: FinishReason) {
        self.emit(id, GenerateEvent::Finished { index, reason });
        self.end_index(id, index);
    }

    fn end_index(&mut self, id: RequestId, index: u32) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Some(key) = request.sequences.get_mut(index as usize).and_then(Option::take) else { return };
        let siblings: Vec<SeqKey> = request.sequences.iter().flatten().copied().collect();
        let led = !self.seq(key).waits_for_leader();
        let suspect = self.seq(key).suspect;
        self.end_sequence(key);
        if siblings.is_empty() {
            self.forget_request(id);
        } else if led && let Some(next) = siblings.into_iter().find(|s| self.seq(*s).waits_for_leader()) {
            // Siblings wait only until their leader's prompt is computed; this leader never got there.
            match suspect {
                None => self.take_turn(next),
                Some(suspect) => self.inherit_suspicion(next, suspect.until),
            }
        }
    }

    /// A sibling stops waiting for its leader and queues on its own.
    pub(super) fn take_turn(&mut self, key: SeqKey) {
        let seq = self.seq_mut(key);
        seq.may_take_turn();
        let (fair, turn) = (seq.key, seq.turn(key));
        self.queue.push(fair, turn);
    }

    /// Ends a sequence; if it is in flight, its memory comes back with the result of the last step that names it.
    fn end_sequence(&mut self, key: SeqKey) {
        if self.seq(key).is_in_flight() {
            self.seq_mut(key).leaving = true;
        } else {
            self.remove_sequence(key);
        }
    }

    pub(super) fn remove_sequence(&mut self, key: SeqKey) {
        let mut seq = self.sequences[key.0 as usize].take().expect("a key in use names a sequence");
        if seq.is_running() {
            self.running.retain(|other| *other != key);
        } else if seq.suspect.is_none() && !seq.waits_for_leader() {
            self.queue.remove(seq.key, &seq.turn(key));
        }
        if seq.suspect.is_some() {
            self.suspects.retain(|other| *other != key);
        }
        for flight in &mut self.in_flight {
            // Its place may be reused before the result comes: nobody else takes the blame for it.
            flight.loading.retain(|other| *other != key);
            flight.solo.take_if(|solo| *solo == key);
        }
        self.unclaim(key, &seq.job.contents);
        if self.starving.is_some_and(|starving| starving.key == key) {
            self.starving = None;
        }
        if let Some(run) = seq.finish(&mut self.pool, &mut self.adapters) {
            self.finishes.push(run.0);
        }
        for content in &seq.job.contents {
            self.adapters.remove_user(content, &mut self.pool);
        }
        self.queue.leave(seq.key);
        self.free_sequences.push(key.0);
    }

    /// The content is in the shard's host slab and can be uploaded; it takes `pages_needed` pages of the arena.
    pub fn adapter_ready(&mut self, content: ContentId, pages_needed: u32) {
        let before = self.adapters.get(&content).map_or(pages_needed, |known| known.pages_needed);
        self.adapters.ready(content, pages_needed);
        self.content_moved(&content);
        if pages_needed > before {
            let kept = self.adapters.is_kept(&content);
            if kept {
                self.drop_claims();
            }
            let using = self.requests.values().filter(|r| kept || r.job.contents.contains(&content));
            let failures: Vec<_> =
                using.filter_map(|r| self.check_fits(&r.job).err().map(|failure| (r.job.id, failure))).collect();
            for (id, failure) in failures {
                self.fail_request(id, failure);
            }
        }
    }

    /// The host slab drops the content; its copy on the device goes too.
    ///
    /// # Errors
    /// [`InUse`] if an unfinished sequence uses it: nothing changes.
    pub fn adapter_forget(&mut self, content: ContentId) -> Result<(), InUse> {
        if self.adapters.get(&content).is_some_and(|known| known.users > 0) {
            return Err(InUse);
        }
        self.adapters.forget(&content, &mut self.pool);
        Ok(())
    }

    /// The content cannot be read again: requests that use it fail, alone.
    pub fn adapter_gone(&mut self, content: ContentId, reason: String) {
        let using = self.requests.values().filter(|r| r.job.contents.contains(&content)).map(|r| r.job.id);
        for id in using.collect::<Vec<_>>() {
            self.fail_request(id, Failure::AdapterGone(content.short(), reason.clone()));
        }
        self.adapter_unpin(content);
        // Sequences in flight leave with their step's result; the last one takes the content along.
        self.adapters.left_host(&content);
        self.content_moved(&content);
        let _ = self.adapter_forget(content);
    }

    /// Contents that unfinished sequences use.
    pub fn contents_needed(&self) -> Vec<ContentId> {
        self.adapters.used().map(|(id, _)| *id).collect()
    }

    pub(super) fn content_moved(&mut self, content: &ContentId) {
        let adapters = &self.adapters;
        self.queue.content_moved(content, |pair| adapters.residency(pair.iter().map(|(content, _)| content)));
    }
}
