//! `loramux adapters validate REF`: fetches an adapter into a folder that is removed again, and checks it against a model.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use loramux_models::adapter::{self, AdapterLimits};
use loramux_router::adapters::{
    AdapterRef, Credential, FetchLimits, Fetcher, Origin, Progress, Source, SourceError, Sources, Store, Stored, Tenant,
};
use loramux_router::engine::{AdapterCheck, ContentId, Refusal};
use loramux_router::http::adapter_report;

use super::args::ValidateArgs;
use super::{REFUSED, UNREACHABLE, table};
use crate::config::{self, ConfigError, Env};
use crate::demo;

pub(super) fn main(args: &ValidateArgs, json: bool) -> anyhow::Result<ExitCode> {
    let spec = match &args.model_id {
        Some(path) => loramux_models::describe(path).with_context(|| format!("--model-id {}", path.display()))?,
        None => loramux_models::describe(&demo_model()?)?,
    };
    let typed = match &args.revision {
        Some(revision) => format!("{}@{revision}", args.reference),
        None => args.reference.clone(),
    };
    let no = |code: &str, message: String| AdapterCheck {
        refusals: vec![Refusal { code: code.to_owned(), message }],
        ..AdapterCheck::default()
    };
    let reference = match config::adapters::reference("REF", &typed) {
        Ok(reference) => reference,
        Err(ConfigError::AdapterMissing { path, .. }) => {
            return show(None, &no("model_not_found", format!("no such directory: {path}")), json);
        }
        Err(ConfigError::AdapterRef { reason, .. }) => return show(None, &no("invalid_value", reason), json),
        Err(error) => return Err(error.into()),
    };
    let mut limits = AdapterLimits { bytes_max: args.sources.adapter_max_bytes, ..AdapterLimits::default() };
    limits.rank_max = limits.rank_max.min(args.max_lora_rank as usize);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let files = match runtime.block_on(fetch(args, &reference)) {
        Ok(files) => files,
        Err(Fetch::Refused(Refusal { code, message })) => return show(None, &no(&code, message), json),
        Err(Fetch::Unreachable(message)) => {
            eprintln!("error: {reference}: {message}");
            return Ok(ExitCode::from(UNREACHABLE));
        }
        Err(Fetch::Broken(error)) => return Err(error),
    };
    let found = adapter::check(&files.dir, &spec, &limits);
    let (ranks, modules) = found.adapter.map_or_else(Default::default, |read| {
        ((saturating(read.rank_min), saturating(read.rank_max)), read.module_names)
    });
    let refusal = |refusal: adapter::Refusal| Refusal { code: refusal.code.to_owned(), message: refusal.message };
    let check = AdapterCheck {
        content: found.content_id.map(ContentId),
        base_model: found.base_model,
        base_matches: found.base_matches,
        ranks,
        modules,
        tensors_matched: saturating(found.tensors_matched),
        tensors_unmatched: found.tensors_unmatched,
        weight_bytes: found.weight_bytes,
        features: found.features.into_iter().map(str::to_owned).collect(),
        refusals: found.refusals.into_iter().map(refusal).collect(),
        warnings: found.warnings,
        ..AdapterCheck::default()
    };
    show(Some(&files.revision), &check, json)
}

fn saturating(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn demo_model() -> anyhow::Result<PathBuf> {
    let dir = config::default_data_dir();
    let unpacked =
        demo::unpack(&dir).with_context(|| format!("cannot unpack the built-in model into {}", dir.display()))?;
    Ok(unpacked.model)
}

fn show(revision: Option<&str>, check: &AdapterCheck, json: bool) -> anyhow::Result<ExitCode> {
    let report = adapter_report(revision, check);
    if json {
        println!("{report:#}");
    } else {
        print!("{}", table::report(&report));
    }
    Ok(if check.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(REFUSED) })
}

/// Why there are no files.
enum Fetch {
    /// Not there, or not an adapter.
    Refused(Refusal),
    /// It may be there; nobody could say.
    Unreachable(String),
    /// This machine's fault.
    Broken(anyhow::Error),
}

/// Files that are there as long as this lives.
struct Files {
    dir: PathBuf,
    revision: String,
    /// What was fetched, and the folder that it lies in.
    _fetched: Option<(Stored, tempfile::TempDir)>,
}

fn refused(code: &str, message: String) -> Fetch {
    Fetch::Refused(Refusal { code: code.to_owned(), message })
}

async fn fetch(args: &ValidateArgs, reference: &AdapterRef) -> Result<Files, Fetch> {
    let broken = |error: anyhow::Error| Fetch::Broken(error);
    let settings = config::sources_alone(&args.sources, &Env::read(), reference).map_err(|e| broken(e.into()))?;
    let sources = Arc::new(Sources::new(settings).map_err(|e| broken(e.into()))?);
    let resolved = match sources.resolve(reference, &Credential::Server).await {
        Ok(resolved) => resolved,
        Err(SourceError::Absent) => {
            let why = sources.why_absent(reference, &Credential::Server).await;
            return Err(refused("model_not_found", why));
        }
        Err(SourceError::Permanent { code, message, detail }) => return Err(refused(code, detail.unwrap_or(message))),
        Err(SourceError::Retryable { message, detail, .. }) => {
            return Err(Fetch::Unreachable(detail.unwrap_or(message)));
        }
    };
    if let Origin::Directory(dir) = &resolved.origin {
        return Ok(Files { dir: dir.clone(), revision: resolved.revision.clone(), _fetched: None });
    }
    let folder = tempfile::tempdir().map_err(|e| broken(e.into()))?;
    let quota = args.sources.adapter_max_bytes.saturating_mul(2).saturating_add(1 << 20);
    let store = Store::open(folder.path(), quota).map_err(|e| broken(e.into()))?;
    let limits = FetchLimits { weights_bytes_max: args.sources.adapter_max_bytes, ..FetchLimits::default() };
    let fetcher = Fetcher::new(sources, Arc::new(store), limits);
    let fetched = fetcher.fetch(&resolved, &Credential::Server, Tenant::default(), &Progress::default()).await;
    match fetched {
        Ok(stored) => {
            let dir = stored.dir().to_owned();
            Ok(Files { dir, revision: resolved.revision, _fetched: Some((stored, folder)) })
        }
        Err(error) => {
            let why = error.detail().unwrap_or_else(|| error.to_string());
            Err(if error.retryable() { Fetch::Unreachable(why) } else { refused(error.code(), why) })
        }
    }
}
