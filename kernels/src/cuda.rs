//! Every op as a launch on a [`Device`](crate::device::Device), and the checks of all of them.

pub use crate::activation::cuda::SiluMulKernel;
pub use crate::lora_expand::cuda::ExpandAddKernel;
pub use crate::lora_shrink::cuda::ShrinkKernel;

use crate::device::check::OpCheck;

/// The checks, one for each op.
pub const CHECKS: &[OpCheck] = &[
    OpCheck { name: "silu_mul", run: crate::activation::check::check },
    OpCheck { name: "lora_shrink", run: crate::lora_shrink::check::check },
    OpCheck { name: "lora_expand", run: crate::lora_expand::check::check },
];
