//! Commits, hashes, redirects, tokens and caches of hub-like servers, honest and not.

use std::sync::OnceLock;

use axum::body::Body;
use axum::http::Response;
use axum::http::request::Parts;
use tempfile::TempDir;

use super::super::Sources;
use super::super::settings::SourceSettings;
use super::super::testing::*;
use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const GIT_SHA1: &str = "\"9e26dfeeb6e641a33dae4961196235bdb965b21b\"";
const SHA256: &str = "\"84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882\"";
const CONFIG: &[u8] = b"{}";
const WEIGHTS: &[u8] = b"0123456789";

/// A hub with `acme/public` for all and `acme/private` for `right`; large files lie at `cdn`.
fn hub(cdn: Option<String>) -> impl Fn(&Parts) -> Response<Body> + Send + Sync {
    move |parts| {
        let path = parts.uri.path().trim_start_matches('/');
        let Some((repo, rest)) = path.split_once("/resolve/") else { return status(404, &[]) };
        let is_right = parts.headers.get("authorization").is_some_and(|value| value == "Bearer right");
        match repo {
            "acme/public" => {}
            "acme/private" if is_right => {}
            "acme/old" => return status(307, &[("location", &format!("/acme/public/resolve/{rest}"))]),
            _ => return status(401, &[("x-error-code", "RepoNotFound")]),
        }
        let Some((revision, name)) = rest.split_once('/') else { return status(404, &[]) };
        if !["main", "v1", "refs%2Fpr%2F1", COMMIT].contains(&revision) {
            return status(404, &[("x-error-code", "RevisionNotFound")]);
        }
        match (name, &cdn) {
            ("adapter_config.json", _) => file(parts, CONFIG, &[("x-repo-commit", COMMIT), ("etag", GIT_SHA1)]),
            ("adapter_model.safetensors", None) => file(parts, WEIGHTS, &[("x-repo-commit", COMMIT), ("etag", SHA256)]),
            ("adapter_model.safetensors", Some(cdn)) => status(
                302,
                &[
                    ("x-repo-commit", COMMIT),
                    ("x-linked-etag", SHA256),
                    ("x-linked-size", "10"),
                    ("etag", "\"of-the-redirect\""),
                    ("location", &format!("{cdn}/blob?signature=x")),
                ],
            ),
            _ => status(404, &[("x-error-code", "EntryNotFound")]),
        }
    }
}

fn settings(server: &Server) -> SourceSettings {
    let mut settings = quick();
    settings.hub.endpoint = server.url();
    settings.hub.token = Some("right".to_owned().into());
    settings.networks = vec!["127.0.0.0/8".parse().unwrap()];
    settings
}

#[tokio::test]
async fn a_reference_becomes_a_commit_with_hashes() {
    let server = Server::start(hub(None)).await;
    let sources = Sources::new(settings(&server)).unwrap();
    for text in ["acme/public", "acme/public@v1", "acme/public@refs/pr/1", &format!("acme/public@{COMMIT}")] {
        let resolved =
            resolve(&sources, text, &Credential::Anonymous).await.unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(resolved.revision, COMMIT);
        assert_eq!(resolved.identity, format!("hub:{}/acme/public@{COMMIT}", server.url()));
        let Origin::Remote(files) = &resolved.origin else { panic!("{resolved:?}") };
        assert!(matches!(files[0].digest, Some(FileDigest::GitSha1([0x9e, ..]))) && files[0].bytes == 2);
        assert!(matches!(files[1].digest, Some(FileDigest::Sha256([0x84, ..]))) && files[1].bytes == 10);
        assert_eq!(
            read(&sources, &resolved, FileName::Weights, 3, &Credential::Anonymous).await.unwrap(),
            &WEIGHTS[3..]
        );
        assert!(server.seen().last().unwrap().path.contains(COMMIT), "bytes are asked for by commit");
    }
    assert!(!server.was_told("right"));
    let renamed = resolve(&sources, "acme/old", &Credential::Anonymous).await.unwrap();
    assert_eq!(renamed.revision, COMMIT);
    for text in ["acme/none", "acme/public@v9", "acme/private"] {
        assert_eq!(clean(resolve(&sources, text, &Credential::Anonymous).await), SourceError::Absent, "{text}");
    }
}

#[tokio::test]
async fn only_the_right_token_opens_a_private_repository() {
    let server = Server::start(hub(None)).await;
    let sources = Sources::new(settings(&server)).unwrap();
    let resolved = resolve(&sources, "acme/private", &token("right")).await.unwrap();
    assert!(resolve(&sources, "acme/private", &Credential::Server).await.is_ok());
    for credential in [Credential::Anonymous, token("wrong"), token("right\r\nx: y"), token("")] {
        assert_eq!(clean(resolve(&sources, "acme/private", &credential).await), SourceError::Absent);
        assert_eq!(clean(read(&sources, &resolved, FileName::Weights, 0, &credential).await), SourceError::Absent);
    }
}

#[tokio::test]
async fn bytes_may_come_from_listed_hosts_and_the_token_never_goes_there() {
    let cdn = Server::start(|parts| file(parts, WEIGHTS, &[])).await;
    let server = Server::start(hub(Some(cdn.url()))).await;
    let mut listed = settings(&server);
    listed.hub.hosts = vec![cdn.address.to_string()];
    let closed = SourceSettings { networks: Vec::new(), ..listed.clone() };
    let listed = Sources::new(listed).unwrap();
    let resolved = resolve(&listed, "acme/private", &token("right")).await.unwrap();
    assert!(cdn.seen().is_empty(), "a HEAD needs no other host");
    assert_eq!(read(&listed, &resolved, FileName::Weights, 4, &token("right")).await.unwrap(), &WEIGHTS[4..]);
    assert!(server.was_told("right") && !cdn.was_told("right"));
    let asked = cdn.seen().len();
    for settings in [closed, settings(&server)] {
        let sources = Sources::new(settings).unwrap();
        assert!(is_forbidden(&clean(read(&sources, &resolved, FileName::Weights, 0, &token("right")).await)));
    }
    assert_eq!(cdn.seen().len(), asked, "a host that is not listed, or not open, was asked");
}

#[tokio::test]
async fn a_token_does_not_follow_a_redirect_that_only_looks_relative() {
    let thief = Server::start(|_| status(200, &[])).await;
    for location in ["/\\{}/x", "\\\\{}/x", "//{}/x", "http://{}/x", "/\t/{}/x", "http:\\\\{}/x"] {
        let location = location.replace("{}", &thief.address.to_string());
        let server = Server::start(move |_| match axum::http::HeaderValue::from_bytes(location.as_bytes()) {
            Ok(value) => {
                let mut response =
                    status(302, &[("x-repo-commit", COMMIT), ("x-linked-etag", SHA256), ("x-linked-size", "10")]);
                response.headers_mut().insert("location", value);
                response
            }
            Err(_) => status(404, &[]),
        })
        .await;
        let sources = Sources::new(settings(&server)).unwrap();
        let outcome = resolve(&sources, "acme/public", &token("SECRET-TOKEN")).await;
        if let Ok(resolved) = outcome {
            clean(read(&sources, &resolved, FileName::Weights, 0, &token("SECRET-TOKEN")).await);
        }
    }
    assert!(thief.seen().is_empty(), "{:?}", thief.seen());
}

#[tokio::test]
async fn what_is_no_hash_no_commit_or_no_size_is_refused() {
    static CASE: OnceLock<std::sync::Mutex<(String, String, String)>> = OnceLock::new();
    let case = CASE.get_or_init(Default::default);
    let server = Server::start(|_| {
        let (commit, etag, size) = CASE.get().unwrap().lock().unwrap().clone();
        status(200, &[("x-repo-commit", &commit), ("x-linked-etag", &etag), ("x-linked-size", &size)])
    })
    .await;
    let sources = Sources::new(settings(&server)).unwrap();
    let good = (COMMIT.to_owned(), SHA256.to_owned(), "10".to_owned());
    *case.lock().unwrap() = good.clone();
    assert!(resolve(&sources, "acme/public", &Credential::Anonymous).await.is_ok());
    for (commit, etag, size) in [
        ("../../../../etc/cron.d/x-0123456789abcdef", SHA256, "10"),
        ("0123", SHA256, "10"),
        (&COMMIT.to_uppercase(), SHA256, "10"),
        ("", SHA256, "10"),
        (COMMIT, "\"../../x\"", "10"),
        (COMMIT, "\"abc\"", "10"),
        (COMMIT, "", "10"),
        (COMMIT, &format!("\"{}\"", "g".repeat(64)), "10"),
        (COMMIT, &format!("\"{}\"", "+1".repeat(32)), "10"),
        (COMMIT, SHA256, "-1"),
        (COMMIT, SHA256, "1e3"),
        (COMMIT, SHA256, ""),
        (COMMIT, SHA256, "99999999999999999999"),
    ] {
        *case.lock().unwrap() = (commit.to_owned(), etag.to_owned(), size.to_owned());
        assert!(
            is_retryable(&clean(resolve(&sources, "acme/public", &Credential::Anonymous).await)),
            "{commit} {etag} {size}"
        );
    }
}

#[tokio::test]
async fn errors_have_their_class_and_no_upstream_text() {
    for (code, headers, is_absent) in [
        (400, &[][..], true),
        (401, &[], true),
        (403, &[], true),
        (404, &[], true),
        (410, &[], true),
        (408, &[], false),
        (429, &[("ratelimit", "\"api\";r=0;t=55")], false),
        (500, &[], false),
        (503, &[("retry-after", "120")], false),
        (504, &[], false),
        (200, &[], false),
    ] {
        let server = Server::start(move |_| status(code, headers)).await;
        let error = clean(resolve(&Sources::new(settings(&server)).unwrap(), "acme/public", &Credential::Server).await);
        assert_eq!(error == SourceError::Absent, is_absent, "{code}");
        if let SourceError::Retryable { retry_after, .. } = error {
            let expected = match code {
                429 => Some(55),
                503 => Some(120),
                _ => None,
            };
            assert_eq!(retry_after.map(|wait| wait.as_secs()), expected, "{code}");
        }
    }
    let mut nobody = quick();
    nobody.hub.endpoint = "http://127.0.0.1:1".to_owned();
    assert!(is_retryable(&clean(resolve(&Sources::new(nobody).unwrap(), "acme/public", &Credential::Server).await)));
}

#[tokio::test]
async fn a_pickle_is_named_as_such() {
    let server = Server::start(|parts| match parts.uri.path().rsplit('/').next() {
        Some("adapter_config.json" | "adapter_model.bin") => {
            file(parts, CONFIG, &[("x-repo-commit", COMMIT), ("etag", GIT_SHA1)])
        }
        _ => status(404, &[]),
    })
    .await;
    let error = clean(resolve(&Sources::new(settings(&server)).unwrap(), "acme/public", &Credential::Anonymous).await);
    assert!(matches!(error, SourceError::Permanent { code: "adapter_unsupported", .. }), "{error:?}");
}

/// A hub cache with `acme/private` at `main`, as the hub's own programs write it.
fn cache() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("models--acme--private");
    for part in ["refs", "blobs", &format!("snapshots/{COMMIT}")] {
        std::fs::create_dir_all(repo.join(part)).unwrap();
    }
    std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
    for (name, blob, bytes) in
        [("adapter_config.json", GIT_SHA1, CONFIG), ("adapter_model.safetensors", SHA256, WEIGHTS)]
    {
        let blob = blob.trim_matches('"');
        std::fs::write(repo.join("blobs").join(blob), bytes).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{blob}"), repo.join("snapshots").join(COMMIT).join(name))
            .unwrap();
    }
    dir
}

#[tokio::test]
async fn a_cache_serves_the_server_alone() {
    let (cache, server) = (cache(), Server::start(hub(None)).await);
    let with_cache = |is_offline, endpoint: &str| {
        let mut settings = settings(&server);
        settings.hub.cache_dirs = vec![cache.path().join("none"), cache.path().to_owned()];
        settings.hub.is_offline = is_offline;
        settings.hub.endpoint = endpoint.to_owned();
        Sources::new(settings).unwrap()
    };
    let (offline, down) = (with_cache(true, &server.url()), with_cache(false, "http://127.0.0.1:1"));
    for (sources, what) in [(&offline, "offline"), (&down, "down")] {
        for text in ["acme/private", &format!("acme/private@{COMMIT}")] {
            let resolved = resolve(sources, text, &Credential::Server)
                .await
                .unwrap_or_else(|error| panic!("{what} {text}: {error}"));
            let Origin::Remote(files) = &resolved.origin else { panic!("{resolved:?}") };
            assert!(matches!(files[1].digest, Some(FileDigest::Sha256([0x84, ..]))), "the blob's name is its hash");
            assert_eq!(
                read(sources, &resolved, FileName::Weights, 4, &Credential::Server).await.unwrap(),
                &WEIGHTS[4..]
            );
            for credential in [Credential::Anonymous, token("right")] {
                let error = clean(resolve(sources, text, &credential).await);
                assert!(
                    if what == "offline" { error == SourceError::Absent } else { is_retryable(&error) },
                    "{what} {error:?}"
                );
                assert_eq!(
                    clean(read(sources, &resolved, FileName::Weights, 0, &credential).await),
                    SourceError::Absent
                );
            }
        }
    }
    assert!(server.seen().is_empty());
    assert_eq!(clean(resolve(&offline, "acme/none", &Credential::Server).await), SourceError::Absent);
    let online = with_cache(false, &server.url());
    let resolved = resolve(&online, "acme/private", &Credential::Server).await.unwrap();
    assert_eq!(read(&online, &resolved, FileName::Weights, 0, &Credential::Server).await.unwrap(), WEIGHTS);
    assert!(server.seen().iter().all(|seen| seen.method == "HEAD"), "the bytes are here already");
}

#[test]
fn settings_that_cannot_be_meant_are_errors_at_start() {
    let build = |endpoint: &str, host: &str| {
        let mut settings = quick();
        settings.hub.endpoint = endpoint.to_owned();
        settings.hub.hosts = vec![host.to_owned()];
        Sources::new(settings).err().map(|error| error.to_string())
    };
    assert_eq!(build("https://hub.example/prefix/", "*.cdn.example"), None);
    for (endpoint, host) in [
        ("huggingface.co", "a.b"),
        ("ftp://hub", "a.b"),
        ("https://u:SECRET@hub", "a.b"),
        ("https://hub", "a/b"),
        ("https://hub?x=SECRET", "a.b"),
    ] {
        let text = build(endpoint, host).unwrap_or_else(|| panic!("{endpoint} {host}"));
        assert!(!text.contains("SECRET"), "{text}");
    }
}
