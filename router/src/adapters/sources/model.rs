//! Base models through the same sources: which files they need, where those lie, and their download.
//!
//! A model is `config.json`, its text files and `model.safetensors` or the shards of its index, or one `.gguf`. Only these names
//! are asked for; names from an index pass the character set of one file name. Everything is asked in the server's name.

use std::collections::BTreeSet;
use std::path::PathBuf;

use futures_util::TryStreamExt;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::buckets::{self, Object};
use super::{Sources, hub_cache, hub_list, within};
use crate::adapters::name::is_valid_segment;
use crate::adapters::reference::RefError;
use crate::adapters::types::{AdapterRef, ByteStream, Credential, FileDigest, SourceError, SourceKind};

/// Files beside the weights. All but the first may be missing.
const TEXT_FILES: [&str; 6] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
pub(super) const CONFIG: &str = "config.json";
pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Bytes of an index; a large model's has some 100 KiB.
pub(super) const INDEX_BYTES_MAX: u64 = 16 << 20;
const SHARDS_MAX: usize = 1024;
/// Names that an error lists.
const SHOWN_MAX: usize = 12;

/// What `--model-id` means if it is no path: a directory at a source, or one `.gguf` file in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelRef {
    /// The directory: repository and revision, bucket and prefix.
    pub reference: AdapterRef,
    /// The file in it, for GGUF.
    pub gguf: Option<String>,
}

impl ModelRef {
    /// Reads `org/model[@rev]`, `hf://..`, `s3://bucket/prefix`, `gs://..`, each with `/file.gguf` behind or not.
    ///
    /// # Errors
    /// [`RefError`], which says what is accepted.
    pub fn parse(text: &str) -> Result<Self, RefError> {
        let (path, revision) = match text.split_once('@') {
            Some((path, revision)) if path.ends_with(".gguf") => (path, Some(revision)),
            _ => (text, None),
        };
        if let Some((dir, file)) = path.rsplit_once('/').filter(|(_, file)| file.ends_with(".gguf")) {
            // `org/name.gguf` is a repository: only what lies in one is a file.
            let parsed = AdapterRef::parse(&match revision {
                Some(revision) => format!("{dir}@{revision}"),
                None => dir.to_owned(),
            });
            if let (Ok(reference), true) = (parsed, is_valid_segment(file)) {
                return Ok(Self { reference, gguf: Some(file.to_owned()) });
            }
        }
        Ok(Self { reference: AdapterRef::parse(text)?, gguf: None })
    }

    /// As typed, in one spelling.
    pub fn name(&self) -> String {
        match &self.gguf {
            Some(file) => format!("{}/{file}", self.reference),
            None => self.reference.to_string(),
        }
    }
}

/// Where a model's bytes are.
#[derive(Clone, Debug)]
pub enum ModelPlace {
    /// Here already: a directory or a `.gguf` file of another program's hub cache.
    Here(PathBuf),
    /// To be downloaded.
    Remote(ModelListing),
}

/// All files of a model, as they were when it was resolved.
#[derive(Clone, Debug)]
pub struct ModelListing {
    /// Names these exact bytes at their source.
    pub identity: String,
    /// Commit, or version of the largest file's object.
    pub revision: String,
    /// What to download.
    pub files: Vec<ModelFile>,
    pub(super) reference: AdapterRef,
}

/// One of them.
#[derive(Clone, Debug)]
pub struct ModelFile {
    /// One path component of letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Its hash, if the source gives one.
    pub digest: Option<FileDigest>,
    /// True if what is here of it can be gone on with.
    pub can_resume: bool,
    handle: Handle,
}

#[derive(Clone, Debug)]
enum Handle {
    Hub { commit: String },
    Object(Object),
}

impl Sources {
    /// What the model consists of now. Asks with the server's own credentials.
    ///
    /// # Errors
    /// [`SourceError`] as for adapters; [`SourceError::Permanent`] says what is missing.
    pub async fn resolve_model(&self, model: &ModelRef) -> Result<ModelPlace, SourceError> {
        if !model.reference.is_valid() {
            return Err(SourceError::Absent);
        }
        let reference = &model.reference;
        let is_hub = reference.source == SourceKind::Hub;
        if is_hub && self.hub.is_offline() {
            let found = self.cached_model(model, reference.revision.as_deref().unwrap_or("main")).await?;
            return found.map(ModelPlace::Here).ok_or(SourceError::Absent);
        }
        let listed = within(self.pace.resolve_timeout * 4, self.list_model(model)).await;
        let revision = match &listed {
            Ok(listing) => listing.revision.clone(),
            Err(SourceError::Retryable { .. }) => reference.revision.clone().unwrap_or_else(|| "main".to_owned()),
            Err(error) => return Err(error.clone()),
        };
        let cached = if is_hub { self.cached_model(model, &revision).await? } else { None };
        match cached {
            Some(dir) => Ok(ModelPlace::Here(dir)),
            None => listed.map(ModelPlace::Remote),
        }
    }

    /// The bytes of a model's file from `offset` on.
    ///
    /// # Errors
    /// As [`crate::adapters::Source::open`].
    pub async fn open_model(
        &self,
        listing: &ModelListing,
        file: &ModelFile,
        offset: u64,
    ) -> Result<ByteStream, SourceError> {
        within(self.pace.open_timeout, async {
            let (reference, server) = (&listing.reference, &Credential::Server);
            match &file.handle {
                Handle::Hub { commit } => {
                    self.hub.read(&reference.locator, commit, &file.name, (offset, file.bytes), server).await
                }
                Handle::Object(object) => {
                    let (bucket, _) = buckets::split(&reference.locator);
                    self.buckets.read(reference.source, bucket, object, offset, server).await
                }
            }
        })
        .await
    }

    async fn cached_model(&self, model: &ModelRef, revision: &str) -> Result<Option<PathBuf>, SourceError> {
        let repo = model.reference.locator.clone();
        hub_cache::find_model(self.hub.cache_dirs(), repo, revision.to_owned(), model.gguf.clone()).await
    }

    async fn list_model(&self, model: &ModelRef) -> Result<ModelListing, SourceError> {
        let reference = &model.reference;
        let revision = reference.revision.clone().unwrap_or_else(|| "main".to_owned());
        let mut shop = Shop { sources: self, reference, revision, commit: None };
        let mut files = Vec::new();
        for name in TEXT_FILES {
            files.extend(shop.look(name).await?);
        }
        let weights = match &model.gguf {
            Some(file) => vec![file.clone()],
            None if !files.iter().any(|file| file.name == CONFIG) => return Err(shop.no_model(CONFIG).await),
            None => shop.weights(&mut files).await?,
        };
        for name in weights {
            let Some(found) = shop.look(&name).await? else { return Err(shop.no_model(&name).await) };
            files.push(found);
        }
        let place = match reference.source {
            SourceKind::Hub => format!("hub:{}", self.hub.endpoint().as_str().trim_end_matches('/')),
            kind => format!("{}:{}", kind.name(), self.buckets.endpoint(kind)),
        };
        let versions: Vec<String> = files.iter().map(ModelFile::version).collect();
        let revision = shop
            .commit
            .unwrap_or_else(|| files.iter().max_by_key(|f| f.bytes).map(ModelFile::version).unwrap_or_default());
        let which = model.gguf.as_deref().unwrap_or("safetensors");
        let identity = match reference.source {
            SourceKind::Hub => format!("{place}/{}@{revision}#{which}", reference.locator),
            _ => format!("{place}/{}#{which}:{}", reference.locator, versions.join(",")),
        };
        Ok(ModelListing { identity, revision, files, reference: reference.clone() })
    }
}

impl ModelListing {
    /// A directory's name: 32 hex digits that stand for these exact bytes.
    pub fn key(&self) -> String {
        Sha256::digest(&self.identity).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

impl ModelFile {
    fn version(&self) -> String {
        match &self.handle {
            Handle::Hub { commit } => commit.clone(),
            Handle::Object(object) => object.identity().unwrap_or_else(|| format!("{}", object.bytes)),
        }
    }

    /// As the names of adapters' files are checked by their type, these are by their characters.
    fn is_valid(&self) -> bool {
        is_valid_segment(&self.name)
    }
}

/// One model's place while its files are looked for.
struct Shop<'a> {
    sources: &'a Sources,
    reference: &'a AdapterRef,
    revision: String,
    commit: Option<String>,
}

impl Shop<'_> {
    async fn look(&mut self, name: &str) -> Result<Option<ModelFile>, SourceError> {
        let (locator, server) = (&self.reference.locator, &Credential::Server);
        let found = match self.reference.source {
            SourceKind::Hub => {
                let asked = self.commit.as_deref().unwrap_or(&self.revision);
                self.sources.hub.head(locator, asked, name, server).await?.map(|found| {
                    let commit = self.commit.get_or_insert(found.commit).clone();
                    (found.bytes, Some(found.digest), true, Handle::Hub { commit })
                })
            }
            kind @ (SourceKind::S3 | SourceKind::Gcs) => {
                let (bucket, prefix) = buckets::split(locator);
                let client = self.sources.buckets.client(kind, bucket, server)?;
                let found = buckets::head(&client, buckets::key_of(prefix, name)).await?;
                found.map(|object| (object.bytes, object.digest, object.etag.is_some(), Handle::Object(object)))
            }
            SourceKind::Http | SourceKind::Local | SourceKind::Merge => {
                return Err(missing("a base model is a path, `org/model`, `hf://`, `s3://` or `gs://`".to_owned()));
            }
        };
        let file = found.map(|(bytes, digest, can_resume, handle)| ModelFile {
            name: name.to_owned(),
            bytes,
            digest,
            can_resume,
            handle,
        });
        Ok(file.filter(ModelFile::is_valid))
    }

    /// Names of the weights' files; an index is put beside the other small files.
    async fn weights(&mut self, files: &mut Vec<ModelFile>) -> Result<Vec<String>, SourceError> {
        let Some(index) = self.look(INDEX).await? else { return Ok(vec![SINGLE.to_owned()]) };
        if index.bytes > INDEX_BYTES_MAX {
            return Err(missing(format!("{INDEX} has {} bytes; at most {INDEX_BYTES_MAX} are read", index.bytes)));
        }
        let listing = ModelListing {
            identity: String::new(),
            revision: String::new(),
            files: Vec::new(),
            reference: self.reference.clone(),
        };
        let body = self.sources.open_model(&listing, &index, 0).await?;
        let text = body
            .try_fold(Vec::new(), |mut sum, chunk| async move {
                sum.extend_from_slice(&chunk);
                Ok(sum)
            })
            .await?;
        files.push(index);
        shards(&text).map_err(|reason| missing(format!("{INDEX}: {reason}")))
    }

    /// The file is not there. What is instead helps more than its absence; only the hub can be asked.
    async fn no_model(&self, name: &str) -> SourceError {
        let found = match self.reference.source {
            SourceKind::Hub => hub_list::names(&self.sources.hub, &self.reference.locator, &self.revision).await,
            _ => None,
        };
        let Some(found) = found else { return SourceError::Absent };
        let gguf: Vec<&str> = found.iter().map(String::as_str).filter(|name| name.ends_with(".gguf")).collect();
        let (what, shown) = match gguf.is_empty() {
            true => ("it has", found.iter().map(String::as_str).take(SHOWN_MAX).collect::<Vec<_>>()),
            false => ("name one of its GGUF files, such as org/repo/FILE:", gguf.into_iter().take(SHOWN_MAX).collect()),
        };
        missing(format!("the repository has no {name}; {what} {}", shown.join(", ")))
    }
}

/// The files that an index names, each once.
pub(super) fn shards(index: &[u8]) -> Result<Vec<String>, &'static str> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::HashMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|_| "it is no JSON with a `weight_map`")?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    if names.is_empty() || names.len() > SHARDS_MAX {
        return Err("it names no file, or more than 1024");
    }
    if !names.iter().all(|name| is_valid_segment(name) && name.ends_with(".safetensors")) {
        return Err("it names a file that is no plain `*.safetensors` beside it");
    }
    Ok(names.into_iter().collect())
}

fn missing(message: String) -> SourceError {
    SourceError::permanent("model_invalid", message)
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
