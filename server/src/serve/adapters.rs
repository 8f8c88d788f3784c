//! Where this server gets adapters from, and where it keeps them.

use std::sync::Arc;

use anyhow::{Context, anyhow};
use futures_util::future::BoxFuture;
use loramux_router::adapters::{
    AdapterSettings, Credential, FetchLimits, Fetcher, Files, FilesHere, Progress, Resolved, SourceKind, Sources,
    Store, Stored, Supply,
};
use loramux_router::engine::AdapterFailure;
use loramux_router::http::glob_set;

use crate::args::SourceChoice;
use crate::config::Config;

/// Kinds in the order in which they are shown.
const KINDS: [SourceKind; 5] = [SourceKind::Hub, SourceKind::S3, SourceKind::Gcs, SourceKind::Http, SourceKind::Local];

/// Opens the store, and everything that fills it.
pub(super) fn supply(config: &Config) -> anyhow::Result<Supply> {
    let args = &config.args.sources;
    let sources = Arc::new(Sources::new(config.sources.clone()).map_err(|error| anyhow!("{error}"))?);
    let kinds = KINDS.into_iter().filter(|kind| sources.has(*kind)).collect();
    let store = Store::open(&config.data_dir, args.adapter_disk_quota).context("cannot open the adapter store")?;
    let store = Arc::new(store);
    let mut limits = FetchLimits::with_total(args.adapter_loads);
    limits.weights_bytes_max = args.adapter_max_bytes;
    let fetcher = Fetcher::new(Arc::clone(&sources) as _, Arc::clone(&store), limits);
    Ok(Supply { source: sources, kinds, files: Arc::new(Downloads { fetcher, store }) })
}

/// The disk store and what fills it, as the registry uses them.
struct Downloads {
    fetcher: Fetcher,
    store: Arc<Store>,
}

impl Files for Downloads {
    fn fetch<'a>(
        &'a self,
        resolved: &'a Resolved,
        credential: &'a Credential,
        tenant: u64,
    ) -> BoxFuture<'a, Result<FilesHere, AdapterFailure>> {
        Box::pin(async move {
            let fetched = self.fetcher.fetch(resolved, credential, tenant, &Progress::default()).await;
            fetched.map(here).map_err(|error| AdapterFailure {
                retry_after: error.retry_after(),
                ..AdapterFailure::new(error.code(), error.to_string())
            })
        })
    }

    fn here(&self, identity: &str) -> Option<FilesHere> {
        self.store.get(identity).map(here)
    }

    fn forget(&self, identity: &str) -> u64 {
        self.store.forget(identity)
    }
}

fn here(stored: Stored) -> FilesHere {
    FilesHere { dir: stored.dir().to_owned(), guard: Some(Arc::new(stored)) }
}

/// What the operator set.
pub(super) fn settings(config: &Config) -> anyhow::Result<AdapterSettings> {
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
        allowed: (globs != ["*"]).then_some(allowed),
        share_hub_token: config.share_hub_token,
        data_dir: Some(config.data_dir.clone()),
        loads_max: args.adapter_loads,
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
