//! The kernel against the formula.

use super::cuda::{RopeCacheKernel, RopeCacheLaunch};
use crate::attention::cuda::{HeadShape, KvCache};
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Random, Summary, expect};
use crate::device::step::{BLOCK_TOKENS, KvShape};

const POSITIONS: usize = 40;
const LAYERS: usize = 2;
pub(super) const LAYER: usize = 1;

/// What is checked.
#[derive(Clone, Copy)]
struct Case {
    elem: Elem,
    shape: HeadShape,
    rows: usize,
    per_page: usize,
    with_bias: bool,
    /// Blocks of the launch.
    grid: usize,
}

/// Compares q, K and V on several shapes; every other byte of the batch and the arena must stay as it was, and a row
/// alone must get the bits that it gets among others.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let shape = |heads, kv_heads, head_dim| HeadShape { heads, kv_heads, head_dim };
    let shapes: &[(HeadShape, usize)] = match checker.effort {
        Effort::Quick => &[(shape(14, 2, 64), 17)],
        Effort::Full => &[
            (shape(9, 3, 64), 1),
            (shape(14, 2, 64), 17),
            (shape(6, 2, 32), 33),
            (shape(32, 8, 128), 3),
            (shape(4, 4, 96), 5),
            (shape(4, 1, 256), 2),
        ],
    };
    let (mut worst, mut cases) = (0.0f64, 0);
    for elem in [Elem::Bf16, Elem::F16] {
        for (index, &(shape, rows)) in shapes.iter().enumerate() {
            let case =
                Case { elem, shape, rows, per_page: 1 + index % 3, with_bias: index % 2 == 1, grid: 1 + index % 3 * 4 };
            worst = worst.max(one(checker, case)?);
            cases += 1;
        }
    }
    Ok(Summary { cases, worst, unit: "of sum |terms|, in units of the type's epsilon" })
}

/// The rows of a launch.
pub(super) struct Batch {
    pub(super) qkv: Vec<u16>,
    pub(super) positions: Vec<u32>,
    pub(super) slots: Vec<[u32; 2]>,
}

/// The launch's inputs beside the rows.
pub(super) struct Model {
    pub(super) bias: Vec<f32>,
    pub(super) cos_sin: Vec<f32>,
    pub(super) kv: KvShape,
    pub(super) arena_bytes: usize,
}

/// Random rows with slots of their own, in a cache with pages of `per_page` blocks. Angles of other positions are NaN.
pub(super) fn inputs(elem: Elem, shape: HeadShape, rows: usize, per_page: usize) -> (Model, Batch) {
    let mut random = Random::new((rows * shape.head_dim) as u64);
    let block_bytes = LAYERS * shape.layer_bytes();
    // Pages are longer than their blocks.
    let kv = KvShape {
        page_bytes: (per_page * block_bytes + 256) as u64,
        block_bytes: block_bytes as u32,
        per_page: per_page as u32,
        kv_heads: shape.kv_heads as u32,
        reserved: 0,
    };
    let blocks = rows.div_ceil(BLOCK_TOKENS) + 2;
    let mut slots: Vec<[u32; 2]> =
        (0..blocks * BLOCK_TOKENS).map(|i| [(i / BLOCK_TOKENS) as u32, (i % BLOCK_TOKENS) as u32]).collect();
    for i in (1..slots.len()).rev() {
        slots.swap(i, random.below(i + 1));
    }
    slots.truncate(rows);
    let positions: Vec<u32> = (0..rows).map(|_| random.below(POSITIONS) as u32).collect();
    let half = shape.head_dim / 2;
    let mut cos_sin = vec![f32::NAN; POSITIONS * half * 2];
    for &position in &positions {
        for i in 0..half {
            let angle = f64::from(position) * 1e4f64.powf(-(i as f64) / half as f64);
            cos_sin[(position as usize * half + i) * 2] = angle.cos() as f32;
            cos_sin[(position as usize * half + i) * 2 + 1] = angle.sin() as f32;
        }
    }
    let bias = (0..shape.qkv_width()).map(|_| random.uniform()).collect();
    let model = Model { bias, cos_sin, kv, arena_bytes: blocks.div_ceil(per_page) * kv.page_bytes as usize };
    (model, Batch { qkv: random.elems(elem, rows * shape.qkv_width(), 4.0), positions, slots })
}

fn one(checker: &Checker, case: Case) -> Result<f64, CheckError> {
    let Case { elem, shape, rows, per_page, .. } = case;
    let (model, batch) = inputs(elem, shape, rows, per_page);
    let (qkv, arena) = launch(checker, case, &model, &batch)?;
    let worst = compare(case, &model, &batch, &qkv, &arena)?;
    for row in [0, rows / 2, rows - 1] {
        let width = shape.qkv_width();
        let alone = Batch {
            qkv: batch.qkv[row * width..][..width].to_vec(),
            positions: vec![batch.positions[row]],
            slots: vec![batch.slots[row]],
        };
        let (alone_qkv, alone_arena) = launch(checker, case, &model, &alone)?;
        let same = alone_qkv[..width] == qkv[row * width..][..width]
            && alone_arena.iter().zip(&arena).all(|(alone, all)| *alone == 0xffff || alone == all);
        expect(same, || format!("rope_cache {elem:?} {shape:?}: row {row} alone differs from the row in the batch"))?;
    }
    Ok(worst)
}

/// qkv and the arena after a launch; both end with a guard.
fn launch(checker: &Checker, case: Case, model: &Model, batch: &Batch) -> Result<(Vec<u16>, Vec<u16>), CheckError> {
    let (device, width) = (&*checker.device, case.shape.qkv_width());
    let mut kernel = RopeCacheKernel::load(device, case.elem, case.shape)?;
    kernel.blocks_max = case.grid;
    let rows = batch.positions.len();
    let qkv = checker.poisoned((rows + 1) * width * 2)?;
    qkv.write(checker.stream, 0, &batch.qkv)?;
    let arena = checker.poisoned(model.arena_bytes + 256)?;
    let (bias, cos_sin) = (checker.buffer(&model.bias)?, checker.buffer(&model.cos_sin)?);
    let (positions, slots) = (checker.buffer(&batch.positions)?, checker.buffer(&batch.slots)?);
    let addresses = RopeCacheLaunch {
        qkv: qkv.address(),
        bias: case.with_bias.then(|| bias.address()),
        cos_sin: cos_sin.address(),
        positions: positions.address(),
        slots: slots.address(),
        cache: KvCache { arena: arena.address(), shape: model.kv, layer: LAYER as u32 },
        rows,
    };
    // SAFETY: the buffers are as large as the shape says, and slots lie in the arena.
    unsafe { kernel.launch(device, checker.stream, &addresses)? };
    Ok((qkv.read(checker.stream, 0, (rows + 1) * width)?, arena.read(checker.stream, 0, arena.bytes() / 2)?))
}

fn compare(case: Case, model: &Model, batch: &Batch, qkv: &[u16], arena: &[u16]) -> Result<f64, CheckError> {
    let Case { elem, shape, .. } = case;
    let HeadShape { heads, kv_heads, head_dim } = shape;
    let mut want_qkv = batch.qkv.clone();
    want_qkv.resize(qkv.len(), 0xffff);
    let mut want_arena = vec![0xffff; arena.len()];
    let mut worst = 0.0f64;
    for row in 0..batch.positions.len() {
        for head in 0..heads + 2 * kv_heads {
            for i in 0..head_dim {
                let (want, terms) = formula(case, model, batch, row, head, i);
                let at = (row * (heads + 2 * kv_heads) + head) * head_dim + i;
                // What is compared by value here is left out of the comparison of bits below.
                let got = if head < heads {
                    want_qkv[at] = qkv[at];
                    qkv[at]
                } else {
                    let place = arena_place(shape, &model.kv, batch.slots[row], head - heads, i);
                    want_arena[place] = arena[place];
                    arena[place]
                };
                let got = f64::from(elem.from_bits(got));
                let error = (got - want).abs() / (terms + 1e-2) / elem.epsilon();
                expect(error <= 0.505, || {
                    format!("rope_cache {elem:?} {shape:?} row {row} head {head} element {i}: got {got}, want {want}")
                })?;
                worst = worst.max(error);
            }
        }
    }
    expect(qkv == want_qkv, || format!("rope_cache {elem:?} {shape:?} wrote beside q"))?;
    expect(arena == want_arena, || format!("rope_cache {elem:?} {shape:?} wrote beside its slots"))?;
    Ok(worst)
}

/// Element `i` of a head, and the sum of the absolute terms.
fn formula(case: Case, model: &Model, batch: &Batch, row: usize, head: usize, i: usize) -> (f64, f64) {
    let HeadShape { heads, kv_heads, head_dim } = case.shape;
    let value = |i: usize| {
        let x = case.elem.from_bits(batch.qkv[row * case.shape.qkv_width() + head * head_dim + i]);
        let bias = if case.with_bias { model.bias[head * head_dim + i] } else { 0.0 };
        f64::from(x) + f64::from(bias)
    };
    if head >= heads + kv_heads {
        return (value(i), value(i).abs());
    }
    let half = head_dim / 2;
    let pair = (batch.positions[row] as usize * half + i % half) * 2;
    let (cos, sin) = (f64::from(model.cos_sin[pair]), f64::from(model.cos_sin[pair + 1]));
    let (own, other) = (value(i), value((i + half) % head_dim));
    let signed = if i < half { -other } else { other };
    (own * cos + signed * sin, (own * cos).abs() + (other * sin).abs())
}

/// Where element `i` of K (`head < kv_heads`) or V lies, in elements.
pub(super) fn arena_place(shape: HeadShape, kv: &KvShape, slot: [u32; 2], head: usize, i: usize) -> usize {
    let [block, offset] = slot.map(|n| n as usize);
    let per_page = kv.per_page as usize;
    let start = block / per_page * kv.page_bytes as usize + block % per_page * kv.block_bytes as usize;
    let head_start = start / 2 + LAYER * shape.layer_bytes() / 2 + head * BLOCK_TOKENS * shape.head_dim;
    if head < shape.kv_heads {
        head_start + offset * shape.head_dim + i
    } else {
        head_start + i * BLOCK_TOKENS + offset
    }
}
