//! Directories of this machine, below the roots that the operator allowed.

use std::path::{Path, PathBuf};

use super::beneath::{self, Fingerprint};
use super::net::changed;
use super::settings::LocalSettings;
use super::{PICKLE, no_weights};
use crate::adapters::types::{AdapterRef, ByteStream, Credential, FileName, Origin, RemoteFile, Resolved, SourceError};

/// See [`LocalSettings`].
pub(super) struct Local {
    roots: Vec<PathBuf>,
    /// What the operator named, and what its links may not leave.
    named: Vec<(PathBuf, PathBuf)>,
}

/// One file as it was when it was looked at.
struct Found {
    name: FileName,
    path: PathBuf,
    print: Fingerprint,
}

impl Local {
    pub(super) fn new(settings: &LocalSettings) -> Self {
        let with_border = |dir: &PathBuf| (dir.clone(), border(dir).unwrap_or(dir).to_owned());
        Self { roots: settings.roots.clone(), named: settings.named.iter().map(with_border).collect() }
    }

    pub(super) fn is_off(&self) -> bool {
        self.roots.is_empty() && self.named.is_empty()
    }

    pub(super) async fn resolve(
        &self,
        reference: &AdapterRef,
        credential: &Credential,
    ) -> Result<Resolved, SourceError> {
        let path = PathBuf::from(&reference.locator);
        let root = self.root_of(&path, credential)?;
        let is_named = !self.roots.contains(&root);
        let reference = reference.clone();
        blocking(move || resolve_below(&root, &path, reference, is_named)).await
    }

    pub(super) async fn open(
        &self,
        resolved: &Resolved,
        file: &RemoteFile,
        offset: u64,
        credential: &Credential,
    ) -> Result<ByteStream, SourceError> {
        let root = self.root_of(Path::new(&resolved.reference.locator), credential)?;
        open_same(root, PathBuf::from(&file.locator), file, offset).await
    }

    pub(super) fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    /// True if the operator allows or named a directory that `path` is in.
    pub(super) fn is_open(&self, path: &Path, credential: &Credential) -> bool {
        self.root_of(path, credential).is_ok()
    }

    fn root_of(&self, path: &Path, credential: &Credential) -> Result<PathBuf, SourceError> {
        let named = if matches!(credential, Credential::Server) { self.named.as_slice() } else { &[] };
        let named = named.iter().find(|(dir, _)| path.starts_with(dir)).map(|(_, border)| border);
        named.or_else(|| self.roots.iter().find(|root| path.starts_with(root))).cloned().ok_or(SourceError::Absent)
    }
}

/// The repository's directory of a hub cache, if `dir` is one of its snapshots: whose files are links to blobs beside it.
fn border(dir: &Path) -> Option<&Path> {
    let is = |dir: &&Path, test: fn(&str) -> bool| dir.file_name().and_then(|name| name.to_str()).is_some_and(test);
    let snapshots = dir.ancestors().find(|dir| is(dir, |name| name == "snapshots"))?;
    snapshots.parent().filter(|repo| is(repo, |name| name.starts_with("models--")))
}

/// Opens `path` below `root` again, if it still is what `file` says.
pub(super) async fn open_same(
    root: PathBuf,
    path: PathBuf,
    file: &RemoteFile,
    offset: u64,
) -> Result<ByteStream, SourceError> {
    let (bytes, etag) = (file.bytes, file.etag.clone());
    blocking(move || {
        let (file, print) = beneath::open_file(&root, &path)?.ok_or_else(changed)?;
        if etag.as_deref() != Some(print.text().as_str()) {
            return Err(changed());
        }
        beneath::stream(file, offset, bytes)
    })
    .await
}

/// Runs `work` where it may wait for a disk.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(SourceError::retryable("reading the directory was interrupted")),
    }
}

/// `is_named`: the operator named this very directory, so it is read where it lies.
fn resolve_below(root: &Path, path: &Path, reference: AdapterRef, is_named: bool) -> Result<Resolved, SourceError> {
    let below = path.strip_prefix(root).map_err(|_| SourceError::Absent)?;
    let (dir, config) = match look(root, below, FileName::Config)? {
        Some(config) => (below.to_path_buf(), config),
        None => {
            let snapshot = only_snapshot(root, below)?.ok_or(SourceError::Absent)?;
            let config = look(root, &snapshot, FileName::Config)?.ok_or(SourceError::Absent)?;
            (snapshot, config)
        }
    };
    let Some(weights) = look(root, &dir, FileName::Weights)? else {
        return Err(no_weights(beneath::open_file(root, &dir.join(PICKLE))?.is_some()));
    };
    let newest_ns = config.print.modified_ns.max(weights.print.modified_ns);
    let names = FileName::ALL.map(FileName::as_str);
    // Whoever reads a directory by its path follows its links, also one that took a folder's place meanwhile. What others may
    // write below a root is therefore copied from the files that were checked and are open.
    let plain = if is_named { beneath::plain_directory(root, &dir, &names)? } else { None };
    let origin = match plain {
        Some(real) => Origin::Directory(real),
        None => Origin::Remote([&config, &weights].map(Found::to_file).into()),
    };
    Ok(Resolved {
        identity: format!("local:{}#{},{}", root.join(&dir).display(), config.print.text(), weights.print.text()),
        revision: utc_text(newest_ns.div_euclid(1_000_000_000)),
        reference,
        origin,
    })
}

impl Found {
    fn to_file(&self) -> RemoteFile {
        RemoteFile {
            name: self.name,
            bytes: self.print.bytes,
            digest: None,
            etag: Some(self.print.text()),
            locator: self.path.to_string_lossy().into_owned(),
        }
    }
}

fn look(root: &Path, dir: &Path, name: FileName) -> Result<Option<Found>, SourceError> {
    let path = dir.join(name.as_str());
    Ok(beneath::open_file(root, &path)?.map(|(_, print)| Found { name, path, print }))
}

/// A folder that a hub download was made into: exactly one `models--*/snapshots/<commit>`.
fn only_snapshot(root: &Path, dir: &Path) -> Result<Option<PathBuf>, SourceError> {
    let is_repo = |name: &str| name.starts_with("models--");
    let is_commit = |name: &str| name.len() == 40 && name.bytes().all(|b| b.is_ascii_hexdigit());
    let Some(repo) = only(root, dir, is_repo)? else { return Ok(None) };
    only(root, &repo.join("snapshots"), is_commit)
}

fn only(root: &Path, dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Option<PathBuf>, SourceError> {
    let mut names = beneath::names(root, dir)?.unwrap_or_default();
    names.retain(|name| wanted(name));
    Ok(match names.as_slice() {
        [name] => Some(dir.join(name)),
        _ => None,
    })
}

/// Unix seconds as `2026-11-21T15:04:05Z`.
fn utc_text(seconds: i128) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days since 0000-03-01, in eras of 400 years: the leap day is the last of its year.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i128::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
