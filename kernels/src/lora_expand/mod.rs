//! Per work item in order: `y[t, o] += sum over r of (scale * v[t, r]) * b[o, r]`, with the item's scale times the module's: one
//! chain over the 16 ranks of the block that begins with y. Second half of the LoRA delta.
//!
//! `v` from `lora_shrink` at the same site; B lies in rank blocks of panels of 16 outputs,
//! `[16 ranks][16]` in f32 and `[8][16][2 ranks]` in bf16, where the scaled v is rounded to bf16 too; `y: [rows, width]` f32,
//! of which only the site's columns of rows in a work item are touched. Source: Punica (arXiv:2310.18547), SGMV.

pub(crate) mod check;
pub(crate) mod cpu;
pub(crate) mod cuda;
pub(crate) mod fused;
#[cfg(test)]
mod tests;

use crate::arena::Arena;
use crate::error::{OpError, at_most, same};
use crate::lora::{AdapterTable, LoraScratch, LoraSite, WorkList};
use crate::lora_shrink::check_work;
use crate::rows::Rows;
use crate::simd::Isa;

/// Adds the deltas to `y`.
///
/// # Errors
/// [`OpError::Shape`] if `v` is not of this site and list or an adapter disagrees with the site, [`OpError::Limit`] if an
/// item's rows, a column or the layer are not there, [`OpError::Stale`] if a slot has changed since the list was built.
#[expect(clippy::too_many_arguments, reason = "what one launch takes; a struct would only rename them")]
pub fn lora_expand(
    y: &mut Rows,
    v: &LoraScratch,
    arena: &Arena,
    table: &AdapterTable,
    layer: usize,
    site: &LoraSite,
    work: &WorkList,
) -> Result<(), OpError> {
    let op = "lora_expand";
    same(op, "rows of v", v.extents().0, work.planes)?;
    same(op, "slices of v", v.extents().1, site.slices.len())?;
    check_work(op, y.rows(), table, layer, site, work)?;
    check_columns(op, y, site)?;
    cpu::lora_expand(
        Isa::best(),
        y,
        &cpu::Expand { v: cpu::Halves::done(v.values()), arena, table, layer, site, work },
    );
    Ok(())
}

/// That the slices' columns are in `y`, in order and apart, so that threads write different columns.
pub(crate) fn check_columns(op: &'static str, y: &Rows, site: &LoraSite) -> Result<(), OpError> {
    let mut columns_end = 0;
    for &(first, d_out) in &site.cols {
        at_most(op, "columns before a slice", columns_end, first)?;
        columns_end = first.saturating_add(d_out);
        at_most(op, "last column of a slice", columns_end, y.width())?;
    }
    Ok(())
}
