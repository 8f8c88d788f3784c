//! Removing what nobody needs. A removal that fails is tried again by the next sweep; its bytes stay counted meanwhile.

use std::path::Path;
use std::sync::Arc;

use super::{Shared, lock};

impl Shared {
    /// Unlinks dead contents, trash, and records that were forgotten. Waits for the disk; one thread at a time.
    pub(super) fn sweep(&self) {
        let _sweeping = lock(&self.sweeping);
        self.move_dead_out();
        let trash: Vec<_> = self.state().trash.keys().cloned().collect();
        for path in trash {
            match self.disk.remove_tree(&path) {
                Ok(()) => self.state().untrash(&path),
                Err(error) => tracing::warn!(path = %path.display(), "adapter store: cannot remove: {error}"),
            }
        }
        let forgotten = std::mem::take(&mut self.state().forgotten);
        for identity in forgotten {
            self.remove_record(identity);
        }
    }

    /// Takes dead contents out of their places, so that these are free, in the time of a rename each.
    fn move_dead_out(&self) {
        let _namespace = self.namespace();
        let dead = self.state().dead();
        for id in dead {
            let (from, to) = (self.layout.content(&id), self.scratch());
            match self.disk.rename(&from, &to) {
                Ok(()) => self.state().trash_content(&id, to),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => self.state().trash_content(&id, to),
                Err(error) => tracing::warn!(path = %from.display(), "adapter store: cannot evict: {error}"),
            }
        }
    }

    fn remove_record(&self, identity: Arc<str>) {
        let _index = lock(&self.index);
        if self.state().known.contains_key(&identity) {
            return; // it came back, and its new record is or will be there
        }
        let path = self.layout.record(&identity);
        if let Err(error) = self.disk.remove_file(&path) {
            tracing::warn!(path = %path.display(), "adapter store: cannot remove: {error}");
            self.state().forgotten.push(identity);
        }
    }

    /// Moves a directory that counts nowhere out of the way and removes it.
    pub(super) fn discard(&self, path: &Path) {
        let scratch = self.scratch();
        if self.disk.rename(path, &scratch).is_ok() {
            let _ = self.disk.remove_tree(&scratch); // else the next start does
        }
    }
}
