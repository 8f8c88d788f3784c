//! A run: a server, its workloads in alternating rounds, and what came of them.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use serde_json::{Map, Value};

use super::args::{LoadArgs, RunArgs};
use super::client::Client;
use super::drive::{self, Stop};
use super::figures::{Cost, Outcomes};
use super::machine::Machine;
use super::own_server::{OwnServer, has_flag};
use super::plan::{self, Plan, Seed};
use super::process::{Tree, own_cpu_s};
use super::record::{self, Record, Server, WorkloadResult, covered};
use super::target::{Adapters, Asked, Target, expand, expand_ids};
use super::workload::{Overrides, Workload};
use super::{random_adapters, report, table};
use crate::args::{Command, ServeArgs};
use crate::config::{self, Env};
use crate::serve::raise_open_files;
use crate::{command_line, demo};

/// How long a connection is kept for the next request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// As after a signal from a terminal.
const INTERRUPTED: u8 = 130;

pub(super) fn main(args: RunArgs) -> anyhow::Result<ExitCode> {
    check(&args)?;
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    let mut is_interrupted = false;
    let record = runtime.block_on(measure(&args, &mut is_interrupted))?;
    print!("{}", table::page(&record));
    if let Some(path) = &args.output.json {
        record.write(path)?;
    }
    if let Some(path) = &args.output.plot {
        fs::write(path, report::svg_of(&record)?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let failed = record.results.iter().any(|result| result.failed() > 0 || result.median.is_none());
    Ok(match (is_interrupted, failed || record.stopped.is_some()) {
        (true, _) => ExitCode::from(INTERRUPTED),
        (false, true) => ExitCode::FAILURE,
        (false, false) => ExitCode::SUCCESS,
    })
}

/// What can be known to be wrong before minutes are spent.
fn check(args: &RunArgs) -> anyhow::Result<()> {
    for path in [&args.output.json, &args.output.plot].into_iter().flatten() {
        let opened = OpenOptions::new().create(true).append(true).open(path);
        opened.with_context(|| format!("cannot write {}", path.display()))?;
    }
    for flag in ["--log-format", "--json-output"] {
        if has_flag(&args.server_flags, flag) {
            bail!("{flag}: the benchmark reads the server's log itself; leave it out");
        }
    }
    parse_workloads(&args.load, &args.load.workloads).map(drop)
}

fn parse_workloads(load: &LoadArgs, typed: &[String]) -> anyhow::Result<Vec<Workload>> {
    let flags = Overrides {
        concurrency: load.concurrency,
        rate_per_s: load.rate,
        requests: load.requests,
        prompt_tokens: load.prompt_tokens,
        output_tokens: load.output_tokens,
    };
    let parse = |typed: &String| Workload::parse(typed, &flags).map_err(anyhow::Error::msg);
    let workloads = typed.iter().map(parse).collect::<anyhow::Result<Vec<_>>>()?;
    for (index, workload) in workloads.iter().enumerate() {
        if workloads.iter().take(index).any(|other| other.label == workload.label) {
            bail!("--workloads: two are called `{}`; give one a label=..", workload.label);
        }
    }
    Ok(workloads)
}

/// A server with its models, and what is known of its processes.
struct Measured {
    target: Target,
    processes: Option<Tree>,
    server: Server,
    own: Option<OwnServer>,
    /// Holds the server's log and its random adapters.
    _dir: tempfile::TempDir,
}

async fn measure(args: &RunArgs, is_interrupted: &mut bool) -> anyhow::Result<Record> {
    let mut stop = Stop::listen().context("cannot listen to signals")?;
    let http = reqwest::Client::builder()
        .no_proxy()
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .pool_max_idle_per_host(usize::MAX)
        // Less than the time after which servers close idle connections: a request never meets one that is closing.
        .pool_idle_timeout(IDLE_TIMEOUT)
        .tcp_nodelay(true)
        .build()
        .context("cannot make an HTTP client")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = args.load.seed.unwrap_or(u64::from(now.subsec_nanos()) ^ now.as_secs());
    let mut measured = open(args, &http, &mut stop).await?;
    let workloads = workloads(args, &measured.target)?;
    let client = Client::new(http, measured.target.clone(), args.load.timeout);
    let mut results: Vec<WorkloadResult> = workloads.into_iter().map(WorkloadResult::new).collect();
    let mut rounds = Rounds { args, seed, client: &client, stop: &mut stop, measured: &mut measured };
    let ended = rounds.all(&mut results).await;
    let stopped = match ended {
        Ok(()) => None,
        Err(Ended::Interrupted) => {
            *is_interrupted = true;
            Some("interrupted".to_owned())
        }
        Err(Ended::Failed(error)) if results.iter().all(|result| result.rounds.is_empty()) => return Err(error),
        Err(Ended::Failed(error)) => Some(format!("{error:#}")),
    };
    record::settle(&mut results);
    measured.server.end_rss_bytes = measured.processes.and_then(Tree::rss_bytes);
    let typed: Vec<String> = std::env::args().skip(1).collect();
    Ok(Record {
        schema: record::SCHEMA.to_owned(),
        name: args.output.name.clone(),
        client_version: env!("CARGO_PKG_VERSION").to_owned(),
        started_unix_s: now.as_secs(),
        command: covered(std::iter::once("loramux").chain(typed.iter().map(String::as_str))),
        seed,
        repeats: args.load.repeats as usize,
        machine: Machine::here(),
        server: measured.server,
        results,
        stopped,
    })
}

/// Starts or finds the server, and asks it for its models.
async fn open(args: &RunArgs, http: &reqwest::Client, stop: &mut Stop) -> anyhow::Result<Measured> {
    let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
    let (mut flags, mut made) = (args.server_flags.clone(), None);
    let mut own = None;
    if args.server.url.is_none() {
        if let Some(count) = args.server.adapters {
            let adapters_dir = dir.path().join("adapters");
            let names = make_adapters(args, count as usize, &adapters_dir)?;
            flags.extend(["--adapter-dir".to_owned(), adapters_dir.to_string_lossy().into_owned()]);
            made = Some(Adapters::Names(names));
        }
        own = Some(OwnServer::start(&flags, dir.path(), http, stop).await?);
    }
    let typed = match (&args.server.models, &args.server.lora_ids) {
        (Some(names), _) => Some(Adapters::Names(expand(names).map_err(|e| anyhow::anyhow!("--models {e}"))?)),
        (None, Some(ids)) => Some(Adapters::LoraIds(expand_ids(ids).map_err(|e| anyhow::anyhow!("--lora-ids {e}"))?)),
        (None, None) => made,
    };
    let own_url = own.as_ref().map(|own| own.url.as_str());
    let url = args.server.url.as_deref().or(own_url).unwrap_or_default();
    let asked = Asked {
        url,
        api_key: args.server.api_key.as_ref(),
        base_model: args.server.model.as_deref(),
        adapters: typed,
        extra_body: extra_body(args.server.extra_body.as_deref())?,
    };
    let target = tokio::select! {
        target = Target::probe(http, asked) => target?,
        () = stop.wait() => bail!("interrupted"),
    };
    let processes = own.as_ref().map(OwnServer::processes);
    let processes = processes.or(args.server.server_pid.map(|root_pid| Tree { root_pid }));
    let ready_rss_bytes = processes.and_then(Tree::rss_bytes);
    if let (Some(pid), None) = (args.server.server_pid, ready_rss_bytes) {
        bail!("--server-pid {pid}: there is no such process here");
    }
    let server = Server {
        url: target.base_url.to_string(),
        version: target.version(http).await,
        commit: args.output.commit.clone(),
        base_model: target.base_model.clone(),
        adapters: target.adapters.count(),
        command: own.as_ref().map(|own| own.command.clone()),
        start_to_ready_s: own.as_ref().map(|own| super::figures::rounded(own.start_to_ready_s)),
        ready_rss_bytes,
        end_rss_bytes: None,
    };
    Ok(Measured { target, processes, server, own, _dir: dir })
}

fn extra_body(typed: Option<&str>) -> anyhow::Result<Map<String, Value>> {
    match typed.map(serde_json::from_str) {
        None => Ok(Map::new()),
        Some(Ok(Value::Object(fields))) => Ok(fields),
        Some(_) => bail!("--extra-body: must be a JSON object, such as {{\"min_tokens\": 8}}"),
    }
}

/// What the server's own flags mean.
fn serve_args(flags: &[String]) -> anyhow::Result<ServeArgs> {
    let typed = ["loramux", "serve"].into_iter().chain(flags.iter().map(String::as_str));
    let cli = command_line::read(typed.map(Into::into).collect(), &Env::read());
    match cli.map_err(|error| anyhow::anyhow!("behind `--`: {error}"))?.command {
        Some(Command::Serve(serve)) => Ok(*serve),
        _ => bail!("behind `--` are flags of `loramux serve`"),
    }
}

fn make_adapters(args: &RunArgs, count: usize, dir: &Path) -> anyhow::Result<Vec<String>> {
    let model: PathBuf = match serve_args(&args.server_flags)?.model.model_id {
        Some(model) if model.exists() => model,
        Some(model) => bail!("--adapters needs the model here; {} is no file or folder", model.display()),
        None => {
            let data = config::default_data_dir();
            demo::unpack(&data).with_context(|| format!("cannot unpack the demo model into {}", data.display()))?.model
        }
    };
    let spec = loramux_models::describe(&model).with_context(|| format!("--model-id {}", model.display()))?;
    eprintln!("making {count} random adapters of rank {}", args.server.rank);
    random_adapters::write(dir, &spec, count, args.server.rank as usize)
}

/// The workloads that were asked for, if the server has what they need.
fn workloads(args: &RunArgs, target: &Target) -> anyhow::Result<Vec<Workload>> {
    let adapters = target.adapters.count();
    let usual: &[&str] = if adapters == 0 { &["base"] } else { &["base", "one", "distinct"] };
    let usual: Vec<String> = usual.iter().map(|name| (*name).to_owned()).collect();
    let typed = if args.load.workloads.is_empty() { &usual } else { &args.load.workloads };
    let workloads = parse_workloads(&args.load, typed)?;
    if let Some(workload) = workloads.iter().find(|workload| workload.uses_adapters() && adapters == 0) {
        bail!(
            "workload `{}` needs adapters, and the server lists none: use --adapters N (a server of the run's own), --models or \
             --lora-ids",
            workload.label
        );
    }
    if args.server.url.is_none() && workloads.iter().any(|workload| workload.name == "churn") {
        let held = serve_args(&args.server_flags)?.adapters.max_loras.map(|held| held as usize);
        if held.is_none_or(|held| held >= adapters) {
            bail!("churn needs more adapters ({adapters}) than the server holds at once: add `-- --max-loras N`");
        }
    }
    Ok(workloads)
}

/// Why the rounds ended early.
enum Ended {
    Interrupted,
    Failed(anyhow::Error),
}

struct Rounds<'a> {
    args: &'a RunArgs,
    seed: u64,
    client: &'a Client,
    stop: &'a mut Stop,
    measured: &'a mut Measured,
}

impl Rounds<'_> {
    /// Round 1 of each workload, round 2 of each, ..: what the machine does meanwhile falls on all of them.
    async fn all(&mut self, results: &mut [WorkloadResult]) -> Result<(), Ended> {
        self.touch_adapters(results).await?;
        for (index, result) in results.iter().enumerate() {
            self.warm_up(index, &result.workload).await?;
        }
        let repeats = self.args.load.repeats;
        for round in 1..=u64::from(repeats) {
            for (index, result) in results.iter_mut().enumerate() {
                let label = &result.workload.label;
                let plan = plan::plan(&result.workload, &self.measured.target, self.seed(index, round));
                let (outcomes, cost, is_complete) = self.send(&result.workload, plan).await;
                let round_figures = outcomes.round(cost);
                let speed = table::number(round_figures.figures.output_tokens_per_s);
                let failed = round_figures.failed;
                let failures = if failed == 0 { String::new() } else { format!(", {failed} failed") };
                eprintln!("round {round}/{repeats}  {label}: {speed} tok/s{failures}");
                let is_empty = round_figures.requests == 0;
                if is_complete || !is_empty {
                    result.rounds.push(round_figures);
                }
                if !is_complete {
                    return Err(Ended::Interrupted);
                }
                if let Some(error) = self.measured.own.as_mut().and_then(OwnServer::ended) {
                    return Err(Ended::Failed(error));
                }
                if is_empty {
                    return Err(Ended::Failed(anyhow::anyhow!("no request of round {round} of `{label}` succeeded")));
                }
            }
        }
        Ok(())
    }

    fn seed(&self, workload: usize, round: u64) -> Seed {
        Seed { run: self.seed, workload: workload as u64, round, vocabulary: self.args.load.vocabulary }
    }

    /// Sends one short request for each adapter that may be drawn, and for the base.
    async fn touch_adapters(&mut self, results: &[WorkloadResult]) -> Result<(), Ended> {
        let target = &self.measured.target;
        let needs = results.iter().any(|result| result.workload.uses_adapters()) && !self.args.load.cold_adapters;
        let adapters = if needs { target.adapters.count() } else { 0 };
        let seed = self.seed(0, 0);
        for adapter in std::iter::once(None).chain((0..adapters).map(Some)) {
            let planned = plan::touch(target, adapter, seed);
            let ended = tokio::select! {
                ended = self.client.complete(&planned, std::time::Instant::now(), || ()) => ended,
                () = self.stop.wait() => return Err(Ended::Interrupted),
            };
            if let Err(failure) = ended {
                let name = adapter.map_or_else(|| target.base_model.clone(), |index| target.adapters.name(index));
                let died = self.measured.own.as_mut().and_then(OwnServer::ended);
                let error = died.unwrap_or_else(|| anyhow::anyhow!("{}", failure.message));
                return Err(Ended::Failed(error.context(format!("the first request of `{name}` failed"))));
            }
        }
        Ok(())
    }

    async fn warm_up(&mut self, index: usize, workload: &Workload) -> Result<(), Ended> {
        let count = self.args.load.warmup.unwrap_or(workload.concurrency);
        if count == 0 {
            return Ok(());
        }
        let mut warm = workload.clone();
        warm.requests = count;
        warm.rate_per_s = None;
        let plan = plan::plan(&warm, &self.measured.target, self.seed(index, 0));
        let plan = Plan { intruder: None, ..plan };
        let (outcomes, _, is_complete) = self.send(&warm, plan).await;
        if !is_complete {
            return Err(Ended::Interrupted);
        }
        match outcomes.failures.first() {
            Some(failure) if outcomes.answered.is_empty() => {
                let died = self.measured.own.as_mut().and_then(OwnServer::ended);
                let error = died.unwrap_or_else(|| anyhow::anyhow!("{}", failure.message));
                Err(Ended::Failed(
                    error.context(format!("no request of the warm-up of `{}` succeeded", workload.label)),
                ))
            }
            _ => Ok(()),
        }
    }

    async fn send(&mut self, workload: &Workload, plan: Plan) -> (Outcomes, Cost, bool) {
        let processes = self.measured.processes;
        let before = (own_cpu_s(), processes.and_then(Tree::cpu_s));
        let (outcomes, is_complete) = drive::round(self.client, workload, plan, self.stop).await;
        let after = (own_cpu_s(), processes.and_then(Tree::cpu_s));
        let cost = Cost {
            client_cpu_s: after.0 - before.0,
            server_cpu_s: before.1.zip(after.1).map(|(before, after)| (after - before).max(0.0)),
            server_rss_bytes: processes.and_then(Tree::rss_bytes).map(|bytes| bytes as f64),
        };
        (outcomes, cost, is_complete)
    }
}
