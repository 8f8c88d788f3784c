//! Finds tool calls in a model's text while it is generated.

use super::ToolFormat;
use super::held::{Held, Match};
use super::object::{ObjectScanner, Scan};

/// Members under which models give a call's arguments.
const ARGUMENTS: [&str; 2] = ["arguments", "parameters"];
/// Bytes of a function's name.
const NAME_BYTES_MAX: usize = 64;

/// A part of a message, in the order of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolDelta {
    /// Text that belongs to no call.
    Text(String),
    /// Call `index` (from 0) of a function begins.
    Start { index: usize, name: String },
    /// More of the JSON text of its arguments.
    Arguments { index: usize, text: String },
}

/// What the reader stands in.
#[derive(Clone, Debug)]
enum State {
    /// Plain text: `held` is blank space and what may be the first part of a mark.
    Text,
    /// Behind a mark: an object, a list or a name has to follow.
    Head,
    /// Mistral's form: the name, then `[ARGS]`.
    Name(String),
    /// A call as one object. Once its name and the begin of its arguments are read, it is given out.
    Call(ObjectScanner),
    /// Mistral's form: the arguments alone, given out as they come.
    Arguments(ObjectScanner),
    /// Behind a call: its closing mark, or what separates it from the next.
    After,
}

/// Reads one reply. What it gives, put together, depends on the whole text only, not on where it was cut: it looks at one
/// character after the other. Text that could become a call is held back until that is decided; what is no call after all
/// comes out as text, unchanged.
#[derive(Clone, Debug)]
pub(crate) struct ToolReader {
    format: ToolFormat,
    /// Names of the functions that may be called; what names another one is text.
    names: std::sync::Arc<[String]>,
    /// Calls beyond this many are left out.
    calls_max: usize,
    state: State,
    held: Held,
    /// In a list of calls.
    in_list: bool,
    /// Nothing but blank space came yet.
    at_start: bool,
    /// The call that is read was begun in the output.
    begun: bool,
    /// Its arguments are not over.
    open: bool,
    calls: usize,
    whole_calls: usize,
    /// Some text was given out.
    has_text: bool,
    /// Nothing but blank space came since the last call.
    behind_call: bool,
}

impl ToolReader {
    /// A reader for one reply.
    pub(crate) fn new(format: ToolFormat, names: std::sync::Arc<[String]>, calls_max: usize) -> Self {
        Self {
            format,
            names,
            calls_max,
            state: State::Text,
            held: Held::default(),
            in_list: false,
            at_start: true,
            begun: false,
            open: false,
            calls: 0,
            whole_calls: 0,
            has_text: false,
            behind_call: false,
        }
    }

    /// Takes more text.
    pub(crate) fn push(&mut self, text: &str, out: &mut Vec<ToolDelta>) {
        for c in text.chars() {
            self.step(c, out);
        }
    }

    /// The text has ended: what was held back was no call.
    pub(crate) fn finish(&mut self, out: &mut Vec<ToolDelta>) {
        let held = self.held.take();
        // Blank space behind a call is no answer, and neither is half of its closing mark.
        let rest = matches!(self.state, State::After) || (self.behind_call && held.trim().is_empty());
        if !self.begun && !rest {
            self.give_text(&held, out);
        }
        self.state = State::Text;
    }

    /// How many calls have all of their arguments.
    pub(crate) fn whole_calls(&self) -> usize {
        self.whole_calls
    }

    fn step(&mut self, c: char, out: &mut Vec<ToolDelta>) {
        match &mut self.state {
            State::Text => self.in_text(c, out),
            State::Head => self.in_head(c, out),
            State::Name(_) => self.in_name(c, out),
            State::Call(scanner) => {
                let scan = scanner.push(c);
                self.in_call(scan, c, out);
            }
            State::Arguments(scanner) => {
                let scan = scanner.push(c);
                self.in_arguments(scan, c, out);
            }
            State::After => self.after(c, out),
        }
    }

    fn in_text(&mut self, c: char, out: &mut Vec<ToolDelta>) {
        self.held.push(c);
        if self.format.bare_objects() && self.at_start && self.held.candidate() == "{" {
            self.begin_call(c);
            return;
        }
        loop {
            match self.held.compare(self.format.marks()) {
                Match::Open => return,
                Match::Whole => {
                    self.state = State::Head;
                    return;
                }
                Match::Not(front) => {
                    let only_calls_yet = self.calls > 0 && !self.has_text;
                    self.give_text(if only_calls_yet { front.trim_start() } else { &front }, out);
                }
            }
        }
    }

    fn give_text(&mut self, text: &str, out: &mut Vec<ToolDelta>) {
        if text.is_empty() {
            return;
        }
        self.at_start &= text.trim().is_empty();
        self.has_text |= !text.trim().is_empty();
        self.behind_call &= text.trim().is_empty();
        match out.last_mut() {
            Some(ToolDelta::Text(last)) => last.push_str(text),
            _ => out.push(ToolDelta::Text(text.to_owned())),
        }
    }

    /// What is held is no call; `c`, which showed it, may begin something else.
    fn give_up(&mut self, c: char, out: &mut Vec<ToolDelta>) {
        let held = self.held.take();
        self.at_start = false;
        self.in_list = false;
        self.give_text(&held, out);
        self.state = State::Text;
        self.in_text(c, out);
    }

    fn in_head(&mut self, c: char, out: &mut Vec<ToolDelta>) {
        let mistral = self.format == ToolFormat::Mistral || self.format == ToolFormat::MistralArgs;
        match c {
            _ if c.is_whitespace() => self.held.push(c),
            '{' if !mistral || self.in_list => {
                self.held.push(c);
                self.begin_call(c);
            }
            '[' if mistral && !self.in_list => {
                self.held.push(c);
                self.in_list = true;
            }
            _ if mistral && !self.in_list && is_name(c) => {
                self.held.push(c);
                self.state = State::Name(c.to_string());
            }
            _ => self.give_up(c, out),
        }
    }

    /// `c` opens the object of a call; it is held already.
    fn begin_call(&mut self, c: char) {
        let mut scanner = ObjectScanner::default();
        scanner.push(c);
        self.begun = false;
        self.state = State::Call(scanner);
    }

    /// `name`, perhaps `[CALL_ID]id`, then `[ARGS]` or nothing, then the object.
    fn in_name(&mut self, c: char, out: &mut Vec<ToolDelta>) {
        let State::Name(text) = &mut self.state else { return };
        let (name, tail) = text.split_at(text.find('[').unwrap_or(text.len()));
        let ready = tail.is_empty() || tail.ends_with("[ARGS]");
        if c == '{' && ready && self.names.iter().any(|known| known == name) {
            let name = name.to_owned();
            let mut scanner = ObjectScanner::default();
            scanner.push(c);
            self.state = State::Arguments(scanner);
            self.begin(name, out);
            self.give_arguments("{", out);
            return;
        }
        let is_tail = {
            let mut longer = tail.to_owned();
            longer.push(c);
            tail_may_be(&longer)
        };
        if (tail.is_empty() && is_name(c) && name.len() < NAME_BYTES_MAX) || (!c.is_whitespace() && is_tail) {
            text.push(c);
            self.held.push(c);
        } else if c.is_whitespace() && tail.ends_with("[ARGS]") {
            self.held.push(c);
        } else {
            self.give_up(c, out);
        }
    }

    fn begin(&mut self, name: String, out: &mut Vec<ToolDelta>) {
        self.held.take();
        (self.begun, self.open) = (true, true);
        if self.calls < self.calls_max {
            out.push(ToolDelta::Start { index: self.calls, name });
        }
        self.calls += 1;
        self.behind_call = true;
    }

    fn give_arguments(&mut self, text: &str, out: &mut Vec<ToolDelta>) {
        let index = self.calls.saturating_sub(1);
        if index >= self.calls_max {
            return;
        }
        match out.last_mut() {
            Some(ToolDelta::Arguments { index: last, text: all }) if *last == index => all.push_str(text),
            _ => out.push(ToolDelta::Arguments { index, text: text.to_owned() }),
        }
    }

    fn end_arguments(&mut self) {
        self.open = false;
        self.whole_calls += 1;
    }

    fn end_call(&mut self) {
        self.begun = false;
        self.held.take();
        self.state = State::After;
    }

    fn in_arguments(&mut self, scan: Scan, c: char, out: &mut Vec<ToolDelta>) {
        if scan == Scan::Bad {
            // Arguments that are no JSON are given as they are, like any server does: the caller has to check them.
            self.end_arguments();
            self.end_call();
            return self.step(c, out);
        }
        self.give_arguments(c.encode_utf8(&mut [0; 4]), out);
        if scan == Scan::Done {
            self.end_arguments();
            self.end_call();
        }
    }

    fn in_call(&mut self, scan: Scan, c: char, out: &mut Vec<ToolDelta>) {
        let State::Call(scanner) = &self.state else { return };
        if self.begun {
            if self.open {
                let ended = scanner.open_value(&ARGUMENTS).is_none();
                self.give_arguments(c.encode_utf8(&mut [0; 4]), out);
                if ended {
                    self.end_arguments();
                }
                return;
            }
            match scan {
                Scan::More => {}
                Scan::Done => self.end_call(),
                Scan::Bad => {
                    self.end_call();
                    self.step(c, out);
                }
            }
            return;
        }
        let name = scanner.member("name").map(|text| serde_json::from_str::<String>(text).unwrap_or_default());
        let known = name.filter(|name| self.names.contains(name));
        let refused = known.is_none() && scanner.member("name").is_some();
        match (scan, known) {
            (Scan::Bad, _) => self.give_up(c, out),
            _ if refused => self.give_up(c, out),
            (Scan::Done, Some(name)) => match whole_arguments(scanner) {
                Some(arguments) => {
                    self.begin(name, out);
                    self.give_arguments(&arguments, out);
                    self.end_arguments();
                    self.end_call();
                }
                None => self.give_up(c, out),
            },
            (Scan::Done, None) => self.give_up(c, out),
            (Scan::More, Some(name)) => {
                let begin = scanner.open_value(&ARGUMENTS).filter(|text| text.starts_with('{')).map(str::to_owned);
                match begin {
                    Some(text) => {
                        self.begin(name, out);
                        self.give_arguments(&text, out);
                    }
                    None => self.held.push(c),
                }
            }
            (Scan::More, None) => self.held.push(c),
        }
    }

    fn after(&mut self, c: char, out: &mut Vec<ToolDelta>) {
        if c.is_whitespace() && self.held.candidate().is_empty() {
            return;
        }
        let next = match self.format {
            ToolFormat::Hermes => {
                self.held.push(c);
                match self.held.compare(&[ToolFormat::HERMES_END]) {
                    Match::Open => {}
                    Match::Whole => {
                        self.held.take();
                        self.state = State::Text;
                    }
                    Match::Not(front) => {
                        let rest = front + &self.held.take();
                        self.state = State::Text;
                        rest.chars().for_each(|c| self.in_text(c, out));
                    }
                }
                return;
            }
            ToolFormat::LlamaJson => c == ';',
            ToolFormat::Mistral | ToolFormat::MistralArgs => self.in_list && c == ',',
        };
        if next {
            self.held.push(c);
            self.state = State::Head;
            return;
        }
        self.state = State::Text;
        if !(std::mem::take(&mut self.in_list) && c == ']') {
            self.in_text(c, out);
        }
    }
}

/// The arguments of a call that is a closed object: an object, an object as text, or none.
fn whole_arguments(scanner: &ObjectScanner) -> Option<String> {
    let Some(text) = ARGUMENTS.iter().find_map(|name| scanner.member(name)) else { return Some("{}".into()) };
    match text.chars().next() {
        Some('{') => Some(text.to_owned()),
        Some('n') if text == "null" => Some("{}".into()),
        Some('"') => {
            let inner: String = serde_json::from_str(text).ok()?;
            serde_json::from_str::<serde_json::Value>(&inner).ok()?.is_object().then_some(inner)
        }
        _ => None,
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

/// Can `tail`, behind a name, still become `[ARGS]` or `[CALL_ID]..[ARGS]`?
fn tail_may_be(tail: &str) -> bool {
    const CALL_ID: &str = "[CALL_ID]";
    const ARGS: &str = "[ARGS]";
    let Some(rest) = tail.strip_prefix(CALL_ID) else { return ARGS.starts_with(tail) || CALL_ID.starts_with(tail) };
    let (id, end) = rest.split_at(rest.find('[').unwrap_or(rest.len()));
    id.len() <= NAME_BYTES_MAX && id.chars().all(is_name) && ARGS.starts_with(end)
}
