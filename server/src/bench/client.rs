//! One streamed completion: sent, read, timed, checked.

use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_TYPE, HeaderValue};

use super::plan::Planned;
use super::sse::{DataLines, Event, event, message_of};
use super::target::Target;

/// A reply with the asked number of tokens. Times are seconds since the round began.
#[derive(Clone, Debug)]
pub(super) struct Answered {
    pub(super) start_s: f64,
    /// When pieces with tokens came.
    pub(super) arrivals_s: Vec<f64>,
    pub(super) end_s: f64,
    pub(super) output_tokens: usize,
    pub(super) prompt_tokens: usize,
}

impl Answered {
    pub(super) fn first_token_s(&self) -> Option<f64> {
        self.arrivals_s.first().copied()
    }

    /// (end, length) of the time between pieces, s.
    pub(super) fn gaps(&self) -> impl Iterator<Item = (f64, f64)> {
        self.arrivals_s.iter().zip(self.arrivals_s.iter().skip(1)).map(|(before, after)| (*after, after - before))
    }

    /// A piece may bring several tokens, or the text of one may wait for the next: this does not depend on it.
    pub(super) fn tpot_ms(&self) -> Option<f64> {
        let (first, last) = (self.arrivals_s.first()?, self.arrivals_s.last()?);
        let tokens = self.output_tokens.checked_sub(1).filter(|tokens| *tokens > 0)?;
        Some((last - first) * 1e3 / tokens as f64)
    }
}

/// Why there is no such reply.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// A word for counting.
    pub(super) kind: String,
    /// For people.
    pub(super) message: String,
}

impl Failure {
    fn new(kind: &str, message: impl Into<String>) -> Self {
        Self { kind: kind.to_owned(), message: message.into() }
    }

    /// Nobody listens there, or nobody does any more.
    fn of(error: &reqwest::Error) -> Self {
        let kind = if error.is_connect() { "connect" } else { "closed" };
        Self::new(kind, innermost(error))
    }
}

/// The cause that a person can act on.
pub(super) fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Sends requests to one server. Connections are kept: a closed loop of n requests uses n of them.
#[derive(Clone)]
pub(super) struct Client {
    http: reqwest::Client,
    target: Target,
    timeout: Duration,
}

impl Client {
    pub(super) fn new(http: reqwest::Client, target: Target, timeout: Duration) -> Self {
        Self { http, target, timeout }
    }

    /// `began` is the round's zero; `on_tokens` is called for each piece with tokens.
    pub(super) async fn complete(
        &self,
        planned: &Planned,
        began: Instant,
        on_tokens: impl Fn(),
    ) -> Result<Answered, Failure> {
        let ended = tokio::time::timeout(self.timeout, self.stream(planned, began, on_tokens)).await;
        ended.unwrap_or_else(|_| {
            Err(Failure::new(
                "timeout",
                format!("no complete reply within {} s (--timeout)", self.timeout.as_secs_f64()),
            ))
        })
    }

    async fn stream(&self, planned: &Planned, began: Instant, on_tokens: impl Fn()) -> Result<Answered, Failure> {
        let mut request = self.http.post(self.target.completions.clone());
        request = request.header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(authorization) = &self.target.authorization {
            request = request.header(reqwest::header::AUTHORIZATION, authorization.clone());
        }
        let request = request.body(planned.body.clone());
        let start_s = began.elapsed().as_secs_f64();
        let mut answer = send(request).await.map_err(|error| Failure::of(&error))?;
        let status = answer.status();
        if !status.is_success() {
            let text = answer.text().await.unwrap_or_default();
            let message = format!("{}: {}", status.as_u16(), message_of(&text));
            return Err(Failure::new(&format!("http_{}", status.as_u16()), message));
        }
        let mut reply = Reply::new(planned.output_tokens);
        let mut lines = DataLines::default();
        // Read to the end, so that the connection can be used again.
        while let Some(bytes) = answer.chunk().await.map_err(|error| Failure::of(&error))? {
            let now_s = began.elapsed().as_secs_f64();
            let fed = lines.feed(&bytes, |data| {
                if reply.take(event(data), now_s) {
                    on_tokens();
                }
            });
            if fed.is_err() {
                return Err(Failure::new("not_a_stream", "a line of more than 1 MiB"));
            }
        }
        let end_s = began.elapsed().as_secs_f64();
        let arrivals_s = reply.finish(planned.output_tokens)?;
        let (output_tokens, prompt_tokens) = (planned.output_tokens, planned.prompt_tokens);
        Ok(Answered { start_s, arrivals_s, end_s, output_tokens, prompt_tokens })
    }
}

/// Sends once more what met a kept connection that the server had closed in the meantime: some close each after its reply.
async fn send(request: reqwest::RequestBuilder) -> reqwest::Result<reqwest::Response> {
    let again = request.try_clone();
    match (request.send().await, again) {
        (Err(error), Some(again)) if error.is_request() && !error.is_connect() && !error.is_timeout() => {
            again.send().await
        }
        (outcome, _) => outcome,
    }
}

/// What has come of a reply.
#[derive(Debug)]
struct Reply {
    arrivals_s: Vec<f64>,
    /// The first piece of any kind: where a reply's only token has no text, this is when it came.
    first_choice_s: Option<f64>,
    ids: usize,
    usage: Option<u64>,
    is_done: bool,
    error: Option<String>,
}

impl Reply {
    fn new(tokens: usize) -> Self {
        let arrivals_s = Vec::with_capacity(tokens);
        Self { arrivals_s, first_choice_s: None, ids: 0, usage: None, is_done: false, error: None }
    }

    /// Whether the event brought tokens.
    fn take(&mut self, event: Event, now_s: f64) -> bool {
        match event {
            Event::Tokens { ids, has_text, has_choice, usage } => {
                self.ids += ids;
                self.usage = usage.or(self.usage);
                if has_choice && self.first_choice_s.is_none() {
                    self.first_choice_s = Some(now_s);
                }
                if ids > 0 || has_text {
                    self.arrivals_s.push(now_s);
                    return true;
                }
            }
            Event::Error(message) => self.error = Some(message),
            Event::Done => self.is_done = true,
            Event::Unknown => {}
        }
        false
    }

    /// The arrivals of a reply with exactly `wanted` tokens.
    fn finish(mut self, wanted: usize) -> Result<Vec<f64>, Failure> {
        if let Some(message) = self.error {
            return Err(Failure::new("error_event", message));
        }
        let counted = match self.usage {
            Some(tokens) => tokens,
            None if self.ids > 0 => self.ids as u64,
            None => self.arrivals_s.len() as u64,
        };
        let Some(first_choice_s) = self.first_choice_s else {
            return Err(match self.is_done {
                true => Failure::new("token_count", "a stream without tokens"),
                false => Failure::new("not_a_stream", "the reply has no server-sent events of a completion"),
            });
        };
        if counted != wanted as u64 {
            return Err(match self.is_done {
                true => Failure::new("token_count", format!("{counted} tokens instead of {wanted}")),
                false => Failure::new("closed", format!("the stream ended after {counted} of {wanted} tokens")),
            });
        }
        if self.arrivals_s.is_empty() {
            self.arrivals_s.push(first_choice_s);
        }
        Ok(self.arrivals_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(ids: usize, has_text: bool, usage: Option<u64>) -> Event {
        Event::Tokens { ids, has_text, has_choice: ids > 0 || has_text || usage.is_none(), usage }
    }

    fn reply(events: Vec<Event>, wanted: usize) -> Result<Vec<f64>, String> {
        let mut reply = Reply::new(wanted);
        for (at, event) in events.into_iter().enumerate() {
            reply.take(event, at as f64);
        }
        reply.finish(wanted).map_err(|failure| failure.kind)
    }

    #[test]
    fn tokens_are_counted_by_usage_then_ids_then_pieces() {
        let text = || tokens(0, true, None);
        assert_eq!(reply(vec![text(), text(), tokens(0, false, Some(3)), Event::Done], 3), Ok(vec![0.0, 1.0]));
        assert_eq!(reply(vec![tokens(2, true, None), tokens(1, false, None), Event::Done], 3), Ok(vec![0.0, 1.0]));
        assert_eq!(reply(vec![text(), text(), Event::Done], 2), Ok(vec![0.0, 1.0]));
    }

    #[test]
    fn a_token_without_text_arrives_with_the_first_piece() {
        let pieces = vec![tokens(0, false, None), tokens(0, false, Some(1)), Event::Done];
        assert_eq!(reply(pieces, 1), Ok(vec![0.0]));
    }

    #[test]
    fn replies_that_are_not_as_asked_fail_by_kind() {
        let text = || tokens(0, true, None);
        for (events, want) in [
            (vec![text(), Event::Done], "token_count"),
            (vec![text(), text(), text(), Event::Done], "token_count"),
            (vec![text()], "closed"),
            (vec![Event::Done], "token_count"),
            (vec![Event::Unknown], "not_a_stream"),
            (vec![], "not_a_stream"),
            (vec![text(), text(), Event::Error("x".into()), Event::Done], "error_event"),
        ] {
            assert_eq!(reply(events, 2), Err(want.to_owned()));
        }
    }

    #[test]
    fn the_time_of_a_token_does_not_depend_on_the_pieces() {
        let of = |arrivals_s: Vec<f64>| {
            Answered { start_s: 0.0, arrivals_s, end_s: 9.0, output_tokens: 5, prompt_tokens: 1 }.tpot_ms()
        };
        assert_eq!(of(vec![1.0, 2.0, 3.0, 4.0, 5.0]), Some(1000.0));
        assert_eq!(of(vec![1.0, 5.0]), Some(1000.0));
    }
}
