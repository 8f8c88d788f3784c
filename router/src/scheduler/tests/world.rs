//! One simulated server: random clients, a scheduler, a marker shard that dies, adapters that come and go.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use loramux_proto::{Sampling, Tables};

use super::super::{NewRequest, RequestId, Scheduler, SchedulerEvent, SchedulerLimits};
use super::client::Client;
use super::flight::{self, Sent};
use super::grammar::{Formula, Grammars};
use super::keeping::Keeping;
use super::marker::{Rng, VOCAB};
use super::oracle::Oracle;
use super::shard::FakeShard;
use super::weather::{Totals, Weather};
use crate::engine::{AdapterUse, ContentId, Failure, GenerateEvent, GenerateRequest, Grammar, Pooling};

/// Steps in which everything must have ended once arrivals and faults stopped.
const DRAIN_STEPS_MAX: u64 = 20_000;

/// All is recounted after each commit; after each plan, where the step itself is checked, only so often.
const AUDIT_PLAN_EVERY: u64 = 8;

pub(super) struct World {
    pub(super) rng: Rng,
    pub(super) weather: Weather,
    pub(super) scheduler: Scheduler,
    pub(super) limits: SchedulerLimits,
    pub(super) shard: FakeShard,
    /// What it knows of block tables.
    pub(super) tables: Tables,
    /// Steps in flight, oldest first.
    pub(super) sent: VecDeque<Sent>,
    /// Open requests: an event for any other is a fault.
    pub(super) clients: BTreeMap<RequestId, Client>,
    next_request: u64,
    pub(super) contents: Vec<(ContentId, u32)>,
    prompts: Vec<Vec<u32>>,
    /// Contents on their way to the host slab, and in how many steps.
    pub(super) preparing: Vec<(ContentId, u32)>,
    pub(super) keeping: Keeping,
    pub(super) grammars: Grammars,
    pub(super) now_ms: u64,
    pub(super) totals: Totals,
    pub(super) calm: bool,
    drained_for: u64,
    /// Tokens of each sequence that came in calm weather.
    delivered: BTreeMap<(RequestId, u32), Vec<u32>>,
}

impl World {
    pub(super) fn random(seed: u64, pipeline_depth: u32) -> Self {
        let mut rng = Rng::new(seed);
        let pages_total = rng.range(8, 64);
        let limits = SchedulerLimits {
            pages_total,
            blocks_per_page: rng.range(1, 4),
            block_tokens: *rng.pick(&[1, 2, 4, 4, 8]),
            slots_max: rng.range(1, 4),
            step_tokens: *rng.pick(&[1, 3, 8, 16, 32, 64]),
            prefill_tokens_beside: *rng.pick(&[0, 1, 5, u32::MAX]),
            running_max: rng.range(1, 8),
            queued_requests_max: rng.range(1, 24) as usize,
            queued_tokens_max: u64::from(rng.range(50, 2000)),
            context_tokens: 64,
            pipeline_depth,
            prefix_caching: rng.chance(700),
            prefix_key: [seed as u8; 32],
        };
        let contents = (0..rng.range(1, 6))
            .map(|i| (content(seed, i), if rng.chance(100) { 0 } else { rng.range(1, (pages_total / 3).max(1)) }))
            .collect();
        let prompts = (0..3).map(|_| (0..48).map(|_| rng.range(0, VOCAB as u32 - 1)).collect()).collect();
        let weather = Weather::random(&mut rng);
        let shard = flight::new_shard(&limits);
        let mut world = Self {
            rng,
            weather,
            scheduler: Scheduler::new(limits.clone()),
            limits,
            shard,
            tables: Tables::default(),
            sent: VecDeque::new(),
            clients: BTreeMap::new(),
            next_request: 1,
            contents,
            prompts,
            preparing: Vec::new(),
            keeping: Keeping::default(),
            grammars: Grammars::default(),
            now_ms: 0,
            totals: Totals::default(),
            calm: false,
            drained_for: 0,
            delivered: BTreeMap::new(),
        };
        for (content, _) in world.contents.clone() {
            world.prepare(content);
        }
        world
    }

    /// Submits `requests` requests at once, lets them end without weather, and returns the tokens of each sequence.
    pub(super) fn run_calmly(&mut self, requests: usize) -> BTreeMap<(RequestId, u32), Vec<u32>> {
        while !self.preparing.is_empty() {
            self.bring_contents();
        }
        (self.weather.deadline, self.weather.poison, self.calm) = (0, 0, true);
        for _ in 0..requests {
            self.submit();
        }
        self.run(0);
        std::mem::take(&mut self.delivered)
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
        self.check_pins_arrive();
        self.check_nothing_is_left();
        let stats = self.scheduler.stats();
        self.totals.preemptions = stats.preemptions;
        self.totals.uploads = stats.adapter_uploads;
        self.totals.evictions = stats.adapter_evictions;
        self.totals.prefix_hit_tokens = stats.prefix_hit_tokens;
        self.totals.fetched = stats.adapter_prefetches;
        self.totals.wasted_positions = stats.wasted_positions;
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

    /// One turn of the engine: messages, a plan, messages while steps run, a result or the shard's death.
    pub(super) fn tick(&mut self) {
        self.totals.steps += 1;
        if !self.calm {
            self.now_ms += u64::from(self.rng.range(0, 3));
            self.messages();
        }
        self.bring_contents();
        self.settle_drains();
        self.move_grammars();
        let mut step = self.scheduler.plan(self.now_ms);
        if let Some(step) = &mut step {
            self.tables.complete(step).expect("the shard knows what was sent");
        }
        let events = self.scheduler.take_events();
        self.check_events(events);
        if self.totals.steps.is_multiple_of(AUDIT_PLAN_EVERY) {
            self.audit_all();
        }
        match step {
            None if self.sent.is_empty() => return self.check_may_rest(),
            None => {}
            Some(step) => {
                self.scheduler.audit_step(&step);
                self.scheduler.audit_flight(&step);
                self.totals.switches += step.chunks.iter().filter(|c| !c.adapters.is_empty()).count() as u64;
                self.totals.ahead += u64::from(!self.sent.is_empty());
                self.sent.push_back(Sent::new(step));
                if self.sent.len() == self.limits.pipeline_depth as usize {
                    assert!(self.scheduler.plan(self.now_ms).is_none(), "enough steps are in flight");
                } else if self.rng.chance(700) {
                    return; // the next one is planned before a result is read
                }
            }
        }
        self.answer();
    }

    /// Nothing was planned: then nothing can run, or only contents are missing that are on their way.
    fn check_may_rest(&self) {
        if self.scheduler.is_idle() || !self.scheduler.awaited_masks().is_empty() {
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

    pub(super) fn messages(&mut self) {
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
        self.keeping_messages();
        if self.rng.chance(self.weather.forget) {
            let (content, _) = *self.rng.pick(&self.contents);
            let used = self.clients.values().any(|c| c.request.adapters.iter().any(|a| a.content == content));
            match self.scheduler.adapter_forget(content) {
                Ok(()) => {
                    assert!(!used, "a content in use was forgotten");
                    self.keeping.forgotten(&content);
                    self.drop_content(content);
                    if !self.preparing.iter().any(|(c, _)| *c == content) {
                        self.prepare(content);
                    }
                }
                // What ended may be in flight still.
                Err(_) => {
                    let t = &self.totals;
                    assert!(used || t.cancels + t.deadlines + t.ahead + t.ends_now > 0);
                }
            }
        }
    }

    fn submit(&mut self) {
        let mut request = self.request();
        request.adapters.retain(|used| !self.keeping.draining.contains(&used.content));
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
                    needed > total
                        || self.limits.slots_max < (request.adapters.len() + self.keeping.pinned.len()) as u32
                        || context(request) > 64
                );
            }
            Failure::AdapterGone(..) => {
                let gone = |c: &ContentId| !self.shard.host.contains_key(c) || self.is_to_be_dropped(c);
                assert!(request.adapters.iter().any(|a| gone(&a.content)));
            }
            other => panic!("submit refused with {other:?}"),
        }
    }

    fn request(&mut self) -> GenerateRequest {
        let breaks = !self.calm;
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
        let pooling = rng.chance(100).then(|| *rng.pick(&[Pooling::Mean, Pooling::Last]));
        let max_tokens = if pooling.is_some() { 0 } else { max_tokens };
        GenerateRequest {
            prompt: Arc::from(prompt),
            n: if pooling.is_some() || rng.chance(700) { 1 } else { rng.range(2, 4) },
            max_tokens,
            sampling: Sampling {
                seed: rng.next() % 3,
                min_tokens: if rng.chance(200) { rng.range(1, 6) } else { 0 },
                end_tokens: if rng.chance(400) { vec![rng.range(0, 9), rng.range(10, 19)] } else { Vec::new() },
                logprobs: Some(0),
                prompt_logprobs: wants_logprobs.then_some(0),
                ..Sampling::default()
            },
            grammar: rng.chance(300).then(|| Arc::new(Formula { salt: rng.next(), breaks }) as Arc<dyn Grammar>),
            pooling,
            adapters,
            tenant: u64::from(rng.range(1, 3)),
            cache_salt: rng.chance(100).then(|| "salt".to_owned()),
            priority: rng.range(0, 2) as i32,
            deadline_ms: None,
        }
    }

    // ---- contents ----

    pub(super) fn prepare(&mut self, content: ContentId) {
        let delay = self.rng.range(0, self.weather.ready_delay_max);
        self.preparing.push((content, delay));
    }

    fn bring_contents(&mut self) {
        for (content, delay) in std::mem::take(&mut self.preparing) {
            if delay > 0 || self.is_to_be_dropped(&content) {
                self.preparing.push((content, delay.saturating_sub(1)));
            } else if !self.calm
                && self.scheduler.contents_needed().contains(&content)
                && !self.keeping.draining.contains(&content)
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

    pub(super) fn lose_content(&mut self, content: ContentId) {
        self.scheduler.adapter_gone(content, "its files changed".into());
        self.keeping.forgotten(&content);
        for SchedulerEvent { request, event } in self.scheduler.take_events() {
            let client = self.clients.remove(&request).expect("only an open request fails");
            assert!(matches!(event, GenerateEvent::Failed(Failure::AdapterGone(..))), "{event:?}");
            assert!(client.request.adapters.iter().any(|a| a.content == content));
        }
        assert!(!self.clients.values().any(|c| c.request.adapters.iter().any(|a| a.content == content)));
    }

    // ---- events ----

    pub(super) fn check_events(&mut self, events: Vec<SchedulerEvent>) {
        for SchedulerEvent { request, event } in events {
            let client =
                self.clients.get_mut(&request).unwrap_or_else(|| panic!("{event:?} for {request:?}, which ended"));
            let over = match event {
                GenerateEvent::Failed(failure) => {
                    client.check_failure(&failure, self.now_ms);
                    match failure {
                        Failure::DeadlineExceeded => self.totals.deadlines += 1,
                        Failure::Numerics(_) => self.totals.numerics += 1,
                        Failure::Grammar(_) => self.totals.grammar_failures += 1,
                        _ => self.totals.shard_faults += 1,
                    }
                    true
                }
                event => {
                    if let GenerateEvent::Token { index, token, .. } = event {
                        self.totals.tokens += 1;
                        if self.calm {
                            self.delivered.entry((request, index)).or_default().push(token);
                        }
                    }
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
