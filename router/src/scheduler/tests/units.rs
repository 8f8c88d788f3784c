//! The parts, each on its own: pages, prefix keys, slots.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::adapters::{AdapterTable, Residency};
use super::super::pages::{PagePool, Role};
use super::super::prefix;
use super::marker::Rng;
use super::plans::{Bench, content, limits, request, under};
use crate::engine::{AdapterUse, BatchShare, GenerateRequest};
use crate::scheduler::SchedulerLimits;

#[test]
fn blocks_come_from_the_fullest_page_so_pages_empty_out() {
    let mut pool = PagePool::new(3, 2);
    let blocks: Vec<_> = (0..5).map(|_| pool.take_block().expect("six blocks")).collect();
    assert_eq!(blocks.iter().map(|b| b.0).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    pool.release(blocks[1]);
    pool.release(blocks[2]);
    pool.release(blocks[3]);
    assert_eq!((pool.pages_free(), pool.role(1)), (1, Role::Free));
    assert_eq!(pool.take_block().expect("one").0, 1, "page 1 stays whole");
    pool.audit();
}

/// The arena's memory is the system's until it is written: what is resident is the most that was ever in use.
#[test]
fn a_page_that_nothing_was_in_is_taken_last() {
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let mut pool = PagePool::new(64, rng.range(1, 5));
        let (mut blocks, mut adapters, mut touched, mut peak) = (Vec::new(), Vec::new(), BTreeSet::new(), 0);
        for _ in 0..300 {
            match rng.range(0, 3) {
                0 => blocks.extend(pool.take_block()),
                1 if !blocks.is_empty() => {
                    let at = rng.next() as usize % blocks.len();
                    pool.release(blocks.swap_remove(at));
                }
                2 => adapters.extend(pool.take_adapter_pages(rng.range(1, 4))),
                3 if !adapters.is_empty() => {
                    let at = rng.next() as usize % adapters.len();
                    pool.give_adapter_pages(&adapters.swap_remove(at));
                }
                _ => {}
            }
            let in_use: Vec<u32> = (0..64).filter(|&page| pool.role(page) != Role::Free).collect();
            peak = peak.max(in_use.len());
            touched.extend(in_use);
            assert_eq!(touched.len(), peak, "seed {seed}: a page was touched while another lay idle");
        }
        assert!(peak > 2, "seed {seed} used nothing");
    }
}

#[test]
fn a_published_block_outlives_its_holder_until_memory_is_wanted() {
    let mut pool = PagePool::new(2, 2);
    let (first, second) = (pool.take_block().expect("one"), pool.take_block().expect("two"));
    pool.publish(first, [1; 32]);
    pool.publish(second, [1; 32]); // the first holder of a key stays
    assert_eq!(pool.find(&[1; 32]), Some(first));
    pool.release(first);
    pool.release(second);
    assert_eq!((pool.blocks_used(), pool.blocks_cached(), pool.blocks_obtainable(), pool.pages_kv()), (0, 1, 4, 1));
    pool.retain(first);
    assert_eq!((pool.blocks_used(), pool.blocks_cached(), pool.pages_obtainable()), (1, 0, 1));
    pool.release(first);
    assert!(pool.reclaim_page());
    assert_eq!((pool.find(&[1; 32]), pool.pages_free()), (None, 2));
    pool.audit();
}

#[test]
fn cached_blocks_are_forgotten_longest_unused_first() {
    let mut pool = PagePool::new(3, 1);
    let blocks: Vec<_> = (0..3).map(|_| pool.take_block().expect("three")).collect();
    for (at, block) in blocks.iter().enumerate() {
        pool.publish(*block, [at as u8; 32]);
    }
    for at in [1, 0, 2] {
        pool.release(blocks[at]);
    }
    for at in [1u8, 0, 2] {
        assert!(pool.find(&[at; 32]).is_some());
        assert!(pool.forget_oldest_cached());
        assert!(pool.find(&[at; 32]).is_none());
    }
    assert!(!pool.forget_oldest_cached());
}

#[test]
fn pages_are_conserved_under_random_use() {
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let mut pool = PagePool::new(rng.range(1, 12), rng.range(1, 5));
        let (mut blocks, mut pages) = (Vec::new(), Vec::new());
        for turn in 0..300u64 {
            pool.set_plan(turn);
            match rng.range(0, 6) {
                0 | 1 => blocks.extend(pool.take_block()),
                2 if !blocks.is_empty() => pool.release(blocks.swap_remove(rng.next() as usize % blocks.len())),
                3 if !blocks.is_empty() => pool.publish(*rng.pick(&blocks), [rng.range(0, 30) as u8; 32]),
                4 => {
                    if let Some(block) = pool.find(&[rng.range(0, 30) as u8; 32]) {
                        pool.retain(block);
                        blocks.push(block);
                    }
                }
                5 => pages.extend(pool.take_adapter_pages(rng.range(0, 3))),
                _ if rng.chance(500) => drop(pool.forget_oldest_cached()),
                _ => {
                    if let Some(given) = pages.pop() {
                        pool.give_adapter_pages(&given);
                    }
                }
            }
            pool.audit();
        }
        blocks.into_iter().for_each(|block| pool.release(block));
        pages.iter().for_each(|given| pool.give_adapter_pages(given));
        while pool.reclaim_page() {}
        assert_eq!((pool.pages_kv(), pool.pages_adapters(), pool.blocks_cached()), (0, 0, 0), "seed {seed}");
    }
}

#[test]
fn prefix_keys_differ_in_whatever_kv_or_trust_depends_on() {
    let base = request(4, 1);
    let scaled = |scale| {
        let adapters = vec![AdapterUse { content: content(1), scale }];
        GenerateRequest { adapters, ..base.clone() }
    };
    let salted = |salt: &str| GenerateRequest { cache_salt: Some(salt.to_owned()), ..base.clone() };
    let two = |a, b| under(under(base.clone(), a), b);
    let requests = [
        base.clone(),
        GenerateRequest { tenant: 2, ..base.clone() },
        salted(""),
        salted("a"),
        scaled(1.0),
        scaled(0.5),
        under(base.clone(), 2),
        two(1, 2),
        two(2, 1),
    ];
    let mut roots: Vec<_> = requests.iter().map(|request| prefix::root(&[0; 32], request)).collect();
    roots.push(prefix::root(&[1; 32], &base));
    for (at, root) in roots.iter().enumerate() {
        assert!(!roots[..at].contains(root), "root {at}");
    }
    let chain = |tokens: &[u32]| prefix::child(&[0; 32], &roots[0], tokens.iter().copied());
    assert_ne!(chain(&[1, 2]), chain(&[2, 1]));
    assert_ne!(chain(&[1]), chain(&[1, 0]));
    let long: Vec<u32> = (0..100).collect();
    assert_eq!(chain(&long), chain(&Arc::<[u32]>::from(long.clone())));
    assert_ne!(chain(&long), chain(&long[..99]));
}

#[test]
fn a_slot_is_never_reused_while_the_shard_writes_it() {
    let (mut pool, mut table) = (PagePool::new(4, 1), AdapterTable::new(1));
    table.ready(content(1), 2);
    let upload = table.start_upload(content(1), &mut pool);
    table.forget(&content(1), &mut pool);
    assert_eq!((pool.pages_adapters(), table.slots_obtainable()), (2, 0), "its upload still runs");
    assert_eq!(table.uploaded(upload.slot, &mut pool), None);
    assert_eq!((pool.pages_adapters(), table.slots_obtainable()), (0, 1));
    table.ready(content(1), 2);
    let again = table.start_upload(content(1), &mut pool);
    assert_ne!(again.slot.generation, upload.slot.generation);
    assert_eq!(table.uploaded(upload.slot, &mut pool), None, "a stale report changes nothing");
    assert_eq!(table.residency([&content(1)]), Residency::Loading);
    assert_eq!(table.uploaded(again.slot, &mut pool), Some(content(1)));
    assert_eq!(table.residency([&content(1)]), Residency::Resident);
    assert_eq!(table.residency([&content(1), &content(2)]), Residency::Parked);
    table.audit();
}

#[test]
fn of_two_idle_adapters_the_cheap_reload_goes_unless_the_other_is_much_older() {
    let (mut pool, mut table) = (PagePool::new(10, 1), AdapterTable::new(2));
    table.ready(content(1), 7);
    table.ready(content(2), 1);
    for (plan, adapter) in [(1, 1), (3, 2)] {
        table.set_plan(plan);
        let upload = table.start_upload(content(adapter), &mut pool);
        table.uploaded(upload.slot, &mut pool);
    }
    table.set_plan(4);
    let slot_of = |table: &AdapterTable| table.victim().map(|(slot, _)| slot);
    assert_eq!(slot_of(&table), Some(1), "one page is reloaded sooner than seven");
    table.pin(&content(2));
    assert_eq!(slot_of(&table), Some(0), "a pinned adapter is no victim");
    assert_eq!(table.evict(0, &mut pool), content(1));
    assert_eq!(slot_of(&table), None);
    table.audit();
}

#[test]
fn a_batch_is_counted_by_set_of_adapters() {
    let mut bench = Bench::new(SchedulerLimits { running_max: 3, ..limits() });
    for adapter in [1, 2] {
        bench.scheduler.adapter_ready(content(adapter), 1);
    }
    assert!(bench.scheduler.batch().is_empty());
    for request in [request(4, 9), request(4, 9), under(request(4, 9), 1), under(under(request(4, 9), 1), 2)] {
        bench.submit(request);
    }
    for _ in 0..4 {
        bench.step();
    }
    let stats = bench.scheduler.stats();
    let batch = bench.scheduler.batch();
    let sum = |of: fn(&BatchShare) -> u32| batch.iter().map(of).sum::<u32>();
    assert_eq!((sum(|share| share.running), sum(|share| share.waiting)), (stats.running, stats.waiting));
    assert_eq!(batch.iter().map(|share| share.contents.len()).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!((batch[0].running + batch[0].waiting, bench.scheduler.pages_of(&content(1))), (2, 1));
    let tokens = batch.iter().map(|share| share.running_tokens).sum::<u64>();
    assert!(tokens > u64::from(stats.running) * 4, "prompts and what was generated: {tokens}");
}
