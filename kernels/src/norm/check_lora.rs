//! The kernel with LoRA deltas against the formula, and against the plain kernel in rows without adapter.

use super::cuda::{RmsNormBuffers, RmsNormKernel};
use super::cuda_lora::AddRmsNormLoraKernel;
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Random, Summary, expect};
use crate::device::lora::{DECODE_TILE_ROWS, SiteShape};
use crate::lora_shrink::batch::{Batch, Run, Site, mixes, rows_of};

const EPS: f32 = 1e-5;

/// Type, inputs of the site and width of the rows.
type Case = (Elem, usize, usize);

/// Compares values on several shapes and mixes of adapters; rows without adapter must get the plain kernel's bits, every row
/// those that it gets alone.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let cases: &[Case] = match checker.effort {
        Effort::Quick => &[(Elem::Bf16, 4096, 4096)],
        Effort::Full => {
            &[(Elem::Bf16, 512, 192), (Elem::F16, 576, 576), (Elem::Bf16, 4864, 896), (Elem::F16, 32, 2064)]
        }
    };
    let (mut worst, mut count) = (0.0f64, 0);
    for &(elem, d_in, width) in cases {
        let cols = [(0, width)];
        let site = Site::new(checker, elem, SiteShape { d_in, cols: &cols, tile_rows: DECODE_TILE_ROWS })?;
        let weight = (0..width).map(|i| 0.5 + (i % 7) as f32 / 4.0).collect();
        let norm = NormLora { site: &site, width, weight };
        for runs in mixes(DECODE_TILE_ROWS) {
            worst = worst.max(norm.compare(&runs)?);
            norm.rows_alone(&runs)?;
            count += 2;
        }
    }
    Ok(Summary { cases: count, worst, unit: "of the rounding of residual and result" })
}

struct NormLora<'a> {
    site: &'a Site<'a>,
    width: usize,
    weight: Vec<f32>,
}

/// Residual and result.
type Results = (Vec<u16>, Vec<u16>);

impl NormLora<'_> {
    fn name(&self) -> String {
        format!("add_rms_norm_lora {:?} d_in {} width {}", self.site.elem, self.site.shape.d_in, self.width)
    }

    /// Residual and y of the rows; one of them holds zeros of both signs.
    fn inputs(&self, rows: usize) -> Results {
        let mut random = Random::new(31);
        let residual = random.elems(self.site.elem, rows * self.width, 4.0);
        let mut y = random.elems(self.site.elem, rows * self.width, 2.0);
        y.iter_mut().step_by(29).for_each(|bits| *bits &= 0x8000);
        (residual, y)
    }

    /// Launches with one NaN row behind each buffer that is written, which must stay. No number of blocks: the plain kernel.
    fn launch(
        &self,
        batch: &Batch<'_>,
        inputs: (&[u16], &[u16]),
        blocks: Option<usize>,
    ) -> Result<Results, CheckError> {
        let (checker, device) = (self.site.checker, &*self.site.checker.device);
        let (elem, d_in, width) = (self.site.elem, self.site.shape.d_in, self.width);
        let padded: Vec<u16> = inputs.0.iter().copied().chain(vec![0xffff; width]).collect();
        let (residual, y) = (checker.buffer(&padded)?, checker.buffer(inputs.1)?);
        let (weight, out) = (checker.buffer(&self.weight)?, checker.poisoned(padded.len() * 2)?);
        let buffers = RmsNormBuffers {
            residual: residual.address(),
            y: Some(y.address()),
            weight: weight.address(),
            out: out.address(),
        };
        if let Some(blocks) = blocks {
            let tiles_max = batch.tiles.len();
            let mut kernel = AddRmsNormLoraKernel::load(device, elem, (d_in, width), tiles_max, EPS)?;
            if blocks > 0 {
                kernel.blocks = blocks;
            }
            // SAFETY: the lists are the batch's own; the buffers have its rows.
            unsafe { kernel.launch(device, checker.stream, &batch.work(), &buffers)? };
        } else {
            let kernel = RmsNormKernel::load(device, elem, width, EPS)?;
            // SAFETY: the buffers have the batch's rows.
            unsafe { kernel.launch(device, checker.stream, &buffers, batch.rows)? };
        }
        let results =
            (residual.read::<u16>(checker.stream, 0, padded.len())?, out.read::<u16>(checker.stream, 0, padded.len())?);
        for values in [&results.0, &results.1] {
            let behind = values[batch.rows * width..].iter().all(|&bits| bits == 0xffff);
            expect(behind, || format!("{}: wrote behind the rows", self.name()))?;
        }
        Ok(results)
    }

    fn compare(&self, runs: &[Run]) -> Result<f64, CheckError> {
        let (elem, width) = (self.site.elem, self.width);
        let batch = self.site.batch(runs)?;
        let deltas = batch.random_v(3)?;
        let (before, y) = self.inputs(batch.rows);
        let (residual, out) = self.launch(&batch, (&before, &y), Some(0))?;
        for blocks in [1, 1000] {
            let again = self.launch(&batch, (&before, &y), Some(blocks))?;
            let same = again.0 == residual && again.1 == out;
            expect(same, || format!("{}: {blocks} blocks give other bits", self.name()))?;
        }
        let plain = self.launch(&batch, (&before, &y), None)?;
        let value = |bits: u16| f64::from(elem.from_bits(bits));
        let half = elem.epsilon() / 2.0;
        let mut worst = 0.0f64;
        for (tile, row) in batch.tiles.iter().flat_map(|tile| rows_of(tile).map(move |row| (tile, row))) {
            let of_row = row * width..(row + 1) * width;
            if tile.item_count == 0 {
                let same = |ours: &[u16], plain: &[u16]| ours[of_row.clone()] == plain[of_row.clone()];
                expect(same(&residual, &plain.0) && same(&out, &plain.1), || {
                    format!("{}: row {row} without adapter has other bits", self.name())
                })?;
            }
            let squares: f64 = residual[of_row.clone()].iter().map(|&bits| value(bits).powi(2)).sum();
            let r = 1.0 / (squares / width as f64 + f64::from(EPS)).sqrt();
            for (column, at) in of_row.enumerate() {
                let (delta, size) = batch.delta(&deltas, tile, 0, row, column).unwrap_or((0.0, 0.0));
                let want = value(before[at]) + value(y[at]) + delta;
                let limit = want.abs() * half + (size + want.abs()) * 1e-5 + 6e-8;
                let error = (value(residual[at]) - want).abs() / limit;
                // The norm of the residual as it is stored.
                let normed = value(residual[at]) * r * f64::from(self.weight[column]);
                let out_error = (value(out[at]) - normed).abs() / (normed.abs() * (half + 1e-5) + 6e-8);
                expect(error <= 1.0 && out_error <= 1.0, || {
                    let (residual, out) = (value(residual[at]), value(out[at]));
                    format!("{}: row {row} column {column}: {residual}, want {want}; {out}, want {normed}", self.name())
                })?;
                worst = worst.max(error).max(out_error);
            }
        }
        Ok(worst)
    }

    /// Behind the shrink, so that V is the rows' own: the last row of each run, alone.
    fn rows_alone(&self, runs: &[Run]) -> Result<(), CheckError> {
        let (batch, stride, width) = (self.site.batch(runs)?, self.site.shape.d_in, self.width);
        let (x, (residual, y)) = (batch.inputs(stride, 4), self.inputs(batch.rows));
        batch.shrink(&x, stride)?;
        let got = self.launch(&batch, (&residual, &y), Some(0))?;
        let mut row = 0;
        for run in runs {
            row += run.rows;
            let of_row = (row - 1) * width..row * width;
            let alone = self.site.batch(&[Run { rows: 1, ..run.clone() }])?;
            alone.shrink(&x[(row - 1) * stride..row * stride], stride)?;
            let inputs = (&residual[of_row.clone()], &y[of_row.clone()]);
            let got_alone = self.launch(&alone, inputs, Some(0))?;
            let same = got_alone.0[..width] == got.0[of_row.clone()] && got_alone.1[..width] == got.1[of_row];
            expect(same, || format!("{}: row {} has other bits alone", self.name(), row - 1))?;
        }
        Ok(())
    }
}
