//! From a sequence's parameters to what the kernel reads: edits of single tokens, and a mask.

use super::cuda::TokenEdit;
use super::{History, SampleParams};

/// Appends one edit for each token that bias, bans or penalties touch; in rising order. Returns how many.
pub fn push_edits(edits: &mut Vec<TokenEdit>, params: &SampleParams, history: &History) -> usize {
    let first = edits.len();
    let edit = |token, flags, bias| TokenEdit { token, flags, bias, raw: 0.0 };
    edits.extend(params.logit_bias.iter().map(|&(token, bias)| edit(token, 0, bias)));
    edits.extend(params.ban_in_force().iter().map(|&token| edit(token, TokenEdit::BAN, 0.0)));
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

/// Appends what may come, one bit for each of `vocab`: the mask's tokens that are allowed too. False, and nothing, where
/// every token may.
pub fn push_mask(masks: &mut Vec<u32>, params: &SampleParams, vocab: usize) -> bool {
    let (first, words) = (masks.len(), vocab.div_ceil(32));
    if let Some(mask) = params.mask.filter(|_| params.allowed.is_empty()) {
        masks.extend(mask.iter().copied().chain(std::iter::repeat(0)).take(words));
        return true;
    }
    if params.allowed.is_empty() {
        return false;
    }
    masks.resize(first + words, 0);
    for &token in params.allowed.iter().filter(|&&token| (token as usize) < vocab) {
        let (word, bit) = (token as usize / 32, 1 << (token % 32));
        let may = params.mask.is_none_or(|mask| mask.get(word).is_some_and(|word| word & bit != 0));
        masks[first + word] |= if may { bit } else { 0 };
    }
    true
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
        let allowed = SampleParams { allowed: &[0, 33, 39, 40, 900], ..SampleParams::default() };
        assert!(push_mask(&mut masks, &allowed, 40));
        assert_eq!(masks, [5, 1, 0x82]);
        masks.clear();
        assert!(push_mask(&mut masks, &SampleParams { mask: Some(&[6]), ..SampleParams::default() }, 40));
        assert_eq!(masks, [6, 0], "words that are missing are 0");
        masks.clear();
        assert!(push_mask(&mut masks, &SampleParams { mask: Some(&[7, 0x80]), ..allowed }, 40));
        assert_eq!(masks, [1, 0x80], "both must agree");
        assert!(!push_mask(&mut masks, &SampleParams::default(), 40) && masks.len() == 2);
    }
}
