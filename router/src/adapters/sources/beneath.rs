//! Files below a directory, and nothing else: links may point anywhere below it, never out of it.
//!
//! The kernel decides where it can (`openat2` with `RESOLVE_BENEATH`), so nobody can swap a part of the path between a check
//! and the use. Older kernels get the same answer by resolving first and asking afterwards what was really opened.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::stream::{StreamExt, try_unfold};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat, openat2, statat};
use rustix::io::Errno;

use super::net::changed;
use crate::adapters::types::{ByteStream, SourceError};

/// The kernel says EAGAIN when something was renamed while it resolved.
const RACES_MAX: usize = 16;
/// Names of one directory that are looked at.
const NAMES_MAX: usize = 1024;
const CHUNK_BYTES: usize = 256 * 1024;

/// What tells two states of a file apart without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint {
    pub device: u64,
    pub inode: u64,
    pub modified_ns: i128,
    pub bytes: u64,
}

impl Fingerprint {
    fn of(file: &File) -> io::Result<Option<Self>> {
        let found = file.metadata()?;
        let modified_ns = i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec());
        let print = Self { device: found.dev(), inode: found.ino(), modified_ns, bytes: found.size() };
        Ok(found.is_file().then_some(print))
    }

    /// As a part of identities and entity tags.
    pub(super) fn text(&self) -> String {
        format!("{:x}-{:x}-{:x}-{:x}", self.device, self.inode, self.modified_ns, self.bytes)
    }
}

/// The regular file at `path` below `root`. `None`: not there, not readable, no regular file, or a link leads out of `root`.
pub(super) fn open_file(root: &Path, path: &Path) -> Result<Option<(File, Fingerprint)>, SourceError> {
    // A look first: opening a device may already do something.
    let Some(looked) = open(root, path, OFlags::PATH)? else { return Ok(None) };
    let looked = File::from(looked);
    if !looked.metadata().is_ok_and(|found| found.is_file()) {
        return Ok(None);
    }
    // What was looked at may be a pipe by now, which must not block.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let Some(file) = open(root, path, flags)?.map(File::from) else { return Ok(None) };
    let print = Fingerprint::of(&file).map_err(|error| broken(&error))?;
    Ok(print.map(|print| (file, print)))
}

/// Names of the directory at `path` below `root`, or `None` if there is none.
pub(super) fn names(root: &Path, path: &Path) -> Result<Option<Vec<String>>, SourceError> {
    let Some(dir) = open(root, path, OFlags::RDONLY | OFlags::DIRECTORY)? else { return Ok(None) };
    let entries = Dir::new(dir).map_err(|error| broken(&error.into()))?;
    let name = |entry: rustix::io::Result<rustix::fs::DirEntry>| {
        entry.ok().and_then(|entry| entry.file_name().to_str().ok().map(str::to_owned))
    };
    Ok(Some(entries.take(NAMES_MAX).filter_map(name).filter(|name| !matches!(name.as_str(), "." | "..")).collect()))
}

/// The real path of the directory at `path`, if `files` lie in it themselves and not behind links.
pub(super) fn plain_directory(root: &Path, path: &Path, files: &[&str]) -> Result<Option<PathBuf>, SourceError> {
    let Some(dir) = open(root, path, OFlags::PATH | OFlags::DIRECTORY)? else { return Ok(None) };
    let is_plain = |name: &&str| {
        statat(&dir, *name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::RegularFile)
    };
    if files.iter().all(is_plain) { Ok(real_path(&dir).ok()) } else { Ok(None) }
}

/// The bytes of an open file from `offset` on, read on the blocking pool; exactly `bytes - offset` of them.
pub(super) fn stream(mut file: File, offset: u64, bytes: u64) -> Result<ByteStream, SourceError> {
    file.seek(SeekFrom::Start(offset)).map_err(|error| broken(&error))?;
    let start = (file, bytes.checked_sub(offset).ok_or_else(changed)?);
    let chunks = try_unfold(start, |(mut file, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let read = move || {
            let mut chunk = vec![0; CHUNK_BYTES.min(usize::try_from(left).unwrap_or(CHUNK_BYTES))];
            let len = file.read(&mut chunk)?;
            chunk.truncate(len);
            io::Result::Ok((chunk, file))
        };
        let read = tokio::task::spawn_blocking(read).await;
        let (chunk, file) = match read {
            Ok(Ok((chunk, file))) if !chunk.is_empty() => (chunk, file),
            Ok(Err(error)) => return Err(broken(&error)),
            _ => return Err(changed()),
        };
        let left = left - chunk.len() as u64;
        Ok(Some((Bytes::from(chunk), (file, left))))
    });
    Ok(chunks.boxed())
}

fn open(root: &Path, path: &Path, flags: OFlags) -> Result<Option<OwnedFd>, SourceError> {
    let flags = flags | OFlags::CLOEXEC;
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    match open_by_kernel(root, path, flags) {
        // Not there, or forbidden by a sandbox that does not know it.
        Err(Errno::NOSYS | Errno::PERM) => answer(open_by_asking(root, path, flags)),
        other => answer(other),
    }
}

fn answer(found: rustix::io::Result<OwnedFd>) -> Result<Option<OwnedFd>, SourceError> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(
            Errno::NOENT
            | Errno::NOTDIR
            | Errno::LOOP
            | Errno::XDEV
            | Errno::ACCESS
            | Errno::PERM
            | Errno::NAMETOOLONG
            | Errno::NXIO
            | Errno::ISDIR
            | Errno::INVAL
            | Errno::NODEV,
        ) => Ok(None),
        Err(error) => Err(broken(&error.into())),
    }
}

fn open_by_kernel(root: &Path, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let root = openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..RACES_MAX {
        match openat2(&root, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    Err(Errno::NOENT)
}

fn open_by_asking(root: &Path, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let errno = |error: io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let root = root.canonicalize().map_err(errno)?;
    let resolved = root.join(path).canonicalize().map_err(errno)?;
    if !resolved.starts_with(&root) {
        return Err(Errno::XDEV);
    }
    let opened = openat(CWD, &resolved, flags | OFlags::NOFOLLOW, Mode::empty())?;
    if real_path(&opened).map_err(errno)?.starts_with(&root) { Ok(opened) } else { Err(Errno::XDEV) }
}

/// Where an open file lies, as the kernel knows it.
fn real_path(opened: &OwnedFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd()))
}

fn broken(error: &io::Error) -> SourceError {
    SourceError::retryable(format!("the directory cannot be read: {}", error.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_opening_answer_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("a/file"), "in").unwrap();
        std::fs::write(dir.path().join("secret"), "out").unwrap();
        for (link, target) in [
            ("a/b/up", "../file"),
            ("a/b/out", "../../../secret"),
            ("a/absolute", "/etc/passwd"),
            ("a/loop", "loop"),
            ("a/proc", "/proc/self/exe"),
            ("a/inside", &format!("{}/a/file", root.display())),
            ("a/out_and_in", "../../root/a/file"),
        ] {
            std::os::unix::fs::symlink(target, root.join(link)).unwrap();
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        for path in [
            "a/file",
            "a/b/up",
            "a/b/out",
            "a/absolute",
            "a/loop",
            "a/proc",
            "../secret",
            "/etc/passwd",
            "a/none",
            "a/file/x",
        ] {
            let read = |opened: rustix::io::Result<OwnedFd>| {
                opened.ok().map(|file| io::read_to_string(File::from(file)).unwrap_or_default())
            };
            let by_kernel = read(open_by_kernel(&root, Path::new(path), flags));
            let expected = matches!(path, "a/file" | "a/b/up").then(|| "in".to_owned());
            assert_eq!(by_kernel, expected, "{path}");
            assert_eq!(read(open_by_asking(&root, Path::new(path), flags)), expected, "{path}");
        }
    }
}
