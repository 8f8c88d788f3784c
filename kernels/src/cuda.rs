//! Every op as a launch on a [`Device`](crate::device::Device), and the checks of all of them.

pub use crate::activation::cuda::SiluMulKernel;
pub use crate::unpack::cuda::{BundleSection, UNPACK_SECTIONS_MAX, UnpackKernel};

use crate::device::check::OpCheck;

/// The checks, one for each op.
pub const CHECKS: &[OpCheck] = &[
    OpCheck { name: "silu_mul", run: crate::activation::check::check },
    OpCheck { name: "unpack", run: crate::unpack::check::check },
];
