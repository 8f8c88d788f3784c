//! Greedy generation against tokens and log-probabilities that transformers + PEFT gave.

use super::runner::{Runner, Sequence};
use loramux_kernels::{ArenaDtype, Dtype, SlotScale};
use loramux_models::adapter::{self, AdapterLimits};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// One prompt with one adapter, or none.
pub(crate) struct Case {
    pub(crate) adapter: Option<String>,
    pub(crate) prompt: Vec<u32>,
    pub(crate) output: Vec<u32>,
    pub(crate) margin: Vec<f64>,
    pub(crate) top: Vec<Vec<(u32, f32)>>,
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn logprob(logits: &[f32], token: u32) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    logits[token as usize] - max - sum.ln() as f32
}

fn argmax(logits: &[f32]) -> u32 {
    let best =
        logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &v)| if v > best.1 { (i, v) } else { best });
    best.0 as u32
}

/// What a storage type may change: the golden run is float32.
pub(crate) struct Tolerance {
    /// `None`: the file's own, which may be quantised.
    pub(crate) dtype: Option<Dtype>,
    pub(crate) kv: ArenaDtype,
    /// Steps with a smaller gap between the two best logits may go either way.
    pub(crate) margin: f64,
    pub(crate) logprob: f32,
}

pub(crate) fn publish_all(runner: &mut Runner, adapters: &Path, cases: &[Case]) -> BTreeMap<String, SlotScale> {
    let mut slots = BTreeMap::new();
    for name in cases.iter().filter_map(|case| case.adapter.as_ref()) {
        if !slots.contains_key(name) {
            let adapter = adapter::read(&adapters.join(name), runner.decoder.spec(), &AdapterLimits::default());
            let adapter = adapter.unwrap_or_else(|error| panic!("{name}: {error}"));
            slots.insert(name.clone(), runner.publish(&adapter));
        }
    }
    slots
}

/// Tokens of all cases.
pub(crate) fn tokens(cases: &[Case]) -> usize {
    cases.iter().map(|case| case.output.len()).sum()
}

/// Runs every case greedily in one batch. Returns how many tokens were compared.
pub(crate) fn check(model: &Path, adapters: &Path, cases: &[Case], tolerance: &Tolerance) -> usize {
    let mut runner = Runner::new(model, tolerance.dtype, 2 << 20, 600).with_kv(tolerance.kv);
    let slots = publish_all(&mut runner, adapters, cases);
    let mut sequences: Vec<Sequence> = cases
        .iter()
        .map(|case| Sequence::new(&case.prompt, &case.adapter.iter().map(|name| slots[name]).collect::<Vec<_>>()))
        .collect();
    let (mut going, mut compared, mut worst, mut widest) = (vec![true; cases.len()], 0, 0.0f32, 0.0f64);
    let steps = cases.iter().map(|case| case.output.len()).max().expect("a case");
    for step in 0..steps {
        let mut chunks: Vec<(&mut Sequence, usize)> = sequences
            .iter_mut()
            .map(|sequence| {
                let rows = sequence.tokens.len() - sequence.computed;
                (sequence, rows)
            })
            .collect();
        let logits = runner.step_last(&mut chunks);
        for (i, (case, logits)) in cases.iter().zip(&logits).enumerate() {
            let token = argmax(logits);
            sequences[i].tokens.push(token);
            if !going[i] || step >= case.output.len() {
                continue;
            }
            let what = format!("{tolerance} case {i} ({:?}) step {step}", case.adapter);
            if let Some(top) = case.top.get(step) {
                for &(id, want) in top {
                    let difference = (logprob(logits, id) - want).abs();
                    worst = worst.max(difference);
                    assert!(
                        difference < tolerance.logprob,
                        "{what}: logprob of {id} differs by {difference} from {want}"
                    );
                }
            }
            if token == case.output[step] {
                compared += 1;
            } else {
                let margin = case.margin[step];
                assert!(margin < tolerance.margin, "{what}: {token} instead of {}, margin {margin}", case.output[step]);
                widest = widest.max(margin);
                going[i] = false;
            }
        }
    }
    let all = tokens(cases);
    println!(
        "{tolerance}: {compared} of {all} tokens equal, worst logprob difference {worst:.2e}, widest margin {widest:.2}"
    );
    compared
}

impl std::fmt::Display for Tolerance {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self.dtype {
            Some(dtype) => write!(formatter, "weights {dtype:?}, cache {:?}", self.kv),
            None => write!(formatter, "weights as stored, cache {:?}", self.kv),
        }
    }
}
