//! The kernels against the formula.

mod fixture;

use super::AttnSpec;
use super::cuda::{AttnDecodeKernel, AttnDecodeLaunch, AttnPrefillKernel, AttnPrefillLaunch, HeadShape, KvCache};
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Random, Summary, expect};
use crate::device::step::{DecodeUnit, PrefillTile, StepCounts, decode_units};
use fixture::{Fixture, LAYER};

const UNIT: &str = "of sum |p v|, in units of the type's epsilon";

/// What is checked.
#[derive(Clone, Copy, Debug)]
struct Case {
    elem: Elem,
    shape: HeadShape,
    window: Option<usize>,
    /// Blocks of the launch.
    grid: usize,
    /// Rows of the batch that mean nothing.
    padding: usize,
}

impl Case {
    fn spec(&self) -> AttnSpec {
        let scale = 1.0 / (self.shape.head_dim as f32).sqrt();
        AttnSpec { heads: self.shape.heads, scale, window: self.window }
    }
}

const fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { heads, kv_heads, head_dim }
}

/// A shape, the window, the launch's blocks, and the rows: how many positions each sees.
type DecodeRow = (HeadShape, Option<usize>, usize, &'static [usize]);

const DECODE_QUICK: &[DecodeRow] = &[(shape(14, 2, 64), None, 5, &[1, 16, 257, 1000])];

const DECODE_FULL: &[DecodeRow] = &[
    (shape(9, 3, 64), None, 3, &[17, 1, 256, 15, 300]),
    (shape(14, 2, 64), None, 64, &[16, 257, 1000]),
    (shape(14, 2, 64), None, 4, &[]),
    (shape(6, 2, 32), Some(40), 1, &[1, 39, 41, 64, 333]),
    (shape(6, 2, 32), Some(600), 7, &[1000]),
    (shape(32, 8, 128), None, 11, &[255, 2, 33]),
    (shape(8, 1, 128), None, 2, &[513]),
    (shape(2, 2, 96), None, 3, &[18, 100]),
    (shape(16, 1, 64), None, 3, &[31, 270]),
    (shape(4, 1, 256), Some(100), 2, &[60, 129]),
    (shape(16, 1, 256), None, 2, &[40, 280]),
];

/// Decoding rows: values; bits of a row alone; rows without units, counters and everything behind stay as they were.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check_decode(checker: &Checker) -> Result<Summary, CheckError> {
    let list = if checker.effort == Effort::Quick { DECODE_QUICK } else { DECODE_FULL };
    let (mut worst, mut cases) = (0.0f64, 0);
    for elem in [Elem::Bf16, Elem::F16] {
        for (index, &(shape, window, grid, lens)) in list.iter().enumerate() {
            let case = Case { elem, shape, window, grid, padding: index % 3 };
            worst = worst.max(decode(checker, case, lens)?);
            cases += 1;
        }
    }
    Ok(Summary { cases, worst, unit: UNIT })
}

/// Rows of a launch: their qkv and which sequence each continues.
struct DecodeBatch {
    qkv: Vec<u16>,
    sequences: Vec<usize>,
}

fn decode(checker: &Checker, case: Case, lens: &[usize]) -> Result<f64, CheckError> {
    let mut random = Random::new(lens.iter().sum::<usize>() as u64 + 1);
    let first = |len: usize| case.window.map_or(0, |window| len.saturating_sub(window));
    let spans: Vec<_> = lens.iter().map(|&len| (first(len), len)).collect();
    let fixture = Fixture::new(case.elem, case.shape, &spans, &mut random);
    let qkv: Vec<u16> = lens.iter().flat_map(|_| fixture.qkv_row(&mut random)).collect();
    let batch = DecodeBatch { qkv, sequences: (0..lens.len()).collect() };
    let out = launch_decode(checker, case, &fixture, &batch)?;
    let (width, q_width) = (case.shape.qkv_width(), case.shape.heads * case.shape.head_dim);
    let mut worst = 0.0f64;
    for (row, sequence) in fixture.sequences.iter().enumerate() {
        let (qkv, got) = (&batch.qkv[row * width..][..width], &out[row * q_width..][..q_width]);
        worst = worst.max(fixture.compare(sequence, sequence.end - 1, &case.spec(), qkv, got)?);
    }
    let last = lens.len().saturating_sub(1);
    for row in if lens.is_empty() { 0..0 } else { last..last + 1 } {
        let alone = DecodeBatch { qkv: batch.qkv[row * width..][..width].to_vec(), sequences: vec![row] };
        let alone = launch_decode(checker, Case { grid: 3, padding: 0, ..case }, &fixture, &alone)?;
        let same = alone[..q_width] == out[row * q_width..][..q_width];
        expect(same, || format!("attn_decode {case:?}: row {row} alone differs from the row in the batch"))?;
    }
    Ok(worst)
}

/// The output of a launch. What no unit is about holds NaN, before and after.
fn launch_decode(
    checker: &Checker,
    case: Case,
    fixture: &Fixture,
    batch: &DecodeBatch,
) -> Result<Vec<u16>, CheckError> {
    let (device, stream) = (&*checker.device, checker.stream);
    let Case { elem, shape, padding, .. } = case;
    let mut kernel = AttnDecodeKernel::load(device, elem, shape, &case.spec())?;
    kernel.blocks_max = case.grid;
    let (mut units, mut positions) = (Vec::new(), Vec::new());
    for (row, &sequence) in batch.sequences.iter().enumerate() {
        let sequence = &fixture.sequences[sequence];
        units.extend(decode_units(row as u32, sequence.blocks as u32, sequence.first, sequence.end));
        positions.push(sequence.end as u32 - 1);
    }
    let counts = StepCounts { rows: positions.len() as u32, decode_units: units.len() as u32, ..StepCounts::default() };
    positions.resize(positions.len() + padding, u32::MAX);
    // Lists that are full, and lists with room that holds rubbish.
    let units_max = (units.len() + 2 * padding).max(1);
    units.resize(units_max, DecodeUnit { row: u32::MAX, kv_end: u32::MAX, ..DecodeUnit::default() });
    let (rows, q_width) = (positions.len(), shape.heads * shape.head_dim);
    let mut qkv_bits = batch.qkv.clone();
    qkv_bits.resize((rows + 1) * shape.qkv_width(), 0xffff);

    let (qkv, arena) = (checker.buffer(&qkv_bits)?, checker.buffer(&fixture.arena)?);
    let (block_table, units) = (checker.buffer(&fixture.block_table)?, checker.buffer(&units)?);
    let (counts_buffer, positions) = (checker.buffer(&[counts])?, checker.buffer(&positions)?);
    let (workspace_bytes, counter_bytes) = (kernel.workspace_bytes(units_max), kernel.counter_bytes(rows));
    let workspace = checker.poisoned(workspace_bytes + 256)?;
    let counters = checker.buffer(&vec![0u8; counter_bytes + 4])?;
    let out = checker.poisoned((rows + 1) * q_width * 2)?;
    let addresses = AttnDecodeLaunch {
        qkv: qkv.address(),
        out: out.address(),
        cache: KvCache { arena: arena.address(), shape: fixture.kv, layer: LAYER as u32 },
        block_table: block_table.address(),
        units: units.address(),
        counts: counts_buffer.address(),
        positions: positions.address(),
        workspace: workspace.address(),
        counters: counters.address(),
        units_max,
    };
    // SAFETY: the buffers are as large as the shape says, and units name rows and blocks that are there.
    unsafe { kernel.launch(device, stream, &addresses)? };
    let out: Vec<u16> = out.read(stream, 0, (rows + 1) * q_width)?;
    let untouched = out[batch.sequences.len() * q_width..].iter().all(|&bits| bits == 0xffff);
    expect(untouched, || format!("attn_decode {case:?} wrote rows that have no unit"))?;
    let guard: Vec<u8> = workspace.read(stream, workspace_bytes, 256)?;
    expect(guard.iter().all(|&byte| byte == 0xff), || format!("attn_decode {case:?} wrote behind its workspace"))?;
    let counters: Vec<u8> = counters.read(stream, 0, counter_bytes + 4)?;
    expect(counters.iter().all(|&byte| byte == 0), || format!("attn_decode {case:?} left a counter set"))?;
    Ok(out)
}

/// A shape, the window, the launch's blocks, and the chunks: position of the first row, and rows.
type PrefillRow = (HeadShape, Option<usize>, usize, &'static [(usize, usize)]);

const PREFILL_QUICK: &[PrefillRow] = &[(shape(14, 2, 64), None, 5, &[(0, 40), (130, 7)])];

const PREFILL_FULL: &[PrefillRow] = &[
    (shape(9, 3, 64), None, 3, &[(0, 1), (5, 43), (0, 17)]),
    (shape(14, 2, 64), None, 64, &[(0, 40), (130, 7)]),
    (shape(14, 2, 64), None, 4, &[]),
    (shape(6, 2, 32), Some(40), 1, &[(0, 70), (100, 65), (39, 2)]),
    (shape(6, 2, 32), None, 2, &[(63, 65), (64, 64)]),
    (shape(8, 2, 128), None, 3, &[(255, 33)]),
    (shape(1, 1, 128), None, 1, &[(16, 129)]),
    (shape(2, 2, 96), Some(16), 3, &[(18, 100)]),
    (shape(16, 1, 64), None, 3, &[(31, 9)]),
    (shape(4, 1, 256), Some(100), 2, &[(60, 50)]),
];

/// Prefill chunks: values, also where a chunk continues one; bits of a chunk alone; rows without tiles stay as they were.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check_prefill(checker: &Checker) -> Result<Summary, CheckError> {
    let list = if checker.effort == Effort::Quick { PREFILL_QUICK } else { PREFILL_FULL };
    let (mut worst, mut cases) = (0.0f64, 0);
    for elem in [Elem::Bf16, Elem::F16] {
        for (index, &(shape, window, grid, chunks)) in list.iter().enumerate() {
            let case = Case { elem, shape, window, grid, padding: index % 3 };
            worst = worst.max(prefill(checker, case, chunks)?);
            cases += 1;
        }
    }
    Ok(Summary { cases, worst, unit: UNIT })
}

/// Rows of a launch: their qkv, and of each chunk the sequence, the first position and the number of rows.
struct PrefillBatch {
    qkv: Vec<u16>,
    chunks: Vec<(usize, usize, usize)>,
}

fn prefill(checker: &Checker, case: Case, chunks: &[(usize, usize)]) -> Result<f64, CheckError> {
    let mut random = Random::new(chunks.iter().map(|(start, rows)| start + 3 * rows).sum::<usize>() as u64);
    let first = |start: usize| case.window.map_or(0, |window| (start + 1).saturating_sub(window));
    let spans: Vec<_> = chunks.iter().map(|&(start, rows)| (first(start), start + rows)).collect();
    let fixture = Fixture::new(case.elem, case.shape, &spans, &mut random);
    let rows: usize = chunks.iter().map(|chunk| chunk.1).sum();
    let qkv: Vec<u16> = (0..rows).flat_map(|_| fixture.qkv_row(&mut random)).collect();
    let chunks: Vec<_> = chunks.iter().enumerate().map(|(i, &(start, rows))| (i, start, rows)).collect();
    let batch = PrefillBatch { qkv, chunks };
    let out = launch_prefill(checker, case, &fixture, &batch)?;
    let (width, q_width) = (case.shape.qkv_width(), case.shape.heads * case.shape.head_dim);
    let (mut worst, mut row) = (0.0f64, 0);
    for &(sequence, start, rows) in &batch.chunks {
        let first_row = row;
        for position in start..start + rows {
            let (qkv, got) = (&batch.qkv[row * width..][..width], &out[row * q_width..][..q_width]);
            worst = worst.max(fixture.compare(&fixture.sequences[sequence], position, &case.spec(), qkv, got)?);
            row += 1;
        }
        let qkv = batch.qkv[first_row * width..row * width].to_vec();
        let alone = PrefillBatch { qkv, chunks: vec![(sequence, start, rows)] };
        let alone = launch_prefill(checker, Case { grid: 2, padding: 0, ..case }, &fixture, &alone)?;
        let same = alone[..rows * q_width] == out[first_row * q_width..row * q_width];
        expect(same, || format!("attn_prefill {case:?}: chunk {sequence} alone differs from the chunk in the batch"))?;
    }
    Ok(worst)
}

/// The output of a launch. What no tile is about holds NaN, before and after.
fn launch_prefill(
    checker: &Checker,
    case: Case,
    fixture: &Fixture,
    batch: &PrefillBatch,
) -> Result<Vec<u16>, CheckError> {
    let (device, stream) = (&*checker.device, checker.stream);
    let Case { elem, shape, padding, .. } = case;
    let mut kernel = AttnPrefillKernel::load(device, elem, shape, &case.spec())?;
    kernel.blocks_max = case.grid;
    let (mut tiles, mut rows) = (Vec::new(), 0);
    for &(sequence, start, chunk_rows) in &batch.chunks {
        let step = AttnPrefillKernel::tile_rows(shape);
        tiles.extend((0..chunk_rows).step_by(step).map(|first| PrefillTile {
            first_row: (rows + first) as u32,
            row_count: step.min(chunk_rows - first) as u32,
            position: (start + first) as u32,
            blocks: fixture.sequences[sequence].blocks as u32,
        }));
        rows += chunk_rows;
    }
    let counts = StepCounts { rows: rows as u32, prefill_tiles: tiles.len() as u32, ..StepCounts::default() };
    // Lists that are full, and lists with room that holds rubbish.
    let tiles_max = (tiles.len() + 2 * padding).max(1);
    tiles.resize(tiles_max, PrefillTile { first_row: u32::MAX, row_count: u32::MAX, ..PrefillTile::default() });
    let q_width = shape.heads * shape.head_dim;
    let mut qkv_bits = batch.qkv.clone();
    qkv_bits.resize((rows + padding + 1) * shape.qkv_width(), 0xffff);

    let (qkv, arena) = (checker.buffer(&qkv_bits)?, checker.buffer(&fixture.arena)?);
    let (block_table, tiles) = (checker.buffer(&fixture.block_table)?, checker.buffer(&tiles)?);
    let counts = checker.buffer(&[counts])?;
    let out = checker.poisoned((rows + padding + 1) * q_width * 2)?;
    let addresses = AttnPrefillLaunch {
        qkv: qkv.address(),
        out: out.address(),
        cache: KvCache { arena: arena.address(), shape: fixture.kv, layer: LAYER as u32 },
        block_table: block_table.address(),
        tiles: tiles.address(),
        counts: counts.address(),
        tiles_max,
    };
    // SAFETY: the buffers are as large as the shape says, and tiles name rows and blocks that are there.
    unsafe { kernel.launch(device, stream, &addresses)? };
    let out: Vec<u16> = out.read(stream, 0, out.bytes() / 2)?;
    let untouched = out[rows * q_width..].iter().all(|&bits| bits == 0xffff);
    expect(untouched, || format!("attn_prefill {case:?} wrote rows that have no tile"))?;
    Ok(out)
}
