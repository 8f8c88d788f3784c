//! AVX-512 with VNNI.

use super::isa::{Kernel, Vector};
use super::pack::{Line, PANEL};
use std::arch::x86_64::*;

/// Proof that the processor has AVX-512 F, BW, DQ, VL and VNNI: only [`run`] makes one.
#[derive(Clone, Copy)]
pub(super) struct Avx512Vnni(());

/// # Safety
/// The processor must have AVX-512 F, BW, DQ, VL and VNNI, AVX2, FMA and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx512Vnni(()));
}

/// An intrinsic on registers only.
macro_rules! op {
    ($intrinsic:expr) => {
        // SAFETY: an `Avx512Vnni` exists, so the processor has the instruction; it touches registers only.
        unsafe { $intrinsic }
    };
}

impl Vector for Avx512Vnni {
    type F = __m512;
    type I = __m512i;
    type Q = __m512i;
    const ROWS: usize = 16;
    const DOT_CENTER: i32 = 0;

    #[inline(always)]
    fn zero(self) -> __m512 {
        op!(_mm512_setzero_ps())
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn to_f32(self, a: __m512i) -> __m512 {
        op!(_mm512_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn to_array(self, a: __m512) -> [f32; PANEL] {
        let mut lanes = [0.0; PANEL];
        // SAFETY: as above; `lanes` has 16 elements.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), a) };
        lanes
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m512i {
        op!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn low_byte(self, a: __m512i) -> __m512i {
        op!(_mm512_and_si512(a, _mm512_set1_epi32(0xff)))
    }
    #[inline(always)]
    fn low_signed(self, a: __m512i) -> __m512i {
        op!(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(a)))
    }
    #[inline(always)]
    fn high_byte(self, a: __m512i) -> __m512i {
        self.low_byte(op!(_mm512_srli_epi32::<8>(a)))
    }
    #[inline(always)]
    fn low_nibbles(self, a: __m512i) -> __m512i {
        op!(_mm512_and_si512(a, _mm512_set1_epi8(15)))
    }
    #[inline(always)]
    fn high_nibbles(self, a: __m512i) -> __m512i {
        self.low_nibbles(op!(_mm512_srli_epi32::<4>(a)))
    }
    #[inline(always)]
    fn with_bits(self, low: __m512i, high: __m512i, left: i32, mask: u8) -> __m512i {
        // A rotation shifts either way.
        let high = op!(_mm512_rolv_epi32(high, _mm512_set1_epi32(left & 31)));
        op!(_mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi8(mask.cast_signed()))))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        // SAFETY: the caller vouches for 16 u16.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u16) -> __m512i {
        // SAFETY: the caller vouches for 16 u16.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_line(self, p: *const Line) -> __m512i {
        // SAFETY: the caller vouches for the line.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn dot<const BITS: usize>(self, mut sum: __m512i, w: &[__m512i], x: *const i8) -> __m512i {
        for (g, w) in w.iter().enumerate() {
            // SAFETY: the caller vouches for four bytes of each group.
            unsafe {
                let x = _mm512_set1_epi32(x.add(4 * g).cast::<i32>().read_unaligned());
                sum = _mm512_dpbusd_epi32(sum, *w, x);
            }
        }
        sum
    }
    #[inline(always)]
    fn prefetch(self, p: *const Line) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}
