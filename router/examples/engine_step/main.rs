//! What one step costs the host, besides the model: plan, wire, commit, detokenise, events, sockets.
//!
//! `taskset -c 0 cargo run --release -p loramux-router --example engine_step -- --sequences 64`
//!
//! The engine, the HTTP side and the wire are the real ones; the shard is a thread that answers tokens. First come the
//! parts of a step on one thread, then everything together: CPU time of each group of threads for each step, read while
//! all wait for the shard, so that waiting does not count and every byte written does.

mod clients;
mod clocks;
mod parts;
mod shard;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use loramux_router::engine::{self, EngineHandle, EngineOptions};
use loramux_router::http::{self, App, RouterConfig};
use loramux_router::text::{TextFiles, TextModel};

use clients::Ask;
use clocks::{GROUPS, Group, join};
use shard::{EchoLauncher, Probe, StepCost};

#[global_allocator]
static ALLOCATOR: clocks::Counting = clocks::Counting;

/// Who reads the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Front {
    Engine,
    App,
    Sockets,
}

struct Options {
    sequences: usize,
    context: usize,
    steps: usize,
    rounds: usize,
    step_ms: u64,
    workers: usize,
    only: Option<Front>,
}

impl Options {
    fn read() -> Self {
        let mut options =
            Self { sequences: 64, context: 512, steps: 256, rounds: 4, step_ms: 4, workers: 2, only: None };
        let mut words = std::env::args().skip(1);
        while let (Some(name), Some(value)) = (words.next(), words.next()) {
            let number = || value.parse().unwrap_or_else(|_| panic!("{name} takes a number, not `{value}`"));
            match name.as_str() {
                "--sequences" => options.sequences = number(),
                "--context" => options.context = number(),
                "--steps" => options.steps = number(),
                "--rounds" => options.rounds = number(),
                "--step-ms" => options.step_ms = number() as u64,
                "--workers" => options.workers = number(),
                "--only" => {
                    options.only = Some(match value.as_str() {
                        "engine" => Front::Engine,
                        "app" => Front::App,
                        "sockets" => Front::Sockets,
                        _ => panic!("--only takes engine, app or sockets"),
                    });
                }
                _ => panic!("unknown option {name}"),
            }
        }
        options
    }
}

fn quantile(times: &mut [f64], part: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(((times.len() as f64 - 1.0) * part) as usize).copied().unwrap_or(f64::NAN)
}

fn read_text() -> TextModel {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/base");
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    let files = TextFiles {
        tokenizer_json: read("tokenizer.json").expect("the demo model has a tokenizer"),
        tokenizer_config: read("tokenizer_config.json"),
        generation_config: read("generation_config.json"),
        ..TextFiles::default()
    };
    TextModel::new(files).expect("the demo model's files are good")
}

fn main() {
    let options = Options::read();
    let text = read_text();
    println!("{} sequences, one adapter each, context {}", options.sequences, options.context);
    if options.only.is_none() {
        println!("\n{:<20} {:>8} {:>8}  us, one thread", "part", "p50", "p99");
        let mut sum = 0.0;
        let times = parts::measure(&text, options.sequences, options.context, options.steps);
        for (name, mut times) in parts::PARTS.iter().zip(times) {
            let p50 = quantile(&mut times, 0.5);
            sum += p50;
            println!("{name:<20} {p50:>8.1} {:>8.1}", quantile(&mut times, 0.99));
        }
        println!("{:<20} {sum:>8.1}", "sum");
    }
    let fronts = [Front::Engine, Front::App, Front::Sockets];
    for front in fronts.into_iter().filter(|front| options.only.is_none_or(|only| only == *front)) {
        let costs = run(&options, &text, front);
        report(&options, front, &costs);
    }
}

/// Serves `rounds` times `sequences` streams and returns what each step cost that decoded all of them.
fn run(options: &Options, text: &TextModel, front: Front) -> Vec<StepCost> {
    let step_time = Duration::from_millis(options.step_ms);
    let probe = Arc::new(Probe { sequences: options.sequences, step_time, costs: Mutex::default() });
    let engine_options = EngineOptions {
        queued_requests_max: 1024,
        queued_tokens_max: None,
        running_max: 512,
        step_tokens: 4096,
        prefix_caching: true,
        prefix_key: [7; 32],
        host_adapter_bytes: 1 << 40,
        rank_max: 64,
        step_watchdog: Duration::from_secs(60),
        progress: Box::new(|_| {}),
    };
    let (engine, ready, thread) =
        engine::spawn(Box::new(EchoLauncher(Arc::clone(&probe))), engine_options).expect("a thread");
    ready.recv().expect("the engine says").expect("the shard starts");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(options.workers)
        .thread_name("http")
        .on_thread_start(|| join(Group::Http))
        .enable_all()
        .build()
        .expect("a runtime");
    {
        let _inside = runtime.enter();
        engine.carry_events_here();
    }
    let dirs = std::env::temp_dir().join(format!("engine_step-{}", std::process::id()));
    let adapters = write_adapters(&dirs, options.sequences);
    for round in 0..options.rounds {
        let asks = asks(options, round);
        let served = match front {
            Front::Engine => runtime.block_on(serve_engine(&engine, &dirs, asks)),
            Front::App | Front::Sockets => serve_http(&runtime, &engine, text, &adapters, asks, front),
        };
        assert_eq!(served, options.sequences * options.steps, "events of all streams");
    }
    engine.shut_down();
    let _ = thread.join();
    let _ = std::fs::remove_dir_all(&dirs);
    std::mem::take(&mut *probe.costs.lock().unwrap_or_else(PoisonError::into_inner))
}

fn write_adapters(root: &Path, count: usize) -> Vec<(String, std::path::PathBuf)> {
    let write = |at: usize| {
        let (name, dir) = (format!("a{at}"), root.join(format!("a{at:04}")));
        std::fs::create_dir_all(&dir).expect("a temporary directory");
        std::fs::write(dir.join("adapter_config.json"), "{}").expect("a file");
        std::fs::write(dir.join("adapter_model.safetensors"), &name).expect("a file");
        (name, dir)
    };
    (0..count).map(write).collect()
}

fn asks(options: &Options, round: usize) -> Vec<Ask> {
    let prompt = |at: usize| {
        let first = at + round * options.sequences;
        (0..options.context - options.steps / 2).map(|i| 300 + ((first * 31 + i) % 1500) as u32).collect()
    };
    let ask = |at: usize| Ask { model: format!("a{at}"), prompt: prompt(at), max_tokens: options.steps as u32 };
    (0..options.sequences).map(ask).collect()
}

async fn serve_engine(engine: &EngineHandle, dirs: &Path, asks: Vec<Ask>) -> usize {
    let mut running = Vec::new();
    for (at, ask) in asks.into_iter().enumerate() {
        let prepared = engine.prepare_adapter(dirs.join(format!("a{at:04}"))).await.expect("it is prepared");
        running.push(tokio::spawn(clients::of_engine(engine.clone(), ask, Some(prepared.content))));
    }
    let mut tokens = 0;
    for stream in running {
        tokens += stream.await.unwrap_or(0);
    }
    tokens
}

fn serve_http(
    runtime: &tokio::runtime::Runtime,
    engine: &EngineHandle,
    text: &TextModel,
    adapters: &[(String, std::path::PathBuf)],
    asks: Vec<Ask>,
    front: Front,
) -> usize {
    let config = RouterConfig { adapters: adapters.to_vec(), ..RouterConfig::default() };
    let _inside = runtime.enter();
    let app = App::new(config, text.clone(), engine.clone());
    app.preload();
    if front == Front::App {
        let streams: Vec<_> = asks.into_iter().map(|ask| tokio::spawn(clients::of_app(app.clone(), ask))).collect();
        return runtime.block_on(async {
            let mut events = 0;
            for stream in streams {
                events += stream.await.unwrap_or(0);
            }
            events
        });
    }
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = runtime.spawn(http::serve(listener, app, std::future::pending()));
    let events = clients::over_sockets(address, asks);
    server.abort();
    events
}

fn report(options: &Options, front: Front, costs: &[StepCost]) {
    let label = match front {
        Front::Engine => "engine and wire only",
        Front::App => "with the HTTP side, without sockets",
        Front::Sockets => "with the HTTP side over sockets",
    };
    let per_token = (costs.len() * options.sequences) as f64;
    println!("\n{label}: {} steps, {} bytes each on the wire", costs.len(), costs.last().map_or(0, |cost| cost.bytes));
    println!("{:<20} {:>8} {:>8}  us of CPU per step; allocations per token", "threads", "p50", "p99");
    let show = |name: &str, mut times: Vec<f64>, allocations: u64| {
        let (p50, p99) = (quantile(&mut times, 0.5), quantile(&mut times, 0.99));
        println!("{name:<20} {p50:>8.1} {p99:>8.1} {:>8.2}", allocations as f64 / per_token);
    };
    for group in GROUPS.into_iter().filter(|group| *group != Group::Other) {
        let at = group as usize;
        let times = costs.iter().map(|cost| cost.cpu_us[at]).collect();
        show(&format!("{group:?}"), times, costs.iter().map(|cost| cost.allocations[at]).sum());
    }
    let sums = costs.iter().map(|cost| cost.cpu_us.iter().sum()).collect();
    let measured = |cost: &StepCost| cost.allocations[..Group::Other as usize].iter().sum::<u64>();
    show("all", sums, costs.iter().map(measured).sum());
    let mut gaps: Vec<f64> = costs.iter().map(|cost| cost.gap_us).collect();
    let (p50, p99) = (quantile(&mut gaps, 0.5), quantile(&mut gaps, 0.99));
    println!("{:<20} {p50:>8.1} {p99:>8.1}  us from an answer to the next step, by the wall clock", "gap");
}
