//! The one thread that ticks the scheduler and talks to the shard.

mod types;

pub use types::{
    AdapterFailure, AdapterUse, ContentId, Failure, FinishReason, GenerateEvent, GenerateRequest, PreparedAdapter,
};
