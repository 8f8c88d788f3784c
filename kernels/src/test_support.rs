//! Seeded input for tests.

use crate::rows::Rows;

/// SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in -1..1.
    pub(crate) fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    pub(crate) fn rows(&mut self, rows: usize, width: usize) -> Rows {
        let mut out = Rows::zeros(rows, width);
        out.as_f32_mut().fill_with(|| self.value());
        out
    }
}

/// Bits, so that a comparison tells zeros apart and finds NaN equal to itself.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The largest difference, relative to `scale`.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs() / (1.0 + want.abs());
        assert!(error <= tolerance, "{what}: element {i} is {got}, expected {want}");
    }
}

/// Stored elements as f32.
pub(crate) fn decode(dtype: crate::ArenaDtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        crate::ArenaDtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_ne_bytes(*b)).collect(),
        crate::ArenaDtype::Bf16 => {
            bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_ne_bytes(*b).to_f32()).collect()
        }
    }
}

/// That `write` leaves `want` rounded to bf16 in `rows`, and zeros behind each row's end.
#[track_caller]
pub(crate) fn assert_pairs(rows: &mut Rows, want: &[f32], write: impl FnOnce(crate::rows::RowsOut)) {
    rows.as_f32_mut().fill(f32::NAN);
    rows.hold_pairs(true);
    write(rows.out());
    let pairs = rows.as_pairs().unwrap_or_default();
    let stride = crate::linear::input::pair_stride(rows.width());
    assert_eq!(pairs.len(), rows.rows() * stride);
    for (pairs, want) in pairs.chunks(stride.max(1)).zip(want.chunks(rows.width().max(1))) {
        let got = pairs.iter().flat_map(|pair| [*pair as u16, (pair >> 16) as u16]);
        let rounded = want.iter().map(|value| half::bf16::from_f32(*value).to_bits());
        assert!(got.eq(rounded.chain(std::iter::repeat_n(0, 2 * stride - want.len()))));
    }
}
