//! Compiled kernels on disk, under the hash of all that went into them. A cache is a convenience: whatever is wrong with
//! it costs a compilation and a warning, never an error.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

/// Begins every file; a change of the layout changes it.
const MAGIC: &[u8; 8] = b"lmxcode1";

/// Bytes of a checksum.
const SUM_BYTES: usize = 32;

/// SHA-256 over parts, as 64 hex digits. Each part's length goes in too, so moving a byte from one to the next shows.
#[derive(Debug, Default)]
pub(super) struct Key(Sha256);

impl Key {
    /// Adds a part.
    pub(super) fn part(mut self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// The name.
    pub(super) fn hex(self) -> String {
        self.0.finalize().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}"); // writing to a string does not fail
            text
        })
    }
}

/// A name beside `path` that no other thread or process uses.
pub(super) fn part_of(path: &Path) -> PathBuf {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    path.with_extension(format!("{}-{serial}.part", std::process::id()))
}

/// Writes a file that others see whole or not at all, also after a power cut.
///
/// # Errors
/// Those of the file system; no part of the file is left then.
fn publish(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = part_of(path);
    let write = || {
        let mut file = File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&part, path)
    };
    write().inspect_err(|_| drop(std::fs::remove_file(&part)))
}

/// A folder of compiled kernels, shared by threads and processes.
#[derive(Debug, Default)]
pub struct CodeCache {
    dir: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// A write has failed and was warned of.
    is_read_only: bool,
    warnings: Vec<String>,
}

impl CodeCache {
    /// A cache in `dir`, which is made when it is first written to; none keeps nothing.
    #[must_use]
    pub fn new(dir: Option<PathBuf>) -> Self {
        Self { dir, state: Mutex::default() }
    }

    /// What was wrong with files and folder since the last call.
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().warnings)
    }

    /// The bytes under `key`, if they are there and whole.
    pub(super) fn get(&self, key: &str) -> Option<Vec<u8>> {
        let path = self.path(key)?;
        let file = std::fs::read(&path).ok()?;
        let bytes = content(&file);
        if bytes.is_none() {
            self.warn(format!("{} is damaged and is compiled again", path.display()));
        }
        bytes.map(<[u8]>::to_vec)
    }

    /// Keeps `bytes` under `key`.
    pub(super) fn put(&self, key: &str, bytes: &[u8]) {
        let Some(path) = self.path(key) else { return };
        if self.lock().is_read_only {
            return;
        }
        let mut file = Vec::with_capacity(MAGIC.len() + SUM_BYTES + bytes.len());
        file.extend(MAGIC);
        file.extend(Sha256::digest(bytes));
        file.extend(bytes);
        let dir = path.parent().unwrap_or(Path::new("."));
        if let Err(error) = std::fs::create_dir_all(dir).and_then(|()| publish(&path, &file)) {
            let mut state = self.lock();
            if !std::mem::replace(&mut state.is_read_only, true) {
                let text = format!("compiled kernels are not kept: {}: {error}", dir.display());
                state.warnings.push(text);
            }
        }
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| dir.join(format!("{key}.code")))
    }

    fn warn(&self, text: String) {
        self.lock().warnings.push(text);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic elsewhere cannot leave half a state: every change is one assignment or one push.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The content of a file, if it is as it was written.
fn content(file: &[u8]) -> Option<&[u8]> {
    let rest = file.strip_prefix(MAGIC)?;
    let (sum, bytes) = rest.split_at_checked(SUM_BYTES)?;
    (Sha256::digest(bytes).as_slice() == sum).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("loramux-cache-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&dir);
            Self(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_was_put_is_found_again_and_the_folder_is_made() {
        let dir = Dir::new("round");
        let cache = CodeCache::new(Some(dir.0.join("a/b")));
        assert_eq!(cache.get("k"), None);
        cache.put("k", b"bytes");
        assert_eq!(cache.get("k").as_deref(), Some(&b"bytes"[..]));
        assert_eq!(CodeCache::new(None).get("k"), None);
        assert!(cache.take_warnings().is_empty());
    }

    #[test]
    fn every_flipped_or_lost_byte_is_noticed() {
        let dir = Dir::new("damage");
        let cache = CodeCache::new(Some(dir.0.clone()));
        cache.put("k", b"0123456789");
        let path = dir.0.join("k.code");
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            std::fs::write(&path, &damaged).unwrap();
            assert_eq!(cache.get("k"), None, "byte {at} flipped");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(cache.get("k"), None, "cut at {at}");
        }
        assert_eq!(cache.take_warnings().len(), 2 * whole.len());
        cache.put("k", b"new");
        assert_eq!(cache.get("k").as_deref(), Some(&b"new"[..]));
    }

    #[test]
    fn a_folder_that_cannot_be_written_warns_once() {
        let dir = Dir::new("unwritable");
        std::fs::create_dir_all(&dir.0).unwrap();
        std::fs::write(dir.0.join("file"), b"").unwrap();
        let cache = CodeCache::new(Some(dir.0.join("file/below"))); // a folder below a file: also root cannot make it
        cache.put("k", b"1");
        cache.put("l", b"2");
        assert_eq!(cache.take_warnings().len(), 1);
    }

    #[test]
    fn a_key_depends_on_where_its_parts_end() {
        assert_ne!(Key::default().part("ab").part("c").hex(), Key::default().part("a").part("bc").hex());
        assert_eq!(Key::default().part("ab").hex().len(), 64);
    }
}
