//! The output of a response: items that open, grow and close, one after another.

use serde::Serialize;

use crate::http::openai::message::MessageDelta;
use crate::http::openai::types::ChatLogprob;
use crate::http::turn::TurnStop;

/// Where an item or a response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

/// One item of `output`.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Item {
    Reasoning { id: String, summary: [(); 0], content: Vec<Part>, status: Status },
    Message { id: String, status: Status, role: &'static str, content: Vec<Part> },
    FunctionCall { id: String, call_id: String, name: String, arguments: String, status: Status },
}

/// What an item's text lies in. Every item has at most one.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Part {
    ReasoningText { text: String },
    OutputText { text: String, annotations: [(); 0], logprobs: Vec<ChatLogprob> },
}

fn id(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::new_v4().simple())
}

impl Item {
    fn reasoning() -> Self {
        let content = vec![Part::ReasoningText { text: String::new() }];
        Self::Reasoning { id: id("rs"), summary: [], content, status: Status::InProgress }
    }

    fn message() -> Self {
        let content = vec![Part::OutputText { text: String::new(), annotations: [], logprobs: Vec::new() }];
        Self::Message { id: id("msg"), status: Status::InProgress, role: "assistant", content }
    }

    fn call(call_id: String, name: String) -> Self {
        Self::FunctionCall { id: id("fc"), call_id, name, arguments: String::new(), status: Status::InProgress }
    }

    pub(super) fn id(&self) -> &str {
        match self {
            Self::Reasoning { id, .. } | Self::Message { id, .. } | Self::FunctionCall { id, .. } => id,
        }
    }

    /// Absent in a call.
    pub(super) fn part(&self) -> Option<&Part> {
        match self {
            Self::Reasoning { content, .. } | Self::Message { content, .. } => content.first(),
            Self::FunctionCall { .. } => None,
        }
    }

    fn text_mut(&mut self) -> Option<&mut String> {
        match self {
            Self::Reasoning { content, .. } | Self::Message { content, .. } => match content.first_mut()? {
                Part::ReasoningText { text } | Part::OutputText { text, .. } => Some(text),
            },
            Self::FunctionCall { arguments, .. } => Some(arguments),
        }
    }

    fn set_status(&mut self, new: Status) {
        let (Self::Reasoning { status, .. } | Self::Message { status, .. } | Self::FunctionCall { status, .. }) = self;
        *status = new;
    }

    /// As it was when it opened: without its part.
    pub(super) fn opened(&self) -> Self {
        let mut item = self.clone();
        item.set_status(Status::InProgress);
        match &mut item {
            Self::Reasoning { content, .. } | Self::Message { content, .. } => content.clear(),
            Self::FunctionCall { arguments, .. } => arguments.clear(),
        }
        item
    }
}

/// What happened to the item at an index of `output`.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Opened(usize),
    Grew { index: usize, text: String, logprobs: Vec<ChatLogprob> },
    Closed(usize),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Items {
    pub(super) list: Vec<Item>,
    /// The last one still grows.
    is_open: bool,
}

impl Items {
    /// Takes more of the message.
    pub(super) fn take(&mut self, delta: MessageDelta, logprobs: Vec<ChatLogprob>) -> Vec<Change> {
        let mut changes = Vec::new();
        let open = self.list.last().filter(|_| self.is_open);
        let text = match delta {
            MessageDelta::Reasoning(text) => {
                if !matches!(open, Some(Item::Reasoning { .. })) {
                    self.open(Item::reasoning(), &mut changes);
                }
                text
            }
            MessageDelta::Content(text) => {
                if !matches!(open, Some(Item::Message { .. })) {
                    self.open(Item::message(), &mut changes);
                }
                text
            }
            MessageDelta::CallStart { id, name, .. } => {
                self.open(Item::call(id, name), &mut changes);
                return changes;
            }
            // Calls come one after another: this is the one that is open.
            MessageDelta::CallArguments { text, .. } => text,
        };
        if let Some(item) = self.list.last_mut().filter(|_| !text.is_empty()) {
            if let Item::Message { content, .. } = item
                && let Some(Part::OutputText { logprobs: all, .. }) = content.first_mut()
            {
                all.extend(logprobs.iter().cloned());
            }
            if let Some(all) = item.text_mut() {
                all.push_str(&text);
            }
            changes.push(Change::Grew { index: self.list.len() - 1, text, logprobs });
        }
        changes
    }

    /// The turn is over. There is always an item: clients read the first one.
    pub(super) fn end(&mut self, stop: &TurnStop) -> Vec<Change> {
        let mut changes = Vec::new();
        if self.list.is_empty() {
            self.open(Item::message(), &mut changes);
        }
        self.close(if *stop == TurnStop::Length { Status::Incomplete } else { Status::Completed }, &mut changes);
        changes
    }

    /// The turn failed: what was open stays half said.
    pub(super) fn fail(&mut self) {
        self.close(Status::Incomplete, &mut Vec::new());
    }

    fn open(&mut self, item: Item, changes: &mut Vec<Change>) {
        self.close(Status::Completed, changes);
        self.list.push(item);
        self.is_open = true;
        changes.push(Change::Opened(self.list.len() - 1));
    }

    fn close(&mut self, status: Status, changes: &mut Vec<Change>) {
        if let Some(item) = self.list.last_mut().filter(|_| self.is_open) {
            item.set_status(status);
            self.is_open = false;
            changes.push(Change::Closed(self.list.len() - 1));
        }
    }
}
