//! One simulated server: random clients, a scheduler, a marker shard that dies, adapters that come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use loramux_proto::{Sampling, SeqFault, Step, StepResult};

use super::super::{NewRequest, RequestId, Scheduler, SchedulerEvent, SchedulerLimits};
use super::client::Client;
use super::marker::{Rng, VOCAB, owner_mark};
use super::oracle::Oracle;
use super::shard::FakeShard;
use super::weather::{Totals, Weather};
use crate::engine::{AdapterUse, ContentId, Failure, GenerateEvent, GenerateRequest};

/// Steps in which everything must have ended once arrivals and faults stopped.
const DRAIN_STEPS_MAX: u64 = 20_000;

/// All is recounted after each commit; after each plan, where the step itself is checked, only so often.
const AUDIT_PLAN_EVERY: u64 = 8;

pub(super) struct World {
    rng: Rng,
    weather: Weather,
    pub(super) scheduler: Scheduler,
    limits: SchedulerLimits,
    shard: FakeShard,
    /// Open requests: an event for any other is a fault.
    clients: BTreeMap<RequestId, Client>,
    next_request: u64,
    contents: Vec<(ContentId, u32)>,
    prompts: Vec<Vec<u32>>,
    /// Contents on their way to the host slab, and in how many steps.
    preparing: Vec<(ContentId, u32)>,
    now_ms: u64,
    pub(super) totals: Totals,
    calm: bool,
    drained_for: u64,
}

impl World {
    pub(super) fn random(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let pages_total = rng.range(8, 64);
        let limits = SchedulerLimits {
            pages_total,
            blocks_per_page: rng.range(1, 4),
            block_tokens: *rng.pick(&[1, 2, 4, 4, 8]),
            slots_max: rng.range(1, 4),
            step_tokens: *rng.pick(&[1, 3, 8, 16, 32, 64]),
            running_max: rng.range(1, 8),
            queued_requests_max: rng.range(1, 24) as usize,
            queued_tokens_max: u64::from(rng.range(50, 2000)),
            context_tokens: 64,
            prefix_caching: rng.chance(700),
            prefix_key: [seed as u8; 32],
        };
        let contents = (0..rng.range(1, 6))
            .map(|i| (content(seed, i), if rng.chance(100) { 0 } else { rng.range(1, (pages_total / 3).max(1)) }))
            .collect();
        let prompts = (0..3).map(|_| (0..48).map(|_| rng.range(0, VOCAB as u32 - 1)).collect()).collect();
        let weather = Weather::random(&mut rng);
        let shard = new_shard(&limits);
        let mut world = Self {
            rng,
            weather,
            scheduler: Scheduler::new(limits.clone()),
            limits,
            shard,
            clients: BTreeMap::new(),
            next_request: 1,
            contents,
            prompts,
            preparing: Vec::new(),
            now_ms: 0,
            totals: Totals::default(),
            calm: false,
            drained_for: 0,
        };
        for (content, _) in world.contents.clone() {
            world.prepare(content);
        }
        world
    }

    /// Runs `steps` steps of weather, then lets everything end.
    pub(super) fn run(&mut self, steps: u64) {
        while self.totals.steps < steps {
            self.tick();
        }
        self.calm = true;
        while !self.scheduler.is_idle() {
            self.tick();
            self.drained_for += 1;
            assert!(self.drained_for < DRAIN_STEPS_MAX, "{} clients still wait", self.clients.len());
        }
        self.check_nothing_is_left();
        let stats = self.scheduler.stats();
        self.totals.preemptions = stats.preemptions;
        self.totals.uploads = stats.adapter_uploads;
        self.totals.evictions = stats.adapter_evictions;
        self.totals.prefix_hit_tokens = stats.prefix_hit_tokens;
    }

    fn check_nothing_is_left(&mut self) {
        assert!(self.clients.is_empty(), "requests ended without their last event: {:?}", self.clients.keys());
        let stats = self.scheduler.stats();
        assert_eq!((stats.running, stats.waiting, stats.waiting_tokens, stats.blocks_used), (0, 0, 0, 0));
        assert_eq!(self.scheduler.next_deadline_ms(), None);
        assert!(self.scheduler.contents_needed().is_empty());
        for (content, _) in self.contents.clone() {
            self.scheduler.adapter_forget(content).expect("nobody uses it");
        }
        let copying: BTreeSet<u32> = self.shard.copying_pages().collect();
        assert_eq!(self.scheduler.stats().pages_adapters as usize, copying.len(), "pages of adapters come back");
    }

    /// One turn of the engine: messages, a plan, messages while it runs, its result or the shard's death.
    fn tick(&mut self) {
        self.totals.steps += 1;
        if !self.calm {
            self.now_ms += u64::from(self.rng.range(0, 3));
            self.messages();
        }
        self.bring_contents();
        let step = self.scheduler.plan(self.now_ms);
        let events = self.scheduler.take_events();
        self.check_events(events);
        if self.totals.steps.is_multiple_of(AUDIT_PLAN_EVERY) {
            self.scheduler.audit();
        }
        let Some(step) = step else {
            self.check_may_rest();
            return;
        };
        self.scheduler.audit_step(&step);
        self.totals.switches += step.chunks.iter().filter(|c| !c.adapters.is_empty()).count() as u64;
        assert!(self.scheduler.plan(self.now_ms).is_none(), "one step in flight at a time");
        let result = self.execute(&step);
        if !self.calm {
            self.messages();
        }
        match result {
            Ok(result) => {
                let mut stale = result.clone();
                stale.id = stale.id.wrapping_sub(1);
                let events = self.scheduler.commit(self.now_ms, stale);
                self.check_events(events);
                let events = self.scheduler.commit(self.now_ms, result);
                self.check_events(events);
            }
            Err(weight) => self.lose_shard(weight),
        }
        self.scheduler.audit();
        self.poison_free_memory();
    }

    /// Nothing was planned: then nothing can run, or only contents are missing that are on their way.
    fn check_may_rest(&self) {
        if self.scheduler.is_idle() {
            return;
        }
        let missing = |c: &ContentId| !self.shard.host.contains_key(c);
        assert!(
            self.scheduler.contents_needed().iter().any(missing),
            "it rests while requests could run: {}",
            self.scheduler.describe()
        );
    }

    // ---- clients ----

    fn messages(&mut self) {
        if self.rng.chance(self.weather.submit) {
            self.submit();
        }
        let some = |rng: &mut Rng, clients: &BTreeMap<RequestId, Client>| {
            let at = rng.next() as usize % clients.len().max(1);
            clients.keys().nth(at).copied()
        };
        if self.rng.chance(self.weather.cancel)
            && let Some(id) = some(&mut self.rng, &self.clients)
        {
            self.scheduler.cancel(id);
            self.clients.remove(&id);
            self.totals.cancels += 1;
        }
        if self.rng.chance(self.weather.stop)
            && let Some(id) = some(&mut self.rng, &self.clients)
        {
            let client = self.clients.get_mut(&id).expect("it was picked from them");
            let index = self.rng.range(0, client.request.n - 1);
            self.scheduler.finish_sequence(id, index);
            client.ended[index as usize] = true;
            if client.ended.iter().all(|ended| *ended) {
                self.clients.remove(&id);
            }
            self.totals.cancels += 1;
        }
        if self.rng.chance(self.weather.forget) {
            let (content, _) = *self.rng.pick(&self.contents);
            let used = self.clients.values().any(|c| c.request.adapters.iter().any(|a| a.content == content));
            match self.scheduler.adapter_forget(content) {
                Ok(()) => {
                    assert!(!used, "a content in use was forgotten");
                    self.shard.host.remove(&content);
                    if !self.preparing.iter().any(|(c, _)| *c == content) {
                        self.prepare(content);
                    }
                }
                Err(_) => assert!(used || self.totals.cancels + self.totals.deadlines > 0),
            }
        }
    }

    fn submit(&mut self) {
        let request = self.request();
        let id = RequestId(self.next_request);
        self.next_request += 1;
        let late = self.rng.chance(self.weather.deadline);
        let deadline_at_ms = late.then(|| self.now_ms + u64::from(self.rng.range(1, 60)));
        let poison_at =
            self.rng.chance(self.weather.poison).then(|| self.rng.range(0, request.prompt.len() as u32 + 3));
        match self.scheduler.submit(self.now_ms, NewRequest { id, request: request.clone(), deadline_at_ms }) {
            Ok(()) => {
                self.totals.requests += 1;
                let pages = |content: &ContentId| pages_of(&self.contents, content);
                let oracles = (0..request.n).map(|index| Oracle::new(&request, index, pages)).collect();
                let client = Client::new(request, oracles, deadline_at_ms, poison_at);
                self.clients.insert(id, client);
            }
            Err(failure) => {
                self.totals.refused += 1;
                self.check_refusal(&request, &failure);
            }
        }
    }

    fn check_refusal(&self, request: &GenerateRequest, failure: &Failure) {
        match failure {
            Failure::QueueFull { waiting, limit } => {
                let queued = self.clients.values().filter(|client| !client.admitted).count();
                assert_eq!((*waiting, *limit), (queued, self.limits.queued_requests_max));
            }
            Failure::TooLarge { needed, total } => {
                assert!(
                    needed > total || self.limits.slots_max < request.adapters.len() as u32 || context(request) > 64
                );
            }
            Failure::AdapterGone(..) => {
                assert!(request.adapters.iter().any(|a| !self.shard.host.contains_key(&a.content)));
            }
            other => panic!("submit refused with {other:?}"),
        }
    }

    fn request(&mut self) -> GenerateRequest {
        let rng = &mut self.rng;
        let prompt_tokens = rng.range(1, 44) as usize;
        let mut prompt: Vec<u32> = rng.pick(&self.prompts)[..prompt_tokens].to_vec();
        if rng.chance(400) {
            let at = rng.next() as usize % prompt.len();
            prompt[at] = rng.range(0, VOCAB as u32 - 1);
        }
        let max_tokens = if rng.chance(100) { 0 } else { rng.range(1, 20) };
        let adapters = match rng.range(0, 9) {
            0..3 => 0,
            3..9 => 1,
            _ => 2,
        };
        let adapters = (0..adapters)
            .map(|_| AdapterUse { content: rng.pick(&self.contents).0, scale: *rng.pick(&[1.0, 1.0, 0.5]) })
            .collect();
        let wants_logprobs = rng.chance(150);
        GenerateRequest {
            prompt: Arc::from(prompt),
            n: if rng.chance(700) { 1 } else { rng.range(2, 4) },
            max_tokens,
            sampling: Sampling {
                seed: rng.next() % 3,
                min_tokens: if rng.chance(200) { rng.range(1, 6) } else { 0 },
                end_tokens: if rng.chance(400) { vec![rng.range(0, 9), rng.range(10, 19)] } else { Vec::new() },
                logprobs: Some(0),
                prompt_logprobs: wants_logprobs.then_some(0),
                ..Sampling::default()
            },
            adapters,
            tenant: u64::from(rng.range(1, 3)),
            cache_salt: rng.chance(100).then(|| "salt".to_owned()),
            priority: rng.range(0, 2) as i32,
            deadline_ms: None,
        }
    }

    // ---- the shard ----

    /// Result, or the weight of the shard's death.
    fn execute(&mut self, step: &Step) -> Result<StepResult, u32> {
        let owners: BTreeMap<u64, RequestId> = self.scheduler.members_by_run().collect();
        for chunk in &step.chunks {
            let Some(client) = self.clients.get_mut(&owners[&chunk.seq]) else { continue };
            let covers = |at: u32| chunk.start + chunk.len > at && !self.calm;
            if client.poison_at.is_some_and(covers) {
                client.deaths_caused += 1;
                assert!(client.deaths_caused <= 3, "one request killed the shard more than three times");
                return Err(2);
            }
        }
        if !self.calm && self.rng.chance(self.weather.crash) {
            return Err(2);
        }
        if !self.calm && self.rng.chance(self.weather.kill) {
            return Err(1);
        }
        let scheduler = &self.scheduler;
        let owner_of = |run: u64| {
            let job = scheduler.job_of_run(run);
            owner_mark(job.request.tenant, job.request.cache_salt.as_deref())
        };
        let (rng, delay_max) = (&mut self.rng, self.weather.upload_delay_max);
        let mut result = self.shard.run(step, owner_of, || rng.range(0, delay_max));
        if !self.calm && self.rng.chance(self.weather.numerics) && !step.chunks.is_empty() {
            let seq = self.rng.pick(&step.chunks).seq;
            result.samples.retain(|sample| sample.seq != seq);
            result.faults.push(SeqFault { seq, reason: "NaN".into() });
            if let Some(client) = self.clients.get_mut(&owners[&seq]) {
                client.numerics_due = true;
            }
        }
        Ok(result)
    }

    fn lose_shard(&mut self, weight: u32) {
        self.totals.deaths += 1;
        if let Some(id) = self.scheduler.solo_request()
            && let Some(client) = self.clients.get_mut(&id)
        {
            client.blame += weight;
        }
        self.scheduler.shard_lost(weight);
        self.scheduler.audit();
        let events = self.scheduler.take_events();
        self.check_events(events);
        self.shard = new_shard(&self.limits);
        self.preparing.clear();
        for (content, _) in self.contents.clone() {
            self.prepare(content);
        }
    }

    fn prepare(&mut self, content: ContentId) {
        let delay = self.rng.range(0, self.weather.ready_delay_max);
        self.preparing.push((content, delay));
    }

    fn bring_contents(&mut self) {
        for (content, delay) in std::mem::take(&mut self.preparing) {
            if delay > 0 {
                self.preparing.push((content, delay - 1));
            } else if !self.calm
                && self.scheduler.contents_needed().contains(&content)
                && self.rng.chance(self.weather.gone)
            {
                self.lose_content(content);
                self.prepare(content);
            } else {
                let pages = pages_of(&self.contents, &content);
                self.shard.host.insert(content, pages);
                self.scheduler.adapter_ready(content, pages);
            }
        }
    }

    fn lose_content(&mut self, content: ContentId) {
        self.scheduler.adapter_gone(content, "its files changed".into());
        for SchedulerEvent { request, event } in self.scheduler.take_events() {
            let client = self.clients.remove(&request).expect("only an open request fails");
            assert!(matches!(event, GenerateEvent::Failed(Failure::AdapterGone(..))), "{event:?}");
            assert!(client.request.adapters.iter().any(|a| a.content == content));
        }
        assert!(!self.clients.values().any(|c| c.request.adapters.iter().any(|a| a.content == content)));
    }

    /// Nobody may read what is free: it is overwritten, so that whoever does gives a wrong token.
    fn poison_free_memory(&mut self) {
        for block in self.scheduler.unowned_blocks() {
            self.shard.poison_block(block as usize);
        }
        for page in self.scheduler.unowned_pages() {
            self.shard.poison_page(page as usize);
        }
    }

    // ---- events ----

    fn check_events(&mut self, events: Vec<SchedulerEvent>) {
        for SchedulerEvent { request, event } in events {
            let client =
                self.clients.get_mut(&request).unwrap_or_else(|| panic!("{event:?} for {request:?}, which ended"));
            let over = match event {
                GenerateEvent::Failed(failure) => {
                    client.check_failure(&failure, self.now_ms);
                    match failure {
                        Failure::DeadlineExceeded => self.totals.deadlines += 1,
                        Failure::Numerics(_) => self.totals.numerics += 1,
                        _ => self.totals.shard_faults += 1,
                    }
                    true
                }
                event => {
                    self.totals.tokens += u64::from(matches!(event, GenerateEvent::Token { .. }));
                    self.totals.forks += u64::from(matches!(event, GenerateEvent::Finished { index: 1.., .. }));
                    client.check_event(event)
                }
            };
            if over {
                self.clients.remove(&request);
            }
        }
    }
}

fn new_shard(limits: &SchedulerLimits) -> FakeShard {
    FakeShard::new(limits.pages_total, limits.blocks_per_page, limits.block_tokens, limits.slots_max)
}

fn content(seed: u64, i: u32) -> ContentId {
    let mut id = [0; 32];
    id[..8].copy_from_slice(&super::marker::mix(seed, u64::from(i)).to_le_bytes());
    ContentId(id)
}

fn pages_of(contents: &[(ContentId, u32)], content: &ContentId) -> u32 {
    contents.iter().find(|(c, _)| c == content).map_or(0, |(_, pages)| *pages)
}

fn context(request: &GenerateRequest) -> usize {
    request.prompt.len() + request.max_tokens as usize
}
