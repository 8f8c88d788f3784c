//! A projection with its adapters: `y = x W^T (+ bias)`, gains and shifts, and each row's LoRA deltas. The bits of
//! [`linear`](crate::linear()), [`lora_gain_shift`], [`lora_shrink`](crate::lora_shrink()) and [`lora_expand`](crate::lora_expand()) one
//! after another, in fewer regions and with fewer ways through memory.

#[cfg(test)]
mod tests;

use crate::arena::Arena;
use crate::error::{OpError, same};
use crate::linear::cpu::Product;
use crate::linear::input::{Input, takes_pairs, with_pairs};
use crate::linear::{PackedWeight, check_linear};
use crate::lora::{AdapterTable, LoraScratch, LoraSite, WorkList};
use crate::lora_expand::{self, check_columns};
use crate::lora_gain_shift::lora_gain_shift;
use crate::lora_shrink::{self, check_work};
use crate::parallel::{self, SharedMut};
use crate::rows::Rows;
use crate::simd::Isa;

/// The adapters' side of a projection.
pub struct Adapters<'a> {
    /// Between the halves of the deltas.
    pub v: &'a mut LoraScratch,
    /// Where the adapters lie.
    pub arena: &'a Arena,
    /// Which slot holds what.
    pub table: &'a AdapterTable,
    /// The layer.
    pub layer: usize,
    /// The matrices and their columns in y.
    pub site: &'a LoraSite,
    /// Which rows use which.
    pub work: &'a WorkList,
}

/// The projection; `y` gets the rows of `x`.
///
/// # Errors
/// As the four ops it stands for.
pub fn project(
    y: &mut Rows,
    x: &Rows,
    w: &PackedWeight,
    bias: Option<&[f32]>,
    adapters: Adapters,
) -> Result<(), OpError> {
    check_linear(y, x, w, bias)?;
    let isa = Isa::best();
    let Adapters { v, arena, table, layer, site, work } = adapters;
    if work.is_empty() || x.rows() == 0 {
        return crate::linear::linear(y, x, w, bias);
    }
    same("project", "width of x", x.width(), site.d_in)?;
    check_work("project", x.rows(), table, layer, site, work)?;
    check_columns("project", y, site)?;
    let pairs_of_base = takes_pairs(isa, w);
    let rows = x.rows();
    let mut run = |pairs: &[u32]| {
        let input = if pairs_of_base { Input::Pairs(pairs) } else { Input::F32(x.as_f32()) };
        let product = Product::new(isa, y.as_f32_mut(), input, rows, w, bias);
        let shrink = lora_shrink::cpu::Shrink { x, pairs, arena, table, layer, site, work };
        let halves = SharedMut::new(v.prepare(work.planes, site.slices.len()));
        let expand = lora_expand::cpu::Expand { v: &[], arena, table, layer, site, work };
        if work.uses.vectors || !expand.is_in_panels() || work.planes < ROWS_OF_LONG_RUNS * work.items.len() {
            side_by_side(isa, &product, &shrink, halves);
            return false;
        }
        parallel::for_each(shrink.units(), shrink.work_ns(), |unit| shrink.run(isa, halves, unit));
        in_units(isa, &product, &lora_expand::cpu::Expand { v: v.values(), ..expand });
        true
    };
    let is_whole = if pairs_of_base || table.takes_pairs(work) {
        with_pairs(x.as_f32(), x.width(), |pairs| run(pairs))
    } else {
        run(&[])
    };
    if !is_whole {
        lora_gain_shift(y, arena, table, layer, site, work)?;
        let expand = lora_expand::cpu::Expand { v: v.values(), arena, table, layer, site, work };
        lora_expand::cpu::lora_expand(isa, y, &expand);
    }
    Ok(())
}

/// From so many rows an adapter on average, y's way through memory is longer than B's.
const ROWS_OF_LONG_RUNS: usize = 8;

/// The product and the first half of the deltas at the same time: the adapters come from memory while the base computes.
fn side_by_side(isa: Isa, product: &Product, shrink: &lora_shrink::cpu::Shrink, v: SharedMut<f32>) {
    let deltas = shrink.units();
    parallel::for_each(deltas + product.units(), product.work_ns() + shrink.work_ns(), |unit| {
        match unit.checked_sub(deltas) {
            Some(unit) => product.run(unit),
            None => shrink.run(isa, v, unit),
        }
    });
}

/// The product and, piece by piece, the second half of the deltas, so that y is written once.
fn in_units(isa: Isa, product: &Product, expand: &lora_expand::cpu::Expand) {
    let found = expand.found();
    parallel::for_each(product.units(), product.work_ns(), |unit| {
        product.run(unit);
        let (rows, columns) = product.written(unit);
        // SAFETY: what this unit has just written, and no other does.
        unsafe { expand.add_block(isa, product.output(), product.width(), rows, columns, &found) };
    });
}
