//! Models as data: `config.json` or a GGUF header becomes a [`DecoderSpec`], files become packed [`Weights`], and one
//! [`Decoder`] runs them all; PEFT adapters are read, checked and packed by [`adapter`].
//!
//! Everything read here was written by someone else. Sizes are checked before memory is taken for them, names and shapes
//! before data is read, and what is not served is refused by name.
#![forbid(unsafe_code)]

pub mod adapter;
mod decoder;
mod describe;
mod error;
mod families;
mod files;
mod rope;
mod spec;
mod text;
mod weights;

pub use decoder::{Batch, Decoder, DecoderLimits, DecoderOps, NormAt, OpTimes, Site, run_layers};
pub use describe::describe;
pub use error::ModelError;
pub use rope::inv_freq;
pub use spec::{DecoderSpec, RopeScaling, RopeSpec};
pub use text::{TextFiles, text_files};
pub use weights::{
    BaseFiles, CpuStore, LayerWeights, LoadFormat, LoadOptions, Model, Progress, WeightStore, Weights, load, load_into,
};
