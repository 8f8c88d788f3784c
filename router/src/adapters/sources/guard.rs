//! Which hosts and addresses this server connects to on somebody's word.
//!
//! There is one URL parser, and a URL must be spelled as that parser would print its host: `http://2130706433/`, `0x7f.1`,
//! `①27.0.0.1` or `host\@other` have no reading that two parsers could disagree about, because they are refused. Names are
//! resolved once, every address is checked, and the connection goes to exactly those addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use url::{Host, Url};

/// Never reached, whatever the operator opens: cloud metadata services, link-local, multicast, and what is no address of a host.
const NEVER_V4: [(Ipv4Addr, u8); 7] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(255, 255, 255, 255), 32),
    (Ipv4Addr::new(100, 100, 100, 200), 32), // metadata of Alibaba Cloud, inside the shared address space
    (Ipv4Addr::new(168, 63, 129, 16), 32),   // Azure's wire server, a public address
    (Ipv4Addr::new(192, 0, 0, 192), 32),     // metadata of Oracle Cloud
];

/// Denied unless the operator opens them.
const DENIED_V4: [(Ipv4Addr, u8); 14] = [
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 31, 196, 0), 24),
    (Ipv4Addr::new(192, 52, 193, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];

const NEVER_V6: [(Ipv6Addr, u8); 5] = [
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
    (Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0), 10),
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
    (Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0), 32), // metadata of EC2
    (Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254), 128), // metadata of Google Cloud
];

/// Global unicast is 2000::/3; of that, what is translated, tunnelled or for documents.
const DENIED_V6: [(Ipv6Addr, u8); 5] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23), // IETF protocols, Teredo among them
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16), // 6to4
    (Ipv6Addr::new(0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0), 48),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

const GLOBAL_UNICAST_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
/// NAT64's well-known prefix: the last 32 bits are the IPv4 address that is really reached.
const NAT64: (Ipv6Addr, u8) = (Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);

/// Which addresses may be connected to.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    /// Networks that the operator opened beside the public ones.
    open: Vec<IpNet>,
}

impl Guard {
    /// Public addresses, and those of `open`.
    pub fn new(open: Vec<IpNet>) -> Self {
        Self { open }
    }

    /// True if a connection to `address` is allowed.
    pub fn allows(&self, address: IpAddr) -> bool {
        let address = reached(address);
        if is_never(address) {
            return false;
        }
        self.open.iter().any(|net| net.contains(&address)) || is_public(address)
    }
}

impl Guard {
    /// True if an operator's `--adapter-http-networks` can open the address.
    pub(super) fn may_be_opened(address: IpAddr) -> bool {
        !is_never(reached(address))
    }
}

/// The address that packets to `address` end up at, as far as its bits say.
fn reached(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    if let Some(v4) = v6.to_ipv4_mapped() {
        return IpAddr::V4(v4);
    }
    if in_v6(v6, NAT64) {
        let [.., a, b, c, d] = v6.octets();
        return IpAddr::V4(Ipv4Addr::new(a, b, c, d));
    }
    address
}

fn is_never(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => NEVER_V4.iter().any(|net| in_v4(v4, *net)),
        IpAddr::V6(v6) => v6.is_unspecified() || NEVER_V6.iter().any(|net| in_v6(v6, *net)),
    }
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !DENIED_V4.iter().any(|net| in_v4(v4, *net)),
        IpAddr::V6(v6) => in_v6(v6, GLOBAL_UNICAST_V6) && !DENIED_V6.iter().any(|net| in_v6(v6, *net)),
    }
}

fn in_v4(address: Ipv4Addr, (net, prefix_len): (Ipv4Addr, u8)) -> bool {
    Ipv4Net::new_assert(net, prefix_len).contains(&address)
}

fn in_v6(address: Ipv6Addr, (net, prefix_len): (Ipv6Addr, u8)) -> bool {
    Ipv6Net::new_assert(net, prefix_len).contains(&address)
}

/// Reads an `http` or `https` URL that names a host and a path and nothing else.
///
/// # Errors
/// What is wrong, in words; never the text.
pub fn parse_url(text: &str) -> Result<Url, &'static str> {
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("a URL is visible ASCII; write other characters percent-encoded and hosts in their `xn--` form");
    }
    if text.contains(['\\', '?', '#', '@']) {
        return Err("a URL has no user, password, query, fragment or backslash here");
    }
    let Some((scheme @ ("http" | "https"), rest)) = text.split_once("://") else {
        return Err("a URL starts with `https://` or `http://`");
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    check_path(path)?;
    let url = Url::parse(text).map_err(|_| "this is no URL")?;
    let spelled = match url.port() {
        Some(port) => format!("{}:{port}", url.host_str().unwrap_or_default()),
        None => url.host_str().unwrap_or_default().to_owned(),
    };
    let default_port = if scheme == "https" { ":443" } else { ":80" };
    if spelled.is_empty() || authority.strip_suffix(default_port).unwrap_or(authority) != spelled {
        return Err(
            "a host is written as a lower-case name, an IPv4 address of four decimal numbers or a short `[IPv6]` address",
        );
    }
    if let Some(Host::Domain(name)) = url.host()
        && !is_plain_name(name)
    {
        return Err("a host's name has letters, digits, `-`, `_` and single dots between them");
    }
    if url.path() != if path.is_empty() { "/" } else { path } {
        return Err("a URL's path is written without characters that need an encoding");
    }
    Ok(url)
}

fn is_plain_name(name: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    name.split('.').all(|label| !label.is_empty() && label.bytes().all(is_plain))
}

/// A path whose parts mean themselves to every server: no dots, no empty parts, nothing that decodes to a separator.
fn check_path(path: &str) -> Result<(), &'static str> {
    let is_plain = |part: &str| {
        let lower = part.to_ascii_lowercase();
        !matches!(part, "" | "." | "..")
            && !["%2e", "%2f", "%5c", "%25", "%0", "%1", "%7f"].iter().any(|code| lower.contains(code))
    };
    match path.strip_prefix('/') {
        None | Some("") => Ok(()),
        Some(rest) if rest.split('/').all(is_plain) => Ok(()),
        Some(_) => {
            Err("a URL's path has no empty, `.` or `..` parts and no encoded dots, slashes, percents or controls")
        }
    }
}

/// Hosts that the operator listed: `host`, `host:port`, `*.domain`, each with `https://` or `http://` in front or not.
///
/// Without a scheme, `https` is meant; without a port, its usual one.
#[derive(Clone, Debug, Default)]
pub struct HostList {
    entries: Vec<HostEntry>,
}

#[derive(Clone, Debug)]
struct HostEntry {
    is_https: bool,
    host: String,
    port: u16,
    /// `*.` stood in front: any name below `host`.
    is_below: bool,
}

impl HostList {
    /// Reads the operator's entries.
    ///
    /// # Errors
    /// The entry that is none, and why.
    pub fn parse<S: AsRef<str>>(entries: &[S]) -> Result<Self, (String, &'static str)> {
        let read = |entry: &S| {
            let entry = entry.as_ref();
            HostEntry::parse(entry).map_err(|reason| (entry.to_owned(), reason))
        };
        Ok(Self { entries: entries.iter().map(read).collect::<Result<_, _>>()? })
    }

    /// True if no host is listed.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// True if the URL's scheme, host and port are listed.
    pub fn allows(&self, url: &Url) -> bool {
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else { return false };
        let is_https = url.scheme() == "https";
        self.entries.iter().any(|entry| {
            let below = || host.strip_suffix(&entry.host).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'));
            entry.is_https == is_https
                && entry.port == port
                && if entry.is_below { below() } else { entry.host == host }
        })
    }
}

impl HostEntry {
    fn parse(entry: &str) -> Result<Self, &'static str> {
        let (is_https, rest) = match entry.split_once("://") {
            Some(("https", rest)) => (true, rest),
            Some(("http", rest)) => (false, rest),
            Some(_) => return Err("a host is listed as `host`, `https://host` or `http://host`"),
            None => (true, entry),
        };
        let (is_below, rest) = match rest.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, rest),
        };
        if rest.contains('/') {
            return Err("a host is listed without a path");
        }
        let scheme = if is_https { "https" } else { "http" };
        let url = parse_url(&format!("{scheme}://{rest}"))?;
        if is_below && !matches!(url.host(), Some(Host::Domain(_))) {
            return Err("`*.` goes in front of a name");
        }
        let host = url.host_str().ok_or("a host is listed with its name")?.to_owned();
        let port = url.port_or_known_default().ok_or("a host is listed with its port")?;
        Ok(Self { is_https, host, port, is_below })
    }
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
