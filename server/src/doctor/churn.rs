//! Adapters changing places: many adapters, few slots, uploads into slots that the step before still uses, and every answer
//! held against what the adapter gave alone. One answer under a neighbour's adapter is a failure.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use anyhow::{bail, ensure};
use loramux_kernels::device::SharedDevice;
use loramux_kernels::device::check::Random;
use loramux_models::DecoderSpec;
use loramux_proto::{AdapterRef, Chunk, SeqStart, Step, StepResult};

use super::adapters::RandomAdapter;
use super::args::DoctorArgs;
use super::machine::Machine;
use super::model::{demo_files, demo_options, difference, tolerance};
use super::report::{Section, Status};
use super::runner::{Job, Mode, Position, Prepared, Runner, greedy};
use crate::shard::launch;

/// How much is done.
#[derive(Clone, Copy, Debug)]
struct Size {
    adapters: usize,
    slots: usize,
    /// Sequences of a step.
    rows: usize,
    /// Slots that get another adapter at each step.
    uploads: usize,
    switches: u64,
}

/// Texts that every adapter is asked: one that is a decode, and one that is a prompt.
const TEXTS: [&[u32]; 2] = [&[17], &[5, 99, 1023, 40, 41, 42, 700, 8, 9, 10, 11, 12, 13, 14, 15, 16, 3, 19, 7, 77]];

/// Two adapters whose log-probabilities are closer than this many tolerances could be taken for one another.
const APART: f32 = 4.0;

/// What happened.
#[derive(Clone, Debug, Default)]
struct Outcome {
    steps: u64,
    switches: u64,
    answers: u64,
    base_answers: u64,
    wrong: u64,
    /// The first wrong answers, in words.
    samples: Vec<String>,
    worst: f32,
    seconds: f64,
}

/// Runs the switches.
pub(crate) fn section(machine: &Machine, device: &SharedDevice, args: &DoctorArgs) -> Section {
    let mut section = Section::new("adapters changing places");
    let size = if machine.is_emulated() {
        Size { adapters: 6, slots: 3, rows: 3, uploads: 1, switches: args.switches.unwrap_or(60) }
    } else {
        Size { adapters: 64, slots: 8, rows: 8, uploads: 3, switches: args.switches.unwrap_or(100_000) }
    };
    match run(device, args, size) {
        Ok((outcome, size)) => report(&mut section, &outcome, size),
        Err(error) => {
            section.push(Status::Failed, "churn", format!("{error:#}"));
        }
    }
    section
}

fn report(section: &mut Section, outcome: &Outcome, size: Size) {
    let Outcome { steps, switches, answers, base_answers, wrong, worst, seconds, .. } = *outcome;
    let text = format!(
        "{switches} switches of {} adapters through {} slots in {steps} steps, {seconds:.1} s: {answers} answers ({base_answers} \
         without adapter), {wrong} wrong, worst difference {worst:.4}",
        size.adapters, size.slots
    );
    let is_ok = wrong == 0 && switches >= size.switches && answers > 0;
    section
        .push(if is_ok { Status::Ok } else { Status::Failed }, "switches", text)
        .field("switches", switches)
        .field("adapters", size.adapters)
        .field("slots", size.slots)
        .field("steps", steps)
        .field("answers", answers)
        .field("base_answers", base_answers)
        .field("wrong", wrong)
        .field("worst", worst)
        .field("seconds", seconds);
    for sample in &outcome.samples {
        section.push(Status::Failed, "wrong answer", sample.clone());
    }
}

fn run(device: &SharedDevice, args: &DoctorArgs, size: Size) -> anyhow::Result<(Outcome, Size)> {
    let files = demo_files()?;
    let options = demo_options(args, &files.model);
    let config = std::fs::read_to_string(files.model.join("config.json"))?;
    let spec = DecoderSpec::from_config(&config)?;
    let mut runner = Runner::new(launch::load_on(Some(device), &options, Vec::new(), &mut |_, _, _| {})?, args.seed);
    let dir = TempDir::new("churn")?;
    let limit = tolerance(launch::elem(args.dtype)?).each;
    let mut adapters = Vec::new();
    for at in 0..size.adapters {
        let path = dir.0.join(format!("{at}"));
        // Ranks on both sides of a block, so that switches move between one row and two of the descriptor table.
        let rank = [8, 16, 24][at % 3];
        RandomAdapter { rank, seed: args.seed + 1000 + at as u64, gain: 0.7 }.write(&path, &spec)?;
        adapters.push(runner.prepare(&path)?);
    }
    let alone = alone(&mut runner, &adapters)?;
    let closest = closest(&alone);
    ensure!(
        closest > APART * limit,
        "two of the adapters are {closest} apart, which is too near to tell them from one another; take another --seed"
    );
    let mut churn = Churn {
        random: Random::new(args.seed),
        slots: vec![None; size.slots],
        expected: HashMap::new(),
        in_flight: VecDeque::new(),
        outcome: Outcome::default(),
        limit,
        size,
        runner,
        adapters,
        alone,
    };
    churn.run()?;
    Ok((churn.outcome, size))
}

/// What each adapter (and the base, last) answers when nobody else is there.
fn alone(runner: &mut Runner, adapters: &[Prepared]) -> anyhow::Result<Vec<[Position; 2]>> {
    let mut alone = Vec::with_capacity(adapters.len() + 1);
    for adapter in adapters.iter().map(Some).chain([None]) {
        let placed = adapter.map(|adapter| runner.place(0, adapter)).transpose()?;
        let adapters: Vec<AdapterRef> = placed.into_iter().collect();
        let mut answer = |tokens: &[u32]| -> anyhow::Result<Position> {
            let mode = Mode::Generate { chunk: usize::MAX, tokens: 1 };
            let job = Job { tokens: tokens.to_vec(), adapters: adapters.clone(), sampling: greedy(), mode };
            let mut positions = runner.run(&[job])?;
            match positions.pop().and_then(|mut positions| positions.pop()) {
                Some(position) => Ok(position),
                None => bail!("no token was sampled"),
            }
        };
        alone.push([answer(TEXTS[0])?, answer(TEXTS[1])?]);
    }
    Ok(alone)
}

/// How far apart the two most alike are.
fn closest(alone: &[[Position; 2]]) -> f32 {
    let mut closest = f32::INFINITY;
    for (at, one) in alone.iter().enumerate() {
        for other in &alone[..at] {
            for text in 0..TEXTS.len() {
                closest = closest.min(difference(&one[text], &other[text])).min(difference(&other[text], &one[text]));
            }
        }
    }
    closest
}

/// What a slot holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    adapter: usize,
    generation: u64,
    is_published: bool,
}

struct Churn {
    runner: Runner,
    random: Random,
    adapters: Vec<Prepared>,
    /// The base is behind the last adapter.
    alone: Vec<[Position; 2]>,
    slots: Vec<Option<Held>>,
    /// Of each sequence in flight: the adapter, the text and the blocks.
    expected: HashMap<u64, (usize, usize, Vec<u32>)>,
    in_flight: VecDeque<Vec<u64>>,
    outcome: Outcome,
    limit: f32,
    size: Size,
}

impl Churn {
    fn run(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        // Sequences whose answers have come: the next step forgets them.
        let mut finishes = Vec::new();
        let steps_max = 1000 + 100 * self.size.switches;
        while self.outcome.switches < self.size.switches || self.outcome.answers == 0 {
            let steps = self.outcome.steps;
            ensure!(steps < steps_max, "uploads do not arrive: {} in {steps} steps", self.outcome.switches);
            let mut step = Step { finishes: std::mem::take(&mut finishes), ..Step::default() };
            self.add_uploads(&mut step)?;
            let seqs = self.add_rows(&mut step)?;
            self.runner.submit(step)?;
            self.in_flight.push_back(seqs);
            self.outcome.steps += 1;
            while self.runner.in_flight() >= self.runner.depth() {
                finishes.append(&mut self.land()?);
            }
        }
        while self.runner.in_flight() > 0 {
            self.land()?;
        }
        self.outcome.seconds = started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Gives some slots other adapters, whatever the steps in flight read from them.
    fn add_uploads(&mut self, step: &mut Step) -> anyhow::Result<()> {
        for _ in 0..self.size.uploads {
            let slot = self.random.below(self.slots.len());
            // One that is on its way arrives first: the scheduler does the same.
            if self.slots[slot].is_some_and(|held| !held.is_published) {
                continue;
            }
            let adapter = self.random.below(self.adapters.len());
            let upload = self.runner.upload(slot as u32, &self.adapters[adapter])?;
            self.slots[slot] = Some(Held { adapter, generation: upload.generation, is_published: false });
            step.uploads.push(upload);
        }
        Ok(())
    }

    /// New sequences under the adapters that are there, and some without.
    fn add_rows(&mut self, step: &mut Step) -> anyhow::Result<Vec<u64>> {
        let (mut rows, decodes_only) = (Vec::new(), self.random.below(2) == 0);
        for _ in 0..=self.random.below(self.size.rows) {
            let held = self.slots.iter().enumerate().filter_map(|(slot, held)| Some((slot, (*held)?)));
            let there: Vec<(usize, Held)> = held.filter(|(_, held)| held.is_published).collect();
            let (adapter, refs) = match there.get(self.random.below(there.len() + 1)) {
                Some(&(slot, Held { adapter, generation, .. })) => {
                    (adapter, vec![AdapterRef { slot: slot as u32, generation, scale: 1.0 }])
                }
                None => (self.adapters.len(), Vec::new()),
            };
            let text = if decodes_only { 0 } else { self.random.below(TEXTS.len()) };
            rows.push((adapter, refs, text));
        }
        // Rows under the same adapters lie side by side.
        rows.sort_by_key(|(adapter, refs, _)| (*adapter, refs.first().map(|adapter| adapter.slot)));
        let mut seqs = Vec::with_capacity(rows.len());
        for (adapter, adapters, text) in rows {
            let (seq, tokens) = (self.runner.take_seq(), TEXTS[text].to_vec());
            let (len, blocks) = (tokens.len() as u32, self.runner.take_blocks(tokens.len())?);
            step.starts.push(SeqStart { seq, tokens, prompt_tokens: len, sampling: Some(greedy()), pooling: 0 });
            let blocks_of_chunk = blocks.clone();
            step.chunks.push(Chunk {
                seq,
                start: 0,
                len,
                blocks: blocks_of_chunk,
                adapters,
                sample: true,
                prompt_logprobs: false,
                mask: None,
                pool: false,
                blocks_from: 0,
            });
            self.expected.insert(seq, (adapter, text, blocks));
            seqs.push(seq);
        }
        Ok(seqs)
    }

    /// Takes the oldest step's result and compares. The sequences that the shard may forget.
    fn land(&mut self) -> anyhow::Result<Vec<u64>> {
        let Some(result) = self.runner.poll()? else { bail!("a step was not answered") };
        let seqs = self.in_flight.pop_front().unwrap_or_default();
        if let Some(fault) = result.faults.first() {
            bail!("a sequence failed: {}", fault.reason);
        }
        ensure!(result.samples.len() == seqs.len(), "{} answers to {} rows", result.samples.len(), seqs.len());
        self.take_published(&result);
        for sample in result.samples {
            let Some((adapter, text, blocks)) = self.expected.remove(&sample.seq) else {
                bail!("an answer for sequence {}, which asked nothing", sample.seq)
            };
            self.runner.give_blocks(&blocks);
            let got = Position { token: sample.token, logprob: sample.logprob, top: sample.top };
            self.judge(adapter, text, &got);
        }
        Ok(seqs)
    }

    fn take_published(&mut self, result: &StepResult) {
        for up in &result.uploaded {
            if let Some(Some(held)) = self.slots.get_mut(up.slot as usize)
                && held.generation == up.generation
            {
                held.is_published = true;
                self.outcome.switches += 1;
            }
        }
    }

    fn judge(&mut self, adapter: usize, text: usize, got: &Position) {
        let off = difference(&self.alone[adapter][text], got);
        let outcome = &mut self.outcome;
        outcome.answers += 1;
        outcome.base_answers += u64::from(adapter == self.adapters.len());
        outcome.worst = outcome.worst.max(off);
        if off <= self.limit {
            return;
        }
        outcome.wrong += 1;
        if outcome.samples.len() < 5 {
            let whose = self.alone.iter().position(|alone| difference(&alone[text], got) <= self.limit);
            let whose = whose.map_or_else(|| "nobody's".to_owned(), |whose| format!("adapter {whose}'s"));
            outcome.samples.push(format!("step {}: adapter {adapter} got {whose} answer, {off:.3} off", outcome.steps));
        }
    }
}

/// A folder that goes when this is dropped.
pub(crate) struct TempDir(pub(crate) std::path::PathBuf);

impl TempDir {
    pub(crate) fn new(name: &str) -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("loramux-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // What is left is the system's to clean.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
