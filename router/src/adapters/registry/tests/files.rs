//! Files that are gone, or are not what they were.

use super::*;

#[tokio::test]
async fn files_that_were_damaged_on_disk_are_fetched_again() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    world.load("sql", "acme/sql").await.unwrap();
    let good = content_of("hub:acme/sql@1");
    assert_eq!((world.upstream.fetches(), world.upstream.verified.load(Ordering::SeqCst)), (1, 0));
    // The engine dropped it, and a bit flips before it is read again.
    world.engine.set_tier(Tier::Disk);
    world.upstream.damaged.lock().unwrap().insert("hub:acme/sql@1".into());
    world.engine.misses(good);
    world.settle().await;
    assert_eq!((world.upstream.fetches(), world.upstream.verified.load(Ordering::SeqCst)), (2, 1));
    assert_eq!(world.resolve("sql").await.unwrap().prepared.content, good);
    assert!(world.engine.given_up.lock().unwrap().is_empty());
    // A file that is no adapter any more, too.
    world.upstream.damaged.lock().unwrap().insert("hub:acme/sql@1".into());
    *world.engine.bad.lock().unwrap() = Some(("damaged".into(), failure("adapter_invalid", "no header".into())));
    world.engine.misses(good);
    world.settle().await;
    assert_eq!((world.upstream.fetches(), world.resolve("sql").await.unwrap().prepared.content), (3, good));
}

#[tokio::test]
async fn a_bad_adapter_whose_files_are_what_was_downloaded_stays_refused() {
    let world = World::new();
    world.upstream.public("acme/bad", 1);
    world.upstream.here.lock().unwrap().insert("hub:acme/bad@1".into());
    *world.engine.bad.lock().unwrap() = Some(("bad@1".into(), failure("adapter_invalid", "it is broken".into())));
    assert_eq!(code(&world.resolve("acme/bad").await), "adapter_invalid");
    assert_eq!((world.upstream.fetches(), world.upstream.verified.load(Ordering::SeqCst)), (0, 1));
}

#[tokio::test]
async fn a_damaged_file_of_the_last_run_is_fetched_from_where_its_name_says() {
    let folder = tempfile::tempdir().unwrap();
    let settings = || AdapterSettings { data_dir: Some(folder.path().into()), ..AdapterSettings::default() };
    let (upstream, clock) = (Arc::<Upstream>::default(), Arc::<TestClock>::default());
    upstream.public("acme/sql", 1);
    let good = content_of("hub:acme/sql@1");
    for damage in [None, Some("other content"), Some("refused")] {
        let world = World::over(settings(), Arc::clone(&upstream), Arc::clone(&clock));
        let fetched = upstream.fetches();
        match damage {
            None => drop(world.load("sql", "acme/sql").await.unwrap()),
            Some(damage) => {
                upstream.damaged.lock().unwrap().insert("hub:acme/sql@1".into());
                if damage == "refused" {
                    let bad = failure("adapter_invalid", "no header".into());
                    *world.engine.bad.lock().unwrap() = Some(("damaged".into(), bad));
                }
            }
        }
        assert_eq!(world.resolve("sql").await.unwrap().prepared.content, good, "{damage:?}");
        assert_eq!(upstream.fetches(), fetched + 1, "{damage:?}");
        drop(world);
        // The database is closed by what still runs.
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn what_the_disk_quota_took_is_fetched_when_the_engine_needs_it() {
    let world = World::new();
    world.upstream.put("acme/mine", Repo { commit: 1, tokens: ["alice".to_owned()].into(), ..Repo::default() });
    world.upstream.public("acme/sql", 1);
    world.load("sql", "acme/sql").await.unwrap();
    let mine = world.resolve_with("acme/mine", "alice").await.unwrap();
    for (identity, fetches) in [("hub:acme/sql@1", 3), ("hub:acme/mine@1", 4)] {
        // It served from memory until now.
        world.upstream.here.lock().unwrap().clear();
        world.engine.misses(content_of(identity));
        world.engine.misses(content_of(identity)); // told twice, done once
        world.settle().await;
        assert_eq!(world.upstream.fetches(), fetches, "{identity}");
        assert_eq!(world.engine.known.lock().unwrap()[&content_of(identity)].tier, Tier::Host);
    }
    assert!(world.engine.given_up.lock().unwrap().is_empty());
    // With its last request goes the token, and with that the way to the files.
    let content = mine.prepared.content;
    drop(mine);
    world.upstream.here.lock().unwrap().clear();
    world.engine.misses(content);
    world.settle().await;
    assert_eq!(*world.engine.given_up.lock().unwrap(), [(content, "no such directory".to_owned())]);
}

#[tokio::test]
async fn what_cannot_be_fetched_again_is_given_up_in_time() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    world.load("sql", "acme/sql").await.unwrap();
    let content = content_of("hub:acme/sql@1");
    world.upstream.here.lock().unwrap().clear();
    let refused = || FetchError::Source(SourceError::retryable("connection refused"));
    world.upstream.fetch_fails.lock().unwrap().extend((0..50).map(|_| refused()));
    world.engine.misses(content);
    for _ in 0..40 {
        world.settle().await;
        world.clock.advance(Duration::from_secs(2));
    }
    world.settle().await;
    let given_up = world.engine.given_up.lock().unwrap().clone();
    assert_eq!(given_up.len(), 1, "{given_up:?}");
    assert!(given_up[0].1.contains("connection refused"), "{given_up:?}");
    world.upstream.fetch_fails.lock().unwrap().clear();
    world.clock.advance(Duration::from_secs(300));
    assert_eq!(world.resolve("sql").await.unwrap().prepared.content, content);
}
