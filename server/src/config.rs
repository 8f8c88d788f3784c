//! What is meant: built once from what was typed and the environment, then never changed. The only reader of the
//! environment besides the flags' own variables.

pub(crate) mod adapters;
mod keys;
pub(crate) mod observe;
pub(crate) mod parsers;
mod sources;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use loramux_router::adapters::sources::ModelRef;
use loramux_router::adapters::{AdapterRef, SourceDefaults, SourceKind, SourceSettings};
use loramux_router::http::{CorsOrigin, KeySpec};
use loramux_router::observe::OtlpSettings;

pub(crate) use keys::read_keys;

use crate::args::{Fusion, LogFormat, ServeArgs, ShardMode, SourceArgs};
use crate::demo;
use crate::shard::{CudaPaths, ShardOptions, host_adapter_bytes_auto, is_gguf};

/// A mistake of the operator: what was found, what is accepted, what to change.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error(
        "--model-id: no such file or directory: {0}\n  give the folder that holds config.json and *.safetensors, a .gguf file, org/model[@revision], or s3://bucket/prefix"
    )]
    ModelMissing(String),
    #[error("--model-id {0}: {1}")]
    ModelRef(String, String),
    #[error(
        "--model-id: {0} has no config.json\n  give the folder that holds config.json and *.safetensors, or a .gguf file"
    )]
    ModelWithoutConfig(String),
    #[error("--adapter {0}: must be NAME=REF, such as --adapter sql=./loras/sql or sql=hf://acme/sql-lora")]
    AdapterForm(String),
    #[error("--adapter {0}: the name must be letters, digits, `.`, `_`, `-`, with at most one `/`")]
    AdapterName(String),
    #[error("--adapter {0}: given twice")]
    AdapterTwice(String),
    #[error(
        "--adapter {name}={path}: no such directory\n  give the folder that holds adapter_config.json, or hf://org/repo, s3://bucket/path, .."
    )]
    AdapterMissing { name: String, path: String },
    #[error("--adapter {name}: {reason}")]
    AdapterRef { name: String, reason: String },
    #[error("--adapter {name}: the base model is served under this name; choose another, or set --served-model-name")]
    AdapterIsBase { name: String },
    #[error("--{flag}: cannot read {path}: {reason}")]
    File { flag: &'static str, path: String, reason: String },
    #[error("--{flag}: no such directory: {path}")]
    DirMissing { flag: &'static str, path: String },
    #[error("--{flag}: must be {rule}; got {value}")]
    Range { flag: &'static str, rule: &'static str, value: String },
    #[error("--served-model-name: must be names of 1..256 characters without blanks; got `{0}`")]
    ServedName(String),
    #[error("--chat-template: {path} is JSON without a `chat_template`")]
    NoChatTemplate { path: String },
    #[error("{name}: {reason}")]
    Variable { name: &'static str, reason: String },
    #[error("--chat-template: cannot read {path}: {error}")]
    ChatTemplate { path: String, error: std::io::Error },
    #[error("cannot unpack the built-in model into {path}: {error}\n  set --data-dir to a folder this user may write")]
    Demo { path: String, error: std::io::Error },
}

/// How the server runs.
#[derive(Debug)]
pub(crate) struct Config {
    /// Its `model` is a placeholder as long as `remote_model` is not here.
    pub(crate) shard: ShardOptions,
    /// The base model is to be fetched first.
    pub(crate) remote_model: Option<ModelRef>,
    pub(crate) shard_mode: ShardMode,
    pub(crate) step_watchdog: Duration,
    pub(crate) served_names: Vec<String>,
    pub(crate) is_demo: bool,
    pub(crate) adapters: Vec<(String, AdapterRef)>,
    pub(crate) adapter_dirs: Vec<PathBuf>,
    pub(crate) sources: SourceSettings,
    pub(crate) source_defaults: SourceDefaults,
    pub(crate) source_prefixes: Vec<String>,
    pub(crate) share_hub_token: bool,
    pub(crate) allow_runtime_adapters: bool,
    pub(crate) keys: Vec<KeySpec>,
    pub(crate) admin: AdminListen,
    pub(crate) data_dir: PathBuf,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) chat_template: Option<String>,
    pub(crate) use_generation_config: bool,
    pub(crate) default_adapter: Option<String>,
    pub(crate) cors_origins: Vec<CorsOrigin>,
    pub(crate) metrics_keys: Vec<KeySpec>,
    pub(crate) otlp: Option<OtlpSettings>,
    pub(crate) args: ServeArgs,
}

/// Where the admin API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AdminListen {
    /// Nowhere.
    Off,
    /// At the address nobody typed: not being able to is no failure.
    Default,
    /// At this address.
    Address(String),
    /// At this socket file.
    Unix(PathBuf),
}

/// The environment's variables that are not flags of ours.
#[derive(Debug, Default)]
pub(crate) struct Env(HashMap<String, String>);

impl Env {
    /// As it is now.
    pub(crate) fn read() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self(std::env::vars_os().filter_map(text).collect())
    }

    /// The first of these variables that is set and not empty.
    pub(crate) fn first(&self, names: &[&str]) -> Option<&str> {
        names.iter().find_map(|name| self.0.get(*name)).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// True if it is set to nothing.
    fn is_blank(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| value.trim().is_empty())
    }

    /// For tests.
    #[cfg(test)]
    pub(crate) fn of(variables: &[(&str, &str)]) -> Self {
        Self(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    /// True for 1, true, yes, on, whatever their case.
    fn is_true(&self, name: &str) -> bool {
        let yes = |value: &str| ["1", "true", "yes", "on"].iter().any(|word| value.eq_ignore_ascii_case(word));
        self.first(&[name]).is_some_and(yes)
    }

    /// The parts of a list, separated by commas or spaces.
    fn list(&self, name: &str) -> Vec<String> {
        let parts = self.first(&[name]).unwrap_or("").split([',', ' ']);
        parts.map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
    }
}

/// Log settings; needed before anything can fail.
pub(crate) fn log_settings(args: &ServeArgs) -> (LogFormat, String) {
    let format = if args.output.json_output { LogFormat::Json } else { args.output.log_format };
    (format, args.output.log_level.clone())
}

/// Each must be a place that references can lie below.
fn prefixes(typed: &[String]) -> Result<Vec<String>, ConfigError> {
    let check = |prefix: &String| match AdapterRef::parse(&format!("{}/x", prefix.trim_end_matches('/'))) {
        Ok(_) if prefix.contains("://") || prefix.starts_with('/') => Ok(prefix.clone()),
        _ => {
            let rule = "s3://bucket/path/, gs://bucket/path/, https://host/path/, hf://org or an absolute folder";
            Err(ConfigError::Range { flag: "adapter-source-prefix", rule, value: prefix.clone() })
        }
    };
    typed.iter().map(check).collect()
}

impl Config {
    /// Checks everything that can be checked without loading the model.
    pub(crate) fn resolve(args: ServeArgs, env: &Env) -> Result<Self, ConfigError> {
        check_ranges(&args)?;
        let is_demo = args.model.model_id.is_none();
        let revision = args.model.revision.as_deref().map(str::trim).filter(|revision| !revision.is_empty());
        let remote_model =
            args.model.model_id.as_deref().map(|typed| remote_model(typed, revision)).transpose()?.flatten();
        let (model, demo_adapters) = match (&args.model.model_id, &remote_model) {
            (_, Some(remote)) => (PathBuf::from(remote_name(remote)), Vec::new()),
            (Some(path), None) => (check_model(path, args.model.load_format)?, Vec::new()),
            (None, None) => unpack_demo(&args)?,
        };
        let default_name = match &remote_model {
            Some(remote) => Some(remote_name(remote)),
            None => is_demo.then(|| demo::NAME.to_owned()),
        };
        let served_names = served_names(&args, &model, default_name)?;
        let mut adapters = adapters::registered(&args.adapters, env, demo_adapters, &served_names)?;
        let default_adapter = adapters::default_adapter(&args.adapters, &mut adapters)?;
        let data_dir = args.engine.data_dir.clone().unwrap_or_else(default_data_dir);
        let data_dir = std::path::absolute(&data_dir).unwrap_or(data_dir);
        let adapter_dirs = adapters::directories("adapter-dir", &args.adapters.adapter_dir)?;
        let sources = sources::settings(&args.sources, env, &adapters, &adapter_dirs, &data_dir)?;
        let keys = read_keys(&args.network, env)?;
        keys::refuse_open_by_file(&args.network, &keys)?;
        let admin = keys::admin_listen(&args.network, &keys)?;
        Ok(Self {
            shard: shard_options(&args, model, served_names[0].clone()),
            remote_model,
            shard_mode: args.engine.shard_mode,
            step_watchdog: args.engine.step_watchdog,
            served_names,
            is_demo,
            adapters,
            adapter_dirs,
            sources,
            source_defaults: sources::defaults(env),
            source_prefixes: prefixes(&args.sources.adapter_source_prefix)?,
            share_hub_token: args.sources.share_hub_token || env.is_true("LORAX_USE_GLOBAL_HF_TOKEN"),
            allow_runtime_adapters: args.sources.allow_runtime_adapters
                || env.is_true("VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
            keys,
            admin,
            data_dir,
            host: args.network.host.clone(),
            port: args.network.port,
            chat_template: args.model.chat_template.as_deref().map(chat_template).transpose()?,
            use_generation_config: args.model.generation_config != "none",
            default_adapter,
            metrics_keys: keys::metrics_keys(&args.network)?,
            otlp: observe::otlp(&args.observe, env)?,
            cors_origins: origins(&args.network.cors_allow_origin)?,
            args,
        })
    }
}

/// A Jinja file, or the `chat_template` of a tokenizer_config.json.
fn chat_template(path: &Path) -> Result<String, ConfigError> {
    let shown = || path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::ChatTemplate { path: shown(), error })?;
    match serde_json::from_str::<serde_json::Value>(&text) {
        Ok(serde_json::Value::Object(config)) => {
            let template = config.get("chat_template").and_then(|template| template.as_str());
            template.map(str::to_owned).ok_or_else(|| ConfigError::NoChatTemplate { path: shown() })
        }
        _ => Ok(text),
    }
}

/// Typed one by one, or as a JSON list, as another server's flag takes them.
fn origins(typed: &[String]) -> Result<Vec<CorsOrigin>, ConfigError> {
    let bare = |text: &String| text.trim_matches(|c: char| c.is_whitespace() || "[]\"'".contains(c)).to_owned();
    let read = |origin: String| {
        let range = |rule| ConfigError::Range { flag: "cors-allow-origin", rule, value: origin.clone() };
        CorsOrigin::parse(&origin).map_err(range)
    };
    typed.iter().map(bare).map(read).collect()
}

fn check_ranges(args: &ServeArgs) -> Result<(), ConfigError> {
    let engine = &args.engine;
    let range = |flag, rule, value: String| Err(ConfigError::Range { flag, rule, value });
    if !["auto", "none"].contains(&args.model.generation_config.as_str()) {
        return range("generation-config", "auto or none", args.model.generation_config.clone());
    }
    if !(1..=4096).contains(&engine.max_num_seqs) {
        return range("max-num-seqs", "1..4096", engine.max_num_seqs.to_string());
    }
    if let Some(tokens) = engine.max_num_batched_tokens.filter(|n| !(engine.max_num_seqs..=1 << 17).contains(n)) {
        let rule = "at least --max-num-seqs and at most 131072";
        return range("max-num-batched-tokens", rule, tokens.to_string());
    }
    if !(1..=512).contains(&args.adapters.max_lora_rank) {
        return range("max-lora-rank", "1..512", args.adapters.max_lora_rank.to_string());
    }
    if !(1..=16).contains(&args.adapters.max_composed_adapters) {
        return range("max-composed-adapters", "1..16", args.adapters.max_composed_adapters.to_string());
    }
    if !(1..=128).contains(&engine.max_n) {
        return range("max-n", "1..128", engine.max_n.to_string());
    }
    if !(1..=16).contains(&engine.max_stop_sequences) {
        return range("max-stop-sequences", "1..16", engine.max_stop_sequences.to_string());
    }
    if !(1..=1 << 20).contains(&engine.max_grammar_bytes) {
        return range("max-grammar-bytes", "1..1MiB", engine.max_grammar_bytes.to_string());
    }
    if args.sources.adapter_loads == 0 {
        return range("adapter-loads", "at least 1", "0".into());
    }
    if args.adapters.max_loras == Some(0) {
        return range("max-loras", "at least 1", "0".into());
    }
    if args.network.request_timeout.is_some_and(|limit| limit.is_zero()) {
        return range("request-timeout", "more than 0", "0".into());
    }
    if args.network.max_body_bytes < 1024 {
        return range("max-body-bytes", "at least 1KiB", args.network.max_body_bytes.to_string());
    }
    if engine.max_queued_requests == 0 {
        return range("max-queued-requests", "at least 1", "0".into());
    }
    if engine.threads == Some(0) {
        return range("threads", "at least 1", "0".into());
    }
    if args.model.max_model_len.is_some_and(|tokens| tokens < 2) {
        return range("max-model-len", "at least 2", args.model.max_model_len.unwrap_or(0).to_string());
    }
    if engine.step_watchdog < Duration::from_millis(100) {
        return range("step-watchdog", "at least 100ms", format!("{:?}", engine.step_watchdog));
    }
    Ok(())
}

/// What is no path of this machine and looks like a reference is one.
fn remote_model(typed: &Path, revision: Option<&str>) -> Result<Option<ModelRef>, ConfigError> {
    let Some(text) = typed.to_str().filter(|_| !typed.exists()) else { return Ok(None) };
    let with_revision = revision.filter(|_| !text.contains('@')).map(|revision| format!("{text}@{revision}"));
    let text = with_revision.as_deref().unwrap_or(text);
    let has_scheme = text.contains("://") && !text.starts_with("file://");
    if !has_scheme && (text.starts_with(['/', '.', '~']) || !text.contains('/')) {
        return Ok(None);
    }
    match ModelRef::parse(text) {
        Ok(model) => Ok(Some(model)),
        Err(error) if has_scheme => Err(ConfigError::ModelRef(text.to_owned(), error.to_string())),
        Err(_) => Ok(None),
    }
}

/// How a fetched model is called where nobody says so: as typed on the hub, else its last part.
fn remote_name(model: &ModelRef) -> String {
    let locator = &model.reference.locator;
    match &model.gguf {
        Some(file) => file.trim_end_matches(".gguf").to_owned(),
        None if model.reference.source == SourceKind::Hub => locator.clone(),
        None => locator.rsplit('/').next().unwrap_or(locator).to_owned(),
    }
}

/// The hub's client library takes tokens from the environment by itself, unless it is told not to. Must be the first thing
/// that this process does.
pub(crate) fn no_implicit_hub_token() {
    // SAFETY: no other thread runs yet, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1") };
}

fn check_model(path: &Path, format: crate::shard::LoadFormatChoice) -> Result<PathBuf, ConfigError> {
    let shown = path.display().to_string();
    let Ok(full) = path.canonicalize() else { return Err(ConfigError::ModelMissing(shown)) };
    let has_gguf = || {
        let entries = std::fs::read_dir(&full).ok();
        entries.is_some_and(|mut entries| entries.any(|entry| entry.is_ok_and(|entry| is_gguf(&entry.path()))))
    };
    let dummy = format == crate::shard::LoadFormatChoice::Dummy;
    let loadable = full.is_file() || full.join("config.json").is_file() || (!dummy && has_gguf());
    if loadable { Ok(full) } else { Err(ConfigError::ModelWithoutConfig(shown)) }
}

type Named = Vec<(String, PathBuf)>;

fn unpack_demo(args: &ServeArgs) -> Result<(PathBuf, Named), ConfigError> {
    let data_dir = args.engine.data_dir.clone().unwrap_or_else(default_data_dir);
    let data_dir = std::path::absolute(&data_dir).unwrap_or(data_dir);
    let unpacked =
        demo::unpack(&data_dir).map_err(|error| ConfigError::Demo { path: data_dir.display().to_string(), error })?;
    Ok((unpacked.model, unpacked.adapters))
}

pub(crate) fn default_data_dir() -> PathBuf {
    let dir = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = dir("XDG_CACHE_HOME").or_else(|| dir("HOME").map(|home| home.join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("loramux")
}

fn served_names(args: &ServeArgs, model: &Path, default_name: Option<String>) -> Result<Vec<String>, ConfigError> {
    let typed: Vec<String> = args.model.served_model_name.iter().map(|name| name.trim().to_owned()).collect();
    let is_name =
        |name: &str| (1..=256).contains(&name.len()) && !name.contains(|c: char| c.is_whitespace() || c.is_control());
    if let Some(bad) = typed.iter().find(|name| !is_name(name)) {
        return Err(ConfigError::ServedName(bad.clone()));
    }
    if !typed.is_empty() {
        return Ok(typed);
    }
    if let Some(name) = default_name {
        return Ok(vec![name]);
    }
    let last = if model.is_file() { model.file_stem() } else { model.file_name() };
    Ok(vec![last.map_or_else(|| "base".to_owned(), |name| name.to_string_lossy().into_owned())])
}

fn shard_options(args: &ServeArgs, model: PathBuf, model_id: String) -> ShardOptions {
    ShardOptions {
        model,
        model_id,
        dtype: args.model.dtype,
        load_format: args.model.load_format,
        seed: args.model.seed,
        context_tokens_max: args.model.max_model_len,
        arena_bytes: args.engine.arena_bytes,
        step_tokens_max: args.engine.max_num_batched_tokens,
        seqs_max: args.engine.max_num_seqs,
        slots_max: args.adapters.max_loras,
        threads: args.engine.threads,
        cpu_isa: args.engine.cpu_isa.clone(),
        device: args.model.device,
        host_adapter_bytes: args.adapters.host_adapter_memory.unwrap_or_else(host_adapter_bytes_auto),
        kernel_cache_dir: kernel_cache_dir(args.model.kernel_cache_dir.as_deref()),
        cuda_paths: cuda_paths(&args.model.cuda_libraries),
        fuse_rope: args.model.cuda_fuse.contains(&Fusion::Rope),
        fuse_activation: args.model.cuda_fuse.contains(&Fusion::Activation),
        fuse_norm: args.model.cuda_fuse.contains(&Fusion::Norm),
    }
}

/// The folder that was typed, or `~/.cache/loramux/kernels`. Absolute: what is compiled there may name its neighbours.
pub(crate) fn kernel_cache_dir(typed: Option<&Path>) -> PathBuf {
    let dir = typed.map_or_else(|| default_data_dir().join("kernels"), Path::to_path_buf);
    std::path::absolute(&dir).unwrap_or(dir)
}

/// Sources for a program that serves nobody: `reference` is the operator's own, wherever it lies.
pub(crate) fn sources_alone(
    args: &SourceArgs,
    env: &Env,
    reference: &AdapterRef,
) -> Result<SourceSettings, ConfigError> {
    sources::settings(args, env, &[(String::new(), reference.clone())], &[], Path::new(""))
}

/// Where CUDA's libraries may be: the folders typed, and what the environment says.
pub(crate) fn cuda_paths(typed: &[PathBuf]) -> CudaPaths {
    let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    CudaPaths {
        dirs: typed.to_vec(),
        cuda_home: path("CUDA_HOME").or_else(|| path("CUDA_PATH")),
        virtual_env: path("VIRTUAL_ENV"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;
    use clap::Parser;

    fn resolve(typed: &[&str]) -> Result<Config, ConfigError> {
        let cli = Cli::try_parse_from([&["loramux"], typed].concat()).expect("parses");
        Config::resolve(cli.serve, &Env::default())
    }

    #[test]
    fn each_mistake_names_the_flag_and_what_to_change() {
        let here = env!("CARGO_MANIFEST_DIR");
        let cases: &[(&[&str], &str)] = &[
            (&["--model-id", "/nonexistent"], "--model-id: no such file"),
            (&["--model-id", "./org/model"], "--model-id: no such file"),
            (&["--model-id", "hf://org/../model"], "--model-id hf://org/../model: not a hub reference"),
            (&["--model-id", "ftp://host/model"], "--model-id ftp://host/model: not an adapter reference"),
            (&["--model-id", here], "has no config.json"),
            (&["--max-num-seqs", "0"], "--max-num-seqs: must be 1..4096; got 0"),
            (&["--max-num-batched-tokens", "8"], "--max-num-batched-tokens: must be at least --max-num-seqs"),
            (&["--max-lora-rank", "513"], "--max-lora-rank: must be 1..512"),
            (&["--threads", "0"], "--threads"),
            (&["--max-composed-adapters", "17"], "--max-composed-adapters: must be 1..16; got 17"),
            (&["--api-key", ""], "--api-key: must be a key that is not empty"),
            (&["--max-loras", "0"], "--max-loras: must be at least 1"),
            (&["--request-timeout", "0"], "--request-timeout: must be more than 0"),
            (&["--max-body-bytes", "1"], "--max-body-bytes: must be at least 1KiB"),
            (&["--max-n", "0"], "--max-n: must be 1..128; got 0"),
            (&["--generation-config", "x"], "--generation-config"),
            (&["--chat-template", "/nonexistent"], "--chat-template"),
            (&["--adapter", "x"], "must be NAME=REF"),
            (&["--adapter", "a/b/c=."], "at most one `/`"),
            (&["--adapter", "..=."], "--adapter ..: the name"),
            (&["--adapter", "x=/nonexistent"], "no such directory"),
            (&["--adapter", "x=.", "--adapter", "x=."], "given twice"),
            (&["--adapter", "demo=."], "the base model is served under this name"),
            (&["--adapter-dir", "/nonexistent"], "--adapter-dir: no such directory"),
        ];
        let data = tempfile::tempdir().unwrap();
        for (typed, want) in cases {
            let with_data = [typed, &["--data-dir", data.path().to_str().unwrap()][..]].concat();
            let error = resolve(&with_data).expect_err(&format!("{typed:?}")).to_string();
            assert!(error.contains(want), "{typed:?}: {error}");
        }
    }
}
