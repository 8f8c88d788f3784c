//! Takes the result of the oldest step in flight.

use std::collections::HashMap;

use loramux_proto::{PositionLogprobs, Sample, StepResult};

use super::ids::{SeqKey, SlotRef};
use super::{InFlight, Member, Scheduler, SchedulerEvent};
use crate::engine::{Failure, FinishReason, GenerateEvent};

/// A result by run of a sequence. Only looked up, so the map's order cannot reach an event.
#[derive(Default)]
struct Reports {
    samples: HashMap<u64, Sample>,
    logprobs: HashMap<u64, Vec<PositionLogprobs>>,
    faults: HashMap<u64, String>,
    pooled: HashMap<u64, Vec<f32>>,
}

impl Scheduler {
    /// Takes the result of the oldest step in flight and returns what happened, in order. A result of any other step, such
    /// as one of a shard that was replaced, changes nothing.
    pub fn commit(&mut self, _now_ms: u64, result: StepResult) -> Vec<SchedulerEvent> {
        let Some(flight) = self.in_flight.pop_front_if(|flight| flight.id == result.id) else {
            return self.take_events();
        };
        let InFlight { members, copy_sources, .. } = flight;
        for block in copy_sources {
            self.pool.release(block);
        }
        for published in &result.uploaded {
            let at = SlotRef { slot: published.slot, generation: published.generation };
            if let Some(content) = self.adapters.uploaded(at, &mut self.pool) {
                self.content_moved(&content);
            }
        }
        let mut reports = Reports {
            samples: result.samples.into_iter().map(|sample| (sample.seq, sample)).collect(),
            logprobs: result.prompt_logprobs.into_iter().map(|l| (l.seq, l.positions)).collect(),
            faults: result.faults.into_iter().map(|fault| (fault.seq, fault.reason)).collect(),
            pooled: result.pooled.into_iter().map(|pooled| (pooled.seq, pooled.values)).collect(),
        };
        for member in &members {
            self.seq_mut(member.key).arrive(member.len, member.samples);
        }
        for member in members {
            self.settle(member, &mut reports);
        }
        self.take_events()
    }

    /// One sequence's part of the result.
    fn settle(&mut self, member: Member, reports: &mut Reports) {
        let Member { key, start, len, samples } = member;
        // A sibling's fault earlier in this result may have ended it.
        let Some(seq) = self.find_seq(key) else { return };
        if seq.leaving {
            self.counters.wasted_positions += len as u64;
            if !self.seq(key).is_in_flight() {
                self.remove_sequence(key);
            }
            return;
        }
        let (id, index) = (seq.job.id, seq.index);
        let Some(run) = seq.holding().map(|holding| holding.seq.0) else { return };
        if let Some(reason) = reports.faults.remove(&run) {
            self.fail_request(id, Failure::Numerics(reason));
            return;
        }
        let end = start + len;
        let sample = reports.samples.remove(&run);
        if samples && sample.is_none() {
            // The shard broke the contract for this sequence; asking again could go on for ever.
            self.fail_request(id, Failure::ShardFault);
            return;
        }
        self.seq_mut(key).computed = end;
        self.publish_blocks(key);
        self.clear_suspect(key);
        self.deliver_logprobs(key, end, reports.logprobs.remove(&run).unwrap_or_default());
        if start < self.seq(key).prompt_tokens() && end >= self.seq(key).prompt_tokens() {
            self.release_siblings(key);
        }
        if let Some(sample) = sample.filter(|_| samples) {
            self.append(key, sample);
        } else if end == self.seq(key).job.positions_max() {
            // max_tokens = 0: only the prompt was wanted
            if self.seq(key).job.request.pooling.is_some() {
                let Some(values) = reports.pooled.remove(&run) else {
                    self.fail_request(id, Failure::ShardFault); // the contract again
                    return;
                };
                self.emit(id, GenerateEvent::Embedding { values });
            }
            self.finish_index(id, index, FinishReason::Length);
        }
    }

    /// Appends a sampled token; an end token or the limit ends the sequence.
    fn append(&mut self, key: SeqKey, sample: Sample) {
        let Sample { token, logprob, top, .. } = sample;
        let seq = self.seq_mut(key);
        seq.generated.push(token);
        let (id, index) = (seq.job.id, seq.index);
        let request = &seq.job.request;
        let reason = if request.sampling.end_tokens.contains(&token) {
            Some(FinishReason::Stop)
        } else if seq.generated.len() >= request.max_tokens as usize {
            Some(FinishReason::Length)
        } else {
            None
        };
        self.emit(id, GenerateEvent::Token { index, token, logprob, top });
        match reason {
            Some(reason) => self.finish_index(id, index, reason),
            None => self.ask_next_mask(key, token),
        }
    }

    /// Delivers prompt logprobs up to position `end`, each once over all replays and siblings.
    fn deliver_logprobs(&mut self, key: SeqKey, end: usize, mut positions: Vec<PositionLogprobs>) {
        let id = self.seq(key).job.id;
        let Some(request) = self.requests.get_mut(&id) else { return };
        if !request.owes_logprobs() {
            return;
        }
        let prompt_tokens = request.job.request.prompt.len();
        let next = request.logprobs_next;
        positions.retain(|p| (next..prompt_tokens).contains(&(p.position as usize)));
        let reported = positions.last().map_or(next, |last| last.position as usize + 1);
        // A report that lacks positions is not asked for again.
        request.logprobs_next = next.max(reported).max(end.min(prompt_tokens));
        if !positions.is_empty() {
            self.emit(id, GenerateEvent::PromptLogprobs { positions });
        }
    }
}
