//! Which adapter a name means, and whether it can be used: names, local directories, life cycle.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod alias;
mod authorise;
mod durable;
pub mod fetch;
mod life;
mod name;
mod reference;
mod registry;
pub mod sources;
pub mod store;
mod types;

pub use fetch::{FetchError, FetchLimits, FetchStatus, Fetcher, Phase, Progress, ProgressNow, Tenant};
pub use name::is_valid_name;
pub use reference::{RefError, SourceDefaults};
pub use registry::{
    AdapterCard, AdapterSettings, AdapterState, AdapterView, AliasAsk, AliasView, Ask, ErrorView, Files, FilesHere,
    ListFilter, LoadAsk, MergeSpec, NextView, RankBy, RankedFilter, Registry, RegistryError, ResolvedAdapter, StickyBy,
    Supply, UnloadAsk, Wait, Weighted,
};
pub use sources::{SourceSettings, SourceSettingsError, Sources};
pub use store::{Store, StoreError, StoreStatus, Stored};
pub use types::{
    AdapterRef, ByteStream, Credential, FileDigest, FileName, Origin, RemoteFile, Resolved, Source, SourceError,
    SourceKind,
};
