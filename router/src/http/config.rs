//! What the HTTP side is told at start.

use std::path::PathBuf;
use std::time::Duration;

use super::cors::CorsOrigin;
use super::keys::KeySpec;
use crate::engine::Pooling;
use crate::metrics::AdapterMetrics;
use crate::observe::{AccessLog, OtlpSettings};
use crate::text::ToolFormat;

/// Settings of the HTTP side, as meant.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// Names of the base model; the first is shown. At least one.
    pub served_names: Vec<String>,
    /// `--adapter name=path`.
    pub adapters: Vec<(String, PathBuf)>,
    /// `--adapter-dir`: each sub-directory is an adapter.
    pub adapter_dirs: Vec<PathBuf>,
    /// API keys and admin keys. Without an API key the server is open.
    pub keys: Vec<KeySpec>,
    /// Keys were set up: without a key nobody is served, even if no key is left.
    pub requires_key: bool,
    /// `--allow-runtime-adapters`: clients may load and unload adapters.
    pub allow_runtime_adapters: bool,
    /// `--trust-loopback-adapters`: peers of this machine may do so, and list models, without a key.
    pub trust_loopback_adapters: bool,
    /// `--allow-base-fallback`: a request may ask for the base model's answer while its adapter loads.
    pub allow_base_fallback: bool,
    /// `--cors-allow-origin`: pages of these origins may read answers.
    pub cors_origins: Vec<CorsOrigin>,
    /// `--metrics-key`: `/metrics` needs one of these, or an admin key. None: it is open.
    pub metrics_keys: Vec<KeySpec>,
    /// `--adapter-id`: what answers under the base model's names.
    pub default_adapter: Option<String>,
    /// What every flag came to, without secrets, for `/server_info`.
    pub settings: serde_json::Value,
    /// `--trust-request-chat-template`: requests may bring their own template.
    pub trust_request_chat_template: bool,
    /// `--adapter-chat-template`: an adapter's own template is used for chats under it alone.
    pub use_adapter_templates: bool,
    /// `--strict-fields`: a field that nobody reads is an error.
    pub strict_fields: bool,
    /// Locator of the base model, shown as `root`.
    pub model_root: String,
    /// `--max-model-len`: at most this many tokens, prompt and completion.
    pub max_model_len: Option<u32>,
    /// Use the sampling defaults of `generation_config.json`.
    pub use_generation_config: bool,
    /// `--tool-call-parser`: how the model writes tool calls; `None`: as its chat template says.
    pub tool_call_parser: Option<ToolFormat>,
    /// `--reasoning-parser`: whether the model thinks before it answers.
    pub reasoning_parser: ReasoningParser,
    /// What makes an embedding unless the request says it.
    pub pooling: Pooling,
    /// `--access-log`: which requests have a line in the log.
    pub access_log: AccessLog,
    /// `--otlp-endpoint`: where spans go; `None`: none are made.
    pub otlp: Option<OtlpSettings>,
    /// `--adapter-metrics`: how much is counted by adapter.
    pub adapter_metrics: AdapterMetrics,
    /// `--adapter-metrics-names`: adapters with a label from the start.
    pub adapter_metrics_names: Vec<String>,
    /// `--lorax-metrics`: `/metrics` has LoRAX's names too.
    pub lorax_metrics: bool,
    /// Bounds on connections, bodies and requests.
    pub limits: HttpLimits,
    /// How long a request waits for its adapter.
    pub adapter_load_timeout: Duration,
    /// How long a request may take; `None` = as long as it needs.
    pub request_timeout: Option<Duration>,
    /// How long a shutdown waits for running requests.
    pub drain_timeout: Duration,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            served_names: vec!["base".into()],
            adapters: Vec::new(),
            adapter_dirs: Vec::new(),
            keys: Vec::new(),
            requires_key: false,
            allow_runtime_adapters: false,
            trust_loopback_adapters: false,
            allow_base_fallback: false,
            cors_origins: Vec::new(),
            metrics_keys: Vec::new(),
            default_adapter: None,
            settings: serde_json::Value::Object(serde_json::Map::new()),
            trust_request_chat_template: false,
            use_adapter_templates: false,
            strict_fields: false,
            model_root: String::new(),
            max_model_len: None,
            use_generation_config: true,
            tool_call_parser: None,
            reasoning_parser: ReasoningParser::Auto,
            pooling: Pooling::Last,
            access_log: AccessLog::default(),
            otlp: None,
            adapter_metrics: AdapterMetrics::default(),
            adapter_metrics_names: Vec::new(),
            lorax_metrics: false,
            limits: HttpLimits::default(),
            adapter_load_timeout: Duration::from_secs(30),
            request_timeout: None,
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// How thoughts are found in a reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReasoningParser {
    /// As the chat template says.
    #[default]
    Auto,
    /// Not at all: they are part of the answer.
    None,
    /// Between `<think>` and `</think>`.
    Think,
}

impl ReasoningParser {
    /// Whether the model thinks; `None`: ask its template.
    pub(crate) fn thinks(self) -> Option<bool> {
        match self {
            Self::Auto => None,
            Self::None => Some(false),
            Self::Think => Some(true),
        }
    }
}

/// Bounds on what comes from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpLimits {
    /// Bytes of a body (413).
    pub body_bytes: usize,
    /// Bytes of all headers (431).
    pub header_bytes: usize,
    /// Headers (431).
    pub headers_max: usize,
    /// From the connection's (or the last reply's) end to a complete head.
    pub header_timeout: Duration,
    /// From the head to the end of the body (408).
    pub body_timeout: Duration,
    /// A connection without a request is closed after this.
    pub idle_timeout: Duration,
    /// Open connections; more are refused.
    pub connections_max: usize,
    /// The same for one address.
    pub connections_per_address_max: usize,
    /// `n` and `best_of`.
    pub n_max: u32,
    /// `stop` on LoRAX's routes.
    pub native_stops_max: usize,
    /// Requests that run or wait, as `/info` shows it; the engine keeps the bounds themselves.
    pub requests_max: usize,
    /// Bytes of a schema or grammar that a reply is held to.
    pub grammar_bytes: usize,
    /// Adapters of one `compose`: 1..=16.
    pub composed_max: usize,
    /// prompts x adapters x n.
    pub sequences_max: usize,
    /// Events that may wait for a client that does not read ..
    pub stalled_events: usize,
    /// .. for this long, before its request is cancelled.
    pub stalled_timeout: Duration,
    /// A stream without events gets a comment this often.
    pub ping_every: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            body_bytes: 4 * 1024 * 1024,
            header_bytes: 64 * 1024,
            headers_max: 100,
            header_timeout: Duration::from_secs(5),
            body_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(75),
            connections_max: 16_384,
            connections_per_address_max: 1024,
            n_max: 8,
            native_stops_max: 4,
            requests_max: 1024,
            grammar_bytes: 64 * 1024,
            composed_max: 4,
            sequences_max: 256,
            stalled_events: 64,
            stalled_timeout: Duration::from_secs(10),
            ping_every: Duration::from_secs(15),
        }
    }
}
