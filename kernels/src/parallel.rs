//! Threads: the global rayon pool, entered only when the work is worth a wake-up.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Work below this, in nanoseconds of one core, is done by the caller: waking a sleeping thread costs about as much.
const INLINE_BELOW_NS: usize = 12_000;

/// Threads that [`for_each`] uses at most.
pub(crate) fn threads() -> usize {
    rayon::current_num_threads().max(1)
}

/// Calls `body` once with each of `0..units`. `work_ns` is a guess of the whole on one core; small work runs here.
///
/// Threads claim units from a counter, so a thread that wakes late delays nobody.
pub(crate) fn for_each(units: usize, work_ns: usize, body: impl Fn(usize) + Sync) {
    let workers = threads().min(units);
    if workers < 2 || work_ns < INLINE_BELOW_NS {
        return (0..units).for_each(body);
    }
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let unit = next.fetch_add(1, Ordering::Relaxed);
            if unit >= units {
                return;
            }
            body(unit);
        }
    };
    fork(workers, &work);
}

/// Runs `work` on up to `workers` threads at once.
fn fork(workers: usize, work: &(impl Fn() + Sync)) {
    if workers <= 1 {
        return work();
    }
    rayon::join(|| fork(workers / 2, work), || fork(workers - workers / 2, work));
}

/// A pointer that threads share because each writes elements no other touches.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T>(*mut T);

// SAFETY: every user hands disjoint elements to the threads; see the comment at each `at`.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// # Safety
    /// `index` must lie in (or one past) the slice this was made from, and nobody else may access what is written there.
    pub(crate) unsafe fn at(self, index: usize) -> *mut T {
        // SAFETY: the caller keeps `index` inside the slice.
        unsafe { self.0.add(index) }
    }
}

/// Runs `body` on a thread of the pool, so that every op inside forks without a hand-over between threads. Worth it
/// around a whole forward pass: a fork from outside the pool costs the caller two context switches.
pub fn in_pool<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| body())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_runs_once_from_inside_and_outside_the_pool() {
        for work_ns in [0, usize::MAX] {
            for units in [0, 1, 2, 3, 1000] {
                let runs: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                let count = |unit: usize| {
                    runs[unit].fetch_add(1, Ordering::Relaxed);
                };
                for_each(units, work_ns, count);
                in_pool(|| for_each(units, work_ns, count));
                assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 2), "{units} units");
            }
        }
    }
}
