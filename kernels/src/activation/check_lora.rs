//! The kernel with LoRA deltas against the formula, and against the plain kernel in rows without adapter.

use super::cuda::SiluMulKernel;
use super::cuda_lora::SiluMulLoraKernel;
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Random, Summary, expect};
use crate::device::lora::{DECODE_TILE_ROWS, SiteShape};
use crate::lora_shrink::batch::{Batch, Run, Site, mixes, rows_of};

/// Type, inputs of gate and up, and outputs of each.
type Case = (Elem, usize, usize);

/// Compares values on several shapes and mixes of adapters; rows without adapter must get the plain kernel's bits, every row
/// those that it gets alone.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let cases: &[Case] = match checker.effort {
        Effort::Quick => &[(Elem::Bf16, 4096, 1024)],
        Effort::Full => &[(Elem::Bf16, 192, 512), (Elem::F16, 576, 1536), (Elem::Bf16, 4096, 80)],
    };
    let (mut worst, mut count) = (0.0f64, 0);
    for &(elem, d_in, width) in cases {
        let cols = [(0, width), (width, width)];
        let site = Site::new(checker, elem, SiteShape { d_in, cols: &cols, tile_rows: DECODE_TILE_ROWS })?;
        let silu = SiluLora { site: &site, width };
        for runs in mixes(DECODE_TILE_ROWS) {
            worst = worst.max(silu.compare(&runs)?);
            silu.rows_alone(&runs)?;
            count += 2;
        }
    }
    Ok(Summary { cases: count, worst, unit: "of the rounding of the result and of f32 sums" })
}

struct SiluLora<'a> {
    site: &'a Site<'a>,
    width: usize,
}

impl SiluLora<'_> {
    fn name(&self) -> String {
        format!("silu_mul_lora {:?} d_in {} width {}", self.site.elem, self.site.shape.d_in, self.width)
    }

    /// Gate and up of the rows, with values that saturate and zeros of both signs among them.
    fn inputs(&self, rows: usize) -> Vec<u16> {
        let mut values = Random::new(21).elems(self.site.elem, rows * 2 * self.width, 6.0);
        values.iter_mut().step_by(37).for_each(|bits| *bits &= 0x8000);
        values
    }

    /// The result, and one row behind it.
    fn launch(&self, batch: &Batch<'_>, gate_up: &[u16], blocks: usize) -> Result<Vec<u16>, CheckError> {
        let (checker, device) = (self.site.checker, &*self.site.checker.device);
        let (elem, d_in) = (self.site.elem, self.site.shape.d_in);
        let mut kernel = SiluMulLoraKernel::load(device, elem, d_in, self.width, batch.tiles.len())?;
        if blocks > 0 {
            kernel.blocks = blocks;
        }
        let gate_up = checker.buffer(gate_up)?;
        let out = checker.poisoned((batch.rows + 1) * self.width * 2)?;
        // SAFETY: the lists are the batch's own; the buffers have its rows.
        unsafe { kernel.launch(device, checker.stream, &batch.work(), out.address(), gate_up.address())? };
        let got = out.read(checker.stream, 0, (batch.rows + 1) * self.width)?;
        let behind = got[batch.rows * self.width..].iter().all(|&bits| bits == 0xffff);
        expect(behind, || format!("{}: wrote behind the rows", self.name()))?;
        Ok(got)
    }

    fn compare(&self, runs: &[Run]) -> Result<f64, CheckError> {
        let (checker, elem) = (self.site.checker, self.site.elem);
        let batch = self.site.batch(runs)?;
        let deltas = batch.random_v(3)?;
        let gate_up = self.inputs(batch.rows);
        let got = self.launch(&batch, &gate_up, 0)?;
        for blocks in [1, 3, 1000] {
            let again = self.launch(&batch, &gate_up, blocks)?;
            expect(again == got, || format!("{}: {blocks} blocks give other bits", self.name()))?;
        }
        let plain = SiluMulKernel::load(&*checker.device, elem, self.width)?;
        let (input, out) = (checker.buffer(&gate_up)?, checker.poisoned(got.len() * 2)?);
        // SAFETY: both buffers have the batch's rows.
        unsafe { plain.launch(&*checker.device, checker.stream, out.address(), input.address(), batch.rows)? };
        let plain: Vec<u16> = out.read(checker.stream, 0, got.len())?;
        let mut worst = 0.0f64;
        for (tile, row) in batch.tiles.iter().flat_map(|tile| rows_of(tile).map(move |row| (tile, row))) {
            let of_row = row * self.width..(row + 1) * self.width;
            if tile.item_count == 0 {
                let same = got[of_row.clone()] == plain[of_row.clone()];
                expect(same, || format!("{}: row {row} without adapter has other bits", self.name()))?;
            }
            let row_of = |column: usize| f64::from(elem.from_bits(gate_up[row * 2 * self.width + column]));
            for (column, at) in of_row.enumerate() {
                let part = |slice: usize| {
                    let (delta, size) = batch.delta(&deltas, tile, slice, row, column).unwrap_or((0.0, 0.0));
                    (row_of(slice * self.width + column) + delta, size * 1e-5)
                };
                let ((gate, gate_error), (up, up_error)) = (part(0), part(1));
                let silu = gate / (1.0 + (-gate).exp());
                let (got, want) = (f64::from(elem.from_bits(got[at])), silu * up);
                let rounding = want.abs() * (elem.epsilon() / 2.0 + 2e-6) + 6e-8;
                let limit = rounding + 1.1 * gate_error * up.abs() + silu.abs() * up_error;
                expect((got - want).abs() <= limit, || {
                    format!("{}: row {row} column {column}: got {got}, want {want}", self.name())
                })?;
                worst = worst.max((got - want).abs() / limit);
            }
        }
        Ok(worst)
    }

    /// Behind the shrink, so that V is the rows' own: the last row of each run, alone.
    fn rows_alone(&self, runs: &[Run]) -> Result<(), CheckError> {
        let (batch, stride) = (self.site.batch(runs)?, self.site.shape.d_in);
        let (x, gate_up) = (batch.inputs(stride, 4), self.inputs(batch.rows));
        batch.shrink(&x, stride)?;
        let got = self.launch(&batch, &gate_up, 0)?;
        let mut row = 0;
        for run in runs {
            row += run.rows;
            let alone = self.site.batch(&[Run { rows: 1, ..run.clone() }])?;
            alone.shrink(&x[(row - 1) * stride..row * stride], stride)?;
            let inputs = &gate_up[(row - 1) * 2 * self.width..row * 2 * self.width];
            let got_alone = self.launch(&alone, inputs, 0)?;
            let same = got_alone[..self.width] == got[(row - 1) * self.width..row * self.width];
            expect(same, || format!("{}: row {} has other bits alone", self.name(), row - 1))?;
        }
        Ok(())
    }
}
