//! What lies between the two halves of a LoRA delta.

use super::RANK_BLOCK;

/// `v`: one plane of `[rows of the item][slices of the site][16]` f32 for each work item. Grows to the largest step and is
/// kept.
#[derive(Debug, Default)]
pub struct LoraScratch {
    values: Vec<f32>,
    slices: usize,
    planes: usize,
}

impl LoraScratch {
    /// Makes room for `planes` rows of items at a site of `slices` matrices. Does not clear.
    pub(crate) fn prepare(&mut self, planes: usize, slices: usize) -> &mut [f32] {
        let elements = planes * slices * RANK_BLOCK;
        if self.values.len() < elements {
            self.values.resize(elements, 0.0);
        }
        (self.planes, self.slices) = (planes, slices);
        &mut self.values[..elements]
    }

    /// Rows of items and slices that [`Self::prepare`] was last called with.
    pub(crate) const fn extents(&self) -> (usize, usize) {
        (self.planes, self.slices)
    }

    pub(crate) fn values(&self) -> &[f32] {
        &self.values[..self.planes * self.slices * RANK_BLOCK]
    }
}
