//! A corpus of URLs and addresses with the decision each must get, and the guard against plain sets of networks.

use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;

use super::*;

/// Every way to write an IPv4 address that some parser reads.
fn spellings(address: [u8; 4]) -> Vec<String> {
    let [a, b, c, d] = address;
    let (number, low24, low16) =
        (u32::from_be_bytes(address), u32::from_be_bytes([0, b, c, d]), u16::from_be_bytes([c, d]));
    let mut all = vec![
        format!("{number}"),
        format!("{number:#x}"),
        format!("0{number:o}"),
        format!("{a}.{low24}"),
        format!("{a}.{b}.{low16}"),
        format!("{a:#x}.{b:#x}.{c:#x}.{d:#x}"),
        format!("0{a:o}.0{b:o}.0{c:o}.0{d:o}"),
        format!("{a:#x}.{low24}"),
        format!("0{a:o}.{b}.{low16:#x}"),
        format!("{a:03}.{b:03}.{c:03}.{d:03}"),
        format!("00{a}.{b}.{c}.{d}"),
        format!("{a}.{b}.{c}.{d}."),
        format!("{a}.{b}.{c}.{d}.."),
        format!("{a}。{b}。{c}。{d}"),
        format!("{a}．{b}．{c}．{d}"),
        format!("{a}%2e{b}%2e{c}%2e{d}"),
        format!("[::ffff:{a}.{b}.{c}.{d}]"),
        format!("[::{a}.{b}.{c}.{d}]"),
        format!("[0:0:0:0:0:ffff:{a:02x}{b:02x}:{c:02x}{d:02x}]"),
        format!("[::FFFF:{a:02x}{b:02x}:{c:02x}{d:02x}]"),
        format!("[64:ff9b::{a}.{b}.{c}.{d}]"),
        format!("[::ffff:{a}.{b}.{c}.{d}%25eth0]"),
        format!("{a}.{b}.{c}.{d}\\@example.com"),
        format!("example.com@{a}.{b}.{c}.{d}"),
        format!("user:pw@{a}.{b}.{c}.{d}"),
        format!("{a}.{b}.{c}.{d}#@example.com"),
        format!("{a}.{b}.{c}.{d}?@example.com"),
        format!("example.com\\.{a}.{b}.{c}.{d}"),
        format!("{a}.{b}.{c}.{d}\t"),
        format!(" {a}.{b}.{c}.{d}"),
        format!("{a}.{b}\n.{c}.{d}"),
        format!("{a}.{b}.{c}.{d}%00.example.com"),
    ];
    let circled = |n: u8| {
        n.to_string().bytes().map(|digit| char::from_u32(0xff10 + u32::from(digit - b'0')).unwrap()).collect::<String>()
    };
    all.push([a, b, c, d].map(circled).join("."));
    all.push(format!("{a}.{b}.{c}.{d}").replace('1', "①").replace('2', "②"));
    all
}

/// True if a request to `text` would be sent: parsed, listed, and no address in it is denied.
fn passes(text: &str, hosts: &HostList, guard: &Guard) -> bool {
    parse_url(text).is_ok_and(|url| {
        let literal = match url.host() {
            Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
            _ => None,
        };
        hosts.allows(&url) && literal.is_none_or(|address| guard.allows(address))
    })
}

#[test]
fn no_spelling_of_an_internal_address_passes_even_if_it_is_listed() {
    let internal = [
        [127, 0, 0, 1],
        [127, 1, 2, 3],
        [169, 254, 169, 254],
        [169, 254, 170, 2],
        [10, 0, 0, 1],
        [10, 255, 255, 254],
        [192, 168, 1, 1],
        [172, 16, 0, 1],
        [172, 31, 255, 255],
        [100, 64, 0, 1],
        [100, 100, 100, 200],
        [0, 0, 0, 0],
        [0, 1, 2, 3],
        [198, 18, 0, 1],
        [192, 0, 0, 192],
        [192, 0, 2, 1],
        [224, 0, 0, 1],
        [255, 255, 255, 255],
        [168, 63, 129, 16],
        [240, 0, 0, 1],
    ];
    let mut cases = 0;
    for address in internal {
        let plain = IpAddr::from(address).to_string();
        for host in spellings(address).into_iter().chain([plain]) {
            for (scheme, port, path) in
                [("https", "", "/a"), ("http", "", "/a"), ("http", ":8080", ""), ("HTTP", ":80", "/a")]
            {
                let text = format!("{scheme}://{host}{port}{path}");
                // The list is as open as it can be for this URL: only the guard and the parser stand.
                let listed = url::Url::parse(&text).ok().and_then(|url| {
                    let host = url.host_str()?.to_owned();
                    HostList::parse(&[format!("{}://{host}:{}", url.scheme(), url.port_or_known_default()?)]).ok()
                });
                assert!(!passes(&text, &listed.unwrap_or_default(), &Guard::default()), "{text:?}");
                cases += 1;
            }
        }
    }
    assert!(cases >= 2500, "{cases}");
}

#[test]
fn urls_with_two_readings_are_none() {
    for text in [
        "https://listed.example@evil.example/",
        "https://listed.example:443@evil.example/",
        "https://evil.example\\@listed.example/",
        "https://evil.example#@listed.example/",
        "https://evil.example?@listed.example/",
        "https:\\\\listed.example/",
        "https:listed.example/",
        "https:/listed.example/",
        "https:///listed.example/",
        "https://listed.example\u{ff0f}a/",
        "https://LISTED.example/",
        "https://listed.example./",
        "https://listed%2eexample/",
        "https://listed.example%00/",
        "https://l\u{131}sted.example/",
        "https://listed.example/a/../b",
        "https://listed.example/a/%2e%2e/b",
        "https://listed.example/a//b",
        "https://listed.example/%2f",
        "https://listed.example/a%5cb",
        "https://listed.example/a%00",
        "https://listed.example/a%0d%0aHost:x",
        "https://listed.example/%252e",
        "https://listed.example/a b",
        "https://listed.example/\u{e9}",
        "https://listed.example:99999/",
        "https://listed.example:/",
        "https://:443/",
        "https://listed.example:0443/",
        "ftp://listed.example/",
        "file:///etc/passwd",
        "gopher://listed.example/",
        "javascript:alert(1)",
        "https://[::1",
        "https://[::1]x/",
        "https://[fe80::1%eth0]/",
        "https://[0:0:0:0:0:0:0:1]/",
        "https://listed.example/\t",
        "\u{feff}https://listed.example/",
        " https://listed.example/",
        "https://listed.example/a?b=c",
        "https://listed.example/a#b",
        "",
        "https://",
        "//listed.example/",
    ] {
        assert!(parse_url(text).is_err(), "{text:?}");
    }
    for text in [
        "https://listed.example",
        "https://listed.example/",
        "https://listed.example:443/a",
        "http://1.2.3.4:8080/a/b",
        "https://xn--bcher-kva.example/a%20b",
        "https://[2606:4700::1111]/a",
    ] {
        assert!(parse_url(text).is_ok(), "{text:?}");
    }
}

#[test]
fn a_host_is_listed_with_its_scheme_and_port() {
    let hosts =
        HostList::parse(&["a.example", "https://b.example:8443", "http://127.0.0.1:9000", "*.c.example"]).unwrap();
    for (text, expected) in [
        ("https://a.example/x", true),
        ("https://a.example:443/x", true),
        ("http://a.example/x", false),
        ("https://a.example:8443/x", false),
        ("https://xa.example/x", false),
        ("https://a.example.evil/x", false),
        ("https://sub.a.example/x", false),
        ("https://b.example:8443/x", true),
        ("https://b.example/x", false),
        ("http://127.0.0.1:9000/x", true),
        ("https://127.0.0.1:9000/x", false),
        ("http://127.0.0.1:9001/x", false),
        ("https://d.c.example/x", true),
        ("https://e.d.c.example/x", true),
        ("https://c.example/x", false),
        ("https://xc.example/x", false),
        ("http://d.c.example/x", false),
    ] {
        assert_eq!(hosts.allows(&parse_url(text).unwrap()), expected, "{text}");
    }
    for entry in
        ["", "a.example/path", "ftp://a.example", "*.127.0.0.1", "user@a.example", "A.example", "*", "a.*.example"]
    {
        assert!(HostList::parse(&[entry]).is_err(), "{entry}");
    }
    assert!(HostList::default().is_empty() && !HostList::default().allows(&parse_url("https://a.example").unwrap()));
}

#[test]
fn an_operator_opens_private_networks_but_never_link_local_or_metadata() {
    let open = ["0.0.0.0/0", "::/0"].map(|net| net.parse().unwrap());
    let (closed, open) = (Guard::default(), Guard::new(open.to_vec()));
    for (address, by_default, opened) in [
        ("1.1.1.1", true, true),
        ("2606:4700::1111", true, true),
        ("127.0.0.1", false, true),
        ("10.0.0.1", false, true),
        ("::1", false, true),
        ("fd12::1", false, true),
        ("::ffff:10.0.0.1", false, true),
        ("64:ff9b::10.0.0.1", false, true),
        ("64:ff9b::1.1.1.1", true, true),
        ("64:ff9b:1::1.1.1.1", false, true),
        ("2002:7f00:1::", false, true),
        ("2001:0:1::", false, true),
        ("169.254.169.254", false, false),
        ("169.254.0.1", false, false),
        ("::ffff:169.254.169.254", false, false),
        ("64:ff9b::169.254.169.254", false, false),
        ("100.100.100.200", false, false),
        ("168.63.129.16", false, false),
        ("192.0.0.192", false, false),
        ("192.0.0.193", false, true),
        ("fd20:ce::254", false, false),
        ("fe80::1", false, false),
        ("fd00:ec2::254", false, false),
        ("ff02::1", false, false),
        ("224.0.0.1", false, false),
        ("0.0.0.0", false, false),
        ("::", false, false),
        ("255.255.255.255", false, false),
    ] {
        let ip = address.parse().unwrap();
        assert_eq!(closed.allows(ip), by_default, "{address}");
        assert_eq!(open.allows(ip), opened, "{address}, all networks opened");
    }
}

/// What the documents say, as sets: written apart from the guard's own tables.
fn denied_sets() -> Vec<IpNet> {
    [
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "168.63.129.16/32",
        "::/3",
        "4000::/2",
        "8000::/1",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "2620:4f:8000::/48",
        "3fff::/20",
    ]
    .map(|net| net.parse().unwrap())
    .to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50_000))]

    #[test]
    fn the_guard_agrees_with_the_sets(bits: u128, narrow in 0_u8..8) {
        // Most random addresses are public: half of the cases are pushed to the edges of the sets.
        let sets = denied_sets();
        let v4 = IpAddr::from(u32::try_from(bits & 0xffff_ffff).unwrap().to_be_bytes());
        let edge = &sets[usize::try_from(bits >> 64).unwrap() % sets.len()];
        let address = match narrow {
            0 | 1 => v4,
            2 => IpAddr::from(bits.to_be_bytes()),
            3 => edge.network(),
            4 => edge.broadcast(),
            5 => neighbour(edge.network(), false),
            6 => neighbour(edge.broadcast(), true),
            _ => IpAddr::from((bits >> 3 | 1 << 125).to_be_bytes()),
        };
        let is_denied = |address: &IpAddr| sets.iter().any(|net| net.contains(address));
        let guard = Guard::default();
        if reached(address) == address {
            prop_assert_eq!(guard.allows(address), !is_denied(&address), "{}", address);
        }
        if let IpAddr::V4(v4) = address {
            let [a, b, c, d] = v4.octets().map(u16::from);
            for v6 in [v4.to_ipv6_mapped(), Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, a << 8 | b, c << 8 | d)] {
                prop_assert_eq!(guard.allows(IpAddr::V6(v6)), guard.allows(address), "{}", v6);
            }
        }
    }

    #[test]
    fn what_is_parsed_is_what_is_written(text in "https?://[a-z0-9.\\[\\]:%@\\\\/_-]{0,24}") {
        if let Ok(url) = parse_url(&text) {
            let (_, rest) = text.split_once("://").unwrap();
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let host = url.host_str().unwrap();
            prop_assert!(authority == host || authority.strip_prefix(host).is_some_and(|port| port.starts_with(':')), "{}", text);
            prop_assert_eq!(url.path(), if path.is_empty() { "/" } else { path });
        }
    }
}

fn neighbour(address: IpAddr, is_next: bool) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let bits = u32::from(v4);
            IpAddr::V4((if is_next { bits.wrapping_add(1) } else { bits.wrapping_sub(1) }).into())
        }
        IpAddr::V6(v6) => {
            let bits = u128::from(v6);
            IpAddr::V6((if is_next { bits.wrapping_add(1) } else { bits.wrapping_sub(1) }).into())
        }
    }
}
