//! The built-in model on a device against the same model on the CPU, through the interface that the router uses: every kind
//! of step, with adapters alone, mixed and composed.
//!
//! The CPU sums in f32 and rounds to 16 bits only what it stores (nothing where the device is in f16), a device rounds activations
//! too, so log-probabilities agree within a tolerance and greedy tokens agree where the first is ahead of the second by more than that.

use std::path::{Path, PathBuf};

use anyhow::Context;
use loramux_kernels::device::check::Random;
use loramux_kernels::device::{Elem, SharedDevice};
use loramux_proto::{AdapterRef, Sampling};

use super::args::DoctorArgs;
use super::machine::{Machine, shard_options};
use super::report::{Section, Status};
use super::runner::{Job, Mode, Position, Runner, greedy};
use crate::demo;
use crate::shard::{DtypeChoice, LoadFormatChoice, ShardOptions, launch};

/// How far log-probabilities of the CPU's five most likely tokens may be off. Both come from the rounding of activations,
/// so they go with the type's epsilon: in f16 the built-in model is eight times nearer to the CPU than in bf16.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Tolerance {
    /// Of the root mean square over a case: 0.05 in bf16. A wrong formula shows here.
    pub(crate) rms: f32,
    /// Of each one: 0.25 in bf16. A wrong row shows here.
    pub(crate) each: f32,
}

/// The tolerance of a type.
pub(crate) fn tolerance(elem: Elem) -> Tolerance {
    let epsilon = elem.epsilon() as f32;
    Tolerance { rms: 6.4 * epsilon, each: 32.0 * epsilon }
}

/// Tokens of a position that are compared.
const COMPARED: usize = 5;

/// The built-in model's files, unpacked for one run.
pub(crate) struct DemoFiles {
    pub(crate) model: PathBuf,
    pub(crate) adapters: Vec<(String, PathBuf)>,
}

/// Unpacks the built-in model where `serve` does.
pub(crate) fn demo_files() -> anyhow::Result<DemoFiles> {
    let dir = crate::config::default_data_dir();
    let unpacked =
        demo::unpack(&dir).with_context(|| format!("cannot unpack the built-in model into {}", dir.display()))?;
    Ok(DemoFiles { model: unpacked.model, adapters: unpacked.adapters })
}

/// Settings of a shard with the built-in model.
pub(crate) fn demo_options(args: &DoctorArgs, model: &Path) -> ShardOptions {
    ShardOptions {
        model: model.to_path_buf(),
        load_format: LoadFormatChoice::Auto,
        context_tokens_max: Some(2048),
        arena_bytes: Some(64 << 20),
        ..shard_options(args)
    }
}

/// Whether the CPU generates the same text alone and in a batch; how many tokens were compared.
pub(crate) fn cpu_agrees(args: &DoctorArgs) -> anyhow::Result<usize> {
    let files = demo_files()?;
    // Its own type: the one that was asked for may be one that only a device has.
    let options = ShardOptions { dtype: DtypeChoice::Auto, ..demo_options(args, &files.model) };
    let mut runner = Runner::new(launch::load_on(None, &options, Vec::new(), &mut |_, _, _| {})?, args.seed);
    let (vocab, mut random) = (runner.info().vocab_size as usize, Random::new(args.seed));
    let jobs: Vec<Job> = [3, 20, 9]
        .into_iter()
        .map(|len| Job {
            tokens: text(len, vocab, &mut random),
            adapters: Vec::new(),
            sampling: greedy(),
            mode: Mode::Generate { chunk: 8, tokens: 8 },
        })
        .collect();
    let together = runner.run(&jobs)?;
    for (job, together) in jobs.iter().zip(&together) {
        anyhow::ensure!(runner.run(std::slice::from_ref(job))?.first() == Some(together), "a batch gave another text");
    }
    Ok(together.iter().map(Vec::len).sum())
}

/// Both executors with the demo's adapters in slots 0, 1, ...
struct Pair {
    cpu: Runner,
    device: Runner,
    cpu_adapters: Vec<AdapterRef>,
    device_adapters: Vec<AdapterRef>,
    tolerance: Tolerance,
    vocab: usize,
}

/// A kind of step that is compared.
struct Case {
    name: &'static str,
    mode: Mode,
    /// Tokens of each sequence, and the indices and factors of its adapters.
    sequences: Vec<(usize, Vec<(usize, f32)>)>,
}

/// Runs all comparisons.
pub(crate) fn section(machine: &Machine, device: &SharedDevice, args: &DoctorArgs) -> Section {
    let mut section = Section::new("the built-in model, step by step against the CPU");
    if let Err(error) = fill(&mut section, machine, device, args) {
        section.push(Status::Failed, "model", format!("{error:#}"));
    }
    section
}

fn fill(section: &mut Section, machine: &Machine, device: &SharedDevice, args: &DoctorArgs) -> anyhow::Result<()> {
    let mut pair = Pair::load(device, args)?;
    let Tolerance { rms, each } = pair.tolerance;
    let note =
        format!("log-probabilities of the CPU's {COMPARED} most likely tokens; off by {rms} (rms) and {each} at most");
    section.push(Status::Info, "compared", note).field("rms_max", rms).field("worst_max", each);
    let mut random = Random::new(args.seed);
    for case in cases(machine.is_emulated()) {
        let off = pair.teacher_forced(&case, &mut random)?;
        let is_ok = off.count > 0 && off.rms() <= rms && off.worst <= each;
        let text = format!("{} positions, off by {:.4} (rms), {:.4} at most", off.positions, off.rms(), off.worst);
        section
            .push(if is_ok { Status::Ok } else { Status::Failed }, case.name, text)
            .field("positions", off.positions)
            .field("rms", off.rms())
            .field("worst", off.worst);
    }
    let tokens = if machine.is_emulated() { 6 } else { 64 };
    let greedy = pair.greedy_tokens(tokens, &mut random)?;
    let status = if greedy.wrong == 0 { Status::Ok } else { Status::Failed };
    let text = format!(
        "{} tokens equal, {} where two tokens are as likely, {} wrong",
        greedy.equal, greedy.ties, greedy.wrong
    );
    section
        .push(status, "greedy, steps in flight", text)
        .field("equal", greedy.equal)
        .field("ties", greedy.ties)
        .field("wrong", greedy.wrong);
    pair.seeds(section, tokens, &mut random)
}

/// What is compared; less on the emulator, which needs a second for a few steps.
fn cases(is_emulated: bool) -> Vec<Case> {
    let long = if is_emulated { 70 } else { 1500 };
    let (short, forced) = if is_emulated { (9, 6) } else { (70, 40) };
    let case = |name, mode, sequences| Case { name, mode, sequences };
    let mixed = |len: usize| {
        let mut sequences: Vec<(usize, Vec<(usize, f32)>)> = (0..5).map(|at| (len + at, vec![(at, 1.0)])).collect();
        sequences.insert(2, (len, Vec::new()));
        sequences
    };
    let composed =
        vec![(short, vec![(0, 1.0), (3, 0.5)]), (short, vec![(1, 0.25), (2, 1.0), (4, -0.5)]), (short, vec![])];
    vec![
        case("prompt at once", Mode::PromptLogprobs { chunk: usize::MAX }, vec![(short, vec![])]),
        case("prompt in pieces of 7", Mode::PromptLogprobs { chunk: 7 }, vec![(short + 3, vec![]), (5, vec![])]),
        case("decode", Mode::ForcedDecode, vec![(forced, vec![])]),
        case("decode, adapters mixed", Mode::ForcedDecode, mixed(forced)),
        case("prompt, adapters mixed", Mode::PromptLogprobs { chunk: 33 }, mixed(short)),
        case("adapters composed", Mode::PromptLogprobs { chunk: 16 }, composed.clone()),
        case("decode, adapters composed", Mode::ForcedDecode, composed),
        case("long text", Mode::PromptLogprobs { chunk: 60 }, vec![(long, vec![(1, 1.0)]), (long / 2, vec![])]),
    ]
}

#[derive(Default)]
struct Greedy {
    equal: usize,
    ties: usize,
    wrong: usize,
}

impl Pair {
    fn load(device: &SharedDevice, args: &DoctorArgs) -> anyhow::Result<Self> {
        let files = demo_files()?;
        let options = demo_options(args, &files.model);
        // Against a device in f16, the CPU has f32: with bf16 in its cache it would be further from both than they are apart.
        let dtype = if launch::elem(args.dtype)? == Elem::F16 { DtypeChoice::F32 } else { DtypeChoice::Bf16 };
        let cpu = ShardOptions { dtype, ..options.clone() };
        let mut cpu = Runner::new(launch::load_on(None, &cpu, Vec::new(), &mut |_, _, _| {})?, args.seed);
        let on_device = launch::load_on(Some(device), &options, Vec::new(), &mut |_, _, _| {})?;
        let mut device = Runner::new(on_device, args.seed ^ 1);
        let (mut cpu_adapters, mut device_adapters) = (Vec::new(), Vec::new());
        for (slot, (_, dir)) in files.adapters.iter().enumerate() {
            for (runner, adapters) in [(&mut cpu, &mut cpu_adapters), (&mut device, &mut device_adapters)] {
                let prepared = runner.prepare(dir)?;
                adapters.push(runner.place(slot as u32, &prepared)?);
            }
        }
        let (elem, vocab) = (launch::elem(args.dtype)?, cpu.info().vocab_size as usize);
        Ok(Self { cpu, device, cpu_adapters, device_adapters, tolerance: tolerance(elem), vocab })
    }

    /// The same sequences for the CPU and for the device.
    fn jobs(&self, case: &Case, sampling: &Sampling, random: &mut Random) -> [Vec<Job>; 2] {
        let texts: Vec<Vec<u32>> = case.sequences.iter().map(|(len, _)| text(*len, self.vocab, random)).collect();
        [&self.cpu_adapters, &self.device_adapters].map(|adapters| {
            let jobs = texts.iter().zip(&case.sequences).map(|(tokens, (_, chosen))| Job {
                tokens: tokens.clone(),
                adapters: chosen.iter().map(|&(at, scale)| AdapterRef { scale, ..adapters[at] }).collect(),
                sampling: sampling.clone(),
                mode: case.mode,
            });
            jobs.collect()
        })
    }

    /// How far the device is off on texts that are given.
    fn teacher_forced(&mut self, case: &Case, random: &mut Random) -> anyhow::Result<Off> {
        let [cpu, device] = self.jobs(case, &greedy(), random);
        let (want, got) = (self.cpu.run(&cpu)?, self.device.run(&device)?);
        let mut off = Off::default();
        for (want, got) in want.iter().zip(&got) {
            anyhow::ensure!(want.len() == got.len(), "{} positions, the CPU has {}", got.len(), want.len());
            for (want, got) in want.iter().zip(got) {
                off.positions += 1;
                differences(want, got).for_each(|difference| off.add(difference));
            }
        }
        Ok(off)
    }

    /// Generates with the most likely tokens and counts. A sequence is left where the two went different ways.
    fn greedy_tokens(&mut self, tokens: usize, random: &mut Random) -> anyhow::Result<Greedy> {
        let sequences = (0..6).map(|at| (3 + 5 * at, if at == 5 { vec![] } else { vec![(at, 1.0)] })).collect();
        let case = Case { name: "greedy", mode: Mode::Generate { chunk: 11, tokens }, sequences };
        let [cpu, device] = self.jobs(&case, &greedy(), random);
        let (want, got) = (self.cpu.run(&cpu)?, self.device.run(&device)?);
        let mut counts = Greedy::default();
        for (want, got) in want.iter().zip(&got) {
            for (want, got) in want.iter().zip(got) {
                if want.token == got.token {
                    counts.equal += 1;
                    continue;
                }
                let ahead = match want.top.as_slice() {
                    [first, second, ..] => first.logprob - second.logprob,
                    _ => f32::INFINITY,
                };
                if ahead <= self.tolerance.each {
                    counts.ties += 1
                } else {
                    counts.wrong += 1
                }
                break;
            }
        }
        Ok(counts)
    }

    /// The same seeds give the same tokens, other seeds others; how often the CPU draws the same is only told.
    fn seeds(&mut self, section: &mut Section, tokens: usize, random: &mut Random) -> anyhow::Result<()> {
        let sequences = (0..5).map(|at| (6 + at, vec![(at, 1.0)])).collect();
        let case = Case { name: "seeds", mode: Mode::Generate { chunk: 64, tokens }, sequences };
        let sampling = Sampling { temperature: 0.8, top_k: 50, top_p: 0.95, seed: 42, ..greedy() };
        let [cpu, device] = self.jobs(&case, &sampling, random);
        let other = |job: &Job| Job { sampling: Sampling { seed: 43, ..sampling.clone() }, ..job.clone() };
        let others: Vec<Job> = device.iter().map(other).collect();
        let (first, second) = (self.device.run(&device)?, self.device.run(&device)?);
        let (third, on_cpu) = (self.device.run(&others)?, self.cpu.run(&cpu)?);
        let drawn = |run: &[Vec<Position>]| -> Vec<u32> { run.iter().flatten().map(|p| p.token).collect() };
        let status = if first == second { Status::Ok } else { Status::Failed };
        section.push(status, "same seeds, same tokens", format!("{} tokens drawn twice", drawn(&first).len()));
        let status = if drawn(&first) == drawn(&third) { Status::Failed } else { Status::Ok };
        section.push(status, "other seeds, other tokens", "");
        let same =
            on_cpu.iter().zip(&first).map(|(a, b)| a.iter().zip(b).take_while(|(a, b)| a.token == b.token).count());
        let (same, all) = (same.sum::<usize>(), drawn(&first).len());
        let text = format!("{same} of {all} tokens are also the CPU's, up to where each text went its own way");
        section.push(Status::Info, "draws", text).field("same_as_cpu", same).field("drawn", all);
        Ok(())
    }
}

/// Differences of log-probabilities.
#[derive(Clone, Copy, Debug, Default)]
struct Off {
    positions: usize,
    count: usize,
    squares: f64,
    worst: f32,
}

impl Off {
    fn add(&mut self, difference: f32) {
        self.count += 1;
        self.squares += f64::from(difference).powi(2);
        self.worst = self.worst.max(difference);
    }

    fn rms(&self) -> f32 {
        (self.squares / self.count.max(1) as f64).sqrt() as f32
    }
}

/// How far the log-probabilities of the wanted most likely tokens are off. A token that is not named in `got` has at most
/// the least that is named there. NaN, which every comparison would pass over, counts as infinite.
fn differences(want: &Position, got: &Position) -> impl Iterator<Item = f32> {
    let least = got.top.iter().map(|top| top.logprob).fold(f32::INFINITY, f32::min);
    want.top.iter().take(COMPARED).map(move |want| {
        let found = got.top.iter().find(|got| got.token == want.token);
        let off = (found.map_or(least, |got| got.logprob) - want.logprob).abs();
        if off.is_nan() { f32::INFINITY } else { off }
    })
}

/// The largest of [`differences`].
pub(crate) fn difference(want: &Position, got: &Position) -> f32 {
    differences(want, got).fold(0.0, f32::max)
}

fn text(len: usize, vocab: usize, random: &mut Random) -> Vec<u32> {
    (0..len).map(|_| 3 + random.below(vocab.saturating_sub(3)) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use loramux_proto::TokenLogprob;

    fn position(top: &[(u32, f32)]) -> Position {
        let top = top.iter().map(|&(token, logprob)| TokenLogprob { token, logprob }).collect();
        Position { token: 0, logprob: 0.0, top }
    }

    #[test]
    fn a_token_that_is_not_named_counts_as_the_least_one() {
        let want = position(&[(1, -0.5), (2, -1.0)]);
        assert_eq!(difference(&want, &want), 0.0);
        assert_eq!(difference(&want, &position(&[(1, -0.75), (3, -4.0)])), 3.0);
        assert!(difference(&want, &position(&[(1, f32::NAN), (2, -1.0)])).is_infinite());
    }
}
