//! Many worlds, each from one seed.
//!
//! `LORAMUX_SIM_SEEDS=1000..2000 LORAMUX_SIM_STEPS=5000 cargo test --release -p loramux-router scheduler::tests::sim::sim_long`
//! runs a range; a failure prints the command for its seed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::weather::Totals;
use super::world::World;

/// Steps of weather per seed of the run in CI. `LORAMUX_SIM_STEPS` overrides it.
const CI_STEPS: u64 = 4_900;
const CI_SEEDS: u64 = 2_048;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// `7` is one seed, `5..9` is a range.
fn seeds() -> Option<std::ops::Range<u64>> {
    let text = std::env::var("LORAMUX_SIM_SEEDS").ok()?;
    match text.split_once("..") {
        Some((from, to)) => Some(from.parse().ok()?..to.parse().ok()?),
        None => {
            let seed = text.parse().ok()?;
            Some(seed..seed + 1)
        }
    }
}

fn run(seeds: std::ops::Range<u64>, steps: u64, depth: u32) -> Totals {
    let (next, totals) = (AtomicU64::new(seeds.start), Mutex::new(Totals::default()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let done = run_seed(seed, steps, depth);
                    totals.lock().unwrap_or_else(PoisonError::into_inner).add(&done);
                }
            });
        }
    });
    totals.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn run_seed(seed: u64, steps: u64, depth: u32) -> Totals {
    struct Replay(u64, u64, u32);
    impl Drop for Replay {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let Self(seed, steps, depth) = self;
                eprintln!(
                    "seed {seed} failed at depth {depth}; replay: LORAMUX_SIM_SEEDS={seed} LORAMUX_SIM_STEPS={steps} \
                     cargo test --release -p loramux-router scheduler::tests::sim::sim_long"
                );
            }
        }
    }
    let replay = Replay(seed, steps, depth);
    let mut world = World::random(seed, depth);
    world.run(steps);
    drop(replay);
    world.totals
}

fn timed(seeds: std::ops::Range<u64>, steps: u64, depth: u32) -> Totals {
    let (since, count) = (Instant::now(), seeds.end - seeds.start);
    let totals = run(seeds, steps, depth);
    let seconds = since.elapsed().as_secs_f64();
    let rate = totals.steps as f64 / seconds;
    println!("depth {depth}: {count} seeds, {rate:.0} steps/s, {seconds:.1} s: {totals:?}");
    totals
}

fn check_ci(depth: u32) {
    let optimised = !cfg!(debug_assertions);
    let (seeds, steps) = if optimised { (CI_SEEDS, CI_STEPS) } else { (CI_SEEDS / 16, CI_STEPS / 4) };
    let totals = timed(0..seeds, steps, depth);
    assert!(totals.steps >= seeds * steps);
    // A world where these never happen tests nothing.
    let rare = [totals.deaths, totals.cancels, totals.preemptions, totals.evictions, totals.deadlines, totals.numerics];
    assert!(rare.iter().all(|count| *count > seeds / 2), "{totals:?}");
    assert!(totals.shard_faults > 0 && totals.forks > seeds && totals.prefix_hit_tokens > seeds, "{totals:?}");
    assert!(totals.masks > seeds * 100 && totals.grammar_failures > seeds / 2, "{totals:?}");
    let kept = [totals.pins, totals.drains, totals.ends_now, totals.fetched];
    assert!(kept.iter().all(|count| *count > seeds / 2), "{totals:?}");
    let ahead = if depth > 1 { totals.steps / 4..totals.steps } else { 0..1 };
    assert!(ahead.contains(&totals.ahead), "{totals:?}");
}

#[test]
fn sim_ci() {
    check_ci(1);
}

#[test]
fn sim_ci_pipelined() {
    check_ci(2);
}

#[test]
fn a_request_gets_the_same_tokens_with_one_step_in_flight_and_with_two() {
    let (mut sequences, mut wasted) = (0, 0);
    for seed in 0..400 {
        let (mut one, mut two) = (World::random(seed, 1), World::random(seed, 2));
        let (alone, pipelined) = (one.run_calmly(24), two.run_calmly(24));
        assert_eq!(alone, pipelined, "seed {seed}");
        sequences += alone.len();
        assert_eq!(one.totals.wasted_positions, 0, "seed {seed}: nothing was cancelled");
        wasted += two.totals.wasted_positions;
    }
    // End tokens cannot be foreseen, `max_tokens` can.
    assert!(sequences > 1_000 && wasted > 100, "{sequences} sequences, {wasted} positions for nothing");
}

/// The long run of `just sim`; without its variables it runs a few seeds that `sim_ci` does not.
#[test]
fn sim_long() {
    for depth in [1, 2] {
        let totals = timed(seeds().unwrap_or(1_000_000..1_000_008), number("LORAMUX_SIM_STEPS", 2_000), depth);
        assert!(totals.tokens > 0);
    }
}
