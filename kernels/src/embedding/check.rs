//! The kernel against the gather that it is.

use super::cuda::{EmbeddingBuffers, EmbeddingKernel};
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Random, Summary, expect};
use crate::device::step::FROM_DEVICE;

/// Rows, width, tokens of the table, most blocks (0: as the kernel has it).
const SHAPES: &[(usize, usize, usize, usize)] =
    &[(3, 576, 50, 0), (1, 8, 1, 0), (17, 192, 300, 1), (5, 896, 9, 40), (64, 4096, 11, 3)];

/// Compares bits: tokens of the host and of the device, also such as are not in the table.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let shapes = if checker.effort == Effort::Quick { &SHAPES[..1] } else { SHAPES };
    for &shape in shapes {
        for elem in [Elem::Bf16, Elem::F16] {
            one(checker, elem, shape)?;
        }
    }
    Ok(Summary { cases: 2 * shapes.len(), worst: 0.0, unit: "bits" })
}

fn one(
    checker: &Checker,
    elem: Elem,
    (rows, width, vocab, blocks): (usize, usize, usize, usize),
) -> Result<(), CheckError> {
    let device = &*checker.device;
    let slots = 7;
    let mut kernel = EmbeddingKernel::load(device, elem, width, vocab, slots)?;
    if blocks > 0 {
        kernel.blocks_max = blocks;
    }
    let mut random = Random::new((rows * width) as u64);
    let table: Vec<u16> = (0..vocab * width).map(|_| random.word() as u16).collect();
    let last: Vec<u32> = (0..slots).map(|slot| if slot == 3 { u32::MAX } else { random.below(vocab) as u32 }).collect();
    let tokens: Vec<u32> = (0..rows)
        .map(|row| match row % 5 {
            0 | 1 => random.below(vocab) as u32,
            2 => FROM_DEVICE | random.below(slots) as u32,
            3 => vocab as u32 + random.below(9) as u32,
            _ => FROM_DEVICE | (slots + random.below(9)) as u32,
        })
        .collect();
    let out = checker.poisoned((rows + 1) * width * 2)?;
    let (table_device, tokens_device, last_device) =
        (checker.buffer(&table)?, checker.buffer(&tokens)?, checker.buffer(&last)?);
    let buffers = EmbeddingBuffers {
        out: out.address(),
        table: table_device.address(),
        tokens: tokens_device.address(),
        last_token: last_device.address(),
    };
    // SAFETY: the buffers are as large as the shape says.
    unsafe { kernel.launch(device, checker.stream, &buffers, rows)? };
    let got: Vec<u16> = out.read(checker.stream, 0, (rows + 1) * width)?;
    expect(got[rows * width..].iter().all(|&bits| bits == 0xffff), || "embedding wrote behind the rows".into())?;
    for (row, &entry) in tokens.iter().enumerate() {
        let token = match entry & FROM_DEVICE {
            0 => entry,
            _ => last.get((entry & !FROM_DEVICE) as usize).copied().unwrap_or(0),
        };
        let token = if (token as usize) < vocab { token as usize } else { 0 };
        expect(got[row * width..][..width] == table[token * width..][..width], || {
            format!(
                "embedding {elem:?}, width {width}: row {row} with entry {entry:#x} is not row {token} of the table"
            )
        })?;
    }
    Ok(())
}
