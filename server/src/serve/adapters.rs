//! Where this server gets adapters from, and where it keeps them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use loramux_router::adapters::{AdapterSettings, FetchLimits, Fetcher, SourceKind, Sources, Store, Supply};
use loramux_router::http::glob_set;

use crate::args::SourceChoice;
use crate::config::Config;

/// Kinds in the order in which they are shown.
const KINDS: [SourceKind; 5] = [SourceKind::Hub, SourceKind::S3, SourceKind::Gcs, SourceKind::Http, SourceKind::Local];

/// Servers of one data directory that have no port of their own to go by.
const SERVERS_MAX: u32 = 64;

/// What fills the registry, and where what it learns is kept.
pub(super) struct Opened {
    pub(super) supply: Supply,
    /// Holds the store and the registrations.
    pub(super) dir: PathBuf,
}

/// Opens the store, and everything that fills it.
pub(super) fn open(config: &Config) -> anyhow::Result<Opened> {
    let args = &config.args.sources;
    let scale = args.test_time_scale;
    let mut settings = config.sources.clone();
    settings.pace = settings.pace.scaled(scale);
    let sources = Arc::new(Sources::new(settings).map_err(|error| anyhow!("{error}"))?);
    let kinds = KINDS.into_iter().filter(|kind| sources.has(*kind)).collect();
    let (store, dir) = open_store(config)?;
    let store = Arc::new(store);
    let mut limits = FetchLimits::with_total(args.adapter_loads);
    limits.weights_bytes_max = args.adapter_max_bytes;
    limits.retry_pause = limits.retry_pause.mul_f64(scale);
    limits.failure_kept = limits.failure_kept.mul_f64(scale);
    let fetcher = Fetcher::new(Arc::clone(&sources) as _, Arc::clone(&store), limits);
    Ok(Opened { supply: Supply::new(sources, kinds, fetcher, store), dir })
}

/// A directory belongs to one server. The next one of this machine gets a folder in it: the same one after a restart, if
/// its port was chosen, whoever starts first then.
fn open_store(config: &Config) -> anyhow::Result<(Store, PathBuf)> {
    let quota = config.args.sources.adapter_disk_quota;
    let folders = match config.port {
        0 => (2..=SERVERS_MAX).map(|n| format!("server-{n}")).collect(),
        port => vec![format!("port-{port}")],
    };
    let mut dirs: Vec<PathBuf> = folders.iter().map(|folder| config.data_dir.join(folder)).collect();
    let has_own = config.port != 0 && dirs.iter().all(|dir| dir.is_dir());
    dirs.insert(if has_own { dirs.len() } else { 0 }, config.data_dir.clone());
    for dir in dirs {
        match Store::open(&dir, quota) {
            Ok(store) => {
                if dir != config.data_dir {
                    tracing::warn!(
                        "adapters and registrations lie in {}; give each server its own --data-dir",
                        dir.display()
                    );
                }
                return Ok((store, dir));
            }
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                tracing::warn!("{} is in use by another server, so its registrations are not seen here", dir.display());
            }
            Err(error) => return Err(error).context("cannot open the adapter store"),
        }
    }
    Err(anyhow!("--data-dir: other servers use {} and its folders; choose another", config.data_dir.display()))
}

/// What the operator set.
pub(super) fn settings(config: &Config, dir: &Path) -> anyhow::Result<AdapterSettings> {
    let args = &config.args.sources;
    let globs: Vec<String> =
        args.allow_adapters.iter().map(|glob| glob.trim().to_owned()).filter(|g| !g.is_empty()).collect();
    let allowed = glob_set(&globs).map_err(|reason| anyhow!("--allow-adapters: {reason}"))?;
    Ok(AdapterSettings {
        registered: config.adapters.clone(),
        dirs: config.adapter_dirs.clone(),
        source_prefixes: config.source_prefixes.clone(),
        base_names: config.served_names.clone(),
        default_source: match args.adapter_source {
            SourceChoice::Hub => SourceKind::Hub,
            SourceChoice::S3 => SourceKind::S3,
            SourceChoice::Gcs => SourceKind::Gcs,
            SourceChoice::Http => SourceKind::Http,
            SourceChoice::Local => SourceKind::Local,
        },
        source_defaults: config.source_defaults.clone(),
        allowed: (globs != ["*"]).then_some(allowed),
        share_hub_token: config.share_hub_token,
        data_dir: Some(dir.to_owned()),
        loads_max: args.adapter_loads,
        tokenizer: None,
        time_scale: args.test_time_scale,
    })
}

/// One line for people.
pub(super) fn shown_sources(config: &Config, kinds: &[SourceKind]) -> String {
    let one = |kind: &SourceKind| match kind {
        SourceKind::Hub => {
            let hub = &config.sources.hub;
            let who = if hub.token.is_some() { "with a token" } else { "without a token" };
            let how = if hub.is_offline { "offline, cached files only".to_owned() } else { who.to_owned() };
            format!("hub {} ({how})", hub.endpoint)
        }
        SourceKind::Http => format!("http ({})", config.sources.http.hosts.join(", ")),
        other => other.name().to_owned(),
    };
    kinds.iter().map(one).collect::<Vec<_>>().join(", ")
}
