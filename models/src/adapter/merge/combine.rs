//! Several tensors of one shape become one.
//!
//! Source: PEFT `utils/merge_utils.py` (0.21), whose numbers are in `models/tests/data/merge`. TIES is arXiv:2306.01708,
//! DARE arXiv:2311.03099.

use super::MergeStrategy;

/// What is done to tensors, without what they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recipe {
    pub(super) strategy: MergeStrategy,
    /// Share of values that stay; 1 = all.
    pub(super) density: f64,
    pub(super) sign_by_frequency: bool,
}

/// One part of a tensor: all of one length.
pub(super) struct Part {
    pub(super) values: Vec<f32>,
    pub(super) weight: f32,
}

impl Recipe {
    /// Drops values of one part's tensor before it meets others. `random` gives 32 bits for each value.
    pub(super) fn prune(&self, values: &mut [f32], random: impl FnOnce(&mut [u8])) {
        if self.density >= 1.0 {
            return;
        }
        match self.strategy {
            MergeStrategy::Linear => {}
            MergeStrategy::Ties => keep_largest(values, self.density),
            MergeStrategy::DareLinear | MergeStrategy::DareTies => {
                let mut bits = vec![0; values.len() * 4];
                random(&mut bits);
                drop_at_random(values, self.density, &bits);
            }
        }
    }

    /// The weighted sum, or of each place the mean of the weighted values that have the elected sign. `parts` is not empty.
    pub(super) fn combine(&self, parts: &[Part]) -> Vec<f32> {
        let len = parts.iter().map(|part| part.values.len()).max().unwrap_or(0);
        let elects = matches!(self.strategy, MergeStrategy::Ties | MergeStrategy::DareTies);
        let at =
            |place: usize| parts.iter().map(move |part| (part.values.get(place).copied().unwrap_or(0.0), part.weight));
        let merged = (0..len).map(|place| {
            if !elects {
                return at(place).map(|(value, weight)| value * weight).sum();
            }
            let elected = self.elect(at(place).map(|(value, _)| value));
            let agreeing = at(place).filter(|(value, _)| sign(*value) == elected);
            let (sum, count) = agreeing.fold((0.0, 0u32), |(sum, n), (value, weight)| (sum + value * weight, n + 1));
            sum / count.max(1) as f32
        });
        merged.collect()
    }

    /// 1 or -1; 1 if it is even.
    fn elect(&self, values: impl Iterator<Item = f32>) -> i8 {
        let votes: f32 = match self.sign_by_frequency {
            true => values.map(|value| f32::from(sign(value))).sum(),
            false => values.sum(),
        };
        if votes >= 0.0 { 1 } else { -1 }
    }
}

fn sign(value: f32) -> i8 {
    i8::from(value > 0.0) - i8::from(value < 0.0)
}

/// Keeps the largest by absolute value, `density * n` of them rounded down; of equal ones the first.
fn keep_largest(values: &mut [f32], density: f64) {
    let keep = (density * values.len() as f64) as usize;
    let mut order: Vec<u32> = (0..u32::try_from(values.len()).unwrap_or(u32::MAX)).collect();
    if keep < order.len() {
        let size = |at: u32| values[at as usize].abs();
        order.select_nth_unstable_by(keep, |a, b| size(*b).total_cmp(&size(*a)).then(a.cmp(b)));
        for at in order.split_off(keep) {
            values[at as usize] = 0.0;
        }
    }
}

/// Keeps each with probability `density`, and makes up for the others.
fn drop_at_random(values: &mut [f32], density: f64, bits: &[u8]) {
    let below = density * (1u64 << 32) as f64;
    for (value, bits) in values.iter_mut().zip(bits.as_chunks::<4>().0) {
        let kept = f64::from(u32::from_le_bytes(*bits)) < below;
        *value = if kept { (f64::from(*value) / density) as f32 } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn numbers(value: &Value) -> Vec<f32> {
        let list = value.as_array().expect("a list");
        list.iter().map(|number| number.as_f64().expect("a number") as f32).collect()
    }

    #[test]
    fn merges_are_those_of_peft() {
        let golden: Value = serde_json::from_str(include_str!("../../../tests/data/merge/golden.json")).expect("JSON");
        let cases = golden.as_array().expect("a list");
        assert_eq!(cases.len(), 18);
        for case in cases {
            let strategy = match case["strategy"].as_str().expect("a name") {
                "linear" => MergeStrategy::Linear,
                "ties" => MergeStrategy::Ties,
                "dare_linear" => MergeStrategy::DareLinear,
                _ => MergeStrategy::DareTies,
            };
            let density = case["density"].as_f64().unwrap_or(1.0);
            let recipe = Recipe { strategy, density, sign_by_frequency: case["sign"] == "frequency" };
            let weights = numbers(&case["weights"]);
            let parts: Vec<Part> = case["parts"]
                .as_array()
                .expect("a list")
                .iter()
                .zip(weights)
                .map(|(part, weight)| {
                    let mut values = numbers(part);
                    recipe.prune(&mut values, |_| panic!("{case}: nothing is drawn"));
                    Part { values, weight }
                })
                .collect();
            let (merged, want) = (recipe.combine(&parts), numbers(&case["merged"]));
            for (at, (have, want)) in merged.iter().zip(&want).enumerate() {
                assert!((have - want).abs() <= 1e-6, "{case}: {have} at {at}, wanted {want}");
            }
        }
    }

    #[test]
    fn dropping_at_random_keeps_the_share_and_the_mean() {
        let recipe = Recipe { strategy: MergeStrategy::DareLinear, density: 0.25, sign_by_frequency: false };
        let mut values = vec![2.0f32; 100_000];
        recipe.prune(&mut values, |bits| blake3::Hasher::new().finalize_xof().fill(bits));
        let kept = values.iter().filter(|value| **value != 0.0).count();
        assert!((24_000..26_000).contains(&kept), "{kept} of 100000 at 25 %");
        assert!(values.iter().all(|value| *value == 0.0 || *value == 8.0));
    }
}
