//! Steps on their way: the shard executes them in order, at some time between sending and answering, and may die on each.

use std::collections::BTreeMap;

use loramux_proto::{SeqFault, Step, StepResult, Tables};

use super::super::{RequestId, SchedulerLimits};
use super::marker::owner_mark;
use super::shard::FakeShard;
use super::world::World;
use crate::engine::ContentId;

/// A step in flight.
pub(super) struct Sent {
    pub(super) step: Step,
    /// Set once it was executed; the host does not know it yet.
    pub(super) result: Option<StepResult>,
    /// Contents that the shard was told to drop after this step.
    pub(super) drops: Vec<ContentId>,
}

impl Sent {
    pub(super) fn new(step: Step) -> Self {
        Self { step, result: None, drops: Vec::new() }
    }
}

impl World {
    /// The oldest step's result comes, or the shard dies before.
    pub(super) fn answer(&mut self) {
        // The shard may be further than the host has heard.
        let executed = if self.sent.len() > 1 && self.rng.chance(500) { self.sent.len() } else { 1 };
        let died = (0..executed).find_map(|at| Some((at, self.execute(at).err()?)));
        if !self.calm {
            self.messages();
            self.move_grammars();
        }
        match died {
            None => self.deliver_result(),
            Some((at, weight)) => {
                // What was executed before the death may have been answered in time.
                if at > 0 && self.rng.chance(500) {
                    self.deliver_result();
                }
                self.lose_shard(weight);
            }
        }
        self.audit_all();
        self.poison_free_memory();
    }

    pub(super) fn audit_all(&mut self) {
        self.scheduler.audit();
        self.audit_keeping();
        for sent in &self.sent {
            self.scheduler.audit_flight(&sent.step);
        }
    }

    fn deliver_result(&mut self) {
        let result = self.sent.pop_front().and_then(|sent| sent.result).expect("only what was executed is answered");
        for wrong in [result.id.wrapping_sub(1), result.id + 1] {
            let stale = StepResult { id: wrong, ..result.clone() };
            let events = self.scheduler.commit(self.now_ms, stale);
            self.check_events(events);
        }
        let events = self.scheduler.commit(self.now_ms, result);
        self.check_events(events);
    }

    /// Executes a step that was not yet, or says with which weight the shard died.
    fn execute(&mut self, at: usize) -> Result<(), u32> {
        if self.sent[at].result.is_some() {
            return Ok(());
        }
        let step = &self.sent[at].step;
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
        let sent = &mut self.sent[at];
        sent.result = Some(result);
        for content in sent.drops.drain(..) {
            self.shard.host.remove(&content);
        }
        Ok(())
    }

    /// The shard takes messages in order: what it has not executed yet still finds the content.
    pub(super) fn drop_content(&mut self, content: ContentId) {
        match self.sent.iter_mut().rfind(|sent| sent.result.is_none()) {
            Some(sent) => sent.drops.push(content),
            None => drop(self.shard.host.remove(&content)),
        }
    }

    /// It will be told, but has not got there.
    pub(super) fn is_to_be_dropped(&self, content: &ContentId) -> bool {
        self.sent.iter().any(|sent| sent.drops.contains(content))
    }

    fn lose_shard(&mut self, weight: u32) {
        self.totals.deaths += 1;
        if let Some(id) = self.scheduler.solo_request()
            && let Some(client) = self.clients.get_mut(&id)
        {
            client.blame += weight;
        }
        self.sent.clear();
        self.scheduler.shard_lost(weight);
        self.scheduler.audit();
        self.keeping_lost_shard();
        let events = self.scheduler.take_events();
        self.check_events(events);
        self.shard = new_shard(&self.limits);
        self.tables = Tables::default();
        self.preparing.clear();
        for (content, _) in self.contents.clone() {
            self.prepare(content);
        }
    }

    /// Nobody may read what is free: it is overwritten, so that whoever does gives a wrong token. A step in flight that
    /// was not executed yet would read it, too.
    fn poison_free_memory(&mut self) {
        for block in self.scheduler.unowned_blocks() {
            self.shard.poison_block(block as usize);
        }
        for page in self.scheduler.unowned_pages() {
            self.shard.poison_page(page as usize);
        }
    }
}

pub(super) fn new_shard(limits: &SchedulerLimits) -> FakeShard {
    FakeShard::new(limits.pages_total, limits.blocks_per_page, limits.block_tokens, limits.slots_max)
}
