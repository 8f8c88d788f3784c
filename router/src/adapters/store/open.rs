//! Opening: take the lock, read the index, keep what is whole, remove the rest.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant, UNIX_EPOCH};

use super::Shared;
use super::disk::{Disk, file_bytes};
use super::error::open_error;
use super::record::{FilesId, Layout, PartialRecord, Record, hex};
use super::state::{Content, Partial, State, Trash};
use crate::adapters::types::FileName;

/// A process that just ended, or a child of it that has not started its own program yet, may have the lock a moment longer.
const LOCK_WAIT: Duration = Duration::from_millis(200);

/// See [`super::Store::open`].
pub(super) fn open(data_dir: &Path, quota_bytes: u64, disk: Disk) -> io::Result<Arc<Shared>> {
    let layout = Layout { root: data_dir.join("store") };
    for dir in [&layout.root, &layout.index(), &layout.tmp()] {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|error| open_error(&error, "make", dir))?;
    }
    let lock = take_lock(&layout.root.join("lock"))?;
    let mut state = State::new(quota_bytes);
    let scan = Scan { layout: &layout, disk: &disk };
    let error = |error: io::Error| open_error(&error, "read", &layout.root);
    scan.records(&mut state).map_err(error)?;
    scan.contents(&mut state).map_err(error)?;
    let next = scan.partials(&mut state).map_err(error)?;
    let over = state.accounts.total().saturating_sub(quota_bytes);
    if over > 0 {
        state.plan_free(over); // the quota is smaller than it was
    }
    let shared = Arc::new(Shared {
        layout,
        disk,
        state: Mutex::new(state),
        namespace: Mutex::new(()),
        index: Mutex::new(()),
        sweeping: Mutex::new(()),
        scratch: AtomicU64::new(next),
        _lock: lock,
    });
    shared.sweep();
    Ok(shared)
}

fn take_lock(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = opened.map_err(|error| open_error(&error, "write", path))?;
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOCK_WAIT / 20),
            Err(TryLockError::WouldBlock) => break,
            Err(TryLockError::Error(error)) => return Err(open_error(&error, "lock", path)),
        }
    }
    let root = path.parent().unwrap_or(path).display();
    let text = format!("--data-dir: another loramux process uses {root}; stop it or give this one its own --data-dir");
    Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
}

struct Scan<'a> {
    layout: &'a Layout,
    disk: &'a Disk,
}

impl Scan<'_> {
    /// Reads the index. A record that cannot be read is removed: its content is downloaded again.
    fn records(&self, state: &mut State) -> io::Result<()> {
        for path in self.disk.list(&self.layout.index())? {
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let record = self.disk.read(&path).ok().and_then(|text| Record::parse(&text, stem));
            match record {
                Some(record) => {
                    let used = std::fs::metadata(&path).and_then(|found| found.modified());
                    let used = used.ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
                    let used = u64::try_from(used.as_nanos()).unwrap_or(0);
                    state.learn(record, used);
                }
                None => {
                    tracing::warn!(path = %path.display(), "adapter store: removes a record that cannot be read");
                    state.trash.insert(path, Trash::default());
                }
            }
        }
        Ok(())
    }

    /// Takes in each content that a record knows and whose files have their sizes; removes the others. Hashes are compared
    /// when the shard reads the files.
    fn contents(&self, state: &mut State) -> io::Result<()> {
        for fan in self.disk.list(&self.layout.root)? {
            let is_fan = fan.is_dir() && fan.file_name().is_some_and(|name| name.len() == 2);
            for path in if is_fan { self.disk.list(&fan)? } else { Vec::new() } {
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                let whole = hex::decode(name).and_then(|id| Some((id, whole_content(state, &id, &path)?)));
                match whole {
                    Some((id, content)) if self.layout.content(&id) == path => {
                        state.accounts.add(content.tenant, content.bytes);
                        state.contents.insert(id, content);
                    }
                    _ => {
                        state.trash.insert(path, Trash::default());
                    }
                }
            }
        }
        Ok(())
    }

    /// Keeps downloads that can go on; removes everything else in `tmp/`. The next free name there.
    fn partials(&self, state: &mut State) -> io::Result<u64> {
        let mut next = 0;
        for dir in self.disk.list(&self.layout.tmp())? {
            let number = dir.file_name().and_then(|name| name.to_str()?.parse::<u64>().ok());
            next = next.max(number.map_or(0, |number| number.saturating_add(1)));
            match self.partial(&dir) {
                Some((record, bytes)) if number.is_some() => {
                    let last_used = state.tick(0);
                    let partial = Partial { dir, bytes, tenant: record.tenant, last_used };
                    state.accounts.add(record.tenant, bytes);
                    state.trash_partial(&record.identity);
                    state.partials.insert(record.identity.into(), partial);
                }
                _ => {
                    state.trash.insert(dir, Trash::default());
                }
            }
        }
        Ok(next)
    }

    fn partial(&self, dir: &Path) -> Option<(PartialRecord, u64)> {
        let text = self.disk.read(&dir.join(PartialRecord::FILE)).ok()?;
        let record: PartialRecord = serde_json::from_slice(&text).ok()?;
        let kept = record.kept_bytes(dir);
        for (name, bytes) in FileName::ALL.into_iter().zip(kept) {
            if bytes == 0 {
                self.disk.remove_file(&dir.join(name.as_str())).ok()?;
            }
        }
        let bytes = kept.iter().sum();
        (bytes > 0).then_some((record, bytes))
    }
}

fn whole_content(state: &State, id: &FilesId, path: &Path) -> Option<Content> {
    let identities = state.by_files.get(id)?;
    let known: Vec<_> = identities.iter().filter_map(|identity| state.known.get(identity)).collect();
    let first = known.first()?;
    let whole = first.record.files.iter().all(|file| file_bytes(&path.join(file.name.as_str())) == Some(file.bytes));
    let last_used = known.iter().map(|known| known.last_used).max()?;
    whole.then(|| Content {
        bytes: first.record.bytes(),
        tenant: first.record.tenant,
        live: true,
        damaged: false,
        guard: Weak::new(),
        last_used,
    })
}
