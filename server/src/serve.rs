//! `loramux serve`: binds, starts the shard, serves until told to stop.

mod adapters;
mod admin;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use loramux_router::adapters::{AdapterSettings, Registry};
use loramux_router::engine::{self, EngineError, EngineHandle, EngineOptions, ShardLauncher};
use loramux_router::http::{self, App, Backend, HttpLimits, RouterConfig};
use loramux_router::text::{TextFiles, TextModel};

use crate::args::{LogFormat, ServeArgs, ShardMode};
use crate::config::{self, Config, Env};
use crate::fetch_model;
use crate::shard::in_process::InProcessLauncher;
use crate::shard::process::ProcessLauncher;
use crate::terminal::{LoadProgress, Summary, init_logs};

pub(crate) fn main(args: ServeArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let (format, level) = config::log_settings(&args);
    init_logs(format, &level).map_err(|e| anyhow!(e))?;
    if !args.network.allow_core_dumps {
        keep_memory_private();
        raise_open_files();
    }
    for notice in &args.notices {
        tracing::warn!("{notice}");
    }
    let env = Env::read();
    let mut config = Config::resolve(args, &env)?;
    let listener = bind(&config)?;
    let admin = admin::bind(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start tokio")?;
    let adapters::Opened { supply, dir: adapters_dir } = {
        let _inside = runtime.enter();
        adapters::open(&config)?
    };
    let progress = Arc::new(LoadProgress::default());
    if let Some(model) = &config.remote_model {
        config.shard.model = runtime.block_on(fetch_model::fetch(model, &config, &progress))?;
    }
    let text = load_text(&config)?;
    tracing::info!(model = %config.shard.model.display(), "loading");
    let (engine, ready, thread) = start_engine(&config, &progress)?;
    let info = ready.recv().map_err(|_| anyhow!("the engine ended before it was ready"))?;
    progress.clear();
    let info = info?;
    let address = listener.local_addr().context("the listener has no address")?;
    let names: Vec<String> = config.adapters.iter().map(|(name, _)| name.clone()).collect();
    let dirs: Vec<String> = config.adapter_dirs.iter().map(|dir| dir.display().to_string()).collect();
    let summary = Summary {
        info: &info,
        names: &config.served_names,
        adapters: &names,
        adapter_dirs: &dirs,
        sources: &adapters::shown_sources(&config, &supply.kinds),
        address: &shown_address(&config.host, address),
        admin: admin.as_ref().map(|admin| admin.address.as_str()),
        keys: config.keys.iter().filter(|key| !key.is_admin).count(),
        took: started.elapsed(),
    };
    announce(&config, &summary);
    let backend = Arc::new(engine.clone());
    let registry = {
        let _inside = runtime.enter();
        Registry::open(
            AdapterSettings { tokenizer: Some(text.clone()), ..adapters::settings(&config, &adapters_dir)? },
            Arc::clone(&backend) as Arc<dyn Backend>,
            Some(supply),
        )?
    };
    let app = App::with_registry(router_config(&config), text, backend, registry);
    // Half of what reading a tokenizer takes is for the reading alone.
    crate::shard::give_back_freed();
    let started = Started { runtime, listener, admin, app, config, env };
    started.serve(&engine, thread)
}

/// Neither dumps nor debuggers of the same user may read this process: it holds keys and tokens.
fn keep_memory_private() {
    // SAFETY: `prctl` with these arguments sets a flag of this process and touches no memory.
    let outcome = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    if outcome != 0 {
        tracing::warn!("memory dumps of this process cannot be turned off: {}", std::io::Error::last_os_error());
    }
}

/// As many open files as the system allows: the usual soft limit of 1024 is less than the connections this server takes.
pub(crate) fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls read or write one `rlimit` of this frame.
    let outcome = unsafe {
        let known = libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        if known == 0 { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } else { known }
    };
    if outcome != 0 {
        tracing::warn!("the limit of open files stays as it is: {}", std::io::Error::last_os_error());
    }
}

fn bind(config: &Config) -> anyhow::Result<TcpListener> {
    let address = format!("{}:{}", config.host.trim_matches(['[', ']']), config.port);
    let listener = TcpListener::bind((config.host.trim_matches(['[', ']']), config.port)).map_err(|e| {
        let hint = match e.kind() {
            std::io::ErrorKind::AddrInUse => "another program listens there; stop it, or choose another --port",
            std::io::ErrorKind::PermissionDenied => "ports below 1024 need privileges; choose another --port",
            std::io::ErrorKind::AddrNotAvailable => "this machine has no such address; check --host",
            _ => "check --host and --port",
        };
        anyhow!("cannot listen on {address}: {e}\n  {hint}")
    })?;
    listener.set_nonblocking(true).context("cannot make the listener non-blocking")?;
    Ok(listener)
}

fn load_text(config: &Config) -> anyhow::Result<TextModel> {
    let files = loramux_models::text_files(&config.shard.model)?;
    let files = TextFiles {
        tokenizer_json: files.tokenizer_json,
        tokenizer_config: files.tokenizer_config,
        generation_config: files.generation_config,
        chat_template: config.chat_template.clone().or(files.chat_template),
        special_tokens_map: files.special_tokens_map,
        config_eos: files.config_eos,
        config_bos: files.config_bos,
    };
    Ok(TextModel::new(files)?)
}

type EngineThread = JoinHandle<Result<(), EngineError>>;

fn start_engine(
    config: &Config,
    progress: &Arc<LoadProgress>,
) -> anyhow::Result<(EngineHandle, engine::Started, EngineThread)> {
    let args = &config.args;
    let launcher: Box<dyn ShardLauncher> = match config.shard_mode {
        ShardMode::InProcess => Box::new(InProcessLauncher { options: config.shard.clone() }),
        ShardMode::Process => {
            let program = std::env::current_exe().context("cannot find this program's own file")?;
            Box::new(ProcessLauncher { program, options: config.shard.clone(), write_timeout: config.step_watchdog })
        }
    };
    let shown = Arc::clone(progress);
    let options = EngineOptions {
        queued_requests_max: args.engine.max_queued_requests,
        queued_tokens_max: args.engine.max_queued_tokens,
        running_max: args.engine.max_num_seqs,
        step_tokens: args.engine.max_num_batched_tokens.unwrap_or(u32::MAX),
        prefix_caching: args.engine.prefix_caching,
        prefix_key: random_key(),
        host_adapter_bytes: config.shard.host_adapter_bytes,
        rank_max: args.adapters.max_lora_rank,
        step_watchdog: config.step_watchdog,
        progress: Box::new(move |loading| shown.show(loading)),
    };
    engine::spawn(launcher, options).context("cannot start the engine thread")
}

/// Two random UUIDs: 244 bits that nobody outside this process knows.
fn random_key() -> [u8; 32] {
    let mut key = [0; 32];
    key[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    key[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    key
}

/// Where the base model comes from, as `/v1/models` says it.
fn model_root(config: &Config) -> String {
    match &config.remote_model {
        Some(model) => model.name(),
        None if config.is_demo => "embedded".to_owned(),
        None => config.shard.model.display().to_string(),
    }
}

fn router_config(config: &Config) -> RouterConfig {
    let args = &config.args;
    RouterConfig {
        served_names: config.served_names.clone(),
        model_root: model_root(config),
        max_model_len: args.model.max_model_len,
        use_generation_config: config.use_generation_config,
        tool_call_parser: args.model.tool_call_parser.format(),
        reasoning_parser: args.model.reasoning_parser.into(),
        pooling: args.model.pooling.of_model(&config.shard.model),
        keys: config.keys.clone(),
        requires_key: config.args.network.keys_file.is_some(),
        allow_runtime_adapters: config.allow_runtime_adapters,
        trust_loopback_adapters: args.sources.trust_loopback_adapters,
        allow_base_fallback: args.sources.allow_base_fallback,
        adapter_load_timeout: args.adapters.adapter_load_timeout,
        request_timeout: args.network.request_timeout,
        drain_timeout: args.network.drain_timeout,
        limits: HttpLimits {
            body_bytes: usize::try_from(args.network.max_body_bytes).unwrap_or(usize::MAX),
            connections_max: args.network.max_connections,
            n_max: args.engine.max_n,
            native_stops_max: args.engine.max_stop_sequences as usize,
            requests_max: args.engine.max_queued_requests,
            grammar_bytes: usize::try_from(args.engine.max_grammar_bytes).unwrap_or(usize::MAX),
            sequences_max: args.engine.max_sequences_per_request as usize,
            composed_max: args.adapters.max_composed_adapters as usize,
            ..HttpLimits::default()
        },
        trust_request_chat_template: args.model.trust_request_chat_template,
        use_adapter_templates: args.adapters.adapter_chat_template,
        strict_fields: args.network.strict_fields,
        cors_origins: config.cors_origins.clone(),
        metrics_keys: config.metrics_keys.clone(),
        default_adapter: config.default_adapter.clone(),
        settings: args.settings.clone(),
        access_log: args.observe.access_log.into(),
        otlp: config.otlp.clone(),
        lorax_metrics: args.observe.lorax_metrics,
        adapter_metrics: args.observe.adapter_metrics.into(),
        adapter_metrics_names: args.observe.adapter_metrics_names.clone(),
        ..RouterConfig::default()
    }
}

fn shown_address(host: &str, address: SocketAddr) -> String {
    if address.ip().is_unspecified() {
        format!("localhost:{}", address.port())
    } else {
        format!("{host}:{}", address.port())
    }
}

/// A page for people unless logs are JSON, and one structured line in the log.
fn announce(config: &Config, summary: &Summary<'_>) {
    for note in &summary.info.notes {
        tracing::info!("{note}");
    }
    if summary.keys == 0 {
        tracing::warn!("no --api-key: everyone who can reach this address can use the server");
        if config.allow_runtime_adapters && !config.keys.iter().any(|key| key.is_admin) {
            tracing::warn!("--allow-runtime-adapters without a key: they can load and unload adapters too");
        }
    }
    if config::log_settings(&config.args).0 == LogFormat::Text {
        eprintln!("{}", summary.text());
    }
    tracing::info!(
        address = summary.address,
        admin = summary.admin.unwrap_or("off"),
        sources = summary.sources,
        model = summary.names.join(","),
        dtype = summary.info.dtype,
        device = summary.info.device,
        adapters = summary.adapters.len(),
        load_ms = summary.info.load_ms,
        "ready"
    );
}

/// Everything there is before the first request.
struct Started {
    runtime: tokio::runtime::Runtime,
    listener: TcpListener,
    admin: Option<admin::Bound>,
    app: App,
    config: Config,
    env: Env,
}

impl Started {
    fn serve(self, engine: &EngineHandle, thread: EngineThread) -> anyhow::Result<()> {
        let Self { runtime, listener, admin, app, config, env } = self;
        let (ended_sender, ended) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name("engine-watch".into()).spawn(move || {
            let outcome =
                thread.join().unwrap_or_else(|_| Err(EngineError::Start("the engine thread panicked".into())));
            let _ = ended_sender.send(outcome);
        })?;
        let served = runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            if let Some(admin) = admin {
                tokio::spawn(http::serve_admin(admin.listener()?, app.clone()));
            }
            if config.args.network.keys_file.is_some() || config.args.network.api_key_file.is_some() {
                tokio::spawn(reload_keys(app.clone(), config, env));
            }
            tokio::select! {
                served = http::serve(listener, app, stop_signal()) => served.context("the listener failed"),
                outcome = ended => match outcome {
                    Ok(Err(error)) => bail!("{error}"),
                    _ => bail!("the engine ended"),
                },
            }
        });
        engine.shut_down();
        // Blocking threads (a tokenizer at work) are not waited for.
        runtime.shutdown_timeout(Duration::from_secs(1));
        if served.is_ok() {
            tracing::info!("stopped");
        }
        served
    }
}

/// SIGHUP: reads the files of keys again. A mistake in them leaves the keys as they are.
async fn reload_keys(app: App, config: Config, env: Env) {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    while hangup.recv().await.is_some() {
        match config::read_keys(&config.args.network, &env) {
            Ok(keys) => {
                app.set_keys(&keys);
                tracing::info!(keys = keys.len(), "keys were read again");
            }
            Err(error) => tracing::error!("keys stay as they were: {error}"),
        }
    }
}

/// SIGTERM or Ctrl-C: drain. The second one ends the process at once.
async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    tracing::info!("stopping: no new requests, running ones finish (a second signal stops at once)");
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        std::process::exit(130);
    });
}
