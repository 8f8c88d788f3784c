//! top-k, top-p and min-p without sorting the vocabulary.

use super::SampleParams;

/// A token that may be drawn; `z` is its logit over the temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) token: u32,
    pub(super) z: f32,
}

/// Whether any filter takes something away.
pub(super) fn active(params: &SampleParams, vocab: usize) -> bool {
    let top_k = params.top_k != 0 && (params.top_k as usize) < vocab;
    top_k || params.top_p < 1.0 || params.min_p > 0.0
}

/// Fills `kept` with the tokens that top-k, then top-p (of what top-k left), then min-p leave. `max` is the largest `z`, and
/// its token always stays. Among equals the lower id is kept.
pub(super) fn keep(z: &[f32], max: f32, params: &SampleParams, kept: &mut Vec<Candidate>) {
    let top_k = if params.top_k == 0 { z.len() } else { params.top_k as usize };
    if top_k < z.len() {
        collect(z, f32::NEG_INFINITY, kept);
        if top_k < kept.len() {
            kept.select_nth_unstable_by(top_k - 1, order);
            kept.truncate(top_k);
        }
        if params.top_p < 1.0 {
            let mass = kept.iter().map(|c| weight(c.z, max)).sum();
            take_mass(kept, max, params.top_p, mass);
        }
    } else if params.top_p < 1.0 {
        let mass: f64 = z.iter().map(|&z| weight(z, max)).sum();
        // Widen the band below the maximum until it holds enough: a sort of a band is far less than one of the vocabulary.
        let mut band = 2.0f32;
        loop {
            let least = if band > 1000.0 { f32::NEG_INFINITY } else { max - band };
            collect(z, least, kept);
            let inside: f64 = kept.iter().map(|c| weight(c.z, max)).sum();
            if inside >= f64::from(params.top_p) * mass * (1.0 + 1e-9) || least == f32::NEG_INFINITY {
                break;
            }
            band *= 2.0;
        }
        take_mass(kept, max, params.top_p, mass);
    } else {
        collect(z, f32::NEG_INFINITY, kept);
    }
    if params.min_p > 0.0 {
        kept.retain(|c| c.z == max || weight(c.z, max) >= f64::from(params.min_p));
    }
}

/// Probability relative to the largest.
fn weight(z: f32, max: f32) -> f64 {
    (f64::from(z) - f64::from(max)).exp()
}

/// Likelier first, then the lower id.
fn order(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.z.total_cmp(&a.z).then(a.token.cmp(&b.token))
}

fn collect(z: &[f32], least: f32, kept: &mut Vec<Candidate>) {
    kept.clear();
    let all = z.iter().enumerate().filter(|(_, z)| **z >= least && **z > f32::NEG_INFINITY);
    kept.extend(all.map(|(token, &z)| Candidate { token: token as u32, z }));
}

/// Keeps the fewest tokens, likeliest first, that hold `top_p` of `mass`; at least one.
fn take_mass(kept: &mut Vec<Candidate>, max: f32, top_p: f32, mass: f64) {
    kept.sort_unstable_by(order);
    let (mut sum, wanted) = (0.0, f64::from(top_p) * mass);
    let enough = kept.iter().position(|c| {
        sum += weight(c.z, max);
        sum >= wanted
    });
    kept.truncate(enough.map_or(kept.len(), |last| last + 1));
}
