//! Server-sent events of a streamed completion, read without a tree of JSON for each.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

/// Longest line. A server that sends more has gone wrong.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Cuts a byte stream into the values of its `data:` lines, wherever the pieces begin and end.
#[derive(Debug, Default)]
pub(super) struct DataLines {
    /// The beginning of a line whose end has not come.
    partial: Vec<u8>,
}

/// A line without end.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

impl DataLines {
    /// Calls `each` with the value of every `data:` line that `bytes` completes.
    pub(super) fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) -> Result<(), TooLong> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, after) = rest.split_at(end);
            if self.partial.is_empty() {
                data_of(line, &mut each);
            } else {
                self.partial.extend_from_slice(line);
                data_of(&self.partial, &mut each);
                self.partial.clear();
            }
            rest = after.get(1..).unwrap_or_default();
        }
        self.partial.extend_from_slice(rest);
        if self.partial.len() > LINE_BYTES_MAX { Err(TooLong) } else { Ok(()) }
    }
}

fn data_of(line: &[u8], each: &mut impl FnMut(&[u8])) {
    if let Some(value) = line.strip_prefix(b"data:") {
        each(value.trim_ascii());
    }
}

/// What one event says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Part of the reply.
    Tokens {
        /// Ids it names; 0 where the server sends none.
        ids: usize,
        /// Whether it has text.
        has_text: bool,
        /// Whether it has a choice at all: the first of these is the first sign of a token.
        has_choice: bool,
        /// Completion tokens so far, where it says that.
        usage: Option<u64>,
    },
    /// The request failed in the middle of its stream.
    Error(String),
    /// The stream is complete.
    Done,
    /// Not what a completion sends.
    Unknown,
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow)]
    choices: Option<Vec<Choice<'a>>>,
    usage: Option<Usage>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    message: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    /// Elements of no size: only their number is kept.
    token_ids: Option<Vec<IgnoredAny>>,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: Option<u64>,
}

/// Reads the value of one `data:` line.
pub(super) fn event(data: &[u8]) -> Event {
    if data == b"[DONE]" {
        return Event::Done;
    }
    let Ok(chunk) = serde_json::from_slice::<Chunk<'_>>(data) else { return Event::Unknown };
    if let Some(error) = chunk.error {
        return Event::Error(message_of(error.get()));
    }
    let usage = chunk.usage.and_then(|usage| usage.completion_tokens);
    let Some(choices) = chunk.choices else {
        return match chunk.message {
            Some(message) => Event::Error(message_of(message.get())),
            None => Event::Unknown,
        };
    };
    let has_text = |choice: &Choice<'_>| choice.text.is_some_and(|text| !matches!(text.get(), "\"\"" | "null"));
    Event::Tokens {
        ids: choices.iter().filter_map(|choice| choice.token_ids.as_ref()).map(Vec::len).sum(),
        has_text: choices.iter().any(has_text),
        has_choice: !choices.is_empty(),
        usage,
    }
}

/// What an error of any server says to people: `message` of it or of its `error`, or all of it.
pub(super) fn message_of(json: &str) -> String {
    const SHOWN: usize = 500;
    let found = match serde_json::from_str::<serde_json::Value>(json) {
        Ok(serde_json::Value::String(text)) => Some(text),
        Ok(value) => [&value["error"]["message"], &value["message"], &value["detail"], &value["error"]]
            .into_iter()
            .find_map(|text| text.as_str().map(str::to_owned)),
        Err(_) => None,
    };
    let text = found.unwrap_or_else(|| json.trim().to_owned());
    if text.chars().count() > SHOWN { text.chars().take(SHOWN).chain("..".chars()).collect() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b": ping\r\n\r\ndata: {\"choices\":[{\"text\":\"a\\n\\u00e9\",\"token_ids\":[5,6]}]}\r\n\r\n\
        event: x\ndata:{\"choices\":[{\"text\":\"\"}],\"usage\":null}\n\ndata: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";

    fn events(pieces: &[&[u8]]) -> Vec<Event> {
        let (mut lines, mut found) = (DataLines::default(), Vec::new());
        for piece in pieces {
            lines.feed(piece, |data| found.push(event(data))).unwrap();
        }
        found
    }

    #[test]
    fn events_are_the_same_wherever_the_stream_is_cut() {
        let tokens = |ids, has_text, has_choice, usage| Event::Tokens { ids, has_text, has_choice, usage };
        let want =
            [tokens(2, true, true, None), tokens(0, false, true, None), tokens(0, false, false, Some(2)), Event::Done];
        assert_eq!(events(&[STREAM]), want);
        for cut in 0..STREAM.len() {
            assert_eq!(events(&[&STREAM[..cut], &STREAM[cut..]]), want, "cut at {cut}");
        }
        let bytes: Vec<&[u8]> = STREAM.chunks(1).collect();
        assert_eq!(events(&bytes), want);
    }

    #[test]
    fn errors_of_several_servers_are_read() {
        for (data, want) in [
            (r#"{"error":{"message":"too long","code":1}}"#, "too long"),
            (r#"{"error":"plain"}"#, "plain"),
            (r#"{"object":"error","message":"no"}"#, "no"),
        ] {
            assert_eq!(event(data.as_bytes()), Event::Error(want.into()), "{data}");
        }
        for data in ["", "{", "[]", "{}", "\u{fffd}"] {
            assert_eq!(event(data.as_bytes()), Event::Unknown, "{data}");
        }
        assert_eq!(message_of(r#"{"detail":"Not Found"}"#), "Not Found");
        assert_eq!(message_of("<html>"), "<html>");
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut lines = DataLines::default();
        let piece = vec![b'x'; LINE_BYTES_MAX];
        assert_eq!(lines.feed(&piece, |_| ()), Ok(()));
        assert_eq!(lines.feed(&piece, |_| ()), Err(TooLong));
    }
}
