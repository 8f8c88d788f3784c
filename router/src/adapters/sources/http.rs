//! Directories of plain HTTP servers that the operator listed: `<url>/adapter_config.json`, `<url>/adapter_model.safetensors`.

use std::sync::Arc;

use reqwest::Method;
use reqwest::header::{CONTENT_LENGTH, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH, LAST_MODIFIED};
use secrecy::ExposeSecret;
use url::Url;

use super::cause::place;
use super::guard::{self, HostList};
use super::net::{Ask, Hop, Net, Route, changed, is_same_origin, status_error};
use super::settings::HttpSettings;
use super::{PICKLE, SourceSettingsError, no_weights};
use crate::adapters::types::{AdapterRef, ByteStream, Credential, FileName, Origin, RemoteFile, Resolved, SourceError};

/// See [`HttpSettings`].
pub(super) struct Http {
    hosts: HostList,
    headers: Vec<(HostList, HeaderName, HeaderValue)>,
    net: Arc<Net>,
}

struct Found {
    bytes: u64,
    /// What changes when the file does.
    version: String,
    /// Set if it names exact bytes.
    strong_etag: Option<String>,
}

impl Http {
    pub(super) fn new(settings: &HttpSettings, net: Arc<Net>) -> Result<Self, SourceSettingsError> {
        let hosts = HostList::parse(&settings.hosts)
            .map_err(|(host, reason)| SourceSettingsError::new(format!("--adapter-http-hosts {host}"), reason))?;
        let read = |header: &super::HttpHeader| {
            let wrong = |reason: &str| {
                SourceSettingsError::new(format!("--adapter-http-header {}={}", header.host, header.name), reason)
            };
            let host = HostList::parse(&[&header.host]).map_err(|(_, reason)| wrong(reason))?;
            let name = HeaderName::try_from(header.name.as_str()).map_err(|_| wrong("this is no header's name"))?;
            let mut value = HeaderValue::try_from(header.value.expose_secret())
                .map_err(|_| wrong("the value has characters that no header may have"))?;
            value.set_sensitive(true);
            Ok((host, name, value))
        };
        let headers = settings.headers.iter().map(read).collect::<Result<_, _>>()?;
        Ok(Self { hosts, headers, net })
    }

    pub(super) fn is_off(&self) -> bool {
        self.hosts.is_empty()
    }

    pub(super) async fn resolve(
        &self,
        reference: &AdapterRef,
        credential: &Credential,
    ) -> Result<Resolved, SourceError> {
        let base = guard::parse_url(&reference.locator).map_err(|_| SourceError::Absent)?;
        let config = self.head(&base, FileName::Config.as_str(), credential).await?.ok_or(SourceError::Absent)?;
        let Some(weights) = self.head(&base, FileName::Weights.as_str(), credential).await? else {
            return Err(no_weights(self.head(&base, PICKLE, credential).await?.is_some()));
        };
        let file = |name: FileName, found: &Found| RemoteFile {
            name,
            bytes: found.bytes,
            digest: None,
            etag: found.strong_etag.clone(),
            locator: name.as_str().to_owned(),
        };
        Ok(Resolved {
            reference: reference.clone(),
            identity: format!("http:{}#{},{}", reference.locator, config.version, weights.version),
            revision: weights.version.clone(),
            origin: Origin::Remote(vec![file(FileName::Config, &config), file(FileName::Weights, &weights)]),
        })
    }

    pub(super) async fn open(
        &self,
        resolved: &Resolved,
        file: &RemoteFile,
        offset: u64,
        credential: &Credential,
    ) -> Result<ByteStream, SourceError> {
        let base = guard::parse_url(&resolved.reference.locator).map_err(|_| SourceError::Absent)?;
        // Without a strong tag, nothing says that the rest belongs to what is already here.
        if offset > 0 && file.etag.is_none() {
            return Err(changed());
        }
        let mut ask = self.ask(Method::GET, &base, file.name.as_str(), credential)?.starting_at(offset);
        if let Some(etag) = &file.etag {
            ask.headers.insert(IF_MATCH, HeaderValue::try_from(etag).map_err(|_| changed())?);
        }
        let reply = self.net.send(ask, &HttpRoute { http: self, first: &base }).await?;
        let etag = text(reply.response.headers(), ETAG.as_str());
        if reply.response.status().is_success() && file.etag.is_some() && etag != file.etag {
            return Err(changed());
        }
        reply.into_stream(offset, file.bytes, self.net.pace())
    }

    async fn head(&self, base: &Url, file: &str, credential: &Credential) -> Result<Option<Found>, SourceError> {
        let ask = self.ask(Method::HEAD, base, file, credential)?;
        let reply = self.net.send(ask, &HttpRoute { http: self, first: base }).await?;
        let (status, headers) = (reply.response.status(), reply.response.headers());
        match status.as_u16() {
            200 => Found::read(headers).map(Some),
            404 | 410 => Ok(None),
            _ => Err(status_error(status, headers).at(&place(reply.response.url()))),
        }
    }

    fn ask(&self, method: Method, base: &Url, file: &str, credential: &Credential) -> Result<Ask, SourceError> {
        let mut url = base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().push(file);
        }
        let mut ask = Ask::new(method, url);
        match credential {
            Credential::Anonymous => {}
            // The operator's headers are for what the operator named: they answer no caller.
            Credential::Server => {
                let own = self.headers.iter().filter(|(host, ..)| host.allows(base));
                ask.secrets.extend(own.map(|(_, name, value)| (name.clone(), value.clone())));
            }
            Credential::Token(token) => ask = ask.bearer(token.expose_secret())?,
        }
        Ok(ask)
    }
}

/// Listed hosts only; secrets stay with the first one.
struct HttpRoute<'a> {
    http: &'a Http,
    first: &'a Url,
}

impl Route for HttpRoute<'_> {
    fn hop(&self, url: &Url) -> Result<Option<Hop>, SourceError> {
        if !self.http.hosts.allows(url) {
            let error = SourceError::permanent(
                "source_forbidden",
                "the URL, or what it redirects to, is not of a listed host (--adapter-http-hosts)",
            );
            let place = place(url);
            return Err(error.with_detail(|_| match is_same_origin(url, self.first) {
                true => format!("{place} is not listed: --adapter-http-hosts {place}"),
                false => format!("it redirects to {place}, which is not listed: --adapter-http-hosts {place}"),
            }));
        }
        Ok(Some(Hop { is_trusted: false, takes_secrets: is_same_origin(url, self.first) }))
    }
}

impl Found {
    fn read(headers: &HeaderMap) -> Result<Self, SourceError> {
        let bytes = text(headers, CONTENT_LENGTH.as_str()).and_then(|bytes| bytes.parse::<u64>().ok());
        let etag = text(headers, ETAG.as_str()).filter(|etag| etag.len() <= 128 && etag.is_ascii());
        let version = etag.clone().or_else(|| text(headers, LAST_MODIFIED.as_str()).filter(|date| date.len() <= 64));
        let (Some(bytes), Some(version)) = (bytes, version) else {
            return Err(SourceError::permanent(
                "adapter_unsupported",
                "the host does not give a file's Content-Length, or neither its ETag nor its Last-Modified time; \
                          versions could not be told apart",
            ));
        };
        let strong_etag = etag.filter(|etag| etag.len() > 2 && etag.starts_with('"') && etag.ends_with('"'));
        Ok(Self { bytes, version: format!("{version}-{bytes}"), strong_etag })
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(|value| value.trim().to_owned())
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
