//! How a weight matrix lies in memory.

use crate::dtype::{Dtype, HostData};
use crate::error::{OpError, same};
use crate::pages::Lines;
use crate::parallel;
use crate::simd::{Isa, LANES, Line};
use half::bf16;

/// Outputs of a panel.
pub(crate) const PANEL: usize = LANES;

/// Inputs of a bf16 panel are filled up with zeros to a multiple of this: the depth of a tile of AMX.
pub(crate) const K_TILE: usize = 32;

/// A piece of a weight matrix, row-major `[d_out, d_in]`.
#[derive(Clone, Copy, Debug)]
pub struct WeightPart<'a> {
    /// The elements.
    pub data: HostData<'a>,
    /// Outputs.
    pub d_out: usize,
    /// Inputs.
    pub d_in: usize,
}

/// A weight matrix `[d_out, d_in]`, packed for the machine.
///
/// On the CPU: panels of 16 outputs, `[d_out / 16][lines]`, the last one filled with zeros. In f32 a line is one input of a
/// panel. In bf16 it is two consecutive inputs, `[d_in / 2][16 outputs][2 inputs]`, with zeros up to a multiple of 32 inputs:
/// so every instruction set reads the same bytes, as pairs (AVX-512-BF16), as the rows of a tile (AMX), or widened to f32 by
/// a shift and a mask.
#[derive(Debug)]
pub struct PackedWeight {
    lines: Lines,
    d_out: usize,
    d_in: usize,
    dtype: Dtype,
}

impl PackedWeight {
    /// Packs `parts`, concatenated along `d_out` (q, k, v; gate, up), rounding to `dtype`.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the parts differ in `d_in`, a part's data has another length than its shape says, or nothing
    /// is left; [`OpError::OutOfMemory`].
    pub fn pack(dtype: Dtype, parts: &[WeightPart]) -> Result<Self, OpError> {
        let d_in = parts.first().map_or(0, |part| part.d_in);
        let mut rows = Vec::new(); // (part, row) of each output
        for part in parts {
            same("pack", "d_in", part.d_in, d_in)?;
            same("pack", "elements", part.data.len(), part.d_out.saturating_mul(d_in))?;
            rows.extend((0..part.d_out).map(|row| (part, row)));
        }
        let d_out = rows.len();
        if d_in == 0 || d_out == 0 {
            return Err(OpError::Shape { op: "pack", what: "elements", got: 0, want: 1 });
        }
        let panel_lines = lines_of(dtype, d_in);
        let panels = d_out.div_ceil(PANEL);
        let mut lines = Lines::new(panels.saturating_mul(panel_lines))?;
        parallel::for_each_chunk(lines.as_mut(), panel_lines, panels * panel_lines * 32, |panel, target| {
            for (lane, (part, row)) in rows.iter().skip(panel * PANEL).take(PANEL).enumerate() {
                pack_row(dtype, target, lane, part, *row);
            }
        });
        Ok(Self { lines, d_out, d_in, dtype })
    }

    /// Outputs.
    #[must_use]
    pub const fn d_out(&self) -> usize {
        self.d_out
    }

    /// Inputs.
    #[must_use]
    pub const fn d_in(&self) -> usize {
        self.d_in
    }

    /// Storage type.
    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Whether products with this weight read their inputs as pairs of bf16 on this machine.
    #[must_use]
    pub fn takes_pairs(&self) -> bool {
        super::input::takes_pairs(Isa::best(), self)
    }

    /// Memory in bytes, padding included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    /// Number of panels.
    pub(crate) const fn panels(&self) -> usize {
        self.d_out.div_ceil(PANEL)
    }

    /// Lines of a panel.
    pub(crate) const fn panel_lines(&self) -> usize {
        lines_of(self.dtype, self.d_in)
    }

    /// All panels.
    pub(crate) fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Element `[output, k]` as it was rounded.
    pub(crate) fn element(&self, output: usize, k: usize) -> f32 {
        let (panel, lane) = (output / PANEL, output % PANEL);
        let lines = &self.lines[panel * self.panel_lines()..];
        match self.dtype {
            Dtype::F32 => f32::from_bits(lines[k].0[lane]),
            Dtype::Bf16 if k.is_multiple_of(2) => f32::from_bits(lines[k / 2].0[lane] << 16),
            Dtype::Bf16 => f32::from_bits(lines[k / 2].0[lane] & 0xffff_0000),
        }
    }
}

/// Lines of a panel.
const fn lines_of(dtype: Dtype, d_in: usize) -> usize {
    match dtype {
        Dtype::F32 => d_in,
        Dtype::Bf16 => d_in.next_multiple_of(K_TILE) / 2,
    }
}

/// Writes row `row` of `part` into lane `lane` of a panel of zeros.
fn pack_row(dtype: Dtype, panel: &mut [Line], lane: usize, part: &WeightPart, row: usize) {
    let range = row * part.d_in..(row + 1) * part.d_in;
    match part.data {
        HostData::F32(values) => fill_lane(dtype, panel, lane, values[range].iter().copied()),
        HostData::Bf16(values) => fill_lane(dtype, panel, lane, values[range].iter().map(|v| v.to_f32())),
        HostData::F16(values) => fill_lane(dtype, panel, lane, values[range].iter().map(|v| v.to_f32())),
    }
}

fn fill_lane(dtype: Dtype, panel: &mut [Line], lane: usize, values: impl Iterator<Item = f32>) {
    match dtype {
        Dtype::F32 => {
            for (line, value) in panel.iter_mut().zip(values) {
                line.0[lane] = value.to_bits();
            }
        }
        Dtype::Bf16 => {
            for (k, value) in values.enumerate() {
                panel[k / 2].0[lane] |= u32::from(bf16::from_f32(value).to_bits()) << (k % 2 * 16);
            }
        }
    }
}
