//! What operators read when a source does not answer, and what its answer is to everybody.

use std::sync::Arc;

use super::super::Sources;
use super::super::testing::*;
use crate::adapters::types::{AdapterRef, Credential, Source, SourceError};

/// The failure of `text` at a hub that lies at `endpoint`.
async fn failure_at(endpoint: &str, text: &str) -> SourceError {
    let mut settings = quick();
    settings.hub.endpoint = endpoint.to_owned();
    let sources = Arc::new(Sources::new(settings).unwrap());
    resolve(&sources, text, &Credential::Server).await.unwrap_err()
}

#[tokio::test]
async fn operators_read_which_host_and_why_and_the_message_names_neither() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let server = Server::start(|_| status(503, &[])).await;
    let plain = server.url().replace("http://", "https://");
    let cases = [
        (format!("http://{free}"), "connection refused"),
        ("http://no-such-host.invalid".to_owned(), "DNS: no such host"),
        (server.url(), "status 503"),
        (plain, "TLS: "),
    ];
    for (endpoint, why) in cases {
        let error = failure_at(&endpoint, "acme/sql").await;
        let detail = error.detail().unwrap_or_default();
        assert!(is_retryable(&error), "{error:?}");
        assert!(detail.starts_with(&format!("{endpoint}: ")) && detail.contains(why), "{endpoint}: {detail}");
        assert!(!error.to_string().contains("127.0.0.1") && !error.to_string().contains("no-such-host"), "{error}");
    }
}

#[tokio::test]
async fn a_listed_host_with_a_private_address_names_the_flag_that_opens_it() {
    let mut settings = quick();
    settings.http.hosts = vec!["http://127.0.0.1:9".to_owned(), "http://169.254.169.254".to_owned()];
    let sources = Sources::new(settings).unwrap();
    let error = resolve(&sources, "http://127.0.0.1:9/x", &Credential::Anonymous).await.unwrap_err();
    assert!(error.detail().unwrap().contains("--adapter-http-networks 127.0.0.1/32"), "{error:?}");
    let error = resolve(&sources, "http://169.254.169.254/x", &Credential::Anonymous).await.unwrap_err();
    assert!(error.detail().unwrap().contains("never connects"), "{error:?}");
    let error = resolve(&sources, "https://other.example/x", &Credential::Anonymous).await.unwrap_err();
    assert!(error.detail().unwrap().contains("--adapter-http-hosts https://other.example"), "{error:?}");
}

#[tokio::test]
async fn what_is_not_found_has_its_reason_for_operators() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    std::fs::create_dir(root.join("empty")).unwrap();
    let mut settings = quick();
    settings.local.roots = vec![root.clone()];
    settings.hub.endpoint = "http://127.0.0.1:9".to_owned();
    let sources = Sources::new(settings).unwrap();
    let cases = [
        (format!("{}/nowhere", root.display()), "no such folder"),
        (format!("{}/empty", root.display()), "has no adapter_config.json"),
        ("/etc".to_owned(), "is not below an --adapter-root"),
        ("hf://acme/nosuch".to_owned(), "http://127.0.0.1:9 has no such repository"),
        ("hf://acme/nosuch".to_owned(), "the server has no HF_TOKEN"),
        ("s3://bucket/x".to_owned(), "the server's credentials may not read it"),
    ];
    for (text, why) in cases {
        let reference = AdapterRef::parse(&text).unwrap();
        let told = sources.why_absent(&reference, &Credential::Server).await;
        assert!(told.contains(why), "{text}: {told}");
    }
}
