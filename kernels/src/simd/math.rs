//! Functions built from [`Simd`]'s operations, so that every instruction set gives the same bits.

use super::Simd;

/// 1.5 * 2^23: adding it rounds to an integer, which then lies in the low bits.
const ROUNDER: f32 = 12_582_912.0;
/// Below this exp is zero (its result would be subnormal).
const EXP_MIN: f32 = -87.336_54;
/// Above this exp is held: 2^127.x is the last finite binade.
const EXP_MAX: f32 = 88.0;

/// e^x lane by lane, within 2 units in the last place; 0 below -87.33 (and for -inf), e^88 above 88.
///
/// Cody-Waite reduction to |r| <= ln 2 / 2, then a polynomial of degree 6 (Cephes `expf` coefficients).
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let min = s.splat(EXP_MIN);
    let clamped = s.min(s.max(x, min), s.splat(EXP_MAX));
    let n = s.fma(clamped, s.splat(std::f32::consts::LOG2_E), s.splat(ROUNDER));
    let whole = s.sub(n, s.splat(ROUNDER));
    let r = s.fma(whole, s.splat(-0.693_359_4), clamped);
    let r = s.fma(whole, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(coefficient));
    }
    let p = s.fma(p, s.mul(r, r), s.add(r, s.splat(1.0)));
    s.select_lt(x, min, s.splat(0.0), s.add_to_exponent(p, n))
}

/// [`exp`] of one number.
#[cfg(test)]
pub(crate) fn exp_one(x: f32) -> f32 {
    exp(super::portable::Portable, [x; super::LANES])[0]
}
