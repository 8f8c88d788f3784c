//! Which adapter a name means, and whether it can be used: names, local directories, life cycle.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod name;
mod registry;

pub use name::is_valid_name;
pub use registry::{AdapterCard, AdapterRow, AdapterSettings, Registry, ResolvedAdapter, Wait};
