//! From a validated adapter to the bytes of pages.

use super::error::AdapterError;
use super::fold::{Base, BiasPlace, check_copy, fold, write_whole};
use super::{LoraModule, PeftAdapter};
use crate::weights::BaseFiles;
use half::f16;
use loramux_kernels::{AdapterImage, AdapterParts, ImageLayout, LoraPart, Slice, VectorPart};

/// Largest finite half-precision value.
const HALF_MAX: f32 = 65504.0;

impl PeftAdapter {
    /// Lays the weights out in pages of `page_bytes`, rounded to the layout's type, without the base model's files at hand.
    ///
    /// # Errors
    /// As [`Self::pack_onto`]; `adapter_load_failed` if [`Self::needs_base`].
    pub fn pack(&self, layout: impl Into<ImageLayout>, page_bytes: usize) -> Result<AdapterImage, AdapterError> {
        self.pack_with(layout.into(), page_bytes, None)
    }

    /// Lays the weights out in pages of `page_bytes`, rounded to the layout's type. What was trained as a whole becomes its
    /// difference from the base, DoRA's magnitudes become factors: for both the base's weights are read again.
    ///
    /// # Errors
    /// `adapter_invalid` if a value has no finite form in it; `adapter_too_large` if a block does not fit a page;
    /// `adapter_load_failed` if the base's files cannot be read; `adapter_unsupported` for a copy of the base's embedding
    /// that is not this base's.
    pub fn pack_onto(
        &self,
        layout: impl Into<ImageLayout>,
        page_bytes: usize,
        base: &BaseFiles,
    ) -> Result<AdapterImage, AdapterError> {
        self.pack_with(layout.into(), page_bytes, Some(base))
    }

    /// Whether the base model's weights are needed to pack it.
    #[must_use]
    pub fn needs_base(&self) -> bool {
        let reads = |own: &super::OutputVectors| own.magnitude.is_some() || own.bias.is_some();
        !self.whole.is_empty() || !self.base_copies.is_empty() || self.outputs.iter().any(reads)
    }

    fn pack_with(
        &self,
        layout: ImageLayout,
        page_bytes: usize,
        base: Option<&BaseFiles>,
    ) -> Result<AdapterImage, AdapterError> {
        let mut base = Base::new(base);
        let extents = (self.vocab, self.hidden);
        for copy in &self.base_copies {
            check_copy(copy, extents, &mut base)?;
        }
        let place = if matches!(layout, ImageLayout::Cpu(_)) { BiasPlace::InProduct } else { BiasPlace::Later };
        let folded = fold(&self.modules, &self.outputs, place, &mut base)?;
        let mut lora: Vec<LoraPart> = self.modules.iter().map(part).collect();
        for (index, b) in &folded.b {
            lora[*index].b = b;
        }
        if layout.is_half() {
            lora.iter().try_for_each(check_fits_half)?;
        }
        let vectors: Vec<VectorPart> = folded
            .vectors
            .iter()
            .map(|own| VectorPart { layer: own.layer, slice: own.slice, gain: &own.gain, shift: &own.shift })
            .collect();
        let whole = |slice: Slice| self.whole.iter().any(|matrix| matrix.slice == slice).then_some(extents);
        let (embed_rows, head_rows) = (whole(Slice::Embed), whole(Slice::Head));
        let parts = AdapterParts { lora: &lora, vectors: &vectors, embed_rows, head_rows };
        let mut image =
            AdapterImage::pack_parts(layout, page_bytes, self.layers, &parts).map_err(AdapterError::Pack)?;
        let value_max = if layout.is_half() { HALF_MAX } else { f32::MAX };
        for matrix in &self.whole {
            write_whole(&mut image, matrix, extents, value_max, &mut base)?;
        }
        Ok(image)
    }
}

fn part(module: &LoraModule) -> LoraPart<'_> {
    let LoraModule { layer, slice, rank, scale, a, b, d_in, d_out } = module;
    let (layer, slice, rank, scale, d_in, d_out) = (*layer, *slice, *rank, *scale, *d_in, *d_out);
    LoraPart { layer, slice, rank, a, b, d_in, d_out, scale }
}

/// What lies beyond 65504 would be stored as something else.
fn check_fits_half(part: &LoraPart) -> Result<(), AdapterError> {
    match part.a.iter().chain(part.b).find(|&&value| !f16::from_f32(value).is_finite()) {
        None => Ok(()),
        Some(value) => Err(AdapterError::weights(format!(
            "layer {} {:?} has the value {value}, which float16 cannot hold; use --dtype bfloat16",
            part.layer, part.slice
        ))),
    }
}
