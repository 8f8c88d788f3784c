//! Penalties on tokens that were there already.

use super::{History, SampleParams, SampleScratch};

/// Marks a token of the prompt or the output; the lower bits count its occurrences in the output.
const SEEN: u32 = 1 << 31;

/// Applies repetition, then frequency and presence penalties.
pub(super) fn apply(logits: &mut [f32], params: &SampleParams, history: &History, scratch: &mut SampleScratch) {
    let SampleParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = *params;
    let repetition = repetition_penalty != 1.0;
    if !repetition && presence_penalty == 0.0 && frequency_penalty == 0.0 {
        return;
    }
    let SampleScratch { counts, touched, .. } = scratch;
    if counts.len() < logits.len() {
        counts.resize(logits.len(), 0);
    }
    touched.clear();
    let prompt = if repetition { history.prompt } else { &[] };
    for (&token, add) in prompt.iter().map(|token| (token, 0)).chain(history.generated.iter().map(|token| (token, 1))) {
        if (token as usize) < logits.len() {
            let count = &mut counts[token as usize];
            if *count == 0 {
                touched.push(token);
            }
            *count = (*count | SEEN) + add;
        }
    }
    for &token in touched.iter() {
        let (logit, count) = (&mut logits[token as usize], std::mem::take(&mut counts[token as usize]) & !SEEN);
        if repetition {
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
        }
        if count > 0 {
            *logit -= frequency_penalty * count as f32;
            *logit -= presence_penalty;
        }
    }
}
