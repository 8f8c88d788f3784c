//! The op on a device: one launch for all rows of a step, whatever each of them wants.

use super::SampleParams;
use crate::device::{Address, Device, DeviceError, Elem, Grid, Kernel, KernelSource, Program, Stream, launch};

/// The source: one file in three parts.
pub(crate) static SAMPLER: KernelSource = KernelSource {
    file: "sampler.cu",
    text: concat!(include_str!("row.cuh"), include_str!("select.cuh"), include_str!("sampler.cu")),
};

const THREADS: u32 = 1024;

/// Largest vocabulary: what the sums of probabilities have room for.
pub const VOCAB_MAX: usize = 1 << 18;

/// Most alternatives of a row.
pub const TOP_MAX: usize = 20;

/// No mask, or no log-probabilities.
pub const NONE: u32 = u32::MAX;

/// How one row is sampled; the same as in `row.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleRow {
    /// Key of the random numbers.
    pub seed: u64,
    /// Position of the token to draw.
    pub position: u64,
    /// Row of the logits; no two rows share one.
    pub logits_row: u32,
    /// Where the token goes in the last tokens.
    pub slot: u32,
    /// [`SampleRow::SAMPLE`] or [`SampleRow::TARGET`].
    pub kind: u32,
    /// With [`SampleRow::TARGET`]: the token whose log-probability is wanted.
    pub target: u32,
    /// Below 1e-5, or NaN: greedy.
    pub temperature: f32,
    /// `1.0 / temperature`.
    pub inv_temperature: f32,
    /// Probability kept; 1 or more: all.
    pub top_p: f32,
    /// Least probability kept, relative to the likeliest; 0: all.
    pub min_p: f32,
    /// For tokens of prompt and output; 1: none.
    pub repetition_penalty: f32,
    /// For tokens of the output; 0: none.
    pub presence_penalty: f32,
    /// For each occurrence in the output; 0: none.
    pub frequency_penalty: f32,
    /// Tokens kept; 0: all.
    pub top_k: u32,
    /// First of its [`TokenEdit`]s.
    pub edits: u32,
    /// How many.
    pub edit_count: u32,
    /// First u32 of the tokens that may come, one bit each; or [`NONE`].
    pub mask: u32,
    /// Alternatives to report, up to [`TOP_MAX`]; or [`NONE`] for no log-probability at all.
    pub logprobs: u32,
    /// 1: the slot's last token is one more generated token, which the edits do not count.
    pub pending: u32,
    /// Zero.
    pub reserved: u32,
}

impl SampleRow {
    /// Draw a token.
    pub const SAMPLE: u32 = 0;
    /// Report the log-probability of a token, and draw nothing.
    pub const TARGET: u32 = 1;

    /// A row that draws by these parameters, without edits, mask and log-probabilities.
    #[must_use]
    pub fn new(params: &SampleParams, position: u64, logits_row: u32, slot: u32) -> Self {
        Self {
            seed: params.seed,
            position,
            logits_row,
            slot,
            kind: Self::SAMPLE,
            target: 0,
            temperature: params.temperature,
            inv_temperature: 1.0 / params.temperature,
            top_p: params.top_p,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            top_k: params.top_k,
            edits: 0,
            edit_count: 0,
            mask: NONE,
            logprobs: NONE,
            pending: 0,
            reserved: 0,
        }
    }
}

/// What is done to one token of one row. A token is in a row's edits at most once; one outside the vocabulary is skipped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenEdit {
    /// The token.
    pub token: u32,
    /// [`TokenEdit::BAN`], [`TokenEdit::SEEN`] and, in the lower 30 bits, its occurrences in the output.
    pub flags: u32,
    /// Added to its logit.
    pub bias: f32,
    /// Written by the kernel: the logit before.
    pub raw: f32,
}

impl TokenEdit {
    /// It may not come.
    pub const BAN: u32 = 1 << 31;
    /// It is in the prompt.
    pub const SEEN: u32 = 1 << 30;
}

/// What became of a row.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SampleOut {
    /// The token; with [`SampleOut::FAULT_LOGIT`] the first whose logit is broken.
    pub token: u32,
    /// 0, [`SampleOut::FAULT_LOGIT`] or [`SampleOut::FAULT_NOTHING_LEFT`].
    pub fault: u32,
    /// Its log-probability under the model, if log-probabilities are wanted.
    pub logprob: f32,
    /// Alternatives there are.
    pub top_count: u32,
}

impl SampleOut {
    /// A logit is NaN or infinite.
    pub const FAULT_LOGIT: u32 = 1;
    /// Every token is banned, masked or minus infinity.
    pub const FAULT_NOTHING_LEFT: u32 = 2;
}

/// An alternative.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TopLogprob {
    /// The token.
    pub token: u32,
    /// Its log-probability under the model.
    pub logprob: f32,
}

const _: () = assert!(size_of::<SampleRow>() == 88 && size_of::<TokenEdit>() == 16 && size_of::<SampleOut>() == 16);

/// Where the op's data lies.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SamplerBuffers {
    /// `[rows, stride]` f32; overwritten.
    pub logits: Address,
    /// `[sample_rows]` [`SampleRow`].
    pub rows: Address,
    /// [`StepCounts`](crate::device::step::StepCounts).
    pub counts: Address,
    /// [`TokenEdit`]s of all rows.
    pub edits: Address,
    /// u32 words of all masks: bit `token % 32` of word `token / 32` lets a token come.
    pub masks: Address,
    /// `[slots]` u32; written for the rows that drew.
    pub last_token: Address,
    /// `[sample_rows]` [`SampleOut`]; written.
    pub out: Address,
    /// `[sample_rows, TOP_MAX]` [`TopLogprob`]; each row's first `top_count` are written.
    pub top: Address,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    buffers: SamplerBuffers,
    vocab: u32,
    stride: u32,
}

/// Samples all rows of a step on a device.
#[derive(Clone, Copy, Debug)]
pub struct SamplerKernel {
    kernel: Kernel,
    vocab: usize,
    stride: usize,
}

impl SamplerKernel {
    /// The program, the same for all models: logits are f32.
    #[must_use]
    pub fn program() -> Program {
        Program::new::<Args>(&SAMPLER, "sampler", THREADS, Elem::Bf16)
    }

    /// Loads it for rows of `vocab` logits, `stride` apart.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] if `vocab` is above [`VOCAB_MAX`], or `stride` below `vocab` or no multiple of 4;
    /// [`DeviceError`] of the compiler.
    pub fn load(device: &dyn Device, vocab: usize, stride: usize) -> Result<Self, DeviceError> {
        if vocab > VOCAB_MAX {
            return Err(DeviceError::Unsupported(format!("sampler: vocabulary of {vocab}, limit {VOCAB_MAX}")));
        }
        if stride < vocab || !stride.is_multiple_of(4) || stride > 2 * VOCAB_MAX {
            let what = format!("sampler: rows of {vocab} logits, {stride} apart, which must be a multiple of 4");
            return Err(DeviceError::Unsupported(what));
        }
        Ok(Self { kernel: device.load(&Self::program())?, vocab, stride })
    }

    /// Samples the step's rows with at most `blocks` blocks; a bucket of `n` rows takes `n`, but any number is right.
    ///
    /// # Errors
    /// [`DeviceError`] of the driver.
    /// # Safety
    /// The addresses hold what they should, indices in the rows are inside, and nobody else uses what is written.
    pub unsafe fn launch(
        &self,
        device: &dyn Device,
        stream: Stream,
        buffers: &SamplerBuffers,
        blocks: usize,
    ) -> Result<(), DeviceError> {
        let args = Args { buffers: *buffers, vocab: self.vocab as u32, stride: self.stride as u32 };
        // SAFETY: passed on.
        unsafe { launch(device, stream, self.kernel, Grid::x(blocks), 0, &args) }
    }
}
