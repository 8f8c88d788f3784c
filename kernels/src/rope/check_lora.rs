//! The kernel with LoRA deltas against the formula, and against the plain kernel wherever there is no delta.

use super::check::{Batch as Rows, LAYER, Model, arena_place, inputs};
use super::cuda::{RopeCacheKernel, RopeCacheLaunch};
use super::cuda_lora::{RopeCacheLoraKernel, cols};
use crate::attention::cuda::{HeadShape, KvCache};
use crate::device::Elem;
use crate::device::check::{CheckError, Checker, Effort, Summary, expect};
use crate::device::lora::{DECODE_TILE_ROWS, SiteShape};
use crate::device::step::RowTile;
use crate::lora_shrink::batch::{Batch, Deltas, Run, Site, mixes, rows_of};

/// Rows behind the batch that lie in no tile: NaN, with positions and slots that do not exist.
const PADDING_ROWS: usize = 2;

/// Type, inputs of the site, heads, and whether there is a bias.
type Case = (Elem, usize, HeadShape, bool);

/// Compares q, K and V on several shapes and mixes of adapters: matrices without delta must get the plain kernel's bits,
/// every row those that it gets alone, and every other byte must stay as it was.
///
/// # Errors
/// [`CheckError`].
pub(crate) fn check(checker: &Checker) -> Result<Summary, CheckError> {
    let shape = |heads, kv_heads, head_dim| HeadShape { heads, kv_heads, head_dim };
    let cases: &[Case] = match checker.effort {
        Effort::Quick => &[(Elem::Bf16, 4096, shape(8, 2, 128), false), (Elem::F16, 896, shape(14, 2, 64), true)],
        Effort::Full => &[
            (Elem::F16, 576, shape(9, 3, 64), false),
            (Elem::Bf16, 896, shape(14, 2, 64), true),
            (Elem::Bf16, 192, shape(6, 2, 32), false),
            (Elem::F16, 2048, shape(3, 1, 32), true),
            (Elem::Bf16, 4096, shape(8, 2, 128), false),
            (Elem::F16, 32, shape(2, 2, 128), true),
            (Elem::Bf16, 96, shape(2, 2, 96), true),
            (Elem::F16, 64, shape(3, 1, 256), true),
        ],
    };
    let (mut worst, mut count) = (0.0f64, 0);
    for (index, &(elem, d_in, shape, with_bias)) in cases.iter().enumerate() {
        let cols = cols(shape);
        let site = Site::new(checker, elem, SiteShape { d_in, cols: &cols, tile_rows: DECODE_TILE_ROWS })?;
        let rope = RopeLora { site: &site, shape, with_bias, per_page: 1 + index % 3 };
        for runs in mixes(DECODE_TILE_ROWS) {
            worst = worst.max(rope.compare(&runs)?);
            rope.rows_alone(&runs)?;
            count += 2;
        }
    }
    Ok(Summary { cases: count, worst, unit: "of the rounding of the result and of f32 sums" })
}

/// Which kernel, and with how many blocks.
#[derive(Clone, Copy)]
enum Launch {
    Plain,
    WithDeltas,
    OfBlocks(usize),
}

/// qkv and the arena, as elements.
type Results = (Vec<u16>, Vec<u16>);

struct RopeLora<'a> {
    site: &'a Site<'a>,
    shape: HeadShape,
    with_bias: bool,
    per_page: usize,
}

impl RopeLora<'_> {
    fn name(&self) -> String {
        format!("rope_cache_lora {:?} d_in {} {:?}", self.site.elem, self.site.shape.d_in, self.shape)
    }

    /// Model and rows; some values are zeros of both signs.
    fn inputs(&self, rows: usize) -> (Model, Rows) {
        let (model, mut rows) = inputs(self.site.elem, self.shape, rows, self.per_page);
        rows.qkv.iter_mut().step_by(37).for_each(|bits| *bits &= 0x8000);
        (model, rows)
    }

    /// qkv with its padding rows, and the arena with a guard.
    fn launch(&self, batch: &Batch<'_>, model: &Model, rows: &Rows, how: Launch) -> Result<Results, CheckError> {
        let (checker, device) = (self.site.checker, &*self.site.checker.device);
        let (elem, d_in, width) = (self.site.elem, self.site.shape.d_in, self.shape.qkv_width());
        let padded: Vec<u16> = rows.qkv.iter().copied().chain(vec![0xffff; PADDING_ROWS * width]).collect();
        let qkv = checker.buffer(&padded)?;
        let arena = checker.poisoned(model.arena_bytes + 256)?;
        let (bias, cos_sin) = (checker.buffer(&model.bias)?, checker.buffer(&model.cos_sin)?);
        let positions: Vec<u32> = rows.positions.iter().copied().chain([u32::MAX; PADDING_ROWS]).collect();
        let slots: Vec<[u32; 2]> = rows.slots.iter().copied().chain([[u32::MAX; 2]; PADDING_ROWS]).collect();
        let (positions, slots) = (checker.buffer(&positions)?, checker.buffer(&slots)?);
        let addresses = RopeCacheLaunch {
            qkv: qkv.address(),
            bias: self.with_bias.then(|| bias.address()),
            cos_sin: cos_sin.address(),
            positions: positions.address(),
            slots: slots.address(),
            cache: KvCache { arena: arena.address(), shape: model.kv, layer: LAYER as u32 },
            rows: batch.rows,
        };
        if let Launch::Plain = how {
            let kernel = RopeCacheKernel::load(device, elem, self.shape)?;
            // SAFETY: the buffers have the batch's rows, and slots lie in the arena.
            unsafe { kernel.launch(device, checker.stream, &addresses)? };
        } else {
            let mut kernel = RopeCacheLoraKernel::load(device, elem, d_in, self.shape, batch.tiles.len())?;
            if let Launch::OfBlocks(blocks) = how {
                kernel.blocks = blocks;
            }
            // SAFETY: the lists are the batch's own; the buffers have its rows, and slots lie in the arena.
            unsafe { kernel.launch(device, checker.stream, &batch.work(), &addresses)? };
        }
        Ok((qkv.read(checker.stream, 0, padded.len())?, arena.read(checker.stream, 0, arena.bytes() / 2)?))
    }

    /// Where the result of element `i` of a head lies: in qkv for queries, else in the arena.
    fn place(&self, model: &Model, rows: &Rows, row: usize, head: usize, i: usize) -> (bool, usize) {
        let HeadShape { heads, head_dim, .. } = self.shape;
        if head < heads {
            return (true, row * self.shape.qkv_width() + head * head_dim + i);
        }
        (false, arena_place(self.shape, &model.kv, rows.slots[row], head - heads, i))
    }

    fn compare(&self, runs: &[Run]) -> Result<f64, CheckError> {
        let (elem, width) = (self.site.elem, self.shape.qkv_width());
        let batch = self.site.batch(runs)?;
        let deltas = batch.random_v(3)?;
        let (model, rows) = self.inputs(batch.rows);
        let got = self.launch(&batch, &model, &rows, Launch::WithDeltas)?;
        for blocks in [1, 3, 1000] {
            let again = self.launch(&batch, &model, &rows, Launch::OfBlocks(blocks))?;
            expect(again == got, || format!("{}: {blocks} blocks give other bits", self.name()))?;
        }
        let plain = self.launch(&batch, &model, &rows, Launch::Plain)?;
        // What stays as it is: filled in with results as they are compared.
        let mut want = (rows.qkv.clone(), vec![0xffff; got.1.len()]);
        want.0.resize(got.0.len(), 0xffff);
        let mut worst = 0.0f64;
        for (tile, row) in batch.tiles.iter().flat_map(|tile| rows_of(tile).map(move |row| (tile, row))) {
            let values = self.values(&batch, &deltas, (&model, &rows), (tile, row));
            for (head, i) in (0..width).map(|at| (at / self.shape.head_dim, at % self.shape.head_dim)) {
                let (in_qkv, at) = self.place(&model, &rows, row, head, i);
                let of = |results: &Results| if in_qkv { results.0[at] } else { results.1[at] };
                *(if in_qkv { &mut want.0[at] } else { &mut want.1[at] }) = of(&got);
                let at = || format!("{}: row {row} head {head} element {i}", self.name());
                if !values[head * self.shape.head_dim + i].touched {
                    expect(of(&got) == of(&plain), || format!("{}, without delta, has other bits", at()))?;
                }
                let (value, error) = self.turned(&model, &values, rows.positions[row], head, i);
                let limit = value.abs() * (elem.epsilon() / 2.0 + 2e-6) + error + 6e-8;
                let off = (f64::from(elem.from_bits(of(&got))) - value).abs() / limit;
                expect(off <= 1.0, || format!("{}: got {}, want {value}", at(), elem.from_bits(of(&got))))?;
                worst = worst.max(off);
            }
        }
        expect(got.0 == want.0, || format!("{}: wrote beside q", self.name()))?;
        expect(got.1 == want.1, || format!("{}: wrote beside its slots", self.name()))?;
        Ok(worst)
    }

    /// A row of qkv with deltas and bias, before it is turned.
    fn values(
        &self,
        batch: &Batch<'_>,
        deltas: &Deltas,
        (model, rows): (&Model, &Rows),
        (tile, row): (&RowTile, usize),
    ) -> Vec<Value> {
        let of_slice = |(slice, &(first, outputs)): (usize, &(usize, usize))| {
            (0..outputs).map(move |output| (slice, output, first + output)).collect::<Vec<_>>()
        };
        let places = self.site.shape.cols.iter().enumerate().flat_map(of_slice);
        let value = |(slice, output, column)| {
            let delta = batch.delta(deltas, tile, slice, row, output);
            let (change, size) = delta.unwrap_or((0.0, 0.0));
            let bias = if self.with_bias { f64::from(model.bias[column]) } else { 0.0 };
            let x = f64::from(self.site.elem.from_bits(rows.qkv[row * self.shape.qkv_width() + column]));
            let error = size * 1e-5 + (x.abs() + bias.abs()) * 1e-6;
            Value { sum: x + change + bias, error, touched: delta.is_some() }
        };
        places.map(value).collect()
    }

    /// Element `i` of a head as the formula turns it, and the error of its terms.
    fn turned(&self, model: &Model, values: &[Value], position: u32, head: usize, i: usize) -> (f64, f64) {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let half = head_dim / 2;
        let own = values[head * head_dim + i];
        if head >= heads + kv_heads {
            return (own.sum, own.error);
        }
        let other = values[head * head_dim + (i + half) % head_dim];
        let pair = (position as usize * half + i % half) * 2;
        let (cos, sin) = (f64::from(model.cos_sin[pair]), f64::from(model.cos_sin[pair + 1]));
        let sin = if i < half { -sin } else { sin };
        let products = (own.sum * cos).abs() + (other.sum * sin).abs();
        (own.sum * cos + other.sum * sin, own.error * cos.abs() + other.error * sin.abs() + products * 1e-6)
    }

    /// Behind the shrink, so that V is the rows' own: the last row of each run, alone.
    fn rows_alone(&self, runs: &[Run]) -> Result<(), CheckError> {
        let (batch, stride, width) = (self.site.batch(runs)?, self.site.shape.d_in, self.shape.qkv_width());
        let (x, (model, rows)) = (batch.inputs(stride, 4), self.inputs(batch.rows));
        batch.shrink(&x, stride)?;
        let got = self.launch(&batch, &model, &rows, Launch::WithDeltas)?;
        let mut row = 0;
        for run in runs {
            row += run.rows;
            let alone = self.site.batch(&[Run { rows: 1, ..run.clone() }])?;
            alone.shrink(&x[(row - 1) * stride..row * stride], stride)?;
            let own = Rows {
                qkv: rows.qkv[(row - 1) * width..row * width].to_vec(),
                positions: vec![rows.positions[row - 1]],
                slots: vec![rows.slots[row - 1]],
            };
            let got_alone = self.launch(&alone, &model, &own, Launch::WithDeltas)?;
            let same = got_alone.0[..width] == got.0[(row - 1) * width..row * width]
                && got_alone.1.iter().zip(&got.1).all(|(alone, all)| *alone == 0xffff || alone == all);
            expect(same, || format!("{}: row {} has other bits alone", self.name(), row - 1))?;
        }
        Ok(())
    }
}

/// One element before it is turned.
#[derive(Clone, Copy)]
struct Value {
    sum: f64,
    /// What f32 may be off by.
    error: f64,
    /// Whether some item targets its matrix.
    touched: bool,
}
