//! Inputs of a product as the instruction set reads them.

use super::pack::{K_TILE, PackedWeight};
use crate::dtype::Dtype;
use crate::pages::Scratch;
use crate::parallel;
use crate::rows::Rows;
use crate::simd::{Isa, Kernel, LANES, Simd};
use std::cell::RefCell;

/// Rounding that is worth handing out, in elements.
const ROUND_ALONE: usize = 1 << 15;

thread_local! {
    /// Rounded inputs of the product under way; grows to the largest and stays.
    static ROUNDED: RefCell<Scratch> = const { RefCell::new(Scratch::EMPTY) };
}

/// Inputs as a product reads them.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a> {
    /// `[rows][d_in]`
    F32(&'a [f32]),
    /// `[rows][pair_stride(d_in)]`, two bf16 each, the first in the low half.
    Pairs(&'a [u32]),
}

/// Whether a product with `w` takes pairs.
pub(crate) fn takes_pairs(isa: Isa, w: &PackedWeight) -> bool {
    w.dtype() == Dtype::Bf16 && isa.takes_pairs()
}

/// u32 of a row of rounded inputs.
pub(crate) const fn pair_stride(d_in: usize) -> usize {
    d_in.next_multiple_of(K_TILE) / 2
}

/// Calls `body` with `x` rounded to `[rows][pair_stride(width)]` pairs, unless it holds them.
pub(crate) fn with_pairs<R>(x: &Rows, body: impl FnOnce(&[u32]) -> R) -> R {
    if let Some(pairs) = x.as_pairs() {
        return body(pairs);
    }
    let (x, d_in) = (x.as_f32(), x.width());
    ROUNDED.with_borrow_mut(|scratch| {
        let (rows, stride) = (x.len() / d_in, pair_stride(d_in));
        let pairs = scratch.words(rows * stride);
        let work_ns = if x.len() < ROUND_ALONE { 0 } else { x.len() / 8 };
        parallel::for_each_chunk(pairs, stride, work_ns, |row, pairs| {
            // The same bits on every instruction set, but for subnormal numbers.
            Isa::best().run(Round { x: &x[row * d_in..][..d_in], pairs });
        });
        body(pairs)
    })
}

/// A row as pairs of bf16, zeros behind its end.
struct Round<'a> {
    x: &'a [f32],
    pairs: &'a mut [u32],
}

impl Kernel for Round<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, pairs } = self;
        assert!(pairs.len() * 2 >= x.len().next_multiple_of(LANES));
        let out: *mut u16 = pairs.as_mut_ptr().cast();
        let mut k = 0;
        while k < x.len() {
            let count = (x.len() - k).min(LANES);
            // SAFETY: `count` elements of x from k, and 16 of `pairs`, as asserted.
            unsafe { s.store_pairs(out.add(k), s.load_part(x.as_ptr().add(k), count)) };
            k += LANES;
        }
        pairs[k / 2..].fill(0);
    }
}
