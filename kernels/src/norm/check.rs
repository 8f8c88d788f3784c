//! The kernel against the formula, and a row in a batch against the same row alone.

use super::cuda::{RmsNormBuffers, RmsNormKernel};
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Random, Summary, expect};

/// Rows, width, most blocks (0: as the kernel has it).
const SHAPES: &[(usize, usize, usize)] =
    &[(5, 576, 0), (1, 8, 0), (3, 192, 1), (4, 896, 20), (2, 2048, 0), (3, 2056, 2), (2, 4096, 1), (2, 14336, 0)];

const EPS: f32 = 1e-5;

/// Compares values with and without the addition; the residual must be exact.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let shapes = if checker.effort == Effort::Quick { &SHAPES[..1] } else { SHAPES };
    let (mut worst, mut cases) = (0.0f64, 0);
    for &(rows, width, blocks) in shapes {
        for elem in [Elem::Bf16, Elem::F16] {
            for with_y in [false, true] {
                let case = Case::new(elem, rows, width, with_y);
                let (residual, out) = case.run(checker, 0..rows, blocks)?;
                worst = worst.max(case.compare(&residual, &out)?);
                let last = rows - 1;
                let (_, alone) = case.run(checker, last..rows, 1)?;
                expect(alone[..] == out[last * width..], || {
                    format!("rms_norm {elem:?}, width {width}: the last of {rows} rows has other bits alone")
                })?;
                cases += 2;
            }
        }
    }
    Ok(Summary { cases, worst, unit: "of |out|, in units of the type's epsilon" })
}

struct Case {
    elem: Elem,
    width: usize,
    residual: Vec<u16>,
    y: Option<Vec<u16>>,
    weight: Vec<f32>,
}

impl Case {
    fn new(elem: Elem, rows: usize, width: usize, with_y: bool) -> Self {
        let mut random = Random::new((rows * width) as u64);
        let residual = random.elems(elem, rows * width, 30.0);
        let y = with_y.then(|| random.elems(elem, rows * width, 5.0));
        let weight = (0..width).map(|_| 1.0 + random.uniform()).collect();
        Self { elem, width, residual, y, weight }
    }

    /// The residual and the result of these rows; there is a NaN row behind every buffer.
    fn run(
        &self,
        checker: &Checker,
        rows: std::ops::Range<usize>,
        blocks: usize,
    ) -> Result<(Vec<u16>, Vec<u16>), CheckError> {
        let device = &*checker.device;
        let mut kernel = RmsNormKernel::load(device, self.elem, self.width, EPS)?;
        if blocks > 0 {
            kernel.blocks_max = blocks;
        }
        let (count, width) = (rows.len(), self.width);
        let part = |all: &[u16]| {
            let mut part = all[rows.start * width..rows.end * width].to_vec();
            part.resize((count + 1) * width, 0xffff);
            part
        };
        let residual = checker.buffer(&part(&self.residual))?;
        let y = self.y.as_ref().map(|y| checker.buffer(&part(y))).transpose()?;
        let weight = checker.buffer(&self.weight)?;
        let out = checker.poisoned((count + 1) * width * 2)?;
        let buffers = RmsNormBuffers {
            residual: residual.address(),
            y: y.as_ref().map(crate::device::DeviceBuffer::address),
            weight: weight.address(),
            out: out.address(),
        };
        // SAFETY: the buffers are as large as the shape says.
        unsafe { kernel.launch(device, checker.stream, &buffers, count)? };
        let mut results = Vec::new();
        for buffer in [&residual, &out] {
            let mut got: Vec<u16> = buffer.read(checker.stream, 0, (count + 1) * width)?;
            expect(got[count * width..].iter().all(|&bits| bits == 0xffff), || {
                format!("rms_norm {:?}, width {width}: wrote behind the rows", self.elem)
            })?;
            got.truncate(count * width);
            results.push(got);
        }
        let out = results.pop().unwrap_or_default();
        Ok((results.pop().unwrap_or_default(), out))
    }

    /// Largest error.
    fn compare(&self, residual: &[u16], out: &[u16]) -> Result<f64, CheckError> {
        let Self { elem, width, .. } = *self;
        let mut worst = 0.0f64;
        let before = self.residual.chunks(width);
        for (row, ((before, residual), out)) in before.zip(residual.chunks(width)).zip(out.chunks(width)).enumerate() {
            let value = |bits: u16| elem.from_bits(bits);
            let added = |k: usize| self.y.as_ref().map_or(0.0, |y| value(y[row * width + k]));
            // A sum of two 16-bit floats of like size is exact in f32, so there is one rounding.
            let wrong = (0..width).find(|&k| elem.to_bits(value(before[k]) + added(k)) != residual[k]);
            expect(wrong.is_none(), || format!("rms_norm {elem:?}, width {width}: residual, row {row} at {wrong:?}"))?;
            let squares: f64 = residual.iter().map(|&x| f64::from(value(x)).powi(2)).sum();
            let r = 1.0 / (squares / width as f64 + f64::from(EPS)).sqrt();
            for k in 0..width {
                let want = f64::from(value(residual[k])) * r * f64::from(self.weight[k]);
                let got = f64::from(value(out[k]));
                let error = (got - want).abs() / (want.abs() + 1e-3) / elem.epsilon();
                expect(error <= 0.6, || {
                    format!("rms_norm {elem:?}, width {width}, row {row}, column {k}: got {got}, want {want}")
                })?;
                worst = worst.max(error);
            }
        }
        Ok(worst)
    }
}
