//! AVX-512.

use super::{Kernel, LANES, Simd};
use std::arch::x86_64::*;

/// Proof that the processor has AVX-512 F, BW, DQ and VL, and with `BF16` the products of bf16 pairs: only [`run`] and
/// [`run_bf16`] make one.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const BF16: bool>(());

/// # Safety
/// The processor must have AVX-512 F, BW, DQ and VL, AVX2 and FMA.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx512::<false>(()));
}

/// # Safety
/// As [`run`], and it must have AVX-512-BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
pub(super) unsafe fn run_bf16<K: Kernel>(kernel: K) {
    kernel.run(Avx512::<true>(()));
}

/// An intrinsic on registers only.
macro_rules! op {
    ($intrinsic:expr) => {
        // SAFETY: an `Avx512` exists, so the processor has the instruction; it touches registers only.
        unsafe { $intrinsic }
    };
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    type V = __m512;
    const TILE_ROWS: usize = 6;
    const DOT: bool = BF16;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        op!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x))
    }
    #[inline(always)]
    fn add_to_exponent(self, a: __m512, n: __m512) -> __m512 {
        op!({
            let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(n));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), shifted))
        })
    }
    #[inline(always)]
    fn to_array(self, a: __m512) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: `lanes` has 16 f32.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), a) };
        lanes
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: the caller vouches for 16 f32.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: __m512) {
        // SAFETY: the caller vouches for 16 f32.
        unsafe { _mm512_storeu_ps(p, a) }
    }
    #[inline(always)]
    fn halves(self, w: __m512) -> [__m512; 2] {
        op!({
            let words = _mm512_castps_si512(w);
            let high = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)), _mm512_castsi512_ps(high)]
        })
    }
    #[inline(always)]
    fn dot(self, a: __m512, x: u32, w: __m512) -> __m512 {
        if const { !BF16 } {
            let [low, high] = self.halves(w);
            let (first, second) = (self.splat(f32::from_bits(x << 16)), self.splat(f32::from_bits(x & 0xffff_0000)));
            return self.fma(first, low, self.fma(second, high, a));
        }
        // SAFETY: with `BF16` the processor has the instruction; it touches registers only, and all three types are 64 bytes.
        unsafe {
            let x = _mm512_set1_epi32(x.cast_signed());
            _mm512_dpbf16_ps(a, std::mem::transmute::<__m512i, __m512bh>(x), std::mem::transmute::<__m512, __m512bh>(w))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, a: __m512) {
        // Rounding by hand, so that subnormal numbers stay what they are on every instruction set.
        // SAFETY: the caller vouches for 32 bytes; an `Avx512` exists.
        unsafe {
            let bits = _mm512_castps_si512(a);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let chosen = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a), rounded, quiet);
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(chosen)));
        }
    }
    #[inline(always)]
    unsafe fn store_pairs(self, p: *mut u16, a: __m512) {
        // SAFETY: the caller vouches for 32 bytes; with `BF16` the processor has the instruction, and both types are 32 bytes.
        unsafe {
            if const { !BF16 } {
                return self.store_bf16(p, a);
            }
            let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(a));
            _mm256_storeu_si256(p.cast(), rounded);
        }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch is a hint; any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(self, p: *const u8) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, n: usize) -> __m512 {
        // SAFETY: the caller vouches for `n` f32; lanes outside the mask are not touched.
        unsafe { _mm512_maskz_loadu_ps(mask(n), p) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, a: __m512, n: usize) {
        // SAFETY: the caller vouches for `n` f32; lanes outside the mask are not touched.
        unsafe { _mm512_mask_storeu_ps(p, mask(n), a) }
    }
}

#[inline(always)]
fn mask(n: usize) -> u16 {
    ((1u32 << n.min(LANES)) - 1) as u16
}
