//! AVX2 with FMA: two registers are one vector.

use super::{Kernel, LANES, Simd};
use std::arch::x86_64::*;

/// Proof that the processor has AVX2 and FMA: only [`run`] makes one.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// # Safety
/// The processor must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx2(()));
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

impl Simd for Avx2 {
    type V = [__m256; 2];
    const TILE_ROWS: usize = 3;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        both!(_half => _mm256_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        both!(i => _mm256_add_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        both!(i => _mm256_sub_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        both!(i => _mm256_mul_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        both!(i => _mm256_div_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        both!(i => _mm256_fmadd_ps(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        both!(i => _mm256_max_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        both!(i => _mm256_min_ps(a[i], b[i]))
    }
    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        both!(i => _mm256_blendv_ps(y[i], x[i], _mm256_cmp_ps::<_CMP_LT_OQ>(a[i], b[i])))
    }
    #[inline(always)]
    fn add_to_exponent(self, a: Self::V, n: Self::V) -> Self::V {
        both!(i => {
            let shifted = _mm256_slli_epi32::<23>(_mm256_castps_si256(n[i]));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a[i]), shifted))
        })
    }
    #[inline(always)]
    fn to_array(self, a: Self::V) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // SAFETY: `lanes` has 16 f32.
        unsafe { self.store(lanes.as_mut_ptr(), a) };
        lanes
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the caller vouches for 16 f32.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: Self::V) {
        // SAFETY: the caller vouches for 16 f32.
        unsafe {
            _mm256_storeu_ps(p, a[0]);
            _mm256_storeu_ps(p.add(8), a[1]);
        }
    }
    #[inline(always)]
    fn halves(self, w: Self::V) -> [Self::V; 2] {
        [
            both!(i => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(w[i])))),
            both!(i => {
                let mask = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
                _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(w[i]), mask))
            }),
        ]
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
}
