//! How a weight matrix lies in memory.

use crate::dtype::{Dtype, HostData};
use crate::error::{OpError, same};
use crate::parallel::{self, SharedMut};
use crate::simd::{LANES, Line};
use half::bf16;

/// Outputs of a panel.
pub(crate) const PANEL: usize = 2 * LANES;

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
/// On the CPU: panels of 32 outputs, `[d_out / 32][d_in][32]`, the last one filled with zeros. In bf16 one cache line is one
/// k of a panel, output `i` beside output `i + 16`, so that a shift and a mask make two vectors of f32.
#[derive(Clone, Debug)]
pub struct PackedWeight {
    lines: Vec<Line>,
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
        let panel_lines = d_in * lines_per_k(dtype);
        let panels = d_out.div_ceil(PANEL);
        let mut lines = Vec::new();
        let refused = |_| OpError::OutOfMemory { what: "weights", bytes: panels * panel_lines * size_of::<Line>() };
        lines.try_reserve_exact(panels * panel_lines).map_err(refused)?;
        let spare = SharedMut::new(lines.spare_capacity_mut());
        parallel::for_each(panels, panels * panel_lines * 32, |panel| {
            // SAFETY: panel `panel` of the reserved memory, which no other unit writes.
            let target = unsafe { std::slice::from_raw_parts_mut(spare.at(panel * panel_lines), panel_lines) };
            for line in target.iter_mut() {
                line.write(Line::default());
            }
            // SAFETY: every line was just written.
            let target = unsafe { std::slice::from_raw_parts_mut(target.as_mut_ptr().cast::<Line>(), panel_lines) };
            for (lane, (part, row)) in rows.iter().skip(panel * PANEL).take(PANEL).enumerate() {
                pack_row(dtype, target, lane, part, *row);
            }
        });
        // SAFETY: the units above wrote all `panels * panel_lines` lines, which fit the capacity.
        unsafe { lines.set_len(panels * panel_lines) };
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

    /// Memory in bytes, padding included.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    /// Number of panels.
    pub(crate) const fn panels(&self) -> usize {
        self.d_out.div_ceil(PANEL)
    }

    /// Lines of a panel.
    pub(crate) const fn panel_lines(&self) -> usize {
        self.d_in * lines_per_k(self.dtype)
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
            Dtype::F32 => f32::from_bits(lines[2 * k + lane / LANES].0[lane % LANES]),
            Dtype::Bf16 if lane < LANES => f32::from_bits(lines[k].0[lane] << 16),
            Dtype::Bf16 => f32::from_bits(lines[k].0[lane - LANES] & 0xffff_0000),
        }
    }
}

/// Lines that hold one k of a panel.
pub(crate) const fn lines_per_k(dtype: Dtype) -> usize {
    PANEL * dtype.bytes() / size_of::<Line>()
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
    let word = lane % LANES;
    match dtype {
        Dtype::F32 => {
            for (k, value) in values.enumerate() {
                panel[2 * k + lane / LANES].0[word] = value.to_bits();
            }
        }
        Dtype::Bf16 => {
            let shift = if lane < LANES { 0 } else { 16 };
            for (line, value) in panel.iter_mut().zip(values) {
                line.0[word] |= u32::from(bf16::from_f32(value).to_bits()) << shift;
            }
        }
    }
}
