use super::*;

fn refused() -> FetchError {
    FetchError::Source(SourceError::retryable("connection refused"))
}

async fn moved(world: &World, seconds: u64) {
    world.clock.advance(Duration::from_secs(seconds));
    world.settle().await;
}

#[tokio::test]
async fn a_registered_adapter_is_tried_again_by_schedule() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    world.upstream.fetch_fails.lock().unwrap().extend((0..7).map(|_| refused()));
    let ask = LoadAsk { wait: SHORT, keep: true, ..world.ask("sql", "acme/sql") };
    let first = tokio::spawn({
        let registry = world.registry.clone();
        async move { registry.load(ask).await }
    });
    world.settle().await;
    let failed = first.await.unwrap().unwrap_err();
    // Half of 5 s: the clock's chance is 0.5. The wait would be over before that.
    assert_eq!((failed.code.as_str(), failed.retry_after), ("adapter_load_failed", Some(Duration::from_millis(2500))));
    assert_eq!(failed.state, Some("failed"));
    let view = world.registry.get("", "sql").unwrap();
    assert_eq!(view.state, AdapterState::Failed);
    let error = view.error.unwrap();
    assert!(error.retryable && error.next_try.is_some());
    assert_eq!(world.upstream.fetches(), 1);
    let mut tried = 1;
    for pause in [3, 5, 10, 20, 40, 300] {
        moved(&world, pause - 1).await;
        if pause > 3 {
            assert_eq!(world.upstream.fetches(), tried, "before {pause} s");
        }
        moved(&world, 1).await;
        tried += 1;
        assert_eq!(world.upstream.fetches(), tried, "after {pause} s");
    }
    // The circuit was open, and opens again; the next try works.
    moved(&world, 300).await;
    assert_eq!(world.registry.get("", "sql").unwrap().state, AdapterState::Ready);
    assert!(world.registry.get("", "sql").unwrap().error.is_none());
    world.resolve("sql").await.unwrap();
}

#[tokio::test]
async fn a_waiting_request_gets_what_a_retry_brings_or_is_told_when_to_come_back() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    world.upstream.fetch_fails.lock().unwrap().extend([refused(), refused()]);
    let wait = |limit: u64| Wait::Until(Duration::from_secs(limit));
    let ask = |limit: u64| {
        let registry = world.registry.clone();
        tokio::spawn(async move { registry.resolve(&Caller::default(), &Ask::plain("acme/sql", wait(limit))).await })
    };
    let (patient, hasty) = (ask(30), ask(1));
    world.settle().await;
    let failed = hasty.await.unwrap().unwrap_err();
    assert_eq!((failed.code.as_str(), failed.state), ("adapter_load_failed", Some("failed")));
    assert_eq!(failed.retry_after, Some(Duration::from_millis(2500)));
    moved(&world, 3).await;
    moved(&world, 5).await;
    assert_eq!(world.upstream.fetches(), 3);
    patient.await.unwrap().unwrap();
}

#[tokio::test]
async fn too_many_requests_upstream_waits_as_it_was_told() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    let busy =
        SourceError::Retryable { message: "429".into(), retry_after: Some(Duration::from_secs(17)), detail: None };
    world.upstream.fetch_fails.lock().unwrap().push(FetchError::Source(busy));
    let failed = world.registry.resolve(&Caller::default(), &Ask::plain("acme/sql", Wait::Fail)).await;
    assert_eq!(code(&failed), "adapter_loading", "its source has not answered");
    world.settle().await;
    let failed = world.registry.resolve(&Caller::default(), &Ask::plain("acme/sql", Wait::Fail)).await;
    assert_eq!(code(&failed), "adapter_loading", "the first attempt has not ended");
    world.settle().await;
    let failed = world.registry.resolve(&Caller::default(), &Ask::plain("acme/sql", SHORT)).await.unwrap_err();
    assert_eq!(failed.retry_after, Some(Duration::from_secs(17)));
    moved(&world, 16).await;
    assert_eq!(
        code(&world.registry.resolve(&Caller::default(), &Ask::plain("acme/sql", SHORT)).await),
        "adapter_load_failed"
    );
    moved(&world, 1).await;
    world.resolve("acme/sql").await.unwrap();
    assert_eq!(world.upstream.fetches(), 2);
}

#[tokio::test]
async fn bad_bytes_are_not_fetched_again_and_an_explicit_load_tries_at_most_every_five_seconds() {
    let world = World::new();
    world.upstream.public("acme/bad", 1);
    *world.engine.bad.lock().unwrap() = Some(("bad@1".into(), failure("adapter_invalid", "it is broken".into())));
    for _ in 0..3 {
        assert_eq!(code(&world.resolve("acme/bad").await), "adapter_invalid");
        moved(&world, 61).await;
    }
    assert_eq!(world.engine.prepares.load(Ordering::SeqCst), 1);
    for (expected, seconds) in [(2, 1), (2, 3), (2, 2), (3, 0)] {
        let loaded = world.registry.load(LoadAsk { keep: true, ..world.ask("bad", "acme/bad") }).await;
        assert_eq!((code(&loaded), world.engine.prepares.load(Ordering::SeqCst)), ("adapter_invalid", expected));
        moved(&world, seconds).await;
    }
    assert_eq!(world.registry.get("", "bad").unwrap().state, AdapterState::Failed);
    assert_eq!(code(&world.resolve("bad").await), "adapter_invalid");
    // Without `keep` the name is free again.
    let loaded = world.load("bad2", "acme/bad").await;
    assert_eq!((code(&loaded), world.registry.get("", "bad2").is_none()), ("adapter_invalid", true));
    assert_eq!(world.registry.failures(), [("adapter_invalid".to_owned(), 3)]);
}

#[tokio::test]
async fn in_place_switches_at_once_and_a_failed_one_leaves_the_old_serving() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    let first = world.load("sql", "acme/sql").await.unwrap();
    assert_eq!((first.generation, first.state, first.revision.as_deref()), (1, AdapterState::Ready, Some("1")));
    let running = world.resolve("sql").await.unwrap();
    world.upstream.public("acme/sql", 2);
    assert_eq!(&*world.resolve("sql").await.unwrap().revision, "1", "a registered name stays where it is");
    assert_eq!(code(&world.load("sql", "acme/sql").await), "adapter_exists");
    let in_place = |world: &World, reference: &str| LoadAsk { in_place: true, ..world.ask("sql", reference) };
    let second = world.registry.load(in_place(&world, "acme/sql")).await.unwrap();
    assert_eq!((second.generation, second.revision.as_deref()), (2, Some("2")));
    assert_eq!(&*world.resolve("sql").await.unwrap().revision, "2");
    assert!(world.engine.knows(&running.prepared.content), "a request runs under the old one");
    drop(running);
    assert!(!world.engine.knows(&content_of("hub:acme/sql@1")));
    // Bad bytes, then a source that is down.
    world.upstream.public("acme/bad", 1);
    *world.engine.bad.lock().unwrap() = Some(("bad@1".into(), failure("adapter_invalid", "it is broken".into())));
    assert_eq!(code(&world.registry.load(in_place(&world, "acme/bad")).await), "adapter_invalid");
    *world.upstream.down.lock().unwrap() = Some(SourceError::retryable("refused"));
    let ask = LoadAsk { wait: SHORT, ..in_place(&world, "acme/sql") };
    let late = world.registry.load(ask).await.unwrap_err();
    assert!(matches!(late.code.as_str(), "adapter_load_failed" | "adapter_loading"), "{late:?}");
    world.settle().await;
    assert_eq!(&*world.resolve("sql").await.unwrap().revision, "2");
    let view = world.registry.get("", "sql").unwrap();
    assert_eq!((view.state, view.generation), (AdapterState::Ready, 2));
    assert_eq!(view.error.unwrap().code, "adapter_load_failed");
    *world.upstream.down.lock().unwrap() = None;
    world.upstream.public("acme/sql", 3);
    moved(&world, 6).await;
    assert_eq!(&*world.resolve("sql").await.unwrap().revision, "3", "the load went on by itself");
    world.registry.names().assert_consistent();
}

#[tokio::test]
async fn conditions_are_compared_with_what_is_there() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    let ask = |content: Option<&str>, generation| LoadAsk {
        in_place: true,
        if_content_id: content.map(str::to_owned),
        if_generation: generation,
        ..world.ask("sql", "acme/sql")
    };
    assert_eq!(code(&world.registry.load(ask(Some("0123456789"), None)).await), "precondition_failed");
    assert_eq!(code(&world.registry.load(ask(None, Some(1))).await), "precondition_failed");
    let view = world.registry.load(ask(Some(""), Some(0))).await.unwrap();
    assert_eq!(code(&world.registry.load(ask(Some(""), None)).await), "precondition_failed");
    world.upstream.public("acme/sql", 2);
    let id = view.content_id.unwrap();
    world.registry.load(ask(Some(&id[..16]), Some(1))).await.unwrap();
    assert_eq!(
        code(&world.registry.load(ask(Some(&id[..16]), None)).await),
        "precondition_failed",
        "that was version 1"
    );
    for (name, expected) in [("base", "name_is_base_model"), ("../x", "invalid_value"), ("", "invalid_value")] {
        let settings = AdapterSettings { base_names: vec!["base".into()], ..AdapterSettings::default() };
        assert_eq!(code(&World::with(settings).load(name, "acme/sql").await), expected);
    }
}

#[tokio::test]
async fn an_identical_load_joins_and_another_one_finds_the_name_taken() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    world.upstream.slow.store(30, Ordering::SeqCst);
    let (one, two, other) =
        tokio::join!(world.load("sql", "acme/sql"), world.load("sql", "acme/sql"), world.load("sql", "acme/other"));
    assert_eq!((code(&one), code(&two), code(&other)), ("served", "served", "adapter_exists"));
    assert_eq!((world.upstream.questions(), world.upstream.fetches()), (1, 1));
}

#[tokio::test]
async fn an_unloaded_adapter_is_gone_and_its_memory_free_when_its_requests_end() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    world.load("sql", "acme/sql").await.unwrap();
    world.load("again", "acme/sql").await.unwrap();
    let (running, content) = (world.resolve("sql").await.unwrap(), content_of("hub:acme/sql@1"));
    world.unload("sql").await.unwrap();
    assert_eq!(code(&world.resolve("sql").await), "model_not_found");
    assert_eq!(code(&world.unload("sql").await), "model_not_found");
    drop(running);
    assert!(world.engine.knows(&content), "another name stands for it");
    let running = world.resolve("again").await.unwrap();
    let ask = |mode, purge| UnloadAsk { name: "again".into(), namespace: String::new(), mode, purge };
    world.registry.unload(ask(ForgetMode::Drain, true)).await.unwrap();
    assert!(world.upstream.here.lock().unwrap().is_empty(), "purged");
    assert!(world.engine.knows(&content));
    drop(running);
    assert_eq!(*world.engine.forgotten.lock().unwrap(), [(content, ForgetMode::Drain)]);
    world.load("again", "acme/sql").await.unwrap();
    let running = world.resolve("again").await.unwrap();
    world.registry.unload(ask(ForgetMode::Now, false)).await.unwrap();
    assert_eq!(world.engine.forgotten.lock().unwrap().last(), Some(&(content, ForgetMode::Now)));
    drop(running);
    assert_eq!(world.engine.forgotten.lock().unwrap().len(), 2, "not twice");
    world.registry.names().assert_consistent();
}

#[tokio::test]
async fn a_request_that_waited_through_an_unload_is_not_served() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    world.upstream.slow.store(50, Ordering::SeqCst);
    let loading = tokio::spawn({
        let (registry, ask) = (world.registry.clone(), world.ask("sql", "acme/sql"));
        async move { registry.load(ask).await }
    });
    tokio::task::yield_now().await;
    let waiting = tokio::spawn({
        let registry = world.registry.clone();
        async move { registry.resolve(&Caller::default(), &Ask::plain("sql", LONG)).await }
    });
    for _ in 0..5 {
        tokio::task::yield_now().await;
    }
    world.unload("sql").await.unwrap();
    assert_eq!(code(&waiting.await.unwrap()), "model_not_found");
    assert_eq!(code(&loading.await.unwrap()), "adapter_load_failed");
    world.settle().await;
    assert!(world.registry.get("", "sql").is_none());
}

#[tokio::test]
async fn a_request_that_waited_for_evicted_bytes_through_an_unload_is_not_served() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    world.load("sql", "acme/sql").await.unwrap();
    world.upstream.here.lock().unwrap().clear();
    world.engine.set_tier(Tier::Disk);
    world.upstream.slow.store(50, Ordering::SeqCst);
    let waiting = tokio::spawn({
        let registry = world.registry.clone();
        async move { registry.resolve(&Caller::default(), &Ask::plain("sql", LONG)).await }
    });
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.upstream.fetches(), 2, "its bytes are on their way");
    world.unload("sql").await.unwrap();
    assert_eq!(code(&waiting.await.unwrap()), "model_not_found");
}

#[test]
fn a_content_that_was_forgotten_after_a_load_asked_for_it_is_asked_for_again() {
    let engine = Arc::<Engine>::default();
    let holds = holds::Holds::new(engine.clone());
    let content = ContentId([7; 32]);
    let asked_at = holds.moment();
    let first = holds.take(content, asked_at).unwrap();
    let second = holds.take(content, asked_at).unwrap();
    drop(first);
    assert!(engine.forgotten.lock().unwrap().is_empty(), "somebody holds it");
    drop(second);
    assert_eq!(*engine.forgotten.lock().unwrap(), [(content, ForgetMode::Drain)]);
    assert!(holds.take(content, asked_at).is_none(), "the engine said so before it was told to forget");
    let again = holds.take(content, holds.moment()).unwrap();
    holds.forget_now(content);
    holds.forget_now(content);
    drop(again);
    assert_eq!(engine.forgotten.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn an_explicit_load_ends_the_pause_of_the_one_it_joins() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    world.upstream.fetch_fails.lock().unwrap().extend((0..20).map(|_| refused()));
    let load = |wait: u64| {
        let ask = LoadAsk { wait: Wait::Until(Duration::from_secs(wait)), keep: true, ..world.ask("sql", "acme/sql") };
        let registry = world.registry.clone();
        tokio::spawn(async move { registry.load(ask).await })
    };
    let first = load(1);
    for pause in [1, 3, 5, 10, 20, 40] {
        moved(&world, pause).await;
    }
    assert_eq!(code(&first.await.unwrap()), "adapter_load_failed");
    // The circuit is open.
    let tried = world.upstream.fetches();
    assert_eq!(tried, 6);
    let young = load(1);
    world.settle().await;
    assert_eq!((code(&young.await.unwrap()), world.upstream.fetches()), ("adapter_load_failed", tried), "too often");
    moved(&world, 5).await;
    let again = load(1);
    world.settle().await;
    assert_eq!((code(&again.await.unwrap()), world.upstream.fetches()), ("adapter_load_failed", tried + 1));
    // Only the pause was ended: the circuit is open still.
    moved(&world, 200).await;
    assert_eq!(world.upstream.fetches(), tried + 1);
    world.upstream.fetch_fails.lock().unwrap().clear();
    let repaired = load(1);
    world.settle().await;
    assert_eq!(repaired.await.unwrap().unwrap().state, AdapterState::Ready);
    assert_eq!(world.upstream.fetches(), tried + 2);
}
