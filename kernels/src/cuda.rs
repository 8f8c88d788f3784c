//! Every op as a launch on a [`Device`](crate::device::Device), and the checks of all of them.

pub use crate::activation::cuda::SiluMulKernel;
pub use crate::attention::cuda::{
    AttnDecodeKernel, AttnDecodeLaunch, AttnPrefillKernel, AttnPrefillLaunch, HeadShape, KvCache,
};
pub use crate::rope::cuda::{RopeCacheKernel, RopeCacheLaunch};

use crate::device::check::OpCheck;

/// The checks, one for each op.
pub const CHECKS: &[OpCheck] = &[
    OpCheck { name: "silu_mul", run: crate::activation::check::check },
    OpCheck { name: "rope_cache", run: crate::rope::check::check },
    OpCheck { name: "attn_decode", run: crate::attention::check::check_decode },
    OpCheck { name: "attn_prefill", run: crate::attention::check::check_prefill },
];
