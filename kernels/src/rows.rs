//! Activations.

use crate::error::{OpError, at_most};
use crate::pages::Lines;
use crate::simd::LANES;

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
}

impl Rows {
    /// `rows_max` rows of zeros, all of them counting.
    ///
    /// # Panics
    /// If the system refuses that much.
    #[must_use]
    pub fn zeros(rows_max: usize, width: usize) -> Self {
        let lines = rows_max.saturating_mul(width).div_ceil(LANES);
        let values = (lines > 0).then(|| Lines::new(lines).expect("the system has memory for a workspace"));
        Self { values, rows: rows_max, width, rows_max }
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

    /// The rows that count, `rows * width` elements.
    #[must_use]
    pub fn as_f32(&self) -> &[f32] {
        // SAFETY: the lines have `rows_max * width` f32 or more, and `rows` is at most `rows_max`.
        self.values.as_ref().map_or(&[], |lines| unsafe {
            std::slice::from_raw_parts(lines.as_ptr().cast(), self.rows * self.width)
        })
    }

    /// The rows that count, `rows * width` elements.
    #[must_use]
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
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

impl Clone for Rows {
    fn clone(&self) -> Self {
        let mut clone = Self::zeros(self.rows_max, self.width);
        if let (Some(to), Some(from)) = (&mut clone.values, &self.values) {
            to.as_mut().copy_from_slice(from);
        }
        clone.rows = self.rows;
        clone
    }
}
