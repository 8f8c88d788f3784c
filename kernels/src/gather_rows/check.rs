//! The kernel against the gather that it is.

use super::cuda::{GatherBuffers, GatherRowsKernel};
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Random, Summary, expect};
use crate::device::step::StepCounts;

/// Places, rows that are wanted, rows there are, width, most blocks (0: as the kernel has it).
const SHAPES: &[(usize, usize, usize, usize, usize)] =
    &[(4, 3, 9, 576, 0), (1, 0, 1, 8, 0), (16, 16, 40, 192, 1), (8, 2, 3, 896, 50), (2, 2, 256, 4096, 3)];

/// Compares bits; places behind the count get row 0.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let shapes = if checker.effort == Effort::Quick { &SHAPES[..1] } else { SHAPES };
    for &shape in shapes {
        one(checker, shape)?;
    }
    Ok(Summary { cases: shapes.len(), worst: 0.0, unit: "bits" })
}

fn one(
    checker: &Checker,
    (places, wanted, rows_total, width, blocks): (usize, usize, usize, usize, usize),
) -> Result<(), CheckError> {
    let device = &*checker.device;
    let mut kernel = GatherRowsKernel::load(device, Elem::Bf16, width)?;
    if blocks > 0 {
        kernel.blocks_max = blocks;
    }
    let mut random = Random::new((places * width) as u64);
    let rows: Vec<u16> = (0..rows_total * width).map(|_| random.word() as u16).collect();
    // What lies behind the count is not to be used.
    let mut index = vec![rows_total as u32 - 1; places];
    index[..wanted].fill_with(|| random.below(rows_total) as u32);
    if wanted > 1 {
        index[1] = rows_total as u32 + 3; // no such row
    }
    let counts = StepCounts { sample_rows: wanted as u32, ..StepCounts::default() };
    let picked = checker.poisoned((places + 1) * width * 2)?;
    let (rows_device, index_device, counts_device) =
        (checker.buffer(&rows)?, checker.buffer(&index)?, checker.buffer(&[counts])?);
    let buffers = GatherBuffers {
        picked: picked.address(),
        rows: rows_device.address(),
        index: index_device.address(),
        counts: counts_device.address(),
    };
    // SAFETY: the buffers are as large as the shape says.
    unsafe { kernel.launch(device, checker.stream, &buffers, places, rows_total)? };
    let got: Vec<u16> = picked.read(checker.stream, 0, (places + 1) * width)?;
    expect(got[places * width..].iter().all(|&bits| bits == 0xffff), || "gather_rows wrote behind the places".into())?;
    for place in 0..places {
        let row = index[place] as usize;
        let row = if place < wanted && row < rows_total { row } else { 0 };
        expect(got[place * width..][..width] == rows[row * width..][..width], || {
            format!("gather_rows, width {width}: place {place} of {wanted} is not row {row}")
        })?;
    }
    Ok(())
}
