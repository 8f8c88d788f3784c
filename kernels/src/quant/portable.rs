//! Plain loops. On a processor without FMA `mul_add` is a call and slow; it is exact, which is what counts there.

use super::isa::Vector;
use super::pack::{Line, PANEL};

/// No instruction beyond the compiler's baseline.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Vector for Portable {
    type F = [f32; PANEL];
    type I = [i32; PANEL];
    type Q = [u8; 4 * PANEL];
    const ROWS: usize = 2;
    const DOT_CENTER: i32 = 0;

    #[inline(always)]
    fn zero(self) -> Self::F {
        [0.0; PANEL]
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; PANEL]
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::F {
        a.map(|a| a as f32)
    }
    #[inline(always)]
    fn to_array(self, a: Self::F) -> [f32; PANEL] {
        a
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        [x; PANEL]
    }
    #[inline(always)]
    fn low_byte(self, a: Self::I) -> Self::I {
        a.map(|a| a & 0xff)
    }
    #[inline(always)]
    fn low_signed(self, a: Self::I) -> Self::I {
        a.map(|a| a << 24 >> 24)
    }
    #[inline(always)]
    fn high_byte(self, a: Self::I) -> Self::I {
        a.map(|a| a >> 8 & 0xff)
    }
    #[inline(always)]
    fn low_nibbles(self, a: Self::Q) -> Self::Q {
        a.map(|a| a & 15)
    }
    #[inline(always)]
    fn high_nibbles(self, a: Self::Q) -> Self::Q {
        a.map(|a| a >> 4)
    }
    #[inline(always)]
    fn with_bits(self, low: Self::Q, high: Self::Q, left: i32, mask: u8) -> Self::Q {
        let shifted = |high: u8| if left >= 0 { high << left } else { high >> -left };
        std::array::from_fn(|i| low[i] | shifted(high[i]) & mask)
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller vouches for 16 u16.
        let halves = unsafe { p.cast::<[u16; PANEL]>().read_unaligned() };
        halves.map(|bits| half::f16::from_bits(bits).to_f32_const())
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u16) -> Self::I {
        // SAFETY: the caller vouches for 16 u16.
        unsafe { p.cast::<[u16; PANEL]>().read_unaligned() }.map(i32::from)
    }
    #[inline(always)]
    unsafe fn load_line(self, p: *const Line) -> Self::Q {
        // SAFETY: the caller vouches for the line.
        unsafe { p.read() }.0
    }
    #[inline(always)]
    unsafe fn dot<const BITS: usize>(self, mut sum: Self::I, w: &[Self::Q], x: *const i8) -> Self::I {
        for (g, w) in w.iter().enumerate() {
            // SAFETY: the caller vouches for four bytes of each group.
            let x = unsafe { x.add(4 * g).cast::<[i8; 4]>().read_unaligned() }.map(i32::from);
            for (sum, w) in sum.iter_mut().zip(w.as_chunks::<4>().0) {
                *sum += (0..4).map(|i| i32::from(w[i]) * x[i]).sum::<i32>();
            }
        }
        sum
    }
    #[inline(always)]
    fn prefetch(self, _: *const Line) {}
}
