//! On the CPU the bytes of an adapter are in memory once. An upload moves its pages from host memory into the arena; a page
//! comes back when something else is about to be written over it, and never if the adapter was dropped by then.

use std::sync::{Arc, PoisonError, Weak};

use loramux_kernels::{Arena, KvSlot, OpError};

use super::slab::SlabImage;

/// Where a page of an image is.
#[derive(Debug)]
pub(super) enum PageAt {
    Host(Box<[u8]>),
    /// In this page of the arena and nowhere else.
    Arena(u32),
}

/// An image's page that is in the arena.
struct Lent {
    /// Weak: what is dropped from host memory is not kept for the sake of its pages.
    image: Weak<SlabImage>,
    index: usize,
}

/// What each page of the arena holds the only copy of. Whoever writes into the arena says so before, by
/// [`Self::take_back`] or [`Self::take_back_written`].
pub(super) struct LentPages {
    by_page: Vec<Option<Lent>>,
}

impl LentPages {
    /// For an arena of `pages` pages, with nothing in them.
    pub(super) fn new(pages: usize) -> Self {
        Self { by_page: std::iter::repeat_with(|| None).take(pages).collect() }
    }

    /// Moves an image into `pages` of the arena. Pages that hold its bytes already are left as they are.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the number of pages is not the image's, [`OpError::Limit`] for a page that is not there,
    /// [`OpError::OutOfMemory`] if what was in the pages cannot be kept.
    pub(super) fn upload(&mut self, arena: &mut Arena, image: &Arc<SlabImage>, pages: &[u32]) -> Result<(), OpError> {
        let (got, want) = (pages.len(), image.pages_needed());
        if got != want {
            return Err(OpError::Shape { op: "upload", what: "pages", got, want });
        }
        for (index, &page) in pages.iter().enumerate() {
            if self.holds(page, image, index) {
                continue;
            }
            self.take_back(arena, page)?;
            self.move_in(arena, image, index, page)?;
            if let Some(lent) = self.by_page.get_mut(page as usize) {
                *lent = Some(Lent { image: Arc::downgrade(image), index });
            }
        }
        Ok(())
    }

    fn holds(&self, page: u32, image: &Arc<SlabImage>, index: usize) -> bool {
        let lent = self.by_page.get(page as usize).and_then(Option::as_ref);
        lent.is_some_and(|lent| lent.index == index && std::ptr::eq(lent.image.as_ptr(), Arc::as_ptr(image)))
    }

    /// Copies page `index` of an image into a page of the arena that nothing is lent to, and forgets where it was.
    fn move_in(&mut self, arena: &mut Arena, image: &SlabImage, index: usize, page: u32) -> Result<(), OpError> {
        let mut places = image.lendable().lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = places.get_mut(index) else {
            return Err(OpError::Shape { op: "upload", what: "pages that can be lent", got: index, want: index + 1 });
        };
        match place {
            PageAt::Host(bytes) => arena.page_mut(page)?.copy_from_slice(bytes),
            PageAt::Arena(from) => {
                let bytes = copy_of(arena.page(*from)?)?;
                arena.page_mut(page)?.copy_from_slice(&bytes);
                if let Some(lent) = self.by_page.get_mut(*from as usize) {
                    *lent = None;
                }
            }
        }
        *place = PageAt::Arena(page);
        Ok(())
    }

    /// To be called before a page of the arena is written: what only it holds goes back to host memory.
    ///
    /// # Errors
    /// [`OpError::OutOfMemory`].
    pub(super) fn take_back(&mut self, arena: &Arena, page: u32) -> Result<(), OpError> {
        let Some(place) = self.by_page.get_mut(page as usize) else { return Ok(()) };
        // Dropped from host memory meanwhile: nobody will ask for it.
        let wanted = place.as_ref().and_then(|lent| lent.image.upgrade().map(|image| (image, lent.index)));
        if let Some((image, index)) = wanted {
            let bytes = copy_of(arena.page(page)?)?;
            if let Some(at) = image.lendable().lock().unwrap_or_else(PoisonError::into_inner).get_mut(index) {
                *at = PageAt::Host(bytes);
            }
        }
        *place = None;
        Ok(())
    }

    /// [`Self::take_back`] of the pages of all these positions.
    ///
    /// # Errors
    /// [`OpError::OutOfMemory`].
    pub(super) fn take_back_written(
        &mut self,
        arena: &Arena,
        slots: &[KvSlot],
        blocks_per_page: usize,
    ) -> Result<(), OpError> {
        slots.iter().try_for_each(|slot| self.take_back(arena, (slot.block as usize / blocks_per_page) as u32))
    }
}

/// A copy in memory of its own, so that it goes back to the system when it is freed.
fn copy_of(page: &[u8]) -> Result<Box<[u8]>, OpError> {
    let (mut copy, bytes) = (Vec::new(), page.len());
    copy.try_reserve_exact(bytes).map_err(|_| OpError::OutOfMemory { what: "a page of an adapter", bytes })?;
    copy.extend_from_slice(page);
    Ok(copy.into_boxed_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use loramux_kernels::{AdapterImage, Dtype, LoraPart, Slice};

    const PAGE_BYTES: usize = 64 << 10;
    const WIDTH: usize = 512;

    /// An image whose values are `mark`, of several pages.
    fn image(mark: f32) -> Arc<SlabImage> {
        let (a, b) = (vec![mark; 16 * WIDTH], vec![mark; 16 * WIDTH]);
        let part =
            |layer| LoraPart { layer, slice: Slice::O, rank: 16, a: &a, b: &b, d_in: WIDTH, d_out: WIDTH, scale: 1.0 };
        let parts: Vec<LoraPart> = (0..8).map(part).collect();
        let image = AdapterImage::pack(Dtype::Bf16, PAGE_BYTES, 8, &parts).expect("it packs");
        Arc::new(SlabImage::lent(image))
    }

    fn bytes_of(image: &SlabImage) -> Vec<Vec<u8>> {
        let places = image.lendable().lock().expect("no panic");
        let bytes = places.iter().map(|place| match place {
            PageAt::Host(bytes) => bytes.to_vec(),
            PageAt::Arena(page) => panic!("it is in page {page}"),
        });
        bytes.collect()
    }

    fn bytes_in_host(image: &SlabImage) -> usize {
        let places = image.lendable().lock().expect("no panic");
        places.iter().map(|place| if let PageAt::Host(bytes) = place { bytes.len() } else { 0 }).sum()
    }

    #[test]
    fn an_image_is_in_the_arena_or_in_host_memory_and_never_in_both() {
        let (mut arena, mut lent) = (Arena::new(PAGE_BYTES, 8).unwrap(), LentPages::new(8));
        let image = image(1.0);
        let want = bytes_of(&image);
        assert_eq!(want.len(), 4);
        lent.upload(&mut arena, &image, &[7, 2, 5, 0]).unwrap();
        assert_eq!(bytes_in_host(&image), 0);
        // One position of KV in page 5, of two blocks a page.
        lent.take_back_written(&arena, &[KvSlot { block: 11, offset: 3 }], 2).unwrap();
        arena.page_mut(5).unwrap().fill(9);
        assert_eq!(bytes_in_host(&image), PAGE_BYTES);
        // The same pages in another order, and one that something else was written into.
        lent.upload(&mut arena, &image, &[2, 7, 0, 5]).unwrap();
        assert_eq!(bytes_in_host(&image), 0);
        for (index, page) in [2, 7, 0, 5].into_iter().enumerate() {
            assert!(arena.page(page).unwrap() == want[index], "page {index}");
            lent.take_back(&arena, page).unwrap();
        }
        assert_eq!(bytes_of(&image), want);
    }

    #[test]
    fn what_was_dropped_is_not_taken_back() {
        let (mut arena, mut lent) = (Arena::new(PAGE_BYTES, 4).unwrap(), LentPages::new(4));
        let (first, second) = (image(1.0), image(2.0));
        lent.upload(&mut arena, &first, &[0, 1, 2, 3]).unwrap();
        drop(first);
        lent.upload(&mut arena, &second, &[3, 2, 1, 0]).unwrap();
        assert_eq!(bytes_in_host(&second), 0);
        assert!(matches!(lent.upload(&mut arena, &second, &[1]), Err(OpError::Shape { .. })));
        assert!(matches!(lent.upload(&mut arena, &image(3.0), &[0, 1, 2, 9]), Err(OpError::Limit { .. })));
    }

    /// Random uploads, writes and drops: after each upload the arena holds the image's bytes, whatever happened before.
    #[test]
    fn nothing_is_lost_whatever_is_written_over_it() {
        const PAGES: u32 = 10;
        let (mut arena, mut lent) = (Arena::new(PAGE_BYTES, PAGES as usize).unwrap(), LentPages::new(PAGES as usize));
        let mut images: Vec<Arc<SlabImage>> = (0..5).map(|n| image(n as f32 + 1.0)).collect();
        let want: Vec<_> = images.iter().map(|image| bytes_of(image)).collect();
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..4000 {
            let n = random(5) as usize;
            match random(8) {
                0..4 => {
                    let mut pages: Vec<u32> = (0..PAGES).collect();
                    (1..pages.len()).rev().for_each(|at| pages.swap(at, random(at as u64 + 1) as usize));
                    pages.truncate(want[n].len());
                    lent.upload(&mut arena, &images[n], &pages).unwrap();
                    for (&page, want) in pages.iter().zip(&want[n]) {
                        assert!(arena.page(page).unwrap() == want, "image {n}, page {page}");
                    }
                    assert_eq!(bytes_in_host(&images[n]), 0);
                }
                4..7 => {
                    let page = random(u64::from(PAGES)) as u32;
                    lent.take_back(&arena, page).unwrap();
                    arena.page_mut(page).unwrap().fill(0xee);
                }
                _ => images[n] = image(n as f32 + 1.0),
            }
        }
    }
}
