//! Where weights go once they are read.

use crate::error::ModelError;
use loramux_kernels::{Dtype, Matrix, PackedWeight, QuantFormat, QuantPart, QuantWeight, WeightPart};

/// Where weights go once they are read: the CPU's packed form, or a device's memory.
pub trait WeightStore {
    /// A weight matrix.
    type Matrix;
    /// A norm's weight or a bias, in f32.
    type Vector;

    /// Stores `parts`, concatenated along `d_out`, and returns their bytes too.
    ///
    /// # Errors
    /// [`ModelError`] if there is no room, or the store cannot hold the shape.
    fn matrix(&mut self, parts: &[WeightPart]) -> Result<(Self::Matrix, u64), ModelError>;

    /// Whether [`WeightStore::quantised`] takes parts of these formats; if not, they are dequantised.
    fn takes_quantised(&self, formats: &[QuantFormat]) -> bool {
        let _ = formats;
        false
    }

    /// Stores `parts`, concatenated along `d_out`, as the file has them, and returns their bytes too.
    ///
    /// # Errors
    /// [`ModelError`] if there is no room, or the store takes no quantised parts.
    fn quantised(&mut self, parts: &[QuantPart]) -> Result<(Self::Matrix, u64), ModelError> {
        let what = format!("{} quantised parts", parts.len());
        Err(ModelError::unsupported("the store of weights", what, "it takes dequantised ones"))
    }

    /// Stores a vector.
    ///
    /// # Errors
    /// [`ModelError`] if there is no room.
    fn vector(&mut self, values: Vec<f32>) -> Result<Self::Vector, ModelError>;
}

/// Packs weights for the CPU's kernels.
#[derive(Clone, Copy, Debug)]
pub struct CpuStore {
    /// Of what is not quantised.
    pub(super) dtype: Dtype,
    /// Whether quantised matrices stay so.
    pub(super) keeps_quantised: bool,
}

impl WeightStore for CpuStore {
    type Matrix = Matrix;
    type Vector = Vec<f32>;

    fn matrix(&mut self, parts: &[WeightPart]) -> Result<(Matrix, u64), ModelError> {
        let matrix = Matrix::Packed(PackedWeight::pack(self.dtype, parts)?);
        let bytes = matrix.bytes() as u64;
        Ok((matrix, bytes))
    }

    fn takes_quantised(&self, _formats: &[QuantFormat]) -> bool {
        self.keeps_quantised
    }

    fn quantised(&mut self, parts: &[QuantPart]) -> Result<(Matrix, u64), ModelError> {
        let matrix = Matrix::Quant(QuantWeight::pack(parts)?);
        let bytes = matrix.bytes() as u64;
        Ok((matrix, bytes))
    }

    fn vector(&mut self, values: Vec<f32>) -> Result<Vec<f32>, ModelError> {
        Ok(values)
    }
}
