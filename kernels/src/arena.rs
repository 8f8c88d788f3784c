//! The one allocation that holds the KV cache and the adapters.

use crate::error::{OpError, at_most};
use crate::pages::Pages;
use crate::simd::Line;

/// Addresses inside the arena are counted in units of this many bytes, so that 32 bits reach 1 TiB.
pub(crate) const UNIT_BYTES: usize = 256;

/// `pages` pages of `page_bytes`, the first on a boundary of a huge page. The memory reads as zeros and is only reserved: the
/// operating system gives a page of it at the first touch.
pub struct Arena {
    memory: Pages,
    page_bytes: usize,
    pages: usize,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Arena")
            .field("page_bytes", &self.page_bytes)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl Arena {
    /// Reserves the memory.
    ///
    /// # Errors
    /// [`OpError::Shape`] if `page_bytes` is zero or no multiple of 256, [`OpError::Limit`] over 1 TiB,
    /// [`OpError::OutOfMemory`] if the system refuses.
    pub fn new(page_bytes: usize, pages: usize) -> Result<Self, OpError> {
        if page_bytes == 0 || !page_bytes.is_multiple_of(UNIT_BYTES) {
            let want = page_bytes.next_multiple_of(UNIT_BYTES).max(UNIT_BYTES);
            return Err(OpError::Shape { op: "arena", what: "page bytes", got: page_bytes, want });
        }
        at_most("arena", "pages", pages, u32::MAX as usize * UNIT_BYTES / page_bytes)?;
        let memory = Pages::new("the arena", page_bytes.saturating_mul(pages))?;
        Ok(Self { memory, page_bytes, pages })
    }

    /// Bytes of a page.
    #[must_use]
    pub const fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Number of pages.
    #[must_use]
    pub const fn pages(&self) -> usize {
        self.pages
    }

    /// One page.
    ///
    /// # Errors
    /// [`OpError::Limit`] if there is no such page.
    pub fn page(&self, id: u32) -> Result<&[u8], OpError> {
        let start = self.page_start(id)?;
        Ok(&self.bytes()[start..start + self.page_bytes])
    }

    /// One page.
    ///
    /// # Errors
    /// [`OpError::Limit`] if there is no such page.
    pub fn page_mut(&mut self, id: u32) -> Result<&mut [u8], OpError> {
        let (start, page_bytes) = (self.page_start(id)?, self.page_bytes);
        Ok(&mut self.bytes_mut()[start..start + page_bytes])
    }

    fn page_start(&self, id: u32) -> Result<usize, OpError> {
        at_most("arena", "page id", id as usize, self.pages.saturating_sub(1))?;
        at_most("arena", "pages wanted", 1, self.pages)?;
        Ok(id as usize * self.page_bytes)
    }

    /// All pages.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the memory is zeroed, has these bytes, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.page_bytes * self.pages) }
    }

    /// All pages.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.page_bytes * self.pages) }
    }

    /// `bytes` bytes at `unit`.
    ///
    /// # Panics
    /// If they are not inside the arena: a descriptor was made for another arena.
    pub(crate) fn at_unit(&self, unit: u32, bytes: usize) -> &[u8] {
        &self.bytes()[unit as usize * UNIT_BYTES..][..bytes]
    }
}

const _: () = assert!(UNIT_BYTES.is_multiple_of(size_of::<Line>()));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_zero_aligned_and_apart() {
        let mut arena = Arena::new(512, 3).unwrap();
        arena.page_mut(1).unwrap().fill(7);
        assert!(arena.page(0).unwrap().iter().all(|&b| b == 0));
        assert!(arena.page(1).unwrap().iter().all(|&b| b == 7));
        assert!(arena.page(2).unwrap().iter().all(|&b| b == 0));
        assert_eq!(arena.bytes().as_ptr() as usize % crate::pages::HUGE_BYTES, 0);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(matches!(Arena::new(100, 1), Err(OpError::Shape { .. })));
        assert!(matches!(Arena::new(0, 1), Err(OpError::Shape { .. })));
        assert!(matches!(Arena::new(1 << 20, 1 << 40), Err(OpError::Limit { .. })));
        assert!(matches!(Arena::new(256, 2).unwrap().page(2), Err(OpError::Limit { .. })));
        assert!(matches!(Arena::new(256, 0).unwrap().page(0), Err(OpError::Limit { .. })));
    }

    #[test]
    fn reserved_memory_is_not_touched() {
        assert_eq!(Arena::new(2 << 20, 16 << 10).unwrap().pages(), 16 << 10); // 32 GiB, more than this may have
    }
}
