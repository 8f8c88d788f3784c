//! The n-th call fails, for every n; and then everything works again.

use std::io;

use super::*;
use crate::adapters::store::Faults;

/// Makes the n-th call on the file system fail. Shared with the test, which sets n.
#[derive(Clone, Default)]
struct Nth {
    left: Arc<AtomicUsize>,
    kind: Arc<Mutex<Option<io::ErrorKind>>>,
    failed: Arc<Mutex<Option<&'static str>>>,
}

impl Nth {
    fn arm(&self, n: usize, kind: io::ErrorKind) {
        *self.kind.lock().unwrap() = Some(kind);
        *self.failed.lock().unwrap() = None;
        self.left.store(n, Ordering::SeqCst);
    }

    fn disarm(&self) -> Option<&'static str> {
        self.left.store(0, Ordering::SeqCst);
        self.failed.lock().unwrap().take()
    }
}

impl Faults for Nth {
    fn before(&self, call: &'static str) -> io::Result<()> {
        let before = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| Some(n.saturating_sub(1)));
        if before != Ok(1) {
            return Ok(());
        }
        *self.failed.lock().unwrap() = Some(call);
        Err(self.kind.lock().unwrap().unwrap_or(io::ErrorKind::Other).into())
    }
}

fn world(nth: &Nth, quota_bytes: u64) -> World {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open_with(dir.path(), quota_bytes, Box::new(nth.clone())).unwrap());
    let source = Arc::new(Scripted::default());
    let fetcher = Fetcher::new(Arc::clone(&source) as Arc<dyn Source>, Arc::clone(&store), limits());
    World { source, store, fetcher, dir }
}

/// One round: an adapter is fetched while there is room for one only, so that it evicts `last`.
async fn round(world: &World, name: &str) -> Outcome {
    let resolved = world.source.add(name, 5000, Promise::Sha256);
    let outcome = world.fetch(&resolved).await;
    if outcome.is_ok() {
        world.store.note_content(&resolved.identity, crate::engine::ContentId([7; 32]));
    }
    outcome
}

#[test]
fn after_any_failure_of_the_file_system_nothing_is_left_and_the_next_fetch_works() {
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::ReadOnlyFilesystem, io::ErrorKind::Other] {
        let (nth, mut calls, mut outcomes) = (Nth::default(), Vec::new(), [0, 0]);
        let world = world(&nth, 6000);
        for n in 1.. {
            assert!(n < 500, "it never ends");
            nth.arm(n, kind);
            // A runtime for each round: when it is gone, so is all that it had in the background.
            let outcome = runtime().block_on(round(&world, &format!("adapter-{n}")));
            let failed = nth.disarm();
            outcomes[usize::from(outcome.is_err())] += 1;
            if let Err(error) = &outcome {
                let code = if kind == io::ErrorKind::StorageFull { "disk_full" } else { "adapter_load_failed" };
                // What could not be evicted makes the quota full.
                assert!(error.code() == code || error.code() == "disk_full", "{n} {failed:?} {error}");
                assert!(error.retryable() && !error.to_string().contains('/'), "{error}");
            }
            drop(outcome);
            world.assert_clean();
            let good = runtime().block_on(round(&world, &format!("good-{n}")));
            assert_is(
                &good.unwrap_or_else(|error| panic!("after {failed:?} (call {n}): {error}")),
                &format!("good-{n}"),
                5000,
            );
            world.assert_clean();
            let Some(call) = failed else { break };
            calls.push(call);
        }
        for call in ["create_dir", "create", "write", "sync", "sync_dir", "rename", "remove_file", "remove_tree"] {
            assert!(calls.contains(&call), "{call} was never made: {calls:?}");
        }
        assert!(outcomes[1] > 15, "{outcomes:?}");
    }
}

#[test]
fn after_any_failure_of_the_network_nothing_is_left_and_the_next_fetch_works() {
    let nth = Nth::default();
    for retries in [0, 2] {
        let world = world(&nth, 1 << 20);
        let fetcher = Fetcher::new(
            Arc::clone(&world.source) as Arc<dyn Source>,
            Arc::clone(&world.store),
            FetchLimits { retries, ..limits() },
        );
        let world = World { fetcher, ..world };
        runtime().block_on(async {
            for n in 1.. {
                assert!(n < 100, "it never ends");
                let resolved = world.source.add(&format!("adapter-{n}"), 5000, Promise::Sha256);
                world.source.fail_at.store(n, Ordering::SeqCst);
                let outcome = world.fetch(&resolved).await;
                let fired = world.source.fail_at.swap(0, Ordering::SeqCst) == 0;
                assert_eq!(outcome.is_err(), fired && retries == 0, "call {n}");
                drop(outcome);
                world.assert_clean();
                assert_is(&world.fetch(&resolved).await.unwrap(), &format!("adapter-{n}"), 5000);
                world.assert_clean();
                if !fired {
                    assert!(n > 7, "two opens and six chunks at least");
                    break;
                }
            }
        });
    }
}
