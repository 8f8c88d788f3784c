//! AVX2 with FMA, without and with VNNI: two registers are 16 lanes.

use super::isa::{Kernel, Vector};
use super::pack::{Line, PANEL};
use std::arch::x86_64::*;

/// Proof that the processor has AVX2, FMA and F16C, and VNNI if it says so: only [`run`] and [`run_vnni`] make one.
#[derive(Clone, Copy)]
pub(super) struct Avx2<const VNNI: bool>(());

/// # Safety
/// The processor must have AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx2::<false>(()));
}

/// # Safety
/// The processor must have AVX2, FMA, F16C and AVX-VNNI.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) unsafe fn run_vnni<K: Kernel>(kernel: K) {
    kernel.run(Avx2::<true>(()));
}

/// An intrinsic on registers only, on both halves.
macro_rules! both {
    ($half:ident => $intrinsic:expr) => {
        // No closure: it would be a function without the instructions until it is inlined.
        [
            {
                let $half = 0usize;
                // SAFETY: an `Avx2` exists, so the processor has the instruction; it touches registers only.
                unsafe { $intrinsic }
            },
            {
                let $half = 1usize;
                // SAFETY: as above.
                unsafe { $intrinsic }
            },
        ]
    };
}

/// Groups whose products of bytes of `BITS` bits and of at most 127 add up in 16 bits.
const fn groups_in_16_bits(bits: usize) -> usize {
    match bits {
        4 => 8,
        5 => 4,
        6 => 2,
        _ => 1,
    }
}

const _: () = {
    let mut bits = 4;
    while bits < 7 {
        assert!(groups_in_16_bits(bits) * 2 * ((1 << bits) - 1) * 127 <= i16::MAX as usize);
        bits += 1;
    }
    // Numbers of 8 bits are taken with their sign.
    assert!(groups_in_16_bits(8) * 2 * 128 * 127 <= i16::MAX as usize);
};

/// The sums of neighbouring products in 16 bits; numbers of 8 bits around 128.
///
/// # Safety
/// The processor must have AVX2.
#[inline(always)]
unsafe fn products<const BITS: usize>(w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: the caller vouches for the instructions; they touch registers only.
    unsafe {
        if BITS < 8 {
            return _mm256_maddubs_epi16(w, x);
        }
        // The sign goes to `x`, so that neighbouring products cannot pass 16 bits.
        let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
    }
}

impl<const VNNI: bool> Vector for Avx2<VNNI> {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type Q = [__m256i; 2];
    const ROWS: usize = 4;
    const DOT_CENTER: i32 = if VNNI { 0 } else { 128 };

    #[inline(always)]
    fn zero(self) -> Self::F {
        both!(_half => _mm256_setzero_ps())
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        both!(_half => _mm256_set1_ps(x))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        both!(i => _mm256_mul_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        both!(i => _mm256_fmadd_ps(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        both!(i => _mm256_cvtepi32_ps(a[i]))
    }
    #[inline(always)]
    fn to_array(self, a: Self::F) -> [f32; PANEL] {
        let mut lanes = [0.0; PANEL];
        // SAFETY: an `Avx2` exists; `lanes` has room for both halves.
        unsafe {
            _mm256_storeu_ps(lanes.as_mut_ptr(), a[0]);
            _mm256_storeu_ps(lanes.as_mut_ptr().add(PANEL / 2), a[1]);
        }
        lanes
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        both!(_half => _mm256_set1_epi32(x))
    }
    #[inline(always)]
    fn low_byte(self, a: Self::I) -> Self::I {
        both!(i => _mm256_and_si256(a[i], _mm256_set1_epi32(0xff)))
    }
    #[inline(always)]
    fn low_signed(self, a: Self::I) -> Self::I {
        both!(i => _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(a[i])))
    }
    #[inline(always)]
    fn high_byte(self, a: Self::I) -> Self::I {
        self.low_byte(both!(i => _mm256_srli_epi32::<8>(a[i])))
    }
    #[inline(always)]
    fn low_nibbles(self, a: Self::Q) -> Self::Q {
        both!(i => _mm256_and_si256(a[i], _mm256_set1_epi8(15)))
    }
    #[inline(always)]
    fn high_nibbles(self, a: Self::Q) -> Self::Q {
        self.low_nibbles(both!(i => _mm256_srli_epi32::<4>(a[i])))
    }
    #[inline(always)]
    fn with_bits(self, low: Self::Q, high: Self::Q, left: i32, mask: u8) -> Self::Q {
        let high = if left >= 0 {
            both!(i => _mm256_sllv_epi32(high[i], _mm256_set1_epi32(left)))
        } else {
            both!(i => _mm256_srlv_epi32(high[i], _mm256_set1_epi32(-left)))
        };
        both!(i => _mm256_or_si256(low[i], _mm256_and_si256(high[i], _mm256_set1_epi8(mask.cast_signed()))))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller vouches for 16 u16.
        both!(i => _mm256_cvtph_ps(_mm_loadu_si128(p.add(8 * i).cast())))
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u16) -> Self::I {
        // SAFETY: the caller vouches for 16 u16.
        both!(i => _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8 * i).cast())))
    }
    #[inline(always)]
    unsafe fn load_line(self, p: *const Line) -> Self::Q {
        // SAFETY: the caller vouches for the line.
        both!(i => _mm256_loadu_si256(p.cast::<__m256i>().add(i)))
    }
    #[inline(always)]
    unsafe fn dot<const BITS: usize>(self, mut sum: Self::I, w: &[Self::Q], x: *const i8) -> Self::I {
        // SAFETY: the caller vouches for four bytes of each group.
        let group = |g: usize| unsafe { x.add(4 * g).cast::<i32>().read_unaligned() };
        if VNNI {
            for (g, w) in w.iter().enumerate() {
                let x = self.splat_i32(group(g));
                sum = both!(i => _mm256_dpbusd_avx_epi32(sum[i], w[i], x[i]));
            }
            return sum;
        }
        let run = groups_in_16_bits(BITS);
        for (first, w) in w.chunks(run).enumerate() {
            let mut pairs = both!(_half => _mm256_setzero_si256());
            for (g, w) in w.iter().enumerate() {
                let x = self.splat_i32(group(first * run + g));
                pairs = both!(i => _mm256_add_epi16(pairs[i], products::<BITS>(w[i], x[i])));
            }
            sum = both!(i => _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs[i], _mm256_set1_epi16(1))));
        }
        sum
    }
    #[inline(always)]
    fn prefetch(self, p: *const Line) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}
