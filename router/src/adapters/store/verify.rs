//! Reading stored files again, to tell a bad disk from a bad adapter.

use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::Store;

/// Bytes read at once.
const READ_BYTES: usize = 1 << 20;

impl Store {
    /// True if the files of `identity` are here and are what was downloaded. Damaged ones go, as with
    /// [`Self::quarantine`]. Reads both files: waits for the disk.
    pub(crate) fn verify(&self, identity: &str) -> bool {
        let (Some(files), Some(stored)) = (self.recorded(identity), self.get(identity)) else { return false };
        let whole = files.iter().all(|file| {
            let found = sha256(&stored.dir().join(file.name.as_str()));
            found.is_ok_and(|found| found == file.sha256)
        });
        if !whole {
            self.quarantine(identity);
        }
        whole
    }
}

fn sha256(path: &Path) -> io::Result<[u8; 32]> {
    let (mut file, mut hash, mut buffer) = (std::fs::File::open(path)?, Sha256::new(), vec![0; READ_BYTES]);
    loop {
        let bytes = file.read(&mut buffer)?;
        if bytes == 0 {
            return Ok(hash.finalize().into());
        }
        hash.update(buffer.get(..bytes).unwrap_or_default());
    }
}
