//! Who asks, and whether they may: one layer over the whole router, default deny, decided on the matched route.

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use secrecy::SecretString;

use super::error::{ApiError, Cause};
use super::keys::{Key, KeyRing};
use super::rate::Meter;
use super::{App, anthropic};
use crate::access::Caller;
use crate::observe::RequestRecord;

/// Routes that need no key. Every other one does, unknown ones included.
const OPEN: &[&str] = &[
    "/",
    "/docs",
    "/docs/docs.css",
    "/docs/docs.js",
    "/console",
    "/console/{file}",
    "/health",
    "/health/live",
    "/health/ready",
    "/health/startup",
    "/startup",
    "/ping",
];
/// Open too, as long as no key is set for it.
const METRICS: &str = "/metrics";
/// Routes that load and unload adapters for other servers' clients.
const RUNTIME: &[&str] =
    &["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"];
/// What a trusted peer of this machine may call without a key.
const LOOPBACK: &[&str] = &["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"];
/// Routes of the main port that the console's playground needs on the operator's listener too, by the same keys.
const PLAYGROUND: &[&str] = &["/v1/models", "/v1/completions", "/v1/chat/completions"];
/// Where the admin API begins.
const ADMIN: &str = "/admin/v1";
/// What the operator set, shown like the admin API.
const SERVER_INFO: &str = "/server_info";
/// What most routes want.
const API_KEY: &str = "a valid API key";
/// Bytes of a caller's own token for an adapter's source.
const TOKEN_BYTES_MAX: usize = 4096;
/// A header with such a token.
const TOKEN_HEADER: &str = "x-adapter-token";

/// Which listener a request came in by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The one that clients use.
    Main,
    /// The operator's own.
    Admin,
}

/// The other end of the connection; absent on a Unix socket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// The caller's own token for an adapter's source, if it sent one in a header.
#[derive(Clone, Debug, Default)]
pub(crate) struct UpstreamToken(pub(crate) Option<SecretString>);

/// What the caller's key has used; absent without a key.
#[derive(Clone, Debug)]
pub(crate) struct Metered(pub(crate) Arc<Meter>);

/// What a route asks of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Open,
    /// Open unless the operator set a key for it.
    Metrics,
    Keyed,
    Runtime,
    Admin,
}

impl Class {
    fn of(path: &str, method: &Method) -> Self {
        let generates = path == "/" && method == Method::POST;
        if path == METRICS {
            Self::Metrics
        } else if OPEN.contains(&path) && !generates {
            Self::Open
        } else if RUNTIME.contains(&path) {
            Self::Runtime
        } else if path == SERVER_INFO
            || path.strip_prefix(ADMIN).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        {
            Self::Admin
        } else {
            Self::Keyed
        }
    }
}

/// The layer.
pub(crate) async fn authenticate(
    State((app, side)): State<(App, Side)>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let path = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str).to_owned();
    let ring = app.key_ring();
    let visit = Visit {
        app: &app,
        ring: &ring,
        path: &path,
        peer: request.extensions().get::<Peer>().map(|peer| peer.0),
        bearer: bearer(request.headers()).or_else(|| anthropic_key(&request)),
        headers: request.headers(),
        target: request.uri().authority().map(|name| name.as_str()),
    };
    let (caller, meter) = visit.caller(Class::of(&path, request.method()), side)?;
    let token = visit.upstream_token()?;
    let counted = meter.filter(|_| request.method() == Method::POST);
    let permit = counted.as_ref().map(|meter| meter.admit()).transpose()?;
    let extensions = request.extensions_mut();
    if let Some(record) = extensions.get::<Arc<RequestRecord>>() {
        record.asked_by(&caller.name);
    }
    extensions.insert(side);
    extensions.insert(caller);
    extensions.insert(UpstreamToken(token));
    if let Some(meter) = counted {
        extensions.insert(Metered(meter));
    }
    let response = next.run(request).await;
    Ok(match permit {
        Some(permit) => response.map(|body: Body| permit.hold(body)),
        None => response,
    })
}

/// The text behind `Authorization: Bearer`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// Anthropic's clients send their key in a header of its own. It counts on their routes and below, found or not; what the
/// key then opens is decided on the matched route, as for every other key.
fn anthropic_key(request: &Request) -> Option<&[u8]> {
    anthropic::is_here(request.uri().path()).then(|| anthropic::key(request.headers())).flatten()
}

/// What is known of a request before its handler.
struct Visit<'a> {
    app: &'a App,
    ring: &'a KeyRing,
    path: &'a str,
    peer: Option<IpAddr>,
    bearer: Option<&'a [u8]>,
    headers: &'a HeaderMap,
    /// The name in the request's target: HTTP/2 has it in place of the `Host` header.
    target: Option<&'a str>,
}

type Admitted = (Caller, Option<Arc<Meter>>);

impl Visit<'_> {
    fn caller(&self, class: Class, side: Side) -> Result<Admitted, ApiError> {
        match (class, side) {
            (Class::Open, _) => Ok((Caller::default(), None)),
            (Class::Metrics, _) if self.app.metrics_keys.has_keys => self.metrics(),
            (Class::Metrics, Side::Main) => Ok((Caller::default(), None)),
            (Class::Metrics, Side::Admin) => self.no_other_page().map(|()| (Caller::default(), None)),
            (Class::Keyed, Side::Admin) if PLAYGROUND.contains(&self.path) => {
                self.no_other_page()?;
                self.keyed()
            }
            (_, Side::Admin) => self.admin_listener(),
            (Class::Admin, Side::Main) if self.ring.has_admin => self.admin(),
            (Class::Runtime, Side::Main) => self.runtime(),
            // Without an admin key these routes do not exist here.
            (Class::Admin, Side::Main) => self.keyed().and(Err(super::service::unknown_route(self.path))),
            (Class::Keyed, Side::Main) => self.keyed(),
        }
    }

    fn key(&self) -> Option<&Key> {
        self.bearer.and_then(|typed| self.ring.find(typed))
    }

    /// The key, or why there is none.
    fn any_key(&self, which: &str) -> Result<&Key, ApiError> {
        self.key().ok_or_else(|| self.no_key(which))
    }

    fn no_key(&self, which: &str) -> ApiError {
        // A request without any key is no guess.
        let limited = self.peer.filter(|_| self.bearer.is_some()).map(|peer| self.app.wrong_keys.count(peer));
        match limited {
            Some(Err(wait)) => {
                let message = "too many requests with a wrong API key came from this address";
                ApiError::new(Cause::RateLimited, message).after(Some(wait))
            }
            _ => ApiError::new(Cause::InvalidApiKey, format!("{which} is required: {}", self.how_to_send())),
        }
    }

    /// How a key is sent here, and what was wrong with the way it was.
    fn how_to_send(&self) -> &'static str {
        let has = |name: &str| self.bearer.is_none() && self.headers.contains_key(name);
        if anthropic::is_here(self.path) {
            "`x-api-key: <key>` or `Authorization: Bearer <key>`"
        } else if has("authorization") {
            "`Authorization: Bearer <key>`; the header that was sent does not begin with `Bearer `"
        } else if has("x-api-key") || has("api-key") {
            "`Authorization: Bearer <key>`; `x-api-key` counts on /v1/messages only"
        } else {
            "`Authorization: Bearer <key>`"
        }
    }

    /// The key for `/metrics` opens nothing else, so scrapers can hold it.
    fn metrics(&self) -> Result<Admitted, ApiError> {
        let is_metrics_key = self.bearer.is_some_and(|typed| self.app.metrics_keys.find(typed).is_some());
        if is_metrics_key || self.key().is_some_and(|key| key.caller.is_admin) {
            return Ok((Caller::default(), None));
        }
        Err(self.no_key("a metrics key (--metrics-key) or an admin key"))
    }

    fn keyed(&self) -> Result<Admitted, ApiError> {
        if !self.ring.has_keys || (LOOPBACK.contains(&self.path) && self.is_trusted_peer() && self.key().is_none()) {
            return Ok((Caller::default(), None));
        }
        let key = self.any_key(API_KEY)?;
        if key.caller.is_admin {
            return Err(forbidden("an admin key opens the admin API only; send an API key here"));
        }
        Ok(admitted(key))
    }

    fn admin(&self) -> Result<Admitted, ApiError> {
        let key = self.any_key("a valid admin key (--admin-key)")?;
        if !key.caller.is_admin {
            return Err(forbidden("this route needs an admin key (--admin-key)"));
        }
        Ok(admitted(key))
    }

    /// Without an admin key, whoever reaches the operator's listener is the operator; but a page in their browser is not,
    /// unless it is the console that this listener serves.
    fn admin_listener(&self) -> Result<Admitted, ApiError> {
        if self.ring.has_admin {
            return self.admin();
        }
        self.no_other_page()?;
        Ok((Caller { is_admin: true, ..Caller::default() }, None))
    }

    /// Refuses what a web page sends that this listener did not serve.
    fn no_other_page(&self) -> Result<(), ApiError> {
        if (self.is_web_page() && !self.is_own_page()) || !self.names_this_machine() {
            return Err(forbidden("requests of web pages need an admin key (--admin-key)"));
        }
        Ok(())
    }

    /// With an admin key on this server, these routes are the admin's; else everybody's who has a key.
    fn runtime(&self) -> Result<Admitted, ApiError> {
        let enabled = self.app.config.allow_runtime_adapters || self.ring.has_admin;
        let trusted = LOOPBACK.contains(&self.path) && self.is_trusted_peer();
        let caller = match self.key() {
            Some(key) if key.caller.is_admin || !self.ring.has_admin => Ok(admitted(key)),
            _ if trusted => Ok((Caller::default(), None)),
            Some(_) => Err(forbidden("with an admin key on this server, loading adapters needs it (--admin-key)")),
            None if self.ring.has_admin || self.ring.has_keys => self.any_key(API_KEY).map(admitted),
            None if self.is_web_page() => Err(forbidden("web pages may not load adapters without a key")),
            None => Ok((Caller::default(), None)),
        }?;
        if !enabled {
            let message = "loading adapters over this port is off; start the server with --allow-runtime-adapters";
            return Err(ApiError::new(Cause::RuntimeAdaptersDisabled, message));
        }
        Ok(caller)
    }

    /// The socket's other end, never what a header says; but a page in a browser of this machine is not its program.
    fn is_trusted_peer(&self) -> bool {
        let is_local = self.peer.is_some_and(|peer| peer.to_canonical().is_loopback());
        self.app.config.trust_loopback_adapters && is_local && !self.is_web_page()
    }

    /// Browsers say so with every request that changes something.
    fn is_web_page(&self) -> bool {
        ["origin", "sec-fetch-site"].iter().any(|name| self.headers.contains_key(*name))
    }

    /// The page came from here, as its browser says: no page can write `Sec-Fetch-Site`, and the only pages of this origin
    /// are the console and the document's, which run no script of anybody else. Counts only where [`Self::names_this_machine`] is asked as well.
    fn is_own_page(&self) -> bool {
        let text = |name| self.headers.get(name).map(|value| value.to_str().unwrap_or(""));
        let from_here = match (text("origin"), text("host")) {
            (None, _) => true,
            (Some(origin), Some(host)) => ["http", "https"].iter().any(|scheme| origin == format!("{scheme}://{host}")),
            (Some(_), None) => false,
        };
        text("sec-fetch-site") == Some("same-origin") && from_here
    }

    /// A page whose name was made to mean this machine reads what its own origin answers, and says nothing of itself but the
    /// name. Refuses on top of the other rules; admits nobody.
    fn names_this_machine(&self) -> bool {
        let header = self.headers.get(header::HOST).map(|host| host.to_str().unwrap_or(""));
        [self.target, header].into_iter().flatten().all(is_this_machine)
    }

    /// The header's, or on an open server a bearer that looks like the hub's.
    fn upstream_token(&self) -> Result<Option<SecretString>, ApiError> {
        if let Some(value) = self.headers.get(TOKEN_HEADER) {
            return upstream_token(TOKEN_HEADER, &String::from_utf8_lossy(value.as_bytes()));
        }
        match self.bearer {
            Some(typed) if !self.ring.has_keys && self.key().is_none() && typed.starts_with(b"hf_") => {
                upstream_token("authorization", &String::from_utf8_lossy(typed))
            }
            _ => Ok(None),
        }
    }
}

/// True for `localhost` and addresses, with or without a port.
fn is_this_machine(host: &str) -> bool {
    let name = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
    let name = name.map_or(host, |(name, _)| name);
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

/// Checks a caller's own token, wherever it was sent. Empty means none.
///
/// # Errors
/// 400 without the value: too long, or not visible ASCII.
pub(crate) fn upstream_token(param: &str, token: &str) -> Result<Option<SecretString>, ApiError> {
    let token = token.trim();
    // Credentials of object stores are a JSON object, which may be laid out for people.
    let is_json = token.starts_with('{');
    let fits = |byte: u8| byte.is_ascii_graphic() || (is_json && byte.is_ascii_whitespace());
    if token.len() > TOKEN_BYTES_MAX || !token.bytes().all(fits) {
        let message = format!("`{param}` must be at most {TOKEN_BYTES_MAX} visible ASCII characters");
        return Err(ApiError::at(Cause::InvalidValue, param, message));
    }
    Ok((!token.is_empty()).then(|| SecretString::from(token)))
}

fn admitted(key: &Key) -> Admitted {
    (key.caller.clone(), Some(Arc::clone(&key.meter)))
}

fn forbidden(message: &str) -> ApiError {
    ApiError::new(Cause::RouteForbidden, message)
}
