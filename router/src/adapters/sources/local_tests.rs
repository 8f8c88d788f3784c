//! Special files, links, swaps: nothing outside the roots is ever opened.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use tempfile::TempDir;

use super::*;
use crate::adapters::SourceKind;

/// `<dir>/root` is a root, `<dir>/outside` is not.
fn world() -> (TempDir, Local) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["root", "outside"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    adapter(&dir.path().join("outside/a"));
    let settings = LocalSettings { roots: vec![dir.path().join("root")], named: vec![dir.path().join("outside/a")] };
    let local = Local::new(&settings);
    (dir, local)
}

fn adapter(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("adapter_config.json"), "{}").unwrap();
    fs::write(dir.join("adapter_model.safetensors"), "weights").unwrap();
}

async fn resolve(local: &Local, path: &Path) -> Result<Resolved, SourceError> {
    resolve_as(local, path, &Credential::Anonymous).await
}

async fn resolve_as(local: &Local, path: &Path, credential: &Credential) -> Result<Resolved, SourceError> {
    let reference =
        AdapterRef { source: SourceKind::Local, locator: path.to_str().unwrap().to_owned(), revision: None };
    local.resolve(&reference, credential).await
}

/// The bytes of both files, however they are to be got.
async fn read(local: &Local, resolved: &Resolved) -> Result<Vec<String>, SourceError> {
    let mut read = Vec::new();
    match &resolved.origin {
        Origin::Directory(dir) => {
            for name in FileName::ALL {
                read.push(fs::read_to_string(dir.join(name.as_str())).unwrap());
            }
        }
        Origin::Remote(files) => {
            for file in files {
                let body = local.open(resolved, file, 0, &Credential::Anonymous).await?;
                let bytes =
                    body.try_fold(Vec::new(), |sum, chunk| async move { Ok([sum, chunk.to_vec()].concat()) }).await?;
                read.push(String::from_utf8(bytes).unwrap());
            }
        }
    }
    Ok(read)
}

#[tokio::test]
async fn a_directory_below_a_root_is_copied_and_a_change_is_a_new_identity() {
    let (dir, local) = world();
    let path = dir.path().join("root/org/a");
    adapter(&path);
    let first = resolve(&local, &path).await.unwrap();
    assert!(
        matches!(first.origin, Origin::Remote(_)),
        "who may write there could swap it for a link before it is read"
    );
    assert_eq!(resolve(&local, &path).await.unwrap(), first);
    fs::write(path.join("adapter_model.safetensors"), "other weights").unwrap();
    let second = resolve(&local, &path).await.unwrap();
    assert_ne!(second.identity, first.identity);
    assert!(second.revision.starts_with("20") && second.revision.ends_with('Z'), "{}", second.revision);
}

#[tokio::test]
async fn only_roots_are_open_and_named_directories_to_the_server_alone() {
    let (dir, local) = world();
    adapter(&dir.path().join("root2/a"));
    let outside = dir.path().join("outside/a");
    for path in
        [&outside, &dir.path().join("root2/a"), Path::new("/etc"), Path::new("/"), &dir.path().join("root/none")]
    {
        assert_eq!(resolve(&local, path).await, Err(SourceError::Absent), "{}", path.display());
    }
    let token = Credential::Token("t".to_owned().into());
    assert_eq!(resolve_as(&local, &outside, &token).await, Err(SourceError::Absent));
    assert!(resolve_as(&local, &outside, &Credential::Server).await.is_ok());
}

#[tokio::test]
async fn links_below_the_root_pass_and_all_others_are_absent() {
    let (dir, local) = world();
    let root = dir.path().join("root");
    adapter(&root.join("real"));
    // As in a hub cache: the files are links to blobs.
    fs::create_dir_all(root.join("cache/models--o--r/snapshots").join("0".repeat(40))).unwrap();
    fs::create_dir_all(root.join("cache/models--o--r/blobs")).unwrap();
    for name in FileName::ALL.map(FileName::as_str) {
        fs::write(root.join("cache/models--o--r/blobs").join(name), name).unwrap();
        let link = root.join("cache/models--o--r/snapshots").join("0".repeat(40)).join(name);
        symlink(format!("../../blobs/{name}"), link).unwrap();
    }
    symlink("real", root.join("to_real")).unwrap();
    symlink("../outside/a", root.join("to_outside")).unwrap();
    symlink(dir.path().join("outside/a"), root.join("to_absolute")).unwrap();
    symlink("/proc/self/cwd", root.join("to_magic")).unwrap();
    fs::create_dir(root.join("mixed")).unwrap();
    fs::write(root.join("mixed/adapter_config.json"), "{}").unwrap();
    symlink("../../outside/a/adapter_model.safetensors", root.join("mixed/adapter_model.safetensors")).unwrap();

    let real = resolve(&local, &root.join("to_real")).await.unwrap();
    assert_eq!(
        read(&local, &real).await.unwrap(),
        read(&local, &resolve(&local, &root.join("real")).await.unwrap()).await.unwrap()
    );
    let cached = resolve(&local, &root.join("cache")).await.unwrap();
    assert_eq!(read(&local, &cached).await.unwrap(), FileName::ALL.map(FileName::as_str));
    for name in ["to_outside", "to_absolute", "to_magic"] {
        assert_eq!(resolve(&local, &root.join(name)).await, Err(SourceError::Absent), "{name}");
    }
    let mixed = resolve(&local, &root.join("mixed")).await.unwrap_err();
    assert!(matches!(mixed, SourceError::Permanent { code: "adapter_invalid", .. }), "{mixed:?}");
    // The operator may name the snapshot itself, and its links still end in that repository.
    let snapshot = root.join("cache/models--o--r/snapshots").join("0".repeat(40));
    let named = Local::new(&LocalSettings { roots: Vec::new(), named: vec![snapshot.clone()] });
    assert!(resolve_as(&named, &snapshot, &Credential::Server).await.is_ok());
    assert_eq!(resolve(&named, &snapshot).await, Err(SourceError::Absent));
    // Two snapshots: which one is meant is unclear.
    fs::create_dir_all(root.join("cache/models--o--r/snapshots").join("1".repeat(40))).unwrap();
    assert_eq!(resolve(&local, &root.join("cache")).await, Err(SourceError::Absent));
}

#[tokio::test]
async fn special_files_are_no_adapters_and_are_not_waited_for() {
    let (dir, local) = world();
    type Make = fn(&Path);
    let make: [(&str, Make); 5] = [
        ("fifo", |path| {
            rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap()
        }),
        ("socket", |path| drop(UnixListener::bind(path).unwrap())),
        ("directory", |path| fs::create_dir(path).unwrap()),
        ("device", |path| symlink("/dev/zero", path).unwrap()),
        ("terminal", |path| symlink("/dev/tty", path).unwrap()),
    ];
    for (name, make) in make {
        for broken in FileName::ALL {
            let path = dir.path().join("root").join(format!("{name}-{}", broken.as_str()));
            adapter(&path);
            fs::remove_file(path.join(broken.as_str())).unwrap();
            make(&path.join(broken.as_str()));
            let resolved = tokio::time::timeout(Duration::from_secs(5), resolve(&local, &path)).await;
            let error = resolved.expect("opening it must not wait").unwrap_err();
            match broken {
                FileName::Config => assert_eq!(error, SourceError::Absent, "{name}"),
                FileName::Weights => {
                    assert!(matches!(error, SourceError::Permanent { code: "adapter_invalid", .. }), "{name}")
                }
            }
        }
    }
}

#[tokio::test]
async fn pickled_weights_are_refused_by_name() {
    let (dir, local) = world();
    let path = dir.path().join("root/a");
    adapter(&path);
    fs::rename(path.join("adapter_model.safetensors"), path.join("adapter_model.bin")).unwrap();
    let error = resolve(&local, &path).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Permanent { code: "adapter_unsupported", message, .. } if message.contains("safetensors")),
        "{error:?}"
    );
}

#[test]
fn a_path_that_is_swapped_while_it_is_opened_never_leads_out() {
    let (dir, local) = world();
    let root = dir.path().join("root");
    adapter(&root.join("inside"));
    for name in FileName::ALL.map(FileName::as_str) {
        fs::write(dir.path().join("outside/a").join(name), "SECRET").unwrap();
        fs::write(root.join("inside").join(name), name).unwrap();
    }
    let end = Instant::now() + Duration::from_secs(2);
    let (good, bad, live) = (root.join("good"), root.join("bad"), root.join("live"));
    let (reads, leaks) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while Instant::now() < end {
                // `rename` over the live name: it always exists, and is now a link inside, now one out of the root.
                for (link, target) in [(&good, root.join("inside")), (&bad, dir.path().join("outside/a"))] {
                    let target = pathdiff(&target, &root);
                    symlink(target, link).unwrap();
                    fs::rename(link, &live).unwrap();
                }
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (mut reads, mut leaks) = (0, 0);
            while Instant::now() < end {
                let Ok(resolved) = resolve(&local, &live).await else { continue };
                // An error is a swap between resolving and opening; other bytes would be a way out.
                let Ok(read) = read(&local, &resolved).await else { continue };
                reads += usize::from(read == FileName::ALL.map(FileName::as_str));
                leaks += usize::from(read.iter().any(|text| text.contains("SECRET")));
            }
            (reads, leaks)
        })
    });
    assert!(reads > 0, "the good link was never met");
    assert_eq!(leaks, 0);
}

/// `target` as seen from `root`; both lie in one directory.
fn pathdiff(target: &Path, root: &Path) -> PathBuf {
    match target.strip_prefix(root) {
        Ok(below) => below.to_path_buf(),
        Err(_) => Path::new("..").join(target.strip_prefix(root.parent().unwrap()).unwrap()),
    }
}

#[tokio::test]
async fn a_copied_file_that_changed_since_it_was_resolved_is_not_passed_on() {
    let (dir, local) = world();
    let root = dir.path().join("root");
    adapter(&root.join("blobs"));
    fs::create_dir(root.join("a")).unwrap();
    for name in FileName::ALL.map(FileName::as_str) {
        symlink(format!("../blobs/{name}"), root.join("a").join(name)).unwrap();
    }
    let resolved = resolve(&local, &root.join("a")).await.unwrap();
    assert_eq!(read(&local, &resolved).await.unwrap(), ["{}", "weights"]);
    fs::write(root.join("blobs/adapter_model.safetensors"), "WEIGHTS!").unwrap();
    assert!(matches!(read(&local, &resolved).await, Err(SourceError::Retryable { .. })));
}

#[test]
fn times_are_written_as_people_read_them() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_782_399, "2000-02-28T23:59:59Z"),
        (951_782_400, "2000-02-29T00:00:00Z"),
        (1_763_600_000, "2025-11-20T00:53:20Z"),
        (4_107_542_400, "2100-03-01T00:00:00Z"),
        (-1, "1969-12-31T23:59:59Z"),
    ] {
        assert_eq!(utc_text(seconds), text);
    }
}
