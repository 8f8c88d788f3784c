//! Listed hosts, redirects, rebinding names, tokens, resume, lies.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::Body;
use axum::http::Response;
use axum::http::request::Parts;
use reqwest::StatusCode;

use super::super::guard::Guard;
use super::super::settings::{HttpHeader, SourceSettings};
use super::super::testing::*;
use super::super::{Sources, net};
use super::*;

const WEIGHTS: &[u8] = b"0123456789";

fn adapter(parts: &Parts) -> Response<Body> {
    match parts.uri.path() {
        "/a/adapter_config.json" => file(parts, b"{}", &[("etag", "\"c1\"")]),
        "/a/adapter_model.safetensors" => file(parts, WEIGHTS, &[("etag", "\"w1\"")]),
        _ => status(404, &[]),
    }
}

/// `hosts` are listed for plain HTTP, loopback is opened.
fn settings(hosts: &[&Server]) -> SourceSettings {
    let mut settings = quick();
    settings.http.hosts = hosts.iter().map(|server| server.url()).collect();
    settings.networks = vec!["127.0.0.0/8".parse().unwrap()];
    settings
}

fn sources(hosts: &[&Server]) -> Sources {
    Sources::new(settings(hosts)).unwrap()
}

#[tokio::test]
async fn a_listed_host_gives_both_files_and_any_part_of_them() {
    let server = Server::start(adapter).await;
    let sources = sources(&[&server]);
    let resolved = resolve(&sources, &format!("{}/a", server.url()), &Credential::Anonymous).await.unwrap();
    assert!(resolved.identity.contains("c1") && resolved.identity.contains("w1"), "{}", resolved.identity);
    for offset in [0, 4, 9] {
        let read = read(&sources, &resolved, FileName::Weights, offset, &Credential::Anonymous).await.unwrap();
        assert_eq!(read, &WEIGHTS[usize::try_from(offset).unwrap()..]);
    }
    let seen = server.seen();
    assert!(seen.iter().all(|seen| seen.header("accept-encoding") == Some("identity")), "{seen:?}");
    assert_eq!(seen.last().unwrap().header("if-match"), Some("\"w1\""));
    assert_eq!(
        clean(resolve(&sources, &format!("{}/none", server.url()), &Credential::Anonymous).await),
        SourceError::Absent
    );
}

#[tokio::test]
async fn nothing_is_sent_to_hosts_that_are_not_listed_or_not_open() {
    let server = Server::start(adapter).await;
    let off = Sources::new(quick()).unwrap();
    let unlisted = Sources::new(SourceSettings { networks: settings(&[]).networks, ..settings(&[]) }).unwrap();
    let not_open = Sources::new(SourceSettings { networks: Vec::new(), ..settings(&[&server]) }).unwrap();
    for sources in [off, unlisted, not_open] {
        assert!(is_forbidden(&clean(resolve(&sources, &format!("{}/a", server.url()), &Credential::Anonymous).await)));
    }
    assert!(server.seen().is_empty());
}

#[tokio::test]
async fn a_name_with_a_denied_address_is_not_connected_to() {
    let server = Server::start(adapter).await;
    let port = server.address.port();
    for addresses in [
        vec![Ipv4Addr::LOCALHOST],
        vec![Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::LOCALHOST], // one good address does not excuse the other
        vec![Ipv4Addr::new(169, 254, 169, 254)],
    ] {
        let mut settings = quick();
        settings.http.hosts = vec![format!("http://rebinding.example:{port}")];
        let found = addresses.iter().map(|address| IpAddr::V4(*address)).collect::<Vec<_>>();
        let lookup: net::Lookup = Arc::new(move |_| {
            let found = found.clone();
            Box::pin(async move { Ok(found) })
        });
        let net = Arc::new(net::Net::with_lookup(Guard::default(), settings.pace, lookup));
        let sources = Sources::with_net(&settings, net).unwrap();
        let outcome = resolve(&sources, &format!("http://rebinding.example:{port}/a"), &Credential::Anonymous).await;
        assert!(is_forbidden(&clean(outcome)), "{addresses:?}");
    }
    assert!(server.seen().is_empty());
}

#[tokio::test]
async fn a_name_that_changes_its_address_is_checked_at_every_lookup() {
    let server = Server::start(adapter).await;
    let port = server.address.port();
    let mut settings = settings(&[]);
    settings.http.hosts = vec![format!("http://rebinding.example:{port}")];
    let lookups = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&lookups);
    let lookup: net::Lookup = Arc::new(move |_| {
        // Good the first time, the metadata service from then on.
        let is_first = count.fetch_add(1, Ordering::SeqCst) == 0;
        let address = if is_first { Ipv4Addr::LOCALHOST } else { Ipv4Addr::new(169, 254, 169, 254) };
        Box::pin(async move { Ok(vec![IpAddr::V4(address)]) })
    });
    let net = Arc::new(net::Net::with_lookup(Guard::new(settings.networks.clone()), settings.pace, lookup));
    let sources = Sources::with_net(&settings, net).unwrap();
    // A kept connection needs no lookup and is to the checked address; a new one is checked again. Either way no other address.
    for _ in 0..5 {
        let _ = resolve(&sources, &format!("http://rebinding.example:{port}/a"), &Credential::Anonymous).await;
    }
    assert!(lookups.load(Ordering::SeqCst) >= 1 && !server.seen().is_empty());
}

#[tokio::test]
async fn redirects_are_checked_each_and_counted() {
    let inner = Server::start(adapter).await;
    let (inner_url, secret_url) = (inner.url(), inner.url());
    let hops = |parts: &Parts| {
        parts.uri.path().split('/').nth(1).and_then(|part| part.strip_prefix("hop")).and_then(|n| n.parse::<u32>().ok())
    };
    let outer = Server::start(move |parts| {
        let tail = parts.uri.path().rsplit('/').next().unwrap_or_default().to_owned();
        let to = match (hops(parts), parts.uri.path().split('/').nth(1)) {
            (Some(0), _) => format!("{inner_url}/a/{tail}"),
            (Some(n), _) => format!("/hop{}/{tail}", n - 1),
            (_, Some("metadata")) => "http://169.254.169.254/latest/meta-data".to_owned(),
            (_, Some("decimal")) => format!("http://2130706433:80/{tail}"),
            (_, Some("file")) => "file:///etc/passwd".to_owned(),
            (_, Some("user")) => format!("http://user:pw@{}/a/{tail}", secret_url.trim_start_matches("http://")),
            (_, Some("backslash")) => format!("\\\\169.254.169.254/{tail}"),
            _ => return status(404, &[]),
        };
        status(302, &[("location", &to)])
    })
    .await;
    let both = sources(&[&outer, &inner]);
    let ask = |sources, path: &str| {
        let url = format!("{}/{path}", outer.url());
        async move { resolve(sources, &url, &token("SECRET-TOKEN")).await }
    };
    for n in 0..=2 {
        ask(&both, &format!("hop{n}")).await.unwrap_or_else(|error| panic!("{n}: {error}"));
    }
    assert!(outer.was_told("SECRET-TOKEN") && !inner.was_told("SECRET-TOKEN"));
    assert!(is_retryable(&clean(ask(&both, "hop3").await)));
    for path in ["metadata", "decimal", "file", "user", "backslash"] {
        let error = clean(ask(&both, path).await);
        assert!(is_forbidden(&error) || is_retryable(&error), "{path}: {error:?}");
    }
    let asked = inner.seen().len();
    assert!(is_forbidden(&clean(ask(&sources(&[&outer]), "hop0").await)));
    assert_eq!(inner.seen().len(), asked, "a host that is not listed was asked");
}

#[tokio::test]
async fn the_operators_headers_answer_no_caller() {
    let server = Server::start(|parts| match parts.headers.get("x-key").is_some() {
        true => adapter(parts),
        false => status(401, &[]),
    })
    .await;
    let mut settings = settings(&[&server]);
    settings.http.headers =
        vec![HttpHeader { host: server.url(), name: "x-key".into(), value: "SECRET-KEY".to_owned().into() }];
    assert!(!format!("{settings:?}").contains("SECRET"));
    let sources = Sources::new(settings).unwrap();
    let url = format!("{}/a", server.url());
    let resolved = resolve(&sources, &url, &Credential::Server).await.unwrap();
    assert!(read(&sources, &resolved, FileName::Config, 0, &Credential::Server).await.is_ok());
    for credential in [Credential::Anonymous, token("x")] {
        assert_eq!(clean(resolve(&sources, &url, &credential).await), SourceError::Absent);
        assert_eq!(clean(read(&sources, &resolved, FileName::Config, 0, &credential).await), SourceError::Absent);
    }
}

#[tokio::test]
async fn a_lying_or_slow_body_is_an_error_and_never_bytes() {
    let body = |parts: &Parts, kind: &str| {
        match kind {
            "gzip" => Response::builder()
                .header("etag", "\"w1\"")
                .header("content-encoding", "gzip")
                .body(Body::from(WEIGHTS)),
            "changed" => Response::builder().header("etag", "\"w2\"").body(Body::from(WEIGHTS)),
            "long" => Response::builder().header("etag", "\"w1\"").body(Body::from("0123456789+")),
            "short" => Response::builder().header("etag", "\"w1\"").body(Body::from("01234")),
            "html" => Response::builder().header("etag", "\"w1\"").body(Body::from("<html>")),
            "whole" => Response::builder().header("etag", "\"w1\"").body(Body::from(WEIGHTS)),
            "stuck" => Response::builder()
                .header("etag", "\"w1\"")
                .body(Body::from_stream(futures_util::stream::pending::<Result<bytes::Bytes, std::io::Error>>())),
            code => {
                return status(code.parse().unwrap(), &[("retry-after", "7")]).map(|body| {
                    let _ = parts;
                    body
                });
            }
        }
        .unwrap()
    };
    let server = Server::start(move |parts| {
        let (kind, name) = parts.uri.path().trim_start_matches('/').split_once('/').unwrap_or_default();
        match (parts.method.as_str(), name) {
            ("HEAD", "adapter_model.safetensors") => file(parts, WEIGHTS, &[("etag", "\"w1\"")]),
            ("HEAD", "adapter_config.json") => file(parts, b"{}", &[("etag", "\"c1\"")]),
            _ => body(parts, kind),
        }
    })
    .await;
    let sources = sources(&[&server]);
    for (kind, offset) in [
        ("gzip", 0),
        ("changed", 0),
        ("long", 0),
        ("short", 0),
        ("html", 0),
        ("whole", 4),
        ("stuck", 0),
        ("412", 4),
        ("416", 4),
        ("429", 0),
        ("503", 0),
        ("302", 0),
    ] {
        let resolved = resolve(&sources, &format!("{}/{kind}", server.url()), &Credential::Anonymous).await.unwrap();
        let error = clean(read(&sources, &resolved, FileName::Weights, offset, &Credential::Anonymous).await);
        assert!(is_retryable(&error), "{kind}: {error:?}");
        if kind == "429" {
            let SourceError::Retryable { retry_after, .. } = error else { unreachable!() };
            assert_eq!(retry_after.map(|wait| wait.as_secs()), Some(7));
        }
    }
}

#[tokio::test]
async fn a_file_without_a_strong_tag_is_never_resumed() {
    for (headers, can_resume) in [
        (&[("etag", "\"w1\"")][..], Some(true)),
        (&[("etag", "W/\"w1\"")][..], Some(false)),
        (&[("last-modified", "Fri, 21 Nov 2025 00:00:00 GMT")][..], Some(false)),
        (&[][..], None),
    ] {
        let server = Server::start(move |parts| file(parts, WEIGHTS, headers)).await;
        let sources = sources(&[&server]);
        let resolved = resolve(&sources, &format!("{}/a", server.url()), &Credential::Anonymous).await;
        let Some(can_resume) = can_resume else {
            assert!(matches!(clean(resolved), SourceError::Permanent { code: "adapter_unsupported", .. }));
            continue;
        };
        let resolved = resolved.unwrap();
        assert_eq!(read(&sources, &resolved, FileName::Weights, 0, &Credential::Anonymous).await.unwrap(), WEIGHTS);
        assert_eq!(read(&sources, &resolved, FileName::Weights, 3, &Credential::Anonymous).await.is_ok(), can_resume);
    }
}

#[test]
fn every_status_has_its_class() {
    for code in 300..600 {
        let error = status_error(StatusCode::from_u16(code).unwrap(), &HeaderMap::new());
        let is_absent = (400..500).contains(&code) && ![408, 412, 416, 425, 429].contains(&code);
        assert_eq!(error == SourceError::Absent, is_absent, "{code}");
        assert_eq!(is_retryable(&error), !is_absent, "{code}");
    }
}
