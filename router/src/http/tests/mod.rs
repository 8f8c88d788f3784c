//! The HTTP side with a scripted engine in the place of the real one.

mod anthropic;
mod chat;
mod completions;
mod console;
mod envelope;
mod fields;
mod keys;
mod lorax;
mod models;
mod openapi;
mod operator;
mod responses;
mod server;
mod stream;
mod tools;
mod validation;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use futures_util::future::BoxFuture;
use http_body_util::BodyExt;
use loramux_proto::{Info, PositionLogprobs, TokenLogprob};
use serde_json::Value;
use tower::ServiceExt;

use super::{App, Backend, Events, RouterConfig};
use crate::engine::{
    AdapterCheck, AdapterFailure, ContentId, EngineStatus, Failure, FinishReason, ForgetMode, GenerateEvent,
    GenerateRequest, MergeAsk, PinLevel, PinRefused, PreparedAdapter, Refusal,
};
use crate::text::testing::{IM_END, byte_level, bytes_of};

const CONTEXT: u32 = 128;

/// An engine that answers every prompt with the same tokens.
#[derive(Clone)]
struct Script {
    inner: Arc<ScriptInner>,
}

struct ScriptInner {
    /// What a sequence generates; shorter ones end with `<|im_end|>`.
    reply: Mutex<Vec<u32>>,
    /// Sequence i of a request skips this many tokens of the reply times i.
    stagger: AtomicUsize,
    /// Refuses the next requests at once.
    refuse: Mutex<Option<Failure>>,
    /// Fails after this many events.
    fail_after: Mutex<Option<(usize, Failure)>>,
    /// Never ends: the last event is not followed by anything.
    hang: AtomicBool,
    ready: AtomicBool,
    seen: Mutex<Vec<GenerateRequest>>,
    finished: Mutex<Vec<u32>>,
    open: AtomicUsize,
    /// What the engine says of itself, where a test has more to say than the script.
    status: Mutex<Option<Arc<EngineStatus>>>,
    loads: Mutex<HashMap<String, Load>>,
    load_count: AtomicUsize,
    context_tokens: AtomicUsize,
}

#[derive(Clone)]
enum Load {
    Ready(u8),
    Slow(u8, Duration),
    Fails(&'static str),
    Panics,
}

impl Script {
    fn new() -> Self {
        let mut reply = bytes_of("hello é😀");
        reply.push(IM_END);
        let inner = ScriptInner {
            reply: Mutex::new(reply),
            stagger: AtomicUsize::new(0),
            refuse: Mutex::default(),
            fail_after: Mutex::default(),
            hang: AtomicBool::new(false),
            ready: AtomicBool::new(true),
            seen: Mutex::default(),
            finished: Mutex::default(),
            open: AtomicUsize::new(0),
            status: Mutex::default(),
            loads: Mutex::default(),
            load_count: AtomicUsize::new(0),
            context_tokens: AtomicUsize::new(CONTEXT as usize),
        };
        Self { inner: Arc::new(inner) }
    }

    fn reply(self, text: &str) -> Self {
        *self.inner.reply.lock().unwrap() = bytes_of(text);
        self
    }

    fn reply_tokens(self, tokens: Vec<u32>) -> Self {
        *self.inner.reply.lock().unwrap() = tokens;
        self
    }

    fn context(self, tokens: usize) -> Self {
        self.inner.context_tokens.store(tokens, Ordering::SeqCst);
        self
    }

    fn load(self, dir: &str, load: Load) -> Self {
        self.inner.loads.lock().unwrap().insert(dir.into(), load);
        self
    }

    fn last(&self) -> GenerateRequest {
        self.inner.seen.lock().unwrap().last().cloned().expect("a request reached the engine")
    }

    fn open(&self) -> usize {
        self.inner.open.load(Ordering::SeqCst)
    }

    async fn until_none_is_open(&self) {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while self.open() > 0 {
            assert!(std::time::Instant::now() < deadline, "requests are still open");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn events_of(&self, request: &GenerateRequest) -> Vec<GenerateEvent> {
        let mut events = vec![GenerateEvent::Admitted { cached_tokens: 2 }];
        let top = |asked: Option<u32>, token: u32| -> Vec<TokenLogprob> {
            (0..asked.unwrap_or(0))
                .map(|i| TokenLogprob { token: token + i, logprob: -0.25 * (i + 1) as f32 })
                .collect()
        };
        if let Some(asked) = request.sampling.prompt_logprobs {
            let position = |(position, &token): (usize, &u32)| PositionLogprobs {
                position: position as u32,
                logprob: -0.5,
                top: top(Some(asked), token),
            };
            let positions = request.prompt.iter().enumerate().skip(1).map(position).collect();
            events.push(GenerateEvent::PromptLogprobs { positions });
        }
        let stagger = self.inner.stagger.load(Ordering::SeqCst);
        for index in 0..request.n {
            let reply =
                self.inner.reply.lock().unwrap().iter().skip(stagger * index as usize).copied().collect::<Vec<_>>();
            let mut reason = FinishReason::Length;
            for token in reply.into_iter().chain(std::iter::repeat(IM_END)).take(request.max_tokens as usize) {
                let logprob = -0.25 - index as f32;
                events.push(GenerateEvent::Token { index, token, logprob, top: top(request.sampling.logprobs, token) });
                if request.sampling.end_tokens.contains(&token) {
                    reason = FinishReason::Stop;
                    break;
                }
            }
            if request.pooling.is_some() {
                let values = request.prompt.iter().map(|token| *token as f32).collect();
                events.push(GenerateEvent::Embedding { values });
            }
            events.push(GenerateEvent::Finished { index, reason });
        }
        if let Some((after, failure)) = self.inner.fail_after.lock().unwrap().clone() {
            events.truncate(after);
            events.push(GenerateEvent::Failed(failure));
        }
        events
    }
}

struct ScriptEvents {
    events: std::vec::IntoIter<GenerateEvent>,
    script: Arc<ScriptInner>,
    /// The task gave way before the next event.
    yielded: bool,
}

impl Events for ScriptEvents {
    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<GenerateEvent>> {
        self.yielded = !self.yielded;
        if self.yielded {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let event = self.events.next();
        let hang = event.is_none() && self.script.hang.load(Ordering::SeqCst);
        if hang { Poll::Pending } else { Poll::Ready(event) }
    }

    fn finish(&mut self, index: u32) {
        self.script.finished.lock().unwrap().push(index);
    }
}

impl Drop for ScriptEvents {
    fn drop(&mut self) {
        self.script.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Backend for Script {
    fn submit(&self, request: GenerateRequest) -> Result<Box<dyn Events>, Failure> {
        if let Some(failure) = self.inner.refuse.lock().unwrap().clone() {
            return Err(failure);
        }
        let mut events = self.events_of(&request);
        if self.inner.hang.load(Ordering::SeqCst) {
            events.retain(|event| !matches!(event, GenerateEvent::Finished { .. }));
        }
        self.inner.seen.lock().unwrap().push(request);
        self.inner.open.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(ScriptEvents { events: events.into_iter(), script: Arc::clone(&self.inner), yielded: false }))
    }

    fn prepare_adapter(&self, dir: PathBuf) -> BoxFuture<'static, Result<PreparedAdapter, AdapterFailure>> {
        self.inner.load_count.fetch_add(1, Ordering::SeqCst);
        // What the files say, wherever they were copied to.
        let name = std::fs::read_to_string(dir.join("adapter_model.safetensors")).unwrap_or_default();
        let load = self.inner.loads.lock().unwrap().get(&name).cloned().unwrap_or(Load::Fails("adapter_invalid"));
        Box::pin(async move {
            let content = match load {
                Load::Ready(content) => content,
                Load::Slow(content, time) => {
                    tokio::time::sleep(time).await;
                    content
                }
                Load::Fails(code) => return Err(AdapterFailure::new(code, "it is broken")),
                Load::Panics => panic!("scripted"),
            };
            Ok(PreparedAdapter {
                content: ContentId([content; 32]),
                pages_needed: 1,
                ranks: (8, 16),
                modules: vec!["q_proj".into()],
                base_model: "base".into(),
                host_bytes: 1000,
                rank_blocks: 2,
                features: Vec::new(),
            })
        })
    }

    fn check_adapter(&self, dir: PathBuf) -> BoxFuture<'static, Result<AdapterCheck, AdapterFailure>> {
        let prepared = self.prepare_adapter(dir);
        Box::pin(async move {
            Ok(match prepared.await {
                Ok(prepared) => AdapterCheck {
                    content: Some(prepared.content),
                    base_matches: true,
                    ranks: prepared.ranks,
                    ..AdapterCheck::default()
                },
                Err(AdapterFailure { code, message, .. }) => {
                    AdapterCheck { refusals: vec![Refusal { code, message }], ..AdapterCheck::default() }
                }
            })
        })
    }

    fn merge_adapters(&self, _: MergeAsk) -> BoxFuture<'static, Result<(), AdapterFailure>> {
        Box::pin(async { Ok(()) })
    }

    fn pin_adapter(&self, _: ContentId, _: Option<PinLevel>) -> BoxFuture<'static, Result<(), PinRefused>> {
        Box::pin(async { Ok(()) })
    }

    fn forget_adapter(&self, _: ContentId, _: ForgetMode) {}

    fn prefetch_adapter(&self, _: ContentId) {}

    fn status(&self) -> Arc<EngineStatus> {
        if let Some(status) = self.inner.status.lock().unwrap().clone() {
            return status;
        }
        let ready = self.inner.ready.load(Ordering::SeqCst);
        let shard = if ready {
            Info {
                vocab_size: 300,
                context_tokens: self.inner.context_tokens.load(Ordering::SeqCst) as u32,
                block_tokens: 16,
                base_content_id: vec![0x9c, 0x2e, 0x11, 0xd0, 1],
                ..Info::default()
            }
        } else {
            Info::default()
        };
        Arc::new(EngineStatus {
            ready,
            started: ready,
            shard,
            running: 3,
            waiting: 4,
            blocks_total: 10,
            blocks_used: 5,
            ..EngineStatus::default()
        })
    }

    fn begin_drain(&self) {}
}

fn app(script: &Script) -> App {
    app_with(script, RouterConfig::default())
}

fn app_with(script: &Script, config: RouterConfig) -> App {
    App::new(config, byte_level(), script.clone())
}

/// Directories with the two files of an adapter, one for each name.
fn adapter_dir(names: &[&str]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for name in names {
        let dir = root.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("adapter_config.json"), "{}").unwrap();
        std::fs::write(dir.join("adapter_model.safetensors"), name).unwrap();
    }
    root
}

async fn send(app: &App, request: Request<Body>) -> Response<Body> {
    app.router().oneshot(request).await.unwrap()
}

fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(body.into()).unwrap()
}

async fn text_of(response: Response<Body>) -> String {
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

async fn json_of(response: Response<Body>) -> Value {
    let text = text_of(response).await;
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Posts JSON and reads JSON.
async fn call(app: &App, path: &str, body: Value) -> (StatusCode, Value) {
    let response = send(app, post(path, body.to_string())).await;
    let status = response.status();
    (status, json_of(response).await)
}

async fn complete(app: &App, body: Value) -> Value {
    let (status, reply) = call(app, "/v1/completions", body).await;
    assert_eq!(status, 200, "{reply}");
    reply
}

/// The data lines of a stream, parsed; `[DONE]` and comments as strings.
async fn events_of(app: &App, path: &str, body: Value) -> Vec<Value> {
    let response = send(app, post(path, body.to_string())).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(response.headers()["cache-control"], "no-cache");
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    parse_events(&text_of(response).await)
}

fn parse_events(text: &str) -> Vec<Value> {
    let event = |block: &str| match block.strip_prefix("data: ") {
        Some("[DONE]") => Value::String("[DONE]".into()),
        Some(data) => serde_json::from_str(data).unwrap(),
        None => Value::String(block.into()),
    };
    text.split("\n\n").filter(|block| !block.is_empty()).map(event).collect()
}

/// The `data` of each event that has a name, which is its type.
fn named_events(text: &str) -> Vec<Value> {
    let event = |block: &str| {
        let (name, data) = block.strip_prefix("event: ")?.split_once("\ndata: ")?;
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name);
        Some(data)
    };
    text.split("\n\n").filter_map(event).collect()
}
