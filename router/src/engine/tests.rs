//! The engine thread against a shard made of a thread and a formula: deaths, hangs, full queues, adapters that come and go.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use loramux_proto::{
    AdapterError, AdapterFindings, AdapterReport, FromShard, Info, Merged, Pooled, Prepared, Sample, Sampling,
    SlotGeneration, Step, StepResult, ToShard, from_shard, prepared, to_shard,
};

use super::*;

mod grammars;
mod keeping;

/// How the next shards misbehave.
#[derive(Default)]
struct Script {
    launches: AtomicU32,
    /// Dies on receiving this step (counted over all incarnations); taken once.
    die_at: Mutex<Vec<u32>>,
    hang_at: Mutex<Vec<u32>>,
    steps: AtomicU32,
    /// Never becomes ready.
    broken: bool,
    dies_at_each_step: bool,
    dropped: Mutex<Vec<Vec<u8>>>,
    /// What the shards ask for. They answer the oldest step when this many are there, or no other comes.
    pipeline_depth: u32,
    /// Each step takes so long.
    step_time: Duration,
    /// Steps that arrived before the one before was answered.
    ahead: AtomicU32,
    /// What the shard's host memory holds.
    host: Mutex<HashSet<Vec<u8>>>,
    merged: Mutex<Vec<loramux_proto::MergeAdapters>>,
    /// Directories whose files were replaced by others.
    replaced: Mutex<Vec<String>>,
}

struct FakeLauncher(Arc<Script>);

struct FakeShard(Option<mpsc::Sender<ToShard>>);

impl Shard for FakeShard {
    fn send(&mut self, message: ToShard) -> Result<(), ShardGone> {
        self.0.as_ref().ok_or(ShardGone)?.send(message).map_err(|_| ShardGone)
    }
    fn kill(&mut self) {
        self.0 = None;
    }
}

impl ShardLauncher for FakeLauncher {
    fn launch(&mut self, reports: Reports) -> Result<Box<dyn Shard>, String> {
        let (sender, inbox) = mpsc::channel();
        let script = Arc::clone(&self.0);
        script.launches.fetch_add(1, Ordering::SeqCst);
        std::thread::spawn(move || {
            let reason = fake_main(&script, &inbox, &reports);
            reports.gone(ShardExit { reason: reason.into(), killed_from_outside: true });
        });
        Ok(Box::new(FakeShard(Some(sender))))
    }
}

const NEVER: Duration = Duration::from_secs(3600);
const NO_OTHER_COMES: Duration = Duration::from_millis(10);

fn fake_main(script: &Script, inbox: &mpsc::Receiver<ToShard>, reports: &Reports) -> &'static str {
    let say = |body| reports.message(FromShard { body: Some(body) });
    if script.broken {
        return "no such model";
    }
    say(from_shard::Body::Info(Info {
        vocab_size: 1000,
        context_tokens: 512,
        page_bytes: 1 << 20,
        pages_total: 64,
        blocks_per_page: 4,
        block_tokens: 16,
        slots_max: 8,
        step_tokens_max: 256,
        seqs_max: 16,
        pipeline_depth: script.pipeline_depth,
        ..Info::default()
    }));
    script.host.lock().unwrap().clear();
    let mut sequences: HashMap<u64, Vec<u32>> = HashMap::new();
    let mut waiting: VecDeque<Step> = VecDeque::new();
    loop {
        let next = if waiting.is_empty() { NEVER } else { NO_OTHER_COMES };
        let body = match inbox.recv_timeout(next) {
            Ok(ToShard { body: Some(body) }) => body,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                if let Some(step) = waiting.pop_front() {
                    say(from_shard::Body::Step(fake_step(script, &step, &mut sequences)));
                }
                continue;
            }
            _ => return "cut off",
        };
        match body {
            to_shard::Body::Step(step) => {
                let n = script.steps.fetch_add(1, Ordering::SeqCst);
                if script.dies_at_each_step || take(&script.die_at, n) {
                    return "died as told";
                }
                if take(&script.hang_at, n) {
                    while inbox.recv().is_ok() {}
                    return "hung";
                }
                script.ahead.fetch_add(u32::from(!waiting.is_empty()), Ordering::SeqCst);
                waiting.push_back(step);
                assert!(waiting.len() <= script.pipeline_depth.max(1) as usize, "more steps than the shard asked for");
                if waiting.len() >= script.pipeline_depth as usize
                    && let Some(step) = waiting.pop_front()
                {
                    say(from_shard::Body::Step(fake_step(script, &step, &mut sequences)));
                }
            }
            to_shard::Body::Prepare(prepare) if prepare.dir.contains("deadly") => return "died of a file",
            to_shard::Body::Prepare(prepare) => say(from_shard::Body::Prepared(fake_prepare(script, &prepare))),
            to_shard::Body::DropAdapter(dropped) => {
                script.host.lock().unwrap().remove(&dropped.content_id);
                script.dropped.lock().unwrap().push(dropped.content_id);
            }
            to_shard::Body::Ping(ping) => say(from_shard::Body::Pong(loramux_proto::Pong { nonce: ping.nonce })),
            to_shard::Body::Merge(merge) => {
                let merged = Merged { request_id: merge.request_id, error: None };
                script.merged.lock().unwrap().push(merge);
                say(from_shard::Body::Merged(merged));
            }
            to_shard::Body::Shutdown(_) => return "told to stop",
        }
    }
}

fn take(list: &Mutex<Vec<u32>>, n: u32) -> bool {
    let mut list = list.lock().unwrap();
    let before = list.len();
    list.retain(|at| *at != n);
    list.len() != before
}

/// The next token is a formula of all tokens before it.
fn next_token(tokens: &[u32]) -> u32 {
    tokens.iter().fold(7u32, |sum, token| sum.wrapping_mul(31).wrapping_add(*token)) % 1000
}

fn fake_step(script: &Script, step: &Step, sequences: &mut HashMap<u64, Vec<u32>>) -> StepResult {
    std::thread::sleep(script.step_time);
    for seq in &step.finishes {
        assert!(sequences.remove(seq).is_some(), "finish of an unknown sequence");
    }
    for start in &step.starts {
        sequences.insert(start.seq, start.tokens.clone());
    }
    let compute_us = script.step_time.as_micros() as u64;
    let mut result = StepResult { id: step.id, compute_us, ..StepResult::default() };
    for upload in &step.uploads {
        assert!(script.host.lock().unwrap().contains(&upload.content_id), "upload of what was dropped");
        result.uploaded.push(SlotGeneration { slot: upload.slot, generation: upload.generation });
    }
    for chunk in step.chunks.iter().filter(|chunk| chunk.pool) {
        let tokens = &sequences[&chunk.seq];
        result.pooled.push(Pooled { seq: chunk.seq, values: vec![tokens.iter().sum::<u32>() as f32] });
    }
    for chunk in step.chunks.iter().filter(|chunk| chunk.sample) {
        let tokens = sequences.get_mut(&chunk.seq).expect("started");
        assert_eq!((chunk.start + chunk.len) as usize, tokens.len(), "a sample follows the last token there is");
        let token = grammars::masked(next_token(tokens), chunk.mask.as_deref());
        tokens.push(token);
        result.samples.push(Sample { seq: chunk.seq, token, ..Sample::default() });
    }
    result
}

fn fake_prepare(script: &Script, prepare: &loramux_proto::PrepareAdapter) -> Prepared {
    let outcome = if prepare.dir.contains("bad") {
        let message = "adapter_config.json: `r` must be 1..512; got 0".into();
        let error = AdapterError { code: "adapter_invalid".into(), message };
        if prepare.check_only {
            let findings = AdapterFindings { refusals: vec![error], ..AdapterFindings::default() };
            let report = AdapterReport { findings: Some(findings), ..AdapterReport::default() };
            return Prepared { request_id: prepare.request_id, outcome: Some(prepared::Outcome::Report(report)) };
        }
        prepared::Outcome::Error(error)
    } else {
        let replaced = u8::from(script.replaced.lock().unwrap().contains(&prepare.dir));
        let id = prepare.dir.bytes().fold(replaced * 100, u8::wrapping_add);
        if !prepare.check_only {
            script.host.lock().unwrap().insert(vec![id; 32]);
        }
        prepared::Outcome::Report(AdapterReport {
            content_id: vec![id; 32],
            pages_needed: 1,
            rank_blocks: 1,
            rank_min: 8,
            rank_max: 8,
            host_bytes: 1 << 20,
            findings: prepare.check_only.then(AdapterFindings::default),
            ..AdapterReport::default()
        })
    };
    Prepared { request_id: prepare.request_id, outcome: Some(outcome) }
}

struct World {
    handle: EngineHandle,
    script: Arc<Script>,
    thread: Option<std::thread::JoinHandle<Result<(), EngineError>>>,
    started: Started,
    runtime: tokio::runtime::Runtime,
}

fn world(script: Script, change: impl FnOnce(&mut EngineOptions)) -> World {
    let script = Arc::new(script);
    let mut options = EngineOptions {
        queued_requests_max: 64,
        queued_tokens_max: None,
        running_max: 16,
        step_tokens: 256,
        prefix_caching: true,
        prefix_key: [7; 32],
        host_adapter_bytes: 1 << 30,
        rank_max: 512,
        step_watchdog: Duration::from_secs(20),
        progress: Box::new(|_| {}),
    };
    change(&mut options);
    let (handle, started, thread) = spawn(Box::new(FakeLauncher(Arc::clone(&script))), options).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    World { handle, script, thread: Some(thread), started, runtime }
}

impl Drop for World {
    fn drop(&mut self) {
        self.handle.shut_down();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn request(first: u32, max_tokens: u32) -> GenerateRequest {
    let sampling = Sampling { top_p: 1.0, repetition_penalty: 1.0, ..Sampling::default() };
    GenerateRequest {
        prompt: (first..first + 20).collect(),
        n: 1,
        max_tokens,
        sampling,
        grammar: None,
        pooling: None,
        adapters: Vec::new(),
        tenant: 0,
        cache_salt: None,
        priority: 0,
        deadline_ms: None,
    }
}

fn oracle(request: &GenerateRequest) -> Vec<u32> {
    let mut tokens = request.prompt.to_vec();
    for _ in 0..request.max_tokens {
        tokens.push(next_token(&tokens));
    }
    tokens.split_off(request.prompt.len())
}

/// All tokens of sequence 0, or the failure.
async fn collect(mut generation: Generation) -> Result<Vec<u32>, Failure> {
    let mut tokens = Vec::new();
    loop {
        match tokio::time::timeout(Duration::from_secs(30), generation.recv()).await.expect("an event within 30 s") {
            Some(GenerateEvent::Token { token, .. }) => tokens.push(token),
            Some(GenerateEvent::Failed(failure)) => return Err(failure),
            Some(_) => {}
            None => return Ok(tokens),
        }
    }
}

fn poll(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < Duration::from_secs(20), "{what} within 20 s");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_request_gets_its_tokens_and_its_memory_is_free_afterwards() {
    let world = world(Script::default(), |_| {});
    world.started.recv().unwrap().unwrap();
    let request = request(1, 12);
    let generation = world.handle.submit(request.clone()).unwrap();
    assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(&request));
    poll("nothing runs", || {
        let status = world.handle.status();
        status.running == 0 && status.blocks_used == 0 && status.counters.generation_tokens == 12
    });
}

#[test]
fn streams_go_on_with_the_same_tokens_when_the_shard_dies_or_hangs() {
    let script =
        Script { die_at: Mutex::new(vec![3, 9, 20, 21, 40]), hang_at: Mutex::new(vec![14]), ..Script::default() };
    let world = world(script, |options| options.step_watchdog = Duration::from_millis(300));
    let requests: Vec<_> = (0..8).map(|n| request(n * 100, 40)).collect();
    let generations: Vec<_> = requests.iter().map(|r| world.handle.submit(r.clone()).unwrap()).collect();
    for (request, generation) in requests.iter().zip(generations) {
        assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(request));
    }
    poll("restarts are counted", || world.handle.status().counters.shard_restarts >= 6);
    assert_eq!(world.script.launches.load(Ordering::SeqCst), 7);
}

#[test]
fn streams_go_on_with_the_same_tokens_when_the_shard_dies_or_hangs_under_two_steps() {
    let script = Script {
        die_at: Mutex::new(vec![3, 9, 20, 21, 60]),
        hang_at: Mutex::new(vec![34]),
        pipeline_depth: 2,
        ..Script::default()
    };
    let world = world(script, |options| options.step_watchdog = Duration::from_millis(300));
    let requests: Vec<_> = (0..8).map(|n| request(n * 100, 40)).collect();
    let generations: Vec<_> = requests.iter().map(|r| world.handle.submit(r.clone()).unwrap()).collect();
    for (request, generation) in requests.iter().zip(generations) {
        assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(request));
    }
    assert_eq!(world.script.launches.load(Ordering::SeqCst), 7);
}

#[test]
fn the_next_step_is_sent_before_the_last_one_is_answered() {
    let world = world(Script { pipeline_depth: 2, ..Script::default() }, |_| {});
    world.started.recv().unwrap().unwrap();
    let requests: Vec<_> = (0..4).map(|n| request(n * 100, 30)).collect();
    let generations: Vec<_> = requests.iter().map(|r| world.handle.submit(r.clone()).unwrap()).collect();
    for (request, generation) in requests.iter().zip(generations) {
        assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(request));
    }
    let (steps, ahead) = (world.script.steps.load(Ordering::SeqCst), world.script.ahead.load(Ordering::SeqCst));
    // 30 steps and a few around each arrival, on an idle machine nearly all ahead; half batches would take 60.
    assert!(ahead >= 15 && ahead < steps && steps < 55, "{ahead} of {steps} steps");
    poll("steps are counted once", || {
        let counters = world.handle.status().counters;
        (counters.steps, counters.step_tokens) == (u64::from(steps), 4 * (20 + 29))
    });
}

#[test]
fn a_step_that_waits_behind_a_slow_one_is_not_late() {
    let script = Script { pipeline_depth: 2, step_time: Duration::from_millis(400), ..Script::default() };
    let world = world(script, |options| options.step_watchdog = Duration::from_millis(700));
    let request = request(1, 4);
    let generation = world.handle.submit(request.clone()).unwrap();
    assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(&request));
    assert_eq!(
        world.script.launches.load(Ordering::SeqCst),
        1,
        "two steps together take longer than the watchdog waits"
    );
}

#[test]
fn a_shard_that_never_gets_anywhere_ends_the_process_with_the_reason() {
    let mut broken = world(Script { broken: true, ..Script::default() }, |_| {});
    assert_eq!(broken.started.recv().unwrap().unwrap_err().to_string(), "no such model");
    let ended = broken.thread.take().unwrap().join().unwrap();
    assert!(matches!(ended, Err(EngineError::Start(_))));

    let mut looping = world(Script { dies_at_each_step: true, ..Script::default() }, |_| {});
    looping.started.recv().unwrap().unwrap();
    let _generations: Vec<_> = (0..8).map(|n| looping.handle.submit(request(n, 4)).unwrap()).collect();
    let ended = looping.thread.take().unwrap().join().unwrap();
    assert!(matches!(ended, Err(EngineError::Restarts { .. })), "{ended:?}");
}

#[test]
fn a_full_queue_refuses_at_once_and_a_dropped_request_makes_room() {
    let world = world(Script::default(), |options| {
        options.queued_requests_max = 4;
        options.running_max = 1;
    });
    world.started.recv().unwrap().unwrap();
    let mut kept = vec![world.handle.submit(request(0, 400)).unwrap()];
    world.runtime.block_on(async {
        assert!(matches!(kept[0].recv().await, Some(GenerateEvent::Admitted { .. })));
    });
    kept.extend((1..5).map(|n| world.handle.submit(request(n * 30, 400)).unwrap()));
    let refused = world.handle.submit(request(300, 4)).err();
    assert!(matches!(refused, Some(Failure::QueueFull { waiting: 4, limit: 4 })), "{refused:?}");
    drop(kept);
    let request = request(300, 4);
    let mut accepted = None;
    poll("the queue has room", || {
        accepted = world.handle.submit(request.clone()).ok();
        accepted.is_some()
    });
    let generation = accepted.expect("polled");
    assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(&request));
}

#[test]
fn adapters_are_prepared_dropped_within_the_budget_and_brought_back() {
    let world = world(Script::default(), |options| options.host_adapter_bytes = 2 << 20);
    let prepare = |dir: &str| world.runtime.block_on(world.handle.prepare_adapter(PathBuf::from(dir)));
    let refused = prepare("/bad").unwrap_err();
    assert_eq!((refused.code.as_str(), refused.message.contains("`r`")), ("adapter_invalid", true));
    let first = prepare("/a").unwrap();
    for dir in ["/b", "/c"] {
        prepare(dir).unwrap();
    }
    poll("the oldest was dropped", || !world.script.dropped.lock().unwrap().is_empty());
    assert_eq!(world.script.dropped.lock().unwrap()[0], first.content.0.to_vec());
    let mut request = request(5, 6);
    request.adapters = vec![AdapterUse { content: first.content, scale: 1.0 }];
    let generation = world.handle.submit(request.clone()).unwrap();
    assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(&request));
    request.adapters[0].content = ContentId([99; 32]);
    let generation = world.handle.submit(request).unwrap();
    let failed = world.runtime.block_on(collect(generation)).unwrap_err();
    assert!(matches!(failed, Failure::AdapterGone(..)), "{failed:?}");
}

#[test]
fn draining_refuses_new_requests_and_lets_the_running_one_finish() {
    let world = world(Script::default(), |_| {});
    world.started.recv().unwrap().unwrap();
    let request = request(1, 60);
    let generation = world.handle.submit(request.clone()).unwrap();
    world.handle.begin_drain();
    assert!(matches!(world.handle.submit(request.clone()).err(), Some(Failure::Draining)));
    assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(&request));
}

#[test]
fn a_content_of_two_directories_survives_the_change_of_one_and_the_death_of_the_shard() {
    let world = world(Script { die_at: Mutex::new(vec![4]), ..Script::default() }, |_| {});
    let prepare = |dir: &str| world.runtime.block_on(world.handle.prepare_adapter(PathBuf::from(dir))).unwrap().content;
    let content = prepare("/ab");
    assert_eq!(prepare("/ba"), content, "the fake's contents are sums");
    world.script.replaced.lock().unwrap().push("/ba".into());
    let mut request = request(5, 20);
    request.adapters = vec![AdapterUse { content, scale: 1.0 }];
    let generation = world.handle.submit(request.clone()).unwrap();
    assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(&request));
    assert_eq!(world.script.launches.load(Ordering::SeqCst), 2);
}

#[test]
fn adapters_of_one_request_do_not_push_each_other_out_of_a_small_host_budget() {
    let world = world(Script::default(), |options| options.host_adapter_bytes = 1 << 20);
    let prepare = |dir: &str| world.runtime.block_on(world.handle.prepare_adapter(PathBuf::from(dir))).unwrap().content;
    let uses = ["/a", "/b", "/c"].map(|dir| AdapterUse { content: prepare(dir), scale: 0.5 });
    let mut request = request(5, 6);
    request.adapters = uses.to_vec();
    for _ in 0..3 {
        let generation = world.handle.submit(request.clone()).unwrap();
        assert_eq!(world.runtime.block_on(collect(generation)).unwrap(), oracle(&request));
        prepare("/d"); // pushes out whatever is free
    }
}

#[test]
fn a_content_whose_files_changed_fails_each_request_and_none_hangs_until_they_are_back() {
    let world = world(Script { die_at: Mutex::new(vec![2]), ..Script::default() }, |_| {});
    let prepare = |dir: &str| world.runtime.block_on(world.handle.prepare_adapter(PathBuf::from(dir))).unwrap().content;
    let mut request = request(5, 20);
    request.adapters = vec![AdapterUse { content: prepare("/a"), scale: 1.0 }];
    let run = || world.runtime.block_on(collect(world.handle.submit(request.clone()).unwrap()));
    world.script.replaced.lock().unwrap().push("/a".into());
    for attempt in 0..3 {
        let failed = run().unwrap_err();
        assert!(matches!(failed, Failure::AdapterGone(..)), "attempt {attempt}: {failed:?}");
    }
    world.script.replaced.lock().unwrap().clear();
    assert_eq!(run().unwrap(), oracle(&request));
}
