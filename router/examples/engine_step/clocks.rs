//! CPU time and allocations by group of threads.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Whose work a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Group {
    /// The engine's thread: plan, encode, write, commit, deliver.
    Engine,
    /// The thread that reads the shard's socket and decodes.
    Reports,
    /// Threads of the HTTP side: detokenise, build events, write to sockets.
    Http,
    /// The shard's part of the wire.
    Shard,
    /// Clients, and everything that is not measured.
    Other,
}

pub(crate) const GROUPS: [Group; 5] = [Group::Engine, Group::Reports, Group::Http, Group::Shard, Group::Other];

thread_local! {
    // Threads that nobody named are the engine's.
    static GROUP: Cell<usize> = const { Cell::new(0) };
}

static ALLOCATIONS: [AtomicU64; GROUPS.len()] = [const { AtomicU64::new(0) }; GROUPS.len()];

/// Says whose work the calling thread does.
pub(crate) fn join(group: Group) {
    GROUP.set(group as usize);
}

/// Allocations so far, by group.
pub(crate) fn allocations() -> [u64; GROUPS.len()] {
    std::array::from_fn(|at| ALLOCATIONS[at].load(Ordering::Relaxed))
}

/// The system's allocator with a counter in front.
pub(crate) struct Counting;

fn count() {
    let at = GROUP.try_with(Cell::get).unwrap_or(Group::Other as usize);
    ALLOCATIONS[at].fetch_add(1, Ordering::Relaxed);
}

// SAFETY: every call goes to `System` as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps `GlobalAlloc`'s contract, which is the same for `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

/// Threads of this process by name. A sleeping thread's clock is exact; a running one's is as old as its last tick.
pub(crate) struct ThreadClocks {
    names: BTreeMap<u64, Group>,
}

impl ThreadClocks {
    /// The threads that there are now.
    pub(crate) fn new() -> Self {
        let mut names = BTreeMap::new();
        for entry in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|id| id.parse().ok()) else { continue };
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            let group = match name.trim() {
                "engine" => Group::Engine,
                "shard-reports" => Group::Reports,
                "http" => Group::Http,
                _ => continue,
            };
            names.insert(id, group);
        }
        Self { names }
    }

    /// CPU time of the calling thread up to its last wait, us.
    pub(crate) fn own() -> f64 {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        text.split_whitespace().next().and_then(|ns| ns.parse().ok()).map_or(0.0, |ns: f64| ns / 1e3)
    }

    /// CPU time so far, us, by group.
    pub(crate) fn read(&self) -> [f64; GROUPS.len()] {
        let mut used = [0.0; GROUPS.len()];
        for (id, group) in &self.names {
            let text = std::fs::read_to_string(format!("/proc/self/task/{id}/schedstat")).unwrap_or_default();
            let ns: f64 = text.split_whitespace().next().and_then(|ns| ns.parse().ok()).unwrap_or(0.0);
            used[*group as usize] += ns / 1e3;
        }
        used
    }
}
