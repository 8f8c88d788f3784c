//! Pins and fetching ahead, one behaviour each.

use super::super::SchedulerLimits;
use super::plans::{Bench, content, limits, request, under};
use crate::engine::PinRefused;

fn bench(contents: &[(u8, u32)]) -> Bench {
    let mut bench = Bench::new(limits());
    for (id, pages) in contents {
        bench.scheduler.adapter_ready(content(*id), *pages);
    }
    bench
}

/// Plans and commits until nothing is left to do.
fn settle(bench: &mut Bench) {
    for _ in 0..200 {
        let Some(step) = bench.plan() else { return };
        bench.commit(&step);
    }
    panic!("it goes on for ever");
}

#[test]
fn a_pinned_adapter_comes_without_a_request_and_stays_whatever_else_is_wanted() {
    let mut bench = bench(&[(1, 4), (2, 6), (3, 6), (4, 6)]);
    bench.scheduler.adapter_pin(content(1)).expect("a quarter of the arena");
    settle(&mut bench);
    let (place, resident) = bench.scheduler.place_of(&content(1)).expect("it was uploaded");
    assert!(resident);
    for round in 0..4 {
        bench.submit(under(request(8, 4), 2 + round % 3));
        settle(&mut bench);
        assert_eq!(bench.scheduler.place_of(&content(1)), Some((place, true)), "round {round}");
    }
    assert!(bench.scheduler.stats().adapter_evictions > 0, "the others had to make room for each other");
    bench.scheduler.adapter_unpin(content(1));
    bench.submit(under(request(8, 4), 2));
    bench.submit(under(request(8, 4), 4));
    settle(&mut bench);
    assert_eq!(bench.scheduler.place_of(&content(1)), None, "cache like any other");
}

#[test]
fn pins_leave_a_quarter_of_pages_and_slots_and_what_a_request_was_promised() {
    let mut bench = bench(&[(1, 7), (2, 6), (3, 0), (4, 0), (5, 0)]);
    bench.scheduler.adapter_pin(content(1)).expect("7 of 16 pages");
    let refused = bench.scheduler.adapter_pin(content(2)).expect_err("13 of 16");
    assert_eq!(refused, PinRefused::Pages { wanted: 13, allowed: 12, total: 16 });
    bench.scheduler.adapter_pin(content(3)).expect("2 of 4 slots");
    bench.scheduler.adapter_pin(content(4)).expect("3 of 4 slots");
    let refused = bench.scheduler.adapter_pin(content(5)).expect_err("all slots");
    assert_eq!(refused, PinRefused::Slots { wanted: 4, allowed: 3 });
    assert!(matches!(bench.scheduler.adapter_pin(content(9)), Err(PinRefused::Unknown(_))));
    assert!(bench.try_submit(request(30, 10)).is_err(), "10 pages beside 7 pinned ones");

    let mut bench = self::bench(&[(1, 7)]);
    bench.submit(request(30, 10));
    assert_eq!(bench.scheduler.adapter_pin(content(1)), Err(PinRefused::Busy), "it could not end beside the pin");
    settle(&mut bench);
    bench.scheduler.adapter_pin(content(1)).expect("it ended");
}

#[test]
fn an_adapter_whose_upload_kills_two_shards_loses_its_pin() {
    let mut bench = bench(&[(1, 4), (2, 2)]);
    bench.scheduler.adapter_pin(content(1)).expect("it fits");
    for _ in 0..2 {
        assert!(bench.scheduler.take_unpinned().is_empty());
        let step = bench.plan().expect("the upload");
        assert_eq!(step.uploads.len(), 1);
        bench.scheduler.shard_lost(2);
        for (id, pages) in [(1, 4), (2, 2)] {
            bench.scheduler.adapter_ready(content(id), pages);
        }
    }
    assert_eq!(bench.scheduler.take_unpinned(), [content(1)]);
    assert_eq!(bench.plan(), None, "it is not tried a third time");
    bench.submit(under(request(8, 2), 2));
    settle(&mut bench);
}

#[test]
fn what_is_expected_comes_into_free_pages_and_pushes_nothing_out() {
    let mut bench = bench(&[(1, 6), (2, 6), (3, 6)]);
    for id in [1, 2, 3] {
        bench.scheduler.adapter_prefetch(content(id));
    }
    settle(&mut bench);
    let places: Vec<_> = [1, 2, 3].map(|id| bench.scheduler.place_of(&content(id)).is_some()).to_vec();
    assert_eq!(places, [true, true, false], "two fit");
    let stats = bench.scheduler.stats();
    assert_eq!((stats.adapter_prefetches, stats.adapter_evictions), (2, 0));
}

#[test]
fn adapters_of_queued_requests_come_before_their_turn() {
    let mut bench = Bench::new(SchedulerLimits { pages_total: 64, running_max: 1, slots_max: 16, ..limits() });
    for id in 1..=12 {
        bench.scheduler.adapter_ready(content(id), 1);
    }
    bench.submit(request(4, 40));
    let step = bench.plan().expect("it starts");
    bench.commit(&step);
    // More than claims: those also promise KV, which a long queue cannot have.
    for id in 1..=12 {
        bench.submit(under(request(4, 1), id));
    }
    let step = bench.plan().expect("it goes on");
    bench.commit(&step);
    let here = (1..=12).filter(|id| bench.scheduler.place_of(&content(*id)).is_some()).count();
    assert!(here > 8, "{here} adapters are there while one request runs");
    assert!(bench.scheduler.stats().adapter_prefetches > 0);
}

#[test]
fn cached_kv_of_a_forgotten_adapter_is_in_nobodys_way() {
    let mut bench = Bench::new(SchedulerLimits { prefix_caching: true, ..limits() });
    bench.scheduler.adapter_ready(content(1), 4);
    bench.submit(under(request(40, 4), 1));
    settle(&mut bench);
    bench.scheduler.adapter_forget(content(1)).expect("nobody uses it");
    let stats = bench.scheduler.stats();
    assert_eq!((stats.pages_adapters, stats.blocks_used), (0, 0));
    assert!(stats.blocks_cached > 0);
    bench.submit(request(60, 4)); // all 16 pages
    settle(&mut bench);
    let stats = bench.scheduler.stats();
    assert_eq!((stats.prefix_hit_tokens, stats.running, stats.waiting), (0, 0, 0));
}
