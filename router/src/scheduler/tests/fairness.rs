//! Shares: who is served how much, and who waits how long.

use std::collections::{BTreeMap, VecDeque};

use super::super::SchedulerLimits;
use super::plans::{Bench, content, limits, request, under};
use crate::engine::{Failure, GenerateEvent, GenerateRequest};

/// Keeps `backlog` requests of each tenant waiting for `steps` steps and counts the positions that each got.
fn positions_served(bench: &mut Bench, tenants: &[(u64, GenerateRequest)], backlog: usize, steps: usize) -> Vec<u64> {
    let mut owner = BTreeMap::new();
    let mut served = vec![0; tenants.len()];
    for _ in 0..steps {
        for (at, (tenant, request)) in tenants.iter().enumerate() {
            while owner.values().filter(|o| **o == at).count() < backlog {
                let id = bench.submit(GenerateRequest { tenant: *tenant, ..request.clone() });
                owner.insert(id, at);
            }
        }
        let Some(step) = bench.plan() else { continue };
        let by_run: BTreeMap<u64, u64> = bench.scheduler.members_by_run().map(|(run, id)| (run, id.0)).collect();
        for chunk in &step.chunks {
            if let Some(at) = owner.get(&by_run[&chunk.seq]) {
                served[*at] += u64::from(chunk.len);
            }
        }
        bench.commit(&step);
        for (id, event) in bench.events.drain(..) {
            if matches!(event, GenerateEvent::Finished { .. }) {
                owner.remove(&id);
            }
        }
    }
    served
}

#[test]
fn tenants_with_a_backlog_are_served_the_same_number_of_positions() {
    let mut bench = Bench::new(SchedulerLimits { pages_total: 64, running_max: 4, ..limits() });
    // Long prompts against long answers, in different amounts.
    let tenants = [(1, request(24, 2)), (2, request(2, 24)), (3, request(8, 8))];
    let served = positions_served(&mut bench, &tenants, 12, 3_000);
    let (least, most) = (served.iter().min().expect("three"), served.iter().max().expect("three"));
    // Decided at admission, so a share is off by what the seats hold: four requests of up to 26 positions.
    assert!(most - least <= 2 * 4 * 26, "{served:?}");
}

#[test]
fn a_newcomer_does_not_wait_behind_a_flood() {
    let mut bench = Bench::new(SchedulerLimits { pages_total: 64, running_max: 4, ..limits() });
    for _ in 0..90 {
        bench.submit(request(8, 8));
    }
    for _ in 0..20 {
        bench.step();
    }
    bench.events.clear();
    let id = bench.submit(GenerateRequest { tenant: 2, ..request(8, 8) });
    let steps = (0..100).find(|_| {
        bench.step();
        bench.events.iter().any(|(of, event)| *of == id && matches!(event, GenerateEvent::Admitted { .. }))
    });
    // The next seat is its own: some request of eight tokens ends within eight steps.
    assert!(steps.is_some_and(|steps| steps <= 9), "{steps:?}");
}

#[test]
fn a_popular_adapter_does_not_keep_another_one_out() {
    let mut bench = Bench::new(SchedulerLimits { slots_max: 1, ..limits() });
    bench.scheduler.adapter_ready(content(1), 4);
    bench.scheduler.adapter_ready(content(2), 4);
    for _ in 0..60 {
        bench.submit(under(request(4, 4), 1));
    }
    let id = bench.submit(under(request(4, 4), 2));
    let steps = (0..400).find(|_| {
        bench.step();
        bench.submit(under(request(4, 4), 1));
        bench.events.iter().any(|(of, event)| *of == id && matches!(event, GenerateEvent::Finished { .. }))
    });
    assert!(steps.is_some_and(|steps| steps < 100), "{steps:?}");
}

#[test]
fn being_away_saves_up_no_credit() {
    let mut bench = Bench::new(SchedulerLimits { pages_total: 64, running_max: 2, ..limits() });
    // One tenant alone is served a thousand positions; the other one comes only then.
    positions_served(&mut bench, &[(1, request(8, 8))], 4, 600);
    let tenants = [(1, request(8, 8)), (2, request(8, 8))];
    let served = positions_served(&mut bench, &tenants, 6, 1_000);
    assert!(served[0].abs_diff(served[1]) <= 400, "{served:?}");
}

#[test]
fn priority_orders_only_within_one_tenant_and_adapter_set() {
    let mut bench = Bench::new(SchedulerLimits { running_max: 1, ..limits() });
    let low = bench.submit(GenerateRequest { priority: 5, ..request(2, 1) });
    let high = bench.submit(GenerateRequest { priority: -5, ..request(2, 1) });
    let other = bench.submit(GenerateRequest { priority: 9, tenant: 2, ..request(2, 1) });
    while !bench.scheduler.is_idle() {
        bench.step();
    }
    let finished = bench.events.iter().filter(|(_, event)| matches!(event, GenerateEvent::Finished { .. }));
    let order: Vec<_> = finished.map(|(id, _)| *id).collect();
    assert_eq!(order, [high, other, low]);
}

#[test]
fn the_queue_is_bounded_by_requests_and_by_tokens() {
    let mut bench = Bench::new(SchedulerLimits { queued_requests_max: 3, queued_tokens_max: 40, ..limits() });
    bench.submit(request(8, 8));
    bench.submit(request(8, 8));
    let full = Failure::QueueFull { waiting: 2, limit: 3 };
    assert_eq!(bench.try_submit(request(8, 8)), Err(full), "48 positions");
    bench.submit(request(2, 2));
    assert_eq!(bench.try_submit(request(1, 1)), Err(Failure::QueueFull { waiting: 3, limit: 3 }));
    bench.step();
    bench.submit(request(8, 8));
}

#[test]
fn what_cannot_ever_fit_is_refused_at_once() {
    let mut bench = Bench::new(SchedulerLimits { pages_total: 8, context_tokens: 1000, ..limits() });
    assert_eq!(bench.try_submit(request(30, 4)), Err(Failure::TooLarge { needed: 9, total: 8 }));
    bench.submit(request(30, 3)); // the last token's KV is never computed
    bench.scheduler.adapter_ready(content(1), 5);
    assert_eq!(bench.try_submit(under(request(10, 4), 1)), Err(Failure::TooLarge { needed: 9, total: 8 }));
    let unknown = bench.try_submit(under(request(1, 1), 2));
    assert!(matches!(unknown, Err(Failure::AdapterGone(..))), "{unknown:?}");
}

#[test]
fn a_plan_of_256_decodes_takes_well_under_a_millisecond() {
    for depth in [1, 2] {
        time_plans(depth);
    }
}

fn time_plans(pipeline_depth: u32) {
    let wide = SchedulerLimits {
        pages_total: 4096,
        blocks_per_page: 8,
        block_tokens: 16,
        slots_max: 64,
        step_tokens: 2048,
        prefill_tokens_beside: u32::MAX,
        running_max: 256,
        queued_requests_max: 1000,
        context_tokens: 4096,
        pipeline_depth,
        prefix_caching: true,
        ..limits()
    };
    let mut bench = Bench::new(wide);
    for adapter in 0..64 {
        bench.scheduler.adapter_ready(content(adapter), 4);
    }
    for i in 0..512u64 {
        let tenant = i % 16;
        bench.submit(GenerateRequest { tenant, ..under(request(200 + (i % 100) as u32, 2_000), (i % 64) as u8) });
    }
    while bench.scheduler.stats().running < 256 {
        bench.step();
    }
    let (mut plans, mut commits, mut sent) = (Vec::new(), Vec::new(), VecDeque::new());
    for _ in 0..200 {
        let since = std::time::Instant::now();
        let step = bench.scheduler.plan(0).expect("256 run");
        plans.push(since.elapsed());
        assert_eq!(step.chunks.len(), 256);
        sent.push_back(step);
        if sent.len() == pipeline_depth as usize
            && let Some(step) = sent.pop_front()
        {
            bench.commit_timed(&step, &mut commits);
        }
    }
    plans.sort_unstable();
    commits.sort_unstable();
    let (p50, p95, commit) = (plans[100], plans[190], commits[100]);
    println!("depth {pipeline_depth}: plan p50 {p50:?} p95 {p95:?}; commit p50 {commit:?}");
    // The bound is loose because debug builds and busy machines run it too; the goal is 100 us.
    assert!(plans[100] < std::time::Duration::from_millis(5), "{:?}", plans[100]);
}
