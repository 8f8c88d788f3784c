//! Clients of three kinds: of the engine alone, of the HTTP side without sockets, and over sockets.

use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use loramux_router::engine::{AdapterUse, ContentId, EngineHandle, GenerateEvent, GenerateRequest};
use loramux_router::http::App;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::ServiceExt;

use super::clocks::{Group, join};

/// One stream.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) model: String,
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: u32,
}

impl Ask {
    fn body(&self) -> String {
        serde_json::json!({
            "model": self.model, "prompt": self.prompt, "max_tokens": self.max_tokens, "stream": true,
            "ignore_eos": true, "temperature": 0
        })
        .to_string()
    }
}

/// Reads the engine's events and nothing more.
pub(crate) async fn of_engine(engine: EngineHandle, ask: Ask, content: Option<ContentId>) -> usize {
    let request = GenerateRequest {
        prompt: ask.prompt.into(),
        n: 1,
        max_tokens: ask.max_tokens,
        sampling: Default::default(),
        grammar: None,
        pooling: None,
        adapters: content.into_iter().map(|content| AdapterUse { content, scale: 1.0 }).collect(),
        tenant: 1,
        cache_salt: None,
        priority: 0,
        deadline_ms: None,
    };
    let mut generation = engine.submit(request).expect("the queue has room");
    let mut tokens = 0;
    while let Some(event) = generation.recv().await {
        tokens += usize::from(matches!(event, GenerateEvent::Token { .. }));
    }
    tokens
}

/// Reads a reply's body where it is made.
pub(crate) async fn of_app(app: App, ask: Ask) -> usize {
    let request = Request::post("/v1/completions").header("content-type", "application/json");
    let request = request.body(Body::from(ask.body())).expect("a request");
    let reply = app.router().oneshot(request).await.expect("infallible");
    let mut body = reply.into_body();
    let mut events = 0;
    while let Some(Ok(frame)) = body.frame().await {
        // Two line ends close an event; there are none inside of one.
        let data = frame.data_ref().map_or(&[][..], |data| data);
        let ends = |part: &[u8]| part.iter().fold(0, |ends: u8, byte| ends.wrapping_add(u8::from(*byte == b'\n')));
        events += data.chunks(255).map(|part| usize::from(ends(part))).sum::<usize>() / 2;
    }
    events.saturating_sub(1) // [DONE]
}

/// Runs all clients on a thread that is not counted.
pub(crate) fn over_sockets(address: std::net::SocketAddr, asks: Vec<Ask>) -> usize {
    let run = move || {
        join(Group::Other);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let asks: Vec<_> = asks.into_iter().map(|ask| tokio::spawn(over_socket(address, ask))).collect();
            let mut events = 0;
            for ask in asks {
                events += ask.await.unwrap_or(0);
            }
            events
        })
    };
    let thread = std::thread::Builder::new().name("clients".into()).spawn(run).expect("a thread");
    thread.join().unwrap_or(0)
}

async fn over_socket(address: std::net::SocketAddr, ask: Ask) -> usize {
    let body = ask.body();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(address).await.expect("the server listens");
    stream.write_all((head + &body).as_bytes()).await.expect("the server reads");
    let (mut text, mut buffer) = (Vec::new(), vec![0; 16384]);
    while !text.windows(6).rev().take(32).any(|part| part == b"[DONE]") {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => text.extend_from_slice(&buffer[..read]),
        }
    }
    text.windows(6).filter(|part| part == b"data: ").count().saturating_sub(1)
}
