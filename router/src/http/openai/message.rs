//! An assistant's message while it is generated: text on one side, its parts on the other.

use std::sync::Arc;

use super::types::{ChatDelta, ChatMessage, FunctionText, ToolCall};
use crate::text::{ReasoningDelta, ReasoningReader, ToolDelta, ToolFormat, ToolReader};

/// What some generated text adds to a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MessageDelta {
    /// What the model thinks before it answers.
    Reasoning(String),
    /// The answer.
    Content(String),
    /// A tool call begins. Calls are counted from 0.
    CallStart { index: usize, id: String, name: String },
    /// More of the JSON text of a call's arguments.
    CallArguments { index: usize, text: String },
}

/// How the text of a reply is to be read. Shared by the choices of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct MessageRules {
    /// Text that stands in front of the content, not generated (`echo`).
    pub(crate) echo: Option<Arc<str>>,
    /// The model thinks before it answers.
    pub(crate) reasoning: Option<ReasoningRules>,
    /// The model may call functions.
    pub(crate) tools: Option<ToolRules>,
}

/// How thoughts are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReasoningRules {
    /// The prompt ends inside a thought.
    pub(crate) opened: bool,
    /// Thoughts are part of the reply.
    pub(crate) shown: bool,
}

/// How calls are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ToolRules {
    pub(crate) format: ToolFormat,
    /// The functions that may be called.
    pub(crate) names: Arc<[String]>,
    /// Calls beyond this many are left out.
    pub(crate) calls_max: usize,
    /// The request named the function: the call is the whole reply, and it ends for the reason it would end for anyway.
    pub(crate) named: bool,
    /// The reply is nothing but calls: what is cut off before it is one is left out.
    pub(crate) forced: bool,
}

impl MessageRules {
    /// A reader for one choice.
    pub(crate) fn reader(&self) -> MessageReader {
        let tools = |rules: &ToolRules| {
            let reader = ToolReader::new(rules.format, Arc::clone(&rules.names), rules.calls_max);
            let short_ids = matches!(rules.format, ToolFormat::Mistral | ToolFormat::MistralArgs);
            Tools { reader, short_ids, forced: rules.forced }
        };
        MessageReader {
            echo: self.echo.clone(),
            reasoning: self.reasoning.map(|rules| (ReasoningReader::new(rules.opened), rules.shown)),
            tools: self.tools.as_ref().map(tools),
            named: self.tools.as_ref().is_some_and(|rules| rules.named),
        }
    }
}

/// Reads the text of one choice, piece by piece. The parts of all deltas, put together, depend on the whole text only, not
/// on where it was cut.
#[derive(Clone, Debug)]
pub(crate) struct MessageReader {
    /// Not given out yet.
    echo: Option<Arc<str>>,
    reasoning: Option<(ReasoningReader, bool)>,
    tools: Option<Tools>,
    named: bool,
}

#[derive(Clone, Debug)]
struct Tools {
    reader: ToolReader,
    /// Mistral's templates accept ids of nine characters only.
    short_ids: bool,
    forced: bool,
}

impl MessageReader {
    /// All text that comes from now on is content, as it comes.
    pub(crate) fn is_plain(&self) -> bool {
        self.echo.is_none() && self.reasoning.is_none() && self.tools.is_none()
    }

    /// Takes more text. What could still become the start of a tool call is held back.
    pub(crate) fn push(&mut self, text: &str) -> Vec<MessageDelta> {
        let mut out = self.echoed();
        match &mut self.reasoning {
            None => self.said(text, &mut out),
            Some((reader, _)) => {
                let mut parts = Vec::new();
                reader.push(text, &mut parts);
                self.parted(parts, &mut out);
            }
        }
        out
    }

    /// The text has ended: gives what was held back.
    pub(crate) fn finish(&mut self) -> Vec<MessageDelta> {
        let mut out = self.echoed();
        if let Some((reader, _)) = &mut self.reasoning {
            let mut parts = Vec::new();
            reader.finish(&mut parts);
            self.parted(parts, &mut out);
        }
        if let Some(tools) = &mut self.tools {
            let mut deltas = Vec::new();
            tools.reader.finish(&mut deltas);
            out.extend(deltas.into_iter().filter_map(|delta| tools.delta(delta)));
        }
        out
    }

    /// A whole tool call was read: the reply's reason to end is `tool_calls` where it would be `stop`.
    pub(crate) fn has_called(&self) -> bool {
        self.tools.as_ref().is_some_and(|tools| tools.reader.whole_calls() > 0)
    }

    /// The reason to end that OpenAI's clients expect: `stop`, `length` or `tool_calls`. A named function leaves it as it is.
    pub(crate) fn finish_reason(&self, reason: &'static str) -> &'static str {
        if reason == "stop" && !self.named && self.has_called() { "tool_calls" } else { reason }
    }

    /// Reads a whole text.
    pub(crate) fn message(&mut self, text: &str) -> ChatMessage {
        let mut message = ChatMessage { role: "assistant", ..ChatMessage::default() };
        for delta in self.push(text).into_iter().chain(self.finish()) {
            message.add(delta);
        }
        let forced = self.tools.as_ref().is_some_and(|tools| tools.forced);
        if message.content.is_none() && message.tool_calls.is_empty() && message.reasoning.is_none() && !forced {
            message.content = Some(String::new());
        }
        message
    }

    fn echoed(&mut self) -> Vec<MessageDelta> {
        self.echo
            .take()
            .filter(|text| !text.is_empty())
            .map(|text| MessageDelta::Content(text.to_string()))
            .into_iter()
            .collect()
    }

    fn parted(&mut self, parts: Vec<ReasoningDelta>, out: &mut Vec<MessageDelta>) {
        let shown = self.reasoning.as_ref().is_some_and(|(_, shown)| *shown);
        for part in parts {
            match part {
                ReasoningDelta::Reasoning(text) if shown => out.push(MessageDelta::Reasoning(text)),
                ReasoningDelta::Reasoning(_) => {}
                ReasoningDelta::Text(text) => self.said(&text, out),
            }
        }
    }

    fn said(&mut self, text: &str, out: &mut Vec<MessageDelta>) {
        match &mut self.tools {
            None if text.is_empty() => {}
            None => out.push(MessageDelta::Content(text.to_owned())),
            Some(tools) => {
                let mut deltas = Vec::new();
                tools.reader.push(text, &mut deltas);
                out.extend(deltas.into_iter().filter_map(|delta| tools.delta(delta)));
            }
        }
    }
}

impl Tools {
    fn delta(&self, delta: ToolDelta) -> Option<MessageDelta> {
        match delta {
            ToolDelta::Text(_) if self.forced => None,
            ToolDelta::Text(text) => Some(MessageDelta::Content(text)),
            ToolDelta::Start { index, name } => Some(MessageDelta::CallStart { index, id: self.id(), name }),
            ToolDelta::Arguments { index, text } => Some(MessageDelta::CallArguments { index, text }),
        }
    }

    fn id(&self) -> String {
        let random = uuid::Uuid::new_v4().simple().to_string();
        let tail = |len: usize| random.get(random.len().saturating_sub(len)..).unwrap_or("").to_owned();
        if self.short_ids { tail(9) } else { format!("call_{}", tail(24)) }
    }
}

impl ChatMessage {
    fn add(&mut self, delta: MessageDelta) {
        let append = |to: &mut Option<String>, text: &str| to.get_or_insert_default().push_str(text);
        match delta {
            MessageDelta::Content(text) => append(&mut self.content, &text),
            MessageDelta::Reasoning(text) => {
                append(&mut self.reasoning, &text);
                append(&mut self.reasoning_content, &text);
            }
            MessageDelta::CallStart { id, name, .. } => {
                let function = FunctionText { name: Some(name), arguments: String::new() };
                self.tool_calls.push(ToolCall { index: None, id: Some(id), kind: Some("function"), function });
            }
            MessageDelta::CallArguments { index, text } => {
                if let Some(call) = self.tool_calls.get_mut(index) {
                    call.function.arguments.push_str(&text);
                }
            }
        }
    }
}

impl From<MessageDelta> for ChatDelta {
    fn from(delta: MessageDelta) -> Self {
        match delta {
            MessageDelta::Content(text) => Self { content: Some(text), ..Self::default() },
            MessageDelta::Reasoning(text) => {
                Self { reasoning: Some(text.clone()), reasoning_content: Some(text), ..Self::default() }
            }
            MessageDelta::CallStart { index, id, name } => {
                let function = FunctionText { name: Some(name), arguments: String::new() };
                let call = ToolCall { index: Some(index), id: Some(id), kind: Some("function"), function };
                Self { tool_calls: vec![call], ..Self::default() }
            }
            MessageDelta::CallArguments { index, text } => {
                let function = FunctionText { name: None, arguments: text };
                let call = ToolCall { index: Some(index), id: None, kind: None, function };
                Self { tool_calls: vec![call], ..Self::default() }
            }
        }
    }
}
