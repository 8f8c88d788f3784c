//! The wire between router and shard. `shard.proto` is the contract; this crate holds its generated types and
//! [`frame`], which puts them on a byte stream. Nothing here decides anything.
#![forbid(unsafe_code)]

pub mod frame;
mod tables;

#[allow(missing_docs, clippy::all, reason = "prost writes it")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/loramux.shard.v1.rs"));
}

pub use generated::*;
pub use tables::{Tables, UnknownTable};
