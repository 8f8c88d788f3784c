use super::*;
use crate::http::{ApiError, Cause};
use serde_json::json;

async fn error_of(app: &App, request: Request<Body>) -> (u16, Value) {
    let response = send(app, request).await;
    let status = response.status().as_u16();
    assert_eq!(response.headers()["content-type"], "application/json");
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let body = json_of(response).await;
    let error = &body["error"];
    assert_eq!(error["request_id"], id);
    let keys: Vec<_> = error.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["message", "type", "param", "code", "retryable", "request_id"]);
    assert!(!error["message"].as_str().unwrap().is_empty());
    (status, body)
}

#[tokio::test]
async fn every_refusal_has_the_one_body() {
    let script = Script::new();
    let mut config = RouterConfig::default();
    (config.limits.body_bytes, config.limits.header_bytes, config.limits.headers_max) = (100, 1000, 10);
    config.limits.body_timeout = Duration::from_millis(30);
    let app = app_with(&script, config);
    let many = (0..11).fold(Request::get("/version"), |request, i| request.header(format!("x-{i}"), "1"));
    let slow = Body::from_stream(futures_util::stream::pending::<Result<bytes::Bytes, std::io::Error>>());
    let chunks =
        futures_util::stream::iter((0..3).map(|_| Ok::<_, std::io::Error>(bytes::Bytes::from(vec![b' '; 50]))));
    let cases = [
        (Request::get("/nope").body(Body::empty()).unwrap(), 404, "route_not_found"),
        (Request::get("/v1/completions").body(Body::empty()).unwrap(), 405, "method_not_allowed"),
        (Request::delete("/v1/models").body(Body::empty()).unwrap(), 405, "method_not_allowed"),
        (
            Request::post("/v1/completions").header("content-type", "text/plain").body(Body::from("{}")).unwrap(),
            415,
            "unsupported_media_type",
        ),
        (
            Request::post("/v1/completions").header("content-encoding", "gzip").body(Body::from("{}")).unwrap(),
            415,
            "unsupported_media_type",
        ),
        (post("/v1/completions", "x".repeat(101)), 413, "body_too_large"),
        (
            Request::post("/tokenize").header("content-length", "99999999999").body(Body::empty()).unwrap(),
            413,
            "body_too_large",
        ),
        (post("/v1/completions", Body::from_stream(chunks)), 413, "body_too_large"),
        (post("/v1/completions", slow), 408, "body_timeout"),
        (many.body(Body::empty()).unwrap(), 431, "headers_too_large"),
        (
            Request::get("/version").header("x-long", "y".repeat(1001)).body(Body::empty()).unwrap(),
            431,
            "headers_too_large",
        ),
        (post("/v1/embeddings", "{}"), 400, "missing_field"),
        (post("/v1/completions", "{}"), 400, "missing_field"),
    ];
    for (request, status, code) in cases {
        let what = format!("{} {}", request.method(), request.uri());
        let (got, body) = error_of(&app, request).await;
        assert_eq!((got, body["error"]["code"].as_str()), (status, Some(code)), "{what}");
        let retryable = status == 408;
        assert_eq!(body["error"]["retryable"], retryable);
    }
    for content_type in ["application/json", "Application/JSON; charset=utf-8"] {
        let request = Request::post("/v1/completions")
            .header("content-type", content_type)
            .body(Body::from("{\"prompt\":\"a\"}"));
        assert_eq!(send(&app, request.unwrap()).await.status(), 200);
    }
    assert_eq!(
        send(&app, Request::post("/v1/completions").body(Body::from("{\"prompt\":\"a\"}")).unwrap()).await.status(),
        200
    );
}

#[test]
fn every_cause_has_its_row_and_only_the_right_ones_invite_a_retry() {
    for cause in Cause::ALL {
        let row = cause.row();
        let response = ApiError::new(cause, "m").response("id");
        assert_eq!(response.status(), row.status);
        let overloaded = matches!(row.status.as_u16(), 429 | 503);
        assert_eq!(response.headers().contains_key("retry-after"), overloaded, "{cause:?}");
        let retryable = overloaded || matches!(row.status.as_u16(), 408 | 504) || cause == Cause::ShardFault;
        assert_eq!(row.retryable, retryable, "{cause:?}");
        let kind = match row.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        assert_eq!(row.kind, kind, "{cause:?}");
    }
    let codes: std::collections::HashSet<_> = Cause::ALL.iter().map(|cause| cause.row().code).collect();
    assert_eq!(codes.len(), Cause::ALL.len());
}

#[tokio::test]
async fn a_panic_is_a_500_with_the_one_body() {
    let app = app(&Script::new());
    let router = axum::Router::new()
        .route("/panic", axum::routing::get(|| async { panic!("scripted") as () }))
        .route("/bare", axum::routing::get(|| async { StatusCode::IM_A_TEAPOT }))
        .layer(axum::middleware::from_fn_with_state(app.clone(), crate::http::envelope::envelope));
    for (path, status, code) in [("/panic", 500, "internal_error"), ("/bare", 400, "invalid_value")] {
        let response = router.clone().oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(response.status().as_u16(), status);
        let body = json_of(response).await;
        assert_eq!(body["error"]["code"], code);
        assert!(!body["error"]["message"].as_str().unwrap().contains("scripted"), "what panicked is not told");
    }
}

#[tokio::test]
async fn the_clients_request_id_is_kept_if_it_is_one() {
    let app = app(&Script::new());
    for (sent, kept) in
        [("abc-1.2_X", true), ("", false), ("a b", false), ("é", false), ("<script>", false), (&"x".repeat(129), false)]
    {
        let request = Request::get("/version").header("x-request-id", sent.as_bytes()).body(Body::empty()).unwrap();
        let response = send(&app, request).await;
        let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
        assert_eq!(id == sent, kept, "{sent}");
        assert!(kept || id.len() == 32);
    }
}

#[tokio::test]
async fn a_deadline_is_the_shorter_of_the_clients_and_the_servers() {
    let config = RouterConfig { request_timeout: Some(Duration::from_secs(10)), ..RouterConfig::default() };
    let script = Script::new();
    let app = app_with(&script, config);
    for (sent, expected) in [(None, 10_000), (Some("2.5"), 2500), (Some("99"), 10_000)] {
        let mut request = post("/v1/completions", "{\"prompt\":\"a\"}");
        if let Some(sent) = sent {
            request.headers_mut().insert("x-request-timeout", sent.parse().unwrap());
        }
        assert_eq!(send(&app, request).await.status(), 200);
        assert_eq!(script.last().deadline_ms, Some(expected));
    }
    for bad in ["0", "-1", "x", "inf", "NaN"] {
        let mut request = post("/v1/completions", "{\"prompt\":\"a\"}");
        request.headers_mut().insert("x-request-timeout", bad.parse().unwrap());
        let (status, body) = error_of(&app, request).await;
        assert_eq!((status, body["error"]["param"].as_str()), (400, Some("x-request-timeout")), "{bad}");
    }
}

#[tokio::test]
async fn health_follows_the_engine() {
    let script = Script::new();
    let app = app(&script);
    let get = |path: &str| Request::get(path).body(Body::empty()).unwrap();
    for path in ["/", "/health", "/health/ready", "/health/live", "/health/startup", "/startup", "/ping"] {
        let response = send(&app, get(path)).await;
        assert_eq!(response.status(), 200);
        assert_eq!(text_of(response).await, "");
    }
    assert_eq!(send(&app, Request::post("/ping").body(Body::empty()).unwrap()).await.status(), 200);
    script.inner.ready.store(false, Ordering::SeqCst);
    for path in ["/", "/health", "/health/ready", "/health/startup", "/startup", "/ping", "/v1/models"] {
        let (status, body) = error_of(&app, get(path)).await;
        assert_eq!((status, body["error"]["code"].as_str()), (503, Some("not_ready")), "{path}");
    }
    let (status, _) = error_of(&app, post("/v1/completions", "{\"prompt\":\"a\"}")).await;
    assert_eq!(status, 503);
    assert_eq!(send(&app, get("/health/live")).await.status(), 200);
    script.inner.ready.store(true, Ordering::SeqCst);
    app.begin_drain();
    for request in [get("/health"), post("/v1/completions", "{\"prompt\":\"a\"}")] {
        let (status, body) = error_of(&app, request).await;
        assert_eq!((status, body["error"]["code"].as_str()), (503, Some("draining")));
    }
    assert_eq!(send(&app, get("/health/live")).await.status(), 200);
}

#[tokio::test]
async fn service_routes_answer() {
    let script = Script::new();
    let app = app(&script);
    let get = |path: &str| Request::get(path).body(Body::empty()).unwrap();
    assert_eq!(json_of(send(&app, get("/version")).await).await, json!({"version": env!("CARGO_PKG_VERSION")}));
    assert_eq!(json_of(send(&app, get("/load")).await).await, json!({"server_load": 7}));
    complete(&app, json!({"prompt": "a"})).await;
    send(&app, get("/nope")).await;
    let response = send(&app, get("/metrics")).await;
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let page = text_of(response).await;
    for line in [
        "vllm:num_requests_running{model_name=\"base\",engine=\"0\"} 3",
        "vllm:num_requests_waiting{model_name=\"base\",engine=\"0\"} 4",
        "vllm:kv_cache_usage_perc{model_name=\"base\",engine=\"0\"} 0.5",
        "vllm:request_success_total{model_name=\"base\",engine=\"0\",finished_reason=\"stop\"} 1",
        "vllm:time_to_first_token_seconds_count{model_name=\"base\",engine=\"0\"} 1",
        "loramux_rejected_total{code=\"route_not_found\"} 1",
        "# TYPE vllm:e2e_request_latency_seconds histogram",
    ] {
        assert!(page.lines().any(|l| l == line), "{line} is missing in\n{page}");
    }
    assert_eq!(page.matches("\nvllm:lora_requests_info{").count(), 1);
    assert!(page.len() < 64 * 1024);
    let mut families: Vec<_> = page.lines().filter(|l| l.starts_with("# TYPE")).collect();
    let count = families.len();
    families.dedup();
    assert_eq!(families.len(), count, "each family once");
    let well_formed = |line: &&str| line.rsplit_once(' ').is_some_and(|(_, value)| value.parse::<f64>().is_ok());
    assert!(page.lines().filter(|l| !l.starts_with('#')).all(|l| well_formed(&l)));
}
