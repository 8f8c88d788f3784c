//! What "computing" means in the simulation: marks that depend on everything a real forward pass would read.

use super::grammar::has;
use crate::engine::ContentId;

/// What freed memory is filled with.
pub(super) const POISON: u64 = 0xDEAD_DEAD_DEAD_DEAD;
/// Tokens of the simulated model.
pub(super) const VOCAB: u64 = 50;

pub(super) fn mix(a: u64, b: u64) -> u64 {
    let mut x = a ^ b.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
    x = (x ^ (x >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    (x ^ (x >> 29)).wrapping_mul(0xA076_1D64_78BD_642F) ^ (x >> 31)
}

/// Page `page` of an adapter's image.
pub(super) fn page_mark(content: &ContentId, page: usize) -> u64 {
    let head = u64::from_le_bytes(content.0[..8].try_into().expect("8 bytes"));
    mix(mix(0xADA9, head), page as u64)
}

/// All adapters of a sequence, from the marks of their pages.
pub(super) fn adapters_mark(adapters: impl Iterator<Item = (f32, u64)>) -> u64 {
    adapters.fold(1, |mark, (scale, image)| mix(mix(mark, u64::from(scale.to_bits())), image))
}

/// One adapter's image, from its pages in order.
pub(super) fn image_mark(pages: impl Iterator<Item = u64>) -> u64 {
    pages.fold(2, mix)
}

/// KV of one position: of its token, of all before it, of the adapters, and of whose it is (so that sharing across
/// tenants shows in the output).
pub(super) fn kv_mark(before: u64, token: u32, position: usize, adapters: u64, owner: u64) -> u64 {
    mix(mix(mix(before, u64::from(token)), position as u64), mix(adapters, owner))
}

/// What attention over all positions gives: a sum, so that each one counts.
pub(super) fn attend(sum: u64, position: usize, kv: u64) -> u64 {
    sum.wrapping_add(mix(kv, position as u64))
}

/// What stands for a mean over positions: it depends on their order, as sums of floats do.
pub(super) fn average(sum: u64, kv: u64) -> u64 {
    mix(sum, kv)
}

/// An embedding that tells marks apart.
pub(super) fn pooled(mark: u64) -> Vec<f32> {
    vec![(mark >> 40) as f32, (mark & 0xff_ffff) as f32]
}

/// The token drawn at `position` (the number of tokens before it). Where a mask has none but forbidden ones, they may come.
pub(super) fn draw(attended: u64, seed: u64, position: usize, forbidden: &[u32], mask: Option<&[u32]>) -> u32 {
    let mut x = mix(mix(attended, seed), position as u64);
    let may = |token: u32| mask.is_none_or(|words| has(words, token));
    let none_left = (0..VOCAB as u32).all(|token| !may(token) || forbidden.contains(&token));
    loop {
        let token = (x % VOCAB) as u32;
        if may(token) && (none_left || !forbidden.contains(&token)) {
            return token;
        }
        x = mix(x, 7);
    }
}

pub(super) fn logprob(attended: u64, token: u32) -> f32 {
    -((mix(attended, u64::from(token)) % 1000) as f32) / 100.0
}

/// Whose KV it is: tenant and salt.
pub(super) fn owner_mark(tenant: u64, salt: Option<&str>) -> u64 {
    let salt = salt.map_or(0, |salt| salt.bytes().fold(5, |sum, byte| mix(sum, u64::from(byte))));
    mix(mix(3, tenant), salt)
}

/// splitmix64.
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(mix(seed, 0x5EED))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform enough over `from..=to`.
    pub(super) fn range(&mut self, from: u32, to: u32) -> u32 {
        from + (self.next() % u64::from(to - from + 1)) as u32
    }

    pub(super) fn chance(&mut self, per_thousand: u32) -> bool {
        self.next() % 1000 < u64::from(per_thousand)
    }

    pub(super) fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[(self.next() % of.len() as u64) as usize]
    }
}
