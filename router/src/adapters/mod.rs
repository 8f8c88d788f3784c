//! Which adapter a name means, and whether it can be used: names, local directories, life cycle.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod name;
mod registry;
mod types;

pub use name::is_valid_name;
pub use registry::{AdapterCard, AdapterRow, AdapterSettings, Registry, ResolvedAdapter, Wait};
pub use types::{
    AdapterRef, ByteStream, Credential, FileDigest, FileName, Origin, RemoteFile, Resolved, Source, SourceError,
    SourceKind,
};
