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
use crate::lora_expand::cpu::{Expand, Halves};
use crate::lora_expand::fused::Fused;
use crate::lora_expand::{self, check_columns};
use crate::lora_gain_shift::lora_gain_shift;
use crate::lora_shrink::check_work;
use crate::lora_shrink::cpu::Shrink;
use crate::parallel::{self, First, SharedMut};
use crate::rows::Rows;
use crate::simd::{Isa, LANES};

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
    table.check_inputs("project", x, work)?;
    check_columns("project", y, site)?;
    let pairs_of_base = takes_pairs(isa, w);
    let rows = x.rows();
    let mut run = |pairs: &[u32]| {
        let input = if pairs_of_base { Input::Pairs(pairs) } else { Input::F32(x.as_f32()) };
        let product = Product::new(isa, y.as_f32_mut(), input, rows, w, bias);
        let shrink = Shrink { x, pairs, arena, table, layer, site, work };
        let whole = Whole::of(site, work);
        let halves = Halves::new(v.prepare(work.planes, site.slices.len()));
        let expand = Expand { v: halves, arena, table, layer, site, work };
        match whole {
            Whole::No => side_by_side(&product, &shrink, halves.values()),
            Whole::InUnits => in_units(&product, &shrink, &expand),
            Whole::ByColumns => by_columns(&product, &shrink, &expand),
        }
        whole != Whole::No
    };
    let is_whole = if pairs_of_base || table.takes_pairs(work) { with_pairs(x, |pairs| run(pairs)) } else { run(&[]) };
    if !is_whole {
        lora_gain_shift(y, arena, table, layer, site, work)?;
        let expand = Expand { v: Halves::done(v.values()), arena, table, layer, site, work };
        lora_expand::cpu::lora_expand(isa, y, &expand);
    }
    Ok(())
}

/// Whether the region of the product adds the deltas, and how.
#[derive(Clone, Copy, PartialEq)]
enum Whole {
    /// It makes only their first half.
    No,
    /// Each unit multiplies its piece of B: for many rows an adapter, where the way of y through memory is longer than B's.
    InUnits,
    /// A thread adds them to its columns of y, one adapter after another: for few rows an adapter, where reading A and B is
    /// the work, and is fastest in long pieces.
    ByColumns,
}

/// From so many rows an adapter on average, units multiply B themselves.
const ROWS_OF_LONG_RUNS: usize = 8;

impl Whole {
    fn of(site: &LoraSite, work: &WorkList) -> Self {
        let is_in_panels = site.cols.iter().all(|(first, _)| first.is_multiple_of(LANES));
        if work.uses.vectors || !is_in_panels {
            Self::No
        } else if work.planes >= ROWS_OF_LONG_RUNS * work.items.len() {
            Self::InUnits
        } else {
            Self::ByColumns
        }
    }
}

/// The product and the first half of the deltas at the same time: the adapters come from memory while the base computes.
fn side_by_side(product: &Product, shrink: &Shrink, v: SharedMut<f32>) {
    let cut = shrink.cut();
    parallel::for_each(cut.units + product.units(), product.work_ns() + shrink.work_ns(), |unit| {
        match unit.checked_sub(cut.units) {
            Some(unit) => product.run(unit),
            None => shrink.run(product.isa(), v, cut, unit),
        }
    });
}

/// The first half of the deltas, then the product and, piece by piece, the second half, so that y is written once: those of
/// long runs while the product's sums are in registers.
fn in_units(product: &Product, shrink: &Shrink, expand: &Expand) {
    let (isa, cut, found) = (product.isa(), shrink.cut(), expand.found());
    let (long, short): (Vec<_>, Vec<_>) = found.iter().partition(|found| expand.is_long(found));
    let first = First::new(cut.units);
    parallel::for_each(product.units(), product.work_ns() + shrink.work_ns(), |unit| {
        first.take(|unit| shrink.run(isa, expand.v.values(), cut, unit));
        let (rows, columns) = product.written(unit);
        expand.fetch_block(isa, &rows, &columns, &found);
        let fused = Fused::of(expand, &long, &columns).filter(|_| product.takes_deltas());
        let left = if let Some(deltas) = &fused {
            first.wait();
            product.run_with(unit, deltas);
            &short
        } else {
            product.run(unit);
            first.wait();
            &found
        };
        // SAFETY: what this unit has just written, and no other does.
        unsafe { expand.add_block(isa, product.output(), product.width(), rows, columns, left) };
    });
}

/// A region of one part of the columns for each thread, so that y stays in its caches: the first half of the deltas by all, then
/// the part's product, then the second half of the deltas, which goes from one adapter's B to the next.
fn by_columns(product: &Product, shrink: &Shrink, expand: &Expand) {
    let (isa, cut, runs) = (product.isa(), shrink.cut(), expand.work.runs.len());
    let parts = parallel::threads().clamp(1, product.parts_max());
    let first = First::new(cut.units);
    let part = |part: usize| product.part(part, parts);
    let base: Vec<First> = (0..parts).map(|at| First::new(part(at).0.len())).collect();
    // As many units for each part, so that each thread's range is one; some parts have fewer.
    let longest = (0..parts).map(|at| part(at).0.len()).max().unwrap_or(0) + runs;
    parallel::for_each(parts * longest, product.work_ns() + shrink.work_ns(), |unit| {
        let (at, unit) = (unit / longest, unit % longest);
        let (units, columns) = part(at);
        first.take(|delta| {
            if first.is_last(delta) {
                product.fetch(units.start);
            }
            shrink.run(isa, expand.v.values(), cut, delta);
        });
        let multiply = |unit: usize| product.run(units.start + unit);
        if unit + runs < longest {
            base[at].take_one(multiply);
            return;
        }
        base[at].take(multiply);
        base[at].wait();
        first.wait();
        // SAFETY: the part's product is done, all of v too, and no other unit has this run and these columns.
        unsafe { expand.add_columns(isa, product.output(), product.width(), unit + runs - longest, &columns) };
    });
}
