//! The host slab: adapters read, validated, converted and packed, ready to be copied into arena pages. Shared between the
//! threads that prepare and the one that executes.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use loramux_kernels::device::step::BlockDesc;
use loramux_kernels::{AdapterImage, ImageLayout, OpError};
use loramux_models::adapter::{self, AdapterLimits, PeftAdapter};
use loramux_models::{BaseFiles, DecoderSpec};
use loramux_proto::{AdapterError, AdapterReport, PrepareAdapter, Prepared, prepared};

use super::lent::PageAt;

/// Pages of page-locked host memory, which a device copies from without the host's help. Taken once at start; images
/// that find no free page stay in ordinary memory and are copied more slowly.
#[derive(Debug)]
pub(crate) struct PinnedPool {
    base: usize,
    page_bytes: usize,
    free: Mutex<Vec<u32>>,
}

impl PinnedPool {
    /// A pool over `pages` pages at `base`.
    ///
    /// # Safety
    /// The memory is there as long as the process, and nobody else uses it.
    pub(crate) unsafe fn new(base: *mut u8, page_bytes: usize, pages: usize) -> Self {
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        Self { base: base as usize, page_bytes, free: Mutex::new((0..pages).rev().collect()) }
    }

    /// Copies `bytes` into free pages; `None` if there are too few.
    fn store(self: &Arc<Self>, bytes: &[u8]) -> Option<PinnedPages> {
        let pages = bytes.len() / self.page_bytes;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let keep = free.len().checked_sub(pages)?;
        let taken = free.split_off(keep);
        drop(free);
        let stored = PinnedPages { pool: Arc::clone(self), pages: taken };
        for (index, bytes) in bytes.chunks_exact(self.page_bytes).enumerate() {
            // SAFETY: the page is in the pool's memory and belongs to `stored` alone, which nobody has seen yet.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), stored.at(index), bytes.len()) };
        }
        Some(stored)
    }
}

/// Pages of the pool; they go back when this is dropped.
#[derive(Debug)]
struct PinnedPages {
    pool: Arc<PinnedPool>,
    pages: Vec<u32>,
}

impl PinnedPages {
    fn at(&self, index: usize) -> *mut u8 {
        (self.pool.base + self.pages[index] as usize * self.pool.page_bytes) as *mut u8
    }
}

impl Drop for PinnedPages {
    fn drop(&mut self) {
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).append(&mut self.pages);
    }
}

/// An adapter ready to be copied to a device.
#[derive(Debug)]
pub(crate) struct SlabImage {
    /// Without its pages, unless they are [`Kept::InImage`].
    image: AdapterImage,
    pages: Kept,
}

/// Where the pages of an image are.
#[derive(Debug)]
enum Kept {
    /// For a device whose pool was full.
    InImage,
    Pinned(PinnedPages),
    /// For the CPU, whose arena needs no second copy; see [`super::lent`].
    Lent(Mutex<Vec<PageAt>>),
}

impl SlabImage {
    /// For a device: in page-locked memory if there is some.
    fn pinned(mut image: AdapterImage, pool: Option<&Arc<PinnedPool>>) -> Self {
        let Some(pool) = pool else { return Self { image, pages: Kept::InImage } };
        let bytes: Vec<u8> = image.take_bytes();
        match pool.store(&bytes) {
            Some(pinned) => Self { image, pages: Kept::Pinned(pinned) },
            None => {
                image.put_bytes(bytes);
                Self { image, pages: Kept::InImage }
            }
        }
    }

    /// For the CPU: each page in memory of its own, which is free while the page is in the arena.
    pub(super) fn lent(mut image: AdapterImage) -> Self {
        let page_bytes = image.page_bytes();
        let bytes = image.take_bytes();
        let pages = bytes.chunks(page_bytes).map(|page| PageAt::Host(page.into())).collect();
        Self { image, pages: Kept::Lent(Mutex::new(pages)) }
    }

    /// Where each block lies, for the CPU's table; its pages are not with it.
    pub(crate) fn image(&self) -> &AdapterImage {
        &self.image
    }

    /// Its pages, on the CPU; none on a device.
    pub(super) fn lendable(&self) -> &Mutex<Vec<PageAt>> {
        static NONE: Mutex<Vec<PageAt>> = Mutex::new(Vec::new());
        match &self.pages {
            Kept::Lent(pages) => pages,
            Kept::InImage | Kept::Pinned(_) => &NONE,
        }
    }

    pub(crate) fn pages_needed(&self) -> usize {
        self.image.pages_needed()
    }

    pub(crate) fn page_bytes(&self) -> usize {
        self.image.page_bytes()
    }

    /// One page of an image for a device.
    pub(crate) fn page(&self, index: usize) -> &[u8] {
        match &self.pages {
            // SAFETY: a page of the pool that is this image's until it is dropped; nothing writes it.
            Kept::Pinned(pinned) => unsafe { std::slice::from_raw_parts(pinned.at(index), pinned.pool.page_bytes) },
            Kept::InImage => self.image.pages().nth(index).unwrap_or_default(),
            Kept::Lent(_) => &[],
        }
    }

    /// See [`AdapterImage::block_descs`].
    pub(crate) fn block_descs(&self, pages: &[u32]) -> Result<Vec<Vec<BlockDesc>>, OpError> {
        self.image.block_descs(pages)
    }
}

/// Page images by content.
pub(crate) struct Slab {
    pub(super) spec: DecoderSpec,
    layout: ImageLayout,
    page_bytes: usize,
    base: BaseFiles,
    pool: Option<Arc<PinnedPool>>,
    /// The device's name, and the features of adapters that its kernels lack.
    lacks: Option<(String, &'static [&'static str])>,
    images: RwLock<HashMap<[u8; 32], Arc<SlabImage>>>,
}

impl Slab {
    pub(crate) fn new(spec: DecoderSpec, layout: impl Into<ImageLayout>, page_bytes: usize, base: BaseFiles) -> Self {
        let layout = layout.into();
        Self { spec, layout, page_bytes, base, pool: None, lacks: None, images: RwLock::default() }
    }

    /// The same over page-locked memory, for a device whose kernels lack some features of adapters.
    pub(crate) fn on_device(self, pool: Option<Arc<PinnedPool>>, name: String, lacks: &'static [&'static str]) -> Self {
        Self { pool, lacks: Some((name, lacks)), ..self }
    }

    pub(crate) fn get(&self, content: &[u8]) -> Option<Arc<SlabImage>> {
        self.images.read().unwrap_or_else(PoisonError::into_inner).get(content).map(Arc::clone)
    }

    pub(crate) fn remove(&self, content: &[u8]) {
        self.images.write().unwrap_or_else(PoisonError::into_inner).remove(content);
    }

    /// Reads one directory and keeps its image. Every failure is an answer, never a panic: the files are a stranger's.
    pub(crate) fn prepare(&self, request: &PrepareAdapter) -> Prepared {
        let outcome = match self.try_prepare(request) {
            Ok(report) => prepared::Outcome::Report(report),
            Err(error) => {
                let (code, message) = (error.code().to_owned(), error.to_string());
                prepared::Outcome::Error(AdapterError { code, message })
            }
        };
        Prepared { request_id: request.request_id, outcome: Some(outcome) }
    }

    /// Refuses by name what this device cannot compute.
    pub(super) fn check_features(&self, features: &[&'static str]) -> Result<(), adapter::AdapterError> {
        let Some((device, lacks)) = &self.lacks else { return Ok(()) };
        match features.iter().find(|feature| lacks.contains(feature)) {
            None => Ok(()),
            Some(feature) => Err(adapter::AdapterError::OnDevice { feature, device: device.clone() }),
        }
    }

    /// The pages that the adapter takes.
    pub(super) fn pack(&self, read: &PeftAdapter) -> Result<AdapterImage, adapter::AdapterError> {
        self.check_features(&read.features)?;
        read.pack_onto(self.layout, self.page_bytes, &self.base)
    }

    fn keep(&self, image: AdapterImage) -> SlabImage {
        match self.layout {
            ImageLayout::Cpu(_) => SlabImage::lent(image),
            ImageLayout::Device(_) => SlabImage::pinned(image, self.pool.as_ref()),
        }
    }

    fn try_prepare(&self, request: &PrepareAdapter) -> Result<AdapterReport, adapter::AdapterError> {
        let read = adapter::read(Path::new(&request.dir), &self.spec, &limits(request.rank_max))?;
        let image = match self.get(&read.content_id) {
            Some(image) => image,
            None => Arc::new(self.keep(self.pack(&read)?)),
        };
        let report = AdapterReport {
            content_id: read.content_id.to_vec(),
            pages_needed: saturating(image.pages_needed()),
            rank_blocks: saturating(image.image().rank_blocks()),
            rank_min: saturating(read.rank_min),
            rank_max: saturating(read.rank_max),
            host_bytes: image.image().bytes() as u64,
            modules: read.module_names.clone(),
            base_model: read.base_model.clone(),
            features: read.features.iter().map(|&name| name.to_owned()).collect(),
            ..AdapterReport::default()
        };
        self.images.write().unwrap_or_else(PoisonError::into_inner).insert(read.content_id, image);
        Ok(report)
    }
}

/// Limits of the loader, the operator's on the rank included; 0 = none.
pub(super) fn limits(rank_max: u32) -> AdapterLimits {
    let mut limits = AdapterLimits::default();
    if rank_max != 0 {
        limits.rank_max = limits.rank_max.min(rank_max as usize);
    }
    limits
}

/// Counts on the wire are u32; one that does not fit is refused by whoever compares it with a limit.
pub(super) fn saturating(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
