//! OpenAI-compatible HTTP front, text processing, adapter registry and the pure scheduler of loramux.
//!
//! No device code and no model code: this crate decides, the shard executes.
#![forbid(unsafe_code)]

pub mod access;
pub mod adapters;
pub mod engine;
pub mod http;
pub mod metrics;
pub mod observe;
pub mod scheduler;
pub mod text;
