//! Loading, inspecting and unloading over HTTP, with real directories and a scripted engine.

use std::time::Instant;

use super::*;
use crate::access::KeyPolicy;
use crate::adapters::sources::LocalSettings;
use crate::adapters::{
    AdapterSettings, FetchLimits, Fetcher, Registry, SourceKind, SourceSettings, Sources, Store, Supply,
};
use crate::http::{KeySpec, glob_set};
use serde_json::json;

/// A server that may read below one root, and the parts it stands on.
struct World {
    app: App,
    script: Script,
    root: tempfile::TempDir,
    _data: tempfile::TempDir,
}

fn world(script: Script, names: &[&str], keys: Vec<KeySpec>) -> World {
    let (root, data) = (adapter_dir(names), tempfile::tempdir().unwrap());
    let local = LocalSettings { roots: vec![root.path().to_owned()], ..LocalSettings::default() };
    let sources = Arc::new(Sources::new(SourceSettings { local, ..SourceSettings::default() }).unwrap());
    let store = Arc::new(Store::open(data.path(), 1 << 30).unwrap());
    let fetcher = Fetcher::new(Arc::clone(&sources) as _, Arc::clone(&store), FetchLimits::default());
    let supply = Supply::new(sources, vec![SourceKind::Local], fetcher, store);
    let settings = AdapterSettings { base_names: vec!["base".into()], ..AdapterSettings::default() };
    let engine: Arc<dyn Backend> = Arc::new(script.clone());
    let registry = Registry::open(settings, Arc::clone(&engine), Some(supply)).unwrap();
    let config = RouterConfig {
        keys,
        allow_runtime_adapters: true,
        adapter_load_timeout: Duration::from_millis(300),
        ..RouterConfig::default()
    };
    World { app: App::with_registry(config, byte_level(), engine, registry), script, root, _data: data }
}

fn loads() -> Script {
    Script::new()
        .load("sql", Load::Ready(1))
        .load("tone", Load::Ready(2))
        .load("slow", Load::Slow(3, Duration::from_secs(1)))
        .load("bad", Load::Fails("adapter_rank_limit"))
}

const NAMES: [&str; 4] = ["sql", "tone", "slow", "bad"];

impl World {
    fn path(&self, name: &str) -> String {
        self.root.path().join(name).display().to_string()
    }

    async fn send(&self, method: &str, path: &str, key: &str, body: Value) -> (u16, String, Response<Body>) {
        let mut request = Request::builder().method(method).uri(path);
        if !key.is_empty() {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let response = send(&self.app, request.body(Body::from(body.to_string())).unwrap()).await;
        let (parts, body) = response.into_parts();
        let text = text_of(Response::new(body)).await;
        (parts.status.as_u16(), text, Response::from_parts(parts, Body::empty()))
    }

    async fn load(&self, key: &str, name: &str, dir: &str) -> (u16, String) {
        let body = json!({"lora_name": name, "lora_path": self.path(dir)});
        let (status, text, _) = self.send("POST", "/v1/load_lora_adapter", key, body).await;
        (status, text)
    }

    async fn models(&self, key: &str) -> Vec<String> {
        let (_, text, _) = self.send("GET", "/v1/models", key, json!({})).await;
        let list: Value = serde_json::from_str(&text).unwrap();
        list["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap().to_owned()).collect()
    }
}

#[tokio::test]
async fn a_slow_load_is_503_with_a_time_and_goes_on() {
    let world = world(loads(), &NAMES, Vec::new());
    let body = json!({"lora_name": "s", "lora_path": world.path("slow")});
    let (status, text, response) = world.send("POST", "/v1/load_lora_adapter", "", body).await;
    assert_eq!(status, 503, "{text}");
    assert!(response.headers().contains_key("retry-after"));
    let error: Value = serde_json::from_str(&text).unwrap();
    assert!(error["error"]["message"].as_str().unwrap().starts_with("service unavailable:"), "{text}");
    assert_eq!(error["error"]["code"], "adapter_loading");
    assert_eq!(world.models("").await, ["base"], "listed once it is usable");
    let deadline = Instant::now() + Duration::from_secs(10);
    while world.models("").await.len() < 2 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(world.script.inner.load_count.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_caller_that_leaves_does_not_stop_its_load_and_the_next_one_joins_it() {
    let world = world(loads(), &NAMES, Vec::new());
    let body = json!({"lora_name": "s", "lora_path": world.path("slow")}).to_string();
    let first = send(&world.app, post("/v1/load_lora_adapter", body.clone()));
    assert!(tokio::time::timeout(Duration::from_millis(50), first).await.is_err());
    let query = "/admin/v1/adapters/s?wait=5s";
    let (status, text, _) = {
        let request = Request::put(query).body(Body::from(json!({"ref": world.path("slow")}).to_string())).unwrap();
        let response = world.app.admin_router().oneshot(request).await.unwrap();
        (response.status().as_u16(), text_of(response).await, ())
    };
    assert_eq!(status, 200, "{text}");
    assert_eq!(world.script.inner.load_count.load(Ordering::SeqCst), 1, "one load for both");
}

#[tokio::test]
async fn the_admin_api_answers_202_while_an_adapter_loads_and_422_with_a_report_when_it_is_bad() {
    let world = world(loads(), &NAMES, Vec::new());
    let put = |path: &str, dir: &str| {
        let body = json!({"ref": world.path(dir)}).to_string();
        world.app.admin_router().oneshot(Request::put(path).body(Body::from(body)).unwrap())
    };
    let response = put("/admin/v1/adapters/s?wait=0", "slow").await.unwrap();
    assert_eq!(response.status(), 202);
    let view = json_of(response).await;
    assert_eq!((view["name"].as_str(), view["state"] == "ready"), (Some("s"), false), "{view}");
    let response = put("/admin/v1/adapters/b", "bad").await.unwrap();
    assert_eq!(response.status(), 422);
    let body = json_of(response).await;
    assert_eq!(body["error"]["code"], "adapter_rank_limit");
    assert_eq!(body["report"]["refusals"][0]["code"], "adapter_rank_limit");
    let view = world.app.admin_router().oneshot(Request::get("/admin/v1/adapters/b").body(Body::empty()).unwrap());
    let view = json_of(view.await.unwrap()).await;
    assert_eq!((view["state"].as_str(), view["error"]["retryable"].as_bool()), (Some("failed"), Some(false)), "{view}");
}

#[tokio::test]
async fn keys_of_different_namespaces_do_not_see_each_other() {
    let key = |name: &str, namespace: &str, globs: Option<&str>| {
        let mut key = KeySpec::plain(&name.into());
        key.namespace = namespace.to_owned();
        let adapters = globs.map(|glob| glob_set(&[glob.to_owned()]).unwrap());
        key.policy = KeyPolicy { adapters, ..KeyPolicy::default() };
        key
    };
    let keys = vec![key("a", "acme", None), key("b", "bank", None), key("s", "", None), key("g", "acme", Some("t*"))];
    let world = world(loads(), &NAMES, keys);
    for (owner, name, dir) in [("a", "private", "sql"), ("b", "private", "tone"), ("s", "shared", "sql")] {
        let (status, text) = world.load(owner, name, dir).await;
        assert_eq!(status, 200, "{owner}: {text}");
    }
    let complete = |key: &'static str, model: &'static str| {
        let body = json!({"model": model, "prompt": "a"});
        let world = &world;
        async move { world.send("POST", "/v1/completions", key, body).await.0 }
    };
    for (key, model, want) in [
        ("a", "private", 200),
        ("b", "private", 200),
        ("s", "private", 404),
        ("g", "private", 404),
        ("a", "shared", 200),
        ("g", "shared", 404),
    ] {
        assert_eq!(complete(key, model).await, want, "{key} {model}");
    }
    assert_eq!(complete("a", "private").await, 200);
    assert_eq!(world.script.last().adapters[0].content.0[0], 1, "acme's own");
    assert_eq!(complete("b", "private").await, 200);
    assert_eq!(world.script.last().adapters[0].content.0[0], 2, "the bank's own");
    for round in 0..2 {
        for (key, want) in
            [("a", vec!["base", "private", "shared"]), ("s", vec!["base", "shared"]), ("g", vec!["base"])]
        {
            assert_eq!(world.models(key).await, want, "{key}, round {round}: the second comes from kept bodies");
        }
    }
    let (status, text) = world.load("g", "private", "sql").await;
    assert_eq!(status, 403, "{text}");
    let unload = json!({"lora_name": "private"});
    assert_eq!(world.send("POST", "/v1/unload_lora_adapter", "s", unload.clone()).await.0, 404, "not the shared key's");
    assert_eq!(world.send("POST", "/v1/unload_lora_adapter", "b", unload).await.0, 200);
    assert_eq!((complete("b", "private").await, complete("a", "private").await), (404, 200));
}

#[tokio::test]
async fn ten_thousand_adapters_are_listed_at_the_cost_of_a_copy() {
    let world = world(loads(), &NAMES, Vec::new());
    let (status, text) = world.load("", "first", "sql").await;
    assert_eq!(status, 200, "{text}");
    let count = 10_000;
    for i in 0..count {
        let ask = crate::adapters::LoadAsk::new(
            format!("a{i:05}"),
            crate::adapters::AdapterRef::parse(&world.path("sql")).unwrap(),
            crate::adapters::Wait::Until(Duration::from_secs(60)),
        );
        world.app.registry.load(ask).await.unwrap();
    }
    let list = || send(&world.app, Request::get("/v1/models").body(Body::empty()).unwrap());
    let body = json_of(list().await).await;
    assert_eq!(body["data"].as_array().unwrap().len(), count + 2);
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..50 {
        let began = Instant::now();
        let response = list().await;
        times.push(began.elapsed());
        assert_eq!(response.status(), 200);
    }
    let least = times.iter().min().unwrap();
    assert!(*least < Duration::from_micros(200), "{least:?}");
}
