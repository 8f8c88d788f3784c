//! Hub caches that other programs made (`models--org--repo/{refs,snapshots,blobs}`): read for the server, never written.
//!
//! Their files are links to blobs named by hash. They are opened below the cache, copied into our own store like a download,
//! and hashed like one.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::beneath;
use super::hub::{digest_of_etag, is_commit};
use super::local::{blocking, open_same};
use super::model::{CONFIG, INDEX, INDEX_BYTES_MAX, SINGLE, shards};
use super::net::changed;
use crate::adapters::types::{ByteStream, FileName, RemoteFile, SourceError};

/// In front of locators of cached files: `cache:<number of the directory>:<path below it>`.
const PREFIX: &str = "cache:";
/// Bytes of a file below `refs`.
const REF_BYTES_MAX: u64 = 128;

/// An adapter that is complete in a cache.
pub(super) struct Snapshot {
    pub commit: String,
    /// Both, in the order of [`FileName::ALL`].
    pub files: Vec<RemoteFile>,
}

/// The first cache that holds `repo` at `revision`, both files.
pub(super) async fn find(
    caches: Vec<PathBuf>,
    repo: String,
    revision: String,
) -> Result<Option<Snapshot>, SourceError> {
    if caches.is_empty() {
        return Ok(None);
    }
    blocking(move || {
        for (number, cache) in caches.iter().enumerate() {
            if let Some(found) = find_in(cache, number, &repo, &revision)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    })
    .await
}

/// True if the file's bytes are in a cache of this machine.
pub(super) fn is_cached(file: &RemoteFile) -> bool {
    file.locator.starts_with(PREFIX)
}

/// The bytes of a cached file.
pub(super) async fn open(caches: &[PathBuf], file: &RemoteFile, offset: u64) -> Result<ByteStream, SourceError> {
    let rest = file.locator.strip_prefix(PREFIX).ok_or_else(changed)?;
    let (number, path) = rest.split_once(':').ok_or_else(changed)?;
    let cache = number.parse().ok().and_then(|number: usize| caches.get(number)).ok_or_else(changed)?;
    open_same(cache.clone(), PathBuf::from(path), file, offset).await
}

/// The first cache that holds all of a base model, as its snapshot's directory or the `.gguf` in it. The operator chose it,
/// and it is read where it lies: models are too large to copy.
pub(super) async fn find_model(
    caches: Vec<PathBuf>,
    repo: String,
    revision: String,
    gguf: Option<String>,
) -> Result<Option<PathBuf>, SourceError> {
    blocking(move || {
        for cache in &caches {
            let Some((dir, _)) = snapshot(cache, &repo, &revision)? else { continue };
            let whole = match &gguf {
                Some(file) => beneath::open_file(cache, &dir.join(file))?.map(|_| cache.join(&dir).join(file)),
                None => holds_model(cache, &dir)?.then(|| cache.join(&dir)),
            };
            if whole.is_some() {
                return Ok(whole);
            }
        }
        Ok(None)
    })
    .await
}

fn holds_model(cache: &Path, dir: &Path) -> Result<bool, SourceError> {
    let has = |name: &str| beneath::open_file(cache, &dir.join(name)).map(|found| found.is_some());
    if !has(CONFIG)? {
        return Ok(false);
    }
    let Some((index, _)) = beneath::open_file(cache, &dir.join(INDEX))? else { return has(SINGLE) };
    let mut text = Vec::new();
    if index.take(INDEX_BYTES_MAX).read_to_end(&mut text).is_err() {
        return Ok(false);
    }
    for name in shards(&text).unwrap_or_default() {
        if !has(&name)? {
            return Ok(false);
        }
    }
    Ok(shards(&text).is_ok())
}

/// Directory of a snapshot below `cache`, and its commit.
fn snapshot(cache: &Path, repo: &str, revision: &str) -> Result<Option<(PathBuf, String)>, SourceError> {
    // `repo` and `revision` passed the reference's character set: neither holds `..` nor starts with a slash.
    let folder = PathBuf::from(format!("models--{}", repo.replace('/', "--")));
    let commit = if is_commit(revision) {
        revision.to_owned()
    } else {
        let Some((file, _)) = beneath::open_file(cache, &folder.join("refs").join(revision))? else { return Ok(None) };
        let mut text = String::new();
        if file.take(REF_BYTES_MAX).read_to_string(&mut text).is_err() || !is_commit(text.trim()) {
            return Ok(None);
        }
        text.trim().to_owned()
    };
    Ok(Some((folder.join("snapshots").join(&commit), commit)))
}

fn find_in(cache: &Path, number: usize, repo: &str, revision: &str) -> Result<Option<Snapshot>, SourceError> {
    let Some((dir, commit)) = snapshot(cache, repo, revision)? else { return Ok(None) };
    let mut files = Vec::new();
    for name in FileName::ALL {
        let path = dir.join(name.as_str());
        let Some((_, print)) = beneath::open_file(cache, &path)? else { return Ok(None) };
        // A blob is named by its hash. A copy that is no link has no such name, and no promise.
        let blob = std::fs::read_link(cache.join(&path)).ok();
        let hash = blob.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
        files.push(RemoteFile {
            name,
            bytes: print.bytes,
            digest: hash.and_then(digest_of_etag),
            etag: Some(print.text()),
            locator: format!("{PREFIX}{number}:{}", path.display()),
        });
    }
    Ok(Some(Snapshot { commit, files }))
}
