//! Merges on disk: the bytes they may take together, and whose turn it is to have one made.
//!
//! The files of a merge are in no store and on no tenant's account, so they have a limit of their own. A merge is made by the
//! one thread of the shard that also reads large adapters: a tenant has one made at a time, so that it stands before nobody
//! else more than once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::contents::Merge;
use super::failure;
use crate::engine::{AdapterFailure, MergeAsk};
use crate::http::Backend;

/// Share of the disk quota that merges may take besides it.
const SHARE_OF_QUOTA: u64 = 8;
/// Bytes of all merges where the disk has no quota.
const BYTES_WITHOUT_QUOTA: u64 = 8 << 30;
/// Merges of one tenant that are made or wait.
const PLACES_PER_TENANT: usize = 64;
/// Directory, configuration and rounding to blocks.
const ROUNDING_BYTES: u64 = 64 << 10;

/// See the module.
pub(super) struct MergedDirs {
    bytes_max: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Of all merges that are there or are being made.
    bytes: u64,
    /// Tenants that have one made or wait.
    lines: HashMap<u64, Line>,
}

struct Line {
    turn: Arc<Semaphore>,
    places: usize,
}

/// The directory of one merge. It goes with its last clone.
pub(super) struct Made {
    dirs: Arc<MergedDirs>,
    dir: PathBuf,
    bytes: u64,
}

/// A place in a tenant's line. Dropping it gives it back.
struct Place {
    dirs: Arc<MergedDirs>,
    tenant: u64,
}

impl MergedDirs {
    /// `quota_bytes`: what downloads may take on the same disk, if there is a limit.
    pub(super) fn new(quota_bytes: Option<u64>) -> Arc<Self> {
        let bytes_max = quota_bytes.map_or(BYTES_WITHOUT_QUOTA, |quota| quota / SHARE_OF_QUOTA);
        Arc::new(Self { bytes_max, state: Mutex::default() })
    }

    /// Has a merge made. `forget_idle` takes one that nobody uses out of the table.
    ///
    /// # Errors
    /// `adapter_too_large`; `disk_full`; `adapter_load_failed` for too many that wait, or for the file system; what the shard says.
    pub(super) async fn make(
        self: &Arc<Self>,
        engine: &dyn Backend,
        tenant: u64,
        merge: &Merge,
        forget_idle: impl Fn() -> Option<Arc<Made>>,
    ) -> Result<Arc<Made>, AdapterFailure> {
        let (_place, _turn) = self.turn(tenant).await?;
        let dir = merge.ask.out_dir.clone();
        let need = needed_bytes(&merge.ask.dirs).await;
        self.make_room(need, forget_idle).await?;
        // From here on every end but the last one takes the directory and its bytes with it.
        let mut made = Made { dirs: Arc::clone(self), dir: dir.with_extension("part"), bytes: need };
        tokio::fs::create_dir_all(&made.dir).await.map_err(cannot_write)?;
        engine.merge_adapters(MergeAsk { out_dir: made.dir.clone(), ..merge.ask.clone() }).await?;
        tokio::fs::rename(&made.dir, &dir).await.map_err(cannot_write)?;
        made.dir.clone_from(&dir);
        let found = tokio::task::spawn_blocking(move || bytes_of(&dir)).await.unwrap_or(need);
        made.has(found);
        Ok(Arc::new(made))
    }

    /// Waits until no other merge of this tenant is made.
    async fn turn(self: &Arc<Self>, tenant: u64) -> Result<(Place, OwnedSemaphorePermit), AdapterFailure> {
        let given_up = |why: &str| failure("adapter_load_failed", format!("service unavailable: {why}; try again"));
        let (place, turn) = {
            let mut state = self.state();
            let line =
                state.lines.entry(tenant).or_insert_with(|| Line { turn: Arc::new(Semaphore::new(1)), places: 0 });
            if line.places >= PLACES_PER_TENANT {
                return Err(given_up(&format!("{PLACES_PER_TENANT} merges wait to be made")));
            }
            line.places += 1;
            (Place { dirs: Arc::clone(self), tenant }, Arc::clone(&line.turn))
        };
        let turn = turn.acquire_owned().await.map_err(|_| given_up("the merge was given up"))?;
        Ok((place, turn))
    }

    /// Counts `need` bytes more, once enough idle merges are gone.
    async fn make_room(&self, need: u64, forget_idle: impl Fn() -> Option<Arc<Made>>) -> Result<(), AdapterFailure> {
        let max = self.bytes_max;
        if need > max {
            let message = format!(
                "this merge may take {need} bytes; all merges together may take {max}, an eighth of --adapter-disk-quota"
            );
            return Err(failure("adapter_too_large", message));
        }
        while !self.reserve(need) {
            let Some(idle) = forget_idle() else {
                let message = format!(
                    "no room on disk for {need} bytes of this merge: merges in use take the rest of {max} bytes, an eighth \
                     of --adapter-disk-quota"
                );
                return Err(failure("disk_full", message));
            };
            let _ = tokio::task::spawn_blocking(move || drop(idle)).await; // unlinks
        }
        Ok(())
    }

    fn reserve(&self, need: u64) -> bool {
        let mut state = self.state();
        let fits = state.bytes.saturating_add(need) <= self.bytes_max;
        if fits {
            state.bytes += need;
        }
        fits
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Made {
    /// Where its files are.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// It takes this much, not what was reserved.
    fn has(&mut self, bytes: u64) {
        let mut state = self.dirs.state();
        state.bytes = state.bytes.saturating_sub(self.bytes).saturating_add(bytes);
        drop(state);
        self.bytes = bytes;
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let gone = std::fs::remove_dir_all(&self.dir);
        if let Err(error) = gone.as_ref().map_err(std::io::Error::kind)
            && error != std::io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %self.dir.display(), "a merge cannot be removed: {error}");
        }
        let mut state = self.dirs.state();
        state.bytes = state.bytes.saturating_sub(self.bytes);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.dirs.state();
        if let Some(line) = state.lines.get_mut(&self.tenant) {
            line.places -= 1;
            if line.places == 0 {
                state.lines.remove(&self.tenant);
            }
        }
    }
}

fn cannot_write(error: std::io::Error) -> AdapterFailure {
    failure("adapter_load_failed", format!("service unavailable: the merge cannot be written: {error}"))
}

/// The most that a merge of these may take: their ranks add up, and where their types differ it is written as f32.
async fn needed_bytes(dirs: &[PathBuf]) -> u64 {
    let mut bytes = 0_u64;
    for dir in dirs {
        let weights = tokio::fs::metadata(dir.join("adapter_model.safetensors")).await;
        bytes = bytes.saturating_add(weights.map_or(0, |data| data.len()));
    }
    bytes.saturating_mul(2).saturating_add(ROUNDING_BYTES)
}

fn bytes_of(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let bytes: u64 = files.filter_map(|file| file.metadata().ok()).map(|data| data.len()).sum();
    bytes.saturating_add(ROUNDING_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(dirs: &Arc<MergedDirs>, root: &Path, name: &str, bytes: u64) -> Arc<Made> {
        let dir = root.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        assert!(dirs.reserve(bytes));
        Arc::new(Made { dirs: Arc::clone(dirs), dir, bytes })
    }

    #[tokio::test]
    async fn idle_merges_give_way_and_the_bytes_never_pass_the_limit() {
        let root = tempfile::tempdir().unwrap();
        let dirs = MergedDirs::new(Some(800));
        let idle = Mutex::new(vec![made(&dirs, root.path(), "a", 40), made(&dirs, root.path(), "b", 40)]);
        let forget = || idle.lock().unwrap().pop();
        dirs.make_room(60, forget).await.unwrap();
        assert_eq!(dirs.state().bytes, 100, "one idle merge was enough");
        assert!(!root.path().join("b").exists(), "its files went before its bytes were given away");
        assert!(root.path().join("a").exists());
        dirs.make_room(40, forget).await.unwrap();
        assert!(!root.path().join("a").exists());
        let full = dirs.make_room(1, forget).await.unwrap_err();
        assert_eq!(full.code, "disk_full");
        let large = dirs.make_room(101, || unreachable!("nothing goes for what can never fit")).await.unwrap_err();
        assert_eq!(large.code, "adapter_too_large");
    }

    #[tokio::test]
    async fn a_tenant_has_one_merge_made_at_a_time_and_stands_before_nobody_else() {
        let dirs = MergedDirs::new(None);
        let first = dirs.turn(7).await.unwrap();
        let _other = dirs.turn(8).await.unwrap();
        let mut waiting = Vec::new();
        for _ in 1..PLACES_PER_TENANT {
            let mut turn = Box::pin(dirs.turn(7));
            assert!(futures_util::poll!(&mut turn).is_pending());
            waiting.push(turn);
        }
        assert_eq!(dirs.turn(7).await.err().unwrap().code, "adapter_load_failed", "no endless line");
        drop(first);
        let second = waiting.remove(0).await.unwrap();
        drop((second, waiting));
        assert!(!dirs.state().lines.contains_key(&7), "a line that nobody stands in is forgotten");
    }

    #[test]
    fn a_merge_takes_its_directory_and_its_bytes_with_it() {
        let root = tempfile::tempdir().unwrap();
        let dirs = MergedDirs::new(Some(8000));
        let merge = made(&dirs, root.path(), "a.part", 500);
        let user = Arc::clone(&merge);
        drop(merge);
        assert!(user.dir().exists(), "somebody uses it");
        drop(user);
        assert!(!root.path().join("a.part").exists());
        assert_eq!(dirs.state().bytes, 0);
    }
}
