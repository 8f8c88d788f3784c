//! The registry over a scripted upstream, a scripted engine and a clock that stands still.

mod directories;
mod durable;
mod dynamic;
mod files;
mod history;
mod life;
mod matrix;
mod names;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use secrecy::{ExposeSecret, SecretString};

use super::*;
use crate::access::KeyPolicy;
use crate::adapters::life::testing::TestClock;
use crate::adapters::{ByteStream, FetchError, FileName, Origin, Progress, RemoteFile, Tenant};
use crate::engine::{
    AdapterCheck, ContentStatus, EngineStatus, Failure, ForgetMode, GenerateRequest, MergeAsk, MissingReport, PinLevel,
    PinRefused, PreparedAdapter, Tier,
};
use crate::http::Events;

const LONG: Wait = Wait::Until(Duration::from_secs(20));
const SHORT: Wait = Wait::Until(Duration::from_millis(1));

/// One adapter upstream.
#[derive(Clone, Default)]
pub(super) struct Repo {
    pub(super) commit: u32,
    pub(super) is_public: bool,
    pub(super) tokens: BTreeSet<String>,
    pub(super) server_may: bool,
}

/// Hub, store and disk in one.
#[derive(Default)]
pub(super) struct Upstream {
    pub(super) repos: Mutex<BTreeMap<String, Repo>>,
    /// What resolving fails with.
    pub(super) down: Mutex<Option<SourceError>>,
    /// What the next fetches fail with.
    pub(super) fetch_fails: Mutex<Vec<FetchError>>,
    pub(super) asked: Mutex<Vec<(String, String)>>,
    pub(super) fetches: AtomicUsize,
    pub(super) here: Mutex<BTreeSet<String>>,
    /// Of these, the ones with a bit that flipped.
    pub(super) damaged: Mutex<BTreeSet<String>>,
    pub(super) noted: Mutex<HashMap<String, ContentId>>,
    pub(super) verified: AtomicUsize,
    pub(super) slow: AtomicUsize,
    /// Never answers.
    pub(super) tarpit: Mutex<Option<SourceKind>>,
}

pub(super) fn label(credential: &Credential) -> String {
    match credential {
        Credential::Anonymous => "anonymous".into(),
        Credential::Server => "server".into(),
        Credential::Token(token) => token.expose_secret().to_owned(),
    }
}

impl Upstream {
    pub(super) fn put(&self, locator: &str, repo: Repo) {
        self.repos.lock().unwrap().insert(locator.into(), repo);
    }

    pub(super) fn public(&self, locator: &str, commit: u32) {
        self.put(locator, Repo { commit, is_public: true, server_may: true, ..Repo::default() });
    }

    pub(super) fn questions(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    pub(super) fn fetches(&self) -> usize {
        self.fetches.load(Ordering::SeqCst)
    }

    async fn dawdle(&self) {
        for _ in 0..self.slow.load(Ordering::SeqCst) {
            tokio::task::yield_now().await;
        }
    }
}

impl Source for Upstream {
    fn resolve<'a>(
        &'a self,
        reference: &'a AdapterRef,
        credential: &'a Credential,
    ) -> BoxFuture<'a, Result<Resolved, SourceError>> {
        self.asked.lock().unwrap().push((reference.to_string(), label(credential)));
        Box::pin(async move {
            self.dawdle().await;
            let is_tarpit = *self.tarpit.lock().unwrap() == Some(reference.source);
            if is_tarpit {
                std::future::pending::<()>().await;
            }
            if let Some(error) = self.down.lock().unwrap().clone() {
                return Err(error);
            }
            let repos = self.repos.lock().unwrap();
            let repo = repos.get(&reference.locator).ok_or(SourceError::Absent)?;
            let may = match credential {
                Credential::Anonymous => repo.is_public,
                Credential::Server => repo.server_may,
                Credential::Token(token) => repo.tokens.contains(token.expose_secret()),
            };
            if !may {
                return Err(SourceError::Absent);
            }
            let commit = reference.revision.clone().unwrap_or_else(|| repo.commit.to_string());
            let file =
                |name| RemoteFile { name, bytes: 1, digest: None, etag: None, locator: reference.locator.clone() };
            Ok(Resolved {
                reference: reference.clone(),
                identity: format!("{}:{}@{commit}", reference.source.name(), reference.locator),
                revision: commit,
                origin: Origin::Remote(FileName::ALL.map(file).to_vec()),
            })
        })
    }

    fn open<'a>(
        &'a self,
        _: &'a Resolved,
        _: &'a RemoteFile,
        _: u64,
        _: &'a Credential,
    ) -> BoxFuture<'a, Result<ByteStream, SourceError>> {
        Box::pin(async { Err(SourceError::Absent) })
    }
}

impl Files for Upstream {
    fn fetch<'a>(
        &'a self,
        resolved: &'a Resolved,
        _: &'a Credential,
        _: Tenant,
        _: &'a Progress,
    ) -> BoxFuture<'a, Result<FilesHere, FetchError>> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            self.dawdle().await;
            if let Some(error) = self.fetch_fails.lock().unwrap().pop() {
                return Err(error);
            }
            assert!(!matches!(&resolved.origin, Origin::Remote(files) if files.is_empty()), "nothing to fetch");
            self.here.lock().unwrap().insert(resolved.identity.clone());
            Ok(Files::here(self, &resolved.identity).unwrap())
        })
    }

    fn here(&self, identity: &str) -> Option<FilesHere> {
        let mut files = self.here.lock().unwrap().contains(identity).then(|| here(identity))?;
        if self.damaged.lock().unwrap().contains(identity) {
            files.dir.push("damaged");
        }
        Some(files)
    }

    fn forget<'a>(&'a self, identity: &'a str) -> BoxFuture<'a, u64> {
        Box::pin(async move { u64::from(self.here.lock().unwrap().remove(identity)) })
    }

    fn note_content(&self, identity: &str, content: ContentId) {
        self.noted.lock().unwrap().insert(identity.into(), content);
    }

    fn expected_content(&self, identity: &str) -> Option<ContentId> {
        self.noted.lock().unwrap().get(identity).copied()
    }

    fn verify<'a>(&'a self, identity: &'a str) -> BoxFuture<'a, bool> {
        self.verified.fetch_add(1, Ordering::SeqCst);
        let is_damaged = self.damaged.lock().unwrap().remove(identity);
        if is_damaged {
            self.here.lock().unwrap().remove(identity);
        }
        Box::pin(async move { !is_damaged })
    }

    fn set_pinned(&self, _: &str, _: bool) {}
}

fn here(identity: &str) -> FilesHere {
    FilesHere { dir: PathBuf::from("/scripted").join(identity), guard: None }
}

/// The content of what was fetched under an identity.
pub(super) fn content_of(identity: &str) -> ContentId {
    ContentId(*blake3::hash(here(identity).dir.to_string_lossy().as_bytes()).as_bytes())
}

/// Knows what it prepared until it is told to forget.
#[derive(Default)]
pub(super) struct Engine {
    pub(super) known: Mutex<Arc<HashMap<ContentId, ContentStatus>>>,
    pub(super) forgotten: Mutex<Vec<(ContentId, ForgetMode)>>,
    pub(super) prepares: AtomicUsize,
    /// What preparing a directory that ends so fails with.
    pub(super) bad: Mutex<Option<(String, AdapterFailure)>>,
    pub(super) pins: Mutex<Vec<(ContentId, Option<PinLevel>)>>,
    pub(super) missing: Mutex<Option<MissingReport>>,
    pub(super) given_up: Mutex<Vec<(ContentId, String)>>,
}

impl Engine {
    pub(super) fn knows(&self, content: &ContentId) -> bool {
        self.known.lock().unwrap().contains_key(content)
    }

    pub(super) fn set_tier(&self, tier: Tier) {
        Arc::make_mut(&mut self.known.lock().unwrap()).values_mut().for_each(|content| content.tier = tier);
    }

    /// Its memory and its directory are gone.
    pub(super) fn misses(&self, content: ContentId) {
        Arc::make_mut(&mut self.known.lock().unwrap()).get_mut(&content).unwrap().tier = Tier::Disk;
        self.missing.lock().unwrap().as_ref().unwrap()(content, "no such directory");
    }

    fn prepared(&self, dir: &std::path::Path) -> Result<PreparedAdapter, AdapterFailure> {
        self.prepares.fetch_add(1, Ordering::SeqCst);
        if let Some((_, failure)) =
            self.bad.lock().unwrap().clone().filter(|(end, _)| dir.to_string_lossy().ends_with(end))
        {
            return Err(failure);
        }
        let content = ContentId(*blake3::hash(dir.to_string_lossy().as_bytes()).as_bytes());
        let status = ContentStatus {
            tier: Tier::Host,
            pinned: None,
            draining: false,
            running: 0,
            waiting: 0,
            pages: 1,
            host_bytes: 1,
        };
        Arc::make_mut(&mut self.known.lock().unwrap()).insert(content, status);
        Ok(PreparedAdapter {
            content,
            pages_needed: 2,
            rank_blocks: 1,
            ranks: (8, 16),
            modules: vec!["q_proj".into()],
            base_model: "base".into(),
            host_bytes: 100,
            features: Vec::new(),
        })
    }
}

impl Backend for Engine {
    fn submit(&self, _: GenerateRequest) -> Result<Box<dyn Events>, Failure> {
        Err(Failure::Draining)
    }
    fn prepare_adapter(&self, dir: PathBuf) -> BoxFuture<'static, Result<PreparedAdapter, AdapterFailure>> {
        let prepared = self.prepared(&dir);
        Box::pin(async move {
            tokio::task::yield_now().await;
            prepared
        })
    }
    fn check_adapter(&self, _: PathBuf) -> BoxFuture<'static, Result<AdapterCheck, AdapterFailure>> {
        Box::pin(async { Ok(AdapterCheck { tensors_matched: 3, ..AdapterCheck::default() }) })
    }
    fn merge_adapters(&self, ask: MergeAsk) -> BoxFuture<'static, Result<(), AdapterFailure>> {
        assert_eq!(ask.dirs.len(), ask.weights.len());
        let bad = self.bad.lock().unwrap().clone().filter(|(end, _)| ask.out_dir.to_string_lossy().ends_with(end));
        Box::pin(async move {
            if let Some((_, failure)) = bad {
                return Err(failure);
            }
            std::fs::write(ask.out_dir.join("adapter_config.json"), format!("{:?}", ask.weights)).unwrap();
            Ok(())
        })
    }
    fn pin_adapter(&self, content: ContentId, level: Option<PinLevel>) -> BoxFuture<'static, Result<(), PinRefused>> {
        let known = self.knows(&content);
        self.pins.lock().unwrap().push((content, level));
        Box::pin(async move { if known { Ok(()) } else { Err(PinRefused::Unknown(content.short())) } })
    }
    fn forget_adapter(&self, content: ContentId, mode: ForgetMode) {
        Arc::make_mut(&mut self.known.lock().unwrap()).remove(&content);
        self.forgotten.lock().unwrap().push((content, mode));
    }
    fn prefetch_adapter(&self, _: ContentId) {}
    fn on_missing(&self, report: MissingReport) {
        *self.missing.lock().unwrap() = Some(report);
    }
    fn give_up_adapter(&self, content: ContentId, reason: String) {
        self.given_up.lock().unwrap().push((content, reason));
    }
    fn status(&self) -> Arc<EngineStatus> {
        Arc::new(EngineStatus { contents: self.known.lock().unwrap().clone(), ..EngineStatus::default() })
    }
    fn begin_drain(&self) {}
}

pub(super) struct World {
    pub(super) clock: Arc<TestClock>,
    pub(super) upstream: Arc<Upstream>,
    pub(super) engine: Arc<Engine>,
    pub(super) registry: Registry,
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(AdapterSettings::default())
    }

    pub(super) fn with(settings: AdapterSettings) -> Self {
        Self::over(settings, Arc::default(), Arc::default())
    }

    pub(super) fn over(settings: AdapterSettings, upstream: Arc<Upstream>, clock: Arc<TestClock>) -> Self {
        let engine = Arc::<Engine>::default();
        let supply = Supply {
            source: upstream.clone(),
            kinds: vec![SourceKind::Hub, SourceKind::S3, SourceKind::Gcs, SourceKind::Http],
            files: upstream.clone(),
        };
        let registry = Registry::open_with(settings, engine.clone(), Some(supply), clock.clone()).unwrap();
        Self { clock, upstream, engine, registry }
    }

    pub(super) async fn resolve(&self, name: &str) -> Result<ResolvedAdapter, AdapterFailure> {
        self.registry.resolve(&Caller::default(), &Ask::plain(name, LONG)).await
    }

    pub(super) async fn resolve_with(&self, name: &str, token: &str) -> Result<ResolvedAdapter, AdapterFailure> {
        let token = SecretString::from(token.to_owned());
        self.registry.resolve(&Caller::default(), &Ask { token: Some(&token), ..Ask::plain(name, LONG) }).await
    }

    pub(super) fn ask(&self, name: &str, reference: &str) -> LoadAsk {
        LoadAsk::new(name, AdapterRef::parse(reference).unwrap(), LONG)
    }

    pub(super) async fn load(&self, name: &str, reference: &str) -> Result<AdapterView, AdapterFailure> {
        self.registry.load(self.ask(name, reference)).await
    }

    pub(super) async fn unload(&self, name: &str) -> Result<AdapterView, AdapterFailure> {
        let ask = UnloadAsk { name: name.into(), namespace: String::new(), mode: ForgetMode::Drain, purge: false };
        self.registry.unload(ask).await
    }

    /// Lets everything run that can, without the clock.
    pub(super) async fn settle(&self) {
        for _ in 0..200 {
            tokio::task::yield_now().await;
        }
    }
}

pub(super) fn code<T>(outcome: &Result<T, AdapterFailure>) -> &str {
    outcome.as_ref().err().map_or("served", |failure| failure.code.as_str())
}

pub(super) fn caller(namespace: &str, globs: Option<&[&str]>) -> Caller {
    let adapters = globs.map(|globs| {
        let mut set = globset::GlobSetBuilder::new();
        for glob in globs {
            set.add(globset::Glob::new(glob).unwrap());
        }
        set.build().unwrap()
    });
    let policy = KeyPolicy { adapters, ..KeyPolicy::default() };
    Caller { namespace: namespace.into(), name: "key".into(), policy: policy.into(), ..Caller::default() }
}
