//! A body of known length that must keep a least speed.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt, try_unfold};
use tokio::time::{Instant, timeout};

use super::settings::Pace;
use crate::adapters::types::{ByteStream, SourceError};

/// How long a complete body is listened to for bytes that should not come.
const AFTER_THE_END: Duration = Duration::from_millis(20);

struct Paced {
    body: BoxStream<'static, Result<Bytes, SourceError>>,
    left: u64,
    pace: Pace,
    /// Time spent waiting in this window. The reader's own time is not the source's.
    waited: Duration,
    bytes: u64,
}

/// Passes on exactly `bytes` bytes of `body`.
///
/// Fails if the body is shorter or longer, or if it brings less than [`Pace::bytes_min`] in a [`Pace::window`] of waiting.
pub(super) fn paced(body: BoxStream<'static, Result<Bytes, SourceError>>, bytes: u64, pace: Pace) -> ByteStream {
    let start = Paced { body, left: bytes, pace, waited: Duration::ZERO, bytes: 0 };
    try_unfold(start, |mut state| async move { Ok(state.next().await?.map(|chunk| (chunk, state))) }).boxed()
}

impl Paced {
    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        loop {
            if self.left == 0 {
                return self.end().await;
            }
            let start = Instant::now();
            let chunk = timeout(self.pace.window.saturating_sub(self.waited), self.body.next()).await;
            self.waited += start.elapsed();
            let chunk = match chunk {
                Ok(Some(chunk)) => chunk?,
                Ok(None) => return Err(SourceError::retryable("the body ended before its announced length")),
                Err(_) => Bytes::new(),
            };
            self.bytes += chunk.len() as u64;
            if self.waited >= self.pace.window {
                if self.bytes < self.pace.bytes_min {
                    return Err(SourceError::retryable("the source is too slow"));
                }
                (self.waited, self.bytes) = (Duration::ZERO, 0);
            }
            self.left = self.left.checked_sub(chunk.len() as u64).ok_or_else(too_long)?;
            if !chunk.is_empty() {
                return Ok(Some(chunk));
            }
        }
    }

    async fn end(&mut self) -> Result<Option<Bytes>, SourceError> {
        match timeout(AFTER_THE_END, self.body.next()).await {
            Ok(Some(Ok(chunk))) if !chunk.is_empty() => Err(too_long()),
            _ => Ok(None),
        }
    }
}

fn too_long() -> SourceError {
    SourceError::retryable("the body is longer than announced")
}

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt;
    use futures_util::stream::{self, unfold};

    use super::*;

    fn quick() -> Pace {
        Pace { window: Duration::from_millis(200), bytes_min: 1000, ..Pace::default() }
    }

    /// `chunk_bytes` every `every`, for ever.
    fn drip(chunk_bytes: usize, every: Duration) -> BoxStream<'static, Result<Bytes, SourceError>> {
        unfold((), move |()| async move {
            tokio::time::sleep(every).await;
            Some((Ok(Bytes::from(vec![0; chunk_bytes])), ()))
        })
        .boxed()
    }

    async fn read(body: BoxStream<'static, Result<Bytes, SourceError>>, bytes: u64) -> Result<usize, SourceError> {
        paced(body, bytes, quick()).try_fold(0, |sum, chunk| async move { Ok(sum + chunk.len()) }).await
    }

    #[tokio::test]
    async fn a_slow_body_fails_and_one_just_fast_enough_does_not() {
        let start = Instant::now();
        assert!(matches!(read(drip(1, Duration::from_millis(5)), 1 << 30).await, Err(SourceError::Retryable { .. })));
        assert!(matches!(read(stream::pending().boxed(), 10).await, Err(SourceError::Retryable { .. })));
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(read(drip(500, Duration::from_millis(20)).take(20).boxed(), 10_000).await, Ok(10_000));
    }

    #[tokio::test]
    async fn a_body_has_exactly_its_announced_length() {
        let body = |lens: &'static [usize]| stream::iter(lens.iter().map(|len| Ok(Bytes::from(vec![0; *len])))).boxed();
        assert_eq!(read(body(&[3, 0, 4]), 7).await, Ok(7));
        assert_eq!(read(body(&[]), 0).await, Ok(0));
        for (lens, bytes) in [(&[3, 3][..], 7), (&[3, 5], 7), (&[3, 4, 1], 7), (&[1], 0)] {
            assert!(matches!(read(body(lens), bytes).await, Err(SourceError::Retryable { .. })), "{lens:?}");
        }
    }

    #[tokio::test]
    async fn a_reader_that_takes_its_time_is_not_the_sources_fault() {
        let mut body = paced(drip(10, Duration::ZERO).take(5).boxed(), 50, quick());
        while let Some(chunk) = body.try_next().await.unwrap() {
            assert_eq!(chunk.len(), 10);
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    }
}
