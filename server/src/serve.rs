//! `loramux serve`: binds, starts the shard, serves until told to stop.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use loramux_router::engine::{self, EngineError, EngineHandle, EngineOptions, ShardLauncher};
use loramux_router::http::{self, App, HttpLimits, RouterConfig};
use loramux_router::text::{TextFiles, TextModel};

use crate::args::{LogFormat, ServeArgs, ShardMode};
use crate::config::{self, Config};
use crate::shard::in_process::InProcessLauncher;
use crate::shard::process::ProcessLauncher;
use crate::terminal::{LoadProgress, Summary, init_logs};

pub(crate) fn main(args: ServeArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let (format, level) = config::log_settings(&args);
    init_logs(format, &level).map_err(|e| anyhow!(e))?;
    let config = Config::resolve(args)?;
    let listener = bind(&config)?;
    let text = load_text(&config)?;
    let progress = Arc::new(LoadProgress::default());
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
        address: &shown_address(&config.host, address),
        keys: config.args.network.api_key.len(),
        took: started.elapsed(),
    };
    announce(&config, &summary);
    let app = App::new(router_config(&config), text, engine.clone());
    serve(listener, app, &engine, thread)
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
        step_tokens: args.engine.max_num_batched_tokens,
        prefix_caching: args.engine.prefix_caching,
        prefix_key: random_key(),
        host_adapter_bytes: args.adapters.host_adapter_memory,
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

fn router_config(config: &Config) -> RouterConfig {
    let args = &config.args;
    RouterConfig {
        served_names: config.served_names.clone(),
        model_root: if config.is_demo { "embedded".into() } else { config.shard.model.display().to_string() },
        adapters: config.adapters.clone(),
        max_model_len: args.model.max_model_len,
        use_generation_config: config.use_generation_config,
        adapter_dirs: config.adapter_dirs.clone(),
        api_keys: args.network.api_key.clone(),
        adapter_load_timeout: args.adapters.adapter_load_timeout,
        request_timeout: args.network.request_timeout,
        drain_timeout: args.network.drain_timeout,
        limits: HttpLimits {
            body_bytes: usize::try_from(args.network.max_body_bytes).unwrap_or(usize::MAX),
            connections_max: args.network.max_connections,
            n_max: args.engine.max_n,
            sequences_max: args.engine.max_sequences_per_request as usize,
            composed_max: args.adapters.max_composed_adapters as usize,
            ..HttpLimits::default()
        },
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
    if config.args.network.api_key.is_empty() {
        tracing::warn!("no --api-key: everyone who can reach this address can use the server");
    }
    if config::log_settings(&config.args).0 == LogFormat::Text {
        eprintln!("{}", summary.text());
    }
    tracing::info!(
        address = summary.address,
        model = summary.names.join(","),
        dtype = summary.info.dtype,
        device = summary.info.device,
        adapters = summary.adapters.len(),
        load_ms = summary.info.load_ms,
        "ready"
    );
}

fn serve(listener: TcpListener, app: App, engine: &EngineHandle, thread: EngineThread) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start tokio")?;
    let (ended_sender, ended) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("engine-watch".into()).spawn(move || {
        let outcome = thread.join().unwrap_or_else(|_| Err(EngineError::Start("the engine thread panicked".into())));
        let _ = ended_sender.send(outcome);
    })?;
    let served = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
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
