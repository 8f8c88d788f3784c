//! The listener: every connection has a deadline for its head, a bound on its headers, and a way to be ended.
//!
//! Not `axum::serve`: that one keeps a connection with half a head open for ever.

use std::collections::HashMap;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Notify;
use tower::ServiceExt;

use super::App;
use super::activity::{Activity, TrackedBody, TrackedIo};
use super::auth::Peer;
use super::config::HttpLimits;
use super::rate::network_of;

/// Streams of one HTTP/2 connection.
const H2_STREAMS_MAX: u32 = 128;
/// Streams an HTTP/2 client may reset before its connection is closed ("rapid reset").
const H2_RESETS_MAX: usize = 64;
/// After running requests were told to end, how long their last bytes may take.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// The same for those who connected meanwhile: their answers are ready at once.
const LATE_WORDS: Duration = Duration::from_millis(200);
/// Pause after `accept` failed (out of file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Ends the connection that carries a request.
#[derive(Clone)]
pub(crate) struct ConnectionAbort(Arc<Notify>);

impl ConnectionAbort {
    pub(crate) fn abort(&self) {
        self.0.notify_one();
    }
}

/// Serves `app` until `shutdown` resolves, then drains: not ready at once, new requests get 503, running ones go on up to
/// the drain timeout and then end with an error.
///
/// # Errors
/// The listener's address cannot be read.
pub async fn serve(listener: TcpListener, app: App, shutdown: impl Future<Output = ()>) -> std::io::Result<()> {
    tracing::info!(address = %listener.local_addr()?, "listening");
    app.engine.carry_events_here();
    app.preload();
    app.record();
    app.observer.start();
    let server = Server { app: app.clone(), router: app.router(), open: Arc::default() };
    let graceful = GracefulShutdown::new();
    let listener = Listener::Tcp(listener);
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            () = app.stop_asked() => break,
            () = server.accept(&listener, &graceful) => {}
        }
    }
    server.drain(&listener, graceful).await;
    app.observer.flush().await;
    Ok(())
}

/// Serves the operator's own routes until it is dropped: also while [`serve`] drains.
pub async fn serve_admin(listener: Listener, app: App) {
    let server = Server { router: app.admin_router(), app, open: Arc::default() };
    let graceful = GracefulShutdown::new();
    loop {
        server.accept(&listener, &graceful).await;
    }
}

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    /// An address.
    Tcp(TcpListener),
    /// A socket file.
    Unix(UnixListener),
}

struct Server {
    app: App,
    router: axum::Router,
    open: Arc<OpenConnections>,
}

impl Server {
    /// Waits for running requests. Who connects meanwhile is told why it is not served, which says more than a refused
    /// connection.
    async fn drain(&self, listener: &Listener, graceful: GracefulShutdown) {
        self.app.begin_drain();
        let (count, limit) = (graceful.count(), self.app.config.drain_timeout);
        tracing::info!(connections = count, "draining for at most {} s", limit.as_secs());
        let late = GracefulShutdown::new();
        let turn_away = async {
            loop {
                self.accept(listener, &late).await;
            }
        };
        let done = async {
            let done = graceful.shutdown();
            tokio::pin!(done);
            if tokio::time::timeout(limit, &mut done).await.is_err() {
                tracing::warn!("the drain timeout passed; requests that still run end with an error");
                self.app.end_requests();
                let _ = tokio::time::timeout(LAST_WORDS, done).await;
            }
        };
        tokio::select! {
            () = done => {}
            never = turn_away => never,
        }
        let _ = tokio::time::timeout(LATE_WORDS, late.shutdown()).await;
    }

    /// Takes one connection, or waits a little where none can be taken.
    async fn accept(&self, listener: &Listener, graceful: &GracefulShutdown) {
        let failed = match listener {
            Listener::Tcp(listener) => match listener.accept().await {
                Ok((stream, peer)) => {
                    let _ = stream.set_nodelay(true); // tokens are small and late ones are what a reader notices
                    return self.connection(stream, Some(peer.ip()), graceful);
                }
                Err(error) => error,
            },
            Listener::Unix(listener) => match listener.accept().await {
                Ok((stream, _)) => return self.connection(stream, None, graceful),
                Err(error) => error,
            },
        };
        tracing::warn!("accept failed: {failed}");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }

    /// `peer` is `None` on a socket file.
    fn connection<S>(&self, stream: S, peer: Option<IpAddr>, graceful: &GracefulShutdown)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let limits = self.app.config.limits;
        let address = peer.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let Some(permit) = OpenConnections::admit(&self.open, address, &limits) else { return };
        let abort = ConnectionAbort(Arc::new(Notify::new()));
        let activity = Activity::new();
        let (router, handle, begun) = (self.router.clone(), abort.clone(), activity.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            let running = begun.begin();
            if let Some(peer) = peer {
                request.extensions_mut().insert(Peer(peer));
            }
            if request.version() < axum::http::Version::HTTP_2 {
                request.extensions_mut().insert(handle.clone()); // on HTTP/2 it would end other streams too
            }
            let response = router.clone().oneshot(request.map(Body::new));
            async move { response.await.map(|response| response.map(|body| TrackedBody { body, _running: running })) }
        });
        let io = TrackedIo::new(stream, activity.clone());
        let connection = builder(&limits).serve_connection(TokioIo::new(io), service).into_owned();
        // A task of its own: what ends a connection from outside is not looked at for each token.
        let mut connection = tokio::spawn(graceful.watch(connection));
        tokio::spawn(async move {
            let reason = tokio::select! {
                result = &mut connection => {
                    if let Ok(Err(error)) = result {
                        tracing::debug!(%address, "connection ended: {error}");
                    }
                    return drop(permit);
                }
                () = abort.0.notified() => "its client does not read",
                () = activity.expired(&limits) => "no whole request in time",
            };
            tracing::debug!(%address, "connection ended: {reason}");
            connection.abort();
            let _ = connection.await; // its place is taken until it is gone
            drop(permit);
        });
    }
}

fn builder(limits: &HttpLimits) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle_timeout) // also runs between requests; see `activity`
        .keep_alive(true)
        // Twice the limit, so that our own refusal with its body comes first.
        .max_headers(limits.headers_max * 2)
        .max_buf_size((limits.header_bytes * 2).max(8192));
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS_MAX)
        .max_pending_accept_reset_streams(H2_RESETS_MAX)
        .max_local_error_reset_streams(H2_RESETS_MAX)
        .max_header_list_size(u32::try_from(limits.header_bytes * 2).unwrap_or(u32::MAX))
        .keep_alive_interval(limits.idle_timeout / 2)
        .keep_alive_timeout(limits.idle_timeout / 2);
    builder
}

/// Counts open connections, in all and by network: one host may have as many IPv6 addresses as it likes.
#[derive(Default)]
struct OpenConnections {
    by_address: Mutex<(usize, HashMap<IpAddr, usize>)>,
}

/// One open connection.
struct Permit {
    open: Arc<OpenConnections>,
    peer: IpAddr,
}

impl OpenConnections {
    fn admit(open: &Arc<Self>, peer: IpAddr, limits: &HttpLimits) -> Option<Permit> {
        let peer = network_of(peer);
        let mut guard = open.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let (total, by_address) = &mut *guard;
        let from_here = by_address.get(&peer).copied().unwrap_or(0);
        if *total >= limits.connections_max || from_here >= limits.connections_per_address_max {
            return None;
        }
        *total += 1;
        by_address.insert(peer, from_here + 1);
        Some(Permit { open: Arc::clone(open), peer })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut guard = self.open.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let (total, by_address) = &mut *guard;
        *total -= 1;
        match by_address.get_mut(&self.peer) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                by_address.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_with_a_whole_network_has_the_places_of_one() {
        let limits = HttpLimits { connections_per_address_max: 2, ..HttpLimits::default() };
        let open = Arc::<OpenConnections>::default();
        let admit = |peer: &str| OpenConnections::admit(&open, peer.parse().unwrap(), &limits);
        let held = [admit("2001:db8::1"), admit("2001:db8::2")];
        assert!(held.iter().all(Option::is_some) && admit("2001:db8::3").is_none());
        assert!(admit("2001:db8:0:1::1").is_some(), "another network");
        drop(held);
        assert!(admit("2001:db8::3").is_some());
        assert!(open.by_address.lock().unwrap().1.is_empty(), "places are given back under the same name");
    }
}
