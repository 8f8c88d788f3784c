//! The base model, if it is not a path of this machine: found at its source, downloaded once, then used like a directory.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow};
use loramux_proto::Loading;
use loramux_router::adapters::sources::{ModelListing, ModelPlace, ModelRef};
use loramux_router::adapters::{SourceError, Sources};

use crate::config::Config;
use crate::terminal::LoadProgress;

/// Between two looks at the progress.
const LOOK: Duration = Duration::from_millis(100);

/// The directory or file to load. Downloads what is not there, below `<data-dir>/models`.
pub(crate) async fn fetch(model: &ModelRef, config: &Config, progress: &LoadProgress) -> anyhow::Result<PathBuf> {
    let sources = Sources::new(config.sources.clone())?;
    let failed = |error: SourceError| match error {
        SourceError::Absent => anyhow!(
            "--model-id {}: not found, or not readable with this server's credentials\n  \
             check the name; for a private or gated model set HF_TOKEN (hub) or AWS_ACCESS_KEY_ID and its kin (S3)",
            model.name()
        ),
        error => match error.detail() {
            Some(why) => anyhow!("--model-id {}: {why}", model.name()),
            None => anyhow!("--model-id {}: {error}", model.name()),
        },
    };
    let listing = match sources.resolve_model(model).await.map_err(failed)? {
        ModelPlace::Here(path) => {
            tracing::info!(path = %path.display(), "base model is in a hub cache");
            return Ok(path);
        }
        ModelPlace::Remote(listing) => listing,
    };
    let dir = config.data_dir.join("models").join(listing.key());
    let place = match &model.gguf {
        Some(file) => dir.join(file),
        None => dir.clone(),
    };
    if !dir.is_dir() {
        let bytes: u64 = listing.files.iter().map(|file| file.bytes).sum();
        tracing::info!(model = %model.name(), revision = %listing.revision, files = listing.files.len(), bytes, "downloading");
        download(&sources, &listing, &dir, progress).await?.map_err(failed)?;
    }
    Ok(place)
}

/// Two servers that start at once download once: the second one waits, and finds the directory.
async fn download(
    sources: &Sources,
    listing: &ModelListing,
    dir: &Path,
    progress: &LoadProgress,
) -> anyhow::Result<Result<(), SourceError>> {
    let models = dir.parent().context("a model's directory lies in another")?;
    let written = || format!("cannot write to {}; set --data-dir to a folder this user may write", models.display());
    std::fs::create_dir_all(models).with_context(written)?;
    let lock = File::create(dir.with_extension("lock")).with_context(written)?;
    lock.lock().with_context(written)?;
    if dir.is_dir() {
        return Ok(Ok(()));
    }
    let partial = dir.with_extension("part");
    let done = AtomicU64::new(0);
    let total = listing.files.iter().map(|file| file.bytes).sum();
    let mut download = std::pin::pin!(sources.download_model(listing, &partial, &done));
    let outcome = loop {
        match tokio::time::timeout(LOOK, &mut download).await {
            Ok(outcome) => break outcome,
            Err(_) => progress.show(&Loading {
                what: "downloading".to_owned(),
                done: done.load(Ordering::Relaxed).min(total),
                total,
            }),
        }
    };
    progress.clear();
    if outcome.is_ok() {
        std::fs::rename(&partial, dir).with_context(written)?;
        File::open(models).and_then(|models| models.sync_all()).with_context(written)?;
    }
    Ok(outcome)
}
