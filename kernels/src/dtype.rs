//! Storage types.

use half::{bf16, f16};

use crate::simd::{LANES, Simd};

/// How weights are stored. Arithmetic is f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// The upper half of a single: 8 bits of exponent, 8 of significand.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// How the arena of a model with such weights stores keys and values: in as many bytes. Adapters have the weights' type.
    #[must_use]
    pub const fn arena(self) -> ArenaDtype {
        match self {
            Self::F32 => ArenaDtype::F32,
            Self::Bf16 => ArenaDtype::Bf16,
        }
    }

    /// `value` rounded to the storage type (nearest, ties to even).
    #[must_use]
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }
}

/// How the arena stores keys and values. The 2-byte type is bf16, as the models' own: pairs of it multiply at twice the speed
/// of f32 where the processor can, and need no conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ArenaDtype {
    /// IEEE single precision.
    F32,
    /// The upper half of a single.
    Bf16,
}

impl ArenaDtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        4 / self.per_word()
    }

    /// Elements of 4 bytes.
    #[must_use]
    pub const fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
        }
    }

    /// `value` rounded to the storage type (nearest, ties to even).
    #[must_use]
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }
}

/// An element type of adapters.
pub(crate) trait Element {
    /// Bytes of one.
    const BYTES: usize;
    /// 16 of them in order.
    /// # Safety
    /// They must be readable at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V;
}

impl Element for f32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: the caller vouches for the elements; the load needs no alignment.
        unsafe { s.load(p.cast()) }
    }
}

impl Element for bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: the caller vouches for the elements.
        let halves = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        let wide: [f32; LANES] = std::array::from_fn(|i| f32::from_bits(u32::from(halves[i]) << 16));
        // SAFETY: 16 f32.
        unsafe { s.load(wide.as_ptr()) }
    }
}

/// Elements of a tensor as a file holds them.
#[derive(Clone, Copy, Debug)]
pub enum HostData<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// Half precision.
    F16(&'a [f16]),
}

impl HostData<'_> {
    /// Number of elements.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }

    /// Whether there is no element.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
