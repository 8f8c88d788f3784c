//! The one thread that ticks the scheduler and talks to the shard.
//!
//! [`EngineHandle`] is the HTTP side's end. The thread's loop is in `run`: take messages, watch the shard, plan and send
//! steps, publish a snapshot. It alone touches the scheduler and the shard, so neither needs a lock.

mod adapters;
mod asks;
mod contents;
mod handle;
mod keep;
mod masks;
mod outbox;
mod prepare;
mod reports;
mod run;
mod shard;
mod status;
mod supervise;
mod types;

#[cfg(test)]
mod tests;

pub use adapters::{
    AdapterCheck, AdapterFailure, ContentStatus, ForgetMode, MajoritySign, MergeAsk, MergeStrategy, PinLevel,
    PinRefused, PreparedAdapter, Refusal, Tier,
};
pub use handle::{EngineHandle, Generation, MissingReport};
pub use run::{EngineError, EngineOptions, Spawned, Started, spawn};
pub use shard::{Reports, Shard, ShardExit, ShardGone, ShardLauncher};
pub use status::{BatchShare, EngineCounters, EngineStatus};
pub use types::{
    AdapterUse, Allowed, ContentId, Failure, FinishReason, GenerateEvent, GenerateRequest, Grammar, GrammarFailure,
    GrammarState, Pooling,
};
