//! The shard: owns the weights and the arena, and executes steps. It decides nothing.
//!
//! [`serve`] runs on the one thread that owns the device ([`Execute`]). Adapters are prepared on threads beside it, and
//! [`dispatch`] answers pings at once. Where the messages come from, a socket ([`process`]) or a channel ([`in_process`]),
//! makes no difference here.

mod batch;
mod device;
pub(crate) mod in_process;
mod inspect;
pub(crate) mod launch;
mod lent;
mod memory;
mod options;
mod pooling;
mod prepare;
pub(crate) mod process;
mod run;
mod sampling;
mod slab;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use loramux_proto::{Fatal, FromShard, Info, Loading, Pong, Step, StepResult, Tables, ToShard, from_shard, to_shard};

use prepare::{PrepareThreads, Work};

pub(crate) use memory::{give_back_freed, host_adapter_bytes_auto, map_large_buffers};
pub(crate) use options::{CudaPaths, DeviceChoice, DtypeChoice, LoadFormatChoice, ShardOptions};
pub(crate) use run::ShardFault;
pub(crate) use slab::Slab;

/// Takes what the shard has to say; safe to call from any of its threads.
pub(crate) type Reply = Arc<dyn Fn(from_shard::Body) + Send + Sync>;

/// Wraps a body for the wire.
pub(crate) fn message(body: from_shard::Body) -> FromShard {
    FromShard { body: Some(body) }
}

/// Loads the model and executes steps until the inbox closes or says so. Runs on the thread that owns the device.
pub(crate) fn serve(options: &ShardOptions, inbox: &Receiver<ToShard>, reply: &Reply) {
    if let Err(fatal) = try_serve(options, inbox, reply) {
        reply(from_shard::Body::Fatal(Fatal { message: fatal }));
    }
}

/// Executes steps, on the CPU or on a device. Steps are answered in the order in which they were submitted.
pub(crate) trait Execute {
    /// What the router needs to plan.
    fn info(&self) -> &Info;

    /// The adapters in host memory.
    fn slab(&self) -> &Arc<Slab>;

    /// Begins a step; a device works on it while the caller goes on.
    ///
    /// # Errors
    /// A [`ShardFault`]: the shard cannot go on.
    fn submit(&mut self, step: &Step) -> Result<(), ShardFault>;

    /// Steps that were submitted and not answered.
    fn in_flight(&self) -> usize;

    /// The result of the oldest step, if it is done; with `wait`, the caller waits for it.
    ///
    /// # Errors
    /// A [`ShardFault`]: the shard cannot go on.
    fn poll(&mut self, wait: bool) -> Result<Option<StepResult>, ShardFault>;

    /// Nodes of the graph that a decode of `rows` rows replays; `None` if it is not one graph. For benchmarks.
    fn graph_nodes(&self, _rows: usize, _adapters: bool) -> Option<usize> {
        None
    }
}

/// How long the thread sleeps for a message while a device works: the longest that a result waits to be read.
const POLL_EVERY: Duration = Duration::from_micros(50);

fn try_serve(options: &ShardOptions, inbox: &Receiver<ToShard>, reply: &Reply) -> Result<(), String> {
    let started = Instant::now();
    let mut executor = launch::load(options, &mut |what, done, total| {
        reply(from_shard::Body::Loading(Loading { what: what.to_owned(), done, total }));
    })
    .map_err(|e| e.to_string())?;
    let prepares = PrepareThreads::start(executor.slab(), reply)?;
    let mut info = executor.info().clone();
    info.load_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    reply(from_shard::Body::Info(info));
    let mut tables = Tables::default();
    loop {
        let received = match executor.in_flight() {
            0 => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            _ => inbox.recv_timeout(POLL_EVERY),
        };
        match received {
            Ok(ToShard { body: Some(mut body) }) => {
                if let to_shard::Body::Step(step) = &mut body {
                    tables.complete(step).map_err(|unknown| ShardFault::Malformed(unknown.to_string()).to_string())?;
                }
                if !handle(body, &mut *executor, &prepares, reply)? {
                    return Ok(());
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Ok(ToShard { body: None }) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        while let Some(result) = executor.poll(false).map_err(|fault| fault.to_string())? {
            reply(from_shard::Body::Step(result));
        }
    }
}

/// False when the shard shall end.
fn handle(
    body: to_shard::Body,
    executor: &mut dyn Execute,
    prepares: &PrepareThreads,
    reply: &Reply,
) -> Result<bool, String> {
    match body {
        to_shard::Body::Step(step) => executor.submit(&step).map_err(|fault| fault.to_string())?,
        to_shard::Body::Prepare(prepare) => {
            submit(prepares, Work::Prepare(prepare))?;
        }
        to_shard::Body::Merge(merge) => submit(prepares, Work::Merge(merge))?,
        to_shard::Body::DropAdapter(dropped) => executor.slab().remove(&dropped.content_id),
        to_shard::Body::Ping(ping) => reply(from_shard::Body::Pong(Pong { nonce: ping.nonce })),
        to_shard::Body::Shutdown(_) => return Ok(false),
    }
    Ok(true)
}

fn submit(prepares: &PrepareThreads, work: Work) -> Result<(), String> {
    if prepares.submit(work) { Ok(()) } else { Err("too many adapters are being prepared".to_owned()) }
}

/// Answers pings on the thread that reads messages, so that a long step does not look like a dead shard, and passes the
/// rest on. False when the shard has ended.
pub(crate) fn dispatch(received: ToShard, to_executor: &Sender<ToShard>, reply: &Reply) -> bool {
    if let Some(to_shard::Body::Ping(ping)) = &received.body {
        reply(from_shard::Body::Pong(Pong { nonce: ping.nonce }));
        return true;
    }
    to_executor.send(received).is_ok()
}

/// Threads and instructions of the kernels. Called once in a process, before any op.
pub(crate) fn set_kernels(options: &ShardOptions) {
    if let Some(name) = &options.cpu_isa
        && let Err(error) = loramux_kernels::set_isa(name)
    {
        tracing::warn!("--cpu-isa {name}: {error}");
    }
    let Some(threads) = options.threads else { return };
    if let Err(started) = loramux_kernels::set_threads(threads) {
        tracing::debug!(started, "the kernels' threads were started before --threads was read");
    }
}

/// Whether a path names a GGUF file, for messages.
pub(crate) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}
