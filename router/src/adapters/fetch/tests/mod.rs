//! Downloads from a scripted source into a real directory.

mod basics;
mod crash;
mod fairness;
mod faults;
mod sharing;

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};
use sha2::{Digest, Sha256};

use super::*;
use crate::adapters::types::{AdapterRef, ByteStream, FileDigest, SourceKind};

/// What happens at an `open` of a file, once for each entry of its script.
#[derive(Clone, Debug)]
pub(super) enum Act {
    /// The body ends after so many bytes of this connection.
    EndAfter(usize),
    /// The connection breaks after so many bytes.
    BreakAfter(usize),
    /// Bit 0 of the byte at this offset of the file is wrong.
    Flip(usize),
    /// One byte more than declared.
    Longer,
    /// No connection.
    Refuse(SourceError),
    /// Refused unless it is from offset 0.
    NoRange,
    /// Nothing ever comes after so many bytes.
    HangAfter(usize),
}

/// How files are promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Promise {
    Sha256,
    Etag,
    Nothing,
}

/// A source whose every step is known.
#[derive(Default)]
pub(super) struct Scripted {
    files: Mutex<HashMap<String, [Vec<u8>; 2]>>,
    acts: Mutex<HashMap<(String, FileName), VecDeque<Act>>>,
    /// (identity, file, offset) of every `open`.
    pub(super) opens: Mutex<Vec<(String, FileName, u64)>>,
    /// The n-th call or chunk from now fails; 0 = none.
    pub(super) fail_at: AtomicUsize,
}

impl Scripted {
    /// An adapter of `bytes` weights with this name, and how it resolves.
    pub(super) fn add(&self, name: &str, bytes: usize, promise: Promise) -> Resolved {
        self.add_on(SourceKind::Hub, name, bytes, promise)
    }

    pub(super) fn add_on(&self, source: SourceKind, name: &str, bytes: usize, promise: Promise) -> Resolved {
        let files = [format!("{{\"r\": 1, \"name\": \"{name}\"}}").into_bytes(), content(name, bytes)];
        let identity = format!("{}:{name}@1", source.name());
        let remote = FileName::ALL.into_iter().zip(&files).map(|(name, bytes)| RemoteFile {
            name,
            bytes: bytes.len() as u64,
            digest: (promise == Promise::Sha256).then(|| FileDigest::Sha256(Sha256::digest(bytes).into())),
            etag: (promise != Promise::Nothing).then(|| format!("\"{}\"", bytes.len())),
            locator: name.as_str().into(),
        });
        let origin = Origin::Remote(remote.collect());
        self.files.lock().unwrap().insert(identity.clone(), files);
        let reference = AdapterRef { source, locator: name.into(), revision: None };
        Resolved { reference, identity, revision: "1".into(), origin }
    }

    pub(super) fn act(&self, resolved: &Resolved, name: FileName, acts: impl IntoIterator<Item = Act>) {
        self.acts.lock().unwrap().insert((resolved.identity.clone(), name), acts.into_iter().collect());
    }

    pub(super) fn offsets(&self, name: FileName) -> Vec<u64> {
        self.opens.lock().unwrap().iter().filter(|open| open.1 == name).map(|open| open.2).collect()
    }

    /// Counts one network call down.
    fn tick(&self) -> Result<(), SourceError> {
        let before = self.fail_at.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| Some(n.saturating_sub(1)));
        if before == Ok(1) { Err(SourceError::retryable("the n-th call failed")) } else { Ok(()) }
    }

    fn body(self: &Scripted, file: (String, FileName), offset: u64) -> Result<ByteStream, SourceError> {
        self.opens.lock().unwrap().push((file.0.clone(), file.1, offset));
        let mut bytes = self.files.lock().unwrap()[&file.0][file.1 as usize].clone();
        let act = self.acts.lock().unwrap().get_mut(&file).and_then(VecDeque::pop_front);
        let from = usize::try_from(offset).unwrap();
        let (mut cut, mut end) = (usize::MAX, stream::empty().boxed());
        match act {
            Some(Act::Refuse(error)) => return Err(error),
            Some(Act::NoRange) if offset > 0 => return Err(SourceError::retryable("no ranges here")),
            Some(Act::Flip(at)) => bytes[at] ^= 1,
            Some(Act::Longer) => bytes.push(0),
            Some(Act::EndAfter(n)) => cut = n,
            Some(Act::BreakAfter(n)) => {
                cut = n;
                end = stream::iter([Err(SourceError::retryable("broken"))]).boxed();
            }
            Some(Act::HangAfter(n)) => (cut, end) = (n, stream::pending().boxed()),
            Some(Act::NoRange) | None => {}
        }
        let bytes = &bytes[from..bytes.len().min(from.saturating_add(cut))];
        let chunks: Vec<_> = bytes.chunks(1000).map(Bytes::copy_from_slice).collect();
        let ticks: Vec<_> = chunks.into_iter().map(|chunk| self.tick().map(|()| chunk)).collect();
        let failed = ticks.iter().position(Result::is_err).map_or(ticks.len(), |at| at + 1);
        Ok(stream::iter(ticks.into_iter().take(failed)).chain(end).boxed())
    }
}

impl Source for Scripted {
    fn resolve<'a>(&'a self, _: &'a AdapterRef, _: &'a Credential) -> BoxFuture<'a, Result<Resolved, SourceError>> {
        Box::pin(async { Err(SourceError::Absent) })
    }

    fn open<'a>(
        &'a self,
        resolved: &'a Resolved,
        file: &'a RemoteFile,
        offset: u64,
        credential: &'a Credential,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            self.tick()?;
            let revoked = matches!(credential, Credential::Token(token) if secrecy::ExposeSecret::expose_secret(token) == "revoked");
            if revoked {
                return Err(SourceError::Absent);
            }
            self.body((resolved.identity.clone(), file.name), offset)
        })
    }
}

/// Bytes that depend on the name and on where they are.
pub(super) fn content(name: &str, bytes: usize) -> Vec<u8> {
    let seed = Sha256::digest(name);
    (0..bytes).map(|i| seed[i % 32] ^ (i >> 5) as u8).collect()
}

/// A source, a store in a directory of its own, and a fetcher between them.
pub(super) struct World {
    pub(super) source: Arc<Scripted>,
    pub(super) store: Arc<Store>,
    pub(super) fetcher: Fetcher,
    pub(super) dir: tempfile::TempDir,
}

/// Short pauses, so that tests wait for nothing.
pub(super) fn limits() -> FetchLimits {
    FetchLimits { retry_pause: Duration::from_millis(1), failure_kept: Duration::ZERO, ..FetchLimits::default() }
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(limits(), 1 << 30)
    }

    pub(super) fn with(limits: FetchLimits, quota_bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path(), quota_bytes).unwrap());
        let source = Arc::new(Scripted::default());
        let fetcher = Fetcher::new(Arc::clone(&source) as Arc<dyn Source>, Arc::clone(&store), limits);
        Self { source, store, fetcher, dir }
    }

    pub(super) async fn fetch(&self, resolved: &Resolved) -> Outcome {
        self.fetcher.fetch(resolved, &Credential::Server, 0, &Progress::default()).await
    }

    /// Nothing is left over: no temporary file, no reservation, no permit, no flight; and `du` agrees with the store.
    pub(super) fn assert_clean(&self) {
        self.store.sweep();
        let status = self.store.status();
        assert_eq!(status.reserved_bytes, 0);
        assert_eq!(self.fetcher.status(), FetchStatus::default());
        assert_eq!(du(&self.dir.path().join("store")), status.bytes, "{:?}", tree(self.dir.path()));
        let tmp = self.dir.path().join("store/tmp");
        let partials = std::fs::read_dir(&tmp).unwrap().count();
        assert_eq!(partials, self.store.partials(), "{:?}", tree(&tmp));
    }
}

/// Checks that `stored` is the adapter called `name`, byte for byte.
#[track_caller]
pub(super) fn assert_is(stored: &Stored, name: &str, bytes: usize) {
    assert_eq!(std::fs::read(stored.dir().join("adapter_model.safetensors")).unwrap(), content(name, bytes));
    let names = std::fs::read_dir(stored.dir()).unwrap().count();
    assert_eq!(names, 2);
}

/// Every path below `dir`.
pub(super) fn tree(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { tree(&path) } else { vec![path] }).collect()
}

/// Bytes of all adapter files below `dir`.
pub(super) fn du(dir: &Path) -> u64 {
    let is_adapter = |path: &&PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("adapter_");
    tree(dir).iter().filter(is_adapter).map(|path| std::fs::metadata(path).unwrap().len()).sum()
}

/// What takes longer hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `what` holds.
pub(super) async fn until(what: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !what() {
        assert!(std::time::Instant::now() < deadline, "waited too long");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
