//! Why a connection did not come about, in words for operators: by the types in an error's chain, never by its texts.

use std::error::Error;
use std::io;

use rustls::CertificateError;
use url::Url;

use super::net::Unresolved;

/// Scheme, host and port: what an operator may read of a URL. Its path and query may be signed.
pub(super) fn place(url: &Url) -> String {
    url.origin().ascii_serialization()
}

/// What went wrong between this machine and the other one.
pub(super) fn cause(error: &(dyn Error + 'static)) -> &'static str {
    let mut text = "the connection broke";
    let mut source = Some(error);
    while let Some(inner) = source {
        if let Some(error) = inner.downcast_ref::<reqwest::Error>() {
            match (error.is_connect(), error.is_timeout()) {
                (true, true) => return "no connection in time",
                (false, true) => return "no answer in time",
                (true, false) => text = "no connection",
                (false, false) => {}
            }
        } else if inner.is::<Unresolved>() {
            return "DNS: no such host, or no name server answers";
        } else if let Some(error) = inner.downcast_ref::<rustls::Error>() {
            return of_tls(error);
        } else if let Some(error) = inner.downcast_ref::<io::Error>()
            && let Some(known) = of_io(error)
        {
            return known;
        }
        source = inner.source();
    }
    text
}

fn of_io(error: &io::Error) -> Option<&'static str> {
    // The error inside is no source of it, but what it stands for.
    if let Some(inner) = error.get_ref() {
        if let Some(tls) = inner.downcast_ref::<rustls::Error>() {
            return Some(of_tls(tls));
        }
        if let Some(inner) = inner.downcast_ref::<io::Error>() {
            return of_io(inner);
        }
    }
    Some(match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused",
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe => {
            "the other side reset the connection"
        }
        io::ErrorKind::UnexpectedEof => "the other side closed the connection early",
        io::ErrorKind::HostUnreachable => "no route to the host",
        io::ErrorKind::NetworkUnreachable => "network unreachable",
        io::ErrorKind::TimedOut => "no connection in time",
        _ => return None,
    })
}

fn of_tls(error: &rustls::Error) -> &'static str {
    use CertificateError as Bad;
    match error {
        rustls::Error::InvalidCertificate(Bad::UnknownIssuer) => {
            "TLS: its certificate is not signed by an authority that this machine trusts"
        }
        rustls::Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => {
            "TLS: its certificate has expired"
        }
        rustls::Error::InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }) => {
            "TLS: its certificate is not valid yet; is this machine's clock right?"
        }
        rustls::Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => {
            "TLS: its certificate is for another name"
        }
        rustls::Error::InvalidCertificate(_) => "TLS: its certificate is not accepted",
        _ => "TLS: the handshake failed; does this port speak TLS?",
    }
}

#[cfg(test)]
#[path = "cause_tests.rs"]
mod tests;
