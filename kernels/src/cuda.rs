//! Every op as a launch on a [`Device`](crate::device::Device), the programs of all of them, and their checks.

pub use crate::activation::cuda::SiluMulKernel;
pub use crate::activation::cuda_lora::SiluMulLoraKernel;
pub use crate::attention::cuda::{
    AttnDecodeKernel, AttnDecodeLaunch, AttnPrefillKernel, AttnPrefillLaunch, HeadShape, KvCache,
};
pub use crate::embedding::cuda::{EmbeddingBuffers, EmbeddingKernel};
pub use crate::gather_rows::cuda::{GatherBuffers, GatherRowsKernel};
pub use crate::lora_expand::cuda::ExpandAddKernel;
pub use crate::lora_gain_shift::cuda::GainShiftKernel;
pub use crate::lora_shrink::cuda::ShrinkKernel;
pub use crate::norm::cuda::{RmsNormBuffers, RmsNormKernel};
pub use crate::norm::cuda_lora::AddRmsNormLoraKernel;
pub use crate::rope::cuda::{RopeCacheKernel, RopeCacheLaunch};
pub use crate::rope::cuda_lora::RopeCacheLoraKernel;
pub use crate::sampler::cuda::{
    NONE, SampleOut, SampleRow, SamplerBuffers, SamplerKernel, TOP_MAX, TokenEdit, TopLogprob, VOCAB_MAX,
};
pub use crate::sampler::edits::push_mask;
pub use crate::unpack::cuda::{BundleSection, UNPACK_SECTIONS_MAX, UnpackKernel};

use crate::device::check::OpCheck;
use crate::device::lora::{DECODE_TILE_ROWS, PREFILL_TILE_ROWS};
use crate::device::{ModelShape, Program};

/// The checks, one for each op.
pub const CHECKS: &[OpCheck] = &[
    OpCheck { name: "embedding", run: crate::embedding::check::check },
    OpCheck { name: "rms_norm", run: crate::norm::check::check },
    OpCheck { name: "add_rms_norm_lora", run: crate::norm::check_lora::check },
    OpCheck { name: "rope_cache", run: crate::rope::check::check },
    OpCheck { name: "rope_cache_lora", run: crate::rope::check_lora::check },
    OpCheck { name: "attn_decode", run: crate::attention::check::check_decode },
    OpCheck { name: "attn_prefill", run: crate::attention::check::check_prefill },
    OpCheck { name: "silu_mul", run: crate::activation::check::check },
    OpCheck { name: "silu_mul_lora", run: crate::activation::check_lora::check },
    OpCheck { name: "lora_shrink", run: crate::lora_shrink::check::check },
    OpCheck { name: "lora_expand", run: crate::lora_expand::check::check },
    OpCheck { name: "lora_gain_shift", run: crate::lora_gain_shift::check::check },
    OpCheck { name: "gather_rows", run: crate::gather_rows::check::check },
    OpCheck { name: "sampler", run: crate::sampler::check::check },
    OpCheck { name: "unpack", run: crate::unpack::check::check },
];

/// The programs of each op for a model.
const PROGRAMS: &[fn(&ModelShape) -> Vec<Program>] = &[
    |shape| vec![EmbeddingKernel::program(shape.elem), GatherRowsKernel::program(shape.elem)],
    |shape| vec![RmsNormKernel::program(shape.elem, shape.hidden)],
    |shape| vec![RopeCacheKernel::program(shape.elem, shape.head_shape())],
    |shape| vec![AttnDecodeKernel::program(shape.elem, shape.head_shape())],
    |shape| vec![AttnPrefillKernel::program(shape.elem, shape.head_shape())],
    |shape| vec![SiluMulKernel::program(shape.elem)],
    |shape| lora(shape, ShrinkKernel::program),
    |shape| lora(shape, ExpandAddKernel::program),
    |shape| vec![GainShiftKernel::program(shape.elem)],
    |shape| vec![RopeCacheLoraKernel::program(shape.elem, shape.hidden, shape.head_shape())],
    |shape| vec![SiluMulLoraKernel::program(shape.elem, shape.hidden)],
    |shape| {
        let inputs = [shape.heads * shape.head_dim, shape.intermediate];
        inputs.map(|d_in| AddRmsNormLoraKernel::program(shape.elem, d_in, shape.hidden)).into()
    },
    |_| vec![SamplerKernel::program()],
    |shape| vec![UnpackKernel::program(shape.elem)],
];

/// A LoRA kernel's programs: for each number of inputs that a site has, and both heights of tiles.
fn lora(shape: &ModelShape, program: fn(crate::device::Elem, usize, usize) -> Program) -> Vec<Program> {
    let inputs = [shape.hidden, shape.heads * shape.head_dim, shape.intermediate];
    let heights = [DECODE_TILE_ROWS, PREFILL_TILE_ROWS];
    inputs.into_iter().flat_map(|d_in| heights.map(|rows| program(shape.elem, d_in, rows))).collect()
}

/// Every program that models of these shapes need, each once.
#[must_use]
pub fn programs(shapes: &[ModelShape]) -> Vec<Program> {
    let mut programs: Vec<Program> = Vec::new();
    for program in shapes.iter().flat_map(|shape| PROGRAMS.iter().flat_map(|of| of(shape))) {
        if !programs.contains(&program) {
            programs.push(program);
        }
    }
    programs
}
