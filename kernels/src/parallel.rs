//! Threads: one team for the process, entered only when the work is worth it.
//!
//! A step is some hundred short regions, one after another. Between two of them the team's threads look for work for some
//! microseconds before they sleep, so that a region costs a cache line's way to another core and not a wake-up; an idle
//! process burns nothing.

mod first;
mod team;

pub(crate) use first::First;
pub use team::{in_pool, set_threads, threads};

/// Work below this, in nanoseconds of one core, is done by the caller: handing it over costs about as much.
const INLINE_BELOW_NS: usize = 3_000;

/// Calls `body` once with each of `0..units`. `work_ns` is a guess of the whole on one core; small work runs here.
///
/// Each thread has a contiguous range of units and works it off in order, so that a unit may fetch the memory of the next
/// one ahead; who is done takes from the others, so a thread that comes late delays nobody.
pub fn for_each(units: usize, work_ns: usize, body: impl Fn(usize) + Sync) {
    if units < 2 || work_ns < INLINE_BELOW_NS {
        return (0..units).for_each(body);
    }
    team::run(units, &body);
}

/// A pointer that threads share because each writes elements no other touches.
pub(crate) struct SharedMut<T>(*mut T);

impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<T> {}

// SAFETY: every user hands disjoint elements to the threads; see the comment at each `at`.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(values: &mut [T]) -> Self {
        Self(values.as_mut_ptr())
    }

    /// Of values that are only read.
    pub(crate) fn of_read(values: &[T]) -> Self {
        Self(values.as_ptr().cast_mut())
    }

    /// # Safety
    /// `index` must lie in (or one past) the slice this was made from, and nobody else may access what is written there.
    pub(crate) unsafe fn at(self, index: usize) -> *mut T {
        // SAFETY: the caller keeps `index` inside the slice.
        unsafe { self.0.add(index) }
    }
}

/// Calls `body(i, &mut rows[i * width..][..width])` for each row, spread over the team.
pub fn for_each_chunk<T: Send>(values: &mut [T], width: usize, work_ns: usize, body: impl Fn(usize, &mut [T]) + Sync) {
    let chunks = values.len().checked_div(width).unwrap_or(0);
    let shared = SharedMut::new(values);
    for_each(chunks, work_ns, |i| {
        // SAFETY: chunk `i` lies in `values`, and no other unit has it.
        body(i, unsafe { std::slice::from_raw_parts_mut(shared.at(i * width), width) });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

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

    #[test]
    fn many_callers_and_nested_calls_share_the_team() {
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        for_each(7, usize::MAX, |_| {
                            for_each(5, usize::MAX, |_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 8 * 200 * 35);
    }

    #[test]
    fn a_panic_in_a_unit_reaches_the_caller_and_the_team_lives_on() {
        for bad in [0, 999] {
            let outcome = std::panic::catch_unwind(|| {
                for_each(1000, usize::MAX, |unit| assert_ne!(unit, bad, "a unit fails"));
            });
            assert!(outcome.is_err());
            let done = AtomicUsize::new(0);
            for_each(1000, usize::MAX, |_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.load(Ordering::Relaxed), 1000);
        }
    }

    #[test]
    fn chunks_are_each_threads_own() {
        let mut values = vec![0usize; 12 * 7 + 3];
        for_each_chunk(&mut values, 12, usize::MAX, |i, chunk| chunk.fill(i + 1));
        assert!(values[..84].iter().enumerate().all(|(at, value)| *value == at / 12 + 1));
        assert_eq!(values[84..], [0; 3]);
    }

    #[test]
    fn a_sleeping_team_wakes() {
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let done = AtomicUsize::new(0);
            for_each(64, usize::MAX, |_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.load(Ordering::Relaxed), 64);
        }
    }
}
