//! What arrives, how it goes on after a break, and what is refused.

use super::*;

const BYTES: usize = 50_000;

async fn expect_error(world: &World, resolved: &Resolved) -> FetchError {
    let error = world.fetch(resolved).await.expect_err("it should fail");
    assert!(world.store.get(&resolved.identity).is_none());
    world.assert_clean();
    error
}

#[tokio::test]
async fn both_files_arrive_whole_and_nobody_else_may_read_them() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new();
    let resolved = world.source.add("a", BYTES, Promise::Sha256);
    let progress = Progress::default();
    let stored = world.fetcher.fetch(&resolved, &Credential::Anonymous, 7, &progress).await.unwrap();
    assert_is(&stored, "a", BYTES);
    let total = stored.bytes;
    assert_eq!(progress.now(), ProgressNow { phase: Phase::Stored, bytes_done: total, bytes_total: total });
    for path in tree(&world.dir.path().join("store")) {
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{path:?}");
        let folder = std::fs::metadata(path.parent().unwrap()).unwrap();
        assert_eq!(folder.permissions().mode() & 0o777, 0o700, "{path:?}");
    }
    assert_eq!(world.store.tenant_bytes(7), total);
    world.fetch(&resolved).await.unwrap();
    assert_eq!(world.source.opens.lock().unwrap().len(), 2, "the second fetch is the store's");
    world.assert_clean();
}

#[tokio::test]
async fn a_break_is_bridged_from_where_it_was() {
    let world = World::new();
    for (promise, second) in [(Promise::Sha256, 20_000), (Promise::Etag, 20_000)] {
        for act in [Act::BreakAfter(20_000), Act::EndAfter(20_000)] {
            let resolved = world.source.add("a", BYTES, promise);
            world.source.opens.lock().unwrap().clear();
            world.source.act(&resolved, FileName::Weights, [act]);
            let progress = Progress::default();
            let stored = world.fetcher.fetch(&resolved, &Credential::Server, 0, &progress).await.unwrap();
            assert_is(&stored, "a", BYTES);
            assert_eq!(progress.now().bytes_done, progress.now().bytes_total);
            assert_eq!(world.source.offsets(FileName::Weights), [0, second]);
            drop(stored);
            assert!(world.fetcher.forget(&resolved.identity).await > BYTES as u64);
            world.assert_clean();
        }
    }
}

#[tokio::test]
async fn a_later_fetch_goes_on_where_the_source_promises_the_same_bytes() {
    let goes_on = [0, 10_000, 20_000, 30_000];
    for (promise, offsets) in [(Promise::Sha256, goes_on), (Promise::Etag, goes_on), (Promise::Nothing, [0; 4])] {
        let world = World::new();
        let resolved = world.source.add("a", BYTES, promise);
        world.source.act(&resolved, FileName::Weights, [10_000; 3].map(Act::BreakAfter));
        let error = expect_error(&world, &resolved).await;
        assert!(error.retryable() && error.code() == "adapter_load_failed", "{error}");
        let stored = world.fetch(&resolved).await.unwrap();
        assert_is(&stored, "a", BYTES);
        assert_eq!(world.source.offsets(FileName::Weights), offsets);
        world.assert_clean();
    }
}

#[tokio::test]
async fn a_partial_of_other_bytes_is_thrown_away() {
    let world = World::new();
    let resolved = world.source.add("a", BYTES, Promise::Etag);
    world.source.act(&resolved, FileName::Weights, [10_000; 3].map(Act::BreakAfter));
    expect_error(&world, &resolved).await;
    let mut changed = resolved.clone();
    let Origin::Remote(files) = &mut changed.origin else { unreachable!() };
    files[1].etag = Some("\"another\"".into());
    assert_is(&world.fetch(&changed).await.unwrap(), "a", BYTES);
    assert_eq!(world.source.offsets(FileName::Weights).last(), Some(&0));
    world.assert_clean();
}

#[tokio::test]
async fn a_source_without_ranges_is_asked_from_the_start() {
    let world = World::new();
    let resolved = world.source.add("a", BYTES, Promise::Sha256);
    world.source.act(&resolved, FileName::Weights, [Act::BreakAfter(10_000), Act::NoRange]);
    let progress = Progress::default();
    let stored = world.fetcher.fetch(&resolved, &Credential::Server, 0, &progress).await.unwrap();
    assert_is(&stored, "a", BYTES);
    assert_eq!(world.source.offsets(FileName::Weights), [0, 10_000, 0]);
    assert_eq!(progress.now().bytes_done, progress.now().bytes_total);
}

#[tokio::test]
async fn wrong_bytes_are_asked_for_once_more_and_then_refused() {
    let with_hash = [Act::Flip(0), Act::Flip(BYTES - 1), Act::Longer].map(|act| (act, Promise::Sha256, BYTES));
    // The byte too many comes in a chunk of its own, or in the last one.
    let without = [(Act::Longer, Promise::Etag, BYTES), (Act::Longer, Promise::Nothing, BYTES + 1)];
    for (act, promise, bytes) in with_hash.into_iter().chain(without) {
        let world = World::new();
        let resolved = world.source.add("a", bytes, promise);
        world.source.act(&resolved, FileName::Weights, [act.clone()]);
        assert_is(&world.fetch(&resolved).await.unwrap(), "a", bytes);

        let resolved = world.source.add("b", bytes, promise);
        world.source.act(&resolved, FileName::Weights, [act.clone(), act.clone()]);
        let error = expect_error(&world, &resolved).await;
        assert!(matches!(error, FetchError::Corrupt { .. }) && error.retryable(), "{error}");
        world.source.act(&resolved, FileName::Weights, [act.clone(), act.clone()]);
        let error = expect_error(&world, &resolved).await;
        assert_eq!((error.code(), error.retryable()), ("adapter_invalid", false), "nobody should try a third time");
        assert_is(&world.fetch(&resolved).await.unwrap(), "b", bytes);
    }
}

#[tokio::test]
async fn an_identity_keeps_its_bytes_even_where_the_source_promises_nothing() {
    let world = World::new();
    let resolved = world.source.add("a", BYTES, Promise::Nothing);
    drop(world.fetch(&resolved).await.unwrap());
    world.store.quarantine(&resolved.identity);
    world.source.act(&resolved, FileName::Weights, [Act::Flip(9), Act::Flip(9)]);
    let error = expect_error(&world, &resolved).await;
    assert!(matches!(error, FetchError::Corrupt { .. }), "{error}");
    assert_is(&world.fetch(&resolved).await.unwrap(), "a", BYTES);
    world.fetcher.forget(&resolved.identity).await;
    world.source.act(&resolved, FileName::Weights, [Act::Flip(9), Act::Flip(9)]);
    world.fetch(&resolved).await.expect("once forgotten it may be anything");
}

#[tokio::test]
async fn damaged_files_are_replaced_although_somebody_holds_them() {
    let world = World::new();
    let resolved = world.source.add("a", BYTES, Promise::Sha256);
    let held = world.fetch(&resolved).await.unwrap();
    let path = held.dir().join(FileName::Weights.as_str());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[9] ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    assert!(!world.fetcher.verify(&resolved.identity).await);
    assert!(world.store.get(&resolved.identity).is_none(), "nobody gets them any more");
    let again = world.fetch(&resolved).await.unwrap();
    assert_is(&again, "a", BYTES);
    assert_is(&held, "a", BYTES);
    assert!(world.fetcher.verify(&resolved.identity).await);
    let bytes = again.bytes;
    drop((held, again));
    world.store.sweep();
    assert_is(&world.store.get(&resolved.identity).unwrap(), "a", BYTES);
    assert_eq!((world.store.bytes(), world.store.status().reserved_bytes), (bytes, 0));
}

#[tokio::test]
async fn what_is_too_large_is_never_asked_for() {
    let world = World::with(FetchLimits { weights_bytes_max: 1000, config_bytes_max: 100, ..limits() }, 1 << 30);
    let error = expect_error(&world, &world.source.add("a", 1001, Promise::Sha256)).await;
    assert_eq!((error.code(), error.retryable()), ("adapter_too_large", false));
    let error = expect_error(&world, &world.source.add(&"n".repeat(100), 10, Promise::Sha256)).await;
    assert!(error.to_string().contains("adapter_config.json has 120 bytes; this server takes up to 100"), "{error}");
    assert!(world.source.opens.lock().unwrap().is_empty());

    let world = World::with(limits(), 10_000);
    let error = expect_error(&world, &world.source.add("a", 10_001, Promise::Sha256)).await;
    assert_eq!((error.code(), error.retryable()), ("adapter_too_large", false));
    assert!(error.to_string().contains("--adapter-disk-quota"), "{error}");
}

#[tokio::test]
async fn a_source_that_asks_for_patience_is_not_asked_again_at_once() {
    let world = World::new();
    let resolved = world.source.add("a", BYTES, Promise::Sha256);
    let pause = Some(Duration::from_secs(17));
    let busy = SourceError::Retryable { message: "429".into(), retry_after: pause, detail: None };
    world.source.act(&resolved, FileName::Config, [Act::Refuse(busy)]);
    let error = expect_error(&world, &resolved).await;
    assert_eq!(error.retry_after(), pause);
    assert_eq!(world.source.offsets(FileName::Config).len(), 1);
}

#[tokio::test]
async fn a_flipped_bit_on_disk_is_found_and_downloaded_again() {
    for (file, at) in
        [("adapter_config.json", 3), ("adapter_model.safetensors", 0), ("adapter_model.safetensors", BYTES - 1)]
    {
        let world = World::new();
        let resolved = world.source.add("a", BYTES, Promise::Etag);
        let stored = world.fetch(&resolved).await.unwrap();
        assert!(world.fetcher.verify(&resolved.identity).await);
        let path = stored.dir().join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(!world.fetcher.verify(&resolved.identity).await);
        drop(stored);
        assert!(world.store.get(&resolved.identity).is_none());
        world.assert_clean();
        assert_is(&world.fetch(&resolved).await.unwrap(), "a", BYTES);
        assert!(world.fetcher.verify(&resolved.identity).await);
    }
}
