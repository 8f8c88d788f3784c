//! The arithmetic of loramux: one folder per op with its formula, its definition, its fast form and its tests.
//!
//! Activations are f32 on the CPU; weights, the KV cache and adapters are stored as [`Dtype`]. Every output element is one
//! chain of multiply-adds in index order (a reduction that has to be spread over lanes has one fixed lane order), so a row
//! gets the same bits alone and in any batch, whatever the tile and the thread count. With f32 weights it gets them on every
//! instruction set too; with bf16 weights the instructions that multiply bf16 pairs (AVX-512-BF16, AMX) take the input of a
//! product rounded to bf16, the others as it is.

mod activation;
mod arena;
mod attention;
mod ceilings;
pub mod cuda;
pub mod device;
mod dtype;
mod embedding;
mod error;
mod gather_rows;
mod kv_cache;
mod linear;
mod lora;
mod lora_embed;
mod lora_expand;
mod lora_gain_shift;
mod lora_shrink;
mod norm;
mod pages;
mod parallel;
mod projection;
mod quant;
mod rope;
mod rows;
pub mod sampler;
mod simd;
#[cfg(test)]
mod test_support;
mod unpack;

pub use activation::silu_mul;
pub use arena::Arena;
pub use attention::{AttnChunk, AttnSpec, paged_attention};
pub use ceilings::Ceilings;
pub use dtype::{ArenaDtype, Dtype, HostData};
pub use embedding::embedding;
pub use error::OpError;
pub use gather_rows::gather_rows;
pub use kv_cache::{KvLayout, KvSlot, copy_block};
pub use linear::{PackedWeight, WeightPart, linear};
pub use lora::{
    AdapterImage, AdapterParts, AdapterTable, END_TILE, HeadWork, ImageLayout, LoraPart, LoraScratch, LoraSite,
    RANK_BLOCK, SLICES, Segment, Slice, SlotScale, VectorPart, WorkList,
};
pub use lora_embed::{lora_embed_rows, lora_embed_shrink};
pub use lora_expand::lora_expand;
pub use lora_gain_shift::lora_gain_shift;
pub use lora_shrink::{lora_identity_shrink, lora_shrink};
pub use norm::{add_rms_norm, rms_norm};
pub use parallel::{for_each, for_each_chunk, in_pool, set_threads, threads};
pub use projection::{Adapters, project};
pub use quant::{Matrix, QuantFormat, QuantPart, QuantWeight, quant_linear};
pub use rope::{RopeAngles, rope_store};
pub use rows::Rows;
pub use simd::{isa_name, isa_names, set_isa};
