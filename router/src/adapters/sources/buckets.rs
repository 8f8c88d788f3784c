//! S3, stores that speak its API, and Google Cloud Storage.
//!
//! `object_store` signs; nothing is read from the environment. The endpoint is the operator's, also for a caller's own
//! credentials: a service account's `gcs_base_url` counts only in the operator's file.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::client::HttpErrorKind;
use object_store::gcp::{GcpCredential, GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{ClientOptions, GetOptions, GetRange, ObjectStore, RetryConfig, StaticCredentialProvider};
use reqwest::header::{HeaderMap, HeaderValue};
use secrecy::ExposeSecret;

use super::bucket_client::{Answer, Connector, Sent};
use super::bucket_keys::{GcsKey, S3Key, from_base64};
use super::cause::cause;
use super::net::{Net, changed, status_error};
use super::pace::paced;
use super::settings::{GcsCredentials, GcsSettings, S3Credentials, S3Settings};
use super::{PICKLE, SourceSettingsError, no_weights};
use crate::adapters::types::{
    AdapterRef, ByteStream, Credential, FileDigest, FileName, Origin, RemoteFile, Resolved, SourceError, SourceKind,
};

/// Clients that are kept: one for each bucket, for the server and for nobody. A caller's own lives for one call.
const CLIENTS_MAX: usize = 256;

type Client = Arc<dyn ObjectStore>;

/// See [`S3Settings`] and [`GcsSettings`].
pub(super) struct Buckets {
    s3: S3Settings,
    gcs: GcsSettings,
    net: Arc<Net>,
    clients: Mutex<HashMap<(SourceKind, String, bool), Client>>,
}

/// One object as it was when it was looked at.
#[derive(Clone, Debug)]
pub(super) struct Object {
    pub key: String,
    pub bytes: u64,
    pub etag: Option<String>,
    pub version: Option<String>,
    pub digest: Option<FileDigest>,
}

impl Buckets {
    pub(super) fn new(s3: &S3Settings, gcs: &GcsSettings, net: Arc<Net>) -> Result<Self, SourceSettingsError> {
        for (name, endpoint) in [("AWS_ENDPOINT_URL", &s3.endpoint), ("GCS endpoint", &gcs.endpoint)] {
            let is_url =
                |text: &String| url::Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
            if endpoint.as_ref().is_some_and(|endpoint| !is_url(endpoint)) {
                return Err(SourceSettingsError::new(name, "this is no http or https URL"));
            }
        }
        let mut gcs = gcs.clone();
        if let (None, GcsCredentials::ServiceAccount(json)) = (&gcs.endpoint, &gcs.credentials) {
            gcs.endpoint = GcsKey::endpoint_in(json.expose_secret())
                .map_err(|reason| SourceSettingsError::new("GOOGLE_APPLICATION_CREDENTIALS", reason))?;
        }
        Ok(Self { s3: s3.clone(), gcs, net, clients: Mutex::default() })
    }

    pub(super) async fn resolve(
        &self,
        reference: &AdapterRef,
        credential: &Credential,
    ) -> Result<Resolved, SourceError> {
        let (kind, place) = (reference.source, split(&reference.locator));
        let client = self.client(kind, place.0, credential)?;
        let look = |name: &'static str| {
            let (client, key) = (Arc::clone(&client), key_of(place.1, name));
            async move { head(&client, key).await }
        };
        let config = look(FileName::Config.as_str()).await?.ok_or(SourceError::Absent)?;
        let Some(weights) = look(FileName::Weights.as_str()).await? else {
            return Err(no_weights(look(PICKLE).await?.is_some()));
        };
        let (Some(config_id), Some(weights_id)) = (config.identity(), weights.identity()) else {
            return Err(SourceError::permanent(
                "adapter_unsupported",
                "the store gives neither entity tags nor versions; changed objects could not be told apart",
            ));
        };
        Ok(Resolved {
            reference: reference.clone(),
            identity: format!("{}:{}/{}#{config_id},{weights_id}", kind.name(), self.endpoint(kind), reference.locator),
            revision: weights_id,
            origin: Origin::Remote(vec![config.to_file(FileName::Config), weights.to_file(FileName::Weights)]),
        })
    }

    pub(super) async fn open(
        &self,
        resolved: &Resolved,
        file: &RemoteFile,
        offset: u64,
        credential: &Credential,
    ) -> Result<ByteStream, SourceError> {
        let (bucket, prefix) = split(&resolved.reference.locator);
        let version = file.locator.split_once('#').map(|(_, version)| version.to_owned());
        let object = Object {
            key: key_of(prefix, file.name.as_str()),
            bytes: file.bytes,
            etag: file.etag.clone(),
            version,
            digest: file.digest,
        };
        self.read(resolved.reference.source, bucket, &object, offset, credential).await
    }

    /// The bytes of an object from `offset` on, if it is still the same.
    pub(super) async fn read(
        &self,
        kind: SourceKind,
        bucket: &str,
        object: &Object,
        offset: u64,
        credential: &Credential,
    ) -> Result<ByteStream, SourceError> {
        let client = self.client(kind, bucket, credential)?;
        let path = Path::parse(&object.key).map_err(|_| SourceError::Absent)?;
        let (answer, options) = options();
        let options = GetOptions {
            range: (offset > 0).then_some(GetRange::Offset(offset)),
            if_match: object.etag.clone(),
            version: object.version.clone(),
            ..options
        };
        let result = client.get_opts(&path, options).await.map_err(|error| failure(&error, &answer))?;
        let is_same = result.meta.size == object.bytes && result.range == (offset..object.bytes);
        if !is_same || object.etag.is_some() && result.meta.e_tag != object.etag {
            return Err(changed());
        }
        let body = result.into_stream().map(move |chunk| chunk.map_err(|error| failure(&error, &Answer::default())));
        Ok(paced(body.boxed(), object.bytes - offset, self.net.pace()))
    }

    /// For identities: names of buckets mean something only there.
    pub(super) fn endpoint(&self, kind: SourceKind) -> &str {
        match kind {
            SourceKind::S3 => self.s3.endpoint.as_deref().unwrap_or("aws").trim_end_matches('/'),
            _ => self.gcs.endpoint.as_deref().unwrap_or("google").trim_end_matches('/'),
        }
    }

    pub(super) fn client(
        &self,
        kind: SourceKind,
        bucket: &str,
        credential: &Credential,
    ) -> Result<Client, SourceError> {
        let build = || match kind {
            SourceKind::S3 => self.s3_client(bucket, credential),
            _ => self.gcs_client(bucket, credential),
        };
        if let Credential::Token(_) = credential {
            return build();
        }
        let key = (kind, bucket.to_owned(), matches!(credential, Credential::Server));
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&key) {
            return Ok(Arc::clone(client));
        }
        let client = build()?;
        if clients.len() >= CLIENTS_MAX {
            clients.clear();
        }
        clients.insert(key, Arc::clone(&client));
        Ok(client)
    }

    fn s3_client(&self, bucket: &str, credential: &Credential) -> Result<Client, SourceError> {
        let mut headers = HeaderMap::new();
        headers.insert("x-amz-checksum-mode", HeaderValue::from_static("ENABLED"));
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_region(self.s3.region.as_deref().unwrap_or("us-east-1"))
            .with_virtual_hosted_style_request(self.s3.is_virtual_hosted)
            .with_client_options(ClientOptions::new().with_default_headers(headers).with_allow_http(true))
            .with_retry(no_retries())
            .with_http_connector(Connector(self.net.trusted()?.clone()));
        if let Some(endpoint) = &self.s3.endpoint {
            let endpoint = endpoint.trim_end_matches('/');
            builder = match (self.s3.is_virtual_hosted, endpoint.split_once("://")) {
                (true, Some((scheme, host))) => builder.with_endpoint(format!("{scheme}://{bucket}.{host}")),
                _ => builder.with_endpoint(endpoint),
            };
        }
        let builder = match credential {
            Credential::Anonymous => builder.with_skip_signature(true),
            Credential::Server => server_s3(builder, &self.s3.credentials),
            Credential::Token(token) => S3Key::parse(token)?.apply(builder),
        };
        builder.build().map(|client| Arc::new(client) as Client).map_err(|_| unusable())
    }

    fn gcs_client(&self, bucket: &str, credential: &Credential) -> Result<Client, SourceError> {
        let mut builder = GoogleCloudStorageBuilder::new()
            .with_bucket_name(bucket)
            .with_client_options(ClientOptions::new().with_allow_http(true))
            .with_retry(no_retries())
            .with_http_connector(Connector(self.net.trusted()?.clone()));
        // Explicit credentials in every case: without, the crate looks for files in the home directory.
        let nobody = || Arc::new(StaticCredentialProvider::new(GcpCredential { bearer: String::new() }));
        builder = match (credential, &self.gcs.credentials) {
            (Credential::Server, GcsCredentials::ServiceAccount(json)) => {
                builder.with_service_account_key(json.expose_secret())
            }
            (Credential::Server, GcsCredentials::Instance) => builder,
            (Credential::Token(token), _) => GcsKey::parse(token)?.apply(builder),
            (Credential::Anonymous, _) | (Credential::Server, GcsCredentials::None) => {
                builder.with_credentials(nobody()).with_config(GoogleConfigKey::SkipSignature, "true")
            }
        };
        // After the key: what a key says about the endpoint does not count.
        let endpoint = self.gcs.endpoint.as_deref().unwrap_or("https://storage.googleapis.com");
        let builder = builder.with_base_url(endpoint.trim_end_matches('/'));
        builder.build().map(|client| Arc::new(client) as Client).map_err(|_| unusable())
    }
}

fn server_s3(builder: AmazonS3Builder, credentials: &S3Credentials) -> AmazonS3Builder {
    use object_store::aws::AmazonS3ConfigKey as Key;

    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    match credentials {
        S3Credentials::None => builder.with_skip_signature(true),
        S3Credentials::Static { key_id, secret, session_token } => {
            let builder = builder.with_access_key_id(key_id).with_secret_access_key(secret.expose_secret());
            match session_token {
                Some(token) => builder.with_token(token.expose_secret()),
                None => builder,
            }
        }
        S3Credentials::WebIdentity { token_file, role_arn, session_name, sts_endpoint } => {
            let mut builder =
                builder.with_config(Key::WebIdentityTokenFile, path(token_file)).with_config(Key::RoleArn, role_arn);
            if let Some(name) = session_name {
                builder = builder.with_config(Key::RoleSessionName, name);
            }
            if let Some(endpoint) = sts_endpoint {
                builder = builder.with_config(Key::StsEndpoint, endpoint);
            }
            builder
        }
        S3Credentials::PodIdentity { uri, token_file } => builder
            .with_config(Key::ContainerCredentialsFullUri, uri)
            .with_config(Key::ContainerAuthorizationTokenFile, path(token_file)),
        S3Credentials::Instance => builder,
    }
}

/// Bucket and prefix of a locator.
pub(super) fn split(locator: &str) -> (&str, &str) {
    locator.split_once('/').unwrap_or((locator, ""))
}

pub(super) fn key_of(prefix: &str, file: &str) -> String {
    if prefix.is_empty() { file.to_owned() } else { format!("{prefix}/{file}") }
}

/// One attempt each: when to try again is decided for all sources in one place.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

fn options() -> (Answer, GetOptions) {
    let (answer, mut options) = (Answer::default(), GetOptions::default());
    options.extensions.insert(answer.clone());
    (answer, options)
}

/// What the store says about an object; `None` if it is not there or not for this credential. A store that may not tell the
/// two apart says 403 to a key that does not exist.
pub(super) async fn head(client: &Client, key: String) -> Result<Option<Object>, SourceError> {
    let path = Path::parse(&key).map_err(|_| SourceError::Absent)?;
    let (answer, options) = options();
    let meta = match client.get_opts(&path, GetOptions { head: true, ..options }).await {
        Ok(result) => result.meta,
        Err(error) => {
            return match failure(&error, &answer) {
                SourceError::Absent => Ok(None),
                other => Err(other),
            };
        }
    };
    let headers = answer.get().map(|(_, headers)| headers).unwrap_or_default();
    let is_plain =
        |text: &String| text.len() <= 256 && text.bytes().all(|b| b.is_ascii_graphic()) && !text.contains('#');
    Ok(Some(Object {
        key,
        bytes: meta.size,
        etag: meta.e_tag.filter(is_plain),
        version: meta.version.filter(|version| version != "null").filter(is_plain),
        digest: digest_of(&headers),
    }))
}

impl Object {
    /// Names these bytes at this key.
    pub(super) fn identity(&self) -> Option<String> {
        let parts: Vec<&str> =
            [&self.version, &self.etag].into_iter().flatten().map(|part| part.trim_matches('"')).collect();
        (!parts.is_empty()).then(|| format!("{}-{}", parts.join("-"), self.bytes))
    }

    fn to_file(&self, name: FileName) -> RemoteFile {
        let version = self.version.as_ref().map(|version| format!("#{version}")).unwrap_or_default();
        RemoteFile {
            name,
            bytes: self.bytes,
            digest: self.digest,
            etag: self.etag.clone(),
            locator: format!("{}{version}", self.key),
        }
    }
}

/// Checksums of whole objects. One of parts (`...-3`) says nothing about the whole, and does not decode.
fn digest_of(headers: &HeaderMap) -> Option<FileDigest> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(sum) = text("x-amz-checksum-sha256").and_then(from_base64) {
        return Some(FileDigest::Sha256(sum));
    }
    let google = headers.get_all("x-goog-hash").iter().filter_map(|value| value.to_str().ok());
    let mut parts = google.flat_map(|value| value.split(','));
    let crc = parts.find_map(|part| part.trim().strip_prefix("crc32c=")).or_else(|| text("x-amz-checksum-crc32c"));
    crc.and_then(from_base64).map(FileDigest::Crc32c)
}

fn failure(error: &object_store::Error, answer: &Answer) -> SourceError {
    use object_store::Error;
    if let Some((status, headers)) = answer.get().filter(|(status, _)| !status.is_success()) {
        if status.is_redirection() {
            return SourceError::permanent(
                "source_forbidden",
                "the store redirects to another place; is the region right (AWS_REGION)?",
            );
        }
        return status_error(status, &headers);
    }
    match error {
        Error::NotFound { .. } | Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => SourceError::Absent,
        Error::Precondition { .. } | Error::NotModified { .. } => changed(),
        error => {
            let message = match kind_of(error) {
                Some(HttpErrorKind::Timeout) => "the store did not answer in time",
                Some(HttpErrorKind::Connect) => "the store cannot be reached",
                _ => "the store's answer broke off or was no answer",
            };
            let failed = SourceError::retryable(message);
            match find::<Sent>(error) {
                Some(sent) => failed.with_detail(|_| format!("{}: {}", sent.place, cause(&sent.error))),
                None => failed,
            }
        }
    }
}

fn kind_of(error: &object_store::Error) -> Option<HttpErrorKind> {
    find::<object_store::client::HttpError>(error).map(object_store::client::HttpError::kind)
}

fn find<E: std::error::Error + 'static>(error: &object_store::Error) -> Option<&E> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref() {
            return Some(error);
        }
        source = error.source();
    }
    None
}

fn unusable() -> SourceError {
    SourceError::permanent("source_forbidden", "the credentials for this store cannot be used")
}

#[cfg(test)]
#[path = "buckets_tests.rs"]
mod tests;
