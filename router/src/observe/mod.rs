//! What is told of each request: a line in the access log, spans to a collector, times in the reply's headers.
//!
//! A `RequestRecord` goes with the request and is filled in on the way; its `Recording` goes with the response's body
//! and tells all when the last byte is sent, or the client is gone. Names in it are those that everybody may read.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod access;
mod export;
mod record;
mod spans;
#[cfg(test)]
mod tests;
mod timing;
mod traceparent;

pub use access::AccessLog;
pub use export::OtlpSettings;
pub(crate) use record::{Load, Observer, RequestRecord, RunTimes, SharedTimes, times_of};
