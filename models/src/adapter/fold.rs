//! DoRA and trained biases, turned into what is added to the base: a gain and a shift for each output, and a B that has the
//! magnitude in it.
//!
//! DoRA (arXiv:2402.09353; PEFT `tuners/lora/dora.py`) computes `g (W x + s B A x) + b` with `g = m / |W + s B A|`, the norm
//! over the inputs of each output. Beside the base's `y0 = W x + b0` that is a gain of `g - 1` on `y0`, a pair with `g B`, and
//! a shift of `b - b0 - (g - 1) b0`; the last term only where `y0` has its bias already, which the CPU's product has and a
//! device's not. A bias on B adds `s` times itself to the shift, a trained bias its difference from `b0`.

use super::error::{AdapterError, WEIGHTS_FILE};
use super::{LoraModule, OutputVectors, WholeMatrix};
use crate::families::TensorKind;
use crate::weights::{BaseFiles, BaseReader};
use loramux_kernels::{AdapterImage, Slice};
use std::ops::Range;

/// Elements of the base's weights that are held at a time.
const TILE_ELEMENTS: usize = 1 << 20;

/// Largest difference between the base's embedding or head and the copy in an adapter's file, as root mean squares. A copy is
/// of the unquantised weights, whatever this server loaded.
const COPY_DIFFERENCE_MAX: f64 = 0.125;

/// Where a device adds the base's own bias: to the product, which gains then scale with it, or after them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BiasPlace {
    InProduct,
    Later,
}

/// One set of vectors, ready to be packed.
pub(super) struct Vectors {
    pub(super) layer: usize,
    pub(super) slice: Slice,
    pub(super) gain: Vec<f32>,
    pub(super) shift: Vec<f32>,
}

/// An adapter's changes of the base, resolved against the base's weights.
#[derive(Default)]
pub(super) struct Folded {
    pub(super) vectors: Vec<Vectors>,
    /// B of those modules whose B is no longer the file's, by their index.
    pub(super) b: Vec<(usize, Vec<f32>)>,
}

/// The base's weights, opened when the first of them is needed.
pub(super) struct Base<'a> {
    files: Option<&'a BaseFiles>,
    reader: Option<BaseReader>,
}

impl<'a> Base<'a> {
    pub(super) fn new(files: Option<&'a BaseFiles>) -> Self {
        Self { files, reader: None }
    }

    fn rows(
        &mut self,
        feature: &'static str,
        (layer, kind): (usize, TensorKind),
        rows: Range<usize>,
    ) -> Result<Vec<f32>, AdapterError> {
        let refuse = |reason: String| AdapterError::Base { feature, reason };
        if self.reader.is_none() {
            let files = self.files.ok_or_else(|| refuse("they are not at hand here".to_owned()))?;
            self.reader = Some(files.open().map_err(|error| refuse(error.to_string()))?);
        }
        let reader = self.reader.as_mut().ok_or_else(|| refuse("they were not opened".to_owned()))?;
        reader.rows(layer, kind, rows).map_err(|error| refuse(error.to_string()))
    }
}

/// Folds every module's magnitude and biases.
pub(super) fn fold(
    modules: &[LoraModule],
    outputs: &[OutputVectors],
    place: BiasPlace,
    base: &mut Base,
) -> Result<Folded, AdapterError> {
    let mut folded = Folded::default();
    for own in outputs {
        let index = modules.iter().position(|module| (module.layer, module.slice) == (own.layer, own.slice));
        let module = index.map(|index| &modules[index]);
        let width = [&own.magnitude, &own.lora_bias, &own.bias].into_iter().flatten().map(Vec::len).max().unwrap_or(0);
        let mut gain = vec![0.0; width];
        if let (Some(magnitude), Some(module), Some(index)) = (&own.magnitude, module, index) {
            let factors = magnitude_factors(module, magnitude, base)?;
            let mut b = module.b.clone();
            for (row, factor) in b.chunks_exact_mut(module.rank).zip(&factors) {
                row.iter_mut().for_each(|value| *value *= factor);
            }
            gain = factors.iter().map(|factor| factor - 1.0).collect();
            folded.b.push((index, b));
        }
        let shift = shift(own, module.map_or(0.0, |module| module.scale), &gain, place, base)?;
        folded.vectors.push(Vectors { layer: own.layer, slice: own.slice, gain, shift });
    }
    Ok(folded)
}

/// What biases add to each output.
fn shift(
    own: &OutputVectors,
    scale: f32,
    gain: &[f32],
    place: BiasPlace,
    base: &mut Base,
) -> Result<Vec<f32>, AdapterError> {
    let mut shift = vec![0.0; gain.len()];
    let kind = match own.slice {
        Slice::Q => Some(TensorKind::QueryBias),
        Slice::K => Some(TensorKind::KeyBias),
        Slice::V => Some(TensorKind::ValueBias),
        _ => None,
    };
    // A base bias matters where it is replaced, or stands inside what a magnitude scales.
    let matters = own.bias.is_some() || (own.magnitude.is_some() && place == BiasPlace::InProduct);
    if let Some(kind) = kind.filter(|_| matters && own.base_has_bias) {
        let before = base.rows("bias", (own.layer, kind), 0..gain.len())?;
        for (o, (shift, before)) in shift.iter_mut().zip(&before).enumerate() {
            let after = own.bias.as_ref().map_or(*before, |bias| bias[o]);
            let scaled = if place == BiasPlace::InProduct { gain[o] * before } else { 0.0 };
            *shift = after - before - scaled;
        }
    }
    if let Some(bias) = &own.lora_bias {
        shift.iter_mut().zip(bias).for_each(|(shift, bias)| *shift += scale * bias);
    }
    Ok(shift)
}

/// The tensor that a slice is part of the base in.
fn kind(slice: Slice) -> TensorKind {
    match slice {
        Slice::Q => TensorKind::Query,
        Slice::K => TensorKind::Key,
        Slice::V => TensorKind::Value,
        Slice::O => TensorKind::Output,
        Slice::Gate => TensorKind::Gate,
        Slice::Up => TensorKind::Up,
        Slice::Down => TensorKind::Down,
        Slice::Embed => TensorKind::Embedding,
        Slice::Head | Slice::HeadDelta => TensorKind::Head,
    }
}

/// `m / |W + s B A|` of each output.
fn magnitude_factors(module: &LoraModule, magnitude: &[f32], base: &mut Base) -> Result<Vec<f32>, AdapterError> {
    let squares = match module.slice {
        Slice::Embed => embedding_squares(module, base)?,
        _ => row_squares(module, base)?,
    };
    let factor = |(o, (magnitude, square)): (usize, (&f32, &f64))| {
        let factor = (f64::from(*magnitude) / square.sqrt()) as f32;
        match factor.is_finite() {
            true => Ok(factor),
            false => Err(AdapterError::weights(format!(
                "output {o} of {:?} in layer {} has the magnitude {magnitude} and a weight of norm {}",
                module.slice,
                module.layer,
                square.sqrt()
            ))),
        }
    };
    magnitude.iter().zip(&squares).enumerate().map(factor).collect()
}

/// `|W + s B A|^2` of each row, which is an output.
fn row_squares(module: &LoraModule, base: &mut Base) -> Result<Vec<f64>, AdapterError> {
    let LoraModule { layer, slice, rank, scale, a, b, d_in, d_out } = module;
    let mut squares = Vec::with_capacity(*d_out);
    for first in (0..*d_out).step_by((TILE_ELEMENTS / d_in).max(1)) {
        let rows = first..(first + (TILE_ELEMENTS / d_in).max(1)).min(*d_out);
        let mut weights = base.rows("use_dora", (*layer, kind(*slice)), rows.clone())?;
        for (row, weights) in rows.zip(weights.chunks_exact_mut(*d_in)) {
            for (r, factor) in b[row * rank..][..*rank].iter().enumerate() {
                add(weights, scale * factor, &a[r * d_in..][..*d_in]);
            }
            squares.push(sum_of_squares(weights));
        }
    }
    Ok(squares)
}

/// `|W + s (B A)^T|^2` of each column: the embedding lies as `[vocabulary, hidden]`, and its outputs are the hidden width.
fn embedding_squares(module: &LoraModule, base: &mut Base) -> Result<Vec<f64>, AdapterError> {
    let LoraModule { rank, scale, a, b, d_in: vocab, d_out: hidden, .. } = module;
    let mut b_columns = vec![0.0; rank * hidden];
    for (k, row) in b.chunks_exact(*rank).enumerate() {
        row.iter().enumerate().for_each(|(r, value)| b_columns[r * hidden + k] = *value);
    }
    let mut squares = vec![0.0f64; *hidden];
    for tokens in tiles(*vocab, *hidden) {
        let mut weights = base.rows("use_dora", (0, TensorKind::Embedding), tokens.clone())?;
        for (token, row) in tokens.zip(weights.chunks_exact_mut(*hidden)) {
            for (r, column) in b_columns.chunks_exact(*hidden).enumerate() {
                add(row, scale * a[r * vocab + token], column);
            }
            squares.iter_mut().zip(row).for_each(|(square, value)| *square += f64::from(*value) * f64::from(*value));
        }
    }
    Ok(squares)
}

/// `y += factor * x`
fn add(y: &mut [f32], factor: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

fn sum_of_squares(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value) * f64::from(value)).sum()
}

/// Rows of a matrix, so many that they are [`TILE_ELEMENTS`].
fn tiles(rows: usize, width: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (TILE_ELEMENTS / width.max(1)).max(1);
    (0..rows).step_by(step).map(move |first| first..(first + step).min(rows))
}

/// Writes what a trained embedding or head adds to the base's.
pub(super) fn write_whole(
    image: &mut AdapterImage,
    matrix: &WholeMatrix,
    (vocab, hidden): (usize, usize),
    value_max: f32,
    base: &mut Base,
) -> Result<(), AdapterError> {
    for rows in tiles(vocab, hidden) {
        let before = base.rows("modules_to_save", (0, kind(matrix.slice)), rows.clone())?;
        let mut delta = matrix.data.slice_f32(rows.start * hidden..rows.end * hidden);
        delta.iter_mut().zip(&before).for_each(|(after, before)| *after -= before);
        if let Some(value) = delta.iter().find(|value| value.abs() > value_max || !value.is_finite()) {
            return Err(AdapterError::weights(format!(
                "tensor `{}` differs from the base by {value}, which float16 cannot hold; use --dtype bfloat16",
                matrix.name
            )));
        }
        image.set_rows(matrix.slice, rows.start, &delta).map_err(AdapterError::Pack)?;
    }
    Ok(())
}

/// Refuses a copy of the base's embedding or head that is not the base's: PEFT would serve it instead.
pub(super) fn check_copy(
    copy: &WholeMatrix,
    (vocab, hidden): (usize, usize),
    base: &mut Base,
) -> Result<(), AdapterError> {
    let (mut difference, mut size) = (0.0, 0.0);
    for rows in tiles(vocab, hidden) {
        let own = base.rows("target_modules", (0, kind(copy.slice)), rows.clone())?;
        let copied = copy.data.slice_f32(rows.start * hidden..rows.end * hidden);
        let apart: Vec<f32> = copied.iter().zip(&own).map(|(copied, own)| copied - own).collect();
        difference += sum_of_squares(&apart);
        size += sum_of_squares(&own);
    }
    if difference > COPY_DIFFERENCE_MAX * COPY_DIFFERENCE_MAX * size {
        let feature = format!("tensor `{}`, which is not the base model's,", copy.name);
        let reason = "train it as `modules_to_save`, or save the adapter with `save_embedding_layers=False`";
        return Err(AdapterError::unsupported(WEIGHTS_FILE, feature, reason));
    }
    Ok(())
}
