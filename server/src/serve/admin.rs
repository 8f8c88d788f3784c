//! The operator's listener.

use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, anyhow};
use loramux_router::http;

use crate::config::{AdminListen, Config};

/// Where it listens if nobody says.
const DEFAULT: &str = "127.0.0.1:8001";

/// A listener that is bound and not served yet.
pub(super) struct Bound {
    socket: Socket,
    /// As people write it.
    pub(super) address: String,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Bound {
    /// For the runtime that this is called in.
    pub(super) fn listener(self) -> std::io::Result<http::Listener> {
        Ok(match self.socket {
            Socket::Tcp(listener) => http::Listener::Tcp(tokio::net::TcpListener::from_std(listener)?),
            Socket::Unix(listener) => http::Listener::Unix(tokio::net::UnixListener::from_std(listener)?),
        })
    }
}

/// Binds. The default address may be taken: another server of this machine has it then.
pub(super) fn bind(config: &Config) -> anyhow::Result<Option<Bound>> {
    match &config.admin {
        AdminListen::Off => Ok(None),
        AdminListen::Address(address) => tcp(address).map(Some).with_context(|| format!("--admin-listen {address}")),
        AdminListen::Unix(path) => {
            unix(path).map(Some).with_context(|| format!("--admin-listen unix:{}", path.display()))
        }
        AdminListen::Default => match tcp(DEFAULT) {
            Ok(bound) => Ok(Some(bound)),
            Err(error) => {
                tracing::info!(
                    "the admin API does not listen at {DEFAULT} ({error}); choose --admin-listen if you need it"
                );
                Ok(None)
            }
        },
    }
}

fn tcp(address: &str) -> anyhow::Result<Bound> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = format!("http://{}", listener.local_addr()?);
    Ok(Bound { socket: Socket::Tcp(listener), address })
}

/// A socket file that only its owner may use. One that nobody listens at any more is replaced.
fn unix(path: &Path) -> anyhow::Result<Bound> {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    if is_socket {
        if UnixStream::connect(path).is_ok() {
            return Err(anyhow!("another server listens there"));
        }
        std::fs::remove_file(path)?;
    }
    // Bound beside its place and moved there: nobody else may connect at any moment.
    let own = path.with_extension(format!("{}.private", std::process::id()));
    std::fs::DirBuilder::new().mode(0o700).create(&own)?;
    let inner = own.join("socket");
    let listener = UnixListener::bind(&inner).and_then(|listener| {
        std::fs::set_permissions(&inner, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&inner, path)?;
        Ok(listener)
    });
    let _ = std::fs::remove_dir_all(&own);
    let listener = listener?;
    listener.set_nonblocking(true)?;
    Ok(Bound { socket: Socket::Unix(listener), address: format!("unix:{}", path.display()) })
}
