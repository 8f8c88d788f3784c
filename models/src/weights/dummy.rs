//! Seeded random weights of a config's shapes, for benchmarks at real sizes without a download.
//!
//! Element i of a tensor is a function of (seed, tensor name, i) only, so any number of threads makes the same model.

use super::safetensors::TensorData;
use super::{Expected, WeightSource, expected, read_text};
use crate::error::ModelError;
use crate::families::TensorKind;
use crate::spec::{CONFIG_BYTES_MAX, DecoderSpec};
use half::bf16;
use loramux_kernels::Dtype;
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::path::Path;

pub(super) struct DummyWeights {
    spec: DecoderSpec,
    content_id: [u8; 32],
    seed: u64,
    total_bytes: u64,
    done_bytes: u64,
}

impl DummyWeights {
    pub(super) fn open(dir: &Path, seed: u64) -> Result<Self, ModelError> {
        let config = read_text(&dir.join("config.json"), CONFIG_BYTES_MAX)?;
        let spec = DecoderSpec::from_config(&config)?;
        let mut hash = Sha256::new();
        hash.update(b"loramux base dummy 1\0");
        hash.update(seed.to_le_bytes());
        hash.update(&config);
        let total_bytes = expected(&spec).iter().map(|tensor| 2 * tensor.count()).sum();
        Ok(Self { spec, content_id: hash.finalize().into(), seed, total_bytes, done_bytes: 0 })
    }
}

impl WeightSource for DummyWeights {
    fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    fn content_id(&self) -> [u8; 32] {
        self.content_id
    }

    fn natural_dtype(&self) -> Dtype {
        Dtype::Bf16
    }

    fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    fn done_bytes(&self) -> u64 {
        self.done_bytes
    }

    fn check(&self, _expected: &[Expected]) -> Result<(), ModelError> {
        Ok(())
    }

    fn read(&mut self, expected: &Expected) -> Result<TensorData, ModelError> {
        self.done_bytes += 2 * expected.count();
        Ok(TensorData::Bf16(self.values(expected, 0..expected.count() as usize)))
    }

    fn read_rows(&mut self, expected: &Expected, rows: Range<usize>) -> Result<Vec<f32>, ModelError> {
        let width = expected.width();
        let values = self.values(expected, rows.start * width..rows.end * width);
        Ok(values.into_iter().map(bf16::to_f32).collect())
    }
}

impl DummyWeights {
    /// Elements `range` of a tensor.
    fn values(&self, expected: &Expected, range: Range<usize>) -> Vec<bf16> {
        use TensorKind as K;
        // Norms near one and matrices that keep the variance of their input, so activations stay in range at any depth.
        let (centre, spread) = match expected.id.kind {
            K::FinalNorm | K::AttentionNorm | K::MlpNorm => (1.0, 0.05),
            K::QueryBias | K::KeyBias | K::ValueBias => (0.0, 0.05),
            K::Embedding => (0.0, 1.0),
            _ => (0.0, (3.0 / expected.shape.last().copied().unwrap_or(1) as f32).sqrt()),
        };
        let key = name_key(self.seed, &expected.id.hugging_face());
        random_bf16(key.wrapping_add(range.start as u64), range.len(), centre, spread)
    }
}

fn name_key(seed: u64, name: &str) -> u64 {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(name);
    let digest: [u8; 32] = hash.finalize().into();
    digest.iter().take(8).fold(0, |key, &byte| key << 8 | u64::from(byte))
}

/// Uniform in `centre ± spread`.
fn random_bf16(key: u64, count: usize, centre: f32, spread: f32) -> Vec<bf16> {
    const PER_THREAD_MIN: usize = 1 << 16;
    let mut values = vec![bf16::ZERO; count];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let stride = count.div_ceil(threads).max(PER_THREAD_MIN);
    std::thread::scope(|scope| {
        for (part, values) in values.chunks_mut(stride).enumerate() {
            scope.spawn(move || {
                for (i, value) in values.iter_mut().enumerate() {
                    let bits = mix(key.wrapping_add((part * stride + i) as u64));
                    let unit = (bits >> 40) as f32 * (2.0 / (1u64 << 24) as f32) - 1.0;
                    *value = bf16::from_f32(centre + spread * unit);
                }
            });
        }
    });
    values
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn mix(counter: u64) -> u64 {
    let z = counter.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
