//! Finds stop strings in text that arrives in pieces.
//!
//! The match that *ends* first wins; of those that end together, the longest. So the outcome does not depend on how the
//! text was cut into pieces. Text that could still become a stop string is held back.

/// The stop strings of one request and the text that one sequence holds back.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

/// What one piece of text led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopOutcome {
    /// No stop string yet; this much can be shown.
    Clear(String),
    /// Stop string `which` is complete. `before` is the text in front of it that was not shown yet.
    Found {
        /// Index into the stop strings of the request.
        which: usize,
        /// Text to show, without the stop string.
        before: String,
    },
}

impl StopMatcher {
    /// `stops` hold no empty string.
    pub fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|s| !s.is_empty()), "validation refuses empty stop strings");
        Self { stops, held: String::new() }
    }

    /// Takes the next piece. With `armed` false (fewer than `min_tokens` were generated) nothing that ends in this
    /// piece counts, but a match may begin in it.
    pub fn push(&mut self, piece: &str, armed: bool) -> StopOutcome {
        if self.stops.is_empty() {
            return StopOutcome::Clear(piece.to_owned());
        }
        let old_bytes = self.held.len();
        self.held.push_str(piece);
        if armed && let Some((start, which)) = self.first_match(old_bytes) {
            let mut before = std::mem::take(&mut self.held);
            before.truncate(start);
            return StopOutcome::Found { which, before };
        }
        let rest = self.held.split_off(self.clear_bytes());
        StopOutcome::Clear(std::mem::replace(&mut self.held, rest))
    }

    /// The text is over: what is held back is no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start and index of the match that ends first, if one ends behind `old_bytes`.
    fn first_match(&self, old_bytes: usize) -> Option<(usize, usize)> {
        let ends_new = |stop: &str| {
            let mut from = old_bytes.saturating_sub(stop.len());
            while !self.held.is_char_boundary(from) {
                from -= 1;
            }
            let hits = self.held.get(from..)?.match_indices(stop);
            hits.map(|(at, _)| from + at).find(|start| start + stop.len() > old_bytes)
        };
        let hits = self.stops.iter().enumerate().filter_map(|(which, stop)| Some((ends_new(stop)?, which, stop.len())));
        hits.min_by_key(|(start, which, bytes)| (start + bytes, *start, *which)).map(|(start, which, _)| (start, which))
    }

    /// Bytes from the front that cannot be part of a later match.
    fn clear_bytes(&self) -> usize {
        let longest = self.stops.iter().map(|stop| prefix_at_end(&self.held, stop)).max().unwrap_or(0);
        self.held.len() - longest
    }
}

/// Bytes of the longest proper prefix of `stop` that `text` ends with.
fn prefix_at_end(text: &str, stop: &str) -> usize {
    let starts = stop.char_indices().map(|(at, _)| at).rev();
    starts
        .filter(|&bytes| bytes <= text.len())
        .find(|&bytes| stop.get(..bytes).is_some_and(|p| text.ends_with(p)))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: try every end, then every stop string.
    fn naive(text: &str, stops: &[String]) -> Option<(String, usize)> {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let hits = stops.iter().enumerate().filter(|(_, s)| text[..end].ends_with(s.as_str()));
            if let Some((which, stop)) = hits.max_by_key(|(i, s)| (s.len(), usize::MAX - i)) {
                return Some((text[..end - stop.len()].to_owned(), which));
            }
        }
        None
    }

    fn streamed(pieces: &[String], stops: &[String]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.to_vec());
        let mut shown = String::new();
        for piece in pieces {
            match matcher.push(piece, true) {
                StopOutcome::Clear(text) => shown.push_str(&text),
                StopOutcome::Found { which, before } => return (shown + &before, Some(which)),
            }
        }
        (shown + &matcher.finish(), None)
    }

    proptest::proptest! {
        #[test]
        fn pieces_find_what_a_search_of_the_whole_text_finds(
            pieces in proptest::collection::vec("[abé]{0,4}", 0..12),
            stops in proptest::collection::vec("[abé]{1,4}", 0..4),
        ) {
            let text = pieces.concat();
            let expected = match naive(&text, &stops) {
                Some((before, which)) => (before, Some(which)),
                None => (text, None),
            };
            proptest::prop_assert_eq!(streamed(&pieces, &stops), expected);
        }

        #[test]
        fn nothing_that_is_shown_early_belongs_to_a_match(
            pieces in proptest::collection::vec("[ab]{0,3}", 0..10),
            stop in "[ab]{2,5}",
        ) {
            let (shown, found) = streamed(&pieces, std::slice::from_ref(&stop));
            proptest::prop_assert!(!shown.contains(&stop));
            proptest::prop_assert_eq!(found.is_some(), pieces.concat().contains(&stop));
        }
    }

    #[test]
    fn a_match_that_ends_before_min_tokens_does_not_count_but_may_begin_there() {
        let mut matcher = StopMatcher::new(vec!["END".into()]);
        assert_eq!(matcher.push("xENDx", false), StopOutcome::Clear("xENDx".into()));
        assert_eq!(matcher.push("yE", false), StopOutcome::Clear("y".into()));
        assert_eq!(matcher.push("NDz", true), StopOutcome::Found { which: 0, before: String::new() });
    }

    #[test]
    fn a_complete_match_from_before_min_tokens_is_not_found_later() {
        let mut matcher = StopMatcher::new(vec!["aa".into()]);
        assert_eq!(matcher.push("aa", false), StopOutcome::Clear("a".into()));
        assert_eq!(matcher.push("b", true), StopOutcome::Clear("ab".into()));
    }
}
