//! Directories that the operator named on the command line, looked at each time: changed files are new content.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::adapters::name::is_valid_segment;
use crate::adapters::{AdapterRef, Origin, Resolved, SourceKind};

/// The two files that make an adapter.
const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The sub-directory `name` of one of `roots`, if one has it.
pub(super) async fn folder(roots: Vec<PathBuf>, name: String) -> Option<Arc<Resolved>> {
    let look = move || roots.iter().find_map(|root| child(root, &name)).map(|dir| resolved(dir).into());
    tokio::task::spawn_blocking(look).await.ok()?
}

/// A directory as it is now, whether or not there is anything in it.
pub(super) async fn named(dir: PathBuf) -> Option<Arc<Resolved>> {
    tokio::task::spawn_blocking(move || resolved(dir).into()).await.ok()
}

/// The sub-directory `name` of `root`, if it is one and no link leads out of `root`.
fn child(root: &Path, name: &str) -> Option<PathBuf> {
    if !is_valid_segment(name) {
        return None;
    }
    let root = root.canonicalize().ok()?;
    let dir = root.join(name).canonicalize().ok()?;
    let inside = |path: &Path| path.starts_with(&root) && path != root;
    let files_inside = FILES.iter().all(|file| dir.join(file).canonicalize().map_or(true, |path| inside(&path)));
    (dir.is_dir() && inside(&dir) && files_inside).then_some(dir)
}

/// The identity is the path with inode, time and size of both files.
fn resolved(dir: PathBuf) -> Resolved {
    use std::os::unix::fs::MetadataExt;
    let files = FILES.map(|file| std::fs::metadata(dir.join(file)).ok());
    let one = |data: &Option<std::fs::Metadata>| match data {
        Some(data) => format!("{}.{}.{}.{}", data.ino(), data.mtime(), data.mtime_nsec(), data.size()),
        None => "-".to_owned(),
    };
    let prints: Vec<_> = files.iter().map(one).collect();
    let newest = files.iter().flatten().map(|data| (data.mtime(), data.mtime_nsec())).max();
    let revision = newest.map_or_else(String::new, |(seconds, ns)| format!("{seconds}.{ns:09}"));
    Resolved {
        reference: AdapterRef { source: SourceKind::Local, locator: dir.display().to_string(), revision: None },
        identity: format!("directory:{}:{}", prints.join(":"), dir.display()),
        revision,
        origin: Origin::Directory(dir),
    }
}
