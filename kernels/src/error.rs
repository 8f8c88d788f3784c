//! What an op refuses.

/// Why an op refused its arguments. Nothing was written when one is returned, unless the op says otherwise.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// Two extents that must agree do not.
    #[error("{op}: {what} is {got}, expected {want}")]
    Shape {
        /// The op.
        op: &'static str,
        /// The extent.
        what: &'static str,
        /// Its value.
        got: usize,
        /// The value it must have.
        want: usize,
    },
    /// An index or a count is over its bound.
    #[error("{op}: {what} is {got}, the limit is {limit}")]
    Limit {
        /// The op.
        op: &'static str,
        /// The number.
        what: &'static str,
        /// Its value.
        got: usize,
        /// The largest value it may have.
        limit: usize,
    },
    /// A step names content that the slot no longer holds (or never held). A hard error: another tenant's adapter may be there.
    #[error("adapter slot {slot} does not hold generation {generation}")]
    Stale {
        /// The slot.
        slot: u32,
        /// The generation that was asked for.
        generation: u64,
    },
    /// One rank block of an adapter is larger than an arena page.
    #[error("a rank block of the adapter needs {block_bytes} bytes and a page has {page_bytes}")]
    BlockOverPage {
        /// Bytes of the block.
        block_bytes: usize,
        /// Bytes of a page.
        page_bytes: usize,
    },
    /// The operating system did not give the memory.
    #[error("cannot reserve {bytes} bytes for {what}")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much.
        bytes: usize,
    },
}

/// `Ok` when `got == want`.
pub(crate) fn same(op: &'static str, what: &'static str, got: usize, want: usize) -> Result<(), OpError> {
    if got == want { Ok(()) } else { Err(OpError::Shape { op, what, got, want }) }
}

/// `Ok` when `got <= limit`.
pub(crate) fn at_most(op: &'static str, what: &'static str, got: usize, limit: usize) -> Result<(), OpError> {
    if got <= limit { Ok(()) } else { Err(OpError::Limit { op, what, got, limit }) }
}
