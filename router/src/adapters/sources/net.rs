//! HTTP as all sources use it: redirects by our rules, addresses by the guard's, no environment proxies, no encodings.

use std::error::Error;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{StreamExt, TryStreamExt};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HeaderMap, HeaderValue, LOCATION,
};
use reqwest::{Client, Method, Response, StatusCode};
use url::{Host, Url};

use super::cause::{cause, place};
use super::guard::Guard;
use super::pace::paced;
use super::settings::Pace;
use crate::adapters::types::{ByteStream, SourceError};

/// Redirects of one request.
const REDIRECTS_MAX: usize = 3;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const IDLE_CONNECTIONS_MAX: usize = 8;
const AGENT: &str = concat!("loramux/", env!("CARGO_PKG_VERSION"));

/// Looks a host's name up. A test puts its own here.
pub(super) type Lookup = Arc<dyn Fn(String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> + Send + Sync>;

/// How a URL may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hop {
    /// The operator configured this very place, so any address will do. Otherwise the guard decides.
    pub is_trusted: bool,
    /// Credentials may go there.
    pub takes_secrets: bool,
}

/// Decides about each URL of a chain, the first one too. `None` = not followed; the redirect itself is the reply.
pub(super) trait Route: Sync {
    fn hop(&self, url: &Url) -> Result<Option<Hop>, SourceError>;
}

/// One request. Secrets are apart, because a redirect may leave them behind.
pub(super) struct Ask {
    pub method: Method,
    pub url: Url,
    pub headers: HeaderMap,
    pub secrets: HeaderMap,
}

impl Ask {
    pub(super) fn new(method: Method, url: Url) -> Self {
        Self { method, url, headers: HeaderMap::new(), secrets: HeaderMap::new() }
    }

    /// `Authorization: Bearer <token>`; a token that is no header value is nobody's.
    pub(super) fn bearer(mut self, token: &str) -> Result<Self, SourceError> {
        let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| SourceError::Absent)?;
        value.set_sensitive(true);
        self.secrets.insert(reqwest::header::AUTHORIZATION, value);
        Ok(self)
    }

    /// Bytes from `offset` on.
    pub(super) fn starting_at(mut self, offset: u64) -> Self {
        if let (true, Ok(value)) = (offset > 0, HeaderValue::try_from(format!("bytes={offset}-"))) {
            self.headers.insert(reqwest::header::RANGE, value);
        }
        self
    }
}

/// The last answer, and the headers of the redirects before it.
pub(super) struct Reply {
    pub response: Response,
    pub trail: Vec<HeaderMap>,
}

/// Clients and guard. One for all sources.
pub(super) struct Net {
    trusted: Result<Client, SourceError>,
    guarded: Result<Client, SourceError>,
    guard: Guard,
    pace: Pace,
}

impl Net {
    pub(super) fn new(guard: Guard, pace: Pace) -> Self {
        Self::with_lookup(guard, pace, system_lookup())
    }

    pub(super) fn with_lookup(guard: Guard, pace: Pace, lookup: Lookup) -> Self {
        let any = CheckedNames { guard: None, lookup: system_lookup() };
        let checked = CheckedNames { guard: Some(guard.clone()), lookup };
        Self { trusted: client(any), guarded: client(checked), guard, pace }
    }

    pub(super) fn pace(&self) -> Pace {
        self.pace
    }

    /// The client for places that the operator configured. It follows no redirect.
    pub(super) fn trusted(&self) -> Result<&Client, SourceError> {
        self.trusted.as_ref().map_err(Clone::clone)
    }

    /// Sends `ask`, and again to where it is redirected, at most [`REDIRECTS_MAX`] times.
    pub(super) async fn send(&self, ask: Ask, route: &dyn Route) -> Result<Reply, SourceError> {
        let (mut url, mut trail) = (ask.url.clone(), Vec::new());
        let mut hop = route.hop(&url)?.ok_or(SourceError::Absent)?;
        loop {
            let response = self.send_once(&ask, &url, hop).await.map_err(|error| error.at(&place(&url)))?;
            if !response.status().is_redirection() || response.status() == StatusCode::NOT_MODIFIED {
                return Ok(Reply { response, trail });
            }
            let next = redirect_target(&url, &response).map_err(|error| error.at(&place(&url)))?;
            let Some(next_hop) = route.hop(&next)? else { return Ok(Reply { response, trail }) };
            if trail.len() >= REDIRECTS_MAX {
                let error = SourceError::retryable(format!("the source redirects more than {REDIRECTS_MAX} times"));
                return Err(error.at(&place(&ask.url)));
            }
            trail.push(response.headers().clone());
            // Once left behind, secrets stay behind: the chain may come back on somebody else's word.
            hop = Hop { takes_secrets: hop.takes_secrets && next_hop.takes_secrets, ..next_hop };
            url = next;
        }
    }

    async fn send_once(&self, ask: &Ask, url: &Url, hop: Hop) -> Result<Response, SourceError> {
        let client = if hop.is_trusted {
            &self.trusted
        } else {
            // The resolver sees names only; addresses in the URL are checked here.
            let literal = match url.host() {
                Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
                Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
                _ => None,
            };
            if let Some(address) = literal.filter(|address| !self.guard.allows(*address)) {
                return Err(refused(&place(url), address));
            }
            &self.guarded
        };
        let client = client.as_ref().map_err(Clone::clone)?;
        let mut request = client.request(ask.method.clone(), url.clone()).headers(ask.headers.clone());
        if hop.takes_secrets {
            request = request.headers(ask.secrets.clone());
        }
        let response =
            request.header(ACCEPT_ENCODING, "identity").send().await.map_err(|error| classify(&error, &place(url)))?;
        match response.headers().get(CONTENT_ENCODING).map(HeaderValue::as_bytes) {
            None | Some(b"" | b"identity") => Ok(response),
            Some(_) => Err(SourceError::retryable("the source sent an encoded body, though none was accepted")),
        }
    }
}

impl Reply {
    /// The body as exactly `bytes - offset` bytes, if the answer promises to start at `offset` of `bytes`.
    pub(super) fn into_stream(self, offset: u64, bytes: u64, pace: Pace) -> Result<ByteStream, SourceError> {
        let (status, headers) = (self.response.status(), self.response.headers());
        let place = place(self.response.url());
        let is_right = match status {
            StatusCode::OK => offset == 0,
            StatusCode::PARTIAL_CONTENT => {
                let range = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
                range == format!("bytes {offset}-{}/{bytes}", bytes.saturating_sub(1))
            }
            _ => return Err(status_error(status, headers).at(&place)),
        };
        let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()).map(str::parse::<u64>);
        if !is_right || offset > bytes || length.is_some_and(|length| length != Ok(bytes - offset)) {
            return Err(changed().at(&place));
        }
        let from = place.clone();
        let body = self.response.bytes_stream().map(move |chunk| chunk.map_err(|error| classify(&error, &from)));
        Ok(paced(body.boxed(), bytes - offset, pace).map_err(move |error| error.at(&place)).boxed())
    }
}

/// The file is not the one that was resolved, or cannot be read from there.
pub(super) fn changed() -> SourceError {
    SourceError::retryable("the file has changed at its source, or the source cannot start in the middle of it")
}

fn refused(place: &str, address: IpAddr) -> SourceError {
    let error = SourceError::permanent(
        "source_forbidden",
        "the host has an address that this server does not connect to; an operator can open private networks with \
         --adapter-http-networks",
    );
    error.with_detail(|_| match Guard::may_be_opened(address) {
        true => format!(
            "{place} has the private address {address}; --adapter-http-networks {address}/{} would allow it",
            if address.is_ipv4() { 32 } else { 128 }
        ),
        false => format!("{place} has the address {address}, to which this server never connects"),
    })
}

/// What a status other than success means.
pub(super) fn status_error(status: StatusCode, headers: &HeaderMap) -> SourceError {
    match status.as_u16() {
        408 | 425 | 429 | 500..=599 => SourceError::Retryable {
            message: format!("the source answered with status {}", status.as_u16()),
            retry_after: retry_after(headers),
            detail: None,
        },
        412 | 416 => changed(),
        400..=499 => SourceError::Absent,
        code => SourceError::retryable(format!("the source answered with status {code}")),
    }
}

/// `Retry-After` in seconds, or the `t` of a `RateLimit` header; at most an hour.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let seconds = text("retry-after").and_then(|value| value.trim().parse::<u64>().ok()).or_else(|| {
        text("ratelimit")?.split([';', ',']).find_map(|part| part.trim().strip_prefix("t=")?.parse::<u64>().ok())
    })?;
    Some(Duration::from_secs(seconds.min(3600)))
}

/// Where a redirect points to: another `http(s)` URL without a user.
fn redirect_target(from: &Url, response: &Response) -> Result<Url, SourceError> {
    let bad = || SourceError::retryable("the source redirects to what is no plain URL");
    let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok()).ok_or_else(bad)?;
    // A backslash is a slash to this parser and a letter to others.
    if !location.bytes().all(|b| b.is_ascii_graphic()) || location.contains('\\') {
        return Err(bad());
    }
    let mut url = from.join(location).map_err(|_| bad())?;
    url.set_fragment(None);
    let is_plain = matches!(url.scheme(), "http" | "https") && url.username().is_empty() && url.password().is_none();
    if is_plain { Ok(url) } else { Err(bad()) }
}

/// True if both have the same scheme, host and port.
pub(super) fn is_same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host_str() == b.host_str() && a.port_or_known_default() == b.port_or_known_default()
}

/// By type, never by text. `at` is the place that was asked, for operators.
pub(super) fn classify(error: &(dyn Error + 'static), at: &str) -> SourceError {
    let mut source = Some(error);
    while let Some(inner) = source {
        if let Some(Refused(address)) = inner.downcast_ref() {
            return refused(at, *address);
        }
        source = inner.source();
    }
    let message = match error.downcast_ref::<reqwest::Error>() {
        Some(error) if error.is_timeout() => "the source did not answer in time",
        Some(error) if error.is_connect() => "the source cannot be reached",
        _ => "the connection to the source broke",
    };
    SourceError::retryable(message).with_detail(|_| format!("{at}: {}", cause(error)))
}

/// An address of the name is not allowed.
#[derive(Debug, thiserror::Error)]
#[error("address not allowed")]
struct Refused(IpAddr);

/// The name has no addresses, or nobody could say.
#[derive(Debug, thiserror::Error)]
#[error("name not resolved")]
pub(super) struct Unresolved;

/// Gives a name's addresses. With a guard, only if all of them are allowed: which of them a connection takes is up to the one
/// who answers.
struct CheckedNames {
    guard: Option<Guard>,
    lookup: Lookup,
}

impl Resolve for CheckedNames {
    fn resolve(&self, name: Name) -> Resolving {
        let (guard, found) = (self.guard.clone(), (self.lookup)(name.as_str().to_owned()));
        Box::pin(async move {
            let addresses = found.await.map_err(|_| Unresolved)?;
            if let Some(guard) = guard
                && let Some(address) = addresses.iter().find(|address| !guard.allows(**address))
            {
                return Err(Refused(*address).into());
            }
            Ok(Box::new(addresses.into_iter().map(|address| SocketAddr::new(address, 0))) as Addrs)
        })
    }
}

fn system_lookup() -> Lookup {
    Arc::new(|host| Box::pin(look_up(host)))
}

async fn look_up(host: String) -> io::Result<Vec<IpAddr>> {
    Ok(tokio::net::lookup_host((host.as_str(), 0)).await?.map(|address| address.ip()).collect())
}

fn client(names: CheckedNames) -> Result<Client, SourceError> {
    let builder = Client::builder()
        .user_agent(AGENT)
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .no_gzip()
        .no_brotli()
        .no_deflate()
        .no_zstd()
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
        .dns_resolver(names);
    // Fails where the machine has no certificate roots. Directories can be served without any.
    builder
        .build()
        .map_err(|_| SourceError::retryable("this machine has no usable TLS certificate roots (ca-certificates)"))
}
