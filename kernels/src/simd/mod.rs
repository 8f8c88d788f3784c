//! Sixteen f32 lanes on every machine. A kernel is written once over [`Simd`] and compiled for each instruction set, so
//! that all of them do the same IEEE operations in the same order and give the same bits.

pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod math;
mod portable;
#[cfg(test)]
mod tests;

pub(crate) use math::exp;
#[cfg(test)]
pub(crate) use math::exp_one;

use std::sync::OnceLock;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// A cache line of packed values: 16 f32, or 32 bf16 as 16 pairs. In a weight, lane `i` is output `i` of a panel and its pair
/// two consecutive inputs, the first in the low half: what AMX and AVX-512-BF16 multiply.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u32; LANES]);

/// An instruction set. Larger is faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Isa {
    /// What the compiler makes of plain loops.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// With products of bf16 pairs.
    Avx512Bf16,
    /// With tiles of bf16 pairs.
    Amx,
}

impl Isa {
    /// The fastest this machine has.
    pub(crate) fn best() -> Self {
        *BEST.get_or_init(|| Self::available().pop().unwrap_or(Self::Portable))
    }

    /// Whether products of bf16 weights take their input as bf16 pairs.
    pub(crate) const fn takes_pairs(self) -> bool {
        matches!(self, Self::Avx512Bf16 | Self::Amx)
    }

    /// Name as users write it.
    const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx-bf16",
        }
    }

    /// All that this machine has, slowest first.
    pub(crate) fn available() -> Vec<Self> {
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            if avx2 {
                found.push(Self::Avx2);
            }
            let all = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if all && found.contains(&Self::Avx2) {
                found.push(Self::Avx512);
                if is_x86_feature_detected!("avx512bf16") {
                    found.push(Self::Avx512Bf16);
                    if amx::permitted() {
                        found.push(Self::Amx);
                    }
                }
            }
        }
        found
    }

    /// Runs `kernel` with this instruction set.
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self {
            Self::Portable => kernel.run(portable::Portable),
            // SAFETY: an `Isa` other than `Portable` is only made by `available`, which asked the processor.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 | Self::Amx => unsafe { avx512::run_bf16(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 | Self::Amx => kernel.run(portable::Portable),
        }
    }
}

static BEST: OnceLock<Isa> = OnceLock::new();

/// The instruction set the ops use on this machine: `amx-bf16`, `avx512-bf16`, `avx512`, `avx2` or `portable`.
#[must_use]
pub fn isa_name() -> &'static str {
    Isa::best().name()
}

/// Instruction sets of this machine by name, slowest first.
#[must_use]
pub fn isa_names() -> Vec<&'static str> {
    Isa::available().into_iter().map(Isa::name).collect()
}

/// Makes the ops use the instruction set of this name. Only before the first op; afterwards it is what it is.
///
/// # Errors
/// What can be chosen, if the machine has no such instruction set or another one is in use.
pub fn set_isa(name: &str) -> Result<(), String> {
    let found = Isa::available().into_iter().find(|isa| isa.name() == name);
    let found = found.ok_or_else(|| format!("this machine has {}", isa_names().join(", ")))?;
    let used = *BEST.get_or_init(|| found);
    if used == found { Ok(()) } else { Err(format!("{} is already in use", used.name())) }
}

/// Work that is compiled once for each instruction set. `run` and all that it calls with `S` must be `#[inline(always)]`:
/// only what is inlined into the entry function gets the entry function's instructions.
pub(crate) trait Kernel {
    /// Does the work.
    fn run<S: Simd>(self, simd: S);
}

/// Operations on 16 f32 lanes. A value of the type is the proof that the processor has the instructions.
pub(crate) trait Simd: Copy {
    /// 16 lanes.
    type V: Copy;
    /// Rows of a tile of f32 sums that fit the registers beside three vectors of weights.
    const TILE_ROWS: usize;
    /// Whether [`Self::dot`] is an instruction.
    const DOT: bool = false;

    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a > b ? a : b`
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b`
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? x : y`, lane by lane.
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// `a` as bits plus `n` as bits shifted left by 23: `a * 2^k` when `n`'s low bits hold `k`.
    fn add_to_exponent(self, a: Self::V, n: Self::V) -> Self::V;
    fn to_array(self, a: Self::V) -> [f32; LANES];

    /// # Safety
    /// 16 f32 must be readable at `p`.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// 16 f32 must be writable at `p`.
    unsafe fn store(self, p: *mut f32, a: Self::V);
    /// `a + x.1 * w.1 + x.0 * w.0` lane by lane, where `x` and the lanes of `w` are pairs of bf16: first in the
    /// low half. Where it is an instruction, subnormal numbers count as zero.
    #[inline(always)]
    fn dot(self, a: Self::V, x: u32, w: Self::V) -> Self::V {
        let [low, high] = self.halves(w);
        let (first, second) = (self.splat(f32::from_bits(x << 16)), self.splat(f32::from_bits(x & 0xffff_0000)));
        self.fma(first, low, self.fma(second, high, a))
    }
    /// The bf16 of 16 pairs: those of the low halves, then those of the high halves.
    fn halves(self, w: Self::V) -> [Self::V; 2];
    /// 16 bf16, rounded to nearest even.
    /// # Safety
    /// 16 u16 must be writable at `p`.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, a: Self::V) {
        let rounded = self.to_array(a).map(|value| half::bf16::from_f32(value).to_bits());
        // SAFETY: the caller vouches for 16 u16.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(rounded) }
    }
    /// As [`Self::store_bf16`], but subnormal numbers may become zero: for what [`Self::dot`] reads.
    /// # Safety
    /// 16 u16 must be writable at `p`.
    #[inline(always)]
    unsafe fn store_pairs(self, p: *mut u16, a: Self::V) {
        // SAFETY: the caller vouches for 16 u16.
        unsafe { self.store_bf16(p, a) }
    }
    /// 32 bf16 of a [`Line`]: the low halves, then the high halves.
    /// # Safety
    /// 64 bytes must be readable at `p`.
    #[inline(always)]
    unsafe fn load_pair(self, p: *const Line) -> [Self::V; 2] {
        // SAFETY: the caller vouches for the line.
        self.halves(unsafe { self.load(p.cast()) })
    }
    /// Asks for the cache line at `p`, which need not be a valid address.
    fn prefetch(self, p: *const u8);
    /// Asks for a line for later: into the second-level cache.
    fn prefetch_far(self, p: *const u8) {
        self.prefetch(p);
    }

    /// The first `n <= 16` lanes from `p`, zeros after them.
    /// # Safety
    /// `n` f32 must be readable at `p`.
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, n: usize) -> Self::V {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the caller vouches for `n` elements at `p`; `lanes` has 16.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n.min(LANES));
            self.load(lanes.as_ptr())
        }
    }

    /// Stores the first `n <= 16` lanes.
    /// # Safety
    /// `n` f32 must be writable at `p`.
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, a: Self::V, n: usize) {
        let lanes = self.to_array(a);
        // SAFETY: the caller vouches for `n` elements at `p`; `lanes` has 16.
        unsafe { std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n.min(LANES)) }
    }

    /// The sum of the lanes by [`sum_lanes`].
    #[inline(always)]
    fn sum(self, a: Self::V) -> f32 {
        sum_lanes(&self.to_array(a))
    }
}

/// The one order in which 16 lanes are added: halves, then quarters, then pairs.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: &[f32; LANES]) -> f32 {
    let mut lanes = *lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}
