//! What the products need of an instruction set: dot products of bytes, and a few operations on 16 lanes.

use super::pack::{GROUPS, Line, PANEL};
use crate::simd;
use std::sync::OnceLock;

/// An instruction set with dot products of bytes. Larger is faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Isa {
    /// What the compiler makes of plain loops.
    Portable,
    /// AVX2, FMA and F16C: products of bytes in 16 bits.
    Avx2,
    /// AVX2 with VNNI: four products of bytes at once.
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
}

impl Isa {
    /// The fastest this machine has.
    pub(super) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            // What the other ops were made to use holds here too.
            let most = match simd::Isa::best() {
                simd::Isa::Portable => Self::Portable,
                simd::Isa::Avx2 => Self::AvxVnni,
                _ => Self::Avx512Vnni,
            };
            Self::available().into_iter().rfind(|isa| *isa <= most).unwrap_or(Self::Portable)
        })
    }

    /// All that this machine has, slowest first.
    pub(super) fn available() -> Vec<Self> {
        #[allow(unused_mut, reason = "no more than that on other processors")]
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                found.push(Self::Avx2);
                if has!("avxvnni") {
                    found.push(Self::AvxVnni);
                }
                if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") && has!("avx512vnni") {
                    found.push(Self::Avx512Vnni);
                }
            }
        }
        found
    }

    /// Runs `kernel` with this instruction set.
    pub(super) fn run<K: Kernel>(self, kernel: K) {
        match self {
            Self::Portable => kernel.run(super::portable::Portable),
            // SAFETY: an `Isa` other than `Portable` is only made by `available`, which asked the processor.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { super::avx2::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => unsafe { super::avx2::run_vnni(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => unsafe { super::avx512::run(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => kernel.run(super::portable::Portable),
        }
    }
}

/// Work that is compiled once for each instruction set. `run` and all that it calls with `S` must be `#[inline(always)]`:
/// only what is inlined into the entry function gets the entry function's instructions.
pub(super) trait Kernel {
    /// Does the work.
    fn run<S: Vector>(self, s: S);
}

/// Operations on 16 lanes, one for each output of a panel. A value of the type is the proof that the processor has the
/// instructions. Those on numbers are exact and those on f32 round once, so every implementation gives the same bits.
pub(super) trait Vector: Copy {
    /// 16 f32.
    type F: Copy;
    /// 16 i32.
    type I: Copy;
    /// 64 bytes: a group of four for each output.
    type Q: Copy;
    /// Rows of the largest tile: a power of two, at most 16.
    const ROWS: usize;
    /// What `dot` takes off bytes of 8 bits itself.
    const DOT_CENTER: i32;

    fn zero(self) -> Self::F;
    fn splat(self, x: f32) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Exact below 2^24.
    fn to_f32(self, a: Self::I) -> Self::F;
    fn to_array(self, a: Self::F) -> [f32; PANEL];

    fn splat_i32(self, x: i32) -> Self::I;
    /// The lowest byte of each lane.
    fn low_byte(self, a: Self::I) -> Self::I;
    /// The lowest byte of each lane, which has a sign.
    fn low_signed(self, a: Self::I) -> Self::I;
    /// The second byte of each lane.
    fn high_byte(self, a: Self::I) -> Self::I;

    fn low_nibbles(self, a: Self::Q) -> Self::Q;
    fn high_nibbles(self, a: Self::Q) -> Self::Q;
    /// `low` with those bits of `high` that `mask` names in every byte, once `high` is shifted left by `left` (if negative:
    /// right). A bit that is asked for stays in its byte.
    fn with_bits(self, low: Self::Q, high: Self::Q, left: i32, mask: u8) -> Self::Q;

    /// 16 half-precision values.
    /// # Safety
    /// 16 u16 must be readable at `p`.
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    /// 16 half-words.
    /// # Safety
    /// 16 u16 must be readable at `p`.
    unsafe fn load_u16(self, p: *const u16) -> Self::I;
    /// A line.
    /// # Safety
    /// `p` must be readable.
    unsafe fn load_line(self, p: *const Line) -> Self::Q;
    /// `sum[o] + ` the sum over groups `G..G + w.len()` and their four elements of `w * x`; `w` has numbers of `BITS` bits.
    /// # Safety
    /// `4 w.len()` bytes must be readable at `x`; none of them is -128.
    unsafe fn dot<const BITS: usize>(self, sum: Self::I, w: &[Self::Q], x: *const i8) -> Self::I;
    /// Asks for the cache line at `p`, which need not be a valid address.
    fn prefetch(self, p: *const Line);
}

/// As many stored lines as there are groups of a sub-block.
pub(super) type Groups<S> = [<S as Vector>::Q; GROUPS];
