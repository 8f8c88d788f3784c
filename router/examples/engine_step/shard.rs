//! A shard that computes nothing: it reads steps from a Unix socket, waits, and answers each with as many tokens as the
//! step wants. While it waits, everybody else gets done with the step before; then it reads the clocks.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use loramux_proto::{
    AdapterReport, FromShard, Info, Pong, Prepared, Sample, SlotGeneration, Step, StepResult, ToShard, frame,
    from_shard, prepared, to_shard,
};
use loramux_router::engine::{Reports, Shard, ShardExit, ShardGone, ShardLauncher};

use super::clocks::{GROUPS, Group, ThreadClocks, allocations, join};

/// What one step cost everybody, us of CPU time by group.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StepCost {
    pub(crate) cpu_us: [f64; GROUPS.len()],
    pub(crate) allocations: [u64; GROUPS.len()],
    /// From the answer's last byte to the next step's first.
    pub(crate) gap_us: f64,
    /// Bytes of the step's frame.
    pub(crate) bytes: usize,
}

/// What the shard is to do, and what it saw.
pub(crate) struct Probe {
    /// Steps that decode exactly so many sequences are counted.
    pub(crate) sequences: usize,
    /// Each step takes so long.
    pub(crate) step_time: Duration,
    pub(crate) costs: Mutex<Vec<StepCost>>,
}

pub(crate) struct EchoLauncher(pub(crate) Arc<Probe>);

struct EchoShard {
    socket: UnixStream,
    scratch: Vec<u8>,
}

impl Shard for EchoShard {
    fn send(&mut self, message: ToShard) -> Result<(), ShardGone> {
        frame::write(&mut self.socket, &mut self.scratch, &message).map_err(|_| ShardGone)
    }

    fn kill(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl ShardLauncher for EchoLauncher {
    fn launch(&mut self, reports: Reports) -> Result<Box<dyn Shard>, String> {
        let (ours, theirs) = UnixStream::pair().map_err(|e| e.to_string())?;
        let reader = ours.try_clone().map_err(|e| e.to_string())?;
        let probe = Arc::clone(&self.0);
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(run).map_err(|e| e.to_string())
        };
        spawn("echo", Box::new(move || echo(theirs, &probe)))?;
        let read = move || {
            join(Group::Reports);
            let (mut socket, mut scratch) = (BufReader::new(reader), Vec::new());
            while let Ok(Some(message)) = frame::read::<FromShard>(&mut socket, &mut scratch) {
                reports.message(message);
            }
            reports.gone(ShardExit { reason: "closed".into(), killed_from_outside: false });
        };
        spawn("shard-reports", Box::new(read))?;
        Ok(Box::new(EchoShard { socket: ours, scratch: Vec::new() }))
    }
}

fn info() -> Info {
    Info {
        vocab_size: 2048,
        context_tokens: 2048,
        page_bytes: 2 << 20,
        pages_total: 1024,
        blocks_per_page: 16,
        block_tokens: 16,
        slots_max: 512,
        step_tokens_max: 4096,
        seqs_max: 512,
        base_content_id: vec![7; 32],
        ..Info::default()
    }
}

fn echo(socket: UnixStream, probe: &Probe) {
    join(Group::Other);
    let Ok(mut writer) = socket.try_clone() else { return };
    let (mut socket, mut read, mut written) = (BufReader::new(socket), Vec::new(), Vec::new());
    let mut say = |body| {
        let message = FromShard { body: Some(body) };
        frame::write(&mut writer, &mut written, &message).is_ok()
    };
    if !say(from_shard::Body::Info(info())) {
        return;
    }
    let mut watch = Watch::new(probe);
    let mut tokens = HashMap::new();
    // Waits for the first byte, so that what follows is work.
    while socket.fill_buf().is_ok_and(|bytes| !bytes.is_empty()) {
        let arrived = Instant::now();
        join(Group::Shard);
        let received = frame::read::<ToShard>(&mut socket, &mut read);
        join(Group::Other);
        let Ok(Some(ToShard { body: Some(body) })) = received else { return };
        let answered = match body {
            to_shard::Body::Step(step) => {
                watch.arrived(arrived, &step, read.len());
                std::thread::sleep(probe.step_time);
                watch.everybody_is_done();
                join(Group::Shard);
                let result = answer(&step, &mut tokens);
                let said = say(from_shard::Body::Step(result));
                join(Group::Other);
                watch.answered = Some(Instant::now());
                said
            }
            to_shard::Body::Prepare(prepare) => {
                say(from_shard::Body::Prepared(prepared_like(&prepare.dir, prepare.request_id)))
            }
            to_shard::Body::Ping(ping) => say(from_shard::Body::Pong(Pong { nonce: ping.nonce })),
            to_shard::Body::Shutdown(_) => return,
            to_shard::Body::DropAdapter(_) | to_shard::Body::Merge(_) => true,
        };
        if !answered {
            return;
        }
    }
}

/// Words in turn, so that the text grows.
fn answer(step: &Step, tokens: &mut HashMap<u64, u32>) -> StepResult {
    for seq in &step.finishes {
        tokens.remove(seq);
    }
    let uploaded =
        step.uploads.iter().map(|upload| SlotGeneration { slot: upload.slot, generation: upload.generation });
    let mut result = StepResult { id: step.id, uploaded: uploaded.collect(), compute_us: 1, ..StepResult::default() };
    result.samples.reserve(step.chunks.len());
    for chunk in step.chunks.iter().filter(|chunk| chunk.sample) {
        let token = tokens.entry(chunk.seq).or_insert(300);
        *token = if *token < 2000 { *token + 1 } else { 300 };
        result.samples.push(Sample { seq: chunk.seq, token: *token, ..Sample::default() });
    }
    result
}

fn prepared_like(dir: &str, request_id: u64) -> Prepared {
    let mut content_id = vec![0; 32];
    for (at, byte) in dir.bytes().rev().take(32).enumerate() {
        content_id[at] = byte;
    }
    let report = AdapterReport { content_id, pages_needed: 1, host_bytes: 1 << 20, ..AdapterReport::default() };
    Prepared { request_id, outcome: Some(prepared::Outcome::Report(report)) }
}

/// Reads everybody's clocks once in each step, at the moment when they all wait.
struct Watch<'a> {
    probe: &'a Probe,
    clocks: Option<ThreadClocks>,
    last: Option<([f64; GROUPS.len()], [u64; GROUPS.len()])>,
    /// The step before was one to count, and so is this one.
    counts: (bool, bool),
    cost: StepCost,
    /// What the last look took.
    look_us: f64,
    answered: Option<Instant>,
}

impl<'a> Watch<'a> {
    fn new(probe: &'a Probe) -> Self {
        Self {
            probe,
            clocks: None,
            last: None,
            counts: (false, false),
            cost: StepCost::default(),
            look_us: 0.0,
            answered: None,
        }
    }

    fn arrived(&mut self, at: Instant, step: &Step, bytes: usize) {
        let decodes = step.chunks.len() == self.probe.sequences && step.chunks.iter().all(|chunk| chunk.len == 1);
        let is_plain = decodes && step.starts.is_empty() && step.finishes.is_empty();
        self.counts = (self.counts.1, is_plain);
        self.cost.gap_us = self.answered.map_or(0.0, |answered| at.duration_since(answered).as_secs_f64() * 1e6);
        self.cost.bytes = bytes;
    }

    /// What was done since the last look belongs to the answer before, and to this step's way here.
    fn everybody_is_done(&mut self) {
        // This thread waited a moment ago, so its clock is exact too. Looking at clocks is not the shard's work.
        let (own_us, looked) = (ThreadClocks::own(), Instant::now());
        let clocks = self.clocks.get_or_insert_with(ThreadClocks::new);
        if !self.counts.1 {
            *clocks = ThreadClocks::new(); // threads come and go at the start
        }
        let mut cpu_us = clocks.read();
        cpu_us[Group::Shard as usize] = own_us;
        let now = (cpu_us, allocations());
        let look_us = std::mem::replace(&mut self.look_us, 0.0);
        if let Some((before_us, before)) = self.last.replace(now)
            && self.counts == (true, true)
        {
            self.cost.cpu_us = std::array::from_fn(|at| cpu_us[at] - before_us[at]);
            self.cost.cpu_us[Group::Shard as usize] -= look_us;
            self.cost.allocations = std::array::from_fn(|at| now.1[at] - before[at]);
            self.probe.costs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(self.cost);
        }
        self.look_us = looked.elapsed().as_secs_f64() * 1e6;
    }
}
