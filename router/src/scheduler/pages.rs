//! The arena on paper: pages for adapters, pages of KV blocks, and the prefix cache that lives in unreferenced blocks.
//!
//! A page is free, an adapter's, or KV. A block of a KV page is *referenced* (by `refs` block tables), *cached* (no
//! reference, but the prefix index names it) or *free*. A KV page whose blocks are all free is a free page again.
//! Blocks come from the fullest page first, so pages empty out and adapters find whole ones.

use std::collections::BTreeSet;

use super::ids::{BlockId, PageId};
use super::prefix::{PrefixIndex, PrefixKey};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Free,
    Kv,
    Adapter,
}

struct Page {
    role: Role,
    /// Blocks with at least one reference. KV only.
    referenced: u32,
    /// Free blocks, as indices into the page. KV only.
    free: Vec<u32>,
    /// When the last reference went; its place in `reclaimable`.
    idle_since: u64,
}

#[derive(Clone, Copy, Default)]
struct Block {
    refs: u32,
    key: Option<PrefixKey>,
    /// When the last reference went; its place in `cached`.
    idle_since: u64,
}

/// Gives out pages and blocks. Knows nothing of sequences or slots.
pub(super) struct PagePool {
    blocks_per_page: u32,
    pages: Vec<Page>,
    blocks: Vec<Block>,
    free_pages: Vec<PageId>,
    /// KV pages with a free block, fullest first.
    partial: BTreeSet<(usize, PageId)>,
    /// Cached blocks, least recently used first.
    cached: BTreeSet<(u64, BlockId)>,
    /// KV pages without a referenced block, least recently used first.
    reclaimable: BTreeSet<(u64, PageId)>,
    index: PrefixIndex,
    pages_adapters: u32,
    referenced: u32,
    /// The scheduler's plan counter in the upper bits, an own counter below: unique, and comparable with slots.
    clock: u64,
}

/// Bits of `clock` that order releases within one plan.
const WITHIN_PLAN_BITS: u32 = 24;

impl PagePool {
    pub(super) fn new(pages_total: u32, blocks_per_page: u32) -> Self {
        let mut pool = Self {
            blocks_per_page,
            pages: Vec::new(),
            blocks: Vec::new(),
            free_pages: Vec::new(),
            partial: BTreeSet::new(),
            cached: BTreeSet::new(),
            reclaimable: BTreeSet::new(),
            index: PrefixIndex::default(),
            pages_adapters: 0,
            referenced: 0,
            clock: 0,
        };
        pool.pages = (0..pages_total)
            .map(|_| Page { role: Role::Free, referenced: 0, free: Vec::new(), idle_since: 0 })
            .collect();
        pool.reset();
        pool
    }

    /// A new shard: nothing is in any page.
    pub(super) fn reset(&mut self) {
        for page in &mut self.pages {
            page.role = Role::Free;
            page.referenced = 0;
            page.free.clear();
        }
        let pages_total = u32::try_from(self.pages.len()).unwrap_or(u32::MAX);
        self.blocks.clear();
        self.blocks.resize(self.pages.len() * self.blocks_per_page as usize, Block::default());
        self.free_pages = (0..pages_total).rev().map(PageId).collect();
        self.partial.clear();
        self.cached.clear();
        self.reclaimable.clear();
        self.index.clear();
        self.pages_adapters = 0;
        self.referenced = 0;
    }

    /// Time is the scheduler's plan counter.
    pub(super) fn set_plan(&mut self, plan: u64) {
        self.clock = self.clock.max(plan << WITHIN_PLAN_BITS);
    }

    pub(super) fn pages_free(&self) -> u32 {
        self.free_pages.len() as u32
    }

    pub(super) fn pages_adapters(&self) -> u32 {
        self.pages_adapters
    }

    pub(super) fn pages_kv(&self) -> u32 {
        self.pages.len() as u32 - self.pages_free() - self.pages_adapters
    }

    /// Pages that are free or become free by forgetting cached blocks.
    pub(super) fn pages_obtainable(&self) -> u32 {
        self.pages_free() + self.reclaimable.len() as u32
    }

    pub(super) fn blocks_used(&self) -> u32 {
        self.referenced
    }

    pub(super) fn blocks_cached(&self) -> u32 {
        self.cached.len() as u32
    }

    /// Blocks that are free or become free by forgetting cached ones.
    pub(super) fn blocks_obtainable(&self) -> u64 {
        u64::from(self.pages_free() + self.pages_kv()) * u64::from(self.blocks_per_page) - u64::from(self.referenced)
    }

    /// The plan in which the least recently used cached block lost its last reference.
    pub(super) fn oldest_cached_plan(&self) -> Option<u64> {
        self.cached.first().map(|(at, _)| at >> WITHIN_PLAN_BITS)
    }

    /// A block that is free right now, with one reference. Forgets nothing.
    pub(super) fn take_block(&mut self) -> Option<BlockId> {
        let page = match self.partial.first() {
            Some(&(_, page)) => page,
            None => self.open_kv_page()?,
        };
        let at = page.0 as usize;
        self.partial.remove(&(self.pages[at].free.len(), page));
        let within = self.pages[at].free.pop().expect("a partial page has a free block");
        if !self.pages[at].free.is_empty() {
            self.partial.insert((self.pages[at].free.len(), page));
        }
        let block = BlockId(page.0 * self.blocks_per_page + within);
        self.blocks[block.0 as usize] = Block { refs: 1, key: None, idle_since: 0 };
        self.page_gains_reference(page);
        Some(block)
    }

    fn open_kv_page(&mut self) -> Option<PageId> {
        let page = self.free_pages.pop()?;
        let at = page.0 as usize;
        self.pages[at].role = Role::Kv;
        self.pages[at].free.extend((0..self.blocks_per_page).rev());
        self.clock += 1;
        self.pages[at].idle_since = self.clock;
        self.reclaimable.insert((self.clock, page));
        self.partial.insert((self.pages[at].free.len(), page));
        Some(page)
    }

    fn page_gains_reference(&mut self, page: PageId) {
        let at = page.0 as usize;
        if self.pages[at].referenced == 0 {
            self.reclaimable.remove(&(self.pages[at].idle_since, page));
        }
        self.pages[at].referenced += 1;
        self.referenced += 1;
    }

    fn page_of(&self, block: BlockId) -> PageId {
        PageId(block.0 / self.blocks_per_page)
    }

    /// One more block table holds this block.
    pub(super) fn retain(&mut self, block: BlockId) {
        let at = block.0 as usize;
        if self.blocks[at].refs == 0 {
            debug_assert!(self.blocks[at].key.is_some(), "only a cached block comes back to life");
            self.cached.remove(&(self.blocks[at].idle_since, block));
            self.page_gains_reference(self.page_of(block));
        }
        self.blocks[at].refs += 1;
    }

    /// One block table less. The last one leaves it cached if the prefix index names it, else free.
    pub(super) fn release(&mut self, block: BlockId) {
        let at = block.0 as usize;
        self.blocks[at].refs = self.blocks[at].refs.checked_sub(1).expect("released a block without a reference");
        if self.blocks[at].refs > 0 {
            return;
        }
        let page = self.page_of(block);
        let page_at = page.0 as usize;
        self.clock += 1;
        self.pages[page_at].referenced -= 1;
        self.referenced -= 1;
        if self.pages[page_at].referenced == 0 {
            self.pages[page_at].idle_since = self.clock;
            self.reclaimable.insert((self.clock, page));
        }
        if self.blocks[at].key.is_some() {
            self.blocks[at].idle_since = self.clock;
            self.cached.insert((self.clock, block));
        } else {
            self.free_block(block);
        }
    }

    fn free_block(&mut self, block: BlockId) {
        let page = self.page_of(block);
        let at = page.0 as usize;
        self.partial.remove(&(self.pages[at].free.len(), page));
        self.pages[at].free.push(block.0 % self.blocks_per_page);
        if self.pages[at].free.len() == self.blocks_per_page as usize {
            self.reclaimable.remove(&(self.pages[at].idle_since, page));
            self.pages[at].role = Role::Free;
            self.pages[at].free.clear();
            self.free_pages.push(page);
        } else {
            self.partial.insert((self.pages[at].free.len(), page));
        }
    }

    /// Forgets the least recently used cached block. False if there is none.
    pub(super) fn forget_oldest_cached(&mut self) -> bool {
        let Some(&(_, block)) = self.cached.first() else { return false };
        self.forget(block);
        true
    }

    /// Forgets every cached block, and what blocks in use hold is found by nobody any more.
    pub(super) fn forget_prefixes(&mut self) {
        while self.forget_oldest_cached() {}
        self.index.clear();
        for block in &mut self.blocks {
            block.key = None;
        }
    }

    fn forget(&mut self, block: BlockId) {
        let at = block.0 as usize;
        self.cached.remove(&(self.blocks[at].idle_since, block));
        if let Some(key) = self.blocks[at].key.take() {
            self.index.remove(&key);
        }
        self.free_block(block);
    }

    /// Forgets all of the least recently used page without a referenced block: one more free page. False if none.
    pub(super) fn reclaim_page(&mut self) -> bool {
        let Some(&(_, page)) = self.reclaimable.first() else { return false };
        let first = page.0 * self.blocks_per_page;
        for block in (first..first + self.blocks_per_page).map(BlockId) {
            if self.blocks[block.0 as usize].key.is_some() {
                self.forget(block);
            }
        }
        true
    }

    /// When the page that [`Self::reclaim_page`] would take was last used.
    pub(super) fn oldest_reclaimable_plan(&self) -> Option<u64> {
        self.reclaimable.first().map(|(at, _)| at >> WITHIN_PLAN_BITS)
    }

    /// `count` free pages for an adapter, or nothing at all.
    pub(super) fn take_adapter_pages(&mut self, count: u32) -> Option<Vec<u32>> {
        if self.pages_free() < count {
            return None;
        }
        let taken = self.free_pages.split_off(self.free_pages.len() - count as usize);
        for page in &taken {
            self.pages[page.0 as usize].role = Role::Adapter;
        }
        self.pages_adapters += count;
        Some(taken.into_iter().map(|page| page.0).collect())
    }

    pub(super) fn give_adapter_pages(&mut self, pages: &[u32]) {
        for &page in pages {
            debug_assert_eq!(self.pages[page as usize].role, Role::Adapter);
            self.pages[page as usize].role = Role::Free;
            self.free_pages.push(PageId(page));
        }
        self.pages_adapters -= pages.len() as u32;
    }

    /// How many hold the block.
    pub(super) fn holders(&self, block: BlockId) -> usize {
        self.blocks[block.0 as usize].refs as usize
    }

    /// Its only holder is about to write into it: nobody finds it any more.
    pub(super) fn unpublish(&mut self, block: BlockId) {
        if let Some(key) = self.blocks[block.0 as usize].key.take() {
            self.index.remove(&key);
        }
    }

    pub(super) fn is_referenced(&self, block: BlockId) -> bool {
        self.blocks[block.0 as usize].refs > 0
    }

    /// From now on `key` finds this block, unless another one holds it already.
    pub(super) fn publish(&mut self, block: BlockId, key: PrefixKey) {
        let at = block.0 as usize;
        debug_assert!(self.blocks[at].refs > 0, "only a block in use is published");
        if self.blocks[at].key.is_none() && self.index.insert(key, block) {
            self.blocks[at].key = Some(key);
        }
    }

    pub(super) fn find(&self, key: &PrefixKey) -> Option<BlockId> {
        self.index.get(key)
    }
}

#[cfg(test)]
impl PagePool {
    pub(super) fn role(&self, page: u32) -> Role {
        self.pages[page as usize].role
    }

    pub(super) fn refs(&self, block: u32) -> u32 {
        self.blocks[block as usize].refs
    }

    pub(super) fn is_published(&self, block: u32) -> bool {
        self.blocks[block as usize].key.is_some()
    }

    pub(super) fn is_unowned(&self, block: u32) -> bool {
        let block = &self.blocks[block as usize];
        block.refs == 0 && block.key.is_none()
    }

    /// Panics unless every counter and list agrees with the blocks themselves.
    pub(super) fn audit(&self) {
        let (mut referenced, mut cached, mut adapters, mut free) = (0, 0, 0, 0);
        for (at, page) in self.pages.iter().enumerate() {
            let blocks = &self.blocks[at * self.blocks_per_page as usize..][..self.blocks_per_page as usize];
            let used = blocks.iter().filter(|b| b.refs > 0).count();
            let idle = blocks.iter().filter(|b| b.refs == 0 && b.key.is_some()).count();
            match page.role {
                Role::Kv => {
                    assert_eq!(used, page.referenced as usize, "references of page {at}");
                    assert_eq!(page.free.len() + used + idle, blocks.len(), "blocks of page {at}");
                    assert!(page.free.len() < blocks.len(), "an empty KV page is free");
                    let id = PageId(at as u32);
                    assert_eq!(self.partial.contains(&(page.free.len(), id)), !page.free.is_empty());
                    assert_eq!(self.reclaimable.contains(&(page.idle_since, id)), used == 0);
                    for &within in &page.free {
                        assert!(blocks[within as usize].refs == 0 && blocks[within as usize].key.is_none());
                    }
                }
                role => {
                    assert_eq!((used, idle), (0, 0), "page {at} is {role:?} and holds KV");
                    adapters += u32::from(role == Role::Adapter);
                    free += u32::from(role == Role::Free);
                }
            }
            referenced += used;
            cached += idle;
        }
        assert_eq!(referenced as u32, self.referenced);
        assert_eq!(cached, self.cached.len());
        assert_eq!((adapters, free), (self.pages_adapters, self.pages_free()));
        assert_eq!(self.pages_free() + self.pages_kv() + self.pages_adapters, self.pages.len() as u32);
        assert_eq!(self.index.len(), self.blocks.iter().filter(|b| b.key.is_some()).count());
        for (at, block) in self.blocks.iter().enumerate() {
            if let Some(key) = &block.key {
                assert_eq!(self.index.get(key), Some(BlockId(at as u32)), "the index and block {at} disagree");
            }
        }
    }
}
