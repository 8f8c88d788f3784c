//! A message of Anthropic's API: its head, its blocks, its end.

use serde::Serialize;
use serde_json::value::RawValue;

use crate::http::openai::message::MessageDelta;
use crate::http::turn::{TurnStop, TurnUsage, WholeTurn};

/// The reply of `/v1/messages/count_tokens`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct TokenCount {
    pub(super) input_tokens: usize,
}

/// What a message is before it says anything.
#[derive(Clone, Debug)]
pub(super) struct Head {
    id: String,
    model: String,
}

impl Head {
    pub(super) fn new(model: String) -> Self {
        Self { id: format!("msg_{}", uuid::Uuid::new_v4().simple()), model }
    }

    pub(super) fn message<'a>(
        &'a self,
        content: &'a [Block],
        stop: Option<&'a TurnStop>,
        usage: TurnUsage,
    ) -> Message<'a> {
        Message {
            id: &self.id,
            kind: "message",
            role: "assistant",
            model: &self.model,
            content,
            stop: stop.map_or_else(Stop::default, Stop::of),
            usage: usage.into(),
        }
    }
}

/// A whole message, or its beginning.
#[derive(Debug, Serialize)]
pub(super) struct Message<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    role: &'static str,
    model: &'a str,
    content: &'a [Block],
    #[serde(flatten)]
    stop: Stop<'a>,
    usage: Usage,
}

/// Why a message ended; null while it goes on.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Stop<'a> {
    stop_reason: Option<&'static str>,
    stop_sequence: Option<&'a str>,
}

impl<'a> Stop<'a> {
    pub(super) fn of(stop: &'a TurnStop) -> Self {
        let (reason, stop_sequence) = match stop {
            TurnStop::End => ("end_turn", None),
            TurnStop::Length => ("max_tokens", None),
            TurnStop::StopString(text) => ("stop_sequence", Some(text.as_str())),
            TurnStop::ToolCalls => ("tool_use", None),
        };
        Self { stop_reason: Some(reason), stop_sequence }
    }
}

/// Cached tokens are not among `input_tokens` here.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Usage {
    input_tokens: u64,
    cache_creation_input_tokens: u64,
    cache_read_input_tokens: u64,
    output_tokens: u64,
}

impl From<TurnUsage> for Usage {
    fn from(usage: TurnUsage) -> Self {
        Self {
            input_tokens: usage.prompt_tokens.saturating_sub(usage.cached_tokens),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: usage.cached_tokens,
            output_tokens: usage.completion_tokens,
        }
    }
}

/// One block of a message.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Block {
    Thinking { thinking: String, signature: &'static str },
    Text { text: String },
    ToolUse { id: String, name: String, input: Box<RawValue> },
}

/// What a delta does to the blocks of a message. Tool input is text until it is whole.
#[derive(Debug)]
pub(super) enum Change {
    /// The open block, if there is one, ends and this one begins.
    Open(Block),
    Thinking(String),
    Text(String),
    Input(String),
}

/// The changes of one delta, in order. `open` is the kind of the block that is open.
pub(super) fn changes(delta: MessageDelta, open: &mut Option<Kind>) -> Vec<Change> {
    let (kind, block, change) = match delta {
        MessageDelta::Reasoning(text) => {
            (Kind::Thinking, Block::Thinking { thinking: String::new(), signature: "" }, Change::Thinking(text))
        }
        MessageDelta::Content(text) => (Kind::Text, Block::Text { text: String::new() }, Change::Text(text)),
        MessageDelta::CallStart { id, name, .. } => {
            *open = Some(Kind::ToolUse);
            let id = tool_use_id(id);
            return vec![Change::Open(Block::ToolUse { id, name, input: object("{}") })];
        }
        // Calls come one after another: this is the one that is open.
        MessageDelta::CallArguments { text, .. } => return vec![Change::Input(text)],
    };
    if *open == Some(kind) {
        return vec![change];
    }
    *open = Some(kind);
    vec![Change::Open(block), change]
}

/// The kinds of block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Thinking,
    Text,
    ToolUse,
}

/// The input of a call. A call that was cut off is no JSON, and clients read an object.
fn object(text: &str) -> Box<RawValue> {
    let is_object = text.starts_with('{') && serde_json::from_str::<&RawValue>(text).is_ok();
    RawValue::from_string(if is_object { text } else { "{}" }.to_owned()).unwrap_or_default()
}

/// The body of a reply that is not streamed.
pub(super) fn whole(head: &Head, turn: WholeTurn) -> Vec<u8> {
    let (mut open, mut blocks, mut arguments) = (None, Vec::new(), String::new());
    for (delta, _) in turn.deltas {
        for change in changes(delta, &mut open) {
            match (change, blocks.last_mut()) {
                (Change::Open(block), last) => {
                    give_input(last, &mut arguments);
                    blocks.push(block);
                }
                (Change::Thinking(more), Some(Block::Thinking { thinking, .. })) => thinking.push_str(&more),
                (Change::Text(more), Some(Block::Text { text })) => text.push_str(&more),
                (Change::Input(more), _) => arguments.push_str(&more),
                _ => {}
            }
        }
    }
    give_input(blocks.last_mut(), &mut arguments);
    let message = head.message(&blocks, Some(&turn.stop), turn.usage);
    serde_json::to_vec(&message).unwrap_or_default() // strings and numbers: this cannot fail
}

fn give_input(block: Option<&mut Block>, arguments: &mut String) {
    if let Some(Block::ToolUse { input, .. }) = block {
        *input = object(&std::mem::take(arguments));
    }
}

/// The id of a call as Anthropic spells it.
fn tool_use_id(id: String) -> String {
    id.strip_prefix("call_").map(|rest| format!("toolu_{rest}")).unwrap_or(id)
}
