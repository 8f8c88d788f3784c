//! The Hugging Face Hub, or another server that speaks its API.
//!
//! The two files of an adapter are asked for with our own HEAD and ranged GET. `hf-hub` would join the server's ETag, commit
//! and file name to paths, checks no hash, sends its HEAD through a client that cannot be replaced (environment proxies, no
//! address check), and follows `/\host` with the token. What it is used for is in `hub_list.rs`.
//!
//! The endpoint is the operator's and trusted as an address. The token goes there and nowhere else. A redirect to another
//! host is followed only for bytes, only to listed hosts, through the guard and without the token.

use std::path::PathBuf;
use std::sync::Arc;

use reqwest::Method;
use reqwest::header::{CONTENT_LENGTH, ETAG, HeaderMap};
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::cause::place;
use super::guard::HostList;
use super::hub_cache::{self, Snapshot};
use super::net::{Ask, Hop, Net, Reply, Route, is_same_origin, status_error};
use super::settings::HubSettings;
use super::{PICKLE, SourceSettingsError, no_weights};
use crate::adapters::types::{
    AdapterRef, ByteStream, Credential, FileDigest, FileName, Origin, RemoteFile, Resolved, SourceError,
};

/// See [`HubSettings`].
pub(super) struct Hub {
    settings: HubSettings,
    endpoint: Url,
    hosts: HostList,
    net: Arc<Net>,
}

/// What a HEAD said about one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HubFile {
    /// 40 lower-case hex.
    pub commit: String,
    pub bytes: u64,
    pub digest: FileDigest,
}

impl Hub {
    pub(super) fn new(settings: &HubSettings, net: Arc<Net>) -> Result<Self, SourceSettingsError> {
        let wrong = |reason: &str| SourceSettingsError::new("HF_ENDPOINT", reason);
        let endpoint = Url::parse(settings.endpoint.trim_end_matches('/')).map_err(|_| wrong("this is no URL"))?;
        let is_plain = endpoint.username().is_empty() && endpoint.password().is_none() && endpoint.query().is_none();
        if !matches!(endpoint.scheme(), "http" | "https") || !is_plain {
            return Err(wrong("an endpoint is an http or https URL without user and query"));
        }
        // Behind a plain endpoint its other hosts may be plain too.
        let mut hosts = settings.hosts.clone();
        if endpoint.scheme() == "http" {
            let plain = settings.hosts.iter().filter(|host| !host.contains("://")).map(|host| format!("http://{host}"));
            hosts.extend(plain.collect::<Vec<_>>());
        }
        let hosts = HostList::parse(&hosts)
            .map_err(|(host, reason)| SourceSettingsError::new(format!("--hub-hosts {host}"), reason))?;
        Ok(Self { settings: settings.clone(), endpoint, hosts, net })
    }

    pub(super) async fn resolve(
        &self,
        reference: &AdapterRef,
        credential: &Credential,
    ) -> Result<Resolved, SourceError> {
        let repo = reference.locator.as_str();
        let revision = reference.revision.as_deref().unwrap_or("main");
        let is_server = matches!(credential, Credential::Server);
        // Another program's cache grants nothing to a caller; it only saves the server a download.
        let cached = match is_server {
            true => hub_cache::find(self.settings.cache_dirs.clone(), repo.to_owned(), revision.to_owned()).await?,
            false => None,
        };
        if self.settings.is_offline || is_commit(revision) && cached.is_some() {
            return Ok(self.resolved(reference, cached.ok_or(SourceError::Absent)?));
        }
        match (self.ask_both(repo, revision, credential).await, cached) {
            (Ok((commit, files)), cached) => {
                let identity = self.identity(repo, &commit);
                let files = match cached.filter(|cached| cached.commit == commit) {
                    // The hub's hashes still decide about the cache's bytes.
                    Some(cached) => cached
                        .files
                        .into_iter()
                        .zip(files)
                        .map(|(ours, theirs)| RemoteFile { digest: theirs.digest, ..ours })
                        .collect(),
                    None => files,
                };
                Ok(Resolved { reference: reference.clone(), identity, revision: commit, origin: Origin::Remote(files) })
            }
            // As good as the hub's own programs: what was there last, while nobody answers.
            (Err(SourceError::Retryable { .. }), Some(cached)) => Ok(self.resolved(reference, cached)),
            (Err(error), _) => Err(error),
        }
    }

    pub(super) async fn open(
        &self,
        resolved: &Resolved,
        file: &RemoteFile,
        offset: u64,
        credential: &Credential,
    ) -> Result<ByteStream, SourceError> {
        if hub_cache::is_cached(file) {
            return match credential {
                Credential::Server => hub_cache::open(&self.settings.cache_dirs, file, offset).await,
                _ => Err(SourceError::Absent),
            };
        }
        let repo = resolved.reference.locator.as_str();
        self.read(repo, &resolved.revision, file.name.as_str(), (offset, file.bytes), credential).await
    }

    /// Both files of an adapter at one commit.
    async fn ask_both(
        &self,
        repo: &str,
        revision: &str,
        credential: &Credential,
    ) -> Result<(String, Vec<RemoteFile>), SourceError> {
        let config =
            self.head(repo, revision, FileName::Config.as_str(), credential).await?.ok_or(SourceError::Absent)?;
        let commit = config.commit.clone();
        let Some(weights) = self.head(repo, &commit, FileName::Weights.as_str(), credential).await? else {
            return Err(no_weights(self.head(repo, &commit, PICKLE, credential).await?.is_some()));
        };
        if weights.commit != commit {
            return Err(malformed());
        }
        let file = |name: FileName, found: &HubFile| RemoteFile {
            name,
            bytes: found.bytes,
            digest: Some(found.digest),
            etag: Some(digest_text(&found.digest)),
            locator: format!("{repo}/resolve/{commit}/{}", name.as_str()),
        };
        let files = vec![file(FileName::Config, &config), file(FileName::Weights, &weights)];
        Ok((commit, files))
    }

    /// What the hub says about a file; `None` if a readable repository lacks it (or does not exist).
    pub(super) async fn head(
        &self,
        repo: &str,
        revision: &str,
        file: &str,
        credential: &Credential,
    ) -> Result<Option<HubFile>, SourceError> {
        let ask = self.ask(Method::HEAD, repo, revision, file, credential)?;
        let reply = self.net.send(ask, &HubRoute { hub: self, is_for_bytes: false }).await?;
        let status = reply.response.status();
        match status.as_u16() {
            200..=399 => HubFile::read(&reply).map(Some),
            404 => Ok(None),
            _ => Err(status_error(status, reply.response.headers()).at(&place(reply.response.url()))),
        }
    }

    /// Bytes of a file at `commit`, from `offset` on, of `bytes` in all.
    pub(super) async fn read(
        &self,
        repo: &str,
        commit: &str,
        file: &str,
        (offset, bytes): (u64, u64),
        credential: &Credential,
    ) -> Result<ByteStream, SourceError> {
        let ask = self.ask(Method::GET, repo, commit, file, credential)?.starting_at(offset);
        let reply = self.net.send(ask, &HubRoute { hub: self, is_for_bytes: true }).await?;
        reply.into_stream(offset, bytes, self.net.pace())
    }

    fn ask(
        &self,
        method: Method,
        repo: &str,
        revision: &str,
        file: &str,
        credential: &Credential,
    ) -> Result<Ask, SourceError> {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            // A revision is one segment: its slashes are encoded.
            path.pop_if_empty().extend(repo.split('/')).push("resolve").push(revision).extend(file.split('/'));
        }
        let ask = Ask::new(method, url);
        match self.token(credential) {
            Some(token) => ask.bearer(token.expose_secret()),
            None => Ok(ask),
        }
    }

    pub(super) fn token<'a>(&'a self, credential: &'a Credential) -> Option<&'a SecretString> {
        match credential {
            Credential::Anonymous => None,
            Credential::Server => self.settings.token.as_ref(),
            Credential::Token(token) => Some(token),
        }
    }

    pub(super) fn endpoint(&self) -> &Url {
        &self.endpoint
    }

    /// Our client, as `hf-hub` may use it: for the endpoint only, without redirects.
    pub(super) fn client(&self) -> Option<reqwest::Client> {
        self.net.trusted().ok().cloned()
    }

    pub(super) fn cache_dirs(&self) -> Vec<PathBuf> {
        self.settings.cache_dirs.clone()
    }

    pub(super) fn is_offline(&self) -> bool {
        self.settings.is_offline
    }

    fn identity(&self, repo: &str, commit: &str) -> String {
        format!("hub:{}/{repo}@{commit}", self.endpoint.as_str().trim_end_matches('/'))
    }

    fn resolved(&self, reference: &AdapterRef, cached: Snapshot) -> Resolved {
        Resolved {
            reference: reference.clone(),
            identity: self.identity(&reference.locator, &cached.commit),
            revision: cached.commit,
            origin: Origin::Remote(cached.files),
        }
    }
}

/// Where requests to the hub may end up.
struct HubRoute<'a> {
    hub: &'a Hub,
    /// For a HEAD, the redirect to a host of bytes is the answer: it carries the hash and the size.
    is_for_bytes: bool,
}

impl Route for HubRoute<'_> {
    fn hop(&self, url: &Url) -> Result<Option<Hop>, SourceError> {
        if is_same_origin(url, &self.hub.endpoint) {
            return Ok(Some(Hop { is_trusted: true, takes_secrets: true }));
        }
        if !self.is_for_bytes {
            return Ok(None);
        }
        let is_as_safe = url.scheme() == "https" || url.scheme() == self.hub.endpoint.scheme();
        if is_as_safe && self.hub.hosts.allows(url) {
            return Ok(Some(Hop { is_trusted: false, takes_secrets: false }));
        }
        let error = SourceError::permanent(
            "source_forbidden",
            "the hub redirects the download to a host that is not listed (--hub-hosts)",
        );
        Err(error.with_detail(|_| {
            let (from, to) = (place(&self.hub.endpoint), place(url));
            match is_as_safe {
                true => {
                    format!("{from} redirects the download to {to}, which is not listed: --hub-hosts {}", listed(url))
                }
                false => format!("{from} redirects the download to {to}, which is not https"),
            }
        }))
    }
}

/// As `--hub-hosts` takes it.
fn listed(url: &Url) -> String {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}{port}", url.host_str().unwrap_or_default())
}

impl HubFile {
    fn read(reply: &Reply) -> Result<Self, SourceError> {
        let last = reply.response.headers();
        let is_final = reply.response.status().is_success();
        let text = |headers: &HeaderMap, name: &str| {
            headers.get(name).and_then(|value| value.to_str().ok()).map(|value| value.trim().to_owned())
        };
        // A redirect inside of the hub (a renamed repository, its own cache) may carry what the end of it lacks.
        let anywhere = |name: &str| reply.trail.iter().chain([last]).find_map(|headers| text(headers, name));
        let at_the_end = |name: &str| if is_final { text(last, name) } else { None };
        let commit = anywhere("x-repo-commit").filter(|commit| is_commit(commit)).ok_or_else(malformed)?;
        let etag = anywhere("x-linked-etag").or_else(|| at_the_end(ETAG.as_str())).ok_or_else(malformed)?;
        let bytes = anywhere("x-linked-size").or_else(|| at_the_end(CONTENT_LENGTH.as_str())).ok_or_else(malformed)?;
        Ok(Self {
            commit,
            bytes: bytes.parse().map_err(|_| malformed())?,
            digest: digest_of_etag(&etag).ok_or_else(malformed)?,
        })
    }
}

/// 40 lower-case hex digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// An entity tag of the hub is a hash: SHA-256 of a large file, git's SHA-1 of a small one. Anything else is none.
pub(super) fn digest_of_etag(etag: &str) -> Option<FileDigest> {
    let hex = etag.strip_prefix("W/").unwrap_or(etag);
    let hex = hex.strip_prefix('"').and_then(|hex| hex.strip_suffix('"')).unwrap_or(hex);
    match hex.len() {
        64 => from_hex(hex).map(FileDigest::Sha256),
        40 => from_hex(hex).map(FileDigest::GitSha1),
        _ => None,
    }
}

fn from_hex<const N: usize>(hex: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        let digits = std::str::from_utf8(pair).ok().filter(|pair| pair.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    (hex.len() == 2 * N).then_some(bytes)
}

fn digest_text(digest: &FileDigest) -> String {
    let bytes: &[u8] = match digest {
        FileDigest::Sha256(bytes) => bytes,
        FileDigest::GitSha1(bytes) => bytes,
        FileDigest::Crc32c(bytes) => bytes,
    };
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn malformed() -> SourceError {
    SourceError::retryable("the hub's answer lacks a commit, a size or a hash; is HF_ENDPOINT a hub?")
}

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
