//! Prompts: what is computed of them, when, and beside whom.

use super::super::{RequestId, SchedulerLimits};
use super::plans::{Bench, content, limits, request, under};
use crate::engine::{GenerateEvent, GenerateRequest};

const SYSTEM_TOKENS: u32 = 512;
const OWN_TOKENS: u32 = 16;

fn wide() -> SchedulerLimits {
    SchedulerLimits {
        pages_total: 4096,
        blocks_per_page: 4,
        block_tokens: 16,
        slots_max: 8,
        step_tokens: 2048,
        running_max: 64,
        context_tokens: 4096,
        prefix_caching: true,
        ..limits()
    }
}

/// A prompt that begins with `system` and goes on with what only this user says.
fn chat(system_tokens: u32, own_tokens: u32, user: u32) -> GenerateRequest {
    let own = (0..own_tokens).map(|i| 100_000 + user * 1_000 + i);
    GenerateRequest { prompt: (0..system_tokens).chain(own).collect(), ..request(1, 4) }
}

/// Runs until nothing is left. For each step: positions of each of its chunks.
fn run(bench: &mut Bench) -> Vec<Vec<u32>> {
    let mut steps = Vec::new();
    while let Some(step) = bench.plan() {
        steps.push(step.chunks.iter().map(|chunk| chunk.len).collect());
        bench.commit(&step);
    }
    steps
}

fn prompt_positions(steps: &[Vec<u32>]) -> u32 {
    steps.iter().flatten().filter(|len| **len > 1).sum()
}

fn cached_tokens(bench: &Bench) -> Vec<u32> {
    let cached = |(_, event): &(u64, GenerateEvent)| match event {
        GenerateEvent::Admitted { cached_tokens } => Some(*cached_tokens),
        _ => None,
    };
    bench.events.iter().filter_map(cached).collect()
}

#[test]
fn a_system_prompt_is_computed_once_for_each_adapter_and_costs_nothing_the_second_time() {
    let mut bench = Bench::new(wide());
    let on = |adapter: Option<u8>, request| {
        adapter.map_or_else(|| GenerateRequest::clone(&request), |a| under(request.clone(), a))
    };
    for adapter in [None, Some(1), Some(2)] {
        adapter.into_iter().for_each(|adapter| bench.scheduler.adapter_ready(content(adapter), 1));
        bench.submit(on(adapter, chat(SYSTEM_TOKENS, OWN_TOKENS, 0)));
        let first = run(&mut bench);
        assert_eq!(prompt_positions(&first), SYSTEM_TOKENS + OWN_TOKENS, "nobody else's KV serves {adapter:?}");
        assert_eq!(cached_tokens(&bench), [0]);
        bench.events.clear();
        for user in 1..=16 {
            bench.submit(on(adapter, chat(SYSTEM_TOKENS, OWN_TOKENS, user)));
        }
        let second = run(&mut bench);
        assert_eq!(prompt_positions(&second), 16 * OWN_TOKENS, "only what differs is computed");
        assert_eq!(second[0], [OWN_TOKENS; 16], "all in one step");
        assert_eq!(cached_tokens(&bench), [SYSTEM_TOKENS; 16]);
        bench.events.clear();
    }
}

/// For 16 requests that come at once: all prompt positions, and positions computed up to the first tokens, on average.
fn cost_of_newcomers(salted: bool) -> (u32, f64) {
    let mut bench = Bench::new(wide());
    for user in 0..16 {
        let cache_salt = salted.then(|| user.to_string());
        bench.submit(GenerateRequest { cache_salt, ..chat(SYSTEM_TOKENS, OWN_TOKENS, user) });
    }
    let (mut steps, mut computed, mut until_first) = (Vec::new(), 0, 0.0);
    while let Some(step) = bench.plan() {
        let lens: Vec<u32> = step.chunks.iter().map(|chunk| chunk.len).collect();
        computed += lens.iter().sum::<u32>();
        let firsts = step.chunks.iter().filter(|chunk| chunk.sample && chunk.len > 1).count();
        until_first += f64::from(computed) * firsts as f64 / 16.0;
        steps.push(lens);
        bench.commit(&step);
    }
    (prompt_positions(&steps), until_first)
}

#[test]
fn newcomers_with_the_same_new_prefix_wait_for_the_first_of_them_and_all_are_sooner() {
    let (shared, shared_first) = cost_of_newcomers(false);
    let (alone, alone_first) = cost_of_newcomers(true);
    println!(
        "16 at once, {SYSTEM_TOKENS} tokens in common: {shared} positions, first token after {shared_first:.0} on average"
    );
    println!("the same without sharing: {alone} positions, first token after {alone_first:.0} on average");
    assert_eq!(alone, 16 * (SYSTEM_TOKENS + OWN_TOKENS));
    assert_eq!(shared, SYSTEM_TOKENS + 16 * OWN_TOKENS);
    assert!(shared_first * 4.0 < alone_first, "{shared_first} and {alone_first}");
}

#[test]
fn who_has_little_in_common_starts_at_once() {
    let mut bench = Bench::new(wide());
    for user in 0..4 {
        bench.submit(chat(32, 200, user));
    }
    assert_eq!(run(&mut bench)[0], [232; 4]);
}

#[test]
fn a_follower_starts_when_the_one_it_waits_for_leaves_and_lets_others_pass_meanwhile() {
    let mut bench = Bench::new(SchedulerLimits { step_tokens: 128, ..wide() });
    let leader = bench.submit(chat(SYSTEM_TOKENS, OWN_TOKENS, 1));
    let follower = bench.submit(chat(SYSTEM_TOKENS, OWN_TOKENS, 2));
    assert_eq!(bench.step(), "+s1(528) s1[0..128]");
    bench.submit(GenerateRequest { tenant: 2, ..chat(0, 40, 3) });
    let steps = [bench.step(), bench.step()].join("; ");
    assert!(steps.contains("s2[0..40]!"), "who has nothing in common with it does not wait: {steps}");
    assert_eq!(cached_tokens(&bench).len(), 2, "the follower waits");
    bench.scheduler.cancel(RequestId(leader));
    let step = bench.plan().expect("the follower starts");
    assert!(step.starts.iter().any(|start| start.seq == 3), "{}", super::plans::show(&step));
    let cached = cached_tokens(&bench).last().copied().unwrap_or(0);
    assert!(cached >= 256 && cached.is_multiple_of(16), "with what was computed until then: {cached}");
    bench.commit(&step);
    run(&mut bench);
    let ended = |(id, event): &(u64, GenerateEvent)| *id == follower && matches!(event, GenerateEvent::Finished { .. });
    assert!(bench.events.iter().any(ended));
}

#[test]
fn a_long_prompt_takes_no_more_of_a_step_with_decodes_than_its_bound() {
    for (beside, prompt, longest) in [(128, 2000, 128), (256, 3000, 256), (u32::MAX, 3000, 2048 - 16)] {
        let mut bench = Bench::new(SchedulerLimits { prefill_tokens_beside: beside, ..wide() });
        for user in 0..16 {
            bench.submit(GenerateRequest { max_tokens: 100, ..chat(0, 20, user) });
        }
        bench.step();
        bench.submit(GenerateRequest { tenant: 2, ..chat(prompt, 1, 99) });
        let mut computed = 0;
        while computed < prompt + 1 {
            let step = bench.plan().expect("there is work");
            let (decodes, prefills): (Vec<_>, Vec<_>) =
                step.chunks.iter().partition(|chunk| chunk.len == 1 && chunk.sample);
            let rows: u32 = prefills.iter().map(|chunk| chunk.len).sum();
            if computed + rows < prompt + 1 {
                assert_eq!(rows, longest, "as much as the bound allows");
            }
            assert!(decodes.len() >= 16, "nobody who decodes is left out of a step");
            assert!(rows <= longest, "{rows} rows of a prompt beside {} decodes", decodes.len());
            computed += rows;
            bench.commit(&step);
        }
    }
}

#[test]
fn a_long_prompt_alone_takes_the_whole_step() {
    let mut bench = Bench::new(SchedulerLimits { prefill_tokens_beside: 128, ..wide() });
    bench.submit(chat(3000, 1, 1));
    assert_eq!(run(&mut bench)[..2], [vec![2048], vec![953]]);
}
