//! `v[t, r] = sum over k of x[t, k] * a[r, k]`, with the A of row t's adapter: two chains in the order of k, one of the even
//! lines of A and one of the odd ones, and their sum. First half of the LoRA delta.
//!
//! `x: [rows, d_in]` f32; `v`: a plane `[rows of the item][slices][16]` f32 per work item; A lies in rank blocks
//! of 16: a line is one input in f32, `[d_in][16]`, and two in bf16, `[d_in / 2][16][2]`, where x is rounded to bf16 too. Rows in no work item are not read. Matrices that an adapter leaves alone are not written.
//! Source: Punica (arXiv:2310.18547), SGMV.

pub(crate) mod batch;
pub(crate) mod check;
pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::arena::Arena;
use crate::error::{OpError, at_most, same};
use crate::lora::{AdapterTable, LoraScratch, LoraSite, RANK_BLOCK, WorkList};
use crate::rows::Rows;
use crate::simd::Isa;

/// Fills `v` for the matrices of `site` in layer `layer`.
///
/// # Errors
/// [`OpError::Shape`] if `x` or an adapter disagrees with the site, [`OpError::Limit`] if an item's rows or the layer are
/// not there, [`OpError::Stale`] if a slot has changed since the list was built.
#[expect(clippy::too_many_arguments, reason = "what one launch takes; a struct would only rename them")]
pub fn lora_shrink(
    v: &mut LoraScratch,
    x: &Rows,
    arena: &Arena,
    table: &AdapterTable,
    layer: usize,
    site: &LoraSite,
    work: &WorkList,
) -> Result<(), OpError> {
    same("lora_shrink", "width of x", x.width(), site.d_in)?;
    check_work("lora_shrink", x.rows(), table, layer, site, work)?;
    table.check_inputs("lora_shrink", x, work)?;
    let shrink = cpu::Shrink { x, pairs: &[], arena, table, layer, site, work };
    cpu::lora_shrink(Isa::best(), v.prepare(work.planes, site.slices.len()), &shrink);
    Ok(())
}

/// Fills `v` for a site whose A is the identity: `v` of rank block `i` is inputs `16 i..16 i + 16` of x, zeros past its end.
/// With it, a whole matrix is added by `lora_expand`.
///
/// # Errors
/// As [`lora_shrink`].
pub fn lora_identity_shrink(
    v: &mut LoraScratch,
    x: &Rows,
    table: &AdapterTable,
    tile: usize,
    site: &LoraSite,
    work: &WorkList,
) -> Result<(), OpError> {
    let op = "lora_identity_shrink";
    same(op, "width of x", x.width(), site.d_in)?;
    same(op, "matrices of the site", site.slices.len(), 1)?;
    check_work(op, x.rows(), table, tile, site, work)?;
    let v = v.prepare(work.planes, 1);
    for item in &work.items {
        let first = (item.rank_block as usize * RANK_BLOCK).min(site.d_in);
        for t in 0..item.rows as usize {
            let x = &x.row(item.first_row as usize + t)[first..site.d_in.min(first + RANK_BLOCK)];
            let v = &mut v[(item.plane as usize + t) * RANK_BLOCK..][..RANK_BLOCK];
            v[..x.len()].copy_from_slice(x);
            v[x.len()..].fill(0.0);
        }
    }
    Ok(())
}

/// What both halves rely on: items inside the batch, current slots, and blocks of the site's extents.
pub(crate) fn check_work(
    op: &'static str,
    rows: usize,
    table: &AdapterTable,
    layer: usize,
    site: &LoraSite,
    work: &WorkList,
) -> Result<(), OpError> {
    same(op, "columns of the site", site.cols.len(), site.slices.len())?;
    for item in &work.items {
        at_most(op, "last row of an item", item.first_row as usize + item.rows as usize, rows)?;
        for (&slice, &(_, d_out)) in site.slices.iter().zip(&site.cols) {
            if let Some((_, desc)) = table.desc(item, layer, slice)? {
                same(op, "d_in of an adapter", desc.d_in as usize, site.d_in)?;
                same(op, "d_out of an adapter", desc.d_out as usize, d_out)?;
            }
        }
    }
    Ok(())
}
