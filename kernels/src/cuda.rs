//! Every op as a launch on a [`Device`](crate::device::Device), and the checks of all of them.

pub use crate::activation::cuda::SiluMulKernel;
pub use crate::activation::cuda_lora::SiluMulLoraKernel;
pub use crate::embedding::cuda::{EmbeddingBuffers, EmbeddingKernel};
pub use crate::gather_rows::cuda::{GatherBuffers, GatherRowsKernel};
pub use crate::lora_expand::cuda::ExpandAddKernel;
pub use crate::lora_shrink::cuda::ShrinkKernel;
pub use crate::norm::cuda::{RmsNormBuffers, RmsNormKernel};
pub use crate::norm::cuda_lora::AddRmsNormLoraKernel;
pub use crate::sampler::cuda::{SampleOut, SampleRow, SamplerBuffers, SamplerKernel, TokenEdit, TopLogprob};

use crate::device::check::OpCheck;

/// The checks, one for each op.
pub const CHECKS: &[OpCheck] = &[
    OpCheck { name: "silu_mul", run: crate::activation::check::check },
    OpCheck { name: "silu_mul_lora", run: crate::activation::check_lora::check },
    OpCheck { name: "lora_shrink", run: crate::lora_shrink::check::check },
    OpCheck { name: "lora_expand", run: crate::lora_expand::check::check },
    OpCheck { name: "embedding", run: crate::embedding::check::check },
    OpCheck { name: "gather_rows", run: crate::gather_rows::check::check },
    OpCheck { name: "rms_norm", run: crate::norm::check::check },
    OpCheck { name: "add_rms_norm_lora", run: crate::norm::check_lora::check },
    OpCheck { name: "sampler", run: crate::sampler::check::check },
];
