//! Units of a region that its others wait for.

use super::team::look_again;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Units that come before others of a region. A thread that needs them takes what nobody has taken yet and waits for the rest,
/// so that nobody waits for a unit that no thread has.
pub(crate) struct First {
    units: usize,
    next: AtomicUsize,
    done: AtomicUsize,
}

impl First {
    pub(crate) const fn new(units: usize) -> Self {
        Self { units, next: AtomicUsize::new(0), done: AtomicUsize::new(0) }
    }

    /// Runs the next unit; false if all are taken.
    pub(crate) fn take_one(&self, body: impl Fn(usize)) -> bool {
        /// Counts a unit that panics too: the region hands the panic on, and the others must not wait for ever.
        struct Count<'a>(&'a AtomicUsize);
        impl Drop for Count<'_> {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Release);
            }
        }
        if self.next.load(Ordering::Relaxed) >= self.units {
            return false;
        }
        let unit = self.next.fetch_add(1, Ordering::Relaxed);
        if unit >= self.units {
            return false;
        }
        let _count = Count(&self.done);
        body(unit);
        true
    }

    /// Runs units until all are taken.
    pub(crate) fn take(&self, body: impl Fn(usize)) {
        while self.take_one(&body) {}
    }

    /// Whether the unit that [`Self::take`] runs now is likely this thread's last.
    pub(crate) fn is_last(&self, unit: usize) -> bool {
        unit + super::threads() >= self.units
    }

    /// Waits until all units are done. For threads that have called [`Self::take`]: then other threads run the rest.
    pub(crate) fn wait(&self) {
        let mut looks = 0;
        while self.done.load(Ordering::Acquire) < self.units {
            look_again(&mut looks);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_first_is_done_before_the_rest() {
        for firsts in [0, 1, 5, 64] {
            let first = First::new(firsts);
            let done: Vec<AtomicUsize> = (0..firsts).map(|_| AtomicUsize::new(0)).collect();
            super::super::for_each(9, usize::MAX, |_| {
                first.take(|unit| {
                    done[unit].fetch_add(1, Ordering::Relaxed);
                });
                first.wait();
                assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1), "{firsts} units");
            });
        }
    }

    #[test]
    fn a_panic_leaves_nobody_waiting() {
        let first = First::new(8);
        let outcome = std::panic::catch_unwind(|| {
            super::super::for_each(9, usize::MAX, |_| {
                first.take(|unit| assert_ne!(unit, 3, "a unit fails"));
                first.wait();
            });
        });
        assert!(outcome.is_err());
    }
}
