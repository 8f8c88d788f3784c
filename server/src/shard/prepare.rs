//! Threads that read, check, pack and merge adapters beside the steps.
//!
//! Small adapters and large ones have threads of their own, so a slow large one holds up no small one, and what is in
//! memory at a time is bounded: one large adapter (or merge), and a few small ones.

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use loramux_proto::{AdapterError, MergeAdapters, Merged, PrepareAdapter, Prepared, from_shard, prepared};

use super::{Reply, Slab, memory};

/// Threads for small adapters at most. More would only fight the kernels for cores and the disk for bandwidth.
const SMALL_THREADS_MAX: usize = 3;
/// A weights file of more bytes is large. Reading one takes about five times its size for a moment.
const SMALL_BYTES_MAX: u64 = 256 << 20;
/// Asks that may wait; the router has fewer under way.
const QUEUE_MAX: usize = 4096;

/// What the threads are asked for.
pub(super) enum Work {
    Prepare(PrepareAdapter),
    Merge(MergeAdapters),
}

impl Work {
    /// Merges hold all their parts at once.
    fn is_large(&self) -> bool {
        match self {
            Self::Merge(_) => true,
            Self::Prepare(prepare) => {
                let file = std::fs::metadata(Path::new(&prepare.dir).join("adapter_model.safetensors"));
                file.is_ok_and(|file| file.len() > SMALL_BYTES_MAX)
            }
        }
    }

    /// The answer. A panic is one too: the files are a stranger's, and whoever asked must hear something.
    fn answer(&self, slab: &Slab) -> from_shard::Body {
        std::panic::catch_unwind(AssertUnwindSafe(|| self.run(slab))).unwrap_or_else(|_| self.failed())
    }

    fn failed(&self) -> from_shard::Body {
        let (code, message) = ("adapter_load_failed".to_owned(), "these files broke their reader".to_owned());
        let error = AdapterError { code, message };
        match self {
            Self::Prepare(PrepareAdapter { request_id, .. }) => from_shard::Body::Prepared(Prepared {
                request_id: *request_id,
                outcome: Some(prepared::Outcome::Error(error)),
            }),
            Self::Merge(MergeAdapters { request_id, .. }) => {
                from_shard::Body::Merged(Merged { request_id: *request_id, error: Some(error) })
            }
        }
    }

    fn run(&self, slab: &Slab) -> from_shard::Body {
        match self {
            Self::Prepare(prepare) if prepare.check_only => from_shard::Body::Prepared(slab.check(prepare)),
            Self::Prepare(prepare) => from_shard::Body::Prepared(slab.prepare(prepare)),
            Self::Merge(merge) => from_shard::Body::Merged(slab.merge(merge)),
        }
    }
}

/// The threads. They write into memory of the executor, so they end before it does.
pub(super) struct PrepareThreads {
    /// `None` once they shall end.
    queue: Option<SyncSender<Work>>,
    threads: Vec<JoinHandle<()>>,
}

impl PrepareThreads {
    /// Two to four threads, by the machine's cores.
    pub(super) fn start(slab: &Arc<Slab>, reply: &Reply) -> Result<Self, String> {
        let (queue, small) = mpsc::sync_channel::<Work>(QUEUE_MAX);
        // As long as the first: a small thread never waits for the large one.
        let (to_large, large) = mpsc::sync_channel::<Work>(QUEUE_MAX);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let small = Arc::new(Mutex::new(small));
        let mut threads = Self { queue: Some(queue), threads: Vec::new() };
        for n in 0..(cores / 4).clamp(1, SMALL_THREADS_MAX) {
            let (small, to_large) = (Arc::clone(&small), to_large.clone());
            let (slab, reply) = (Arc::clone(slab), Arc::clone(reply));
            threads.spawn(&format!("prepare-{n}"), move || serve_small(&small, &to_large, &slab, &reply))?;
        }
        let (slab, reply) = (Arc::clone(slab), Arc::clone(reply));
        // Ends when the last thread that could pass it work has.
        let serve_large = move || {
            large.iter().for_each(|work| {
                reply(work.answer(&slab));
                memory::give_back_freed();
            });
        };
        threads.spawn("prepare-large", serve_large)?;
        Ok(threads)
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
        self.threads.push(thread.map_err(|e| format!("cannot start a thread: {e}"))?);
        Ok(())
    }

    /// False if too much waits already.
    pub(super) fn submit(&self, work: Work) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.try_send(work).is_ok())
    }
}

fn serve_small(small: &Mutex<Receiver<Work>>, to_large: &SyncSender<Work>, slab: &Slab, reply: &Reply) {
    while let Some(work) = next(small) {
        if work.is_large() {
            // The large thread ends after this one, so it is there.
            let _ = to_large.send(work);
        } else {
            reply(work.answer(slab));
        }
    }
}

/// The next work; `None` when there will be no more. What the last work freed is given back before it waits.
fn next(small: &Mutex<Receiver<Work>>) -> Option<Work> {
    let receiver = || small.lock().unwrap_or_else(PoisonError::into_inner);
    let waiting = receiver().try_recv();
    waiting.ok().or_else(|| {
        memory::give_back_freed();
        receiver().recv().ok()
    })
}

impl Drop for PrepareThreads {
    fn drop(&mut self) {
        self.queue = None;
        for thread in self.threads.drain(..) {
            // One that panicked has said so, and holds nothing any more.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merge_and_a_large_file_leave_the_small_threads_free() {
        let dir = tempfile::tempdir().expect("a folder");
        let work =
            || Work::Prepare(PrepareAdapter { dir: dir.path().display().to_string(), ..PrepareAdapter::default() });
        assert!(!work().is_large(), "there is no file");
        let file = std::fs::File::create(dir.path().join("adapter_model.safetensors")).expect("a file");
        file.set_len(SMALL_BYTES_MAX).expect("a sparse file");
        assert!(!work().is_large());
        file.set_len(SMALL_BYTES_MAX + 1).expect("a sparse file");
        assert!(work().is_large());
        assert!(Work::Merge(MergeAdapters::default()).is_large());
    }

    #[test]
    fn what_breaks_its_reader_is_answered() {
        let from_shard::Body::Prepared(prepared) =
            Work::Prepare(PrepareAdapter { request_id: 7, ..PrepareAdapter::default() }).failed()
        else {
            panic!("a preparation is answered by a preparation")
        };
        assert_eq!(prepared.request_id, 7);
        assert!(
            matches!(prepared.outcome, Some(prepared::Outcome::Error(error)) if error.code == "adapter_load_failed")
        );
    }
}
