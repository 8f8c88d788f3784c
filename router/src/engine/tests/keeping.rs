//! Pins, unloading, fetching ahead, checks and merges, over the engine's messages.

use super::*;

fn prepare(world: &World, dir: &str) -> ContentId {
    world.runtime.block_on(world.handle.prepare_adapter(PathBuf::from(dir))).unwrap().content
}

fn pin(world: &World, content: ContentId, level: Option<PinLevel>) -> Result<(), PinRefused> {
    world.runtime.block_on(world.handle.pin_adapter(content, level))
}

fn tier(world: &World, content: ContentId) -> Option<Tier> {
    world.handle.status().contents.get(&content).map(|status| status.tier)
}

fn under(content: ContentId, max_tokens: u32) -> GenerateRequest {
    GenerateRequest { adapters: vec![AdapterUse { content, scale: 1.0 }], ..request(5, max_tokens) }
}

fn was_dropped(world: &World, content: ContentId) -> bool {
    world.script.dropped.lock().unwrap().contains(&content.0.to_vec())
}

/// Waits for the first token, so that the request runs.
fn start(world: &World, generation: &mut Generation) {
    world.runtime.block_on(async { while !matches!(generation.recv().await, Some(GenerateEvent::Token { .. })) {} });
}

#[test]
fn pinned_adapters_stay_where_they_are_and_come_back_after_a_death() {
    let script = Script { die_at: Mutex::new(vec![6]), ..Script::default() };
    let world = world(script, |options| options.host_adapter_bytes = 4 << 20);
    let device = prepare(&world, "/a");
    let host = prepare(&world, "/b");
    pin(&world, device, Some(PinLevel::Device)).unwrap();
    pin(&world, host, Some(PinLevel::Host)).unwrap();
    for dir in ["/c", "/d", "/e", "/f", "/g"] {
        prepare(&world, dir);
    }
    poll("the others push each other out", || world.script.dropped.lock().unwrap().len() >= 3);
    poll("it is on the device", || tier(&world, device) == Some(Tier::Device));
    assert_eq!(tier(&world, host), Some(Tier::Host));
    assert!(!was_dropped(&world, device) && !was_dropped(&world, host));
    let request = request(5, 20);
    let generation = world.handle.submit(request.clone()).unwrap();
    assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(&request));
    assert_eq!(world.script.launches.load(Ordering::SeqCst), 2);
    poll("both are back", || (tier(&world, device), tier(&world, host)) == (Some(Tier::Device), Some(Tier::Host)));
    let status = world.handle.status();
    assert_eq!((status.contents[&device].pinned, status.pages_pinned), (Some(PinLevel::Device), 1));
    pin(&world, device, None).unwrap();
    poll("it is unpinned", || world.handle.status().contents[&device].pinned.is_none());
}

#[test]
fn pins_leave_others_a_quarter_of_the_host_budget() {
    let world = world(Script::default(), |options| options.host_adapter_bytes = 4 << 20);
    for dir in ["/a", "/b", "/c"] {
        let content = prepare(&world, dir);
        pin(&world, content, Some(PinLevel::Host)).unwrap();
        pin(&world, content, Some(PinLevel::Device)).unwrap();
    }
    let one_more = prepare(&world, "/d");
    let refused = pin(&world, one_more, Some(PinLevel::Host)).unwrap_err();
    assert_eq!(refused, PinRefused::HostBytes { wanted: 4 << 20, allowed: 3 << 20 });
    let unknown = pin(&world, ContentId([250; 32]), Some(PinLevel::Host)).unwrap_err();
    assert!(matches!(unknown, PinRefused::Unknown(_)), "{unknown:?}");
}

#[test]
fn a_drained_adapter_serves_its_running_requests_to_the_end_even_over_a_death() {
    let script = Script { die_at: Mutex::new(vec![8]), step_time: Duration::from_millis(5), ..Script::default() };
    let world = world(script, |_| {});
    let content = prepare(&world, "/a");
    let request = under(content, 30);
    let mut running = world.handle.submit(request.clone()).unwrap();
    start(&world, &mut running);
    world.handle.forget_adapter(content, ForgetMode::Drain);
    let refused = world.runtime.block_on(collect(world.handle.submit(request.clone()).unwrap())).unwrap_err();
    assert!(matches!(refused, Failure::AdapterGone(..)), "{refused:?}");
    let status = world.handle.status();
    assert!(status.contents.get(&content).is_none_or(|status| status.draining || status.running > 0));
    let rest = world.runtime.block_on(collect(running)).unwrap();
    assert_eq!(rest, oracle(&request)[1..]);
    assert_eq!(world.script.launches.load(Ordering::SeqCst), 2);
    poll("all of it is given back", || {
        let status = world.handle.status();
        !status.contents.contains_key(&content) && status.pages_adapters == 0 && was_dropped(&world, content)
    });
    let again = prepare(&world, "/a");
    let generation = world.handle.submit(under(again, 30)).unwrap();
    assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(&request));
}

#[test]
fn an_adapter_that_goes_now_takes_its_requests_along_and_nobody_elses() {
    let world = world(Script { step_time: Duration::from_millis(2), ..Script::default() }, |_| {});
    let (content, other) = (prepare(&world, "/a"), prepare(&world, "/b"));
    let mut doomed = world.handle.submit(under(content, 400)).unwrap();
    let bystander = world.handle.submit(under(other, 40)).unwrap();
    start(&world, &mut doomed);
    world.handle.forget_adapter(content, ForgetMode::Now);
    let failed = world.runtime.block_on(collect(doomed)).unwrap_err();
    assert!(matches!(failed, Failure::AdapterGone(..)), "{failed:?}");
    assert_eq!(world.runtime.block_on(collect(bystander)).unwrap(), oracle(&under(other, 40)));
    poll("it is gone", || !world.handle.status().contents.contains_key(&content) && was_dropped(&world, content));
}

#[test]
fn loading_what_drains_keeps_it() {
    let world = world(Script { step_time: Duration::from_millis(5), ..Script::default() }, |_| {});
    let content = prepare(&world, "/a");
    let mut running = world.handle.submit(under(content, 40)).unwrap();
    start(&world, &mut running);
    world.handle.forget_adapter(content, ForgetMode::Drain);
    assert_eq!(prepare(&world, "/a"), content);
    let generation = world.handle.submit(under(content, 10)).unwrap();
    assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(&under(content, 10)));
    assert_eq!(world.runtime.block_on(collect(running)).unwrap().len(), 39);
    assert!(tier(&world, content).is_some() && !was_dropped(&world, content));
}

#[test]
fn a_cold_adapter_is_brought_back_on_a_word() {
    let world = world(Script::default(), |options| options.host_adapter_bytes = 2 << 20);
    let content = prepare(&world, "/a");
    prepare(&world, "/b");
    prepare(&world, "/c");
    poll("it was pushed out", || tier(&world, content) == Some(Tier::Disk));
    world.handle.prefetch_adapter(content);
    poll("it is on the device", || tier(&world, content) == Some(Tier::Device));
    assert_eq!(world.handle.status().counters.adapter_prefetches, 1);
}

#[test]
fn checks_and_merges_are_answered_and_keep_nothing() {
    let world = world(Script::default(), |_| {});
    let check = |dir: &str| world.runtime.block_on(world.handle.check_adapter(PathBuf::from(dir))).unwrap();
    let good = check("/a");
    assert!(good.is_ok() && good.content.is_some() && good.pages_needed == 1);
    let bad = check("/bad");
    assert_eq!(bad.refusals[0].code, "adapter_invalid");
    let ask = MergeAsk {
        dirs: vec!["/a".into(), "/b".into()],
        weights: vec![0.5, 0.25],
        strategy: MergeStrategy::DareTies,
        density: Some(0.5),
        majority_sign: MajoritySign::Frequency,
        seed: 9,
        out_dir: "/out".into(),
    };
    world.runtime.block_on(world.handle.merge_adapters(ask)).unwrap();
    let merge = world.script.merged.lock().unwrap().pop().unwrap();
    assert_eq!((merge.dirs.len(), merge.weights.as_slice(), merge.density), (2, &[0.5, 0.25][..], Some(0.5)));
    assert_eq!((merge.sign_by_frequency, merge.seed, merge.out_dir.as_str()), (true, 9, "/out"));
    assert_eq!(merge.strategy(), loramux_proto::merge_adapters::Strategy::DareTies);
    assert!(world.handle.status().contents.is_empty(), "nothing was kept");
}

#[test]
fn a_flood_of_loads_is_answered_and_a_deadly_one_is_given_up() {
    let world = world(Script::default(), |_| {});
    world.runtime.block_on(async {
        let loads = (0..1_000).map(|n| world.handle.prepare_adapter(PathBuf::from(format!("/{}", n % 7))));
        for loaded in futures_util::future::join_all(loads).await {
            loaded.unwrap();
        }
    });
    let deadly = world.runtime.block_on(world.handle.prepare_adapter("/deadly".into())).unwrap_err();
    assert_eq!(deadly.code, "adapter_load_failed");
    // The caller is told before the next shard is launched.
    poll("a fourth shard after three that died of it", || world.script.launches.load(Ordering::SeqCst) == 4);
    let request = request(1, 4);
    let generation = world.handle.submit(request.clone()).unwrap();
    assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(&request));
}

#[test]
fn requests_wait_for_a_missing_content_until_it_is_prepared_again_or_given_up() {
    for comes_back in [true, false] {
        let script = Script { die_at: Mutex::new(vec![8]), ..Script::default() };
        let world = world(script, |_| {});
        let (report, reports) = std::sync::mpsc::channel();
        world.handle.on_missing(Box::new(move |content, reason| report.send((content, reason.to_owned())).unwrap()));
        let content = prepare(&world, "/ab");
        world.script.replaced.lock().unwrap().push("/ab".into());
        let running = world.handle.submit(under(content, 20)).unwrap();
        let (missing, reason) = reports.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!((missing, reason.as_str()), (content, "its files changed on disk"));
        let waiting = world.handle.submit(under(content, 10)).unwrap();
        if comes_back {
            assert_eq!(prepare(&world, "/ba"), content, "the fake's contents are sums");
        } else {
            world.handle.give_up_adapter(content, "its source is gone".into());
        }
        for (generation, max_tokens) in [(running, 20), (waiting, 10)] {
            match world.runtime.block_on(collect(generation)) {
                Ok(tokens) if comes_back => assert_eq!(tokens, oracle(&under(content, max_tokens))),
                Err(Failure::AdapterGone(_, reason)) if !comes_back => assert_eq!(reason, "its source is gone"),
                other => panic!("comes back: {comes_back}: {other:?}"),
            }
        }
        world.handle.give_up_adapter(content, "too late to matter".into());
        assert_eq!(world.script.launches.load(Ordering::SeqCst), 2);
        assert!(reports.try_recv().is_err(), "told once");
    }
}
