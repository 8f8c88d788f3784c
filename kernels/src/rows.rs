//! Activations.

use crate::error::{OpError, at_most, same};
use crate::linear::input::pair_stride;
use crate::pages::Lines;
use crate::simd::{LANES, Simd};

/// Activations `[rows, width]` in f32, row after row. Memory for `rows_max` rows is taken once, in huge pages where the system
/// has them (rows of prompts are many megabytes, and each is on a page of its own otherwise); a step only sets how many of
/// them count, so nothing is allocated while serving.
#[derive(Debug, Default)]
pub struct Rows {
    /// `None`: no elements.
    values: Option<Lines>,
    rows: usize,
    width: usize,
    rows_max: usize,
    /// Whether they hold pairs of bf16: see [`Rows::hold_pairs`].
    pairs: bool,
}

impl Rows {
    /// `rows_max` rows of zeros, all of them counting.
    ///
    /// # Panics
    /// If the system refuses that much.
    #[must_use]
    pub fn zeros(rows_max: usize, width: usize) -> Self {
        let lines = rows_max.saturating_mul(width.max(pair_stride(width))).div_ceil(LANES);
        let values = (lines > 0).then(|| Lines::new(lines).expect("the system has memory for a workspace"));
        Self { values, rows: rows_max, width, rows_max, pairs: false }
    }

    /// Rows that count.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    #[must_use]
    pub const fn width(&self) -> usize {
        self.width
    }

    /// Rows there is memory for.
    #[must_use]
    pub const fn rows_max(&self) -> usize {
        self.rows_max
    }

    /// Makes `rows` rows count. Never allocates and never clears: rows that come back hold what they held.
    ///
    /// # Errors
    /// [`OpError::Limit`] over [`Self::rows_max`].
    pub fn set_rows(&mut self, rows: usize) -> Result<(), OpError> {
        at_most("rows", "rows", rows, self.rows_max)?;
        self.rows = rows;
        Ok(())
    }

    /// Makes the next op that writes these rows round them to bf16 and leave them in pairs, as products of bf16 weights read
    /// them ([`PackedWeight::takes_pairs`](crate::PackedWeight::takes_pairs)); or in f32 again. What they held is lost.
    pub fn hold_pairs(&mut self, pairs: bool) {
        self.pairs = pairs;
    }

    /// The rows that count as `[rows][pair_stride(width)]` pairs, if they are.
    pub(crate) fn as_pairs(&self) -> Option<&[u32]> {
        let lines = self.values.as_ref().filter(|_| self.pairs)?;
        // SAFETY: the lines have `rows_max * pair_stride(width)` words or more.
        Some(unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), self.rows * pair_stride(self.width)) })
    }

    /// Where an op writes the rows that count.
    pub(crate) fn out(&mut self) -> RowsOut {
        let (rows, width, pairs) = (self.rows, self.width, self.pairs);
        let stride = if pairs { pair_stride(width) } else { width };
        let words = self.values.as_mut().map_or(std::ptr::dangling_mut(), |lines| lines.as_mut().as_mut_ptr().cast());
        RowsOut { words, rows, width, stride, pairs }
    }

    /// The rows that count, `rows * width` elements.
    ///
    /// # Panics
    /// If they hold pairs.
    #[must_use]
    pub fn as_f32(&self) -> &[f32] {
        assert!(!self.pairs, "rows that hold pairs are for products only");
        // SAFETY: the lines have `rows_max * width` f32 or more, and `rows` is at most `rows_max`.
        self.values
            .as_ref()
            .map_or(&[], |lines| unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), self.rows * self.width) })
    }

    /// The rows that count, `rows * width` elements.
    ///
    /// # Panics
    /// If they hold pairs.
    #[must_use]
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        assert!(!self.pairs, "rows that hold pairs are for products only");
        let elements = self.rows * self.width;
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        self.values.as_mut().map_or(&mut [], |lines| unsafe {
            std::slice::from_raw_parts_mut(lines.as_mut().as_mut_ptr().cast(), elements)
        })
    }

    /// One row.
    ///
    /// # Panics
    /// If `row >= self.rows()`.
    #[must_use]
    pub fn row(&self, row: usize) -> &[f32] {
        &self.as_f32()[row * self.width..][..self.width]
    }
}

/// Refuses rows that hold pairs.
pub(crate) fn in_f32(op: &'static str, x: &Rows) -> Result<(), OpError> {
    same(op, "elements of a word of x", 1 + usize::from(x.pairs), 1)
}

/// Rows that threads write, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct RowsOut {
    words: *mut u32,
    rows: usize,
    width: usize,
    stride: usize,
    pairs: bool,
}

// SAFETY: every user hands disjoint elements to the threads; see the comment at each `store`.
unsafe impl Send for RowsOut {}
// SAFETY: as above.
unsafe impl Sync for RowsOut {}

impl RowsOut {
    pub(crate) const fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) const fn width(&self) -> usize {
        self.width
    }

    /// Writes the first `count <= 16` lanes to a row from `column` on. Behind the end of a row of pairs come zeros: who
    /// writes its last element writes them.
    ///
    /// # Safety
    /// The elements must be in the rows, the rows must still be there, and no other thread may touch the elements.
    #[inline(always)]
    pub(crate) unsafe fn store<S: Simd>(&self, s: S, row: usize, column: usize, values: S::V, count: usize) {
        debug_assert!(row < self.rows && column + count <= self.width);
        // SAFETY: the caller vouches for the elements; a row of pairs has `2 * stride` of them, `width` and zeros.
        unsafe {
            let row = self.words.add(row * self.stride);
            if !self.pairs {
                return s.store_part(row.cast::<f32>().add(column), values, count);
            }
            let halves = row.cast::<u16>();
            if count == LANES {
                s.store_pairs(halves.add(column), values);
            } else {
                let mut part = [0u16; LANES];
                s.store_pairs(part.as_mut_ptr(), values);
                halves.add(column).copy_from_nonoverlapping(part.as_ptr(), count);
            }
            if column + count == self.width {
                halves.add(self.width).write_bytes(0, 2 * self.stride - self.width);
            }
        }
    }
}

impl Clone for Rows {
    fn clone(&self) -> Self {
        let mut clone = Self::zeros(self.rows_max, self.width);
        if let (Some(to), Some(from)) = (&mut clone.values, &self.values) {
            to.as_mut().copy_from_slice(from);
        }
        (clone.rows, clone.pairs) = (self.rows, self.pairs);
        clone
    }
}
