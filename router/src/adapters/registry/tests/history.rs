//! Writers change a name and an alias, readers resolve them, all at once; then every answer is compared with the history.

use std::sync::atomic::{AtomicBool, AtomicU64};

use super::*;
use crate::adapters::life::SystemClock;

/// What a name stood for, between the start of the call that set it and the end of the call that changed it.
#[derive(Clone, Debug)]
struct Span {
    value: Option<ContentId>,
    from: u64,
    to: u64,
}

#[derive(Default)]
struct History {
    ticks: AtomicU64,
    spans: Mutex<Vec<Span>>,
}

impl History {
    fn tick(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::SeqCst)
    }

    /// Notes that `change` set `value`.
    async fn set<T>(&self, value: Option<ContentId>, change: impl Future<Output = T>) -> T {
        let from = self.tick();
        let result = change.await;
        let now = self.tick();
        let mut spans = self.spans.lock().unwrap();
        if let Some(last) = spans.last_mut() {
            last.to = now;
        }
        spans.push(Span { value, from, to: u64::MAX });
        result
    }

    fn assert_possible(&self, answers: &[(u64, u64, Option<ContentId>)]) {
        let spans = self.spans.lock().unwrap();
        for (start, end, value) in answers {
            let overlaps = |span: &&Span| span.from <= *end && *start <= span.to && span.value == *value;
            assert!(spans.iter().any(|span| overlaps(&span)), "{value:?} in {start}..{end} was never so");
        }
    }
}

async fn read(world: Arc<World>, history: Arc<History>, name: &'static str, stop: Arc<AtomicBool>) {
    let mut answers = Vec::new();
    while !stop.load(Ordering::SeqCst) || answers.len() < 100 {
        let start = history.tick();
        let answer = world.registry.resolve(&Caller::default(), &Ask::plain(name, LONG)).await;
        let end = history.tick();
        match answer {
            Ok(found) => {
                assert!(world.engine.knows(&found.prepared.content), "served, but the engine has forgotten it");
                answers.push((start, end, Some(found.prepared.content)));
            }
            Err(failure) if failure.code == "model_not_found" => answers.push((start, end, None)),
            Err(failure) => panic!("{failure:?}"),
        }
        tokio::task::yield_now().await;
    }
    history.assert_possible(&answers);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_answer_was_true_at_some_moment_of_its_request() {
    let (upstream, engine) = (Arc::<Upstream>::default(), Arc::<Engine>::default());
    let supply = Supply { source: upstream.clone(), kinds: vec![SourceKind::Hub], files: upstream.clone() };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::scaled(1.0));
    let registry = Registry::open_with(AdapterSettings::default(), engine.clone(), Some(supply), clock).unwrap();
    let world = Arc::new(World { clock: Arc::default(), upstream, engine, registry });
    for i in 0..4 {
        world.upstream.public(&format!("acme/v{i}"), 1);
        world.load(&format!("v{i}"), &format!("acme/v{i}")).await.unwrap();
    }
    let (by_name, by_alias, stop) =
        (Arc::<History>::default(), Arc::<History>::default(), Arc::<AtomicBool>::default());
    by_name.set(None, async {}).await;
    by_alias.set(None, async {}).await;
    let reader = |history: &Arc<History>, name| tokio::spawn(read(world.clone(), history.clone(), name, stop.clone()));
    let readers: Vec<_> = (0..4).flat_map(|_| [reader(&by_name, "name"), reader(&by_alias, "alias")]).collect();
    for round in 0..150 {
        let i = round % 4;
        let content = content_of(&format!("hub:acme/v{i}@1"));
        let reference = format!("acme/v{i}");
        let ask = LoadAsk { in_place: true, ..world.ask("name", &reference) };
        by_name.set(Some(content), world.registry.load(ask)).await.unwrap();
        let versions = vec![Weighted { adapter: format!("v{i}"), weight: 1.0 }];
        let alias = AliasAsk {
            name: "alias".into(),
            namespace: String::new(),
            versions,
            sticky_by: StickyBy::None,
            expected_version: None,
        };
        by_alias.set(Some(content), world.registry.set_alias(alias)).await.unwrap();
        if round % 5 == 4 {
            by_name.set(None, world.unload("name")).await.unwrap();
            by_alias.set(None, world.registry.delete_alias("", "alias", None)).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    stop.store(true, Ordering::SeqCst);
    for reader in readers {
        reader.await.unwrap();
    }
    world.registry.names().assert_consistent();
}
