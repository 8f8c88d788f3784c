//! What was typed. `config.rs` turns it into what is meant.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use secrecy::SecretString;

use crate::adapters_cli::args::AdaptersArgs;
use crate::bench::args::BenchArgs;
use crate::config::observe::ObserveArgs;
use crate::config::parsers::{PoolingArg, ReasoningParserArg, ToolCallParser, parse_isa};
use crate::doctor::args::{DoctorArgs, WarmArgs};
use crate::shard::{DeviceChoice, DtypeChoice, LoadFormatChoice};

/// One base model and thousands of LoRA adapters from one device, behind the OpenAI API.
#[derive(Parser, Debug)]
#[command(name = "loramux", version, about, max_term_width = 110, args_conflicts_with_subcommands = true)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
}

const AFTER_HELP: &str = "\
Examples:
  loramux                                       serve the built-in demo model and its adapters
  loramux --model-id ./Llama-3.2-1B --adapter sql=./loras/sql --adapter legal=hf://acme/legal-lora
  loramux --model-id ./model.gguf --adapter-dir ./loras      each folder of ./loras, read at its first request
  curl localhost:8000/v1/completions -H 'content-type: application/json' \\
       -d '{\"model\": \"sql\", \"prompt\": \"List users\", \"max_tokens\": 32}'
Every flag is also an environment variable: --max-num-seqs is LORAMUX_MAX_NUM_SEQS.";

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Serve (what happens without a subcommand too)
    Serve(Box<ServeArgs>),
    /// Look at this machine: what works, what does not, and what to do about it
    Doctor(Box<DoctorArgs>),
    /// Look at and change the adapters of a running server, or check one without a server
    Adapters(AdaptersArgs),
    /// Measure this server, or any other that speaks OpenAI's API; compare runs
    Bench(Box<BenchArgs>),
    /// Compile the CUDA kernels of models into the cache; needs the compiler (NVRTC) and no GPU
    WarmKernels(WarmArgs),
    /// Execute steps for a router; started by `serve`
    #[command(hide = true)]
    Shard(ShardArgs),
}

#[derive(Args, Debug)]
pub(crate) struct ShardArgs {
    /// JSON of the shard's settings.
    #[arg(long)]
    pub(crate) options: String,
}

/// Where the shard runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShardMode {
    /// A child process: its death costs a pause
    Process,
    /// A thread of this process: for tests and embedding
    InProcess,
}

/// An op that can expand LoRA deltas on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Fusion {
    /// Rotary positions and KV cache
    Rope,
    /// silu(gate) * up
    Activation,
    /// Residual and norm
    Norm,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) adapters: AdapterArgs,
    #[command(flatten)]
    pub(crate) sources: SourceArgs,
    #[command(flatten)]
    pub(crate) network: NetworkArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) observe: ObserveArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// What is said once at the start about flags without an effect.
    #[arg(skip)]
    pub(crate) notices: Vec<String>,
    /// What every flag came to, secrets covered.
    #[arg(skip)]
    pub(crate) settings: serde_json::Value,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// Base model: a directory, a .gguf file, org/model(@revision), org/repo/file.gguf, or s3://, gs://. Default: the built-in demo model
    #[arg(long, alias = "model", alias = "model-path", env = "LORAMUX_MODEL_ID", value_name = "PATH|REF")]
    pub(crate) model_id: Option<PathBuf>,
    /// Branch, tag or commit of a base model on the hub; the same as MODEL@REVISION
    #[arg(long, env = "LORAMUX_REVISION", value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    /// Names that clients may use for the base model, comma-separated. Default: the last part of --model-id (without .gguf)
    #[arg(long, env = "LORAMUX_SERVED_MODEL_NAME", value_delimiter = ',', value_name = "NAME")]
    pub(crate) served_model_name: Vec<String>,
    /// Storage of weights, KV cache and adapters. auto: as the files have it; on a CPU the weights of a .gguf stay quantised
    #[arg(long, env = "LORAMUX_DTYPE", value_enum, default_value = "auto")]
    pub(crate) dtype: DtypeChoice,
    /// What to read the weights from
    #[arg(long, env = "LORAMUX_LOAD_FORMAT", value_enum, default_value = "auto")]
    pub(crate) load_format: LoadFormatChoice,
    /// Where to compute: auto (the first GPU, or the CPU where there is none), cpu, cuda or cuda:N
    #[arg(long, env = "LORAMUX_DEVICE", default_value = "auto", value_name = "DEVICE")]
    pub(crate) device: DeviceChoice,
    /// Where compiled CUDA kernels are kept. Default: ~/.cache/loramux/kernels
    #[arg(long, env = "LORAMUX_KERNEL_CACHE", value_name = "DIR")]
    pub(crate) kernel_cache_dir: Option<PathBuf>,
    /// LoRA expands that are fused into the op behind them on a GPU: rope, activation, norm (to measure them; none by default)
    #[arg(long, env = "LORAMUX_CUDA_FUSE", value_enum, value_delimiter = ',', value_name = "OP", hide = true)]
    pub(crate) cuda_fuse: Vec<Fusion>,
    /// A folder with CUDA's libraries (NVRTC, cuBLASLt), looked at before the usual ones; repeat for more
    #[arg(long, env = "LORAMUX_CUDA_LIBRARIES", value_name = "DIR", value_delimiter = ',')]
    pub(crate) cuda_libraries: Vec<PathBuf>,
    /// Longest prompt + completion, tokens. Default: the model's own limit
    #[arg(long, env = "LORAMUX_MAX_MODEL_LEN", alias = "max-total-tokens", alias = "context-length")]
    pub(crate) max_model_len: Option<u32>,
    /// Chat template in place of the model's own: a Jinja file, or a tokenizer_config.json that has one
    #[arg(long, alias = "tokenizer-config-path", env = "LORAMUX_CHAT_TEMPLATE", value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// Let requests bring their own `chat_template`. Templates are programs; these run with limits on time, memory and output
    #[arg(long, env = "LORAMUX_TRUST_REQUEST_CHAT_TEMPLATE", default_value = "false", value_parser = boolish(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) trust_request_chat_template: bool,
    /// How the model writes tool calls; auto: as its chat template says
    #[arg(long, env = "LORAMUX_TOOL_CALL_PARSER", value_enum, default_value = "auto", value_name = "FORMAT")]
    pub(crate) tool_call_parser: ToolCallParser,
    /// How thoughts are told from the answer; auto: as the chat template says, think: <think>..</think>
    #[arg(long, env = "LORAMUX_REASONING_PARSER", value_enum, default_value = "auto", value_name = "PARSER")]
    pub(crate) reasoning_parser: ReasoningParserArg,
    /// What of the final hidden states makes an embedding; auto: as the model's 1_Pooling/config.json says, else last
    #[arg(long, env = "LORAMUX_POOLING", value_enum, default_value = "auto", value_name = "POOLING")]
    pub(crate) pooling: PoolingArg,
    /// Sampling defaults of the model's generation_config.json: auto (use them) or none
    #[arg(long, env = "LORAMUX_GENERATION_CONFIG", default_value = "auto", value_name = "auto|none")]
    pub(crate) generation_config: String,
    /// Seed of --load-format dummy
    #[arg(long, env = "LORAMUX_SEED", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Adapters")]
pub(crate) struct AdapterArgs {
    /// A LoRA adapter and the name clients use for it: a folder, hf://org/repo(@revision), s3://bucket/path, gs://..,
    /// https://..; repeat for more
    #[arg(long, alias = "lora-modules", alias = "lora-paths", env = "LORAMUX_ADAPTER", value_name = "NAME=REF", num_args = 1..)]
    pub(crate) adapter: Vec<String>,
    /// The adapter that answers under the base model's names; a request may ask for `adapter_id: __base_model__` instead
    #[arg(long, env = "LORAMUX_ADAPTER_ID", value_name = "NAME|REF")]
    pub(crate) adapter_id: Option<String>,
    /// The same for adapters that are called as their reference is
    #[arg(long, value_name = "REF", num_args = 1.., hide = true)]
    pub(crate) preloaded_adapter_ids: Vec<String>,
    /// A folder whose sub-folders are adapters, each read at its first request; repeat for more
    #[arg(long, env = "LORAMUX_ADAPTER_DIR", value_name = "DIR", value_delimiter = ',')]
    pub(crate) adapter_dir: Vec<PathBuf>,
    /// Largest rank to admit. Nothing is padded to it
    #[arg(long, env = "LORAMUX_MAX_LORA_RANK", default_value_t = 512)]
    pub(crate) max_lora_rank: u32,
    /// Adapters on the device at once. Default: as many as memory holds. Nothing is reserved for it
    #[arg(long, alias = "max-active-adapters", alias = "max-loras-per-batch", env = "LORAMUX_MAX_LORAS")]
    pub(crate) max_loras: Option<u32>,
    /// Host memory for adapters that are not on the device, such as 8GiB [default: 8GiB, at most half of what is free]
    #[arg(long, env = "LORAMUX_HOST_ADAPTER_MEMORY", value_parser = parse_bytes)]
    pub(crate) host_adapter_memory: Option<u64>,
    /// How long a request waits for its adapter to load, seconds
    #[arg(long, env = "LORAMUX_ADAPTER_LOAD_TIMEOUT", default_value = "30", value_parser = parse_seconds)]
    pub(crate) adapter_load_timeout: std::time::Duration,
    /// Use the chat template that an adapter brings (chat_template.jinja, tokenizer_config.json) for chats under it, where its
    /// files lie in a folder of this machine
    #[arg(long, env = "LORAMUX_ADAPTER_CHAT_TEMPLATE", default_value = "false", value_parser = boolish(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) adapter_chat_template: bool,
    /// Adapters one request may compose
    #[arg(long, env = "LORAMUX_MAX_COMPOSED_ADAPTERS", default_value_t = 4)]
    pub(crate) max_composed_adapters: u32,
}

/// Where a bare name is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SourceChoice {
    /// The Hugging Face Hub
    Hub,
    /// S3 and compatible stores
    S3,
    /// Google Cloud Storage
    Gcs,
    /// HTTP(S)
    Http,
    /// This machine
    Local,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Adapter sources")]
pub(crate) struct SourceArgs {
    /// Where a request's bare name is looked for when it names no source
    #[arg(long, alias = "default-adapter-source", env = "LORAMUX_ADAPTER_SOURCE", value_enum, default_value = "hub")]
    pub(crate) adapter_source: SourceChoice,
    /// A folder below which requests may name adapters by absolute path; repeat for more. Default: DATA_DIR/adapters
    #[arg(long, env = "LORAMUX_ADAPTER_ROOT", value_name = "DIR", value_delimiter = ',')]
    pub(crate) adapter_root: Vec<PathBuf>,
    /// Where bare names are looked for first, such as s3://bucket/loras/ or /adapters/; read with the server's credentials
    #[arg(long, env = "LORAMUX_ADAPTER_SOURCE_PREFIX", value_name = "REF", value_delimiter = ',')]
    pub(crate) adapter_source_prefix: Vec<String>,
    /// What requests may name that is not registered: globs on names and references; `` (empty) = nothing
    #[arg(long, env = "LORAMUX_ALLOW_ADAPTERS", value_name = "GLOBS", default_value = "*", value_delimiter = ',')]
    pub(crate) allow_adapters: Vec<String>,
    /// Hosts that adapters may come from by HTTP(S): host, host:port, *.domain; plain HTTP as http://host(:port)
    #[arg(long, env = "LORAMUX_ADAPTER_HTTP_HOSTS", value_name = "HOSTS", value_delimiter = ',')]
    pub(crate) adapter_http_hosts: Vec<String>,
    /// A header for one of these hosts, such as example.com=Authorization:Bearer..; repeat for more
    #[arg(long, env = "LORAMUX_ADAPTER_HTTP_HEADER", value_name = "HOST=NAME:VALUE", hide_env_values = true, value_parser = parse_secret)]
    pub(crate) adapter_http_header: Vec<SecretString>,
    /// Private networks that these hosts may lie in, such as 10.1.0.0/16
    #[arg(long, env = "LORAMUX_ADAPTER_HTTP_NETWORKS", value_name = "CIDR", value_delimiter = ',')]
    pub(crate) adapter_http_networks: Vec<String>,
    /// Hosts that the hub may send downloads to besides its own
    #[arg(long, env = "LORAMUX_HUB_HOSTS", value_name = "HOSTS", value_delimiter = ',')]
    pub(crate) hub_hosts: Vec<String>,
    /// Let the server's hub token answer for callers that send none
    #[arg(long, env = "LORAMUX_SHARE_HUB_TOKEN", default_value = "false", value_parser = boolish(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) share_hub_token: bool,
    /// Ask the cloud's metadata service for S3 and GCS credentials where the environment has none
    #[arg(long, env = "LORAMUX_INSTANCE_CREDENTIALS", default_value = "false", value_parser = boolish(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) instance_credentials: bool,
    /// Largest adapter, such as 2GiB
    #[arg(long, env = "LORAMUX_ADAPTER_MAX_BYTES", default_value = "2GiB", value_parser = parse_bytes)]
    pub(crate) adapter_max_bytes: u64,
    /// Disk for downloaded adapters; those not in use go when it is full
    #[arg(long, env = "LORAMUX_ADAPTER_DISK_QUOTA", default_value = "64GiB", value_parser = parse_bytes)]
    pub(crate) adapter_disk_quota: u64,
    /// Adapters that load at the same time
    #[arg(long, env = "LORAMUX_ADAPTER_LOADS", default_value_t = 8)]
    pub(crate) adapter_loads: usize,
    /// Let clients load and unload adapters by name (/v1/load_lora_adapter)
    #[arg(long, env = "LORAMUX_ALLOW_RUNTIME_ADAPTERS", default_value = "false", value_parser = boolish(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) allow_runtime_adapters: bool,
    /// Let programs of this machine do that, and list models, without a key. Not behind a proxy on the same machine
    #[arg(long, env = "LORAMUX_TRUST_LOOPBACK_ADAPTERS", default_value = "false", value_parser = boolish(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) trust_loopback_adapters: bool,
    /// For tests of failing sources: what is kept, retried and waited for takes this part of its time
    #[arg(long, env = "LORAMUX_TEST_TIME_SCALE", hide = true, default_value = "1", value_parser = parse_time_scale)]
    pub(crate) test_time_scale: f64,
    /// Let requests ask for the base model's answer while their adapter loads (`adapter_wait: base`)
    #[arg(long, env = "LORAMUX_ALLOW_BASE_FALLBACK", default_value = "false", value_parser = boolish(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) allow_base_fallback: bool,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Network")]
pub(crate) struct NetworkArgs {
    /// Address to listen on
    #[arg(long, alias = "hostname", env = "LORAMUX_HOST", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen on; 0 = any free one
    #[arg(short, long, env = "LORAMUX_PORT", default_value_t = 8000)]
    pub(crate) port: u16,
    /// Key that clients must send as `Authorization: Bearer KEY`; repeat for more
    #[arg(long, env = "LORAMUX_API_KEY", value_name = "KEY", value_delimiter = ',', hide_env_values = true, value_parser = parse_secret)]
    pub(crate) api_key: Vec<SecretString>,
    /// A file with one such key a line. Read again on SIGHUP
    #[arg(long, env = "LORAMUX_API_KEY_FILE", value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// A file (TOML) of keys with namespaces, allowed adapters and rates. Read again on SIGHUP
    #[arg(long, env = "LORAMUX_KEYS_FILE", value_name = "FILE")]
    pub(crate) keys_file: Option<PathBuf>,
    /// Key that `/metrics` asks for; an admin key opens it too. Without one it is open. Repeat for more
    #[arg(long, env = "LORAMUX_METRICS_KEY", value_name = "KEY", value_delimiter = ',', hide_env_values = true, value_parser = parse_secret)]
    pub(crate) metrics_key: Vec<SecretString>,
    /// Origins whose web pages may read answers, such as `https://app.example.com`, or `*`; repeat for more
    #[arg(
        long,
        alias = "allowed-origins",
        env = "LORAMUX_CORS_ALLOW_ORIGIN",
        value_name = "ORIGIN",
        value_delimiter = ','
    )]
    pub(crate) cors_allow_origin: Vec<String>,
    /// Refuse requests with a field that this server does not know, instead of naming it in `x-ignored-fields`
    #[arg(long, env = "LORAMUX_STRICT_FIELDS", default_value = "false", value_parser = boolish(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) strict_fields: bool,
    /// Key of the admin API; opens /admin/v1 on the main port too. Repeat for more
    #[arg(long, env = "LORAMUX_ADMIN_KEY", value_name = "KEY", value_delimiter = ',', hide_env_values = true, value_parser = parse_secret)]
    pub(crate) admin_key: Vec<SecretString>,
    /// Where the admin API listens: address, unix:/path or off. Default: 127.0.0.1:8001, if it is free
    #[arg(long, env = "LORAMUX_ADMIN_LISTEN", value_name = "ADDRESS")]
    pub(crate) admin_listen: Option<String>,
    /// Let debuggers attach and memory be dumped. Off, because this process holds keys and tokens
    #[arg(long, env = "LORAMUX_ALLOW_CORE_DUMPS", hide = true)]
    pub(crate) allow_core_dumps: bool,
    /// Largest request body, such as 4MiB
    #[arg(long, env = "LORAMUX_MAX_BODY_BYTES", default_value = "4MiB", value_parser = parse_bytes)]
    pub(crate) max_body_bytes: u64,
    /// Connections at once
    #[arg(long, env = "LORAMUX_MAX_CONNECTIONS", default_value_t = 16384)]
    pub(crate) max_connections: usize,
    /// Time a request may take, seconds. Default: no limit
    #[arg(long, env = "LORAMUX_REQUEST_TIMEOUT", value_parser = parse_seconds)]
    pub(crate) request_timeout: Option<std::time::Duration>,
    /// How long SIGTERM waits for running requests, seconds
    #[arg(long, env = "LORAMUX_DRAIN_TIMEOUT", default_value = "30", value_parser = parse_seconds)]
    pub(crate) drain_timeout: std::time::Duration,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Batching and memory")]
pub(crate) struct EngineArgs {
    /// Memory for KV cache and adapters, such as 4GiB. Default: half of what is free, at most 4 GiB
    #[arg(long, env = "LORAMUX_ARENA_BYTES", value_parser = parse_bytes)]
    pub(crate) arena_bytes: Option<u64>,
    /// Sequences in one batch
    #[arg(
        long,
        alias = "max-batch-size",
        alias = "max-running-requests",
        env = "LORAMUX_MAX_NUM_SEQS",
        default_value_t = 256
    )]
    pub(crate) max_num_seqs: u32,
    /// Token positions in one step (decodes first, then pieces of prompts). Default: 512 on the CPU, 2048 on a GPU, and never
    /// below --max-num-seqs
    #[arg(
        long,
        alias = "max-batch-prefill-tokens",
        alias = "max-prefill-tokens",
        env = "LORAMUX_MAX_NUM_BATCHED_TOKENS"
    )]
    pub(crate) max_num_batched_tokens: Option<u32>,
    /// Requests that may wait; more get 429
    #[arg(
        long,
        alias = "max-concurrent-requests",
        alias = "max-concurrency",
        alias = "max-queued-reqs",
        env = "LORAMUX_MAX_QUEUED_REQUESTS",
        default_value_t = 1024
    )]
    pub(crate) max_queued_requests: usize,
    /// Prompt tokens that may wait. Default: four times what the arena holds
    #[arg(long, env = "LORAMUX_MAX_QUEUED_TOKENS")]
    pub(crate) max_queued_tokens: Option<u64>,
    /// Choices one request may ask for (`n`, `best_of`)
    #[arg(long, alias = "max-best-of", env = "LORAMUX_MAX_N", default_value_t = 8)]
    pub(crate) max_n: u32,
    /// Stop sequences of one request to LoRAX's routes, 1..16
    #[arg(long, env = "LORAMUX_MAX_STOP_SEQUENCES", default_value_t = 4)]
    pub(crate) max_stop_sequences: u32,
    /// A JSON schema or grammar that a reply is held to, at most this large
    #[arg(long, env = "LORAMUX_MAX_GRAMMAR_BYTES", default_value = "64KiB", value_parser = parse_bytes)]
    pub(crate) max_grammar_bytes: u64,
    /// Sequences one request may make in all
    #[arg(long, env = "LORAMUX_MAX_SEQUENCES_PER_REQUEST", default_value_t = 256)]
    pub(crate) max_sequences_per_request: u32,
    /// Keep the KV cache of finished prompts for the same caller's next one
    #[arg(long, env = "LORAMUX_PREFIX_CACHING", default_value_t = true, action = clap::ArgAction::Set)]
    pub(crate) prefix_caching: bool,
    /// Threads of the kernels. Default: one per core
    #[arg(long, env = "LORAMUX_THREADS")]
    pub(crate) threads: Option<usize>,
    /// Instructions of the kernels on the CPU: amx-bf16, avx512-bf16, avx512, avx2 or portable. Default: the fastest there is.
    /// The first two round the inputs of products with bfloat16 weights to bfloat16; the others do not
    #[arg(long, env = "LORAMUX_CPU_ISA", value_name = "NAME", value_parser = parse_isa)]
    pub(crate) cpu_isa: Option<String>,
    /// Run the shard as a child process, or in this one
    #[arg(long, env = "LORAMUX_SHARD_MODE", value_enum, default_value = "process")]
    pub(crate) shard_mode: ShardMode,
    /// A step that takes longer than this many seconds means a hung shard: it is replaced
    #[arg(long, env = "LORAMUX_STEP_WATCHDOG", default_value = "30", value_parser = parse_seconds)]
    pub(crate) step_watchdog: std::time::Duration,
    /// Where downloads, registrations and the built-in model are kept; one for each server. Default: ~/.cache/loramux
    #[arg(long, alias = "download-dir", env = "LORAMUX_DATA_DIR", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// A file (TOML) with flags as keys, such as `port = 9000`; what is typed or in the environment wins
    #[arg(long, env = "LORAMUX_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// How log lines look
    #[arg(long, env = "LORAMUX_LOG_FORMAT", value_enum, default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// The same as --log-format json
    #[arg(long)]
    pub(crate) json_output: bool,
    /// What to log: error, warn, info, debug, trace, or a filter such as info,loramux_router=debug
    #[arg(long, env = "LORAMUX_LOG_LEVEL", default_value = "info")]
    pub(crate) log_level: String,
}

/// Yes and no as orchestrators write them: true, 1, yes, on.
fn boolish() -> clap::builder::BoolishValueParser {
    clap::builder::BoolishValueParser::new()
}

/// Kept so that nothing prints it.
pub(crate) fn parse_secret(text: &str) -> Result<SecretString, std::convert::Infallible> {
    Ok(SecretString::from(text))
}

/// `512MiB`, `4GB`, `1073741824`.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "kb" => 1000,
        "m" | "mib" => 1 << 20,
        "mb" => 1_000_000,
        "g" | "gib" => 1 << 30,
        "gb" => 1_000_000_000,
        "t" | "tib" => 1 << 40,
        "tb" => 1_000_000_000_000,
        _ => return Err(format!("unknown unit `{unit}`; use KiB, MiB, GiB (or KB, MB, GB)")),
    };
    let number: f64 = number.parse().map_err(|_| "a size looks like 512MiB or 4GiB".to_owned())?;
    let bytes = number * scale as f64;
    if !bytes.is_finite() || !(0.0..=1e18).contains(&bytes) {
        return Err("out of range".into());
    }
    Ok(bytes as u64)
}

fn parse_time_scale(text: &str) -> Result<f64, String> {
    let scale = text.parse::<f64>().ok().filter(|scale| (0.001..=1.0).contains(scale));
    scale.ok_or_else(|| "a number from 0.001 to 1".to_owned())
}

/// `30`, `0.5`, `30s`, `500ms`.
pub(crate) fn parse_seconds(text: &str) -> Result<std::time::Duration, String> {
    let (number, scale) = match text.strip_suffix("ms") {
        Some(number) => (number, 0.001),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let seconds: f64 = number.parse().map_err(|_| "a duration looks like 30, 0.5, 30s or 500ms".to_owned())?;
    std::time::Duration::try_from_secs_f64(seconds * scale).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_and_durations_are_read_with_their_units() {
        let bytes = [("4096", 4096), ("2k", 2048), ("1.5GiB", 3 << 29), ("4GB", 4_000_000_000), ("0", 0)];
        for (text, want) in bytes {
            assert_eq!(parse_bytes(text), Ok(want), "{text}");
        }
        for text in ["", "GiB", "4 parsecs", "-1", "1e99GiB"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        assert_eq!(parse_seconds("500ms"), Ok(std::time::Duration::from_millis(500)));
        assert_eq!(parse_seconds("30s"), parse_seconds("30"));
        assert!(parse_seconds("-1").is_err());
    }
}
