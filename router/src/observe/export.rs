//! Sends spans to an OpenTelemetry collector: OTLP over HTTP in protobuf.
//!
//! Requests put their spans into a bounded queue and never wait: what finds no room is counted and gone. One consumer
//! empties it, so a collector that is slow or away costs nobody anything but those spans.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_otlp::{SpanExporter as OtlpExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{mpsc, oneshot};

/// Requests whose spans may wait.
const QUEUE_MAX: usize = 2048;
/// Spans in one message.
const BATCH_SPANS: usize = 512;
/// How long the first span of a message waits for others.
const BATCH_EVERY: Duration = Duration::from_millis(500);
/// What a collector may take.
const EXPORT_MAX: Duration = Duration::from_secs(5);
/// How long the end of the process waits for the last message.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// Where spans go.
#[derive(Clone, Debug)]
pub struct OtlpSettings {
    /// The whole URL, such as `http://collector:4318/v1/traces`.
    pub endpoint: String,
    /// Sent with each message.
    pub headers: Vec<(String, SecretString)>,
    /// `service.name`.
    pub service_name: String,
    /// 0..=1: the part of requests without a `traceparent` that is sampled.
    pub sample_ratio: f64,
}

enum Item {
    Spans(Vec<SpanData>),
    Flush(oneshot::Sender<()>),
}

/// The queue, and what empties it.
#[derive(Debug)]
pub(super) struct Tracer {
    settings: OtlpSettings,
    queue: mpsc::Sender<Item>,
    /// Taken by [`Self::start`].
    waiting: Mutex<Option<mpsc::Receiver<Item>>>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    exported: AtomicU64,
    dropped: AtomicU64,
}

impl Tracer {
    pub(super) fn new(settings: OtlpSettings) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE_MAX);
        Self { settings, queue, waiting: Mutex::new(Some(waiting)), counts: Arc::default() }
    }

    pub(super) fn ratio(&self) -> f64 {
        self.settings.sample_ratio
    }

    /// Spans exported, and spans lost.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.counts.exported.load(Ordering::Relaxed), self.counts.dropped.load(Ordering::Relaxed))
    }

    /// Queues the spans of a request, or loses them.
    pub(super) fn give(&self, spans: Vec<SpanData>) {
        let len = spans.len() as u64;
        if self.queue.try_send(Item::Spans(spans)).is_err() {
            self.counts.dropped.fetch_add(len, Ordering::Relaxed);
        }
    }

    /// Begins to empty the queue. Once; needs a tokio runtime.
    pub(super) fn start(&self) {
        let Some(waiting) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        match exporter(&self.settings) {
            Ok(exporter) => {
                let sender = Sender { exporter, counts: Arc::clone(&self.counts), is_failing: false };
                tokio::spawn(sender.run(waiting));
            }
            Err(reason) => tracing::warn!(reason, "no traces: the exporter cannot be made"),
        }
    }

    pub(super) async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.queue.try_send(Item::Flush(done)).is_ok() {
            let _ = tokio::time::timeout(FLUSH_MAX, flushed).await;
        }
    }
}

fn exporter(settings: &OtlpSettings) -> Result<OtlpExporter, String> {
    let client = reqwest::Client::builder()
        .timeout(EXPORT_MAX)
        .redirect(reqwest::redirect::Policy::none()) // its headers are for one place
        .build()
        .map_err(|error| error.to_string())?;
    let headers: HashMap<String, String> =
        settings.headers.iter().map(|(name, value)| (name.clone(), value.expose_secret().to_owned())).collect();
    let built = OtlpExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_endpoint(settings.endpoint.clone())
        .with_timeout(EXPORT_MAX)
        .with_headers(headers)
        .build();
    let mut exporter = built.map_err(|error| error.to_string())?;
    let resource = Resource::builder_empty()
        .with_service_name(settings.service_name.clone())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    exporter.set_resource(&resource);
    Ok(exporter)
}

struct Sender {
    exporter: OtlpExporter,
    counts: Arc<Counts>,
    /// The last message was not taken: it is warned of once.
    is_failing: bool,
}

impl Sender {
    async fn run(mut self, mut waiting: mpsc::Receiver<Item>) {
        while let Some(first) = waiting.recv().await {
            let (mut batch, mut flushed) = (Vec::new(), Vec::new());
            take(first, &mut batch, &mut flushed);
            let deadline = tokio::time::Instant::now() + BATCH_EVERY;
            while batch.len() < BATCH_SPANS && flushed.is_empty() {
                match tokio::time::timeout_at(deadline, waiting.recv()).await {
                    Ok(Some(item)) => take(item, &mut batch, &mut flushed),
                    Ok(None) | Err(_) => break,
                }
            }
            if !batch.is_empty() {
                self.send(batch).await;
            }
            for done in flushed {
                let _ = done.send(());
            }
        }
    }

    async fn send(&mut self, batch: Vec<SpanData>) {
        let len = batch.len() as u64;
        let reason = match tokio::time::timeout(EXPORT_MAX, self.exporter.export(batch)).await {
            Ok(Ok(())) => {
                self.counts.exported.fetch_add(len, Ordering::Relaxed);
                if std::mem::take(&mut self.is_failing) {
                    tracing::info!("the collector takes traces again");
                }
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", EXPORT_MAX.as_secs()),
        };
        self.counts.dropped.fetch_add(len, Ordering::Relaxed);
        if !std::mem::replace(&mut self.is_failing, true) {
            let reason: String = reason.chars().take(200).collect();
            tracing::warn!(reason, "the collector takes no traces; spans are lost until it does (--otlp-endpoint)");
        }
    }
}

fn take(item: Item, batch: &mut Vec<SpanData>, flushed: &mut Vec<oneshot::Sender<()>>) {
    match item {
        Item::Spans(spans) => batch.extend(spans),
        Item::Flush(done) => flushed.push(done),
    }
}
