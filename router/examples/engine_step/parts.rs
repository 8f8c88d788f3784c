//! The parts of a step one after the other on one thread, each by the wall clock: nothing waits here.

use std::time::Instant;

use loramux_proto::{FromShard, Sample, SlotGeneration, Step, StepResult, ToShard, frame, from_shard, to_shard};
use loramux_router::engine::{AdapterUse, ContentId, GenerateRequest};
use loramux_router::scheduler::{NewRequest, RequestId, Scheduler, SchedulerLimits};
use loramux_router::text::TextModel;

/// Names of the parts, in order.
pub(crate) const PARTS: [&str; 7] =
    ["plan", "encode the step", "decode the step", "encode the result", "decode the result", "commit", "detokenise"];

fn limits() -> SchedulerLimits {
    SchedulerLimits {
        pages_total: 1024,
        blocks_per_page: 16,
        block_tokens: 16,
        slots_max: 512,
        step_tokens: 4096,
        prefill_tokens_beside: u32::MAX,
        running_max: 512,
        queued_requests_max: 1024,
        queued_tokens_max: u64::MAX,
        context_tokens: 2048,
        pipeline_depth: 1,
        prefix_caching: true,
        prefix_key: [7; 32],
    }
}

fn content(at: usize) -> ContentId {
    let mut id = [0; 32];
    id[..8].copy_from_slice(&(at as u64 + 1).to_le_bytes());
    ContentId(id)
}

fn submit_all(scheduler: &mut Scheduler, sequences: usize, prompt_tokens: usize, max_tokens: u32) {
    for at in 0..sequences {
        scheduler.adapter_ready(content(at), 1);
        let request = GenerateRequest {
            prompt: (0..prompt_tokens as u32).map(|i| i + at as u32).collect(),
            n: 1,
            max_tokens,
            sampling: Default::default(),
            grammar: None,
            pooling: None,
            adapters: vec![AdapterUse { content: content(at), scale: 1.0 }],
            tenant: 1,
            cache_salt: None,
            priority: 0,
            deadline_ms: None,
        };
        scheduler.submit(0, NewRequest { id: RequestId(at as u64), request, deadline_at_ms: None }).expect("it fits");
    }
}

fn answer(step: &Step) -> StepResult {
    let samples = step.chunks.iter().filter(|chunk| chunk.sample);
    let samples =
        samples.map(|chunk| Sample { seq: chunk.seq, token: 300 + (step.id % 1700) as u32, ..Sample::default() });
    let uploaded =
        step.uploads.iter().map(|upload| SlotGeneration { slot: upload.slot, generation: upload.generation });
    StepResult { id: step.id, samples: samples.collect(), uploaded: uploaded.collect(), ..StepResult::default() }
}

/// Times of each part over all steps that decode every sequence, us.
pub(crate) fn measure(text: &TextModel, sequences: usize, context: usize, steps: usize) -> Vec<Vec<f64>> {
    let mut times: Vec<Vec<f64>> = vec![Vec::with_capacity(steps); PARTS.len()];
    let mut scheduler = Scheduler::new(limits());
    submit_all(&mut scheduler, sequences, context - steps / 2, steps as u32 + 8);
    let mut detokenizers: Vec<_> = (0..sequences).map(|_| text.detokenizer(true)).collect();
    let (mut step_frame, mut result_frame, mut read, mut out) = (Vec::new(), Vec::new(), Vec::new(), String::new());
    loop {
        let mut clock = Lap(Instant::now());
        let Some(step) = scheduler.plan(0) else { break };
        let plan = clock.lap();
        let counts = step.chunks.len() == sequences && step.chunks.iter().all(|chunk| chunk.len == 1);
        let result = answer(&step);
        clock.lap();
        step_frame.clear();
        let message = ToShard { body: Some(to_shard::Body::Step(step)) };
        frame::write(&mut step_frame, &mut read, &message).expect("a vector takes it");
        drop(message);
        let encode_step = clock.lap();
        drop(frame::read::<ToShard>(&mut step_frame.as_slice(), &mut read).expect("it decodes"));
        let decode_step = clock.lap();
        result_frame.clear();
        let message = FromShard { body: Some(from_shard::Body::Step(result)) };
        frame::write(&mut result_frame, &mut read, &message).expect("a vector takes it");
        drop(message);
        let encode_result = clock.lap();
        let received = frame::read::<FromShard>(&mut result_frame.as_slice(), &mut read).expect("it decodes");
        let Some(from_shard::Body::Step(result)) = received.and_then(|message| message.body) else { break };
        let decode_result = clock.lap();
        let tokens: Vec<u32> = result.samples.iter().map(|sample| sample.token).collect();
        clock.lap();
        let events = scheduler.commit(0, result);
        let commit = clock.lap();
        drop(events);
        clock.lap();
        for (token, detokenizer) in tokens.iter().zip(&mut detokenizers) {
            out.clear();
            detokenizer.push(*token, &mut out);
        }
        let detokenise = clock.lap();
        if counts {
            let all = [plan, encode_step, decode_step, encode_result, decode_result, commit, detokenise];
            all.iter().zip(&mut times).for_each(|(time, times)| times.push(*time));
        }
    }
    times
}

struct Lap(Instant);

impl Lap {
    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        (now - std::mem::replace(&mut self.0, now)).as_secs_f64() * 1e6
    }
}
