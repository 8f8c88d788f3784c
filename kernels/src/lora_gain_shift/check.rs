//! The kernel against the formula in double precision.

use super::cuda::GainShiftKernel;
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Random, Summary, expect};
use crate::device::lora::SiteShape;
use crate::lora_shrink::batch::{Batch, Site, mixes, rows_of};

/// Largest error of f32 sums, of the sum of absolute terms.
const SUM_TOLERANCE: f64 = 1e-6;

/// Smallest step of f16, which has no smaller relative one near zero.
const ABSOLUTE: f64 = 6e-8;

/// Elements behind the last column of y.
const GAP: usize = 16;

/// A site: its type, inputs and columns.
type Case = (Elem, usize, &'static [(usize, usize)]);

/// Compares values on several sites and mixes of adapters; rows and matrices without vectors must keep their bits.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let cases: &[Case] = match checker.effort {
        Effort::Quick => &[(Elem::Bf16, 4096, &[(0, 4096), (4096, 1024), (5120, 1024)])],
        Effort::Full => &[
            (Elem::Bf16, 192, &[(0, 192), (192, 64), (256, 64)]),
            (Elem::F16, 576, &[(0, 576), (576, 192), (768, 192)]),
            (Elem::F16, 192, &[(0, 16), (24, 48)]),
            (Elem::Bf16, 512, &[(0, 96)]),
        ],
    };
    let (mut worst, mut count) = (0.0f64, 0);
    for &(elem, d_in, cols) in cases {
        for tile_rows in [8, 64] {
            let site = Site::new(checker, elem, SiteShape { d_in, cols, tile_rows })?;
            for runs in mixes(tile_rows) {
                worst = worst.max(one(&site, &site.batch(&runs)?)?);
                count += 1;
            }
        }
    }
    Ok(Summary { cases: count, worst, unit: "of the rounding of y and of f32 sums" })
}

fn one(site: &Site<'_>, batch: &Batch<'_>) -> Result<f64, CheckError> {
    let (checker, elem, cols) = (site.checker, site.elem, site.shape.cols);
    let stride = cols.iter().map(|&(first, d_out)| first + d_out).max().unwrap_or(0) + GAP;
    let y = Random::new(5).elems(elem, batch.rows * stride, 2.0);
    let mut kernel = GainShiftKernel::load(&*checker.device, elem, site.shape, batch.tiles.len())?;
    let mut got: Option<Vec<u16>> = None;
    for blocks in [kernel.blocks, 1, 7] {
        kernel.blocks = blocks;
        let y_device = checker.buffer(&y)?;
        // SAFETY: the lists are the batch's own; y has its rows and the columns of the site.
        unsafe { kernel.launch(&*checker.device, checker.stream, &batch.work(), y_device.address(), stride)? };
        let again: Vec<u16> = y_device.read(checker.stream, 0, y.len())?;
        let same = *got.get_or_insert_with(|| again.clone()) == again;
        expect(same, || format!("lora_gain_shift {elem:?}: {blocks} blocks give other bits"))?;
    }
    let got = got.unwrap_or_default();
    let (mut worst, mut changed) = (0.0f64, vec![false; y.len()]);
    for (tile, row) in batch.tiles.iter().flat_map(|tile| rows_of(tile).map(move |row| (tile, row))) {
        let items = &batch.items[tile.first_item as usize..][..tile.item_count as usize];
        for (slice, &(first, d_out)) in cols.iter().enumerate() {
            let vectors: Vec<_> =
                items.iter().filter_map(|item| Some((item.scale, site.vectors(item, slice)?))).collect();
            for output in (0..d_out).filter(|_| !vectors.is_empty()) {
                let at = row * stride + first + output;
                let before = f64::from(elem.from_bits(y[at]));
                let (mut want, mut size) = (before, before.abs());
                for (scale, values) in &vectors {
                    let (gain, shift) = (f64::from(values[output]), f64::from(values[d_out + output]));
                    want += f64::from(*scale) * (gain * before + shift);
                    size += f64::from(scale.abs()) * ((gain * before).abs() + shift.abs());
                }
                let got = f64::from(elem.from_bits(got[at]));
                let limit = want.abs() * elem.epsilon() / 2.0 + size * SUM_TOLERANCE + ABSOLUTE;
                expect((got - want).abs() <= limit, || {
                    format!("lora_gain_shift {elem:?}: row {row} column {}: got {got}, want {want}", first + output)
                })?;
                worst = worst.max((got - want).abs() / limit);
                changed[at] = true;
            }
        }
    }
    let kept = (0..y.len()).find(|&at| !changed[at] && got[at] != y[at]);
    expect(kept.is_none(), || format!("lora_gain_shift {elem:?}: element {kept:?} of no vectors was written"))?;
    Ok(worst)
}
