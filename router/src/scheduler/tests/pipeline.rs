//! Two steps in flight, written out: what the second one may name, and when memory comes back.

use loramux_proto::{Sampling, SeqFault};

use super::super::{RequestId, SchedulerLimits};
use super::plans::{Bench, content, limits, request, result_of, show, under};
use crate::engine::{Failure, FinishReason, GenerateEvent, GenerateRequest};

fn two_deep() -> SchedulerLimits {
    SchedulerLimits { pipeline_depth: 2, ..limits() }
}

/// A request that the bench's shard, which draws token 1 each time, ends with its first token.
fn ends_at_once(prompt_tokens: u32) -> GenerateRequest {
    let sampling = Sampling { end_tokens: vec![1], ..Sampling::default() };
    GenerateRequest { sampling, ..request(prompt_tokens, 9) }
}

fn tokens_of(bench: &Bench, id: u64) -> usize {
    bench.events.iter().filter(|(of, event)| *of == id && matches!(event, GenerateEvent::Token { .. })).count()
}

#[test]
fn a_decode_is_planned_before_its_token_is_known_and_the_foreseen_end_is_not_overrun() {
    let mut bench = Bench::new(two_deep());
    bench.submit(request(3, 4));
    let first = bench.plan().expect("the prompt");
    let second = bench.plan().expect("the token that the first step samples");
    assert_eq!((show(&first), show(&second)), ("+s1(3) s1[0..3]!".into(), "s1[3..4]!".into()));
    assert!(bench.plan().is_none(), "two steps are in flight");
    bench.commit(&first);
    let third = bench.plan().expect("one more");
    assert_eq!(show(&third), "s1[4..5]!");
    bench.commit(&second);
    let fourth = bench.plan().expect("the last token");
    assert_eq!(show(&fourth), "s1[5..6]!");
    bench.commit(&third);
    assert!(bench.plan().is_none(), "the fourth token ends it whatever it is");
    bench.commit(&fourth);
    assert_eq!((tokens_of(&bench, 1), bench.scheduler.stats().wasted_positions), (4, 0));
    assert!(bench.scheduler.is_idle());
}

#[test]
fn every_row_of_a_step_is_in_the_next_one_and_newcomers_join_them() {
    let mut bench = Bench::new(two_deep());
    for _ in 0..3 {
        bench.submit(request(2, 9));
    }
    let mut first = bench.plan().expect("three prompts");
    let mut second = bench.plan().expect("three decodes");
    for round in 0..5 {
        if round == 1 {
            bench.submit(request(2, 9));
        }
        bench.commit(&first);
        first = second;
        second = bench.plan().expect("all of them");
        assert_eq!(second.chunks.len(), if round < 1 { 3 } else { 4 }, "no half batches");
        assert!(second.chunks.iter().all(|chunk| chunk.sample));
    }
}

#[test]
fn the_chunks_of_a_long_prompt_follow_each_other_without_a_result() {
    let mut bench = Bench::new(SchedulerLimits { step_tokens: 8, ..two_deep() });
    bench.submit(request(20, 2));
    let first = bench.plan().expect("a chunk");
    let second = bench.plan().expect("the next");
    assert_eq!((show(&first), show(&second)), ("+s1(20) s1[0..8]".into(), "s1[8..16]".into()));
    bench.commit(&first);
    assert_eq!(bench.scheduler.stats().blocks_used, 4);
    let third = bench.plan().expect("the last chunk");
    bench.commit(&second);
    let fourth = bench.plan().expect("the decode");
    assert_eq!((show(&third), show(&fourth)), ("s1[16..20]!".into(), "s1[20..21]!".into()));
}

#[test]
fn a_prompt_that_is_only_scored_ends_with_its_last_chunk_not_with_the_one_before() {
    let mut bench = Bench::new(SchedulerLimits { step_tokens: 8, ..two_deep() });
    bench.submit(request(12, 0));
    let (first, second) = (bench.plan().expect("a chunk"), bench.plan().expect("the last"));
    assert_eq!(show(&second), "s1[8..12]");
    bench.commit(&first);
    assert_eq!(bench.events.len(), 1, "admitted, not finished: {:?}", bench.events);
    bench.commit(&second);
    let finished = GenerateEvent::Finished { index: 0, reason: FinishReason::Length };
    assert_eq!(format!("{:?}", bench.events.last()), format!("{:?}", Some((1, finished))));
}

#[test]
fn a_sequence_that_ended_keeps_its_blocks_until_no_step_names_it() {
    let mut bench = Bench::new(two_deep());
    bench.submit(ends_at_once(6));
    let first = bench.plan().expect("the prompt");
    let second = bench.plan().expect("a decode that turns out to be for nothing");
    assert_eq!(show(&second), "s1[6..7]!");
    bench.commit(&first);
    assert!(matches!(bench.events.last(), Some((1, GenerateEvent::Finished { reason: FinishReason::Stop, .. }))));
    assert_eq!(bench.scheduler.stats().blocks_used, 2, "the second step writes there");
    assert!(!bench.scheduler.is_idle());
    let events = bench.events.len();
    bench.submit(request(2, 1));
    let third = bench.plan().expect("the newcomer");
    assert_eq!(show(&third), "+s2(2) s2[0..2]!", "the shard still computes the first sequence");
    assert!(!third.chunks[0].blocks.iter().any(|block| second.chunks[0].blocks.contains(block)));
    bench.commit(&second);
    assert_eq!(bench.events.len(), events + 1, "Admitted of the newcomer only");
    assert_eq!((bench.scheduler.stats().blocks_used, bench.scheduler.stats().wasted_positions), (1, 1));
    bench.commit(&third);
    bench.submit(request(2, 1));
    assert_eq!(bench.step(), "-s1 -s2 +s3(2) s3[0..2]!");
}

#[test]
fn a_cancel_under_two_steps_gives_memory_back_with_the_second_result() {
    let mut bench = Bench::new(two_deep());
    let id = bench.submit(request(6, 8));
    let (first, second) = (bench.plan().expect("a step"), bench.plan().expect("another"));
    bench.scheduler.cancel(RequestId(id));
    bench.commit(&first);
    assert_eq!(bench.scheduler.stats().blocks_used, 2);
    assert!(bench.plan().is_none());
    bench.commit(&second);
    assert_eq!(bench.scheduler.stats().blocks_used, 0);
    assert_eq!(bench.events.len(), 1, "nothing after Admitted: {:?}", bench.events);
    assert!(bench.scheduler.is_idle());
}

#[test]
fn a_fault_in_the_first_step_drops_the_second_ones_part_of_all_siblings() {
    let mut bench = Bench::new(two_deep());
    bench.submit(GenerateRequest { n: 2, ..request(4, 9) });
    bench.step(); // the prompt; the second sibling starts from it
    let (first, second) = (bench.plan().expect("a step"), bench.plan().expect("another"));
    assert_eq!((first.chunks.len(), second.chunks.len()), (2, 2));
    let mut result = result_of(&first);
    let seq = result.samples.remove(0).seq;
    result.faults.push(SeqFault { seq, reason: "NaN".into() });
    let failed = bench.scheduler.commit(0, result);
    assert!(matches!(failed[..], [super::super::SchedulerEvent { event: GenerateEvent::Failed(_), .. }]));
    assert!(bench.scheduler.stats().blocks_used > 0);
    bench.events.clear();
    bench.commit(&second);
    assert!(bench.events.is_empty(), "{:?}", bench.events);
    assert_eq!(bench.scheduler.stats().blocks_used, 0);
}

#[test]
fn nobody_gives_way_while_a_step_in_flight_names_it() {
    // Five blocks of four positions: two sequences of two blocks each cannot both grow into a third.
    let mut bench = Bench::new(SchedulerLimits { pages_total: 5, ..two_deep() });
    bench.submit(request(7, 6));
    bench.submit(request(7, 6));
    let first = bench.plan().expect("two prompts");
    let second = bench.plan().expect("two decodes");
    bench.commit(&first);
    // Position 8 of the first takes the last block; the second one has none, and is in flight.
    let third = bench.plan().expect("the older one goes on");
    assert_eq!((show(&second), show(&third)), ("s1[7..8]! s2[7..8]!".into(), "s1[8..9]!".into()));
    assert_eq!(bench.scheduler.stats().preemptions, 0);
    bench.commit(&second);
    let fourth = bench.plan().expect("now it gives way");
    assert_eq!((show(&fourth), bench.scheduler.stats().preemptions), ("-s2 s1[9..10]!".into(), 1));
    bench.commit(&third);
    bench.commit(&fourth);
    while !bench.scheduler.is_idle() {
        bench.step();
    }
    assert_eq!((tokens_of(&bench, 1), tokens_of(&bench, 2)), (6, 6));
}

#[test]
fn who_could_go_on_waits_for_an_older_one_that_lacks_memory() {
    let mut bench = Bench::new(SchedulerLimits { pages_total: 5, block_tokens: 8, ..two_deep() });
    bench.submit(request(20, 12));
    bench.submit(request(7, 20));
    let mut steps = vec![bench.plan().expect("two prompts")];
    while let Some(step) = bench.plan() {
        steps.push(step);
        let oldest = steps.remove(0);
        bench.commit(&oldest);
    }
    // The first one needs a fourth block. The second one has room in its own, but would never be there to give way.
    assert_eq!(steps.iter().map(show).collect::<Vec<_>>(), ["s1[23..24]! s2[10..11]!"]);
    bench.commit(&steps[0]);
    assert_eq!(bench.step(), "-s2 s1[24..25]!");
}

#[test]
fn an_adapter_stays_until_the_step_that_runs_under_it_for_nothing_is_done() {
    let mut bench = Bench::new(SchedulerLimits { slots_max: 1, ..two_deep() });
    bench.scheduler.adapter_ready(content(1), 1);
    bench.scheduler.adapter_ready(content(2), 1);
    bench.submit(under(ends_at_once(2), 1));
    bench.submit(GenerateRequest { tenant: 2, ..under(request(2, 1), 2) });
    assert_eq!(bench.step(), "up c1>0:1 pages [0]");
    let (first, second) = (bench.plan().expect("the prompt"), bench.plan().expect("a decode for nothing"));
    bench.commit(&first);
    assert!(bench.plan().is_none(), "the only slot is in use");
    bench.commit(&second);
    assert_eq!(bench.step(), "-s1 up c2>0:2 pages [0]");
}

#[test]
fn a_block_is_found_by_others_only_once_a_result_shows_what_is_in_it() {
    let mut bench = Bench::new(SchedulerLimits { prefix_caching: true, running_max: 2, ..two_deep() });
    bench.submit(request(9, 1));
    let first = bench.plan().expect("the prompt");
    // With so little in common it does not wait for the first one.
    let prompt = (0..4).chain(100..108).collect();
    bench.submit(GenerateRequest { prompt, ..request(1, 1) });
    let second = bench.plan().expect("a prompt with the same first block");
    assert_eq!(show(&second), "+s2(12) s2[0..12]!", "computed again");
    bench.commit(&first);
    bench.submit(request(9, 1));
    let third = bench.plan().expect("and once more");
    assert_eq!(show(&third), "-s1 +s3(9) s3[8..9]!", "two blocks of the first one");
    bench.commit(&second);
    bench.commit(&third);
    assert!(bench.scheduler.is_idle());
}

#[test]
fn results_count_only_in_the_order_of_their_steps() {
    let mut bench = Bench::new(two_deep());
    bench.submit(request(2, 9));
    let (first, second) = (bench.plan().expect("a step"), bench.plan().expect("another"));
    bench.commit(&second);
    assert_eq!(tokens_of(&bench, 1), 0, "the first one is due");
    bench.commit(&first);
    bench.commit(&first);
    assert_eq!(tokens_of(&bench, 1), 1);
    bench.commit(&second);
    assert_eq!(tokens_of(&bench, 1), 2);
}

#[test]
fn a_death_makes_suspects_of_both_steps_and_they_are_tried_one_step_at_a_time() {
    let mut bench = Bench::new(two_deep());
    bench.submit(request(2, 8));
    let first = bench.plan().expect("the first prompt");
    bench.submit(GenerateRequest { tenant: 2, ..request(2, 8) });
    let second = bench.plan().expect("its decode and the second prompt");
    assert_eq!((show(&first), show(&second)), ("+s1(2) s1[0..2]!".into(), "+s2(2) s1[2..3]! s2[0..2]!".into()));
    bench.scheduler.shard_lost(2);
    bench.scheduler.audit();
    bench.commit(&first);
    assert_eq!(tokens_of(&bench, 1), 0, "a result of the dead shard");
    let solo = bench.plan().expect("the first suspect");
    assert_eq!(show(&solo), "+s3(2) s3[0..2]!");
    assert!(bench.plan().is_none(), "a second step would hide who kills the shard");
    bench.commit(&solo);
    // It died at position 2 perhaps, so one token does not clear it. The other one is tried in its turn.
    assert_eq!(bench.step(), "s3[2..3]!");
    let other = bench.plan().expect("the rest of the batch");
    assert_eq!(show(&other), "s3[3..4]!");
    assert!(bench.plan().is_none());
    bench.commit(&other);
    assert_eq!(bench.step(), "+s4(2) s4[0..2]!");
    let (one, two) = (bench.plan().expect("all are cleared"), bench.plan().expect("two deep again"));
    assert_eq!((one.chunks.len(), two.chunks.len()), (2, 2));
}

#[test]
fn siblings_of_a_leader_whose_decode_was_in_flight_are_tried_alone_too() {
    let mut bench = Bench::new(two_deep());
    bench.submit(GenerateRequest { n: 2, ..request(2, 8) });
    bench.submit(GenerateRequest { tenant: 2, ..request(2, 8) });
    for _ in 0..2 {
        bench.plan().expect("the prompts, then the decodes");
    }
    bench.scheduler.shard_lost(2);
    assert_eq!(bench.step(), "+s3(2) s3[0..2]!");
    assert_eq!(bench.step(), "s3[2..3]!", "past the place");
    assert_eq!(bench.step(), "s3[3..4]!", "the rest of the batch has its turn");
    assert_eq!(bench.step(), "+s4(2) s4[0..2]!", "the other request");
    assert_eq!(bench.step(), "s3[4..5]!");
    assert_eq!(bench.step(), "s4[2..3]!");
    assert_eq!(bench.step(), "s3[5..6]! s4[3..4]!");
    assert_eq!(bench.step(), "copy b0>b3 +s5(2) s5[1..2]!", "the sibling");
}

#[test]
fn a_poisoned_request_fails_alone_with_two_steps_in_flight_as_with_one() {
    let mut bench = Bench::new(two_deep());
    bench.submit(request(2, 8));
    bench.submit(request(2, 8));
    for _ in 0..2 {
        bench.plan().expect("a batch");
    }
    bench.scheduler.shard_lost(2);
    bench.die(2); // the first one's own step
    while tokens_of(&bench, 2) < 3 {
        bench.step();
    }
    while bench.scheduler.stats().running < 2 {
        let step = bench.plan().expect("somebody runs");
        if step.chunks.len() == 1 && step.starts.iter().any(|start| start.prompt_tokens == 2) {
            bench.scheduler.shard_lost(2);
            bench.take_events();
            break;
        }
        bench.commit(&step);
    }
    let failed: Vec<_> = bench.events.iter().filter(|(_, e)| matches!(e, GenerateEvent::Failed(_))).collect();
    assert!(matches!(failed[..], [(1, GenerateEvent::Failed(Failure::ShardFault))]), "{failed:?}");
}

#[test]
fn a_copy_is_made_once_though_its_source_is_still_kept_for_it() {
    // The prompt's last block is not full: the leader copies it, and its sibling is the last holder and writes in place.
    let mut bench = Bench::new(two_deep());
    bench.submit(GenerateRequest { n: 2, ..request(6, 6) });
    bench.step();
    let first = bench.plan().expect("both siblings");
    assert_eq!(show(&first), "copy b1>b2 +s2(6) s1[6..7]! s2[5..6]!");
    let second = bench.plan().expect("again both");
    assert_eq!(show(&second), "s1[7..8]! s2[6..7]!", "no second copy while the first one's source is kept");
    bench.commit(&first);
    bench.commit(&second);
}
