use super::*;

#[tokio::test]
async fn a_namespace_comes_before_what_is_shared_and_is_nobody_elses() {
    let world = World::new();
    for (repo, commit) in [("acme/shared", 1), ("acme/own", 2)] {
        world.upstream.public(repo, commit);
    }
    world.load("sql", "acme/shared").await.unwrap();
    for name in ["sql", "mine"] {
        let ask = LoadAsk { namespace: "team".into(), ..world.ask(name, "acme/own") };
        world.registry.load(ask).await.unwrap();
    }
    let resolve = |caller: Caller, name: &'static str| {
        let registry = world.registry.clone();
        async move { registry.resolve(&caller, &Ask::plain(name, LONG)).await.map(|found| found.revision.to_string()) }
    };
    let (team, other) = (caller("team", None), caller("other", None));
    assert_eq!(resolve(team.clone(), "sql").await.unwrap(), "2");
    assert_eq!(resolve(other.clone(), "sql").await.unwrap(), "1");
    assert_eq!(resolve(team.clone(), "mine").await.unwrap(), "2");
    assert_eq!(code(&resolve(other.clone(), "mine").await), "model_not_found");
    let list = |caller: &Caller| {
        world.registry.cards(caller).1.iter().map(|card| (card.name.clone(), card.root.clone())).collect::<Vec<_>>()
    };
    let pair = |name: &str, root: &str| (name.to_owned(), root.to_owned());
    assert_eq!(list(&team), [pair("mine", "hf://acme/own"), pair("sql", "hf://acme/own")]);
    assert_eq!(list(&other), [pair("sql", "hf://acme/shared")]);
    assert_eq!(list(&caller("team", Some(&["m*"]))), [pair("mine", "hf://acme/own")]);
    assert!(world.registry.card(&other, "mine").is_none() && !world.registry.is_candidate(&other, "mine", None));
    // Its own source must agree, when the request names one.
    let ask = Ask { source: Some(SourceKind::S3), ..Ask::plain("sql", LONG) };
    assert_eq!(code(&world.registry.resolve(&other, &ask).await), "model_not_found");
}

#[tokio::test]
async fn an_alias_changes_in_one_step_by_version_and_rolls_back() {
    let world = World::new();
    for i in 1..=2 {
        world.upstream.public(&format!("acme/v{i}"), i);
        world.load(&format!("v{i}"), &format!("acme/v{i}")).await.unwrap();
    }
    let ask = |versions: &[(&str, f64)], expected_version| AliasAsk {
        name: "sql".into(),
        namespace: String::new(),
        versions: versions.iter().map(|(name, weight)| Weighted { adapter: (*name).into(), weight: *weight }).collect(),
        sticky_by: StickyBy::User,
        expected_version,
    };
    let registry = &world.registry;
    assert_eq!(code(&registry.set_alias(ask(&[("v3", 1.0)], None)).await), "invalid_value");
    assert_eq!(code(&registry.set_alias(ask(&[("v1", 0.0)], None)).await), "invalid_value");
    assert_eq!(code(&registry.rollback_alias("", "sql").await), "model_not_found");
    let hides = AliasAsk { name: "v2".into(), ..ask(&[("v1", 1.0)], None) };
    assert_eq!(code(&registry.set_alias(hides).await), "adapter_exists", "it would hide an adapter");
    assert_eq!(registry.set_alias(ask(&[("v1", 1.0)], Some(0))).await.unwrap().version, 1);
    assert_eq!(code(&registry.rollback_alias("", "sql").await), "precondition_failed");
    assert_eq!(code(&registry.set_alias(ask(&[("v2", 1.0)], Some(0))).await), "precondition_failed");
    assert_eq!(&*world.resolve("sql").await.unwrap().revision, "1");
    assert_eq!(world.resolve("sql").await.unwrap().name, "v1");
    assert_eq!(registry.set_alias(ask(&[("v1", 1.0), ("v2", 3.0)], Some(1))).await.unwrap().version, 2);
    let mut second = 0;
    for i in 0..400 {
        let user = format!("user{i}");
        let ask = Ask { sticky: Some(&user), ..Ask::plain("sql", LONG) };
        let revision = registry.resolve(&Caller::default(), &ask).await.unwrap().revision;
        assert_eq!(registry.resolve(&Caller::default(), &ask).await.unwrap().revision, revision, "sticky");
        second += usize::from(&*revision == "2");
    }
    assert!((260..340).contains(&second), "{second} of 400 for weight 3 of 4");
    assert_eq!(registry.rollback_alias("", "sql").await.unwrap().version, 3);
    assert_eq!(&*world.resolve("sql").await.unwrap().revision, "1");
    assert!(registry.cards(&Caller::default()).1.iter().any(|card| card.name == "sql"));
    assert_eq!(code(&registry.delete_alias("", "sql", Some(1)).await), "precondition_failed");
    registry.delete_alias("", "sql", Some(3)).await.unwrap();
    assert_eq!(code(&world.resolve("sql").await), "model_not_found");
}

#[tokio::test]
async fn ten_thousand_names_are_listed_by_pages_and_found_at_once() {
    let world = World::new();
    for i in 0..10_000 {
        let repo = format!("acme/r{}", i % 100);
        world.upstream.public(&repo, 1);
        world.load(&format!("a{i:05}"), &repo).await.unwrap();
    }
    let mut filter = ListFilter { limit: 300, ..ListFilter::default() };
    let mut seen = Vec::new();
    loop {
        let (page, next) = world.registry.list(&filter);
        assert!(page.len() <= 300);
        seen.extend(page.into_iter().map(|view| view.name));
        match next {
            Some(next) => filter.after = Some(next),
            None => break,
        }
    }
    assert!(seen.len() == 10_000 && seen.is_sorted());
    let by_prefix = ListFilter { prefix: Some("a0001".into()), ..ListFilter::default() };
    assert_eq!(world.registry.list(&by_prefix).0.len(), 10);
    let failed = ListFilter { state: Some(AdapterState::Failed), ..ListFilter::default() };
    assert!(world.registry.list(&failed).0.is_empty());
    let states = world.registry.states();
    assert_eq!(states.iter().map(|(_, n)| n).sum::<usize>(), 10_000);
    assert_eq!(states[5], (AdapterState::Ready, 10_000));
    assert_eq!(world.engine.known.lock().unwrap().len(), 100, "names of one content share it");
    world.registry.names().assert_consistent();
    let started = std::time::Instant::now();
    for i in 0..10_000 {
        let (name, caller) = (format!("a{i:05}"), Caller::default());
        assert!(world.registry.card(&caller, &name).is_some() && world.registry.is_candidate(&caller, &name, None));
        world.registry.version();
        world.registry.states();
    }
    // A walk over all names for each would take a hundred times this.
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let version = world.registry.version();
    world.resolve("a00001").await.unwrap();
    assert_eq!(world.registry.version(), version, "a request changes no list");
}
