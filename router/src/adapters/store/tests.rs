//! The store without a network: accounts, eviction, holders, restarts, and what an operator reads when it fails.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::adapters::types::{FileDigest, FileName};

const QUOTA: u64 = 10_000;

fn identity(n: usize) -> String {
    format!("hub:https://hub/org/repo-{n}/../../etc@{n}")
}

/// The bytes of adapter `n`. Some adapters have equal bytes.
fn content(n: usize) -> [Vec<u8>; 2] {
    let n = n % 5;
    [vec![n as u8; 100], vec![n as u8 + 100; 900 * (n + 1)]]
}

fn remote(n: usize) -> [RemoteFile; 2] {
    let [config, weights] = content(n);
    [(FileName::Config, config), (FileName::Weights, weights)].map(|(name, bytes)| RemoteFile {
        name,
        bytes: bytes.len() as u64,
        digest: Some(FileDigest::Sha256(<sha2::Sha256 as sha2::Digest>::digest(&bytes).into())),
        etag: None,
        locator: String::new(),
    })
}

fn size(n: usize) -> u64 {
    remote(n).iter().map(|file| file.bytes).sum()
}

/// Writes the first `part` of each file that is missing; all of it when `part` is 1.
fn write(download: &Download, n: usize, part: f64) -> Result<[FileRecord; 2], StoreError> {
    let [config, weights] = remote(n);
    let one = |planned: &RemoteFile, bytes: &[u8]| {
        let start = download.start(planned.name) as usize;
        let end = start.max((bytes.len() as f64 * part) as usize);
        let mut sink = download.open(planned)?;
        bytes[start..end].chunks(333).try_for_each(|chunk| sink.write(chunk))?;
        let written = sink.finish()?;
        assert!(part < 1.0 || written.digest == planned.digest, "other bytes than planned");
        Ok(written.record)
    };
    let [config_bytes, weights_bytes] = content(n);
    Ok([one(&config, &config_bytes)?, one(&weights, &weights_bytes)?])
}

fn put(store: &Store, n: usize, tenant: Tenant) -> Result<Stored, StoreError> {
    let download = store.begin(&identity(n), tenant, &remote(n))?;
    let files = write(&download, n, 1.0)?;
    download.publish(files)
}

fn du(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let sizes = entries.map(|entry| {
        let path = entry.unwrap().path();
        let counted = path.file_name().unwrap().to_str().unwrap().starts_with("adapter_");
        if path.is_dir() { du(&path) } else { u64::from(counted) * path.metadata().unwrap().len() }
    });
    sizes.sum()
}

#[derive(Clone, Debug)]
enum Op {
    Put {
        n: usize,
        tenant: u64,
        limited: bool,
    },
    /// A download that stops after a part, and is kept or dropped.
    Stop {
        n: usize,
        part: f64,
        keep: bool,
    },
    /// A download that stays open until [`Op::Close`].
    Open {
        n: usize,
    },
    Close,
    Hold {
        n: usize,
    },
    Release,
    Forget {
        n: usize,
    },
    Quarantine {
        n: usize,
    },
    Pin {
        n: usize,
        pinned: bool,
    },
    Restart {
        quota: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let n = 0..8_usize;
    prop_oneof![
        4 => (n.clone(), 0..3_u64, any::<bool>()).prop_map(|(n, tenant, limited)| Op::Put { n, tenant, limited }),
        2 => (n.clone(), 0.0..1.0, any::<bool>()).prop_map(|(n, part, keep)| Op::Stop { n, part, keep }),
        1 => n.clone().prop_map(|n| Op::Open { n }),
        1 => Just(Op::Close),
        2 => n.clone().prop_map(|n| Op::Hold { n }),
        2 => Just(Op::Release),
        1 => n.clone().prop_map(|n| Op::Forget { n }),
        1 => n.clone().prop_map(|n| Op::Quarantine { n }),
        1 => (n, any::<bool>()).prop_map(|(n, pinned)| Op::Pin { n, pinned }),
        1 => (5000..=QUOTA).prop_map(|quota| Op::Restart { quota }),
    ]
}

/// A store and what a caller of it holds.
struct World {
    dir: tempfile::TempDir,
    store: Option<Store>,
    quota: u64,
    held: Vec<(usize, Stored)>,
    open: Vec<Download>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Some(Store::open(dir.path(), QUOTA).unwrap());
        Self { dir, store, quota: QUOTA, held: Vec::new(), open: Vec::new() }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Put { n, tenant, limited } => {
                let disk_bytes_max = limited.then_some(4000);
                let before = self.store().tenant_bytes(tenant);
                match put(self.store(), n, Tenant { id: tenant, disk_bytes_max }) {
                    Ok(stored) => assert_eq!(stored.bytes, size(n)),
                    Err(StoreError::Quota { .. }) => assert!(limited && before + size(n) > 4000),
                    Err(StoreError::Full { .. }) => assert!(size(n) <= QUOTA),
                    Err(error) => panic!("{error}"),
                }
                assert!(!limited || self.store().tenant_bytes(tenant) <= before.max(4000));
            }
            Op::Stop { n, part, keep } => {
                let Ok(download) = self.store().begin(&identity(n), 0.into(), &remote(n)) else { return };
                write(&download, n, part).unwrap();
                if keep { download.keep() } else { drop(download) }
            }
            Op::Open { n } => self.open.extend(self.store().begin(&identity(n), 1.into(), &remote(n))),
            Op::Close => drop(self.open.pop()),
            Op::Hold { n } => self.held.extend(self.store().get(&identity(n)).map(|stored| (n, stored))),
            Op::Release => drop(self.held.pop()),
            Op::Forget { n } => {
                self.store().forget(&identity(n));
                assert!(self.store().get(&identity(n)).is_none());
            }
            Op::Quarantine { n } => {
                self.store().quarantine(&identity(n));
                assert!(self.store().get(&identity(n)).is_none());
            }
            Op::Pin { n, pinned } => self.store().set_pinned(&identity(n), pinned),
            Op::Restart { quota } => {
                self.held.clear();
                self.open.clear();
                self.store = None;
                self.store = Some(Store::open(self.dir.path(), quota).unwrap());
                self.quota = quota;
            }
        }
    }

    fn check(&self) {
        let status = self.store().status();
        assert!(status.bytes + status.reserved_bytes <= self.quota, "{status:?}");
        let (on_disk, state) = (du(&self.dir.path().join("store")), self.store().shared.state());
        assert_eq!(state.accounts.used(), state.recount());
        assert!(on_disk >= status.bytes && on_disk <= status.bytes + status.reserved_bytes, "{on_disk} {status:?}");
        assert!(!self.open.is_empty() || status.reserved_bytes == 0);
        let tenants: u64 = (0..3).map(|tenant| state.accounts.of(tenant)).sum();
        assert_eq!(tenants, state.accounts.total());
        drop(state);
        for (n, stored) in &self.held {
            let [_, weights] = content(*n);
            assert_eq!(std::fs::read(stored.dir().join("adapter_model.safetensors")).unwrap(), weights);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn the_accounts_are_what_du_says_and_never_exceed_the_quota(ops in prop::collection::vec(op(), 1..60)) {
        let mut world = World::new();
        for op in ops {
            world.apply(op);
            world.check();
        }
    }
}

#[test]
fn the_longest_unused_goes_first_but_never_what_is_held_or_pinned() {
    let world = World::new();
    let store = world.store();
    let there = |n: usize| store.get(&identity(n)).is_some();
    let held = put(store, 0, 0.into()).unwrap(); // 1000 bytes
    for n in [1, 2, 3] {
        drop(put(store, n, 0.into()).unwrap()); // 1900, 2800, 3700
    }
    store.set_pinned(&identity(1), true);
    assert!(there(2), "and so it is used");
    drop(put(store, 6, 0.into()).unwrap()); // the same bytes as 1, but who knows that before
    assert_eq!([1, 2, 3].map(there), [true, true, false]);
    let second = put(store, 4, 0.into()).unwrap(); // 4600
    assert_eq!([1, 2, 4].map(there), [true, false, true]);
    let error = put(store, 3, 0.into()).unwrap_err();
    assert!(
        matches!(&error, StoreError::Full { need_bytes: 3700, reason } if reason.contains("7500 of 10000")),
        "{error}"
    );
    assert_eq!([0, 1, 4].map(there), [true, true, true], "nothing goes where that would not be enough");
    drop((held, second));
    store.set_pinned(&identity(1), false);
    drop(put(store, 3, 0.into()).unwrap());
    assert_eq!([0, 1, 4].map(there), [false, false, true]);
}

#[test]
fn what_was_used_last_survives_a_restart_in_that_order() {
    let mut world = World::new();
    for n in [0, 1, 2] {
        drop(put(world.store(), n, 0.into()).unwrap()); // 5700 bytes
    }
    let old = SystemTime::now() - Duration::from_secs(7200);
    for (n, age) in [(0, 0), (1, 1000), (2, 2000)] {
        let path = world.store().shared.layout.record(&identity(n));
        world.store().shared.disk.touch(&path, old + Duration::from_secs(age));
    }
    world.apply(Op::Restart { quota: QUOTA });
    drop(world.store().get(&identity(0)).unwrap()); // its time is noted on disk, as it is old
    world.apply(Op::Restart { quota: 4000 });
    let there: Vec<bool> = [0, 1, 2].map(|n| world.store().get(&identity(n)).is_some()).to_vec();
    assert_eq!(there, [true, false, true], "1 was the longest unused");
    world.check();
}

#[test]
fn equal_bytes_lie_there_once_and_go_with_their_last_identity() {
    let mut world = World::new();
    let one = put(world.store(), 1, 1.into()).unwrap();
    let other = put(world.store(), 6, 2.into()).unwrap();
    assert_eq!((one.dir(), world.store().bytes()), (other.dir(), size(1)));
    assert_eq!(world.store().forget(&identity(1)), 0);
    assert!(world.store().get(&identity(1)).is_none() && world.store().get(&identity(6)).is_some());
    assert_eq!(world.store().forget(&identity(6)), size(1));
    assert!(one.dir().exists(), "somebody holds it");
    let again = put(world.store(), 6, 2.into()).unwrap();
    assert_eq!(again.dir(), one.dir(), "what is still held becomes live again");
    world.store().forget(&identity(6));
    drop((one, other));
    assert!(again.dir().exists());
    drop(again);
    assert_eq!(du(world.dir.path()), 0, "the last holder takes it along");
    world.apply(Op::Restart { quota: QUOTA });
    assert_eq!(world.store().status(), StoreStatus { quota_bytes: QUOTA, ..StoreStatus::default() });
}

#[test]
fn hashes_and_content_id_outlive_the_bytes_and_the_process() {
    let mut world = World::new();
    let files = put(world.store(), 1, 1.into()).map(|_| world.store().recorded(&identity(1))).unwrap();
    world.store().note_content(&identity(1), ContentId([9; 32]));
    world.store().quarantine(&identity(1));
    world.apply(Op::Restart { quota: QUOTA });
    assert_eq!(world.store().recorded(&identity(1)), files);
    assert_eq!(world.store().expected_content(&identity(1)), Some(ContentId([9; 32])));
    drop(put(world.store(), 1, 1.into()).unwrap());
    assert_eq!(world.store().expected_content(&identity(1)), Some(ContentId([9; 32])));
    world.store().forget(&identity(1));
    assert_eq!(world.store().recorded(&identity(1)), None);
}

#[test]
fn what_was_tampered_with_is_gone_after_a_restart() {
    let mut world = World::new();
    let root = world.dir.path().join("store");
    for n in [0, 1, 2] {
        drop(put(world.store(), n, 0.into()).unwrap());
    }
    let dir = |world: &World, n| world.store().get(&identity(n)).unwrap().dir().to_owned();
    std::fs::write(dir(&world, 0).join("adapter_model.safetensors"), b"short").unwrap();
    std::fs::remove_file(dir(&world, 1).join("adapter_config.json")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", dir(&world, 1).join("adapter_config.json")).unwrap();
    let record = world.store().shared.layout.record(&identity(2));
    std::fs::write(&record, b"{}").unwrap();
    for stray in ["ab", "tmp/stray", "tmp/7"] {
        std::fs::create_dir_all(root.join(stray)).unwrap();
        std::fs::write(root.join(stray).join("adapter_x"), b"x").unwrap();
    }
    world.apply(Op::Restart { quota: QUOTA });
    assert!([0, 1, 2].iter().all(|n| world.store().get(&identity(*n)).is_none()));
    assert!(Path::new("/etc/passwd").exists());
    assert_eq!((du(world.dir.path()), std::fs::read_dir(root.join("tmp")).unwrap().count()), (0, 0));
    world.check();
}

#[test]
fn an_operator_reads_what_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let error = Store::open(&file, QUOTA).unwrap_err().to_string();
    assert!(error.contains("--data-dir: cannot make") && error.contains("file/store"), "{error}");

    let text = |kind: io::ErrorKind| error::open_error(&kind.into(), "write", dir.path()).to_string();
    assert!(text(io::ErrorKind::ReadOnlyFilesystem).contains("point --data-dir to a writable directory"));
    assert!(text(io::ErrorKind::StorageFull).contains("free some space there"));
    assert!(text(io::ErrorKind::PermissionDenied).contains("change"));
    if std::os::unix::fs::chown(dir.path(), Some(4711), None).is_ok() {
        let text = text(io::ErrorKind::PermissionDenied);
        assert!(text.contains("it belongs to user 4711 and this server runs as user 0"), "{text}");
    }
}

#[test]
fn no_identity_is_part_of_a_path() {
    let mut seen = HashMap::new();
    for identity in ["", "../../etc/passwd", "/abs", "a\0b", "a\\b", "é", "s3:x/y", "hub:x/y", &"x".repeat(9000)] {
        let path = Layout { root: "/store".into() }.record(identity);
        assert_eq!(path.parent(), Some(Path::new("/store/index")));
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.len() == 69 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.'));
        assert!(seen.insert(name, identity).is_none());
    }
}
