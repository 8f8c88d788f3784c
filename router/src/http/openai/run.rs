//! One prompt under one set of adapters, in the engine. Dropping it cancels it.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use loramux_proto::PositionLogprobs;

use super::sequence::{Piece, SequenceText};
use crate::adapters::ResolvedAdapter;
use crate::engine::GenerateEvent;
use crate::http::Events;
use crate::http::error::{ApiError, Cause};
use crate::metrics::{Finished, RequestClock};

/// See the module.
pub(crate) struct Run {
    pub(crate) events: Box<dyn Events>,
    pub(crate) clock: RequestClock,
    pub(crate) sequences: Vec<SequenceText>,
    /// `choices[].index` of its first sequence.
    pub(crate) first_choice: usize,
    /// `choices[].adapter`, in a fan-out.
    pub(crate) label: Option<String>,
    /// Held, so that what it runs under stays known.
    #[expect(dead_code, reason = "dropped, never read")]
    pub(crate) adapters: Arc<[ResolvedAdapter]>,
    pub(crate) prompt: Arc<[u32]>,
    /// The prompt as text, if it is echoed.
    pub(crate) echo: Option<String>,
    /// As they came from the engine.
    pub(crate) prompt_logprobs: Vec<PositionLogprobs>,
    pub(crate) cached_tokens: u32,
    pub(crate) admitted: bool,
    pub(crate) all_stopped: bool,
}

/// What happened.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Response headers may go out.
    Admitted,
    /// Sequence `index` (of this run) got further.
    Piece { index: usize, piece: Piece },
}

impl Run {
    /// The next thing worth telling; `None` when every sequence has ended.
    pub(crate) async fn next(&mut self) -> Option<Result<Progress, ApiError>> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`Self::next`] for those who poll themselves.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Progress, ApiError>>> {
        loop {
            if self.sequences.iter().all(|sequence| sequence.ended) {
                self.clock.finished(if self.all_stopped { Finished::Stop } else { Finished::Length });
                return Poll::Ready(None);
            }
            let Some(event) = ready!(self.events.poll_recv(cx)) else {
                self.clock.failed(Cause::InternalError.row().code);
                let error = ApiError::new(Cause::InternalError, "the engine ended before the request did");
                return Poll::Ready(Some(Err(error)));
            };
            match event {
                GenerateEvent::Admitted { cached_tokens } if !self.admitted => {
                    (self.admitted, self.cached_tokens) = (true, cached_tokens);
                    self.clock.admitted(cached_tokens);
                    return Poll::Ready(Some(Ok(Progress::Admitted)));
                }
                GenerateEvent::Admitted { .. } => {} // again, after a preemption
                GenerateEvent::PromptLogprobs { positions } => self.prompt_logprobs.extend(positions),
                GenerateEvent::Token { index, token, logprob, top } => {
                    let Some(sequence) = open(&mut self.sequences, index) else { continue };
                    self.clock.token(index);
                    let piece = sequence.token(token, logprob, top);
                    if piece.end.is_some() {
                        self.events.finish(index);
                    }
                    return Poll::Ready(Some(Ok(Progress::Piece { index: index as usize, piece })));
                }
                GenerateEvent::Embedding { .. } => {} // nobody asks for one here
                GenerateEvent::Finished { index, reason } => {
                    let Some(sequence) = open(&mut self.sequences, index) else { continue };
                    let piece = sequence.finished(reason);
                    self.all_stopped &= piece.end.as_ref().is_some_and(|end| end.reason == "stop");
                    return Poll::Ready(Some(Ok(Progress::Piece { index: index as usize, piece })));
                }
                GenerateEvent::Failed(failure) => {
                    let error = ApiError::from(failure);
                    self.clock.failed(error.cause.row().code);
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }

    /// Tokens generated so far, all sequences.
    pub(crate) fn completion_tokens(&self) -> u64 {
        self.sequences.iter().map(|sequence| u64::from(sequence.tokens)).sum()
    }
}

/// A sequence that still takes events: after a stop string a few may be on their way.
fn open(sequences: &mut [SequenceText], index: u32) -> Option<&mut SequenceText> {
    sequences.get_mut(index as usize).filter(|sequence| !sequence.ended)
}
