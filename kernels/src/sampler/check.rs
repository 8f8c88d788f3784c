//! The kernel against the CPU's sampler: the same token for the same logits, whatever the parameters, and log-probabilities
//! within a tolerance. Rows of all kinds share a launch; some of them are run alone too and must give the same bits.

use super::cuda::{NONE, SampleOut, SampleRow, SamplerBuffers, SamplerKernel, TOP_MAX, TopLogprob};
use super::{History, NonFinite, SampleParams, SampleScratch, logprob_of, push_edits, push_mask, sample, top_logprobs};
use crate::device::check::{CheckError, Checker, Effort, Random, Summary, expect};
use crate::device::step::StepCounts;

/// Vocabulary, rows of a launch, launches on the emulator, blocks.
const SHAPES: &[(usize, usize, usize, usize)] = &[
    (2048, 40, 4, 3),
    (1, 5, 1, 9),
    (7, 20, 3, 12),
    (130, 40, 3, 1),
    (32_001, 10, 2, 4),
    (49_152, 8, 2, 8),
    (128_256, 2, 1, 2),
];

/// How many times as many launches a GPU gets.
const GPU_LAUNCHES: usize = 50;

/// Most difference of a log-probability.
const LOGPROB_ERROR: f32 = 1e-4;

/// Compares tokens, faults, log-probabilities and alternatives of random rows.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let shapes = if checker.effort == Effort::Quick { &SHAPES[..1] } else { SHAPES };
    let is_emulated = checker.device.info().arch == "emulated";
    let mut summary = Summary { cases: 0, worst: 0.0, unit: "absolute, of log-probabilities; tokens are equal" };
    compare_launch(checker, &repeats(), 2, &mut summary)?;
    for &(vocab, rows, launches, blocks) in shapes {
        for launch in 0..if is_emulated { launches } else { launches * GPU_LAUNCHES } {
            let mut random = Random::new((launch * 1_000_003 + vocab) as u64);
            let cases: Vec<Case> = (0..rows).map(|_| Case::random(&mut random, vocab)).collect();
            compare_launch(checker, &cases, blocks, &mut summary)?;
        }
    }
    Ok(summary)
}

/// Runs rows of one vocabulary, and one of them alone.
fn compare_launch(checker: &Checker, cases: &[Case], blocks: usize, summary: &mut Summary) -> Result<(), CheckError> {
    let vocab = cases[0].logits.len();
    let got = run(checker, cases, vocab, blocks)?;
    for (case, got) in cases.iter().zip(&got) {
        summary.worst = summary.worst.max(f64::from(case.compare(got)?));
    }
    let alone = (cases[0].seed % cases.len() as u64) as usize;
    let again = run(checker, &cases[alone..=alone], vocab, 1)?;
    summary.cases += cases.len() + 1;
    expect(again[0].bits() == got[alone].bits(), || {
        format!("sampler: vocabulary {vocab}, row {alone} of {} has other bits alone", cases.len())
    })
}

/// Token 3 is the likeliest unless its penalty counts every occurrence, also one that only the device knows.
fn repeats() -> Vec<Case> {
    let mut cases = Vec::new();
    let sequences: [(&[u32], &[u32]); 4] = [(&[], &[3]), (&[3], &[3]), (&[], &[3, 3]), (&[3, 9], &[3, 5, 3])];
    for penalties in [[2.0, 0.0, 0.0], [1.0, 5.0, 0.0], [1.0, 0.0, 3.0]] {
        for (prompt, generated) in sequences {
            for pending in [false, true] {
                let mut case = Case::random(&mut Random::new(1), 16);
                case.logits =
                    (0..16u8).map(|token| [1.0, 10.0, 5.5][usize::from(token.saturating_sub(2).min(2))]).collect();
                (case.temperature, case.penalties, case.pending, case.target) = (0.0, penalties, pending, None);
                (case.prompt, case.generated) = (prompt.to_vec(), generated.to_vec());
                (case.ban, case.bias, case.allowed, case.mask) = Default::default();
                cases.push(case);
            }
        }
    }
    cases
}

/// One row and how it is sampled.
struct Case {
    logits: Vec<f32>,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    /// Repetition, presence, frequency.
    penalties: [f32; 3],
    seed: u64,
    position: u64,
    ban: Vec<u32>,
    bias: Vec<(u32, f32)>,
    allowed: Vec<u32>,
    mask: Option<Vec<u32>>,
    prompt: Vec<u32>,
    generated: Vec<u32>,
    /// The last generated token is only on the device.
    pending: bool,
    logprobs: Option<u32>,
    target: Option<u32>,
}

/// One of these.
fn any<T: Copy>(random: &mut Random, of: &[T]) -> T {
    of[random.below(of.len())]
}

/// Up to `most` tokens, in one of three cases; some of them outside the vocabulary.
fn tokens(random: &mut Random, most: usize, vocab: usize) -> Vec<u32> {
    let count = if random.below(3) == 0 { random.below(most + 1) } else { 0 };
    (0..count).map(|_| random.below(vocab + 2) as u32).collect()
}

/// What a grammar may leave: a few tokens, most of them, one, the banned ones alone; words at the end may be missing.
fn mask(random: &mut Random, vocab: usize) -> Option<Vec<u32>> {
    let words = match random.below(8) {
        0..5 => return None,
        5 => vocab.div_ceil(32),
        _ => random.below(vocab.div_ceil(32)) + 1,
    };
    let mut mask = vec![any(random, &[0, 0, 0x8000_0001, 0xffff_fffe]); words];
    for _ in 0..=random.below(3) {
        let token = random.below(vocab.min(words * 32));
        mask[token / 32] |= 1 << (token % 32);
    }
    if words * 32 > vocab {
        mask[words - 1] &= u32::MAX >> (words * 32 - vocab);
    }
    Some(mask)
}

/// Logits of several kinds: peaked and flat, with ties, holes, both zeros, or far from zero.
fn logits(random: &mut Random, vocab: usize) -> Vec<f32> {
    let kind = random.below(9);
    let mut bell = |scale: f32| (random.uniform() + random.uniform() + random.uniform()) * scale;
    let mut logits: Vec<f32> = match kind {
        0..3 => (0..vocab).map(|_| bell(3.0)).collect(),
        3 => (0..vocab).map(|_| bell(40.0)).collect(),
        4 => (0..vocab).map(|_| (bell(4.0) * 2.0).round() / 2.0).collect(),
        5 => vec![bell(9.0); vocab],
        6 => (0..vocab).map(|_| bell(1e-3)).collect(),
        7 => (0..vocab).map(|_| 1000.0 + bell(5.0)).collect(),
        _ => (0..vocab).map(|_| if bell(1.0) > 0.3 { f32::NEG_INFINITY } else { bell(5.0) }).collect(),
    };
    match random.below(12) {
        0 => logits[random.below(vocab)] = f32::NAN,
        1 => logits[random.below(vocab)] = f32::INFINITY,
        2 => {
            let kept = random.below(vocab);
            (0..vocab).filter(|&token| token != kept).for_each(|token| logits[token] = f32::NEG_INFINITY);
        }
        3 => logits[random.below(vocab)] = -0.0,
        4 => {
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            logits[random.below(vocab)] = most; // two that are likeliest
        }
        _ => {}
    }
    logits
}

impl Case {
    fn random(random: &mut Random, vocab: usize) -> Self {
        let mut logits = logits(random, vocab);
        let neutral = random.below(2) == 0;
        let penalties = match neutral {
            true => [1.0, 0.0, 0.0],
            false => [any(random, &[1.0, 1.3, 0.7]), any(random, &[0.0, 3.0]), any(random, &[0.0, 2.0, -1.0])],
        };
        let mut bias: Vec<(u32, f32)> =
            tokens(random, 20, vocab).into_iter().map(|token| (token, random.uniform() * 9.0)).collect();
        bias.sort_by_key(|bias| bias.0);
        bias.dedup_by_key(|bias| bias.0);
        let mut generated = tokens(random, 50, vocab);
        if random.below(3) == 0 {
            let again = generated.first().copied().unwrap_or(0);
            generated.push(any(random, &[again, vocab as u32 / 2]));
        }
        if let Some(logit) = generated.last().and_then(|&last| logits.get_mut(last as usize))
            && random.below(2) == 0
        {
            *logit += 7.0; // likely again, unless a penalty acts
        }
        let mut prompt = tokens(random, 100, vocab);
        if random.below(2) == 0 {
            prompt.extend(generated.last());
        }
        let mut case = Self {
            logits,
            temperature: any(random, &[0.0, 9e-6, 1e-5, 0.1, 0.7, 1.0, 1.0, 1.3, 5.0]),
            top_k: any(random, &[0, 0, 0, 1, 2, 40, 1000, vocab as u32, vocab as u32 + 5]),
            top_p: any(random, &[1.0, 1.0, 1.0, 0.0, 0.01, 0.3, 0.5, 0.9, 0.95, 0.999, 0.999_999_9]),
            min_p: any(random, &[0.0, 0.0, 0.0, 1e-6, 0.05, 0.5, 1.0]),
            penalties,
            seed: random.word(),
            position: random.word() >> any(random, &[0, 50, 62]),
            ban: tokens(random, 5, vocab),
            bias,
            allowed: tokens(random, 300, vocab),
            mask: mask(random, vocab),
            prompt,
            pending: !generated.is_empty() && random.below(2) == 0,
            generated,
            logprobs: any(random, &[None, None, Some(0), Some(1), Some(5), Some(TOP_MAX as u32)]),
            target: (random.below(6) == 0).then(|| random.below(vocab + 1) as u32),
        };
        if let Some(&token) = case.ban.first().filter(|token| (**token as usize) < vocab && random.below(3) == 0) {
            let mut mask = vec![0; token as usize / 32 + 1]; // the grammar is at its end, min_tokens is not reached
            mask[token as usize / 32] = 1 << (token % 32);
            case.mask = Some(mask);
        }
        if random.below(3) == 0 { Self { top_k: 0, top_p: 1.0, min_p: 0.0, ..case } } else { case }
    }

    fn params(&self) -> SampleParams<'_> {
        SampleParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.penalties[0],
            presence_penalty: self.penalties[1],
            frequency_penalty: self.penalties[2],
            seed: self.seed,
            ban: &self.ban,
            logit_bias: &self.bias,
            allowed: &self.allowed,
            mask: self.mask.as_deref(),
        }
    }

    /// What the host knows of the generated tokens.
    fn known(&self) -> &[u32] {
        &self.generated[..self.generated.len() - usize::from(self.pending)]
    }

    /// What this row should give; returns the largest error of a log-probability.
    fn compare(&self, got: &Got) -> Result<f32, CheckError> {
        let wrong = |what: &str| {
            let Self { temperature, top_k, top_p, min_p, penalties, pending, .. } = self;
            let edits = (self.ban.len(), self.bias.len(), self.allowed.len(), self.mask.is_some());
            let vocab = self.logits.len();
            format!(
                "sampler: vocabulary {vocab}: {what}; got {:?}, last token {}; temperature {temperature}, top_k {top_k}, \
                 top_p {top_p}, min_p {min_p}, penalties {penalties:?}, pending {pending}, {} generated, bans, biases, \
                 allowed tokens, mask {edits:?}",
                got.out,
                got.last_token,
                self.generated.len(),
            )
        };
        let broken = self.logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY);
        let history = History { prompt: &self.prompt, generated: &self.generated };
        let mut edited = self.logits.clone();
        let token = match (self.target, broken) {
            (_, Some(token)) => Err(NonFinite::Logit { token: token as u32 }),
            (Some(_), None) if self.logits.iter().all(|logit| *logit == f32::NEG_INFINITY) => {
                Err(NonFinite::NothingLeft)
            }
            (Some(target), None) => Ok(target),
            (None, None) => sample(&mut edited, &self.params(), &history, self.position, &mut SampleScratch::default()),
        };
        let before = self.generated.last().copied().unwrap_or(0);
        let token = match token {
            Ok(token) => token,
            Err(error) => {
                let want = match error {
                    NonFinite::Logit { token } => (SampleOut::FAULT_LOGIT, token),
                    NonFinite::NothingLeft => (SampleOut::FAULT_NOTHING_LEFT, 0),
                };
                expect((got.out.fault, got.out.token) == want, || wrong(&format!("want {error}")))?;
                expect(got.last_token == before, || wrong("a fault wrote the last token"))?;
                return Ok(0.0);
            }
        };
        expect((got.out.fault, got.out.token) == (0, token), || wrong(&format!("want token {token}")))?;
        let last = if self.target.is_some() { before } else { token };
        expect(got.last_token == last, || wrong("wrong last token"))?;
        self.compare_logprobs(got, token).map_err(|what| CheckError::Wrong(wrong(&what)))
    }

    fn compare_logprobs(&self, got: &Got, token: u32) -> Result<f32, String> {
        let wants = self.logprobs.is_some() || self.target.is_some();
        let want = if wants { logprob_of(&self.logits, token) } else { 0.0 };
        let error = |got: f32, want: f32| if got == want { 0.0 } else { (got - want).abs() };
        let mut worst = error(got.out.logprob, want);
        let top = top_logprobs(&self.logits, self.logprobs.unwrap_or(0) as usize);
        if got.out.top_count as usize != top.len() {
            return Err(format!("want {} alternatives", top.len()));
        }
        for (got, want) in got.top.iter().zip(&top) {
            if got.token != want.0 {
                return Err(format!("alternatives: got {got:?}, want {want:?}"));
            }
            worst = worst.max(error(got.logprob, want.1));
        }
        if got.top[top.len()..].iter().any(|top| top.token != NONE || top.logprob.to_bits() != NONE) {
            return Err("wrote behind the alternatives".into());
        }
        // NaN is an error too.
        if worst <= LOGPROB_ERROR { Ok(worst) } else { Err(format!("log-probabilities differ by {worst}")) }
    }
}

/// What the device made of a row.
#[derive(Debug)]
struct Got {
    out: SampleOut,
    /// All places, also those behind the count.
    top: Vec<TopLogprob>,
    last_token: u32,
}

impl Got {
    fn bits(&self) -> Vec<u32> {
        let Self { out, top, last_token } = self;
        let top = top.iter().flat_map(|top| [top.token, top.logprob.to_bits()]);
        top.chain([out.token, out.fault, out.logprob.to_bits(), out.top_count, *last_token]).collect()
    }
}

/// Runs the cases in one launch.
fn run(checker: &Checker, cases: &[Case], vocab: usize, blocks: usize) -> Result<Vec<Got>, CheckError> {
    let (device, stream, rows) = (&*checker.device, checker.stream, cases.len());
    let stride = (vocab + 3).next_multiple_of(4);
    let kernel = SamplerKernel::load(device, vocab, stride)?;
    // What lies behind the vocabulary is not to be used.
    let mut logits = vec![f32::NAN; rows * stride];
    let (mut sample_rows, mut edits, mut masks) = (Vec::new(), Vec::new(), Vec::new());
    // Rows of logits and slots are not in the order of the rows; the slot behind the last one is nobody's.
    let mut last_token = vec![0u32; rows + 1];
    for (i, case) in cases.iter().enumerate() {
        let (logits_row, slot) = ((i + 1) % rows, rows - 1 - i);
        logits[logits_row * stride..][..vocab].copy_from_slice(&case.logits);
        last_token[slot] = case.generated.last().copied().unwrap_or(0);
        let params = case.params();
        let mut row = SampleRow::new(&params, case.position, logits_row as u32, slot as u32);
        row.edits = edits.len() as u32;
        let history = History { prompt: &case.prompt, generated: case.known() };
        row.edit_count = push_edits(&mut edits, &params, &history) as u32;
        let first = masks.len() as u32;
        if push_mask(&mut masks, &params, vocab) {
            row.mask = first;
        }
        row.pending = u32::from(case.pending);
        row.logprobs = case.logprobs.unwrap_or(NONE);
        if let Some(target) = case.target {
            (row.kind, row.target) = (SampleRow::TARGET, target);
        }
        sample_rows.push(row);
    }
    last_token[rows] = 4711;
    let counts = StepCounts { sample_rows: rows as u32, ..StepCounts::default() };
    let logits = checker.buffer(&logits)?;
    let (sample_rows, counts) = (checker.buffer(&sample_rows)?, checker.buffer(&[counts])?);
    let (edits, masks, last_token) = (checker.buffer(&edits)?, checker.buffer(&masks)?, checker.buffer(&last_token)?);
    let out = checker.poisoned((rows + 1) * size_of::<SampleOut>())?;
    let top = checker.poisoned((rows + 1) * TOP_MAX * size_of::<TopLogprob>())?;
    let buffers = SamplerBuffers {
        logits: logits.address(),
        rows: sample_rows.address(),
        counts: counts.address(),
        edits: edits.address(),
        masks: masks.address(),
        last_token: last_token.address(),
        out: out.address(),
        top: top.address(),
    };
    // SAFETY: the buffers are as large as the rows say.
    unsafe { kernel.launch(device, stream, &buffers, blocks)? };
    let out: Vec<SampleOut> = out.read(stream, 0, rows + 1)?;
    let top: Vec<TopLogprob> = top.read(stream, 0, (rows + 1) * TOP_MAX)?;
    let last_token: Vec<u32> = last_token.read(stream, 0, rows + 1)?;
    let behind = (out[rows].token, top[rows * TOP_MAX].token, last_token[rows]);
    expect(behind == (NONE, NONE, 4711), || "sampler wrote behind its rows".into())?;
    let got = |row: usize| Got {
        out: out[row],
        top: top[row * TOP_MAX..][..TOP_MAX].to_vec(),
        last_token: last_token[rows - 1 - row],
    };
    Ok((0..rows).map(got).collect())
}
