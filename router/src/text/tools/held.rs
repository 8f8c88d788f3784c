//! Text that is held back: blank space, then what may become a mark.

/// See the module. A mark has no blank space in it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    text: String,
    /// Bytes of blank space in front. Known, so that a long run of it is not looked at again and again.
    space: usize,
}

/// What a character made of the held text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Match {
    /// It may become a mark.
    Open,
    /// It ends with a whole mark.
    Whole,
    /// This much of its front is not part of any.
    Not(String),
}

impl Held {
    /// Holds `c` without asking what it is.
    pub(crate) fn push(&mut self, c: char) {
        let blank = self.space == self.text.len() && c.is_whitespace();
        self.text.push(c);
        if blank {
            self.space = self.text.len();
        }
    }

    /// What may be the first part of a mark.
    pub(crate) fn candidate(&self) -> &str {
        self.text.get(self.space..).unwrap_or("")
    }

    /// Compares the held text with `marks`. After [`Match::Not`] the rest is to be compared again.
    pub(crate) fn compare(&mut self, marks: &[&str]) -> Match {
        let candidate = self.candidate();
        if marks.contains(&candidate) {
            return Match::Whole;
        }
        if marks.iter().any(|mark| mark.starts_with(candidate)) {
            return Match::Open;
        }
        let end = self.space + candidate.chars().next().map_or(0, char::len_utf8);
        let rest = self.text.split_off(end);
        let front = std::mem::replace(&mut self.text, rest);
        self.space = self.text.len() - self.text.trim_start().len();
        Match::Not(front)
    }

    /// Gives all of it out.
    pub(crate) fn take(&mut self) -> String {
        self.space = 0;
        std::mem::take(&mut self.text)
    }
}
