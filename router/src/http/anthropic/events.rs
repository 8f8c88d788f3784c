//! The events of a streamed message.

use serde::Serialize;

use super::error::anthropic_error;
use super::reply::{Block, Change, Head, Kind, Message, Stop, Usage, changes};
use crate::http::error::ApiError;
use crate::http::openai::message::MessageDelta;
use crate::http::openai::types::ChatLogprob;
use crate::http::turn::{Narrator, TurnStop, TurnUsage};

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    MessageStart { message: Message<'a> },
    Ping,
    ContentBlockStart { index: usize, content_block: &'a Block },
    ContentBlockDelta { index: usize, delta: Delta<'a> },
    ContentBlockStop { index: usize },
    MessageDelta { delta: Stop<'a>, usage: Usage },
    MessageStop,
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[expect(clippy::enum_variant_names, reason = "the names of the wire")]
enum Delta<'a> {
    ThinkingDelta { thinking: &'a str },
    TextDelta { text: &'a str },
    InputJsonDelta { partial_json: &'a str },
}

impl Event<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::Ping => "ping",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop => "message_stop",
        }
    }

    fn text(&self) -> String {
        let json = serde_json::to_string(self).unwrap_or_default(); // strings and numbers: this cannot fail
        format!("event: {}\ndata: {json}\n\n", self.name())
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Events {
    head: Head,
    open: Option<Kind>,
    /// Of the next block to open.
    index: usize,
}

impl Events {
    pub(super) fn new(head: Head) -> Self {
        Self { head, open: None, index: 0 }
    }

    fn change(&mut self, change: &Change) -> String {
        let delta = match change {
            Change::Open(block) => {
                let close = self.close();
                self.index += 1;
                return close + &Event::ContentBlockStart { index: self.index - 1, content_block: block }.text();
            }
            Change::Thinking(thinking) => Delta::ThinkingDelta { thinking },
            Change::Text(text) => Delta::TextDelta { text },
            Change::Input(partial_json) => Delta::InputJsonDelta { partial_json },
        };
        match self.index.checked_sub(1) {
            Some(index) => Event::ContentBlockDelta { index, delta }.text(),
            None => String::new(),
        }
    }

    /// The end of the block that is open.
    fn close(&self) -> String {
        self.index.checked_sub(1).map_or_else(String::new, |index| Event::ContentBlockStop { index }.text())
    }
}

impl Narrator for Events {
    fn begin(&mut self, usage: TurnUsage) -> String {
        let message = self.head.message(&[], None, usage);
        Event::MessageStart { message }.text() + &Event::Ping.text()
    }

    fn delta(&mut self, delta: MessageDelta, _: Vec<ChatLogprob>) -> String {
        changes(delta, &mut self.open).iter().map(|change| self.change(change)).collect()
    }

    fn end(&mut self, stop: &TurnStop, usage: TurnUsage) -> String {
        let delta = Event::MessageDelta { delta: Stop::of(stop), usage: usage.into() };
        self.close() + &delta.text() + &Event::MessageStop.text()
    }

    fn fail(&mut self, error: &ApiError, request_id: &str) -> String {
        format!("event: error\ndata: {}\n\n", anthropic_error(error, request_id))
    }
}
