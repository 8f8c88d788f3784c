//! Server-sent events: a producer reads the runs and writes events, and the response's body is what polls it.
//!
//! So a token's event is made in the task that writes it to the connection: no channel and no other task lies between.
//! When the client leaves, the body is dropped, and with it the producer and its runs. While the client does not read,
//! nobody polls the body; then a watch of the stream polls the producer until as many events wait as may, and a producer
//! that waits too long for room ends the connection.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use hyper::body::{Body as HttpBody, Frame};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, Sleep};

use super::run::{Progress, Run};
use crate::http::App;
use crate::http::error::{ApiError, Cause};
use crate::http::server::ConnectionAbort;

/// Bytes of a stream's buffer at first. It is used again and again, so an event of one token allocates nothing.
const BUFFER_BYTES: usize = 2048;
/// The watch looks this many times within the time that a client may not read, and at least once a second.
const LOOKS: u32 = 8;
const LOOK_EVERY_MAX: Duration = Duration::from_secs(1);

/// The client does not read: nothing more can be told.
pub(crate) struct Gone;

/// A run and what it just did; `None`: it ended.
pub(crate) type Step = (Box<Run>, Option<Result<Progress, ApiError>>);

async fn step(mut run: Box<Run>) -> Step {
    let progress = run.next().await;
    (run, progress)
}

/// Resolves when running requests have to end.
async fn told_to_end(mut ending: watch::Receiver<bool>) {
    // The sender lives in the application, which outlives its requests; without it there is nothing to wait for.
    if ending.wait_for(|ending| *ending).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn draining() -> ApiError {
    ApiError::new(Cause::Draining, "the server is shutting down")
}

/// The runs of one request while they are streamed.
pub(crate) struct Runs {
    app: App,
    /// The only run is polled where it lies ..
    alone: Option<Box<Run>>,
    /// .. several tell which of them moved.
    running: FuturesUnordered<BoxFuture<'static, Step>>,
    waits: Waits,
    /// When a run last did something.
    moved: Instant,
}

/// What a stream waits for besides its runs: all the time, and not anew for each token.
struct Waits {
    /// Running requests have to end ..
    told_to_end: BoxFuture<'static, ()>,
    /// .. which this sees without asking.
    ending: watch::Receiver<bool>,
    ping: Pin<Box<Sleep>>,
    /// Whom the two wake. As long as it is the same and neither is due, there is nothing to ask them.
    registered: Option<Waker>,
}

impl Waits {
    fn are_unchanged(&self, cx: &Context<'_>) -> bool {
        let is_registered = self.registered.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        is_registered && !self.ping.is_elapsed() && !self.ending.has_changed().unwrap_or(false)
    }
}

/// What a producer goes on with.
enum Next {
    Step(Option<Step>),
    ToldToEnd,
    Ping,
}

impl Runs {
    pub(crate) fn new(app: &App, mut runs: Vec<Run>) -> Self {
        let alone = if runs.len() == 1 { runs.pop().map(Box::new) } else { None };
        Self {
            app: app.clone(),
            alone,
            running: runs.into_iter().map(|run| Box::pin(step(Box::new(run))) as _).collect(),
            waits: Waits {
                told_to_end: Box::pin(told_to_end(app.ending())),
                ending: app.ending(),
                ping: Box::pin(tokio::time::sleep(app.config.limits.ping_every)),
                registered: None,
            },
            moved: Instant::now(),
        }
    }

    /// Waits until something happened to a run, so that what fails before has a status of its own.
    ///
    /// # Errors
    /// The failure of the first run, or `draining`.
    pub(crate) async fn first(&mut self) -> Result<Step, ApiError> {
        let first = poll_fn(|cx| match self.poll_step(cx) {
            Poll::Pending => self.waits.told_to_end.as_mut().poll(cx).map(|()| None),
            ready => ready,
        });
        match first.await.ok_or_else(draining)? {
            (_, Some(Err(error))) => Err(error),
            step => Ok(step),
        }
    }

    /// What happens next to any run; `None` when all have ended. Sends comments while nothing happens.
    pub(crate) async fn next(&mut self, events: &EventSender) -> Result<Result<Option<Step>, ApiError>, Gone> {
        loop {
            match poll_fn(|cx| self.poll_next(cx)).await {
                Next::Step(step) => return Ok(Ok(step)),
                Next::ToldToEnd => return Ok(Err(draining())),
                Next::Ping => events.send(": ping\n\n").await?,
            }
        }
    }

    /// A step that is there goes first.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        if let Poll::Ready(step) = self.poll_step(cx) {
            self.moved = Instant::now();
            return Poll::Ready(Next::Step(step));
        }
        if self.waits.are_unchanged(cx) {
            return Poll::Pending;
        }
        if self.waits.told_to_end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Next::ToldToEnd);
        }
        let ping_every = self.app.config.limits.ping_every;
        while self.waits.ping.as_mut().poll(cx).is_ready() {
            let is_due = self.moved.elapsed() >= ping_every;
            if is_due {
                self.moved = Instant::now();
            }
            self.waits.ping.as_mut().reset(self.moved + ping_every);
            if is_due {
                return Poll::Ready(Next::Ping);
            }
        }
        self.waits.registered = Some(cx.waker().clone());
        Poll::Pending
    }

    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Option<Step>> {
        let Some(run) = &mut self.alone else { return self.running.poll_next_unpin(cx) };
        let progress = ready!(run.poll_next(cx));
        Poll::Ready(self.alone.take().map(|run| (run, progress)))
    }

    /// Takes a run back that a step gave out.
    pub(crate) fn go_on(&mut self, run: Box<Run>) {
        if self.running.is_empty() {
            self.alone = Some(run);
        } else {
            self.running.push(Box::pin(step(run)));
        }
    }

    /// Ends all runs; their memory is free even if the client does not read what is left.
    pub(crate) fn cancel(&mut self) {
        self.alone = None;
        self.running.clear();
    }
}

/// Events that the client has not taken yet.
#[derive(Default)]
struct Queue {
    bytes: BytesMut,
    events: usize,
}

/// The producer's end of a stream.
pub(crate) struct EventSender {
    app: App,
    queue: Arc<Mutex<Queue>>,
    /// Ends the connection of a client that does not read.
    abort: Option<ConnectionAbort>,
}

impl EventSender {
    /// A stream's two ends: what its producer writes to, and what becomes the response with the producer in it.
    pub(crate) fn channel(app: &App, abort: Option<ConnectionAbort>) -> (Self, EventStream) {
        let queue = Arc::new(Mutex::new(Queue { bytes: BytesMut::with_capacity(BUFFER_BYTES), events: 0 }));
        let stream = EventStream { app: app.clone(), queue: Arc::clone(&queue) };
        (Self { app: app.clone(), queue, abort }, stream)
    }

    /// Sends one event, or several that belong together, as they are.
    pub(crate) async fn send(&self, event: impl AsRef<[u8]>) -> Result<(), Gone> {
        self.room().await?;
        self.push(|out| out.extend_from_slice(event.as_ref()));
        Ok(())
    }

    /// Sends an event whose data is `chunk` in JSON.
    pub(crate) async fn send_json<T: serde::Serialize>(&self, chunk: &T) -> Result<(), Gone> {
        self.room().await?;
        self.push(|out| write_json_event(out, chunk));
        Ok(())
    }

    /// Waits until there is room for an event; a client that makes none in time is cut off.
    pub(crate) async fn room(&self) -> Result<(), Gone> {
        if self.has_room() { Ok(()) } else { self.wait_for_room().await }
    }

    /// Adds an event, which `write` appends to the stream's buffer. There should be [`Self::room`].
    pub(crate) fn push(&self, write: impl FnOnce(&mut BytesMut)) {
        let mut queue = lock(&self.queue);
        write(&mut queue.bytes);
        queue.events += 1;
    }

    fn has_room(&self) -> bool {
        lock(&self.queue).events < self.app.config.limits.stalled_events.max(1)
    }

    async fn wait_for_room(&self) -> Result<(), Gone> {
        // The body empties the queue and polls the producer next, so nobody has to be woken.
        let room = poll_fn(|_| if self.has_room() { Poll::Ready(()) } else { Poll::Pending });
        if tokio::time::timeout(self.app.config.limits.stalled_timeout, room).await.is_ok() {
            return Ok(());
        }
        self.app.metrics.stream_stalled();
        if let Some(abort) = &self.abort {
            abort.abort();
        }
        Err(Gone)
    }
}

/// Appends an event whose data is `chunk` in JSON.
pub(crate) fn write_json_event<T: serde::Serialize>(out: &mut BytesMut, chunk: &T) {
    out.extend_from_slice(b"data: ");
    // Strings and finite numbers: this cannot fail.
    let _ = serde_json::to_writer(out.writer(), chunk);
    out.extend_from_slice(b"\n\n");
}

/// The client's end of a stream that has not begun.
pub(crate) struct EventStream {
    app: App,
    queue: Arc<Mutex<Queue>>,
}

impl EventStream {
    /// The 200 response whose body runs `producer`.
    pub(crate) fn response(self, producer: impl Future<Output = ()> + Send + 'static) -> Response {
        let state = Producing { producer: Some(Box::pin(producer)), is_awaited: false, polls: 0, broke: false };
        let source = Arc::new(Source { queue: self.queue, state: Mutex::new(state) });
        let every = (self.app.config.limits.stalled_timeout / LOOKS).min(LOOK_EVERY_MAX);
        let watch = tokio::spawn(watch_unread(Arc::clone(&source), every)).abort_handle();
        let mut response = Response::new(Body::new(EventBody { source, watch, ended: false }));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }
}

/// A stream's producer, for whoever polls it.
struct Source {
    queue: Arc<Mutex<Queue>>,
    state: Mutex<Producing>,
}

struct Producing {
    /// `None` once it has ended.
    producer: Option<BoxFuture<'static, ()>>,
    /// The body was polled last, found nothing, and will be woken by the producer.
    is_awaited: bool,
    /// How often the body was polled.
    polls: u64,
    /// The producer panicked: the stream has no proper end.
    broke: bool,
}

impl Producing {
    fn poll(&mut self, cx: &mut Context<'_>) {
        let Some(producer) = &mut self.producer else { return };
        // On HTTP/2 the body shares its connection with others, which a panic must not end.
        match catch_unwind(AssertUnwindSafe(|| producer.as_mut().poll(cx))) {
            Ok(Poll::Pending) => {}
            Ok(Poll::Ready(())) => self.producer = None,
            Err(_) => (self.producer, self.broke) = (None, true),
        }
    }
}

impl Source {
    /// Everything that waits, as one piece.
    fn take(&self) -> Bytes {
        let mut queue = lock(&self.queue);
        queue.events = 0;
        if queue.bytes.is_empty() { Bytes::new() } else { queue.bytes.split().freeze() }
    }
}

/// Polls the producer while nobody polls the body, looking every so often whether that is so.
async fn watch_unread(source: Arc<Source>, every: Duration) {
    let mut polls_before = None;
    loop {
        let polls = lock(&source.state).polls;
        let is_unread = polls_before.replace(polls) == Some(polls);
        let produce = poll_fn(|cx| {
            let mut state = lock(&source.state);
            // What the body waits for must wake the body: it has to be the last that polled.
            if is_unread && !state.is_awaited && state.polls == polls {
                state.poll(cx);
            }
            if state.producer.is_none() { Poll::Ready(()) } else { Poll::Pending }
        });
        if tokio::time::timeout(every, produce).await.is_ok() {
            return;
        }
    }
}

/// A body that runs its producer.
struct EventBody {
    source: Arc<Source>,
    watch: AbortHandle,
    /// The last frame was given out.
    ended: bool,
}

impl HttpBody for EventBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let Self { source, ended, .. } = self.get_mut();
        let mut state = lock(&source.state);
        state.polls += 1;
        let mut bytes = source.take();
        if bytes.is_empty() {
            state.poll(cx);
            bytes = source.take();
        }
        state.is_awaited = bytes.is_empty();
        // What waits was written before the producer ended, and it writes no more.
        *ended = state.producer.is_none() && !state.broke;
        match bytes.is_empty() {
            false => Poll::Ready(Some(Ok(Frame::data(bytes)))),
            true if state.broke => Poll::Ready(Some(Err(std::io::Error::other("the stream broke")))),
            true if state.producer.is_none() => Poll::Ready(None),
            true => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

impl Drop for EventBody {
    fn drop(&mut self) {
        self.watch.abort();
        let producer = lock(&self.source.state).producer.take();
        drop(producer); // behind the lock: it cancels what still runs
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
