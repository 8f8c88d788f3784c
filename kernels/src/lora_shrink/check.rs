//! The kernel against the formula in double precision.

use super::batch::{Batch, Run, Site, mixes};
use super::cuda::ShrinkKernel;
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Summary, expect};
use crate::device::lora::{SiteShape, splits};
use crate::lora::RANK_BLOCK;

/// Largest error that f32 sums in any order may have, of sum |x a|.
const TOLERANCE: f64 = 1e-5;

/// One site: its elements, inputs, matrices and rows of a tile. The number of outputs does not matter here.
type Case = (Elem, usize, usize, usize);

/// Compares values on several sites and mixes of adapters; what is not to be written must stay as it was, and a row must
/// get the bits that it gets alone.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let cases: &[Case] = match checker.effort {
        Effort::Quick => &[(Elem::Bf16, 4096, 3, 8), (Elem::F16, 896, 2, 64)],
        Effort::Full => &[
            (Elem::Bf16, 32, 1, 8),
            (Elem::Bf16, 192, 3, 8),
            (Elem::Bf16, 576, 3, 8),
            (Elem::F16, 896, 2, 8),
            (Elem::Bf16, 4096, 1, 8),
            (Elem::F16, 4864, 1, 8),
            (Elem::Bf16, 192, 2, 64),
            (Elem::F16, 1536, 1, 64),
        ],
    };
    let (mut worst, mut count) = (0.0f64, 0);
    for &(elem, d_in, slices, tile_rows) in cases {
        let cols = &[(0, 16), (16, 16), (32, 16)][..slices];
        let site = Site::new(checker, elem, SiteShape { d_in, cols, tile_rows })?;
        for runs in mixes(tile_rows) {
            worst = worst.max(one(&site, &runs)?);
            count += 1;
        }
    }
    Ok(Summary { cases: count, worst, unit: "of sum |x a|" })
}

/// V of a batch, poisoned before the launch, and one plane behind it.
fn run(site: &Site<'_>, batch: &Batch<'_>, x: &[u16], stride: usize, blocks: usize) -> Result<Vec<u32>, CheckError> {
    let (checker, device) = (site.checker, &*site.checker.device);
    let mut kernel = ShrinkKernel::load(device, site.elem, site.shape, batch.items.len())?;
    if blocks > 0 {
        kernel.blocks = blocks;
    }
    let x = checker.buffer(x)?;
    batch.v.fill(checker.stream, 0xff)?;
    // SAFETY: the lists are the batch's own; x has its rows of `stride` elements.
    unsafe { kernel.launch(device, checker.stream, &batch.work(), x.address(), stride)? };
    Ok(batch.v.read(checker.stream, 0, batch.v.bytes() / 4)?)
}

fn one(site: &Site<'_>, runs: &[Run]) -> Result<f64, CheckError> {
    let batch = site.batch(runs)?;
    let stride = site.shape.d_in + 24;
    let x = batch.inputs(stride, 5);
    let v = run(site, &batch, &x, stride, 0)?;
    let worst = compare(site, &batch, &x, stride, &v)?;
    let name = || format!("lora_shrink {:?} {:?}", site.elem, site.shape);
    for blocks in [1, 5, 1000] {
        let again = run(site, &batch, &x, stride, blocks)?;
        expect(again == v, || format!("{}: {blocks} blocks give other bits", name()))?;
    }
    let mut first_row = 0;
    for of_mix in runs {
        // The last row of a run, alone in its batch.
        let row = first_row + of_mix.rows - 1;
        first_row += of_mix.rows;
        let alone = site.batch(&[Run { rows: 1, ..of_mix.clone() }])?;
        let got = run(site, &alone, &x[row * stride..][..stride], stride, 0)?;
        let tile = batch.tiles.iter().find(|tile| super::batch::rows_of(tile).contains(&row));
        let tile = tile.ok_or_else(|| CheckError::Wrong("a row without a tile".into()))?;
        for (item, slice, split) in planes(site, tile.item_count as usize) {
            let here = batch.v_at(tile.first_item as usize + item, slice, split, row - tile.first_row as usize);
            let there = alone.v_at(item, slice, split, 0);
            let same = v[here..][..RANK_BLOCK] == got[there..][..RANK_BLOCK];
            expect(same, || format!("{}: row {row} has other bits alone", name()))?;
        }
    }
    Ok(worst)
}

/// Item, slice and split of every tile of V.
fn planes(site: &Site<'_>, items: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let (slices, splits) = (site.shape.cols.len(), splits(site.shape.d_in));
    (0..items * slices * splits).map(move |i| (i / splits / slices, i / splits % slices, i % splits))
}

fn compare(site: &Site<'_>, batch: &Batch<'_>, x: &[u16], stride: usize, v: &[u32]) -> Result<f64, CheckError> {
    const UNTOUCHED: u32 = u32::MAX;
    let (tile_rows, splits) = (site.shape.tile_rows, splits(site.shape.d_in));
    let name = || format!("lora_shrink {:?} {:?}", site.elem, site.shape);
    let mut worst = 0.0f64;
    for (item, slice, split) in planes(site, batch.items.len()) {
        let (index, item) = (item, &batch.items[item]);
        let desc = site.desc(item, slice);
        for row in 0..tile_rows {
            let got = &v[batch.v_at(index, slice, split, row)..][..RANK_BLOCK];
            let row_count = item.row_count as usize;
            if desc.is_none() || row >= row_count.next_multiple_of(8) {
                let untouched = got.iter().all(|&bits| bits == UNTOUCHED);
                expect(untouched, || format!("{}: item {index} slice {slice} row {row} was written", name()))?;
            } else if row >= row_count {
                let zero = got.iter().all(|&bits| bits == 0);
                expect(zero, || format!("{}: item {index} slice {slice} row {row} is not zero", name()))?;
            } else if let (Some(desc), 0) = (desc, split) {
                let x_row = &x[(item.first_row as usize + row) * stride..][..site.shape.d_in];
                for (rank, (want, size)) in batch.products(&desc, x_row).into_iter().enumerate() {
                    let part = |split| f32::from_bits(v[batch.v_at(index, slice, split, row) + rank]);
                    let got: f64 = (0..splits).map(|split| f64::from(part(split))).sum();
                    // A rank behind the adapter's own has no terms and must give zero.
                    let error = if size == 0.0 { got.abs() } else { (got - want).abs() / size };
                    expect(error <= TOLERANCE, || {
                        format!("{}: item {index} slice {slice} row {row} rank {rank}: got {got}, want {want}", name())
                    })?;
                    worst = worst.max(error);
                }
            }
        }
    }
    let behind = &v[batch.v_at(batch.items.len(), 0, 0, 0)..];
    expect(behind.iter().all(|&bits| bits == UNTOUCHED), || format!("{}: wrote behind the items", name()))?;
    Ok(worst)
}
