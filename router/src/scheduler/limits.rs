//! All bounds of the scheduler, given and fixed.

/// What the shard offers and what the operator allows. Fixed for the life of a scheduler.
#[derive(Clone, Debug)]
pub struct SchedulerLimits {
    /// Pages of the arena, shared by KV and adapters.
    pub pages_total: u32,
    /// KV blocks in one page.
    pub blocks_per_page: u32,
    /// Positions in one KV block.
    pub block_tokens: u32,
    /// Rows of the device's adapter tables.
    pub slots_max: u32,
    /// Positions in one step.
    pub step_tokens: u32,
    /// Of these, positions of prompts in a step that somebody decodes in: what a prompt may cost others between two tokens.
    pub prefill_tokens_beside: u32,
    /// Sequences that hold device memory at a time.
    pub running_max: u32,
    /// Requests that were never admitted.
    pub queued_requests_max: usize,
    /// Their cost together: `n * (prompt + max_tokens)` each.
    pub queued_tokens_max: u64,
    /// Positions of one sequence.
    pub context_tokens: u32,
    /// Steps in flight at a time, 1 or 2. With 2 the next step is planned before the result of the last one is read, so
    /// the device never waits for the host. Anything else counts as the nearer of the two.
    pub pipeline_depth: u32,
    /// Keep KV of full blocks for later requests of the same tenant.
    pub prefix_caching: bool,
    /// Key of the prefix cache's hashes: random per process.
    pub prefix_key: [u8; 32],
}

/// One step runs and one is ready for the moment it ends: more would only delay newcomers.
pub(super) const PIPELINE_DEPTH_MAX: u32 = 2;
/// Waiting sequences whose adapters are being brought to the device, or are held there until the sequence starts.
pub(super) const CLAIMS_MAX: usize = 8;
/// Pages uploaded in one step; one adapter that is larger goes alone. About 128 MiB: a few ms on a copy stream.
pub(super) const UPLOAD_PAGES_PER_STEP: u32 = 64;
/// Waiting pairs whose adapters are fetched ahead of their turn.
pub(super) const PREFETCH_LOOKS: usize = 32;
/// Adapters that are fetched ahead on somebody's word.
pub(super) const PREFETCH_HINTS_MAX: usize = 32;
/// Share of pages and of slots that pinned adapters may take, (parts, of).
pub(super) const PINNED_PARTS: (u64, u64) = (3, 4);
/// Shards that die in a row while a pinned adapter is uploaded, after which its pin is gone.
pub(super) const PIN_DEATHS_MAX: u32 = 2;
/// Plans for which a waiting sequence may be passed over for lack of memory; then nobody else is admitted before it.
pub(super) const STARVING_PLANS: u64 = 64;
/// Waiting sequences that one plan leaves waiting for a prefix that somebody computes; more start as they are.
pub(super) const HELD_MAX: usize = 64;
/// Points of blame at which a request fails alone: two crashes of its own.
pub(super) const STRIKES_MAX: u32 = 4;
/// (tenant, adapter set) pairs without a request whose service is remembered.
pub(super) const RETIRED_KEYS_MAX: usize = 4096;
/// Idle adapters looked at, oldest first, when one has to go.
pub(super) const EVICTION_LOOKS: usize = 16;

impl SchedulerLimits {
    /// Blocks of the arena if no adapter is resident.
    pub(super) fn blocks_total(&self) -> u64 {
        u64::from(self.pages_total) * u64::from(self.blocks_per_page)
    }

    /// Blocks that `positions` take.
    pub(super) fn blocks_for(&self, positions: usize) -> usize {
        positions.div_ceil(self.block_tokens as usize)
    }

    /// Steps in flight at a time.
    pub(super) fn depth(&self) -> usize {
        self.pipeline_depth.clamp(1, PIPELINE_DEPTH_MAX) as usize
    }

    /// Running sequences at a time: each gets at least one position per step.
    pub(super) fn seats(&self) -> usize {
        self.running_max.min(self.step_tokens).max(1) as usize
    }
}
