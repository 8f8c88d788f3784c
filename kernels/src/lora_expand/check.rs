//! The kernel against the formula in double precision, alone and behind the shrink.

use super::cuda::ExpandAddKernel;
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Random, Summary, expect};
use crate::device::lora::{PREFILL_TILE_ROWS, SiteShape};
use crate::lora_shrink::batch::{Batch, Deltas, Run, Site, mixes, rows_of};

/// Largest error of f32 sums, of the sum of absolute terms.
const SUM_TOLERANCE: f64 = 1e-5;

/// Smallest step of f16, which has no smaller relative one near zero.
const ABSOLUTE: f64 = 6e-8;

/// Elements behind the last column of y.
const GAP: usize = 16;

/// A site: its type, inputs and columns.
type Case = (Elem, usize, &'static [(usize, usize)]);

/// Compares values on several sites, mixes of adapters and tilings; what no item targets must keep its bits, and a row must
/// get the bits that it gets alone.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let cases: &[Case] = match checker.effort {
        Effort::Quick => &[(Elem::Bf16, 4096, &[(0, 4096), (4096, 1024), (5120, 1024)])],
        Effort::Full => &[
            (Elem::Bf16, 192, &[(0, 192), (192, 64), (256, 64)]),
            (Elem::F16, 576, &[(0, 576), (576, 192), (768, 192)]),
            (Elem::Bf16, 4864, &[(0, 896)]),
            (Elem::F16, 192, &[(0, 16), (24, 48)]),
        ],
    };
    let (mut worst, mut count) = (0.0f64, 0);
    for &(elem, d_in, cols) in cases {
        let mut bits = None;
        // Decode and prefill, each with its own width of a lane's run; the other two combinations on one site.
        for (tile_rows, run) in [(8, 8), (64, 4), (8, 4), (64, 8)].into_iter().take(if d_in == 192 { 4 } else { 2 }) {
            let site = Site::new(checker, elem, SiteShape { d_in, cols, tile_rows })?;
            for runs in mixes(tile_rows) {
                worst = worst.max(Expand { site: &site, run }.alone(&runs)?);
                count += 1;
            }
            let got = Expand { site: &site, run }.behind_the_shrink()?;
            let same = *bits.get_or_insert_with(|| got.clone()) == got;
            expect(same, || {
                format!("lora_expand_add {elem:?} d_in {d_in}: tiles of {tile_rows} rows give other bits")
            })?;
            count += 1;
        }
    }
    Ok(Summary { cases: count, worst, unit: "of |y| / 2 + the products' rounding" })
}

struct Expand<'a> {
    site: &'a Site<'a>,
    run: usize,
}

impl Expand<'_> {
    fn name(&self) -> String {
        format!("lora_expand_add {:?} {:?} runs of {}", self.site.elem, self.site.shape, self.run)
    }

    fn stride(&self) -> usize {
        self.site.shape.cols.iter().map(|&(first, d_out)| first + d_out).max().unwrap_or(0) + GAP
    }

    /// `y` with random values, and a NaN that no arithmetic makes wherever nothing is to be added: in rows without items,
    /// in matrices that no item targets, between the matrices and behind them.
    fn outputs(&self, batch: &Batch<'_>) -> Vec<u16> {
        let (site, stride, mut random) = (self.site, self.stride(), Random::new(11));
        let mut y = vec![0xff81; batch.rows * stride];
        for (tile, row) in batch.tiles.iter().flat_map(|tile| rows_of(tile).map(move |row| (tile, row))) {
            let items = &batch.items[tile.first_item as usize..][..tile.item_count as usize];
            for (slice, &(first, d_out)) in site.shape.cols.iter().enumerate() {
                if items.iter().any(|item| site.desc(item, slice).is_some()) {
                    let values = random.elems(site.elem, d_out, 2.0);
                    y[row * stride + first..][..d_out].copy_from_slice(&values);
                }
            }
        }
        y
    }

    /// `y` after the launch.
    fn launch(&self, batch: &Batch<'_>, y: &[u16], blocks: usize) -> Result<Vec<u16>, CheckError> {
        let (checker, device) = (self.site.checker, &*self.site.checker.device);
        let (elem, shape) = (self.site.elem, self.site.shape);
        let mut kernel = ExpandAddKernel::load_with_run(device, elem, shape, batch.tiles.len(), self.run)?;
        if blocks > 0 {
            kernel.blocks = blocks;
        }
        let y_device = checker.buffer(y)?;
        // SAFETY: the lists are the batch's own; y has its rows and the columns of the site.
        unsafe { kernel.launch(device, checker.stream, &batch.work(), y_device.address(), self.stride())? };
        Ok(y_device.read(checker.stream, 0, y.len())?)
    }

    /// Random V. The reference rounds it as the kernel must, so that only the order of f32 sums and the rounding of y are
    /// left.
    fn alone(&self, runs: &[Run]) -> Result<f64, CheckError> {
        let batch = self.site.batch(runs)?;
        let deltas = batch.random_v(3)?;
        let y = self.outputs(&batch);
        let got = self.launch(&batch, &y, 0)?;
        for blocks in [1, 3, 1000] {
            let again = self.launch(&batch, &y, blocks)?;
            expect(again == got, || format!("{}: {blocks} blocks give other bits", self.name()))?;
        }
        self.compare(&batch, &deltas, &y, &got)
    }

    /// Both halves, against the product that rounds nothing in between; and rows alone.
    fn behind_the_shrink(&self) -> Result<Vec<u16>, CheckError> {
        let site = self.site;
        // The same rows whatever the tiling, so that their bits can be compared.
        let runs = mixes(PREFILL_TILE_ROWS).pop().unwrap_or_default();
        let batch = site.batch(&runs)?;
        let stride = site.shape.d_in;
        let (x, y) = (batch.inputs(stride, 9), self.outputs(&batch));
        batch.shrink(&x, stride)?;
        let got = self.launch(&batch, &y, 0)?;
        let rows = self.sums(&batch, &x, stride);
        let half = site.elem.epsilon() / 2.0;
        for (tile, row) in batch.tiles.iter().flat_map(|tile| rows_of(tile).map(move |row| (tile, row))) {
            for (slice, &(first, d_out)) in site.shape.cols.iter().enumerate() {
                for output in 0..d_out {
                    let at = row * self.stride() + first + output;
                    if y[at] == got[at] && site.elem.from_bits(y[at]).is_nan() {
                        continue; // nothing to add
                    }
                    let (mut want, mut size) = (f64::from(site.elem.from_bits(y[at])), 0.0);
                    for index in tile.first_item as usize..(tile.first_item + tile.item_count) as usize {
                        let item = &batch.items[index];
                        let Some(desc) = site.desc(item, slice) else { continue };
                        let scale = f64::from(item.scale) * f64::from(desc.scale);
                        let v = &rows[&(index, slice, row)];
                        for ((v, terms), b) in v.iter().zip(site.b(&desc, output)) {
                            want += scale * v * b;
                            size += (scale * b).abs() * (v.abs() * half + terms * SUM_TOLERANCE);
                        }
                    }
                    let got = f64::from(site.elem.from_bits(got[at]));
                    let limit = (want.abs() + size) * half * 1.01 + size * 1.01 + ABSOLUTE;
                    expect((got - want).abs() <= limit, || {
                        format!(
                            "{} behind the shrink: row {row} column {}: got {got}, want {want}",
                            self.name(),
                            first + output
                        )
                    })?;
                }
            }
        }
        self.rows_alone(&batch, &runs, (&x, stride), &y, &got)?;
        Ok(got)
    }

    /// V of each (item, matrix, row of the batch) in double precision, with the sums of absolute terms.
    fn sums(
        &self,
        batch: &Batch<'_>,
        x: &[u16],
        stride: usize,
    ) -> std::collections::HashMap<(usize, usize, usize), Vec<(f64, f64)>> {
        let mut sums = std::collections::HashMap::new();
        for (index, item) in batch.items.iter().enumerate() {
            for slice in 0..self.site.shape.cols.len() {
                let Some(desc) = self.site.desc(item, slice) else { continue };
                for row in item.first_row as usize..(item.first_row + item.row_count) as usize {
                    sums.insert((index, slice, row), batch.products(&desc, &x[row * stride..][..stride]));
                }
            }
        }
        sums
    }

    /// The last row of each run, in a batch of its own.
    fn rows_alone(
        &self,
        batch: &Batch<'_>,
        runs: &[Run],
        (x, stride): (&[u16], usize),
        y: &[u16],
        got: &[u16],
    ) -> Result<(), CheckError> {
        let mut row = 0;
        for run in runs {
            row += run.rows;
            let alone = self.site.batch(&[Run { rows: 1, ..run.clone() }])?;
            alone.shrink(&x[(row - 1) * stride..row * stride], stride)?;
            let of_row = (row - 1) * self.stride()..row * self.stride();
            let got_alone = self.launch(&alone, &y[of_row.clone()], 0)?;
            expect(got_alone == got[of_row], || {
                format!("{}: row {} of {} has other bits alone", self.name(), row - 1, batch.rows)
            })?;
        }
        Ok(())
    }

    /// Compares every element of `y`.
    fn compare(&self, batch: &Batch<'_>, deltas: &Deltas, y: &[u16], got: &[u16]) -> Result<f64, CheckError> {
        let (site, stride) = (self.site, self.stride());
        let (mut worst, mut changed) = (0.0f64, vec![false; y.len()]);
        for (tile, row) in batch.tiles.iter().flat_map(|tile| rows_of(tile).map(move |row| (tile, row))) {
            for (slice, &(first, d_out)) in site.shape.cols.iter().enumerate() {
                for output in 0..d_out {
                    let Some((delta, size)) = batch.delta(deltas, tile, slice, row, output) else { break };
                    let at = row * stride + first + output;
                    let want = f64::from(site.elem.from_bits(y[at])) + delta;
                    let got = f64::from(site.elem.from_bits(got[at]));
                    let limit = want.abs() * site.elem.epsilon() / 2.0 + size * SUM_TOLERANCE + ABSOLUTE;
                    expect((got - want).abs() <= limit, || {
                        format!("{}: row {row} column {}: got {got}, want {want}", self.name(), first + output)
                    })?;
                    worst = worst.max((got - want).abs() / limit);
                    changed[at] = true;
                }
            }
        }
        let kept = (0..y.len()).find(|&at| !changed[at] && got[at] != y[at]);
        expect(kept.is_none(), || format!("{}: element {kept:?} of no adapter was written", self.name()))?;
        Ok(worst)
    }
}
