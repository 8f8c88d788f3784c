//! Parts a reply into what the model thinks, `<think>..</think>`, and what it says.

use super::tools::{Held, Match};

/// Begins a thought.
pub(crate) const THINK_START: &str = "<think>";
/// Ends it.
pub(crate) const THINK_END: &str = "</think>";

/// A part of a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ReasoningDelta {
    /// Thought.
    Reasoning(String),
    /// Said.
    Text(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Only the very start of a reply can open a thought.
    Start,
    Thinking,
    /// Behind a thought: blank space is not part of the answer.
    Between,
    Said,
}

/// Reads one reply, character by character, so that the result does not depend on where the text was cut. Blank space at
/// both ends of a thought is left out.
#[derive(Clone, Debug)]
pub(crate) struct ReasoningReader {
    stage: Stage,
    /// The prompt has opened the thought.
    opened: bool,
    held: Held,
    /// Something was thought.
    has_thought: bool,
}

impl ReasoningReader {
    /// `opened`: the prompt ends inside a thought.
    pub(crate) fn new(opened: bool) -> Self {
        Self { stage: Stage::Start, opened, held: Held::default(), has_thought: false }
    }

    /// Takes more text.
    pub(crate) fn push(&mut self, text: &str, out: &mut Vec<ReasoningDelta>) {
        for (at, c) in text.char_indices() {
            if self.stage == Stage::Said {
                return give(ReasoningDelta::Text(text.get(at..).unwrap_or("").to_owned()), out);
            }
            self.step(c, out);
        }
    }

    /// The text has ended.
    pub(crate) fn finish(&mut self, out: &mut Vec<ReasoningDelta>) {
        let held = self.held.take();
        match self.stage {
            Stage::Start if !self.opened => give(ReasoningDelta::Text(held), out),
            Stage::Start | Stage::Thinking => self.think(held.trim_end(), out),
            Stage::Between | Stage::Said => {}
        }
    }

    fn step(&mut self, c: char, out: &mut Vec<ReasoningDelta>) {
        match self.stage {
            Stage::Start => self.at_start(c, out),
            Stage::Thinking => self.thinking(c, out),
            Stage::Between if c.is_whitespace() => {}
            Stage::Between | Stage::Said => {
                self.stage = Stage::Said;
                give(ReasoningDelta::Text(c.to_string()), out);
            }
        }
    }

    fn at_start(&mut self, c: char, out: &mut Vec<ReasoningDelta>) {
        self.held.push(c);
        match self.held.compare(&[THINK_START]) {
            Match::Open => {}
            Match::Whole => {
                self.held.take();
                self.stage = Stage::Thinking;
            }
            Match::Not(front) => {
                let text = front + &self.held.take();
                if self.opened {
                    self.stage = Stage::Thinking;
                    text.chars().for_each(|c| self.step(c, out));
                } else {
                    self.stage = Stage::Said;
                    give(ReasoningDelta::Text(text), out);
                }
            }
        }
    }

    fn thinking(&mut self, c: char, out: &mut Vec<ReasoningDelta>) {
        self.held.push(c);
        loop {
            match self.held.compare(&[THINK_END]) {
                Match::Open => return,
                Match::Whole => {
                    self.held.take();
                    self.stage = Stage::Between;
                    return;
                }
                Match::Not(front) => self.think(&front, out),
            }
        }
    }

    fn think(&mut self, text: &str, out: &mut Vec<ReasoningDelta>) {
        let text = if self.has_thought { text } else { text.trim_start() };
        self.has_thought |= !text.is_empty();
        give(ReasoningDelta::Reasoning(text.to_owned()), out);
    }
}

fn give(delta: ReasoningDelta, out: &mut Vec<ReasoningDelta>) {
    use ReasoningDelta::{Reasoning, Text};
    let (Reasoning(text) | Text(text)) = &delta;
    if text.is_empty() {
        return;
    }
    match (out.last_mut(), &delta) {
        (Some(Reasoning(last)), Reasoning(text)) | (Some(Text(last)), Text(text)) => last.push_str(text),
        _ => out.push(delta),
    }
}
