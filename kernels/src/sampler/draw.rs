//! Gumbel-max: the argmax of `z + g` with independent Gumbel noise `g` has the distribution `softmax(z)`.

use super::filters::Candidate;
use super::philox::philox4x32;

/// Noise of one draw.
#[derive(Clone, Copy)]
pub(super) struct Draw {
    pub(super) seed: u64,
    pub(super) position: u64,
}

/// The largest noise there is: -ln(-ln(1 - 2^-33)), rounded up.
const NOISE_MAX: f32 = 22.88;

impl Draw {
    /// Four random words: those of tokens `4 * group..4 * group + 4`.
    fn words(self, group: u32) -> [u32; 4] {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        philox4x32(key, [self.position as u32, (self.position >> 32) as u32, group, 0])
    }

    /// Draws from all tokens; `likeliest` is that of the largest `z`.
    pub(super) fn all(self, z: &[f32], likeliest: u32) -> u32 {
        // Begin with the likeliest: most other tokens then cannot win with any noise, or not with theirs.
        let mut best = Best { key: f64::NEG_INFINITY, token: likeliest };
        best.offer(likeliest, z[likeliest as usize], self.words(likeliest / 4)[likeliest as usize % 4]);
        for (group, four) in z.chunks(4).enumerate() {
            let least = (best.key as f32) - NOISE_MAX;
            if four.iter().all(|&z| z < least) {
                continue;
            }
            let words = self.words(group as u32);
            for (i, (&z, word)) in four.iter().zip(words).enumerate() {
                best.offer(4 * group as u32 + i as u32, z, word);
            }
        }
        best.token
    }

    /// Draws from the candidates.
    pub(super) fn among(self, candidates: &[Candidate]) -> Option<u32> {
        let first = candidates.first()?;
        let mut best = Best { key: f64::NEG_INFINITY, token: first.token };
        for candidate in candidates {
            let word = self.words(candidate.token / 4)[candidate.token as usize % 4];
            best.offer(candidate.token, candidate.z, word);
        }
        Some(best.token)
    }
}

/// The winner so far.
struct Best {
    key: f64,
    token: u32,
}

impl Best {
    fn offer(&mut self, token: u32, z: f32, word: u32) {
        if z == f32::NEG_INFINITY {
            return;
        }
        // 1 - u >= 2^-(n + 1) with n leading ones in the word, so g <= -ln(1 - u) <= (n + 1) ln 2: spares the logarithms.
        let most = f64::from(word.leading_ones() + 1) * std::f64::consts::LN_2;
        if f64::from(z) + most < self.key {
            return;
        }
        let key = f64::from(z) + gumbel(word);
        if key > self.key || (key == self.key && token < self.token) {
            *self = Self { key, token };
        }
    }
}

/// Gumbel noise of a random word: u = (word + 1/2) / 2^32 is never 0 or 1.
pub(super) fn gumbel(word: u32) -> f64 {
    let u = (f64::from(word) + 0.5) / 4_294_967_296.0;
    -(-u.ln()).ln()
}
