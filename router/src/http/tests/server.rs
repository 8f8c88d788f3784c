//! Over real sockets.

use super::*;
use crate::http::serve;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

struct Running {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    server: JoinHandle<std::io::Result<()>>,
}

async fn start(app: &App) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let app = app.clone();
    let server = tokio::spawn(async move {
        serve(listener, app, async {
            let _ = stopped.await;
        })
        .await
    });
    Running { address, stop, server }
}

fn quick() -> RouterConfig {
    let mut config = RouterConfig { drain_timeout: Duration::from_millis(200), ..RouterConfig::default() };
    (config.limits.header_timeout, config.limits.idle_timeout) =
        (Duration::from_millis(150), Duration::from_millis(600));
    config
}

fn raw_post(body: &str) -> String {
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn connect(address: SocketAddr, bytes: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    stream
}

/// What comes until the other side closes.
async fn rest_of(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes)).await;
    read.expect("the server closes").ok();
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn until(stream: &mut TcpStream, text: &str) -> String {
    let mut seen = String::new();
    let mut bytes = [0; 1024];
    while !seen.contains(text) {
        let n = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut bytes)).await.unwrap().unwrap();
        assert!(n > 0, "closed after {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&bytes[..n]));
    }
    seen
}

#[tokio::test]
async fn connections_without_a_request_are_closed() {
    let server = start(&app_with(&Script::new(), quick())).await;
    for bytes in ["", "GET", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nhost: x\r\nx-slow: "] {
        let mut stream = connect(server.address, bytes).await;
        assert!(!rest_of(&mut stream).await.contains("200 OK"), "{bytes:?}");
    }
    // Between requests the limit is the idle one, and half a head has the short one again.
    let mut stream = connect(server.address, "GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await;
    until(&mut stream, "200 OK").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    until(&mut stream, "200 OK").await;
    let waiting = std::time::Instant::now();
    stream.write_all(b"GET /hea").await.unwrap();
    rest_of(&mut stream).await;
    assert!(waiting.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn an_answer_before_the_body_came_leaves_the_connection_usable_or_says_that_it_ends() {
    let server = start(&app(&Script::new())).await;
    let next = "GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let chunked = "transfer-encoding: chunked";
    let (late, never, huge) = ("content-length: 2", "content-length: 3", "content-length: 99999999");
    for (request, fields, body, goes_on) in [
        ("POST /nope", late, "{}", true),
        ("POST /nope", chunked, "2\r\n{}\r\n0\r\n\r\n", true),
        ("DELETE /v1/models", late, "{}", true),
        ("POST /ping", late, "{}", true),
        ("POST /v1/completions", chunked, "2\r\n{}\r\n0\r\n\r\n", true),
        ("POST /v1/completions", "content-type: text/plain\r\ncontent-length: 2", "{}", true),
        ("POST /nope", never, "{}", false),
        ("POST /v1/completions", huge, "", false),
        ("POST /nope", "expect: 100-continue\r\ncontent-length: 2", "", false),
    ] {
        let what = format!("{request} {fields}");
        let head = format!("{request} HTTP/1.1\r\nhost: x\r\n{fields}\r\n\r\n");
        let mut client = connect(server.address, &head).await;
        for _ in 0..50 {
            tokio::task::yield_now().await; // the server, on this thread, sees the head alone
        }
        client.write_all(body.as_bytes()).await.unwrap();
        if goes_on {
            client.write_all(next.as_bytes()).await.unwrap();
        }
        let seen = rest_of(&mut client).await;
        assert!(!seen.contains("100 Continue"), "{what}: {seen}");
        let (first, second) = seen.split_once("HTTP/1.1 ").and_then(|(_, rest)| rest.split_once("HTTP/1.1 ")).unzip();
        if goes_on {
            assert!(first.is_some_and(|first| !first.contains("connection: close")), "{what}: {seen}");
            assert!(second.is_some_and(|second| second.starts_with("200 OK")), "{what}: {seen}");
        } else {
            assert!(second.is_none() && seen.contains("connection: close\r\n"), "{what}: {seen}");
        }
    }
}

#[tokio::test]
async fn a_client_that_closes_its_connection_cancels_its_request() {
    for stream in [false, true] {
        let script = Script::new();
        script.inner.hang.store(true, Ordering::SeqCst);
        let server = start(&app(&script)).await;
        let mut client = connect(server.address, &raw_post(&format!("{{\"prompt\":\"a\",\"stream\":{stream}}}"))).await;
        if stream {
            until(&mut client, "data: ").await;
        } else {
            while script.open() == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        drop(client);
        script.until_none_is_open().await;
    }
}

#[tokio::test]
async fn too_many_connections_of_one_address_are_refused() {
    let mut config = RouterConfig::default();
    config.limits.connections_per_address_max = 2;
    let server = start(&app_with(&Script::new(), config)).await;
    let request = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut first = connect(server.address, request).await;
    let mut second = connect(server.address, request).await;
    until(&mut first, "200 OK").await;
    until(&mut second, "200 OK").await;
    let mut third = TcpStream::connect(server.address).await.unwrap();
    third.write_all(request.as_bytes()).await.ok();
    assert_eq!(rest_of(&mut third).await, "");
    drop(first);
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let mut again = TcpStream::connect(server.address).await.unwrap();
        again.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.ok();
        if rest_of(&mut again).await.contains("200 OK") {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "the place is given back");
    }
}

#[tokio::test]
async fn large_heads_get_our_body_as_far_as_hyper_lets_us() {
    let server = start(&app(&Script::new())).await;
    let head =
        |n: usize| format!("GET /health HTTP/1.1\r\nhost: x\r\nx-long: {}\r\nconnection: close\r\n\r\n", "y".repeat(n));
    let reply = rest_of(&mut connect(server.address, &head(70_000)).await).await;
    assert!(reply.starts_with("HTTP/1.1 431") && reply.contains("headers_too_large"), "{reply}");
    let many: String = (0..120).map(|i| format!("x-{i}: 1\r\n")).collect();
    let reply = rest_of(
        &mut connect(server.address, &format!("GET /health HTTP/1.1\r\nhost: x\r\n{many}connection: close\r\n\r\n"))
            .await,
    )
    .await;
    assert!(reply.starts_with("HTTP/1.1 431") && reply.contains("headers_too_large"), "{reply}");
}

#[tokio::test]
async fn a_shutdown_lets_running_requests_end() {
    let script = Script::new();
    let app = app_with(&script, RouterConfig::default());
    let server = start(&app).await;
    script.inner.hang.store(true, Ordering::SeqCst);
    let mut open = connect(server.address, &raw_post("{\"prompt\":\"a\",\"stream\":true}")).await;
    until(&mut open, "data: ").await;
    server.stop.send(()).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !app.is_draining() {
        assert!(std::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(!server.server.is_finished(), "it waits for the stream");
    drop(open);
    tokio::time::timeout(Duration::from_secs(10), server.server)
        .await
        .expect("ends with its last request")
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn a_shutdown_ends_requests_that_take_too_long() {
    let script = Script::new();
    script.inner.hang.store(true, Ordering::SeqCst);
    let server = start(&app_with(&script, quick())).await;
    let mut stream = connect(server.address, &raw_post("{\"prompt\":\"a\",\"stream\":true}")).await;
    let mut whole = connect(server.address, &raw_post("{\"prompt\":\"a\"}")).await;
    while script.open() < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    server.stop.send(()).unwrap();
    let (streamed, whole) = (rest_of(&mut stream).await, rest_of(&mut whole).await);
    assert!(streamed.contains("\"code\":\"draining\"") && !streamed.contains("[DONE]"), "{streamed}");
    assert!(
        whole.starts_with("HTTP/1.1 503") && whole.contains("\"code\":\"draining\"") && whole.contains("retry-after"),
        "{whole}"
    );
    tokio::time::timeout(Duration::from_secs(10), server.server).await.expect("it ends").unwrap().unwrap();
}

#[tokio::test]
async fn a_head_that_cannot_be_read_gets_the_envelope_too() {
    let server = start(&app(&Script::new())).await;
    let huge = format!("GET /health HTTP/1.1\r\nhost: x\r\nx-huge: {}\r\n\r\n", "a".repeat(127 * 1024));
    let many = format!("GET /health HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(300));
    let cases = [
        (huge.as_str(), 431, "headers_too_large"),
        (many.as_str(), 431, "headers_too_large"),
        ("GET /\u{7f} HTTP/1.1\r\n\r\n", 400, "invalid_value"),
        ("NONSENSE\r\n\r\n", 400, "invalid_value"),
    ];
    for (request, status, code) in cases {
        let mut client = connect(server.address, request).await;
        let seen = rest_of(&mut client).await;
        assert!(seen.starts_with(&format!("HTTP/1.1 {status} ")), "{request:.20}: {seen}");
        let body = seen.split_once("\r\n\r\n").unwrap().1;
        let body: Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{request:.20}: {e}: {seen}"));
        assert_eq!(body["error"]["code"], code, "{request:.20}");
        assert!(seen.contains(&format!("x-request-id: {}", body["error"]["request_id"].as_str().unwrap())), "{seen}");
    }
}

#[tokio::test]
async fn whoever_comes_while_the_server_drains_is_told_why_it_is_not_served() {
    let script = Script::new();
    script.inner.hang.store(true, Ordering::SeqCst);
    let config = RouterConfig { drain_timeout: Duration::from_secs(20), ..RouterConfig::default() };
    let app = app_with(&script, config);
    let server = start(&app).await;
    let mut running = connect(server.address, &raw_post(r#"{"prompt": "x", "stream": true}"#)).await;
    until(&mut running, "200 OK").await;
    server.stop.send(()).unwrap();
    let mut seen = String::new();
    while !seen.contains("503") {
        let mut late = connect(server.address, &raw_post(r#"{"prompt": "x"}"#)).await;
        seen = until(&mut late, "}").await;
    }
    assert!(
        seen.contains("\"draining\"") && seen.contains("retry-after: 5") && seen.contains("connection: close"),
        "{seen}"
    );
    drop(running);
    let ended = tokio::time::timeout(Duration::from_secs(10), server.server).await;
    ended.expect("nothing runs any more").unwrap().unwrap();
    assert!(TcpStream::connect(server.address).await.is_err(), "the listener is gone");
}
