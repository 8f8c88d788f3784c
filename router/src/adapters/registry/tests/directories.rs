use std::path::Path;

use super::*;

/// Content = first byte of the weights file; `f` fails.
#[derive(Clone, Default)]
struct Reader {
    reads: Arc<AtomicUsize>,
    delay: Duration,
}

impl Backend for Reader {
    fn submit(&self, _: GenerateRequest) -> Result<Box<dyn Events>, Failure> {
        Err(Failure::Draining)
    }
    fn prepare_adapter(&self, dir: PathBuf) -> BoxFuture<'static, Result<PreparedAdapter, AdapterFailure>> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let delay = self.delay;
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            let byte =
                std::fs::read(dir.join("adapter_model.safetensors")).ok().and_then(|bytes| bytes.first().copied());
            let byte = byte.filter(|b| *b != b'f').ok_or_else(|| failure("adapter_invalid", "bad".into()))?;
            Ok(PreparedAdapter {
                content: ContentId([byte; 32]),
                pages_needed: 1,
                ranks: (8, 8),
                modules: Vec::new(),
                base_model: String::new(),
                host_bytes: 1,
                rank_blocks: 1,
                features: Vec::new(),
            })
        })
    }
    fn check_adapter(&self, _: PathBuf) -> BoxFuture<'static, Result<AdapterCheck, AdapterFailure>> {
        Box::pin(async { Ok(AdapterCheck::default()) })
    }
    fn merge_adapters(&self, _: MergeAsk) -> BoxFuture<'static, Result<(), AdapterFailure>> {
        Box::pin(async { Ok(()) })
    }
    fn pin_adapter(&self, _: ContentId, _: Option<PinLevel>) -> BoxFuture<'static, Result<(), PinRefused>> {
        Box::pin(async { Ok(()) })
    }
    fn forget_adapter(&self, _: ContentId, _: ForgetMode) {}
    fn prefetch_adapter(&self, _: ContentId) {}
    fn status(&self) -> Arc<EngineStatus> {
        Arc::default()
    }
    fn begin_drain(&self) {}
}

fn write(root: &Path, name: &str, weights: &str) {
    let dir = root.join(name);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("adapter_config.json"), "{}").unwrap();
    std::fs::write(dir.join("adapter_model.safetensors"), weights).unwrap();
}

fn registry(root: &Path, reader: &Reader) -> Registry {
    Registry::new(
        AdapterSettings { dirs: vec![root.to_owned()], ..AdapterSettings::default() },
        Arc::new(reader.clone()),
    )
}

async fn wanted(registry: &Registry, name: &str, wait: Wait) -> Result<ResolvedAdapter, AdapterFailure> {
    registry.resolve(&Caller::default(), &Ask::plain(name, wait)).await
}

#[tokio::test]
async fn many_requests_for_one_name_read_it_once() {
    let (root, reader) =
        (tempfile::tempdir().unwrap(), Reader { delay: Duration::from_millis(20), ..Reader::default() });
    write(root.path(), "a", "1");
    let registry = registry(root.path(), &reader);
    let all = futures_util::future::join_all((0..200).map(|_| wanted(&registry, "a", LONG))).await;
    assert!(all.iter().all(|one| one.as_ref().is_ok_and(|a| a.prepared.content.0[0] == b'1')));
    assert_eq!(reader.reads.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_load_goes_on_when_its_caller_leaves() {
    let (root, reader) =
        (tempfile::tempdir().unwrap(), Reader { delay: Duration::from_millis(300), ..Reader::default() });
    write(root.path(), "a", "1");
    let registry = registry(root.path(), &reader);
    assert_eq!(wanted(&registry, "a", Wait::Fail).await.unwrap_err().code, "adapter_loading");
    assert_eq!(wanted(&registry, "a", Wait::Until(Duration::ZERO)).await.unwrap_err().code, "adapter_loading");
    wanted(&registry, "a", LONG).await.unwrap();
    assert_eq!(reader.reads.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn changed_files_are_new_content_and_gone_ones_are_gone() {
    let (root, reader) = (tempfile::tempdir().unwrap(), Reader::default());
    write(root.path(), "a", "1");
    let registry = registry(root.path(), &reader);
    let old = wanted(&registry, "a", LONG).await.unwrap();
    write(root.path(), "a", "22");
    let new = wanted(&registry, "a", LONG).await.unwrap();
    assert_eq!((old.prepared.content.0[0], new.prepared.content.0[0]), (b'1', b'2'), "who holds the old one keeps it");
    wanted(&registry, "a", LONG).await.unwrap();
    assert_eq!(reader.reads.load(Ordering::SeqCst), 2);
    let (before, cards) = registry.cards(&Caller::default());
    assert_eq!(cards.len(), 1);
    std::fs::remove_dir_all(root.path().join("a")).unwrap();
    assert_eq!(wanted(&registry, "a", LONG).await.unwrap_err().code, "model_not_found");
    let (after, cards) = registry.cards(&Caller::default());
    assert!(after > before && cards.is_empty());
}

#[tokio::test]
async fn a_failure_is_shared_until_the_files_change() {
    let (root, reader) = (tempfile::tempdir().unwrap(), Reader::default());
    write(root.path(), "a", "f");
    let registry = registry(root.path(), &reader);
    for _ in 0..5 {
        assert_eq!(wanted(&registry, "a", LONG).await.unwrap_err().code, "adapter_invalid");
    }
    assert_eq!(reader.reads.load(Ordering::SeqCst), 1);
    assert_eq!(registry.failures(), [("adapter_invalid".to_owned(), 1)]);
    write(root.path(), "a", "good");
    wanted(&registry, "a", LONG).await.unwrap();
    // And back: a name whose new files are bad does not answer with its old content.
    write(root.path(), "a", "f2");
    assert_eq!(wanted(&registry, "a", LONG).await.unwrap_err().code, "adapter_invalid");
    assert!(registry.cards(&Caller::default()).1.is_empty());
}

#[tokio::test]
async fn links_do_not_lead_out_of_an_adapter_directory() {
    let (root, outside, reader) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Reader::default());
    write(outside.path(), "secret", "1");
    write(root.path(), "real", "1");
    let link = |from: &Path, to: &Path| std::os::unix::fs::symlink(from, to).unwrap();
    link(&outside.path().join("secret"), &root.path().join("out"));
    link(&root.path().join("real"), &root.path().join("inside"));
    link(root.path(), &root.path().join("self"));
    std::fs::create_dir(root.path().join("half")).unwrap();
    link(&outside.path().join("secret/adapter_model.safetensors"), &root.path().join("half/adapter_model.safetensors"));
    std::fs::write(root.path().join("file"), "x").unwrap();
    let registry = registry(root.path(), &reader);
    wanted(&registry, "inside", LONG).await.unwrap();
    for name in ["out", "self", "half", "file", "..", "real/..", "", "a/b", "real\0"] {
        assert_eq!(wanted(&registry, name, LONG).await.unwrap_err().code, "model_not_found", "{name:?}");
    }
}

#[tokio::test]
async fn names_are_shown_for_contents() {
    let (root, reader) = (tempfile::tempdir().unwrap(), Reader::default());
    for (name, weights) in [("b", "1"), ("a", "1"), ("c", "2")] {
        write(root.path(), name, weights);
    }
    let registry = registry(root.path(), &reader);
    for name in ["a", "b", "c"] {
        wanted(&registry, name, LONG).await.unwrap();
    }
    let ids = [ContentId([b'2'; 32]), ContentId([b'1'; 32]), ContentId([9; 32])];
    assert_eq!(registry.names_of(&ids), ["c", "a", "0909090909090909"]);
    assert_eq!(registry.states()[5], (AdapterState::Ready, 3));
}

#[tokio::test]
async fn an_unloaded_folder_is_not_found_by_itself_any_more() {
    let (root, reader) = (tempfile::tempdir().unwrap(), Reader::default());
    write(root.path(), "a", "1");
    let registry = registry(root.path(), &reader);
    wanted(&registry, "a", LONG).await.unwrap();
    let ask = UnloadAsk { name: "a".into(), namespace: String::new(), mode: ForgetMode::Drain, purge: false };
    registry.unload(ask.clone()).await.unwrap();
    assert_eq!(wanted(&registry, "a", LONG).await.unwrap_err().code, "model_not_found");
    assert_eq!(registry.unload(ask).await.unwrap_err().code, "model_not_found");
    assert!(registry.cards(&Caller::default()).1.is_empty());
}
