//! Registrations and aliases that survive a restart: `<data-dir>/registry.redb`. Credentials are never written.

use std::path::Path;
use std::sync::Arc;

use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::alias::Alias;
use super::types::{AdapterRef, SourceKind};
use crate::engine::{ContentId, PinLevel, PreparedAdapter};

/// (namespace, name) -> JSON of [`Record`].
const ADAPTERS: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("adapters");
/// (namespace, name) -> JSON of [`Alias`].
const ALIASES: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("aliases");

/// One registration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) reference: AdapterRef,
    /// By `--adapter`: without the flag it is not registered any more.
    pub(super) by_flag: bool,
    pub(super) scale: f32,
    pub(super) pin: Option<PinLevel>,
    /// Unix seconds.
    pub(super) created: u64,
    pub(super) generation: u64,
    /// It was loaded with a credential of its own.
    pub(super) own_credential: bool,
    pub(super) version: Option<VersionRecord>,
}

/// What a name stood for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct VersionRecord {
    pub(super) identity: String,
    pub(super) revision: String,
    pub(super) facts: Facts,
}

/// [`PreparedAdapter`] as it is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Facts {
    content: [u8; 32],
    pages_needed: u32,
    rank_blocks: u32,
    ranks: (u32, u32),
    modules: Vec<String>,
    base_model: String,
    host_bytes: u64,
    features: Vec<String>,
}

impl Facts {
    pub(super) fn of(prepared: &PreparedAdapter) -> Self {
        Self {
            content: prepared.content.0,
            pages_needed: prepared.pages_needed,
            rank_blocks: prepared.rank_blocks,
            ranks: prepared.ranks,
            modules: prepared.modules.clone(),
            base_model: prepared.base_model.clone(),
            host_bytes: prepared.host_bytes,
            features: prepared.features.clone(),
        }
    }

    pub(super) fn prepared(self) -> PreparedAdapter {
        PreparedAdapter {
            content: ContentId(self.content),
            pages_needed: self.pages_needed,
            rank_blocks: self.rank_blocks,
            ranks: self.ranks,
            modules: self.modules,
            base_model: self.base_model,
            host_bytes: self.host_bytes,
            features: self.features,
        }
    }
}

/// Everything that was written, as (namespace, name, value).
#[derive(Default)]
pub(super) struct Restored {
    pub(super) adapters: Vec<(String, String, Record)>,
    pub(super) aliases: Vec<(String, String, Alias)>,
}

/// The file. Cheap to clone. Calls block: they end with an fsync.
#[derive(Clone)]
pub(super) struct Durable {
    database: Arc<Database>,
}

impl Durable {
    /// Opens or makes the file, readable by its owner only.
    ///
    /// # Errors
    /// What the database says, for people.
    pub(super) fn open(data_dir: &Path) -> Result<(Self, Restored), String> {
        let path = data_dir.join("registry.redb");
        std::fs::create_dir_all(data_dir).map_err(|error| error.to_string())?;
        let mut options = std::fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|error| error.to_string())?;
        let backend = FileBackend::new(file).map_err(|error| error.to_string())?;
        let database = Database::builder().create_with_backend(backend).map_err(|error| error.to_string())?;
        let durable = Self { database: Arc::new(database) };
        let restored = durable.read().map_err(|error| error.to_string())?;
        Ok((durable, restored))
    }

    fn read(&self) -> Result<Restored, redb::Error> {
        let write = self.database.begin_write()?;
        write.open_table(ADAPTERS)?;
        write.open_table(ALIASES)?;
        write.commit()?;
        let read = self.database.begin_read()?;
        let mut restored = Restored::default();
        for row in read.open_table(ADAPTERS)?.iter()? {
            let (key, value) = row?;
            restored.adapters.extend(readable(key.value(), value.value()));
        }
        for row in read.open_table(ALIASES)?.iter()? {
            let (key, value) = row?;
            restored.aliases.extend(readable(key.value(), value.value()));
        }
        restored.adapters.retain(|(_, name, record)| {
            let is_valid = record.reference.source != SourceKind::Merge && record.reference.is_valid();
            if !is_valid {
                tracing::warn!(adapter = name, "a registration of the last run is not valid and is left out");
            }
            is_valid
        });
        Ok(restored)
    }

    /// Writes or (`None`) removes one registration.
    ///
    /// # Errors
    /// What the database says, for people.
    pub(super) fn put_adapter(&self, namespace: &str, name: &str, record: Option<&Record>) -> Result<(), String> {
        self.put(ADAPTERS, (namespace, name), record).map_err(|error| error.to_string())
    }

    /// Writes or (`None`) removes one alias.
    ///
    /// # Errors
    /// What the database says, for people.
    pub(super) fn put_alias(&self, namespace: &str, name: &str, alias: Option<&Alias>) -> Result<(), String> {
        self.put(ALIASES, (namespace, name), alias).map_err(|error| error.to_string())
    }

    fn put<T: Serialize>(
        &self,
        table: TableDefinition<'_, (&str, &str), &[u8]>,
        key: (&str, &str),
        value: Option<&T>,
    ) -> Result<(), redb::Error> {
        let write = self.database.begin_write()?;
        {
            let mut table = write.open_table(table)?;
            match value.map(serde_json::to_vec) {
                Some(Ok(bytes)) => drop(table.insert(key, bytes.as_slice())?),
                Some(Err(error)) => return Err(redb::Error::Io(error.into())),
                None => drop(table.remove(key)?),
            }
        }
        write.commit()?;
        Ok(())
    }
}

/// A row of a version that this program does not read is left where it is.
fn readable<T: DeserializeOwned>((namespace, name): (&str, &str), bytes: &[u8]) -> Option<(String, String, T)> {
    match serde_json::from_slice(bytes) {
        Ok(value) => Some((namespace.to_owned(), name.to_owned(), value)),
        Err(error) => {
            tracing::warn!(name, "a registration of the last run cannot be read and is left out: {error}");
            None
        }
    }
}
