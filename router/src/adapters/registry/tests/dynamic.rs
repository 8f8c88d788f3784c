use super::*;

#[tokio::test]
async fn ten_thousand_first_requests_make_one_question_one_download_and_one_load() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    world.upstream.slow.store(20, Ordering::SeqCst);
    let all = (0..10_000).map(|_| world.resolve("hf://acme/sql"));
    let all = futures_util::future::join_all(all).await;
    assert!(all.iter().all(|one| one.as_ref().unwrap().prepared.content == content_of("hub:acme/sql@1")));
    let counts = (world.upstream.questions(), world.upstream.fetches(), world.engine.prepares.load(Ordering::SeqCst));
    assert_eq!(counts, (1, 1, 1));
}

#[tokio::test]
async fn an_upstream_that_is_down_says_no_more_than_that() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    world.resolve("acme/sql").await.unwrap();
    let down =
        SourceError::Retryable { message: "refused".into(), retry_after: Some(Duration::from_secs(3)), detail: None };
    *world.upstream.down.lock().unwrap() = Some(down);
    world.clock.advance(Duration::from_secs(59));
    world.resolve("acme/sql").await.unwrap();
    world.clock.advance(Duration::from_secs(2));
    for name in ["acme/sql", "acme/other"] {
        let failure = world.resolve(name).await.unwrap_err();
        assert_eq!(
            (failure.code.as_str(), failure.retry_after),
            ("adapter_auth_unavailable", Some(Duration::from_secs(3)))
        );
    }
    let asked = world.upstream.questions();
    world.resolve("acme/sql").await.unwrap_err();
    assert_eq!(world.upstream.questions(), asked, "it is left alone for a while");
    *world.upstream.down.lock().unwrap() = None;
    world.clock.advance(Duration::from_secs(4));
    world.resolve("acme/sql").await.unwrap();
    assert_eq!(world.upstream.fetches(), 1);
}

#[tokio::test]
async fn a_branch_is_looked_up_once_a_minute_and_a_no_for_five_seconds() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    assert_eq!(&*world.resolve("acme/sql").await.unwrap().revision, "1");
    world.upstream.public("acme/sql", 2);
    world.clock.advance(Duration::from_secs(59));
    assert_eq!(&*world.resolve("acme/sql").await.unwrap().revision, "1");
    world.clock.advance(Duration::from_secs(2));
    assert_eq!(&*world.resolve("acme/sql").await.unwrap().revision, "2");
    assert_eq!(&*world.resolve("acme/sql@1").await.unwrap().revision, "1");
    assert_eq!(code(&world.resolve("acme/new").await), "model_not_found");
    world.upstream.public("acme/new", 1);
    assert_eq!(code(&world.resolve("acme/new").await), "model_not_found");
    world.clock.advance(Duration::from_secs(6));
    world.resolve("acme/new").await.unwrap();
}

#[tokio::test]
async fn bare_names_are_looked_for_in_the_operators_places_in_order() {
    let settings = AdapterSettings {
        source_prefixes: vec!["s3://first/loras/".into(), "s3://second".into()],
        ..AdapterSettings::default()
    };
    let world = World::with(settings);
    let private = |commit| Repo { commit, server_may: true, ..Repo::default() };
    world.upstream.put("first/loras/a", private(1));
    world.upstream.put("second/a", private(2));
    world.upstream.put("second/b", private(3));
    world.upstream.put("elsewhere/b", private(4));
    assert_eq!(&*world.resolve("a").await.unwrap().revision, "1");
    assert_eq!(&*world.resolve("b").await.unwrap().revision, "3");
    assert_eq!(&*world.resolve("s3://second/b").await.unwrap().revision, "3");
    for name in ["c", "s3://elsewhere/b", "s3://second", "s3://secondary/b", "..", "a/../b", ""] {
        assert_eq!(code(&world.resolve(name).await), "model_not_found", "{name}");
    }
    let asked = world.upstream.asked.lock().unwrap().clone();
    assert!(
        asked.iter().all(|(of, who)| (who == "server") == (of.contains("//first") || of.contains("//second/"))),
        "{asked:?}"
    );
}

#[tokio::test]
async fn keys_and_the_operator_limit_what_may_be_named() {
    let glob = globset::GlobSetBuilder::new().add(globset::Glob::new("hf://acme/*").unwrap()).build().unwrap();
    let world = World::with(AdapterSettings { allowed: Some(glob), ..AdapterSettings::default() });
    for name in ["acme/a", "other/a", "acme/b"] {
        world.upstream.public(name, 1);
    }
    let as_key = |globs: Option<&'static [&'static str]>, sources: Option<Vec<SourceKind>>| {
        let mut key = caller("", globs);
        key.policy = KeyPolicy { sources, adapters: key.policy.adapters.clone(), ..KeyPolicy::default() }.into();
        key
    };
    for (key, name, expected) in [
        (as_key(None, None), "acme/a", "served"),
        (as_key(None, None), "other/a", "model_not_found"),
        (as_key(None, Some(vec![SourceKind::S3])), "acme/a", "source_forbidden"),
        (as_key(None, Some(vec![SourceKind::S3])), "acme/nothing", "source_forbidden"),
        (as_key(Some(&["acme/a"]), None), "acme/a", "served"),
        (as_key(Some(&["hf://acme/a"]), None), "acme/a", "served"),
        (as_key(Some(&["acme/a"]), None), "acme/b", "model_not_found"),
        (as_key(Some(&[]), None), "acme/a", "model_not_found"),
    ] {
        let before = world.upstream.questions();
        let answer = world.registry.resolve(&key, &Ask::plain(name, LONG)).await;
        assert_eq!(code(&answer), expected, "{name} {:?}", key.policy);
        assert!(expected == "served" || world.upstream.questions() == before, "nobody is asked about {name}");
    }
    let elsewhere = Ask { source: Some(SourceKind::S3), ..Ask::plain("acme/a", LONG) };
    let before = world.upstream.questions();
    let answer = world.registry.resolve(&as_key(Some(&["acme/*"]), None), &elsewhere).await;
    assert_eq!(code(&answer), "model_not_found", "the key's `acme/*` is the hub's");
    assert_eq!(world.upstream.questions(), before, "bucket `acme` may be anybody's");
}

#[tokio::test]
async fn what_nobody_uses_is_forgotten_and_what_somebody_uses_is_not() {
    let world = World::new();
    world.upstream.public("acme/held", 1);
    let held = world.resolve("acme/held").await.unwrap();
    for i in 0..table::UNNAMED_MAX + 1000 {
        let name = format!("acme/a{i}");
        world.upstream.public(&name, 1);
        world.resolve(&name).await.unwrap();
        world.clock.advance(Duration::from_millis(10));
    }
    let known = world.engine.known.lock().unwrap().len();
    assert!((table::UNNAMED_MAX / 2..=table::UNNAMED_MAX).contains(&known), "{known}");
    assert!(world.engine.knows(&held.prepared.content), "a request holds it");
    let fetches = world.upstream.fetches();
    world.resolve("acme/a0").await.unwrap();
    assert_eq!(world.upstream.fetches(), fetches, "its bytes are on disk still");
}

#[tokio::test]
async fn bytes_that_were_evicted_and_contents_the_engine_forgot_come_back() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    let content = world.resolve("acme/sql").await.unwrap().prepared.content;
    world.clock.advance(Duration::from_secs(5));
    world.upstream.here.lock().unwrap().clear();
    world.resolve("acme/sql").await.unwrap();
    assert_eq!(world.upstream.fetches(), 1, "it is in host memory");
    world.engine.set_tier(Tier::Disk);
    world.resolve("acme/sql").await.unwrap();
    assert_eq!(world.upstream.fetches(), 2);
    world.clock.advance(Duration::from_secs(5));
    world.upstream.public("acme/other", 1);
    world.resolve("acme/other").await.unwrap();
    Arc::make_mut(&mut world.engine.known.lock().unwrap()).remove(&content);
    world.resolve("acme/sql").await.unwrap();
    assert!(world.engine.knows(&content));
    assert_eq!(world.upstream.fetches(), 3, "one for the other");
}

#[tokio::test]
async fn one_callers_refusal_is_not_anothers() {
    let world = World::new();
    let tokens = ["a".to_owned(), "b".to_owned()];
    world.upstream.put("acme/sql", Repo { commit: 1, tokens: tokens.into(), ..Repo::default() });
    // The first download fails for its caller: the token was revoked between question and download.
    world.upstream.fetch_fails.lock().unwrap().push(FetchError::Source(SourceError::Absent));
    world.upstream.slow.store(10, Ordering::SeqCst);
    let (first, second) = tokio::join!(world.resolve_with("acme/sql", "a"), world.resolve_with("acme/sql", "b"));
    let mut codes = [code(&first), code(&second)];
    codes.sort_unstable();
    assert_eq!(codes, ["model_not_found", "served"]);
}

#[tokio::test]
async fn what_one_token_is_told_to_wait_is_not_told_to_another() {
    let world = World::new();
    let tokens = ["a".to_owned(), "b".to_owned()];
    world.upstream.put("acme/sql", Repo { commit: 1, tokens: tokens.into(), ..Repo::default() });
    let limited = SourceError::Retryable {
        message: "the source answered with status 429".into(),
        retry_after: Some(Duration::from_secs(600)),
        detail: None,
    };
    world.upstream.fetch_fails.lock().unwrap().push(FetchError::Source(limited));
    let first = world.resolve_with("acme/sql", "a").await.unwrap_err();
    assert_eq!((first.code.as_str(), first.retry_after), ("adapter_load_failed", Some(Duration::from_secs(600))));
    assert_eq!(code(&world.resolve_with("acme/sql", "b").await), "served", "its own token may ask");
    assert_eq!(code(&world.resolve_with("acme/sql", "a").await), "served", "and then the bytes are here");
}

#[tokio::test]
async fn a_merge_is_made_once_and_only_of_what_the_caller_may_use() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::with(AdapterSettings { data_dir: Some(dir.path().into()), ..AdapterSettings::default() });
    world.upstream.public("acme/a", 1);
    world.upstream.put("acme/b", Repo { commit: 1, tokens: ["t".to_owned()].into(), ..Repo::default() });
    let spec = MergeSpec {
        ids: vec!["acme/a".into(), "acme/b".into()],
        weights: vec![0.5, 0.25],
        strategy: crate::engine::MergeStrategy::Linear,
        density: None,
        sign: Default::default(),
    };
    let merged = world.registry.merge(&Caller::default(), &spec, &Ask::plain("", LONG)).await;
    assert_eq!(code(&merged), "model_not_found", "acme/b is private");
    for repo in ["acme/a", "acme/b"] {
        world.upstream.put(repo, Repo { commit: 1, tokens: ["t".to_owned()].into(), ..Repo::default() });
    }
    let token = SecretString::from("t".to_owned());
    let ask = Ask { token: Some(&token), ..Ask::plain("", LONG) };
    let first = world.registry.merge(&Caller::default(), &spec, &ask).await.unwrap();
    assert_eq!(first.source, SourceKind::Merge);
    let prepares = world.engine.prepares.load(Ordering::SeqCst);
    let again = world.registry.merge(&Caller::default(), &spec, &ask).await.unwrap();
    assert_eq!(
        (again.prepared.content, world.engine.prepares.load(Ordering::SeqCst)),
        (first.prepared.content, prepares)
    );
    let other = MergeSpec { weights: vec![0.5, 0.5], ..spec.clone() };
    let other = world.registry.merge(&Caller::default(), &other, &ask).await.unwrap();
    assert_ne!(other.prepared.content, first.prepared.content);
    let bad = MergeSpec { strategy: crate::engine::MergeStrategy::Ties, ..spec };
    assert_eq!(code(&world.registry.merge(&Caller::default(), &bad, &ask).await), "invalid_value");
    let on_disk = || std::fs::read_dir(dir.path().join("merged")).unwrap().count();
    assert_eq!(on_disk(), 2);
    *world.engine.bad.lock().unwrap() = Some((".part".into(), failure("adapter_unsupported", "it has a bias".into())));
    for weight in [0.1, 0.2] {
        let refused = MergeSpec { weights: vec![weight, 1.0], ..bad.clone() };
        let refused = MergeSpec { strategy: crate::engine::MergeStrategy::Linear, ..refused };
        assert_eq!(code(&world.registry.merge(&Caller::default(), &refused, &ask).await), "adapter_unsupported");
    }
    assert_eq!(on_disk(), 2, "what cannot be merged leaves no directory");
}

#[tokio::test]
async fn a_dry_run_leaves_nothing_behind() {
    let world = World::new();
    world.upstream.public("acme/sql", 7);
    let reference = AdapterRef::parse("acme/sql").unwrap();
    let (revision, report) = world.registry.validate(&reference, Credential::Server).await.unwrap();
    assert_eq!((revision.as_str(), report.tensors_matched), ("7", 3));
    assert!(world.upstream.here.lock().unwrap().is_empty());
    assert_eq!(world.engine.prepares.load(Ordering::SeqCst), 0);
    world.resolve("acme/sql").await.unwrap();
    world.registry.validate(&reference, Credential::Server).await.unwrap();
    assert_eq!(world.upstream.here.lock().unwrap().len(), 1, "what was there before stays");
    let gone = world.registry.validate(&AdapterRef::parse("acme/no").unwrap(), Credential::Server).await;
    assert_eq!(gone.unwrap_err().code, "model_not_found");
}

#[tokio::test]
async fn a_source_that_never_answers_holds_up_nobody_else() {
    let world = World::new();
    world.upstream.public("acme/sql", 1);
    *world.upstream.tarpit.lock().unwrap() = Some(SourceKind::S3);
    let fail = |name: String| {
        let registry = world.registry.clone();
        async move { registry.resolve(&Caller::default(), &Ask::plain(&name, Wait::Fail)).await }
    };
    for i in 0..100 {
        let ask = LoadAsk { wait: Wait::Fail, ..world.ask(&format!("s{i}"), &format!("s3://bucket/b{i}")) };
        assert_eq!(code(&world.registry.load(ask).await), "adapter_loading");
    }
    let mut under_way = 0;
    for i in 0..5000 {
        under_way += usize::from(code(&fail(format!("s3://bucket/a{i}")).await) == "adapter_loading");
    }
    assert!((4000..=4096).contains(&under_way), "{under_way} questions");
    world.settle().await;
    world.resolve("acme/sql").await.unwrap();
    world.load("sql", "acme/sql").await.unwrap();
    assert_eq!(world.registry.get("", "s0").unwrap().state, AdapterState::Resolving);
}
