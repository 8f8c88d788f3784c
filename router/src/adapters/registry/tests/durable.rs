use super::*;

fn settings(dir: &std::path::Path) -> AdapterSettings {
    AdapterSettings { data_dir: Some(dir.to_owned()), ..AdapterSettings::default() }
}

/// The same disk and upstream, another process.
async fn restart(world: World, settings: AdapterSettings) -> World {
    let (upstream, clock, inner) = (world.upstream.clone(), world.clock.clone(), Arc::downgrade(&world.registry.inner));
    drop(world);
    // A load may still write what it did.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while inner.strong_count() > 0 {
        assert!(std::time::Instant::now() < deadline, "something holds the registry");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    World::over(settings, upstream, clock)
}

#[tokio::test]
async fn registrations_and_aliases_come_back_without_the_network() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::with(settings(dir.path()));
    world.upstream.public("acme/sql", 1);
    let ask =
        LoadAsk { scale: Some(0.5), pinned: Some(true), namespace: "team".into(), ..world.ask("sql", "acme/sql") };
    world.registry.load(ask.clone()).await.unwrap();
    world.upstream.public("acme/sql", 2);
    let before = world.registry.load(LoadAsk { in_place: true, ..ask }).await.unwrap();
    world.load("gone", "acme/sql").await.unwrap();
    world.unload("gone").await.unwrap();
    let versions = vec![Weighted { adapter: "sql".into(), weight: 1.0 }];
    let alias = AliasAsk {
        name: "main".into(),
        namespace: "team".into(),
        versions,
        sticky_by: StickyBy::Key,
        expected_version: None,
    };
    let alias = world.registry.set_alias(alias).await.unwrap();

    let world = restart(world, settings(dir.path())).await;
    *world.upstream.down.lock().unwrap() = Some(SourceError::retryable("no network"));
    let after = world.registry.get("team", "sql").unwrap();
    assert_eq!((after.generation, after.scale, after.pinned, after.created), (2, 0.5, true, before.created));
    assert_eq!(
        (after.content_id, after.revision, after.state),
        (before.content_id, before.revision, AdapterState::Ready)
    );
    assert!(world.registry.get("", "gone").is_none());
    assert_eq!(world.registry.alias("team", "main").unwrap(), alias);
    assert!(!world.registry.is_ready(), "a pinned one is not loaded yet");
    world.registry.preload();
    world.settle().await;
    assert!(world.registry.is_ready());
    assert_eq!(world.engine.pins.lock().unwrap().len(), 1);
    let served = world.registry.resolve(&caller("team", None), &Ask::plain("main", LONG)).await.unwrap();
    assert_eq!((served.prepared.content, served.scale), (content_of("hub:acme/sql@2"), 0.5));
    assert_eq!(world.upstream.questions(), 3, "nobody was asked since the restart");
}

#[tokio::test]
async fn bytes_that_are_gone_are_fetched_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::with(settings(dir.path()));
    world.upstream.public("acme/sql", 1);
    world.load("sql", "acme/sql").await.unwrap();
    world.upstream.here.lock().unwrap().clear();
    let world = restart(world, settings(dir.path())).await;
    assert_eq!(world.registry.get("", "sql").unwrap().state, AdapterState::Registered);
    assert!(world.registry.cards(&Caller::default()).1.is_empty(), "not usable yet");
    world.resolve("sql").await.unwrap();
    assert_eq!(world.upstream.fetches(), 2);
}

#[tokio::test]
async fn a_credential_is_never_written_and_is_needed_again() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::with(settings(dir.path()));
    let canary = "hf_canary_0123456789";
    world.upstream.put("acme/sql", Repo { commit: 1, tokens: [canary.to_owned()].into(), ..Repo::default() });
    let credential = Credential::Token(SecretString::from(canary.to_owned()));
    let view = world.registry.load(LoadAsk { credential, ..world.ask("sql", "acme/sql") }).await.unwrap();
    assert!(view.own_credential);
    let served = world.resolve("sql").await.unwrap();
    assert!(!format!("{served:?} {view:?}").contains(canary));
    let world = restart(world, settings(dir.path())).await;
    let file = std::fs::read(dir.path().join("registry.redb")).unwrap();
    assert!(!file.windows(canary.len()).any(|window| window == canary.as_bytes()));
    assert!(world.registry.get("", "sql").unwrap().own_credential);
    world.resolve("sql").await.unwrap(); // its bytes are here
    world.engine.set_tier(Tier::Disk);
    let file = world.upstream.here.lock().unwrap().pop_first().unwrap();
    assert!(world.resolve("sql").await.unwrap_err().message.contains("credential"));
    world.upstream.here.lock().unwrap().insert(file);
    world.upstream.here.lock().unwrap().clear();
    let world = restart(world, settings(dir.path())).await;
    let failed = world.resolve("sql").await.unwrap_err();
    assert!(failed.message.contains("credential"), "{failed:?}");
    let credential = Credential::Token(SecretString::from(canary.to_owned()));
    world.clock.advance(Duration::from_secs(6));
    world.registry.load(LoadAsk { credential, ..world.ask("sql", "acme/sql") }).await.unwrap();
    world.resolve("sql").await.unwrap();
}

#[tokio::test]
async fn the_command_line_has_the_last_word() {
    let dir = tempfile::tempdir().unwrap();
    let flag = |reference: &str| {
        let reference = AdapterRef::parse(reference).unwrap();
        AdapterSettings { registered: vec![("sql".into(), reference)], ..settings(dir.path()) }
    };
    let world = World::with(flag("acme/one"));
    world.upstream.public("acme/one", 1);
    world.upstream.public("acme/two", 2);
    assert!(!world.registry.is_ready());
    assert_eq!(world.registry.waiting_for(), [("sql".to_owned(), None)]);
    world.registry.preload();
    world.settle().await;
    assert!(world.registry.is_ready());
    let world = restart(world, flag("acme/one")).await;
    *world.upstream.down.lock().unwrap() = Some(SourceError::retryable("no network"));
    assert_eq!(&*world.resolve("sql").await.unwrap().revision, "1", "known since the last run");
    *world.upstream.down.lock().unwrap() = None;
    let world = restart(world, flag("acme/two")).await;
    assert_eq!(&*world.resolve("sql").await.unwrap().revision, "2");
    let world = restart(world, settings(dir.path())).await;
    assert!(world.registry.get("", "sql").is_none(), "its flag is gone");
}

#[tokio::test]
async fn the_server_is_not_ready_while_a_required_adapter_cannot_be_loaded_and_says_why() {
    let registered = vec![("sql".to_owned(), AdapterRef::parse("acme/none").unwrap())];
    let world = World::with(AdapterSettings { registered, ..AdapterSettings::default() });
    world.registry.preload();
    world.settle().await;
    assert!(!world.registry.is_ready());
    assert!(world.registry.waiting_for()[0].1.is_some());
    world.upstream.public("acme/none", 1);
    world.clock.advance(Duration::from_secs(6));
    world.registry.load(LoadAsk { in_place: true, ..world.ask("sql", "acme/none") }).await.unwrap();
    assert!(world.registry.is_ready());
}

#[tokio::test]
async fn a_pinned_adapter_of_the_last_run_that_is_gone_does_not_hold_the_others_up() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::with(settings(dir.path()));
    world.upstream.public("acme/sql", 1);
    world.registry.load(LoadAsk { pinned: Some(true), ..world.ask("sql", "acme/sql") }).await.unwrap();
    world.upstream.repos.lock().unwrap().clear();
    world.upstream.here.lock().unwrap().clear();
    let world = restart(world, settings(dir.path())).await;
    assert!(!world.registry.is_ready());
    world.registry.preload();
    world.settle().await;
    assert!(world.registry.is_ready() && world.registry.waiting_for().is_empty());
    let view = world.registry.get("", "sql").unwrap();
    assert!(view.pinned && view.error.is_some(), "it stays, and says why");
    assert!(world.resolve("sql").await.is_err());
}

#[tokio::test]
async fn two_servers_do_not_share_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let _one = World::with(settings(dir.path()));
    let second = Registry::open(settings(dir.path()), Arc::<Engine>::default(), None);
    let error = second.err().unwrap().to_string();
    assert!(error.contains("registry.redb") && error.contains("--data-dir"), "{error}");
}
