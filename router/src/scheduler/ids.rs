//! Names of things: a number's type says what it is not.

/// A request, named by the caller; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One run of a sequence on the shard: each (re)start gets a new one, so a late report can never mean another run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// One page of the arena. Not a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct PageId(pub(super) u32);

/// One block of the KV cache: `block_tokens` positions, all layers. Not a page, not a position, not a byte offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct BlockId(pub(super) u32);

/// A row of the device's adapter tables and the content it holds. A stale `generation` is a hard error, never a skip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SlotRef {
    pub(super) slot: u32,
    pub(super) generation: u64,
}

/// Place of a sequence in the scheduler's own table. Reused; [`SeqId`] is what the shard sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SeqKey(pub(super) u32);

/// Place of a (tenant, adapter set) in the fair queue. Reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct FairKey(pub(super) u32);
