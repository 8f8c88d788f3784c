//! Plans of sequences with a grammar, written out: what waits for a mask, and what does not.

use std::sync::Arc;

use super::super::{MaskStep, RequestId, SchedulerLimits};
use super::grammar::{Formula, words_of};
use super::plans::{Bench, limits, request, show};
use crate::engine::{Allowed, Failure, FinishReason, GenerateEvent, GenerateRequest, GrammarFailure};

fn constrained(prompt_tokens: u32, max_tokens: u32) -> GenerateRequest {
    GenerateRequest { grammar: Some(Arc::new(Formula { salt: 1, breaks: true })), ..request(prompt_tokens, max_tokens) }
}

/// Asks since the last call: request, sibling, tokens generated, the token to move over.
fn asks(bench: &mut Bench) -> Vec<(u64, u32, usize, Option<u32>)> {
    let asks = bench.scheduler.take_mask_asks().into_iter();
    asks.map(|ask| {
        let token = match ask.step {
            MaskStep::Start(_) => None,
            MaskStep::Accept(token) => Some(token),
        };
        (ask.request.0, ask.index, ask.generated, token)
    })
    .collect()
}

fn answer(bench: &mut Bench, id: u64, generated: usize, words: &[u32]) {
    bench.scheduler.set_mask(RequestId(id), 0, generated, Ok(Allowed::Tokens(Arc::from(words))));
}

#[test]
fn a_prompt_is_computed_up_to_the_position_that_draws_while_its_mask_is_awaited() {
    let mut bench = Bench::new(limits());
    bench.submit(constrained(6, 3));
    assert_eq!(asks(&mut bench), [(1, 0, 0, None)], "asked before it starts: there is a seat for it");
    assert_eq!(bench.step(), "+s1(6) s1[0..5]");
    assert_eq!(bench.step(), "nothing");
    answer(&mut bench, 1, 0, &[2, 9]);
    let step = bench.plan().expect("the mask is here");
    assert_eq!(show(&step), "s1[5..6]!");
    assert_eq!(step.chunks[0].mask.as_deref().map(words_of), Some(vec![2, 9]));
    bench.commit(&step);
    assert_eq!(asks(&mut bench), [(1, 0, 1, Some(1))]);
    assert_eq!(bench.step(), "nothing");
    answer(&mut bench, 1, 1, &[2]);
    assert_eq!(bench.step(), "s1[6..7]!");
    answer(&mut bench, 1, 2, &[2]);
    assert_eq!(bench.step(), "s1[7..8]!");
    assert!(matches!(bench.events.last(), Some((1, GenerateEvent::Finished { reason: FinishReason::Length, .. }))));
    assert_eq!(asks(&mut bench), [(1, 0, 2, Some(1))], "nothing follows the last token");
    assert!(bench.scheduler.is_idle());
}

#[test]
fn with_its_mask_there_in_time_a_prompt_takes_one_step_and_nobody_asks_for_those_far_back_in_the_queue() {
    let mut bench = Bench::new(SchedulerLimits { running_max: 1, ..limits() });
    bench.submit(constrained(6, 1));
    bench.submit(constrained(1, 1));
    assert_eq!(asks(&mut bench), [(1, 0, 0, None)]);
    answer(&mut bench, 1, 0, &[2]);
    assert_eq!(bench.step(), "+s1(6) s1[0..6]!");
    assert_eq!(bench.step(), "nothing", "its one position draws");
    assert_eq!(asks(&mut bench), [(2, 0, 0, None)], "now it has its seat");
    answer(&mut bench, 2, 0, &[2]);
    assert_eq!(bench.step(), "-s1 +s2(1) s2[0..1]!");
    assert!(bench.scheduler.is_idle());
}

#[test]
fn nothing_is_foreseen_under_a_grammar_and_others_do_not_wait_for_it() {
    let mut bench = Bench::new(SchedulerLimits { pipeline_depth: 2, ..limits() });
    bench.submit(constrained(3, 9));
    bench.submit(request(3, 9));
    answer(&mut bench, 1, 0, &[2]);
    let first = bench.plan().expect("two prompts");
    assert_eq!(show(&first), "+s1(3) +s2(3) s1[0..3]! s2[0..3]!");
    let second = bench.plan().expect("a decode");
    assert_eq!(show(&second), "s2[3..4]!");
    bench.commit(&first);
    assert_eq!(show(&bench.plan().expect("another decode")), "s2[4..5]!");
    bench.commit(&second);
    answer(&mut bench, 1, 1, &[2]);
    assert_eq!(show(&bench.plan().expect("both")), "s1[3..4]! s2[5..6]!");
}

#[test]
fn a_mask_outlives_the_shard_and_is_not_asked_for_again() {
    let mut bench = Bench::new(limits());
    bench.submit(constrained(2, 3));
    answer(&mut bench, 1, 0, &[2]);
    bench.step();
    answer(&mut bench, 1, 1, &[6]);
    assert_eq!(asks(&mut bench).len(), 2);
    assert_eq!(bench.die(1), "s1[2..3]!");
    let step = bench.plan().expect("the replay");
    assert_eq!(
        (show(&step).as_str(), step.chunks[0].mask.as_deref().map(words_of)),
        ("+s2(3) s2[0..3]!", Some(vec![6]))
    );
    bench.commit(&step);
    // It dies while the next one is awaited: all but the last position is computed again.
    bench.scheduler.shard_lost(1);
    assert_eq!(bench.step(), "+s3(4) s3[0..3]");
    assert_eq!(asks(&mut bench), [(1, 0, 2, Some(1))]);
    answer(&mut bench, 1, 2, &[2]);
    assert_eq!(bench.step(), "s3[3..4]!");
    assert!(bench.scheduler.is_idle() && asks(&mut bench).is_empty());
}

#[test]
fn a_grammar_ends_or_fails_its_request_even_before_it_starts() {
    let mut bench = Bench::new(SchedulerLimits { running_max: 1, ..limits() });
    bench.submit(constrained(3, 9));
    bench.scheduler.set_mask(RequestId(1), 0, 0, Ok(Allowed::End));
    bench.take_events();
    let [(1, GenerateEvent::Admitted { .. }), (1, GenerateEvent::Finished { reason, .. })] = bench.events[..] else {
        panic!("{:?}", bench.events)
    };
    assert_eq!(reason, FinishReason::Stop);
    assert!(bench.scheduler.is_idle());
    bench.submit(GenerateRequest { n: 2, ..constrained(3, 9) });
    bench.step();
    bench.scheduler.set_mask(RequestId(2), 0, 0, Err(GrammarFailure("too deep".into())));
    bench.take_events();
    let last = bench.events.last();
    assert!(
        matches!(last, Some((2, GenerateEvent::Failed(Failure::Grammar(reason)))) if reason == "too deep"),
        "{last:?}"
    );
    assert!(bench.scheduler.is_idle());
}

#[test]
fn what_only_scores_a_prompt_needs_no_mask() {
    let mut bench = Bench::new(limits());
    bench.submit(constrained(3, 0));
    assert_eq!(bench.step(), "+s1(3) s1[0..3]");
    assert!(bench.scheduler.is_idle() && asks(&mut bench).is_empty());
}
