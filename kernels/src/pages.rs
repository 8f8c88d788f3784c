//! Memory for what is large and read in every step: straight from the system, in huge pages where it has them, so that a
//! stream of weights does not wait for a look-up of addresses every 4 KiB.

use crate::error::OpError;
use crate::simd::Line;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What the system's huge pages have on the machines there are.
pub(crate) const HUGE_BYTES: usize = 2 << 20;

/// Weights share regions of this size, since most are no multiple of a huge page.
const REGION_BYTES: usize = 64 << 20;

/// Zeroed memory of whole huge pages; none of it is resident before it is touched.
pub(crate) struct Pages {
    start: *mut u8,
    /// What was mapped, which is more than what is used: the start is brought to a huge page.
    mapped: (*mut std::ffi::c_void, usize),
    bytes: usize,
}

// SAFETY: plain memory that this owns.
unsafe impl Send for Pages {}
// SAFETY: as above; a shared reference gives no access to it.
unsafe impl Sync for Pages {}

impl Pages {
    /// # Errors
    /// [`OpError::OutOfMemory`] with `what`.
    pub(crate) fn new(what: &'static str, bytes: usize) -> Result<Self, OpError> {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
        let refused = || OpError::OutOfMemory { what, bytes };
        let all = bytes.max(1).checked_add(HUGE_BYTES).ok_or_else(refused)?;
        // An arena may be larger than what is free: it grows only as it is used.
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: new memory at an address of the system's choice.
        let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), all, ProtFlags::READ | ProtFlags::WRITE, flags) };
        let mapped = mapped.map_err(|_| refused())?;
        let start: *mut u8 = mapped.cast();
        let start = start.wrapping_add(start.align_offset(HUGE_BYTES));
        #[cfg(target_os = "linux")]
        {
            // SAFETY: memory just mapped. A system without huge pages refuses, and nothing is lost.
            let _ = unsafe { madvise(start.cast(), bytes, Advice::LinuxHugepage) };
        }
        Ok(Self { start, mapped: (mapped, all), bytes })
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and nobody refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.mapped.0, self.mapped.1) };
    }
}

/// Scratch that grows to the largest use and stays.
pub(crate) struct Scratch(Option<Pages>);

impl Scratch {
    pub(crate) const EMPTY: Self = Self(None);

    /// `len` words with whatever they hold.
    ///
    /// # Panics
    /// If the system has no memory.
    pub(crate) fn words(&mut self, len: usize) -> &mut [u32] {
        let bytes = len.saturating_mul(size_of::<u32>());
        if self.0.as_ref().is_some_and(|pages| pages.bytes < bytes) {
            self.0 = None; // first: the two need not be there at once
        }
        let pages = self.0.get_or_insert_with(|| {
            let bytes = bytes.checked_next_power_of_two().unwrap_or(bytes).max(HUGE_BYTES);
            Pages::new("scratch", bytes).expect("the system has memory for a workspace")
        });
        // SAFETY: the memory is zeroed or was written as words, has these bytes, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(pages.start.cast(), len) }
    }
}

/// Lines in a region that others may share.
pub(crate) struct Lines {
    region: Arc<Pages>,
    first: *const Line,
    len: usize,
}

// SAFETY: the lines are this one's alone and never change once they are shared; `region` keeps them mapped.
unsafe impl Send for Lines {}
// SAFETY: as above.
unsafe impl Sync for Lines {}

/// The region that has room, and how much of it is taken. Weak: when all its weights are gone, so is it.
static CURRENT: Mutex<(Weak<Pages>, usize)> = Mutex::new((Weak::new(), 0));

impl Lines {
    /// Zeroed lines.
    ///
    /// # Errors
    /// [`OpError::OutOfMemory`].
    pub(crate) fn new(len: usize) -> Result<Self, OpError> {
        let bytes = len.saturating_mul(size_of::<Line>());
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let (region, taken) = match current.0.upgrade().filter(|region| bytes <= region.bytes - current.1) {
            Some(region) => (region, current.1),
            None => {
                let region = Arc::new(Pages::new("weights", bytes.max(REGION_BYTES))?);
                current.0 = Arc::downgrade(&region);
                (region, 0)
            }
        };
        current.1 = taken + bytes;
        // SAFETY: `taken + bytes` is within the region.
        let first = unsafe { region.start.add(taken) }.cast::<Line>();
        Ok(Self { region, first, len })
    }

    pub(crate) fn as_mut(&mut self) -> &mut [Line] {
        // SAFETY: only this refers to these lines, and `&mut self` makes the access exclusive; zeroes are lines.
        unsafe { std::slice::from_raw_parts_mut(self.first.cast_mut(), self.len) }
    }
}

impl Deref for Lines {
    type Target = [Line];
    fn deref(&self) -> &[Line] {
        debug_assert!(self.len * size_of::<Line>() <= self.region.bytes);
        // SAFETY: the region is mapped as long as `self` is, and zeroes are lines.
        unsafe { std::slice::from_raw_parts(self.first, self.len) }
    }
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Lines").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_shared_and_lines_are_zero_and_apart() {
        let sizes = [1usize, 3, 1000, (REGION_BYTES >> 6) - 5, 7, (2 * REGION_BYTES) >> 6];
        let mut all: Vec<Lines> = sizes.iter().map(|&len| Lines::new(len).unwrap()).collect();
        for (i, lines) in all.iter_mut().enumerate() {
            assert_eq!((lines.len(), lines.as_ptr() as usize % 64), (sizes[i], 0));
            assert!(lines.iter().all(|line| line.0 == [0; 16]));
            lines.as_mut().fill(Line([i as u32 + 1; 16]));
        }
        for (i, lines) in all.iter().enumerate() {
            assert!(lines.iter().all(|line| line.0 == [i as u32 + 1; 16]));
        }
    }

    #[test]
    fn scratch_grows_and_keeps_what_fits() {
        let mut scratch = Scratch::EMPTY;
        assert!(scratch.words(0).is_empty());
        scratch.words(1000)[999] = 7;
        assert_eq!(scratch.words(1000)[999], 7);
        assert_eq!(scratch.words(2 * HUGE_BYTES)[2 * HUGE_BYTES - 1], 0);
    }

    #[test]
    fn too_much_is_refused() {
        assert!(matches!(Lines::new(usize::MAX / 2), Err(OpError::OutOfMemory { .. })));
        assert!(matches!(Pages::new("a test", 1 << 60), Err(OpError::OutOfMemory { what: "a test", .. })));
    }
}
