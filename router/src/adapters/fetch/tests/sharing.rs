//! One download for everybody, and whose failure is whose.

use secrecy::SecretString;

use super::*;

#[test]
fn ten_thousand_first_callers_make_one_download() {
    let runtime = runtime();
    runtime.block_on(async {
        let world = World::new();
        let resolved = world.source.add("a", 50_000, Promise::Sha256);
        let callers: Vec<_> = (0..10_000)
            .map(|caller: u64| {
                let (fetcher, resolved) = (world.fetcher.clone(), resolved.clone());
                tokio::spawn(async move {
                    fetcher.fetch(&resolved, &Credential::Anonymous, caller % 100, &Progress::default()).await
                })
            })
            .collect();
        for caller in callers {
            assert_is_same(&caller.await.unwrap().unwrap(), &world);
        }
        let mut opens: Vec<_> = world.source.opens.lock().unwrap().iter().map(|open| open.1).collect();
        opens.sort();
        assert_eq!(opens, FileName::ALL);
        world.assert_clean();
    });
}

fn assert_is_same(stored: &Stored, world: &World) {
    assert_eq!(stored.files_id, world.store.get("hub:a@1").unwrap().files_id);
}

#[tokio::test]
async fn a_caller_that_leaves_does_not_stop_it() {
    let world = World::new();
    let resolved = world.source.add("a", 50_000, Promise::Sha256);
    let fetch = Box::pin(world.fetch(&resolved));
    assert!(futures_util::future::poll_immediate(fetch).await.is_none(), "it has only just begun");
    until(|| world.store.get(&resolved.identity).is_some()).await;
    assert_eq!(world.source.opens.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_failure_answers_for_a_while_and_then_no_more() {
    let world = World::with(FetchLimits { failure_kept: Duration::from_millis(300), ..limits() }, 1 << 30);
    let resolved = world.source.add("a", 5000, Promise::Sha256);
    let gone = SourceError::permanent("adapter_invalid", "no");
    world.source.act(&resolved, FileName::Config, [Act::Refuse(gone.clone())]);
    let started = std::time::Instant::now();
    assert_eq!(world.fetch(&resolved).await.unwrap_err(), gone.clone().into());
    let opens = world.source.opens.lock().unwrap().len();
    let again = world.fetch(&resolved).await;
    if started.elapsed() < Duration::from_millis(300) {
        assert_eq!(again.unwrap_err(), gone.into());
        assert_eq!(world.source.opens.lock().unwrap().len(), opens);
    }
    tokio::time::sleep(Duration::from_millis(310)).await;
    assert_is(&world.fetch(&resolved).await.unwrap(), "a", 5000);
}

#[tokio::test]
async fn a_refused_credential_fails_for_itself_alone() {
    let world = World::with(FetchLimits { failure_kept: Duration::from_secs(5), ..limits() }, 1 << 30);
    let resolved = world.source.add("a", 5000, Promise::Sha256);
    let token = |text: &str| Credential::Token(SecretString::from(text));
    let (revoked, right, progress) = (token("revoked"), token("right"), Progress::default());
    let (first, second) = tokio::join!(
        world.fetcher.fetch(&resolved, &revoked, 0, &progress),
        world.fetcher.fetch(&resolved, &right, 0, &progress),
    );
    assert_eq!(first.unwrap_err(), SourceError::Absent.into());
    assert_is(&second.unwrap(), "a", 5000);
}

#[tokio::test]
async fn a_quota_fails_for_its_tenant_alone() {
    let world = World::with(FetchLimits { failure_kept: Duration::from_secs(5), ..limits() }, 1 << 30);
    let resolved = world.source.add("a", 5000, Promise::Sha256);
    let (poor, progress) = (Tenant { id: 1, disk_bytes_max: Some(5000) }, Progress::default());
    let (first, second) = tokio::join!(
        world.fetcher.fetch(&resolved, &Credential::Server, poor, &progress),
        world.fetcher.fetch(&resolved, &Credential::Server, 2, &progress),
    );
    assert_eq!(first.unwrap_err().code(), "quota_exceeded");
    assert_is(&second.unwrap(), "a", 5000);
    assert_eq!((world.store.tenant_bytes(1), world.store.tenant_bytes(2)), (0, world.store.bytes()));
}

#[tokio::test]
async fn forgetting_stops_a_download_and_leaves_nothing() {
    let world = World::new();
    let resolved = world.source.add("a", 50_000, Promise::Sha256);
    for after in [0, 1, 30_000] {
        world.source.act(&resolved, FileName::Weights, [Act::HangAfter(after)]);
        let progress = Progress::default();
        let fetch = world.fetcher.fetch(&resolved, &Credential::Server, 0, &progress);
        let forget = async {
            while progress.now().bytes_done < after as u64 || world.source.offsets(FileName::Weights).is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            world.fetcher.forget(&resolved.identity).await
        };
        let (outcome, _) = tokio::join!(fetch, forget);
        assert_eq!(outcome.unwrap_err(), FetchError::Cancelled);
        world.assert_clean();
        assert_eq!(world.store.bytes(), 0);
        world.source.opens.lock().unwrap().clear();
    }
    assert_is(&world.fetch(&resolved).await.unwrap(), "a", 50_000);
}
