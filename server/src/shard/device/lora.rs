//! The LoRA kernels of one site.

use loramux_kernels::cuda::{ExpandAddKernel, GainShiftKernel, ShrinkKernel};
use loramux_kernels::device::lora::SiteShape;
use loramux_kernels::device::{Device, DeviceError, Elem};
use loramux_models::{DecoderSpec, Site};

use super::engine::{EngineLimits, site_cols};
use super::lists::{DECODE_TILE_ROWS, PREFILL_TILE_ROWS};

/// Shrink and expand of one site, for tiles of decodes and of prompts, and what DoRA and biases change before them.
#[derive(Debug)]
pub(super) struct SiteKernels {
    pub(super) shrink: [ShrinkKernel; 2],
    pub(super) expand: [ExpandAddKernel; 2],
    pub(super) gain_shift: GainShiftKernel,
    /// Matrices of the site.
    pub(super) slices: u32,
    /// First of them in a layer's descriptors.
    pub(super) first_slice: u32,
    /// Outputs of all of them: elements of a row of y.
    pub(super) width: usize,
    /// Inputs: elements of a row of x.
    pub(super) d_in: usize,
}

impl SiteKernels {
    pub(super) fn load(
        device: &dyn Device,
        spec: &DecoderSpec,
        elem: Elem,
        site: Site,
        limits: &EngineLimits,
    ) -> Result<Self, DeviceError> {
        let (cols, d_in) = site_cols(spec, site);
        let shape = |tile_rows| SiteShape { d_in, cols: &cols, tile_rows };
        let (decode, prefill) = (shape(DECODE_TILE_ROWS), shape(PREFILL_TILE_ROWS));
        let tiles_max = [limits.decode_rows_max, limits.step_tokens_max];
        Ok(Self {
            shrink: [
                ShrinkKernel::load(device, elem, decode, limits.items_max[0])?,
                ShrinkKernel::load(device, elem, prefill, limits.items_max[1])?,
            ],
            expand: [
                ExpandAddKernel::load(device, elem, decode, tiles_max[0])?,
                ExpandAddKernel::load(device, elem, prefill, tiles_max[1])?,
            ],
            gain_shift: GainShiftKernel::load(device, elem, prefill, tiles_max[1])?,
            slices: cols.len() as u32,
            first_slice: match site {
                Site::Qkv => 0,
                Site::Output => 3,
                Site::GateUp => 4,
                Site::Down => 6,
            },
            width: cols.iter().map(|&(_, outputs)| outputs).sum(),
            d_in,
        })
    }
}
