//! Plans of small traces, written out. One behaviour each.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use loramux_proto::{Sample, Sampling, SlotGeneration, Step, StepResult, Tables};

use super::super::{NewRequest, RequestId, Scheduler, SchedulerLimits};
use crate::engine::{AdapterUse, ContentId, Failure, FinishReason, GenerateEvent, GenerateRequest};

pub(super) fn limits() -> SchedulerLimits {
    SchedulerLimits {
        pages_total: 16,
        blocks_per_page: 1,
        block_tokens: 4,
        slots_max: 4,
        step_tokens: 32,
        prefill_tokens_beside: u32::MAX,
        running_max: 8,
        queued_requests_max: 100,
        queued_tokens_max: u64::MAX,
        context_tokens: 64,
        pipeline_depth: 1,
        prefix_caching: false,
        prefix_key: [7; 32],
    }
}

pub(super) fn content(i: u8) -> ContentId {
    ContentId([i; 32])
}

pub(super) fn request(prompt_tokens: u32, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Arc::from((0..prompt_tokens).collect::<Vec<_>>()),
        n: 1,
        max_tokens,
        sampling: Sampling::default(),
        grammar: None,
        pooling: None,
        adapters: Vec::new(),
        tenant: 1,
        cache_salt: None,
        priority: 0,
        deadline_ms: None,
    }
}

pub(super) fn under(mut request: GenerateRequest, adapter: u8) -> GenerateRequest {
    request.adapters.push(AdapterUse { content: content(adapter), scale: 1.0 });
    request
}

/// A scheduler and a shard that draws token 1 each time.
pub(super) struct Bench {
    pub(super) scheduler: Scheduler,
    next: u64,
    pub(super) events: Vec<(u64, GenerateEvent)>,
    /// What the shard knows of block tables.
    tables: Tables,
}

impl Bench {
    pub(super) fn new(limits: SchedulerLimits) -> Self {
        Self { scheduler: Scheduler::new(limits), next: 1, events: Vec::new(), tables: Tables::default() }
    }

    pub(super) fn submit(&mut self, request: GenerateRequest) -> u64 {
        self.try_submit(request).expect("it fits")
    }

    pub(super) fn try_submit(&mut self, request: GenerateRequest) -> Result<u64, Failure> {
        let id = self.next;
        self.next += 1;
        let new = NewRequest { id: RequestId(id), request, deadline_at_ms: None };
        self.scheduler.submit(0, new).map(|()| id)
    }

    pub(super) fn plan(&mut self) -> Option<Step> {
        let mut step = self.scheduler.plan(0);
        if let Some(step) = &mut step {
            self.tables.complete(step).expect("the shard knows what was sent");
        }
        self.take_events();
        self.scheduler.audit();
        step
    }

    pub(super) fn take_events(&mut self) {
        let events = self.scheduler.take_events();
        self.events.extend(events.into_iter().map(|e| (e.request.0, e.event)));
    }

    pub(super) fn commit(&mut self, step: &Step) {
        let events = self.scheduler.commit(0, result_of(step));
        self.events.extend(events.into_iter().map(|e| (e.request.0, e.event)));
        self.scheduler.audit();
    }

    pub(super) fn commit_timed(&mut self, step: &Step, took: &mut Vec<Duration>) {
        let result = result_of(step);
        let since = Instant::now();
        let events = self.scheduler.commit(0, result);
        took.push(since.elapsed());
        assert!(!events.is_empty());
    }

    /// Plans and commits one step and writes it out.
    pub(super) fn step(&mut self) -> String {
        let Some(step) = self.plan() else { return "nothing".to_owned() };
        self.commit(&step);
        show(&step)
    }

    /// The shard dies in the next step.
    pub(super) fn die(&mut self, weight: u32) -> String {
        let step = self.plan().expect("there is something to die in");
        self.scheduler.shard_lost(weight);
        self.take_events();
        self.scheduler.audit();
        show(&step)
    }
}

/// What a shard that draws token 1 each time reports.
pub(super) fn result_of(step: &Step) -> StepResult {
    let sample = |seq| Sample { seq, token: 1, logprob: 0.0, top: Vec::new() };
    let uploaded = step.uploads.iter().map(|u| SlotGeneration { slot: u.slot, generation: u.generation });
    StepResult {
        id: step.id,
        samples: step.chunks.iter().filter(|chunk| chunk.sample).map(|chunk| sample(chunk.seq)).collect(),
        uploaded: uploaded.collect(),
        ..StepResult::default()
    }
}

/// `s1[0..8]@2!` = positions 0..8 of run 1 under slot 2, sampled; blocks are listed where a test looks at them.
pub(super) fn show(step: &Step) -> String {
    let mut text = String::new();
    for seq in &step.finishes {
        let _ = write!(text, "-s{seq} ");
    }
    for copy in &step.copies {
        let _ = write!(text, "copy b{}>b{} ", copy.src, copy.dst);
    }
    for upload in &step.uploads {
        let _ = write!(
            text,
            "up c{}>{}:{} pages {:?} ",
            upload.content_id[0], upload.slot, upload.generation, upload.pages
        );
    }
    for start in &step.starts {
        let _ = write!(text, "+s{}({}) ", start.seq, start.tokens.len());
    }
    for chunk in &step.chunks {
        let _ = write!(text, "s{}[{}..{}]", chunk.seq, chunk.start, chunk.start + chunk.len);
        for used in &chunk.adapters {
            let _ = write!(text, "@{}", used.slot);
        }
        text.push_str(if chunk.sample { "! " } else { " " });
    }
    text.trim_end().to_owned()
}

#[test]
fn a_long_prompt_is_prefilled_in_chunks_beside_decodes() {
    let mut bench = Bench::new(SchedulerLimits { step_tokens: 8, ..limits() });
    bench.submit(request(3, 9));
    assert_eq!(bench.step(), "+s1(3) s1[0..3]!");
    bench.submit(GenerateRequest { tenant: 2, ..request(20, 1) });
    assert_eq!(bench.step(), "+s2(20) s1[3..4]! s2[0..7]");
    assert_eq!(bench.step(), "s1[4..5]! s2[7..14]");
    assert_eq!(bench.step(), "s1[5..6]! s2[14..20]!");
    assert_eq!(bench.step(), "-s2 s1[6..7]!");
}

#[test]
fn siblings_share_the_prompt_and_copy_only_the_block_they_write() {
    let mut bench = Bench::new(limits());
    bench.submit(GenerateRequest { n: 3, ..request(6, 3) });
    assert_eq!(bench.step(), "+s1(6) s1[0..6]!");
    // Blocks 0 and 1 hold the prompt. Two copy block 1; the last holder writes into it.
    let step = bench.plan().expect("a step");
    assert_eq!(show(&step), "copy b1>b2 copy b1>b3 +s2(6) +s3(6) s1[6..7]! s2[5..6]! s3[5..6]!");
    let tables: Vec<_> = step.chunks.iter().map(|chunk| chunk.blocks.clone()).collect();
    assert_eq!(tables, [[0, 2], [0, 3], [0, 1]]);
    bench.commit(&step);
    let seeds: Vec<_> = step.starts.iter().map(|start| start.sampling.as_ref().map(|s| s.seed)).collect();
    assert_eq!(seeds, [Some(1), Some(2)], "siblings draw with seed + index");
}

#[test]
fn the_youngest_gives_way_and_is_computed_again() {
    // Five blocks of four positions: two sequences of two blocks each cannot both grow into a third.
    let mut bench = Bench::new(SchedulerLimits { pages_total: 5, ..limits() });
    bench.submit(request(7, 6));
    bench.submit(request(7, 6));
    assert_eq!(bench.step(), "+s1(7) +s2(7) s1[0..7]! s2[0..7]!");
    assert_eq!(bench.step(), "s1[7..8]! s2[7..8]!");
    assert_eq!(bench.step(), "-s2 s1[8..9]!");
    assert_eq!(bench.scheduler.stats().preemptions, 1);
    assert_eq!(bench.step(), "s1[9..10]!");
    assert_eq!(bench.step(), "s1[10..11]!");
    assert_eq!(bench.step(), "s1[11..12]!");
    assert_eq!(bench.step(), "-s1 +s3(9) s3[0..9]!");
    let admitted = bench.events.iter().filter(|(_, e)| matches!(e, GenerateEvent::Admitted { .. })).count();
    assert_eq!(admitted, 2, "a replay is not announced");
}

#[test]
fn each_adapter_is_one_segment_and_base_rows_come_first() {
    let mut bench = Bench::new(limits());
    bench.scheduler.adapter_ready(content(1), 1);
    bench.scheduler.adapter_ready(content(2), 1);
    for adapter in [2, 1, 2, 1] {
        bench.submit(under(request(2, 4), adapter));
    }
    bench.submit(request(2, 4));
    assert_eq!(bench.step(), "up c2>0:1 pages [1] up c1>1:2 pages [2] +s1(2) s1[0..2]!");
    assert_eq!(bench.step(), "+s2(2) +s3(2) +s4(2) +s5(2) s1[2..3]! s2[0..2]@0! s4[0..2]@0! s3[0..2]@1! s5[0..2]@1!");
}

#[test]
fn an_idle_adapter_goes_when_its_slot_is_wanted_the_longest_unused_first() {
    let mut bench = Bench::new(SchedulerLimits { slots_max: 2, ..limits() });
    for adapter in 1..=3 {
        bench.scheduler.adapter_ready(content(adapter), 2);
    }
    for adapter in [1, 2] {
        bench.submit(under(request(2, 1), adapter));
        bench.step();
        bench.step();
    }
    assert_eq!(bench.scheduler.stats().resident, [content(2), content(1)]);
    bench.submit(under(request(2, 1), 3));
    assert_eq!(bench.step(), "-s2 up c3>0:3 pages [1, 0]");
    assert_eq!(bench.scheduler.stats().resident, [content(3), content(2)]);
    assert_eq!(bench.scheduler.stats().adapter_evictions, 1);
}

#[test]
fn a_request_that_waits_for_its_adapter_blocks_nobody() {
    let mut bench = Bench::new(limits());
    bench.scheduler.adapter_ready(content(1), 1);
    bench.submit(under(request(2, 2), 1));
    bench.submit(under(request(2, 2), 1));
    bench.submit(request(2, 2));
    let step = bench.plan().expect("the base request runs");
    assert_eq!(show(&step), "up c1>0:1 pages [1] +s1(2) s1[0..2]!");
    // The upload is not reported with this step: its users go on waiting, the other one runs.
    let sample = Sample { seq: 1, token: 1, logprob: 0.0, top: Vec::new() };
    bench.scheduler.commit(0, StepResult { id: step.id, samples: vec![sample], ..StepResult::default() });
    assert_eq!(bench.step(), "s1[2..3]!");
    // Nothing else to do: an empty step asks for the report.
    assert_eq!(bench.step(), "-s1");
}

#[test]
fn a_load_never_preempts_and_is_not_starved_for_ever() {
    let mut bench = Bench::new(SchedulerLimits { pages_total: 8, ..limits() });
    bench.scheduler.adapter_ready(content(1), 6);
    bench.submit(request(8, 4));
    bench.step();
    bench.submit(GenerateRequest { tenant: 2, ..under(request(4, 2), 1) });
    // Base requests keep coming; each alone leaves no room for six pages.
    let mut loaded_after = None;
    for step in 0..400 {
        if bench.scheduler.stats().running < 2 {
            bench.submit(request(8, 4));
        }
        if bench.step().contains("up c1") {
            loaded_after = Some(step);
            break;
        }
    }
    assert!(loaded_after.is_some_and(|steps| steps < 150), "{loaded_after:?}");
    assert_eq!(bench.scheduler.stats().preemptions, 0);
}

#[test]
fn suspects_run_alone_and_in_turns_with_the_others() {
    let mut bench = Bench::new(limits());
    for _ in 0..2 {
        bench.submit(request(2, 8));
    }
    assert_eq!(bench.step(), "+s1(2) +s2(2) s1[0..2]! s2[0..2]!");
    assert_eq!(bench.die(2), "s1[2..3]! s2[2..3]!");
    bench.submit(request(2, 8));
    assert_eq!(bench.step(), "+s3(3) s3[0..3]!", "the first suspect, with the tokens it had");
    assert_eq!(bench.step(), "+s4(2) s3[3..4]! s4[0..2]!", "past the place: it is among the others again");
    assert_eq!(bench.step(), "+s5(3) s5[0..3]!");
    assert_eq!(bench.step(), "s3[4..5]! s4[2..3]! s5[3..4]!");
}

#[test]
fn a_poisoned_request_fails_alone_after_two_deaths_of_its_own() {
    let mut bench = Bench::new(limits());
    bench.submit(request(2, 8));
    bench.submit(request(2, 8));
    bench.step();
    bench.die(2);
    assert_eq!(bench.die(2), "+s3(3) s3[0..3]!");
    assert_eq!(bench.step(), "+s4(3) s4[0..3]!", "the other suspect first");
    assert_eq!(bench.step(), "s4[3..4]!");
    assert_eq!(bench.die(2), "+s5(3) s5[0..3]!");
    let failures: Vec<_> = bench.events.iter().filter(|(_, e)| matches!(e, GenerateEvent::Failed(_))).collect();
    assert!(matches!(failures[..], [(1, GenerateEvent::Failed(Failure::ShardFault))]), "{failures:?}");
    assert_eq!(bench.step(), "+s6(5) s6[0..5]!", "the last death was not its doing");
}

#[test]
fn a_kill_from_outside_counts_half() {
    let mut bench = Bench::new(limits());
    bench.submit(request(2, 8));
    for _ in 0..4 {
        bench.die(1);
    }
    assert!(!bench.events.iter().any(|(_, e)| matches!(e, GenerateEvent::Failed(_))));
    bench.die(1);
    assert!(matches!(bench.events.last(), Some((1, GenerateEvent::Failed(Failure::ShardFault)))));
}

#[test]
fn tokens_survive_the_shard_and_nothing_is_said_twice() {
    let mut bench = Bench::new(limits());
    bench.scheduler.adapter_ready(content(1), 1);
    bench.submit(under(request(2, 3), 1));
    bench.step();
    bench.step();
    bench.step();
    bench.die(2);
    assert_eq!(bench.step(), "nothing", "its adapter is not in the new shard's host memory");
    assert_eq!(bench.scheduler.contents_needed(), [content(1)]);
    bench.scheduler.adapter_ready(content(1), 1);
    assert_eq!(bench.step(), "up c1>0:2 pages [0]");
    assert_eq!(bench.step(), "+s2(4) s2[0..4]@0!");
    let tokens = bench.events.iter().filter(|(_, e)| matches!(e, GenerateEvent::Token { .. })).count();
    assert_eq!(tokens, 3);
    assert!(matches!(
        bench.events.last(),
        Some((1, GenerateEvent::Finished { index: 0, reason: FinishReason::Length }))
    ));
    assert!(bench.scheduler.is_idle());
}

#[test]
fn a_cancel_under_a_step_gives_memory_back_with_its_result() {
    let mut bench = Bench::new(limits());
    let id = bench.submit(request(6, 8));
    let step = bench.plan().expect("a step");
    bench.scheduler.cancel(RequestId(id));
    assert_eq!(bench.scheduler.stats().blocks_used, 2, "the step still writes them");
    bench.commit(&step);
    assert_eq!(bench.scheduler.stats().blocks_used, 0);
    assert_eq!(bench.events.len(), 1, "nothing after Admitted: {:?}", bench.events);
    assert!(bench.scheduler.is_idle());
}

#[test]
fn siblings_answer_together_for_the_deaths_they_cause() {
    let mut bench = Bench::new(limits());
    bench.submit(GenerateRequest { n: 2, ..request(2, 8) });
    bench.step();
    assert_eq!(bench.die(2), "copy b0>b1 +s2(2) s1[2..3]! s2[1..2]!");
    assert_eq!(bench.die(2), "+s3(3) s3[0..3]!");
    assert_eq!(bench.die(2), "+s4(2) s4[0..2]!");
    assert!(matches!(bench.events.last(), Some((1, GenerateEvent::Failed(Failure::ShardFault)))), "three restarts");
    assert!(bench.scheduler.is_idle());
}

#[test]
fn the_last_holder_of_a_published_block_writes_into_it_and_needs_no_copy() {
    // Three blocks: exactly what one sequence of twelve positions takes.
    let mut bench = Bench::new(SchedulerLimits { pages_total: 3, prefix_caching: true, ..limits() });
    let id = bench.submit(GenerateRequest { n: 2, ..request(4, 9) });
    bench.step();
    bench.scheduler.finish_sequence(RequestId(id), 0);
    assert_eq!(bench.step(), "-s1 +s2(4) s2[3..4]!");
    for _ in 0..8 {
        bench.step();
    }
    assert!(bench.scheduler.is_idle(), "{}", bench.scheduler.describe());
}
