//! S3 and GCS dialects: versions, checksums, credentials of server and callers.

use axum::body::Body;
use axum::http::Response;
use axum::http::request::Parts;

use super::super::Sources;
use super::super::settings::SourceSettings;
use super::super::testing::*;
use super::*;

const WEIGHTS: &[u8] = b"0123456789";
const SHA256_BASE64: &str = "hNiYd/DUBB77a/kaFvAkjy/Vc+avBcGflr7bn4gveII=";
const DATE: (&str, &str) = ("last-modified", "Fri, 21 Nov 2025 00:00:00 GMT");

/// `/open/..` for all, `/closed/..` for what `is_right` accepts in the Authorization header.
fn store(is_right: fn(&str) -> bool) -> impl Fn(&Parts) -> Response<Body> + Send + Sync {
    move |parts| {
        let authorization =
            parts.headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        // GCS takes a key as one segment, everything but letters and digits encoded.
        let path = parts.uri.path().replace("%2F", "/").replace("%5F", "_").replace("%2E", ".");
        if path.starts_with("/closed/") && !is_right(authorization)
            || !path.starts_with("/open/") && !path.starts_with("/closed/")
        {
            return status(403, &[]);
        }
        if parts.headers.get("if-match").is_some_and(|tag| tag != "\"w1\"" && tag != "\"c1\"") {
            return status(412, &[]);
        }
        match path.rsplit('/').next() {
            Some("adapter_config.json") => file(parts, b"{}", &[("etag", "\"c1\""), DATE]),
            Some("adapter_model.safetensors") => file(
                parts,
                WEIGHTS,
                &[
                    ("etag", "\"w1\""),
                    DATE,
                    ("x-amz-checksum-sha256", SHA256_BASE64),
                    ("x-amz-version-id", "v7"),
                    ("x-goog-hash", "crc32c=yZRlqg==,md5=xxx"),
                ],
            ),
            _ => status(404, &[]),
        }
    }
}

fn settings(server: &Server) -> SourceSettings {
    let mut settings = quick();
    settings.s3.endpoint = Some(server.url());
    settings.s3.credentials =
        S3Credentials::Static { key_id: "server".into(), secret: "SECRET-1".to_owned().into(), session_token: None };
    settings.gcs.endpoint = Some(server.url());
    settings
}

fn s3_key(id: &str) -> Credential {
    token(&format!(r#"{{"aws_access_key_id":"{id}","aws_secret_access_key":"SECRET-2"}}"#))
}

#[tokio::test]
async fn s3_objects_have_versions_checksums_and_ranges() {
    let server = Server::start(store(|_| true)).await;
    let sources = Sources::new(settings(&server)).unwrap();
    let resolved = resolve(&sources, "s3://open/loras/sql", &Credential::Anonymous).await.unwrap();
    assert_eq!(resolved.identity, format!("s3:{}/open/loras/sql#c1-2,v7-w1-10", server.url()));
    let Origin::Remote(files) = &resolved.origin else { panic!("{resolved:?}") };
    assert!(matches!(files[1].digest, Some(FileDigest::Sha256([0x84, 0xd8, ..]))), "{:?}", files[1]);
    assert!(server.seen().iter().all(|seen| seen.header("authorization").is_none()));
    for offset in [0, 4] {
        let bytes = read(&sources, &resolved, FileName::Weights, offset, &Credential::Anonymous).await.unwrap();
        assert_eq!(bytes, &WEIGHTS[usize::try_from(offset).unwrap()..]);
    }
    let last = server.seen().pop().unwrap();
    assert_eq!(last.header("if-match"), Some("\"w1\""));
    assert!(last.path.contains("versionId=v7"), "{}", last.path);
    let mut other = resolved.clone();
    if let Origin::Remote(files) = &mut other.origin {
        files[1].etag = Some("\"w0\"".to_owned());
    }
    assert!(is_retryable(&clean(read(&sources, &other, FileName::Weights, 0, &Credential::Anonymous).await)));
    assert_eq!(clean(resolve(&sources, "s3://other/sql", &Credential::Anonymous).await), SourceError::Absent);
}

#[tokio::test]
async fn s3_credentials_are_the_servers_or_the_callers_and_never_mixed() {
    let server = Server::start(store(|authorization| {
        authorization.contains("Credential=server/") || authorization.contains("Credential=right/")
    }))
    .await;
    let sources = Sources::new(settings(&server)).unwrap();
    let resolved = resolve(&sources, "s3://closed/sql", &Credential::Server).await.unwrap();
    let head = server.seen().remove(0);
    assert!(head.header("authorization").unwrap().contains("x-amz-checksum-mode"), "the asked checksum is signed");
    assert!(resolve(&sources, "s3://closed/sql", &s3_key("right")).await.is_ok());
    for credential in [Credential::Anonymous, s3_key("wrong")] {
        assert_eq!(clean(resolve(&sources, "s3://closed/sql", &credential).await), SourceError::Absent);
        assert_eq!(clean(read(&sources, &resolved, FileName::Weights, 0, &credential).await), SourceError::Absent);
    }
    assert!(is_forbidden(&clean(resolve(&sources, "s3://closed/sql", &token("hf_SECRET")).await)));
    assert!(!server.was_told("SECRET"));
}

#[tokio::test]
async fn gcs_takes_access_tokens_and_answers_nobody_else() {
    let server = Server::start(store(|authorization| authorization == "Bearer right")).await;
    let sources = Sources::new(settings(&server)).unwrap();
    let resolved = resolve(&sources, "gs://closed/sql", &token("right")).await.unwrap();
    let Origin::Remote(files) = &resolved.origin else { panic!("{resolved:?}") };
    assert!(files[1].digest.is_some());
    assert_eq!(read(&sources, &resolved, FileName::Weights, 4, &token("right")).await.unwrap(), &WEIGHTS[4..]);
    for credential in [Credential::Anonymous, Credential::Server, token("wrong")] {
        assert_eq!(clean(resolve(&sources, "gs://closed/sql", &credential).await), SourceError::Absent);
    }
    assert!(resolve(&sources, "gs://open/sql", &Credential::Anonymous).await.is_ok());
}

#[tokio::test]
async fn the_operators_service_account_may_name_its_own_store() {
    let server = Server::start(store(|_| true)).await;
    let mut settings = quick();
    let json = serde_json::json!({
        "gcs_base_url": server.url(), "disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": "",
    });
    settings.gcs.credentials = GcsCredentials::ServiceAccount(json.to_string().into());
    let sources = Sources::new(settings).unwrap();
    let resolved = resolve(&sources, "gs://closed/sql", &Credential::Server).await.unwrap();
    assert_eq!(read(&sources, &resolved, FileName::Weights, 0, &Credential::Server).await.unwrap(), WEIGHTS);
}

#[tokio::test]
async fn failures_of_stores_have_their_class_and_no_text() {
    for (code, headers, is_absent) in [
        (400, &[][..], true),
        (401, &[], true),
        (403, &[], true),
        (404, &[], true),
        (429, &[("retry-after", "9")], false),
        (500, &[], false),
        (503, &[], false),
    ] {
        let server = Server::start(move |_| status(code, headers)).await;
        let sources = Sources::new(settings(&server)).unwrap();
        for text in ["s3://open/sql", "gs://open/sql"] {
            let error = clean(resolve(&sources, text, &Credential::Anonymous).await);
            assert_eq!(error == SourceError::Absent, is_absent, "{text} {code} {error:?}");
            if let SourceError::Retryable { retry_after, .. } = error {
                assert_eq!(retry_after.is_some(), code == 429);
            }
            assert_eq!(server.seen().len(), if text.starts_with("s3") { 1 } else { 2 }, "one attempt each");
        }
    }
    let other = Server::start(|_| status(200, &[])).await;
    let location = format!("{}/x", other.url());
    let server = Server::start(move |_| status(307, &[("location", &location)])).await;
    let error = clean(resolve(&Sources::new(settings(&server)).unwrap(), "s3://open/sql", &Credential::Server).await);
    assert!(is_forbidden(&error) && other.seen().is_empty(), "{error:?}");
}

#[tokio::test]
async fn bodies_of_stores_are_as_long_as_announced() {
    for (kind, offset) in [("short", 0), ("long", 0), ("whole", 4), ("gzip", 0), ("changed", 0)] {
        let server = Server::start(move |parts| {
            if parts.method == "HEAD" {
                return file(parts, WEIGHTS, &[("etag", "\"w1\""), DATE]);
            }
            let reply = Response::builder()
                .header("etag", if kind == "changed" { "\"w2\"" } else { "\"w1\"" })
                .header(DATE.0, DATE.1);
            match kind {
                "short" => reply.body(Body::from("01234")),
                "long" => reply.body(Body::from("01234567890123")),
                "gzip" => reply.header("content-encoding", "gzip").body(Body::from(WEIGHTS)),
                _ => reply.body(Body::from(WEIGHTS)),
            }
            .unwrap()
        })
        .await;
        let sources = Sources::new(settings(&server)).unwrap();
        for text in ["s3://open/sql", "gs://open/sql"] {
            let resolved = resolve(&sources, text, &Credential::Anonymous).await.unwrap();
            let error = clean(read(&sources, &resolved, FileName::Weights, offset, &Credential::Anonymous).await);
            assert!(is_retryable(&error), "{kind} {text} {error:?}");
        }
    }
}

#[test]
fn a_checksum_of_parts_is_none() {
    let digest = |name: &'static str, value: &'static str| {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_static(value));
        digest_of(&headers)
    };
    assert!(digest("x-amz-checksum-sha256", SHA256_BASE64).is_some());
    assert_eq!(digest("x-amz-checksum-sha256", "hNiYd/DUBB77a/kaFvAkjy/Vc+avBcGflr7bn4gveII=-3"), None);
    assert_eq!(digest("x-goog-hash", "md5=xxx,crc32c=AAAAAQ=="), Some(FileDigest::Crc32c([0, 0, 0, 1])));
    assert_eq!(digest("x-amz-checksum-crc32c", "AAAAAQ=="), Some(FileDigest::Crc32c([0, 0, 0, 1])));
}
