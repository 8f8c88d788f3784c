//! A slow source or a greedy tenant holds nobody else up.

use super::*;

/// `count` downloads of `kind` for `tenant` that never end.
fn hang(world: &World, kind: SourceKind, tenant: u64, count: usize) {
    for n in 0..count {
        let resolved = world.source.add_on(kind, &format!("slow-{tenant}-{n}"), 5000, Promise::Sha256);
        world.source.act(&resolved, FileName::Weights, [Act::HangAfter(1000)]);
        let fetcher = world.fetcher.clone();
        tokio::spawn(async move { fetcher.fetch(&resolved, &Credential::Server, tenant, &Progress::default()).await });
    }
}

#[tokio::test]
async fn others_pass_a_source_that_never_answers() {
    let world = World::new();
    (0..20).for_each(|tenant| hang(&world, SourceKind::Http, tenant, 10)); // tenant 0, which is everybody, too
    until(|| world.fetcher.status().running == 4 && world.fetcher.status().waiting == 196).await;
    for n in 0..50 {
        let name = format!("quick-{n}");
        let resolved = world.source.add(&name, 5000, Promise::Sha256);
        let outcome = tokio::time::timeout(PATIENCE, world.fetch(&resolved)).await;
        assert_is(
            &outcome
                .unwrap_or_else(|_| panic!("{name} waits for the slow source: {:?}", world.fetcher.status()))
                .unwrap(),
            &name,
            5000,
        );
    }
}

#[tokio::test]
async fn others_pass_a_tenant_that_wants_everything() {
    let world = World::with(FetchLimits { per_source: 8, ..limits() }, 1 << 30);
    hang(&world, SourceKind::Hub, 1, 200);
    until(|| world.fetcher.status().running == 6 && world.fetcher.status().waiting == 194).await;
    let resolved = world.source.add("quick", 5000, Promise::Sha256);
    let outcome = tokio::time::timeout(PATIENCE, world.fetch(&resolved)).await;
    assert_is(&outcome.expect("no wait for the greedy tenant").unwrap(), "quick", 5000);

    // Something that stands in the greedy tenant's line is served when another one wants it too.
    let queued =
        Resolved { identity: "hub:slow-1-199@1".into(), ..world.source.add("slow-1-199", 5000, Promise::Sha256) };
    world.source.act(&queued, FileName::Weights, []);
    let outcome = tokio::time::timeout(PATIENCE, world.fetch(&queued)).await;
    assert_is(&outcome.expect("no wait in the greedy tenant's line").unwrap(), "slow-1-199", 5000);
}

#[tokio::test]
async fn the_queue_has_an_end() {
    let limits = FetchLimits { waiting_max: 10, waiting_per_tenant_max: 6, ..limits() };
    let world = World::with(limits, 1 << 30);
    hang(&world, SourceKind::Http, 1, 20);
    until(|| world.fetcher.status().running == 4 && world.fetcher.status().waiting == 6).await;
    let resolved = world.source.add_on(SourceKind::Http, "one-more", 5000, Promise::Sha256);
    let error = world.fetcher.fetch(&resolved, &Credential::Server, 1, &Progress::default()).await.unwrap_err();
    assert_eq!(error, FetchError::Busy { waiting: 6 });
    hang(&world, SourceKind::Http, 2, 20);
    until(|| world.fetcher.status().waiting == 10).await;
    assert_eq!(world.fetch(&resolved).await.unwrap_err(), FetchError::Busy { waiting: 10 });
    for n in 0..20 {
        for tenant in [1, 2] {
            world.fetcher.forget(&format!("http:slow-{tenant}-{n}@1")).await;
        }
    }
    assert_is(&world.fetch(&resolved).await.unwrap(), "one-more", 5000);
    world.assert_clean();
}
