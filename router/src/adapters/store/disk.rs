//! Every call that the store makes on the file system. A test may make the n-th of them fail.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Decides before each call whether it fails. `call` is its name.
pub(crate) trait Faults: Send + Sync + 'static {
    /// An error makes the call fail with it, without effect; a `write` has written half by then.
    fn before(&self, call: &'static str) -> io::Result<()>;
}

/// No call fails by itself.
pub(crate) struct NoFaults;

impl Faults for NoFaults {
    fn before(&self, _call: &'static str) -> io::Result<()> {
        Ok(())
    }
}

/// The file system, as the store uses it: files 0600, directories 0700, no path from outside.
pub(super) struct Disk {
    faults: Box<dyn Faults>,
}

impl Disk {
    pub(super) fn new(faults: Box<dyn Faults>) -> Self {
        Self { faults }
    }

    /// True if it was made, false if it was there.
    pub(super) fn create_dir(&self, path: &Path) -> io::Result<bool> {
        self.faults.before("create_dir")?;
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A new file; one that is there is an error.
    pub(super) fn create(&self, path: &Path) -> io::Result<File> {
        self.faults.before("create")?;
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
    }

    /// An existing file, to go on writing.
    pub(super) fn reopen(&self, path: &Path) -> io::Result<File> {
        self.faults.before("reopen")?;
        OpenOptions::new().read(true).write(true).open(path)
    }

    pub(super) fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.faults.before("write") {
            file.write_all(bytes.get(..bytes.len() / 2).unwrap_or_default())?;
            return Err(error);
        }
        file.write_all(bytes)
    }

    pub(super) fn truncate(&self, file: &File) -> io::Result<()> {
        self.faults.before("truncate")?;
        file.set_len(0)
    }

    pub(super) fn sync(&self, file: &File) -> io::Result<()> {
        self.faults.before("sync")?;
        file.sync_all()
    }

    pub(super) fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.faults.before("sync_dir")?;
        File::open(path)?.sync_all()
    }

    pub(super) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.faults.before("rename")?;
        fs::rename(from, to)
    }

    /// A file that is not there is fine.
    pub(super) fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.faults.before("remove_file")?;
        absent_is_fine(fs::remove_file(path))
    }

    /// A directory and what is in it, or a file; one that is not there is fine.
    pub(super) fn remove_tree(&self, path: &Path) -> io::Result<()> {
        self.faults.before("remove_tree")?;
        match fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => absent_is_fine(fs::remove_dir_all(path)),
            Ok(_) => absent_is_fine(fs::remove_file(path)),
            Err(error) => absent_is_fine(Err(error)),
        }
    }

    pub(super) fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.faults.before("read")?;
        fs::read(path)
    }

    /// Paths in a directory; none if it is not there.
    pub(super) fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        self.faults.before("list")?;
        match fs::read_dir(path) {
            Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Replaces `path` by `bytes` at once and durably: after a crash it is either the old or the new file.
    pub(super) fn replace(&self, path: &Path, scratch: &Path, bytes: &[u8]) -> io::Result<()> {
        let written = self.create(scratch).and_then(|mut file| {
            self.write(&mut file, bytes)?;
            self.sync(&file)
        });
        let placed = written.and_then(|()| self.rename(scratch, path));
        if placed.is_err() {
            let _ = fs::remove_file(scratch); // if that fails too, the next start removes it
        }
        placed?;
        path.parent().map_or(Ok(()), |parent| self.sync_dir(parent))
    }

    /// Bytes that this process may still write on the file system of `path`. One that does not say its size has room.
    pub(super) fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.faults.before("free_bytes")?;
        let found = rustix::fs::statvfs(path)?;
        if found.f_blocks == 0 {
            return Ok(u64::MAX);
        }
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    /// Notes `now` as the time of `path`. Best effort: it only orders evictions after a restart.
    pub(super) fn touch(&self, path: &Path, now: SystemTime) {
        let _ = OpenOptions::new().append(true).open(path).and_then(|file| file.set_modified(now));
    }
}

fn absent_is_fine(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Size of a regular file, not through a link.
pub(super) fn file_bytes(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file).map(|found| found.len())
}
