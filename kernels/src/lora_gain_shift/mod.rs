//! `y[t, o] += sum over the row's adapters of c * (gain[o] * y0[t, o] + shift[o])`, with `y0` as it came in and `c` the
//! request's factor: one FMA for the inner sum, one for the outer, adapters in the order of the work list.
//!
//! This is all of DoRA but its matrices, and all trained biases. DoRA (arXiv:2402.09353) computes
//! `g (W x + s B A x)` with `g = m / |W + s B A|` by output; with `g` folded into B, what is left beside the base is
//! `(g - 1) W x`. So `gain = g - 1`, and `shift` holds what a bias changes: runs directly after the base product and its
//! bias, before `lora_expand`.
//!
//! `y: [rows, width]` f32, of which only the site's columns of rows whose adapters have vectors are touched; gains and
//! shifts are f32, `[2][d_out]` a matrix.

pub(crate) mod check;
mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::arena::Arena;
use crate::error::{OpError, at_most, same};
use crate::lora::{AdapterTable, LoraSite, WorkList};
use crate::lora_expand::check_columns;
use crate::rows::Rows;
use crate::simd::Isa;

/// Adds gains and shifts of the matrices of `site` in layer `layer` (for the head: of the tile `layer`).
///
/// # Errors
/// [`OpError::Shape`] if an adapter disagrees with the site, [`OpError::Limit`] if an item's rows or a column are not
/// there, [`OpError::Stale`] if a slot has changed since the list was built.
pub fn lora_gain_shift(
    y: &mut Rows,
    arena: &Arena,
    table: &AdapterTable,
    layer: usize,
    site: &LoraSite,
    work: &WorkList,
) -> Result<(), OpError> {
    let op = "lora_gain_shift";
    if !work.uses.vectors {
        return Ok(());
    }
    same(op, "columns of the site", site.cols.len(), site.slices.len())?;
    check_columns(op, y, site)?;
    for item in &work.items {
        at_most(op, "last row of an item", item.first_row as usize + item.rows as usize, y.rows())?;
        for (&slice, &(_, d_out)) in site.slices.iter().zip(&site.cols) {
            if let Some(vectors) = table.vectors(item, layer, slice)? {
                same(op, "outputs of an adapter", vectors.width as usize, d_out)?;
            }
        }
    }
    cpu::lora_gain_shift(Isa::best(), y, &cpu::GainShift { arena, table, layer, site, work });
    Ok(())
}
