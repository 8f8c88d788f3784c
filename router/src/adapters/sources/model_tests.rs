//! Base models from a hub and a store: names, shards, resume, hashes, caches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use axum::body::Body;
use axum::http::Response;
use axum::http::request::Parts;
use sha2::{Digest, Sha256};

use super::super::testing::*;
use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const INDEX_TEXT: &[u8] = br#"{"metadata":{},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors","c":"model-00001-of-00002.safetensors"}}"#;
const SHARD: &[u8] = b"0123456789abcdefghij";

fn bytes_of(name: &str) -> Option<&'static [u8]> {
    Some(match name {
        "config.json" | "tokenizer.json" => b"{}",
        "model.safetensors.index.json" => INDEX_TEXT,
        "model-00001-of-00002.safetensors" | "model-00002-of-00002.safetensors" | "tiny.gguf" => SHARD,
        _ => return None,
    })
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `acme/model`, sharded, and `acme/quantised`, one GGUF.
fn hub(parts: &Parts) -> Response<Body> {
    let path = parts.uri.path();
    let name = path.rsplit('/').next().unwrap_or_default();
    if path.starts_with("/api/models/acme/quantised") {
        let body = serde_json::json!({"id": "acme/quantised", "sha": COMMIT, "siblings": [{"rfilename": "tiny.gguf"}, {"rfilename": "../x.gguf"}]});
        return Response::builder()
            .header("content-type", "application/json")
            .body(Body::from(body.to_string()))
            .unwrap();
    }
    let is_there = path.starts_with("/acme/model/") != name.ends_with(".gguf");
    match bytes_of(name).filter(|_| is_there && (path.starts_with("/acme/model/") || name.ends_with(".gguf"))) {
        Some(bytes) => file(parts, bytes, &[("x-repo-commit", COMMIT), ("etag", &format!("\"{}\"", sha256(bytes)))]),
        None => status(404, &[]),
    }
}

fn sources(server: &Server) -> Sources {
    let mut settings = quick();
    settings.hub.endpoint = server.url();
    settings.hub.token = Some("right".to_owned().into());
    settings.s3.endpoint = Some(server.url());
    Sources::new(settings).unwrap()
}

async fn listing(sources: &Sources, text: &str) -> ModelListing {
    match sources.resolve_model(&ModelRef::parse(text).unwrap()).await.unwrap_or_else(|error| panic!("{text}: {error}"))
    {
        ModelPlace::Remote(listing) => listing,
        ModelPlace::Here(dir) => panic!("{}", dir.display()),
    }
}

#[test]
fn a_model_is_named_like_an_adapter_or_by_its_gguf_file() {
    let parse = |text: &str| ModelRef::parse(text).map(|model| (model.reference.to_string(), model.gguf));
    for (text, reference, gguf) in [
        ("acme/model@v1", "hf://acme/model@v1", None),
        ("hf://acme/model", "hf://acme/model", None),
        ("acme/model/tiny.gguf", "hf://acme/model", Some("tiny.gguf")),
        ("hf://acme/model/tiny.gguf@v1", "hf://acme/model@v1", Some("tiny.gguf")),
        ("acme/model.gguf", "hf://acme/model.gguf", None),
        ("s3://bucket/models/tiny.gguf", "s3://bucket/models", Some("tiny.gguf")),
        ("gs://bucket/models", "gs://bucket/models", None),
    ] {
        assert_eq!(parse(text).unwrap(), (reference.to_owned(), gguf.map(str::to_owned)), "{text}");
    }
    for text in ["model", "acme/model/sub/tiny.gguf", "acme/../tiny.gguf", "acme/model/.gguf", "acme/model/a b.gguf"] {
        assert!(parse(text).is_err(), "{text}");
    }
}

#[test]
fn an_index_names_plain_files_only() {
    assert_eq!(shards(INDEX_TEXT).unwrap(), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
    for name in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "x.bin",
        "",
        ".safetensors",
        "a..safetensors",
        "x\\u0000.safetensors",
    ] {
        assert!(shards(format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#).as_bytes()).is_err(), "{name}");
    }
    for text in ["", "{}", r#"{"weight_map":{}}"#, r#"{"weight_map":[]}"#] {
        assert!(shards(text.as_bytes()).is_err(), "{text}");
    }
}

#[tokio::test]
async fn a_sharded_model_arrives_whole_and_is_not_downloaded_twice() {
    let server = Server::start(hub).await;
    let (sources, dir, done) = (sources(&server), tempfile::tempdir().unwrap(), AtomicU64::new(0));
    let listing = listing(&sources, "acme/model").await;
    assert_eq!((listing.revision.as_str(), listing.files.len()), (COMMIT, 5));
    // The first file was left in the middle, with the right bytes; the second with wrong ones.
    std::fs::write(dir.path().join("model-00001-of-00002.safetensors.part"), &SHARD[..7]).unwrap();
    std::fs::write(dir.path().join("model-00002-of-00002.safetensors.part"), "wrong").unwrap();
    sources.download_model(&listing, dir.path(), &done).await.unwrap();
    for file in &listing.files {
        assert_eq!(std::fs::read(dir.path().join(&file.name)).unwrap(), bytes_of(&file.name).unwrap(), "{}", file.name);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 5, "nothing else is left");
    assert_eq!(done.load(Ordering::Relaxed), listing.files.iter().map(|file| file.bytes).sum::<u64>());
    assert!(server.seen().iter().any(|seen| seen.header("range") == Some("bytes=7-")));
    let gets = |server: &Server| server.seen().iter().filter(|seen| seen.method == "GET").count();
    let before = gets(&server);
    sources.download_model(&listing, dir.path(), &done).await.unwrap();
    assert_eq!(gets(&server), before);
}

#[tokio::test]
async fn what_a_repository_has_instead_is_said() {
    let server = Server::start(hub).await;
    let sources = sources(&server);
    let error = clean(sources.resolve_model(&ModelRef::parse("acme/quantised").unwrap()).await);
    let SourceError::Permanent { message, .. } = &error else { panic!("{error:?}") };
    assert!(message.contains("config.json") && message.contains("tiny.gguf") && !message.contains(".."), "{message}");
    assert_eq!(clean(sources.resolve_model(&ModelRef::parse("acme/none").unwrap()).await), SourceError::Absent);
    let listing = listing(&sources, "acme/quantised/tiny.gguf").await;
    assert_eq!(listing.files.len(), 1);
}

#[tokio::test]
async fn a_model_that_breaks_off_goes_on_and_one_with_wrong_bytes_never_gets_its_name() {
    let gets = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&gets);
    let server = Server::start(move |parts| {
        let is_shard = parts.uri.path().ends_with("-00002.safetensors") && parts.method == "GET";
        if !is_shard {
            return hub(parts);
        }
        match (parts.uri.path().contains("00001-of"), count.fetch_add(1, Ordering::SeqCst)) {
            // The first shard: half of it, an error, then the rest.
            (true, n) if n % 3 == 0 => Response::builder().body(Body::from(&SHARD[..10])).unwrap(),
            (true, n) if n % 3 == 1 => status(503, &[]),
            (true, _) => hub(parts),
            (false, _) => hub(parts),
        }
    })
    .await;
    let (sources_, dir, done) = (sources(&server), tempfile::tempdir().unwrap(), AtomicU64::new(0));
    let good = listing(&sources_, "acme/model").await;
    sources_.download_model(&good, dir.path(), &done).await.unwrap();
    assert_eq!(std::fs::read(dir.path().join("model-00001-of-00002.safetensors")).unwrap(), SHARD);

    let liar = Server::start(|parts| match parts.method.as_str() {
        "GET" if parts.uri.path().ends_with("00001-of-00002.safetensors") => file(parts, b"0123456789abcdefghiX", &[]),
        _ => hub(parts),
    })
    .await;
    let (sources_, dir) = (sources(&liar), tempfile::tempdir().unwrap());
    let listing = listing(&sources_, "acme/model").await;
    let error = clean(sources_.download_model(&listing, dir.path(), &done).await);
    assert!(matches!(error, SourceError::Permanent { .. }), "{error:?}");
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name.to_string_lossy().starts_with("model-00001")), "{names:?}");
}

#[tokio::test]
async fn a_model_comes_from_a_store_too() {
    let server = Server::start(|parts| match bytes_of(parts.uri.path().rsplit('/').next().unwrap_or_default()) {
        Some(bytes) if parts.uri.path().starts_with("/bucket/models/acme/") => {
            file(parts, bytes, &[("etag", "\"e1\""), ("last-modified", "Fri, 21 Nov 2025 00:00:00 GMT")])
        }
        _ => status(404, &[]),
    })
    .await;
    let (sources, dir, done) = (sources(&server), tempfile::tempdir().unwrap(), AtomicU64::new(0));
    let listing = listing(&sources, "s3://bucket/models/acme").await;
    assert!(listing.identity.contains("e1"), "{}", listing.identity);
    sources.download_model(&listing, dir.path(), &done).await.unwrap();
    assert_eq!(std::fs::read(dir.path().join("model-00002-of-00002.safetensors")).unwrap(), SHARD);
}

#[tokio::test]
async fn a_model_in_a_cache_is_used_where_it_lies() {
    let server = Server::start(hub).await;
    let cache = tempfile::tempdir().unwrap();
    let repo = cache.path().join("models--acme--model");
    let snapshot = repo.join("snapshots").join(COMMIT);
    for dir in [repo.join("refs"), snapshot.clone()] {
        std::fs::create_dir_all(dir).unwrap();
    }
    std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
    for name in ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"] {
        std::fs::write(snapshot.join(name), bytes_of(name).unwrap()).unwrap();
    }
    let resolve = |is_offline| {
        let mut settings = quick();
        settings.hub.endpoint = server.url();
        settings.hub.cache_dirs = vec![cache.path().to_owned()];
        settings.hub.is_offline = is_offline;
        let sources = Sources::new(settings).unwrap();
        async move { sources.resolve_model(&ModelRef::parse("acme/model").unwrap()).await }
    };
    // One shard is missing: the cache does not hold the model.
    assert!(matches!(resolve(false).await, Ok(ModelPlace::Remote(_))));
    assert_eq!(clean(resolve(true).await), SourceError::Absent);
    std::fs::write(snapshot.join("model-00002-of-00002.safetensors"), SHARD).unwrap();
    for is_offline in [true, false] {
        assert!(matches!(resolve(is_offline).await, Ok(ModelPlace::Here(dir)) if dir == snapshot));
    }
}
