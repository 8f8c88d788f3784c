//! Activations.

use crate::error::{OpError, at_most};

/// Activations `[rows, width]` in f32, row after row. Memory for `rows_max` rows is taken once; a step only sets how many
/// of them count, so nothing is allocated while serving.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    values: Vec<f32>,
    rows: usize,
    width: usize,
    rows_max: usize,
}

impl Rows {
    /// `rows_max` rows of zeros, all of them counting.
    ///
    /// # Panics
    /// If `rows_max * width` overflows.
    #[must_use]
    pub fn zeros(rows_max: usize, width: usize) -> Self {
        let elements = rows_max.checked_mul(width).expect("the size of a workspace fits usize");
        Self { values: vec![0.0; elements], rows: rows_max, width, rows_max }
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
        &self.values[..self.rows * self.width]
    }

    /// The rows that count, `rows * width` elements.
    #[must_use]
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.rows * self.width]
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
