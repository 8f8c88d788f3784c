//! From a sequence's parameters to what the kernel reads: edits of single tokens, and a mask.

use super::cuda::TokenEdit;
use super::{History, SampleParams};

/// Appends one edit for each token that bias, bans or penalties touch; in rising order. Returns how many.
pub fn push_edits(edits: &mut Vec<TokenEdit>, params: &SampleParams, history: &History) -> usize {
    let first = edits.len();
    let edit = |token, flags, bias| TokenEdit { token, flags, bias, raw: 0.0 };
    edits.extend(params.logit_bias.iter().map(|&(token, bias)| edit(token, 0, bias)));
    edits.extend(params.ban.iter().map(|&token| edit(token, TokenEdit::BAN, 0.0)));
    if params.repetition_penalty != 1.0 {
        edits.extend(history.prompt.iter().map(|&token| edit(token, TokenEdit::SEEN, 0.0)));
    }
    if params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        edits.extend(history.generated.iter().map(|&token| edit(token, 1, 0.0)));
    }
    // Stable, so that biases of one token are added in the order given.
    edits[first..].sort_by_key(|edit| edit.token);
    let mut end = first;
    for at in first..edits.len() {
        let next = edits[at];
        if end > first && edits[end - 1].token == next.token {
            let last = &mut edits[end - 1];
            let marks = TokenEdit::BAN | TokenEdit::SEEN;
            last.flags = ((last.flags | next.flags) & marks) | ((last.flags & !marks) + (next.flags & !marks));
            last.bias += next.bias;
        } else {
            edits[end] = next;
            end += 1;
        }
    }
    edits.truncate(end);
    end - first
}

/// Appends the mask of `allowed` tokens, one bit for each of `vocab`; those outside are left out.
pub fn push_mask(masks: &mut Vec<u32>, allowed: &[u32], vocab: usize) {
    let first = masks.len();
    masks.resize(first + vocab.div_ceil(32), 0);
    for &token in allowed.iter().filter(|&&token| (token as usize) < vocab) {
        masks[first + token as usize / 32] |= 1 << (token % 32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_edited_once() {
        let params = SampleParams {
            logit_bias: &[(7, 0.5), (2, -1.0)],
            ban: &[2, 9, 9],
            repetition_penalty: 1.2,
            ..SampleParams::default()
        };
        let history = History { prompt: &[7, 7, 3], generated: &[3, 2, 3] };
        let mut edits = vec![TokenEdit { token: 2, ..TokenEdit::default() }];
        assert_eq!(push_edits(&mut edits, &params, &history), 4);
        let (ban, seen) = (TokenEdit::BAN, TokenEdit::SEEN);
        let got: Vec<_> = edits[1..].iter().map(|edit| (edit.token, edit.flags, edit.bias)).collect();
        assert_eq!(got, [(2, ban + 1, -1.0), (3, seen + 2, 0.0), (7, seen, 0.5), (9, ban, 0.0)]);
        let none = SampleParams { presence_penalty: 0.0, ..SampleParams::default() };
        assert_eq!(push_edits(&mut edits, &none, &history), 0);
    }

    #[test]
    fn a_mask_has_a_bit_for_each_token() {
        let mut masks = vec![5];
        push_mask(&mut masks, &[0, 33, 39, 40, 900], 40);
        assert_eq!(masks, [5, 1, 0x82]);
    }
}
