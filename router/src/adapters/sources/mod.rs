//! Places that adapters come from: what a reference stands for there, and its bytes.
//!
//! `resolve` is the authorisation too: it asks with the credential it is given, and every way of not getting there is one
//! answer ([`SourceError::Absent`]). What a source says is never trusted: sizes, ranges and hashes are checked, redirects
//! are followed by [`guard`]'s rules, a body has a least speed, and no text of a source is repeated.

mod absent;
mod beneath;
mod bucket_client;
mod bucket_keys;
mod buckets;
#[cfg(test)]
mod canary_tests;
mod cause;
pub mod guard;
mod http;
mod hub;
mod hub_cache;
mod hub_list;
mod local;
mod model;
mod model_download;
mod net;
mod pace;
mod settings;
#[cfg(test)]
mod testing;

pub use model::{ModelFile, ModelListing, ModelPlace, ModelRef};
pub use settings::{
    GcsCredentials, GcsSettings, HttpHeader, HttpSettings, HubSettings, LocalSettings, Pace, S3Credentials, S3Settings,
    SourceSettings,
};

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

use super::types::{AdapterRef, ByteStream, Credential, RemoteFile, Resolved, Source, SourceError, SourceKind};

/// A setting that cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {reason}")]
pub struct SourceSettingsError {
    /// Which one, as an operator knows it.
    pub setting: String,
    /// What is wrong, what is accepted.
    pub reason: String,
}

impl SourceSettingsError {
    fn new(setting: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { setting: setting.into(), reason: reason.into() }
    }
}

/// What older adapters have in place of safetensors. It is a program, and is never read.
const PICKLE: &str = "adapter_model.bin";

/// A config was found, but no weights.
fn no_weights(has_pickle: bool) -> SourceError {
    let (code, message) = if has_pickle {
        (
            "adapter_unsupported",
            "its weights are a pickle (adapter_model.bin), which can run code; save them as adapter_model.safetensors",
        )
    } else {
        ("adapter_invalid", "it has an adapter_config.json, but no adapter_model.safetensors")
    };
    SourceError::permanent(code, message)
}

/// All sources of this server.
pub struct Sources {
    hub: hub::Hub,
    buckets: buckets::Buckets,
    http: http::Http,
    local: local::Local,
    pace: Pace,
}

impl Sources {
    /// Reads the settings; connects to nothing.
    ///
    /// # Errors
    /// [`SourceSettingsError`] for a URL, host or header that is none.
    pub fn new(settings: SourceSettings) -> Result<Self, SourceSettingsError> {
        let net = Arc::new(net::Net::new(guard::Guard::new(settings.networks.clone()), settings.pace));
        Self::with_net(&settings, net)
    }

    fn with_net(settings: &SourceSettings, net: Arc<net::Net>) -> Result<Self, SourceSettingsError> {
        Ok(Self {
            hub: hub::Hub::new(&settings.hub, Arc::clone(&net))?,
            buckets: buckets::Buckets::new(&settings.s3, &settings.gcs, Arc::clone(&net))?,
            http: http::Http::new(&settings.http, net)?,
            local: local::Local::new(&settings.local),
            pace: settings.pace,
        })
    }

    /// True if references of this source can be resolved at all.
    pub fn has(&self, kind: SourceKind) -> bool {
        match kind {
            SourceKind::Hub | SourceKind::S3 | SourceKind::Gcs => true,
            SourceKind::Http => !self.http.is_off(),
            SourceKind::Local => !self.local.is_off(),
            SourceKind::Merge => false,
        }
    }

    /// Says where it happened, if nothing nearer has.
    fn located(&self, error: SourceError, reference: &AdapterRef) -> SourceError {
        match reference.source {
            SourceKind::Hub => error.at(&cause::place(self.hub.endpoint())),
            SourceKind::S3 | SourceKind::Gcs => {
                error.at(&format!("{reference} ({})", self.buckets.endpoint(reference.source)))
            }
            SourceKind::Http | SourceKind::Local | SourceKind::Merge => error.at(&reference.to_string()),
        }
    }
}

impl Source for Sources {
    fn resolve<'a>(
        &'a self,
        reference: &'a AdapterRef,
        credential: &'a Credential,
    ) -> BoxFuture<'a, Result<Resolved, SourceError>> {
        let asked = within(self.pace.resolve_timeout, async move {
            // It may come from a file or a message: only what could have been parsed becomes a URL or a path.
            if !reference.is_valid() {
                return Err(SourceError::Absent);
            }
            if !self.has(reference.source) {
                return Err(no_source(reference.source));
            }
            match reference.source {
                SourceKind::Hub => self.hub.resolve(reference, credential).await,
                SourceKind::Http => self.http.resolve(reference, credential).await,
                SourceKind::Local => self.local.resolve(reference, credential).await,
                SourceKind::S3 | SourceKind::Gcs => self.buckets.resolve(reference, credential).await,
                SourceKind::Merge => Err(no_source(reference.source)),
            }
        });
        Box::pin(async move { asked.await.map_err(|error| self.located(error, reference)) })
    }

    fn open<'a>(
        &'a self,
        resolved: &'a Resolved,
        file: &'a RemoteFile,
        offset: u64,
        credential: &'a Credential,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>> {
        let asked = within(self.pace.open_timeout, async move {
            if !resolved.reference.is_valid() {
                return Err(SourceError::Absent);
            }
            match resolved.reference.source {
                SourceKind::Hub => self.hub.open(resolved, file, offset, credential).await,
                SourceKind::Http => self.http.open(resolved, file, offset, credential).await,
                SourceKind::Local => self.local.open(resolved, file, offset, credential).await,
                SourceKind::S3 | SourceKind::Gcs => self.buckets.open(resolved, file, offset, credential).await,
                kind @ SourceKind::Merge => Err(no_source(kind)),
            }
        });
        Box::pin(async move { asked.await.map_err(|error| self.located(error, &resolved.reference)) })
    }

    fn why_absent<'a>(&'a self, reference: &'a AdapterRef, credential: &'a Credential) -> BoxFuture<'a, String> {
        Box::pin(async move {
            let unknown = || format!("{reference}: not found, or not readable with this credential");
            let looked = tokio::time::timeout(self.pace.resolve_timeout, self.absence(reference, credential)).await;
            looked.unwrap_or_else(|_| unknown())
        })
    }
}

fn no_source(kind: SourceKind) -> SourceError {
    let how = match kind {
        SourceKind::Http => "; an operator lists hosts with --adapter-http-hosts",
        SourceKind::Local => "; an operator allows directories with --adapter-root",
        _ => "",
    };
    SourceError::permanent("source_forbidden", format!("this server has no source `{}`{how}", kind.name()))
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, SourceError>>) -> Result<T, SourceError> {
    match tokio::time::timeout(limit, work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(SourceError::retryable("the source did not answer in time")),
    }
}
