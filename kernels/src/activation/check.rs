//! The kernel against the formula.

use super::cuda::SiluMulKernel;
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Random, Summary, expect};

/// Compares values on several shapes; what lies behind the rows must stay as it was.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let shapes: &[(usize, usize)] = match checker.effort {
        Effort::Quick => &[(3, 512)],
        Effort::Full => &[(1, 8), (3, 512), (17, 1536), (64, 14336)],
    };
    let (mut worst, mut cases) = (0.0f64, 0);
    for elem in [Elem::Bf16, Elem::F16] {
        for &(rows, width) in shapes {
            worst = worst.max(one(checker, elem, rows, width)?);
            cases += 1;
        }
    }
    Ok(Summary { cases, worst, unit: "of |out|, in units of the type's epsilon" })
}

fn one(checker: &Checker, elem: Elem, rows: usize, width: usize) -> Result<f64, CheckError> {
    let device = &*checker.device;
    let kernel = SiluMulKernel::load(device, elem, width)?;
    let input = Random::new(width as u64).elems(elem, rows * 2 * width, 6.0);
    let (gate_up, out) = (checker.buffer(&input)?, checker.poisoned((rows + 1) * width * 2)?);
    // SAFETY: both buffers are as large as the shape says.
    unsafe { kernel.launch(device, checker.stream, out.address(), gate_up.address(), rows)? };
    let got: Vec<u16> = out.read(checker.stream, 0, (rows + 1) * width)?;
    expect(got[rows * width..].iter().all(|&bits| bits == 0xffff), || "silu_mul wrote behind the rows".into())?;
    let mut worst = 0.0f64;
    for row in 0..rows {
        for i in 0..width {
            let at = |column: usize| f64::from(elem.from_bits(input[row * 2 * width + column]));
            let (gate, up) = (at(i), at(width + i));
            let want = gate / (1.0 + (-gate).exp()) * up;
            let got = f64::from(elem.from_bits(got[row * width + i]));
            let error = (got - want).abs() / (want.abs() + 1e-3) / elem.epsilon();
            expect(error <= 1.0, || format!("silu_mul {elem:?} row {row} column {i}: got {got}, want {want}"))?;
            worst = worst.max(error);
        }
    }
    Ok(worst)
}
