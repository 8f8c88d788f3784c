//! What the operator decided about sources. Plain data: nothing here or below reads the environment.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use secrecy::SecretString;

/// All sources. The default: the public hub without a token, public buckets, no HTTP host, no local root.
#[derive(Clone, Debug, Default)]
pub struct SourceSettings {
    /// The hub, or a server that speaks its API.
    pub hub: HubSettings,
    /// S3 and compatible stores.
    pub s3: S3Settings,
    /// Google Cloud Storage.
    pub gcs: GcsSettings,
    /// Plain HTTP(S); off without hosts.
    pub http: HttpSettings,
    /// Directories of this machine.
    pub local: LocalSettings,
    /// Networks that are opened beside the public ones, for HTTP hosts and for redirect targets of the hub
    /// (`--adapter-http-networks`). Link-local addresses and metadata services stay closed.
    pub networks: Vec<IpNet>,
    /// Deadlines and least speed.
    pub pace: Pace,
}

/// See [`SourceSettings::hub`].
#[derive(Clone, Debug)]
pub struct HubSettings {
    /// Base URL (`HF_ENDPOINT`). Trusted as configured: it may be `http` and may be private.
    pub endpoint: String,
    /// The server's own token (`HF_TOKEN` and its kin). Used for [`super::super::Credential::Server`] only.
    pub token: Option<SecretString>,
    /// Ask nobody, read only what is in `cache_dirs` (`HF_HUB_OFFLINE`).
    pub is_offline: bool,
    /// Hosts that the endpoint may redirect downloads to (`--hub-hosts`), as `host`, `host:port` or `*.domain`.
    pub hosts: Vec<String>,
    /// Caches of other programs that are read, never written (`HF_HUB_CACHE` and its kin).
    pub cache_dirs: Vec<PathBuf>,
}

impl Default for HubSettings {
    fn default() -> Self {
        Self {
            endpoint: "https://huggingface.co".to_owned(),
            token: None,
            is_offline: false,
            hosts: vec!["*.hf.co".to_owned(), "*.huggingface.co".to_owned()],
            cache_dirs: Vec::new(),
        }
    }
}

/// See [`SourceSettings::s3`].
#[derive(Clone, Debug, Default)]
pub struct S3Settings {
    /// Base URL of a compatible store (`AWS_ENDPOINT_URL`, `S3_ENDPOINT_URL`, R2's). `None`: Amazon's, by region.
    pub endpoint: Option<String>,
    /// `AWS_REGION`; `us-east-1` if none.
    pub region: Option<String>,
    /// The bucket is a part of the host's name, also with `endpoint`.
    pub is_virtual_hosted: bool,
    /// The server's own credentials.
    pub credentials: S3Credentials,
}

/// Where the server's own S3 credentials come from.
#[derive(Clone, Debug, Default)]
pub enum S3Credentials {
    /// None: public buckets only.
    #[default]
    None,
    /// `AWS_ACCESS_KEY_ID` and its kin.
    Static {
        /// Access key.
        key_id: String,
        /// Secret key.
        secret: SecretString,
        /// Token of a session.
        session_token: Option<SecretString>,
    },
    /// `AWS_WEB_IDENTITY_TOKEN_FILE` and its kin (service accounts of Kubernetes).
    WebIdentity {
        /// File with the token; read again when it expires.
        token_file: PathBuf,
        /// Role to assume.
        role_arn: String,
        /// Name of the session.
        session_name: Option<String>,
        /// `AWS_ENDPOINT_URL_STS`.
        sts_endpoint: Option<String>,
    },
    /// `AWS_CONTAINER_CREDENTIALS_FULL_URI` with its token file (EKS pod identity).
    PodIdentity {
        /// Where to ask.
        uri: String,
        /// File with the token.
        token_file: PathBuf,
    },
    /// The machine's role, from its metadata service.
    Instance,
}

/// See [`SourceSettings::gcs`].
#[derive(Clone, Debug, Default)]
pub struct GcsSettings {
    /// Base URL of a compatible store. `None`: the service account's, or Google's.
    pub endpoint: Option<String>,
    /// The server's own credentials.
    pub credentials: GcsCredentials,
}

/// Where the server's own GCS credentials come from.
#[derive(Clone, Debug, Default)]
pub enum GcsCredentials {
    /// None: public buckets only.
    #[default]
    None,
    /// A service account's JSON, as in `GOOGLE_APPLICATION_CREDENTIALS`.
    ServiceAccount(SecretString),
    /// The machine's account (workload identity), from its metadata service.
    Instance,
}

/// See [`SourceSettings::http`].
#[derive(Clone, Debug, Default)]
pub struct HttpSettings {
    /// `host`, `host:port`, `*.domain`; plain HTTP only as `http://host[:port]` (`--adapter-http-hosts`).
    pub hosts: Vec<String>,
    /// Headers for what the operator itself named (`--adapter-http-header`).
    pub headers: Vec<HttpHeader>,
}

/// A header that goes to one host, and over no redirect to another.
#[derive(Clone)]
pub struct HttpHeader {
    /// As in [`HttpSettings::hosts`].
    pub host: String,
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: SecretString,
}

impl fmt::Debug for HttpHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpHeader").field("host", &self.host).field("name", &self.name).finish_non_exhaustive()
    }
}

/// See [`SourceSettings::local`].
#[derive(Clone, Debug, Default)]
pub struct LocalSettings {
    /// Directories below which every caller may name adapters (`--adapter-root`). Absolute.
    pub roots: Vec<PathBuf>,
    /// Directories that the operator itself named (`--adapter NAME=/dir`), for [`super::super::Credential::Server`] only.
    pub named: Vec<PathBuf>,
}

/// How long a source may take. Tests shorten it.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Resolving one reference, all its requests and redirects together.
    pub resolve_timeout: Duration,
    /// Until a download's first bytes: connecting, redirects and headers.
    pub open_timeout: Duration,
    /// A body must bring `bytes_min` in each `window`.
    pub window: Duration,
    /// See `window`.
    pub bytes_min: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            resolve_timeout: Duration::from_secs(15),
            open_timeout: Duration::from_secs(20),
            window: Duration::from_secs(30),
            bytes_min: 30 * 64 * 1024,
        }
    }
}

impl Pace {
    /// The same speed, but everything comes to its end in this part of the time. For tests.
    #[must_use]
    pub fn scaled(self, scale: f64) -> Self {
        Self {
            resolve_timeout: self.resolve_timeout.mul_f64(scale),
            open_timeout: self.open_timeout.mul_f64(scale),
            window: self.window.mul_f64(scale),
            bytes_min: (self.bytes_min as f64 * scale) as u64,
        }
    }
}
