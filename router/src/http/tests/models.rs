use super::*;
use serde_json::json;

fn config(dir: &tempfile::TempDir, registered: &[&str]) -> RouterConfig {
    RouterConfig {
        served_names: vec!["llama".into(), "meta/llama".into()],
        adapters: registered.iter().map(|name| ((*name).to_owned(), dir.path().join(name))).collect(),
        adapter_dirs: vec![dir.path().to_owned()],
        model_root: "demo://base".into(),
        ..RouterConfig::default()
    }
}

fn three() -> (Script, tempfile::TempDir) {
    let script = Script::new()
        .load("sql", Load::Ready(1))
        .load("tone", Load::Ready(2))
        .load("bad", Load::Fails("adapter_rank_limit"));
    (script, adapter_dir(&["sql", "tone", "bad"]))
}

async fn get(app: &App, path: &str) -> (StatusCode, Value) {
    let response = send(app, Request::get(path).body(Body::empty()).unwrap()).await;
    (response.status(), json_of(response).await)
}

#[tokio::test]
async fn a_model_name_selects_base_or_adapter() {
    let (script, dir) = three();
    let app = app_with(&script, config(&dir, &["sql"]));
    for (model, contents) in [
        ("", vec![]),
        ("llama", vec![]),
        ("meta/llama", vec![]),
        ("dummy", vec![]),
        ("tgi", vec![]),
        ("sql", vec![1]),
        ("tone", vec![2]),
        ("llama:tone", vec![2]),
    ] {
        let reply = complete(&app, json!({"model": model, "prompt": "a"})).await;
        assert_eq!(reply["model"], if model.is_empty() { "llama" } else { model });
        let used: Vec<u8> = script.last().adapters.iter().map(|a| a.content.0[0]).collect();
        assert_eq!(used, contents, "{model}");
    }
    for model in [
        "nope",
        "Sql",
        "llama:nope",
        "other:sql",
        "../sql",
        "sql/../sql",
        "a b",
        "sql@main",
        "hf://a/b",
        ".",
        "/etc/passwd",
        "llama:",
        "llama:tgi",
        "Dummy",
    ] {
        let (status, reply) = call(&app, "/v1/completions", json!({"model": model, "prompt": "a"})).await;
        assert_eq!((status.as_u16(), reply["error"]["code"].as_str()), (404, Some("model_not_found")), "{model}");
        assert_eq!(reply["error"]["param"], "model");
    }
    let (status, reply) = call(&app, "/v1/completions", json!({"model": "bad", "prompt": "a"})).await;
    assert_eq!((status.as_u16(), reply["error"]["code"].as_str()), (422, Some("adapter_rank_limit")));
    assert_eq!(reply["error"]["message"], "adapter `bad`: it is broken");
}

#[tokio::test]
async fn the_reply_names_what_answered() {
    let (script, dir) = three();
    let app = app_with(&script, config(&dir, &[]));
    for stream in [false, true] {
        let body = json!({"model": "sql", "prompt": "a", "stream": stream});
        let response = send(&app, post("/v1/completions", body.to_string())).await;
        let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(
            (header("x-model-id"), header("x-adapter-id"), header("x-adapter-source")),
            ("llama".into(), "sql".into(), "local".into())
        );
        assert_eq!(header("x-adapter-content-id"), "0101010101010101");
    }
}

#[tokio::test]
async fn scale_and_composition_reach_the_engine() {
    let (script, dir) = three();
    let app = app_with(&script, config(&dir, &[]));
    let uses = |script: &Script| script.last().adapters.iter().map(|a| (a.content.0[0], a.scale)).collect::<Vec<_>>();
    complete(&app, json!({"model": "sql", "prompt": "a", "adapter_scale": -0.5})).await;
    assert_eq!(uses(&script), [(1, -0.5)]);
    complete(&app, json!({"adapter_id": "tone", "adapter_source": "local", "prompt": "a"})).await;
    assert_eq!(uses(&script), [(2, 1.0)]);
    let parts = json!([{"adapter": "sql", "weight": 0.5}, {"adapter": "tone", "weight": 2}, {"adapter": "sql", "weight": 0.25}]);
    complete(&app, json!({"prompt": "a", "compose": parts})).await;
    assert_eq!(uses(&script), [(1, 0.75), (2, 2.0)], "the same content is added up");
    for (body, code) in [
        (json!({"model": "sql", "adapter_id": "tone"}), "adapter_ambiguous"),
        (json!({"model": "sql", "compose": [{"adapter": "tone", "weight": 1}]}), "adapter_ambiguous"),
        (json!({"adapters": ["sql"], "compose": [{"adapter": "tone", "weight": 1}]}), "adapter_ambiguous"),
        (json!({"adapter_id": "llama"}), "name_is_base_model"),
        (json!({"adapter_id": "sql", "adapter_source": "hub"}), "model_not_found"),
        (json!({"compose": [{"adapter": "nope", "weight": 1}]}), "model_not_found"),
        (json!({"compose": [{"adapter": "sql", "weight": 8}, {"adapter": "sql", "weight": 1}]}), "invalid_value"),
        (json!({"compose": [{"adapter": "sql", "weight": 9}]}), "invalid_value"),
        (json!({"compose": [{"adapter": "sql"}]}), "missing_field"),
        (json!({"compose": vec![json!({"adapter": "sql", "weight": 1}); 5]}), "invalid_value"),
    ] {
        let mut body = body;
        body["prompt"] = json!("a");
        let (_, reply) = call(&app, "/v1/completions", body.clone()).await;
        assert_eq!(reply["error"]["code"], code, "{body}");
    }
}

#[tokio::test]
async fn the_server_sets_how_many_adapters_a_request_may_compose() {
    let (script, dir) = three();
    for max in [1, 16] {
        let mut config = config(&dir, &[]);
        config.limits.composed_max = max;
        let app = app_with(&script, config);
        let parts = |n: usize| vec![json!({"adapter": "sql", "weight": 0.25}); n];
        for body in [
            |parts| json!({"prompt": "a", "compose": parts}),
            |parts| json!({"prompt": "a", "adapters": [{"compose": parts}]}),
        ] {
            complete(&app, body(parts(max))).await;
            let (status, reply) = call(&app, "/v1/completions", body(parts(max + 1))).await;
            assert_eq!((status.as_u16(), reply["error"]["code"].as_str()), (400, Some("invalid_value")));
            let message = reply["error"]["message"].as_str().unwrap();
            assert!(message.contains("--max-composed-adapters"), "{message}");
        }
    }
}

#[tokio::test]
async fn a_fan_out_gives_one_choice_per_entry() {
    let (script, dir) = three();
    let app = app_with(&script, config(&dir, &[]));
    let entries =
        json!(["base", "sql", {"adapter": "tone", "scale": 2}, {"compose": [{"adapter": "sql", "weight": 0.5}]}]);
    let body = json!({"prompt": ["ab", "c"], "adapters": entries, "max_tokens": 1, "n": 2});
    let reply = complete(&app, body).await;
    let choices = reply["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 16);
    assert!(choices.iter().enumerate().all(|(i, c)| c["index"] == i));
    let labels: Vec<_> = choices.iter().step_by(2).map(|c| c["adapter"].as_str().unwrap()).collect();
    assert_eq!(labels, ["base", "sql", "tone", "sql*0.5", "base", "sql", "tone", "sql*0.5"]);
    assert_eq!(reply["usage"]["prompt_tokens"], 4 * 3, "once per entry");
    let (_, reply) = call(&app, "/v1/completions", json!({"prompt": vec!["a"; 65], "adapters": vec!["sql"; 4]})).await;
    assert_eq!(reply["error"]["code"], "invalid_value", "260 sequences");
}

#[tokio::test]
async fn adapters_are_listed_once_they_can_serve() {
    let (script, dir) = three();
    let app = app_with(&script, config(&dir, &["sql", "bad"]));
    let ids = |list: &Value| {
        list["data"].as_array().unwrap().iter().map(|c| c["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let (_, list) = get(&app, "/v1/models").await;
    assert_eq!(ids(&list), ["llama", "meta/llama"]);
    assert_eq!(list["data"][0]["root"], "demo://base");
    assert!(list["data"][0].get("parent").is_none());
    assert_eq!(list["data"][0]["max_model_len"], CONTEXT);
    app.preload();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while ids(&get(&app, "/v1/models").await.1).len() < 3 {
        assert!(std::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let (status, card) = get(&app, "/v1/models/sql").await;
    assert_eq!(status, 200);
    assert_eq!(
        (&card["parent"], &card["object"], &card["owned_by"]),
        (&json!("llama"), &json!("model"), &json!("loramux"))
    );
    assert_eq!(card["loramux"], json!({"content_id": "0101010101010101", "rank": 16}));
    for path in ["/v1/models/meta%2Fllama", "/v1/models/meta/llama"] {
        assert_eq!(get(&app, path).await.1["id"], "meta/llama");
    }
    for missing in ["bad", "tone", "nope", "%2e%2e"] {
        let (status, reply) = get(&app, &format!("/v1/models/{missing}")).await;
        assert_eq!((status.as_u16(), reply["error"]["code"].as_str()), (404, Some("model_not_found")));
    }
}

#[tokio::test]
async fn a_cold_adapter_can_be_waited_for_or_not() {
    let script = Script::new().load("slow", Load::Slow(3, Duration::from_millis(200)));
    let dir = adapter_dir(&["slow"]);
    let app = app_with(&script, config(&dir, &[]));
    for body in [json!({"adapter_wait": "fail"}), json!({"adapter_load_timeout_ms": 1})] {
        let mut body = body;
        (body["model"], body["prompt"]) = (json!("slow"), json!("a"));
        let response = send(&app, post("/v1/completions", body.to_string())).await;
        assert_eq!(response.status(), 503);
        assert!(response.headers()["retry-after"].to_str().unwrap().parse::<u32>().unwrap() >= 1);
        assert_eq!(json_of(response).await["error"]["code"], "adapter_loading");
    }
    complete(&app, json!({"model": "slow", "prompt": "a"})).await;
    assert_eq!(script.inner.load_count.load(Ordering::SeqCst), 1, "one load for all of them");
}

#[tokio::test]
async fn a_load_that_panics_is_tried_again() {
    let script = Script::new().load("a", Load::Panics);
    let dir = adapter_dir(&["a"]);
    let app = app_with(&script, config(&dir, &[]));
    let body = json!({"model": "a", "prompt": "x"});
    let (status, reply) = call(&app, "/v1/completions", body.clone()).await;
    assert_eq!((status.as_u16(), reply["error"]["code"].as_str()), (503, Some("adapter_load_failed")));
    let _ = script.clone().load("a", Load::Ready(1));
    complete(&app, body).await;
}

#[tokio::test]
async fn keys_are_needed_everywhere_but_for_health() {
    let config = RouterConfig {
        keys: ["k1", "k2"].map(|key| crate::http::KeySpec::plain(&key.into())).to_vec(),
        ..RouterConfig::default()
    };
    let script = Script::new();
    let app = app_with(&script, config);
    let with = |path: &str, method: &str, key: Option<&str>| {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(key) = key {
            request = request.header("authorization", key);
        }
        request.body(Body::from("{\"prompt\":\"a\"}")).unwrap()
    };
    let closed = [
        ("/v1/models", "GET"),
        ("/v1/models/base", "GET"),
        ("/v1/completions", "POST"),
        ("/v1/chat/completions", "POST"),
        ("/v1/embeddings", "POST"),
        ("/tokenize", "POST"),
        ("/detokenize", "POST"),
        ("/version", "GET"),
        ("/load", "GET"),
        ("/nope", "GET"),
        ("/v1/../health", "GET"),
        ("//health", "GET"),
        ("/health/", "GET"),
        ("/HEALTH", "GET"),
    ];
    for (path, method) in closed {
        for key in
            [None, Some("Bearer k3"), Some("Bearer "), Some("k1"), Some("Basic k1"), Some("Bearer k1x"), Some("Bearer")]
        {
            let response = send(&app, with(path, method, key)).await;
            assert_eq!(response.status(), 401, "{path} {key:?}");
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
            let reply = json_of(response).await;
            assert_eq!(
                (reply["error"]["type"].as_str(), reply["error"]["code"].as_str()),
                (Some("authentication_error"), Some("invalid_api_key"))
            );
        }
    }
    for path in ["/", "/health", "/health/live", "/health/ready", "/health/startup", "/startup", "/ping", "/metrics"] {
        assert_eq!(send(&app, with(path, "GET", None)).await.status(), 200, "{path}");
    }
    let mut tenants = Vec::new();
    for key in ["Bearer k1", "bearer k2", "BEARER  k1 "] {
        assert_eq!(send(&app, with("/v1/completions", "POST", Some(key))).await.status(), 200, "{key}");
        tenants.push(script.last().tenant);
    }
    assert_eq!(tenants[0], tenants[2]);
    assert_ne!(tenants[0], tenants[1], "prefix sharing stops between keys");
}

#[tokio::test]
async fn text_can_be_tokenized_and_back() {
    let app = app(&Script::new());
    let (_, reply) = call(&app, "/tokenize", json!({"prompt": "é!", "return_token_strs": true})).await;
    let merged = reply["tokens"][0].as_u64().unwrap();
    assert_eq!(reply, json!({"count": 2, "max_model_len": CONTEXT, "tokens": [merged, 36], "token_strs": ["é", "!"]}));
    let (_, reply) = call(
        &app,
        "/tokenize",
        json!({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": false}),
    )
    .await;
    let (_, back) = call(&app, "/detokenize", json!({"model": "base", "tokens": reply["tokens"]})).await;
    assert_eq!(back, json!({"prompt": "<|im_start|>user\nx<|im_end|>\n"}));
    let (_, reply) = call(&app, "/tokenize", json!({"inputs": "aé"})).await;
    assert_eq!(
        reply,
        json!([{"id": 100, "text": "a", "start": 0, "stop": 1}, {"id": merged, "text": "é", "start": 1, "stop": 2}])
    );
    for (path, body, status) in [
        ("/tokenize", json!({}), 400),
        ("/tokenize", json!({"model": "x", "prompt": "a"}), 404),
        ("/tokenize", json!({"prompt": 1}), 400),
        ("/detokenize", json!({}), 400),
        ("/detokenize", json!({"tokens": [300]}), 400),
        ("/detokenize", json!({"tokens": ["a"]}), 400),
    ] {
        assert_eq!(call(&app, path, body).await.0, status);
    }
}
