//! Who may call what: keys, admin keys, trusted peers, both listeners.

use super::*;
use crate::access::KeyPolicy;
use crate::http::KeySpec;
use crate::http::auth::Peer;
use serde_json::json;

fn plain(key: &str) -> KeySpec {
    KeySpec::plain(&key.into())
}

fn admin(key: &str) -> KeySpec {
    KeySpec::admin(&key.into())
}

/// A server with an API key, an admin key, both or none.
fn server(keys: bool, admins: bool, runtime: bool) -> App {
    let mut config = RouterConfig { allow_runtime_adapters: runtime, ..RouterConfig::default() };
    config.keys.extend(keys.then(|| plain("user")));
    config.keys.extend(admins.then(|| admin("root")));
    app_with(&Script::new(), config)
}

fn ask(method: &str, path: &str, key: &str) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path);
    if !key.is_empty() {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    request.body(Body::from("{}")).unwrap()
}

/// Status and code; a body that is no error has code ``.
async fn outcome(router: axum::Router, request: Request<Body>) -> (u16, String) {
    let response = router.oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let text = text_of(response).await;
    let body: Value = serde_json::from_str(&text).unwrap_or_default();
    (status, body["error"]["code"].as_str().unwrap_or("").to_owned())
}

const ADMIN_ROUTES: [(&str, &str); 13] = [
    ("GET", "/admin/v1/live"),
    ("GET", "/admin/v1/adapters"),
    ("GET", "/admin/v1/adapters/a"),
    ("PUT", "/admin/v1/adapters/a"),
    ("DELETE", "/admin/v1/adapters/a%2Fb"),
    ("POST", "/admin/v1/adapters/validate"),
    ("POST", "/admin/v1/adapters/a/pin"),
    ("POST", "/admin/v1/adapters/a/unpin"),
    ("GET", "/admin/v1/aliases/a"),
    ("PUT", "/admin/v1/aliases/a"),
    ("DELETE", "/admin/v1/aliases/a"),
    ("POST", "/admin/v1/aliases/a/rollback"),
    ("GET", "/admin/v1/status"),
];
const RUNTIME_ROUTES: [&str; 4] =
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"];

#[tokio::test]
async fn the_admin_api_is_for_admin_keys_alone() {
    for (keys, admins) in [(false, false), (true, false), (false, true), (true, true)] {
        let app = server(keys, admins, false);
        for (method, path) in ADMIN_ROUTES {
            for key in ["", "user", "root", "wrong"] {
                let got = outcome(app.router(), ask(method, path, key)).await;
                let known = (key == "user" && keys) || (key == "root" && admins);
                let want = match (known, key, admins) {
                    (true, "root", _) => None,
                    (true, _, true) => Some((403, "route_forbidden")),
                    (true, _, false) => Some((404, "route_not_found")),
                    (false, _, _) if admins || keys => Some((401, "invalid_api_key")),
                    _ => Some((404, "route_not_found")),
                };
                match want {
                    Some((status, code)) => assert_eq!(got, (status, code.into()), "{keys} {admins} {path} `{key}`"),
                    None => assert!(!matches!(got.0, 401 | 403 | 405) && got.1 != "route_not_found", "{path}: {got:?}"),
                }
            }
        }
        // An admin key opens nothing else; on an open server it is as good as no key.
        for (method, path) in [("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/tokenize")] {
            let got = outcome(app.router(), ask(method, path, "root")).await;
            let want = match (keys, admins) {
                (true, true) => 403,
                (true, false) => 401,
                (false, _) if method == "POST" => 400,
                (false, _) => 200,
            };
            assert_eq!(got.0, want, "{keys} {admins} {path}: {got:?}");
        }
    }
}

#[tokio::test]
async fn the_operators_listener_asks_for_a_key_only_where_there_is_one_and_serves_no_web_page() {
    for admins in [false, true] {
        let app = server(true, admins, false);
        for (key, want) in [("", !admins), ("root", true), ("user", !admins), ("wrong", !admins)] {
            let got = outcome(app.admin_router(), ask("GET", "/admin/v1/status", key)).await;
            assert_eq!(got.0 == 200, want, "{admins} `{key}`: {got:?}");
        }
        for header in ["origin", "sec-fetch-site"] {
            let mut request = ask("POST", "/admin/v1/drain", "");
            request.headers_mut().insert(header, "https://evil.example".parse().unwrap());
            assert!(matches!(outcome(app.admin_router(), request).await.0, 401 | 403));
        }
        assert!(!app.is_draining());
        for path in ["/v1/embeddings", "/generate", "/v1/load_lora_adapter"] {
            assert_eq!(
                outcome(app.admin_router(), ask("GET", path, "root")).await,
                (404, "route_not_found".into()),
                "{path}"
            );
        }
    }
}

#[tokio::test]
async fn the_operators_listener_answers_to_this_machines_names_only_wherever_they_are_written() {
    let app = server(false, false, false);
    for (target, host, want) in [
        ("http://127.0.0.1:8001", None, 200),
        ("http://[::1]:8001", Some("localhost"), 200),
        ("", Some("localhost:8001"), 200),
        ("", Some("evil.example"), 403),
        // HTTP/2 has the name in its target, and so may HTTP/1.1.
        ("http://evil.example", None, 403),
        ("http://evil.example", Some("localhost"), 403),
        ("http://localhost", Some("evil.example"), 403),
        ("http://localhost@evil.example", None, 403),
    ] {
        let mut request = ask("GET", "/admin/v1/status", "");
        *request.uri_mut() = format!("{target}/admin/v1/status").parse().unwrap();
        request.headers_mut().extend(host.map(|host| (axum::http::header::HOST, host.parse().unwrap())));
        assert_eq!(outcome(app.admin_router(), request).await.0, want, "{target} {host:?}");
    }
}

#[tokio::test]
async fn adapters_are_loaded_over_the_main_port_only_where_that_is_on() {
    for path in RUNTIME_ROUTES {
        for (keys, admins, runtime) in [
            (false, false, false),
            (false, false, true),
            (true, false, false),
            (true, false, true),
            (true, true, false),
        ] {
            let app = server(keys, admins, runtime);
            for key in ["", "user", "root"] {
                let got = outcome(app.router(), ask("POST", path, key)).await;
                let want = match (keys, admins, runtime, key) {
                    (false, false, false, _) | (true, false, false, "user") => "runtime_adapters_disabled",
                    (true, _, _, "") | (true, false, _, "root") => "invalid_api_key",
                    (true, true, _, "user") => "route_forbidden",
                    // Let in: the empty body is what is wrong now. SGLang's shape has no code.
                    _ if path.starts_with("/v1") => "missing_field",
                    _ => "",
                };
                assert_eq!(got.1, want, "{path} {keys} {admins} {runtime} `{key}`: {}", got.0);
            }
        }
    }
}

#[tokio::test]
async fn only_a_trusted_socket_of_this_machine_needs_no_key() {
    let config = |trust| RouterConfig {
        keys: vec![plain("user"), admin("root")],
        trust_loopback_adapters: trust,
        ..RouterConfig::default()
    };
    for trust in [false, true] {
        let app = app_with(&Script::new(), config(trust));
        for (peer, local) in
            [("127.0.0.1", true), ("127.9.9.9", true), ("::1", true), ("::ffff:127.0.0.1", true), ("10.0.0.1", false)]
        {
            for (method, path, exempt) in [
                ("GET", "/v1/models", true),
                ("POST", "/v1/load_lora_adapter", true),
                ("POST", "/v1/unload_lora_adapter", true),
                ("POST", "/load_lora_adapter", false),
                ("POST", "/v1/completions", false),
                ("GET", "/v1/models/x", false),
                ("GET", "/admin/v1/status", false),
            ] {
                let mut request = ask(method, path, "");
                request.extensions_mut().insert(Peer(peer.parse().unwrap()));
                let got = outcome(app.router(), request).await;
                assert_eq!(got.0 != 401, trust && local && exempt, "{trust} {peer} {path}: {got:?}");
            }
        }
        // A header is no socket.
        for header in ["x-forwarded-for", "x-real-ip", "forwarded", "host"] {
            let mut request = ask("GET", "/v1/models", "");
            request.headers_mut().insert(header, "127.0.0.1".parse().unwrap());
            assert_eq!(outcome(app.router(), request).await.0, 401, "{header}");
        }
    }
}

#[tokio::test]
async fn a_guesser_is_slowed_down_and_nobody_else() {
    let app = server(true, true, false);
    let from = |key: &str, peer: [u8; 4]| {
        let mut request = ask("GET", "/v1/models", key);
        request.extensions_mut().insert(Peer(peer.into()));
        request
    };
    let mut limited = 0;
    for i in 0..40 {
        let response = app.router().oneshot(from(&format!("guess-{i}"), [9, 9, 9, 9])).await.unwrap();
        if response.status() == 429 {
            limited += 1;
            assert!(response.headers().contains_key("retry-after"));
        }
    }
    assert_eq!(limited, 10);
    assert_eq!(outcome(app.router(), from("user", [9, 9, 9, 9])).await.0, 200, "the right key from the same address");
    assert_eq!(outcome(app.router(), from("guess", [9, 9, 9, 8])).await.0, 401, "another address");
    assert_eq!(outcome(app.router(), from("", [9, 9, 9, 9])).await.0, 401, "no key is no guess");
}

#[tokio::test]
async fn a_key_has_its_rates() {
    let mut key = plain("user");
    key.policy = KeyPolicy { requests_per_minute: Some(3), ..KeyPolicy::default() };
    let config = RouterConfig { keys: vec![key.clone(), plain("other")], ..RouterConfig::default() };
    let app = app_with(&Script::new(), config);
    let complete = |key: &str| {
        let mut request = ask("POST", "/v1/completions", key);
        *request.body_mut() = Body::from(json!({"prompt": "a"}).to_string());
        request
    };
    for _ in 0..3 {
        assert_eq!(outcome(app.router(), complete("user")).await.0, 200);
    }
    let response = app.router().oneshot(complete("user")).await.unwrap();
    assert_eq!(response.status(), 429);
    assert!((15..=20).contains(&response.headers()["retry-after"].to_str().unwrap().parse::<u32>().unwrap()));
    assert_eq!(json_of(response).await["error"]["code"], "rate_limited");
    assert_eq!(outcome(app.router(), ask("GET", "/v1/models", "user")).await.0, 200, "looking is free");
    assert_eq!(outcome(app.router(), complete("other")).await.0, 200);
    app.set_keys(&[key]);
    assert_eq!(outcome(app.router(), complete("user")).await.0, 429, "a reload is no refill");
    assert_eq!(outcome(app.router(), complete("other")).await.0, 401, "this key is gone");
}

#[tokio::test]
async fn tokens_are_charged_to_the_key_that_asked() {
    let mut key = plain("user");
    key.policy = KeyPolicy { tokens_per_minute: Some(12), ..KeyPolicy::default() };
    let app = app_with(&Script::new(), RouterConfig { keys: vec![key], ..RouterConfig::default() });
    let complete = || {
        let mut request = ask("POST", "/v1/completions", "user");
        *request.body_mut() = Body::from(json!({"prompt": "abc", "max_tokens": 8}).to_string());
        request
    };
    // A prompt of at least 3 tokens and 8 of completion: the second request finds at most one token left.
    assert_eq!(outcome(app.router(), complete()).await.0, 200);
    let _ = outcome(app.router(), complete()).await;
    assert_eq!(outcome(app.router(), complete()).await, (429, "rate_limited".into()));
}

#[tokio::test]
async fn a_stream_counts_as_running_until_it_ends() {
    let mut key = plain("user");
    key.policy = KeyPolicy { concurrent_max: Some(1), ..KeyPolicy::default() };
    let script = Script::new();
    script.inner.hang.store(true, Ordering::SeqCst);
    let app = app_with(&script, RouterConfig { keys: vec![key], ..RouterConfig::default() });
    let stream = || {
        let mut request = ask("POST", "/v1/completions", "user");
        *request.body_mut() = Body::from(json!({"prompt": "a", "stream": true}).to_string());
        request
    };
    let running = app.router().oneshot(stream()).await.unwrap();
    assert_eq!(running.status(), 200);
    assert_eq!(outcome(app.router(), stream()).await, (429, "rate_limited".into()));
    drop(running);
    script.until_none_is_open().await;
    assert_eq!(app.router().oneshot(stream()).await.unwrap().status(), 200);
}

#[tokio::test]
async fn no_answer_and_no_page_repeats_a_secret() {
    const CANARY: &str = "canary-5f1c7e";
    let dir = adapter_dir(&["sql"]);
    let script = Script::new().load("sql", Load::Fails("adapter_load_failed"));
    let config = RouterConfig {
        keys: vec![plain(&format!("{CANARY}-key")), admin(&format!("{CANARY}-admin"))],
        adapter_dirs: vec![dir.path().to_owned()],
        allow_runtime_adapters: true,
        ..RouterConfig::default()
    };
    assert!(!format!("{config:?}").contains(CANARY));
    for config in [config, RouterConfig { adapter_dirs: vec![dir.path().to_owned()], ..RouterConfig::default() }] {
        let app = app_with(&script, config);
        let bodies = [
            json!({"model": "sql", "prompt": "a", "api_token": CANARY}),
            json!({"model": "sql", "prompt": "a", "api_token": [CANARY]}),
            json!({"model": format!("https://u:{CANARY}@h/x?sig={CANARY}"), "prompt": "a"}),
            json!({"lora_name": "x", "lora_path": format!("https://u:{CANARY}@h/x?sig={CANARY}#{CANARY}")}),
        ];
        let paths = ["/v1/completions", "/tokenize", "/v1/load_lora_adapter", "/load_lora_adapter", "/admin/v1/drain"];
        for (path, body) in paths.iter().flat_map(|path| bodies.iter().map(move |body| (path, body))) {
            for bearer in [format!("{CANARY}-key"), format!("{CANARY}-wrong"), format!("hf_{CANARY}")] {
                for token in [CANARY.to_owned(), format!("{CANARY}\u{1}"), CANARY.repeat(400)] {
                    let request = Request::post(*path)
                        .header("authorization", format!("Bearer {bearer}"))
                        .header("x-adapter-token", token.as_bytes());
                    let Ok(request) = request.body(Body::from(body.to_string())) else { continue };
                    let response = send(&app, request).await;
                    assert!(!format!("{:?}", response.headers()).contains(CANARY), "{path}");
                    let text = text_of(response).await;
                    assert!(!text.contains(CANARY), "{path} {body}: {text}");
                }
            }
        }
        let page = text_of(send(&app, ask("GET", "/metrics", "")).await).await;
        assert!(!page.contains(CANARY));
    }
}
