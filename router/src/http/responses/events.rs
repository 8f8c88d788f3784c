//! The events of a streamed response.

use serde::Serialize;

use super::items::{Change, Item, Items, Part};
use super::reply::{Echo, ResponseObject};
use crate::http::error::ApiError;
use crate::http::openai::message::MessageDelta;
use crate::http::openai::types::ChatLogprob;
use crate::http::turn::{Narrator, TurnStop, TurnUsage};

/// Every event has a number; the rest depends on its type.
#[derive(Debug, Serialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    sequence_number: u64,
    #[serde(flatten)]
    body: Body<'a>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
#[expect(clippy::large_enum_variant, reason = "made, written and dropped in one place")]
enum Body<'a> {
    Response {
        response: ResponseObject<'a>,
    },
    Item {
        output_index: usize,
        item: &'a Item,
    },
    Part {
        item_id: &'a str,
        output_index: usize,
        content_index: usize,
        part: &'a Part,
    },
    TextDelta {
        item_id: &'a str,
        output_index: usize,
        content_index: usize,
        delta: &'a str,
        logprobs: &'a [ChatLogprob],
    },
    TextDone {
        item_id: &'a str,
        output_index: usize,
        content_index: usize,
        text: &'a str,
        logprobs: &'a [ChatLogprob],
    },
    ReasoningDelta {
        item_id: &'a str,
        output_index: usize,
        content_index: usize,
        delta: &'a str,
    },
    ReasoningDone {
        item_id: &'a str,
        output_index: usize,
        content_index: usize,
        text: &'a str,
    },
    ArgumentsDelta {
        item_id: &'a str,
        output_index: usize,
        delta: &'a str,
    },
    ArgumentsDone {
        item_id: &'a str,
        output_index: usize,
        name: &'a str,
        arguments: &'a str,
    },
    Error {
        code: &'a str,
        message: &'a str,
        param: Option<&'a str>,
    },
}

/// Numbers events and writes them one behind the other.
#[derive(Debug, Default)]
struct Writer {
    sequence_number: u64,
    out: String,
}

impl Writer {
    fn event(&mut self, kind: &'static str, body: Body<'_>) {
        let event = Event { kind, sequence_number: self.sequence_number, body };
        self.sequence_number += 1;
        let json = serde_json::to_string(&event).unwrap_or_default(); // strings and finite numbers: cannot fail
        self.out.push_str(&format!("event: {kind}\ndata: {json}\n\n"));
    }

    fn take(&mut self) -> String {
        std::mem::take(&mut self.out)
    }

    fn change(&mut self, items: &[Item], change: &Change) {
        let (Change::Opened(index) | Change::Grew { index, .. } | Change::Closed(index)) = change;
        let Some(item) = items.get(*index) else { return };
        match change {
            Change::Opened(index) => self.opened(*index, item),
            Change::Grew { index, text, logprobs } => self.grew(*index, item, text, logprobs),
            Change::Closed(index) => self.closed(*index, item),
        }
    }

    fn opened(&mut self, output_index: usize, item: &Item) {
        let opened = item.opened();
        self.event("response.output_item.added", Body::Item { output_index, item: &opened });
        let part = match item.part() {
            Some(Part::OutputText { .. }) => {
                Part::OutputText { text: String::new(), annotations: [], logprobs: Vec::new() }
            }
            Some(Part::ReasoningText { .. }) => Part::ReasoningText { text: String::new() },
            None => return,
        };
        let body = Body::Part { item_id: item.id(), output_index, content_index: 0, part: &part };
        self.event("response.content_part.added", body);
    }

    fn grew(&mut self, output_index: usize, item: &Item, delta: &str, logprobs: &[ChatLogprob]) {
        let (item_id, content_index) = (item.id(), 0);
        match item {
            Item::Message { .. } => {
                let body = Body::TextDelta { item_id, output_index, content_index, delta, logprobs };
                self.event("response.output_text.delta", body);
            }
            Item::Reasoning { .. } => {
                let body = Body::ReasoningDelta { item_id, output_index, content_index, delta };
                self.event("response.reasoning_text.delta", body);
            }
            Item::FunctionCall { .. } => {
                self.event(
                    "response.function_call_arguments.delta",
                    Body::ArgumentsDelta { item_id, output_index, delta },
                );
            }
        }
    }

    fn closed(&mut self, output_index: usize, item: &Item) {
        let (item_id, content_index) = (item.id(), 0);
        match (item, item.part()) {
            (Item::FunctionCall { name, arguments, .. }, _) => {
                let body = Body::ArgumentsDone { item_id, output_index, name, arguments };
                self.event("response.function_call_arguments.done", body);
            }
            (_, Some(Part::OutputText { text, logprobs, .. })) => {
                let body = Body::TextDone { item_id, output_index, content_index, text, logprobs };
                self.event("response.output_text.done", body);
            }
            (_, Some(Part::ReasoningText { text })) => {
                let body = Body::ReasoningDone { item_id, output_index, content_index, text };
                self.event("response.reasoning_text.done", body);
            }
            (_, None) => {}
        }
        if let Some(part) = item.part() {
            self.event("response.content_part.done", Body::Part { item_id, output_index, content_index, part });
        }
        self.event("response.output_item.done", Body::Item { output_index, item });
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Events {
    echo: Echo,
    items: Items,
    writer: Writer,
}

impl Events {
    pub(super) fn new(echo: Echo) -> Self {
        Self { echo, items: Items::default(), writer: Writer::default() }
    }

    fn changes(&mut self, changes: &[Change]) {
        for change in changes {
            self.writer.change(&self.items.list, change);
        }
    }
}

impl Narrator for Events {
    fn begin(&mut self, _: TurnUsage) -> String {
        for kind in ["response.created", "response.in_progress"] {
            self.writer.event(kind, Body::Response { response: self.echo.running(&[]) });
        }
        self.writer.take()
    }

    fn delta(&mut self, delta: MessageDelta, logprobs: Vec<ChatLogprob>) -> String {
        let changes = self.items.take(delta, logprobs);
        self.changes(&changes);
        self.writer.take()
    }

    fn end(&mut self, stop: &TurnStop, usage: TurnUsage) -> String {
        let changes = self.items.end(stop);
        self.changes(&changes);
        let kind = if *stop == TurnStop::Length { "response.incomplete" } else { "response.completed" };
        self.writer.event(kind, Body::Response { response: self.echo.ended(&self.items.list, stop, usage) });
        self.writer.take()
    }

    fn fail(&mut self, error: &ApiError, _: &str) -> String {
        self.items.fail();
        let response = self.echo.failed(&self.items.list, error);
        self.writer.event("response.failed", Body::Response { response });
        let (code, param) = (error.cause.row().code, error.param.as_deref());
        self.writer.event("error", Body::Error { code, message: &error.message, param });
        self.writer.take()
    }
}
