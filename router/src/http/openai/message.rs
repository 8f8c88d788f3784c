//! An assistant's message while it is generated: text on one side, its parts on the other.

/// What some generated text adds to a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MessageDelta {
    /// What the model thinks before it answers.
    #[expect(dead_code, reason = "read by the routes; made once templates with reasoning are known")]
    Reasoning(String),
    /// The answer.
    Content(String),
    /// A tool call begins. Calls are counted from 0.
    #[expect(dead_code, reason = "read by the routes; made once tools are")]
    CallStart { index: usize, id: String, name: String },
    /// More of the JSON text of a call's arguments.
    #[expect(dead_code, reason = "read by the routes; made once tools are")]
    CallArguments { index: usize, text: String },
}

/// How the text of a reply is to be read. Shared by the choices of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct MessageRules {}

impl MessageRules {
    /// A reader for one choice.
    pub(crate) fn reader(&self) -> MessageReader {
        MessageReader {}
    }
}

/// Reads the text of one choice, piece by piece. The parts of all deltas, put together, depend on the whole text only, not
/// on where it was cut.
#[derive(Clone, Debug)]
pub(crate) struct MessageReader {}

impl MessageReader {
    /// Takes more text. What could still become the start of a tool call is held back.
    pub(crate) fn push(&mut self, text: &str) -> Vec<MessageDelta> {
        if text.is_empty() { Vec::new() } else { vec![MessageDelta::Content(text.to_owned())] }
    }

    /// The text has ended: gives what was held back.
    pub(crate) fn finish(&mut self) -> Vec<MessageDelta> {
        Vec::new()
    }

    /// A whole tool call was read: the reply's reason to end is `tool_calls` where it would be `stop`.
    pub(crate) fn has_called(&self) -> bool {
        false
    }
}
