//! The process dies at any point: after a restart each adapter is absent or whole, and the next fetch works.
//!
//! The child is this test binary again, in the directory of the store: the file `die-at` there says what it does.

use std::io;
use std::process::{Command, Stdio};

use super::*;
use crate::adapters::store::Faults;

const ORDER: &str = "die-at";
/// Room for two adapters of a few, so that the child evicts all the time.
const QUOTA: u64 = 26_000;
const BYTES: usize = 10_000;

/// Ends the process at the n-th call on the file system.
struct DieAt(AtomicUsize);

impl Faults for DieAt {
    fn before(&self, _call: &'static str) -> io::Result<()> {
        if self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| Some(n.saturating_sub(1))) == Ok(1) {
            std::process::abort();
        }
        Ok(())
    }
}

/// No test by itself: the child's part, where somebody left an order. `0` = go on until killed, else die at the n-th call.
#[test]
fn child_of_the_crash_tests() {
    let Ok(order) = std::fs::read_to_string(ORDER) else { return };
    let n: usize = order.parse().unwrap();
    let store = Store::open_with(Path::new("."), QUOTA, Box::new(DieAt(n.into()))).unwrap();
    let (source, store) = (Arc::new(Scripted::default()), Arc::new(store));
    let fetcher = Fetcher::new(Arc::clone(&source) as Arc<dyn Source>, Arc::clone(&store), limits());
    runtime().block_on(async {
        for step in 0..if n == 0 { usize::MAX } else { 3 } {
            let resolved = source.add(&format!("a{}", (n + step) % 4), BYTES, Promise::Sha256);
            if step % 3 == 1 {
                source.act(&resolved, FileName::Weights, [4000; 3].map(Act::BreakAfter));
            }
            let stored = fetcher.fetch(&resolved, &Credential::Server, 1, &Progress::default()).await;
            if stored.is_ok() {
                store.note_content(&resolved.identity, crate::engine::ContentId([step as u8; 32]));
            }
            if step % 3 == 2 {
                fetcher.forget(&resolved.identity).await;
            }
        }
    });
}

fn child(dir: &Path, order: usize) -> std::process::Child {
    std::fs::write(dir.join(ORDER), order.to_string()).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child_of_the_crash_tests", "--test-threads", "1"]).current_dir(dir);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Opens what the child left. Returns how many adapters were there.
fn check(dir: &Path) -> usize {
    let store = Arc::new(Store::open(dir, QUOTA).unwrap());
    let root = dir.join("store");
    assert_eq!(du(&root), store.bytes(), "{:?}", tree(&root));
    assert!(store.bytes() <= QUOTA);
    assert_eq!(std::fs::read_dir(root.join("tmp")).unwrap().count(), store.partials());
    let names: Vec<String> = (0..4).map(|n| format!("a{n}")).collect();
    let there = names.iter().filter(|name| {
        let stored = store.get(&format!("hub:{name}@1"));
        stored.inspect(|stored| assert_is(stored, name, BYTES)).is_some()
    });
    let there = there.count();
    let source = Arc::new(Scripted::default());
    let fetcher = Fetcher::new(Arc::clone(&source) as Arc<dyn Source>, Arc::clone(&store), limits());
    runtime().block_on(async {
        let name = &names[there % 4];
        let resolved = source.add(name, BYTES, Promise::Sha256);
        let fetched = fetcher.fetch(&resolved, &Credential::Server, 1, &Progress::default()).await;
        assert_is(&fetched.unwrap(), name, BYTES);
    });
    there
}

#[test]
fn death_at_any_call_leaves_each_adapter_absent_or_whole() {
    let (mut deaths, mut found) = (0, 0);
    let dir = tempfile::tempdir().unwrap();
    for n in 1.. {
        assert!(n < 1000, "it never ends");
        // Every fifth starts from nothing, the others from what the last one and its check left.
        if n % 5 == 0 {
            std::fs::remove_dir_all(dir.path().join("store")).unwrap();
        }
        let status = child(dir.path(), n).wait().unwrap();
        found += check(dir.path());
        if status.success() {
            break;
        }
        deaths += 1;
    }
    assert!(deaths > 60 && found > deaths / 2, "{deaths} deaths, {found} adapters found");
}

#[test]
fn kill_at_any_moment_leaves_each_adapter_absent_or_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut found = 0;
    for round in 0..20_u64 {
        let mut child = child(dir.path(), 0);
        std::thread::sleep(Duration::from_millis(20 + round * 37 % 100));
        child.kill().unwrap();
        child.wait().unwrap();
        found += check(dir.path());
    }
    assert!(found > 10, "{found}");
}

#[test]
fn a_second_process_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let first = Store::open(dir.path(), QUOTA).unwrap();
    let error = Store::open(dir.path(), QUOTA).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
    assert!(error.to_string().contains("another loramux process uses"), "{error}");
    drop(first);
    Store::open(dir.path(), QUOTA).unwrap();
}
