//! The console's page and the numbers it asks for.

use super::*;
use crate::engine::{BatchShare, ContentStatus, EngineCounters, Tier};
use crate::http::KeySpec;
use crate::http::auth::Peer;

fn get(path: &str, headers: &[(&str, &str)]) -> Request<Body> {
    let request = headers.iter().fold(Request::get(path), |request, (name, value)| request.header(*name, *value));
    request.body(Body::empty()).unwrap()
}

async fn answer(router: axum::Router, request: Request<Body>) -> (u16, axum::http::HeaderMap, String) {
    let response = router.oneshot(request).await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    (status, headers, text_of(response).await)
}

fn keyed() -> App {
    let keys = vec![KeySpec::plain(&"user".into()), KeySpec::admin(&"root".into())];
    app_with(&Script::new(), RouterConfig { keys, ..RouterConfig::default() })
}

#[tokio::test]
async fn the_root_is_a_page_for_browsers_and_readiness_for_programs() {
    let script = Script::new();
    let app = app(&script);
    for (accept, is_page) in [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", true),
        ("application/json, TEXT/HTML;q=0.5", true),
        ("*/*", false),
        ("text/html;q=0, */*", false),
        ("text/htmlx", false),
        ("", false),
    ] {
        for router in [app.router(), app.admin_router()] {
            let (status, headers, text) = answer(router, get("/", &[("accept", accept)])).await;
            assert_eq!((status, text.starts_with("<!doctype html>")), (200, is_page), "{accept}");
            assert_eq!(text.is_empty(), !is_page, "{accept}");
            assert_eq!(headers.get("vary").is_some(), is_page, "{accept}");
        }
    }
    script.inner.ready.store(false, Ordering::SeqCst);
    assert_eq!(answer(app.router(), get("/", &[("accept", "text/html")])).await.0, 200, "the page says what is wrong");
    assert_eq!(answer(app.router(), get("/", &[])).await.0, 503);
}

#[tokio::test]
async fn the_page_needs_no_key_names_only_its_own_files_and_lets_nothing_else_in() {
    let app = keyed();
    let (status, headers, page) = answer(app.router(), get("/console", &[])).await;
    assert_eq!(status, 200);
    let policy = headers["content-security-policy"].to_str().unwrap();
    for rule in ["default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"] {
        assert!(policy.contains(rule), "{policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains("http"), "{policy}");
    assert!(
        !page.contains("<script>") && !page.contains(" style=") && !page.contains("http"),
        "inline, or from elsewhere"
    );
    let named: Vec<&str> = page.split('"').filter(|part| part.starts_with("console/")).collect();
    assert!(named.len() >= 4, "{named:?}");
    let mut asked: Vec<String> = named.iter().map(|name| format!("/{name}")).collect();
    let mut at = 0;
    while let Some(path) = asked.get(at).cloned() {
        let (status, headers, text) = answer(app.router(), get(&path, &[])).await;
        assert_eq!((status, &headers["x-content-type-options"]), (200, &"nosniff".parse().unwrap()), "{path}");
        let tag = headers["etag"].to_str().unwrap();
        let again = answer(app.router(), get(&path, &[("if-none-match", tag)])).await;
        assert_eq!((again.0, again.2.as_str()), (304, ""), "{path}");
        let imports = text.split("from \"./").skip(1).filter_map(|rest| rest.split('"').next());
        for import in imports.map(|name| format!("/console/{name}")) {
            if !asked.contains(&import) {
                asked.push(import);
            }
        }
        at += 1;
    }
    assert!(asked.len() > 10, "{asked:?}");
    for unknown in ["/console/other.js", "/console/..%2Fmod.rs", "/console/"] {
        let status = answer(app.router(), get(unknown, &[])).await.0;
        assert!(matches!(status, 401 | 404), "{unknown}: {status}");
    }
}

/// The console of the operator's listener may ask what any program there may; no other page may.
#[tokio::test]
async fn only_the_listeners_own_page_is_no_stranger() {
    const HERE: &str = "127.0.0.1:8001";
    let own: &[(&str, &str)] = &[("host", HERE), ("sec-fetch-site", "same-origin")];
    let posted: &[(&str, &str)] =
        &[("host", HERE), ("sec-fetch-site", "same-origin"), ("origin", "http://127.0.0.1:8001")];
    let strangers: [&[(&str, &str)]; 9] = [
        &[("host", HERE), ("sec-fetch-site", "cross-site")],
        &[("host", HERE), ("sec-fetch-site", "same-site"), ("origin", "http://127.0.0.1:9000")],
        &[("host", HERE), ("sec-fetch-site", "none")],
        &[("host", HERE), ("origin", "http://127.0.0.1:8001")],
        &[("host", HERE), ("sec-fetch-site", "same-origin"), ("origin", "http://127.0.0.1:9000")],
        &[("host", HERE), ("sec-fetch-site", "same-origin"), ("origin", "null")],
        &[("sec-fetch-site", "same-origin"), ("origin", "http://127.0.0.1:8001")],
        // A name that was made to mean this machine.
        &[("host", "evil.example:8001"), ("sec-fetch-site", "same-origin")],
        &[("host", "evil.example:8001"), ("sec-fetch-site", "same-origin"), ("origin", "http://evil.example:8001")],
    ];
    let open = app(&Script::new());
    for path in ["/admin/v1/live", "/admin/v1/status", "/v1/models"] {
        for headers in [own, posted] {
            assert_eq!(answer(open.admin_router(), get(path, headers)).await.0, 200, "{path} {headers:?}");
        }
        for headers in strangers {
            assert_eq!(answer(open.admin_router(), get(path, headers)).await.0, 403, "{path} {headers:?}");
        }
    }
    // Its word opens nothing on the main port, and no door that has a key.
    let peer = Peer([127, 0, 0, 1].into());
    for (app, path, want) in
        [(&open, "/admin/v1/live", 404), (&keyed(), "/admin/v1/live", 401), (&keyed(), "/v1/models", 401)]
    {
        let mut request = get(path, posted);
        request.extensions_mut().insert(peer);
        assert_eq!(answer(app.router(), request).await.0, want, "{path}");
        if want == 401 {
            assert_eq!(answer(app.admin_router(), get(path, posted)).await.0, want, "{path}");
        }
    }
}

#[tokio::test]
async fn the_playground_on_the_operators_listener_asks_for_the_api_key() {
    let app = keyed();
    for (key, want) in [("user", 200), ("root", 403), ("wrong", 401)] {
        let bearer = format!("Bearer {key}");
        let got = answer(app.admin_router(), get("/v1/models", &[("authorization", &bearer)])).await;
        assert_eq!(got.0, want, "{key}: {}", got.2);
    }
}

/// Ten thousand adapters, of which 200 are on the device and 100 run.
fn crowd() -> EngineStatus {
    let content = |i: u32| {
        let mut id = [0; 32];
        id[..4].copy_from_slice(&i.to_be_bytes());
        ContentId(id)
    };
    let status = |i: u32| ContentStatus {
        tier: if i < 200 {
            Tier::Device
        } else if i < 1000 {
            Tier::Host
        } else {
            Tier::Disk
        },
        pinned: (i == 7).then_some(PinLevel::Device),
        draining: false,
        running: u32::from(i < 100),
        waiting: 0,
        pages: 1 + u32::from(i == 150),
        host_bytes: 1000,
    };
    let share = |i: u32| BatchShare { contents: vec![content(i)], running: 1, waiting: 0, running_tokens: 10 };
    EngineStatus {
        ready: true,
        running: 105,
        waiting: 1,
        pages_adapters: 201,
        resident: (0..200).map(content).collect(),
        contents: Arc::new((0..10_000).map(|i| (content(i), status(i))).collect()),
        batch: Arc::new(
            (0..100)
                .map(share)
                .chain([BatchShare { running: 5, waiting: 1, running_tokens: 50, ..BatchShare::default() }])
                .collect(),
        ),
        counters: EngineCounters { generation_tokens: 77, ..EngineCounters::default() },
        ..EngineStatus::default()
    }
}

#[tokio::test]
async fn live_numbers_of_ten_thousand_adapters_are_few_and_add_up() {
    let script = Script::new();
    *script.inner.status.lock().unwrap() = Some(Arc::new(crowd()));
    let app = app(&script);
    let (status, _, text) = answer(app.admin_router(), get("/admin/v1/live", &[])).await;
    assert_eq!(status, 200, "{text}");
    assert!(text.len() < 20_000, "{} bytes", text.len());
    let live: Value = serde_json::from_str(&text).unwrap();
    let sum =
        |list: &Value, of: &str| list.as_array().unwrap().iter().map(|one| one[of].as_u64().unwrap()).sum::<u64>();
    let batch = &live["batch"];
    assert_eq!(batch["shares"][0]["running"], 5, "the largest first: {}", batch["shares"][0]);
    assert_eq!(batch["shares"][0]["adapters"], serde_json::json!([]), "the base model has no adapter");
    assert_eq!(sum(&batch["shares"], "running") + batch["others"]["running"].as_u64().unwrap(), 105);
    assert_eq!(sum(&batch["shares"], "running_tokens") + batch["others"]["running_tokens"].as_u64().unwrap(), 1050);
    let pages = &live["pages"];
    assert_eq!(sum(&pages["adapters"], "pages") + pages["other_pages"].as_u64().unwrap(), 201);
    assert_eq!(pages["adapters"].as_array().unwrap().len() as u64 + pages["other_adapters"].as_u64().unwrap(), 200);
    assert_eq!(pages["adapters"][0]["content"].as_str().map(str::len), Some(16), "no name: the content, shortened");
    let tiers = &live["tiers"];
    let counts = ["device", "host", "disk"].map(|tier| tiers[tier]["adapters"].as_u64().unwrap());
    assert_eq!((counts, tiers["device"]["pinned"].as_u64()), ([200, 800, 9000], Some(1)));
    assert_eq!(live["totals"]["generation_tokens"], 77);
    let started = std::time::Instant::now();
    for _ in 0..20 {
        answer(app.admin_router(), get("/admin/v1/live?since=3", &[])).await;
    }
    assert!(started.elapsed() < Duration::from_secs(2), "{:?} for 20", started.elapsed());
    assert_eq!(answer(app.admin_router(), get("/admin/v1/live?since=-1", &[])).await.0, 400);
}

#[tokio::test]
async fn adapters_are_found_by_a_part_of_their_name_and_sorted() {
    let dir = adapter_dir(&["sql", "haiku", "sql-2", "tone"]);
    let script = Script::new().load("sql", Load::Ready(1)).load("haiku", Load::Ready(2)).load("sql-2", Load::Ready(3));
    let adapters = ["sql", "haiku", "sql-2", "tone"].map(|name| (name.to_owned(), dir.path().join(name))).to_vec();
    let app = app_with(&script, RouterConfig { adapters, ..RouterConfig::default() });
    assert_eq!(call(&app, "/v1/completions", serde_json::json!({"model": "haiku", "prompt": "a"})).await.0, 200);
    let list = async |query: &str| {
        let (status, _, text) = answer(app.admin_router(), get(&format!("/admin/v1/adapters?{query}"), &[])).await;
        let body: Value = serde_json::from_str(&text).unwrap();
        let names = body["data"]
            .as_array()
            .map(|data| data.iter().map(|view| view["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>());
        (status, names.unwrap_or_default().join(" "), body["total"].as_u64().unwrap_or_default())
    };
    assert_eq!(list("sort=name").await, (200, "haiku sql sql-2 tone".into(), 4));
    assert_eq!(list("sort=-name&limit=2").await, (200, "tone sql-2".into(), 4));
    assert_eq!(list("contains=SQL").await, (200, "sql sql-2".into(), 2));
    assert_eq!(list("sort=-last_used&limit=1").await, (200, "haiku".into(), 4));
    assert_eq!(list("sort=-rank&limit=1").await, (200, "haiku".into(), 4), "the others were never read");
    assert_eq!(list("offset=3").await, (200, "tone".into(), 4));
    assert_eq!(list("contains=no").await, (200, String::new(), 0));
    for wrong in ["sort=size", "sort=-", "offset=-1", "sort=name&after=x"] {
        assert_eq!(list(wrong).await.0, 400, "{wrong}");
    }
}
