//! One JSON object inside a model's text, read a character at a time.

use std::ops::Range;

/// A call has a name and arguments; what has many more members is none.
const MEMBERS_MAX: usize = 16;

/// What a character did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scan {
    /// The object goes on.
    More,
    /// This character cannot stand here.
    Bad,
    /// This character closed the object.
    Done,
}

/// Where in the object the next character stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Open,
    KeyOrEnd,
    Key,
    InKey,
    Colon,
    Value,
    InText,
    InNested,
    InScalar,
    Next,
}

/// Follows the members of one object. Nested values are only balanced: whether they are valid JSON is not its business.
#[derive(Clone, Debug, Default)]
pub(crate) struct ObjectScanner {
    text: String,
    stage: Stage,
    in_string: bool,
    escaped: bool,
    depth: usize,
    /// Where the current key and value begin.
    key: Range<usize>,
    value_start: usize,
    /// Closed members: key with its quotes, value.
    members: Vec<(Range<usize>, Range<usize>)>,
}

impl ObjectScanner {
    /// Takes the next character.
    pub(crate) fn push(&mut self, c: char) -> Scan {
        let start = self.text.len();
        self.text.push(c);
        let space = matches!(c, ' ' | '\t' | '\n' | '\r');
        match (self.stage, c) {
            (Stage::Open | Stage::KeyOrEnd | Stage::Key | Stage::Colon | Stage::Value | Stage::Next, _) if space => {}
            (Stage::Open, '{') => self.stage = Stage::KeyOrEnd,
            (Stage::KeyOrEnd | Stage::Key, '"') => (self.key, self.stage) = (start..start, Stage::InKey),
            (Stage::KeyOrEnd | Stage::Next, '}') => return Scan::Done,
            (Stage::Next, ',') => self.stage = Stage::Key,
            (Stage::InKey, _) => {
                if self.string_ends(c) {
                    (self.key.end, self.stage) = (self.text.len(), Stage::Colon);
                }
            }
            (Stage::Colon, ':') => self.stage = Stage::Value,
            (Stage::Value, _) => return self.begin_value(start, c),
            (Stage::InText, _) => {
                if self.string_ends(c) {
                    return self.close_value(self.text.len(), Stage::Next);
                }
            }
            (Stage::InNested, _) => return self.nested(c),
            (Stage::InScalar, ',') => return self.close_value(start, Stage::Key),
            (Stage::InScalar, '}') => {
                return if self.close_value(start, Stage::Next) == Scan::Bad { Scan::Bad } else { Scan::Done };
            }
            (Stage::InScalar, _) if space => return self.close_value(start, Stage::Next),
            (Stage::InScalar, _) if is_scalar(c) => {}
            _ => return Scan::Bad,
        }
        Scan::More
    }

    fn begin_value(&mut self, start: usize, c: char) -> Scan {
        self.value_start = start;
        self.stage = match c {
            '"' => Stage::InText,
            '{' | '[' => {
                self.depth = 1;
                Stage::InNested
            }
            _ if is_scalar(c) => Stage::InScalar,
            _ => return Scan::Bad,
        };
        Scan::More
    }

    fn nested(&mut self, c: char) -> Scan {
        if self.in_string {
            self.in_string = !self.string_ends(c);
            return Scan::More;
        }
        match c {
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => self.depth -= 1,
            _ => {}
        }
        if self.depth == 0 { self.close_value(self.text.len(), Stage::Next) } else { Scan::More }
    }

    /// `c` stands in a string: is it the closing quote?
    fn string_ends(&mut self, c: char) -> bool {
        if self.escaped {
            self.escaped = false;
            return false;
        }
        self.escaped = c == '\\';
        c == '"'
    }

    fn close_value(&mut self, end: usize, stage: Stage) -> Scan {
        self.stage = stage;
        self.members.push((self.key.clone(), self.value_start..end));
        if self.members.len() > MEMBERS_MAX { Scan::Bad } else { Scan::More }
    }

    fn key_is(&self, key: &Range<usize>, name: &str) -> bool {
        let quoted = self.text.get(key.clone()).unwrap_or("");
        quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) == Some(name)
    }

    /// The text of a closed member's value.
    pub(crate) fn member(&self, name: &str) -> Option<&str> {
        let (_, value) = self.members.iter().find(|(key, _)| self.key_is(key, name))?;
        self.text.get(value.clone())
    }

    /// The text so far of the object or array that is being read as the value of one of `names`.
    pub(crate) fn open_value(&self, names: &[&str]) -> Option<&str> {
        let open = self.stage == Stage::InNested && names.iter().any(|name| self.key_is(&self.key, name));
        if open { self.text.get(self.value_start..) } else { None }
    }
}

fn is_scalar(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.')
}
