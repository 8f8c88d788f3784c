//! Between the network and the disk: a thread that hashes and writes what it is sent.

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::error::FetchError;
use crate::adapters::store::{FileSink, StoreError, Written};

/// Chunks on their way to the thread. A slow disk slows the network down, not the memory up.
const PIECES_MAX: usize = 8;

enum Piece {
    Bytes(Bytes),
    Restart,
    Finish(oneshot::Sender<Written>),
}

/// One file's thread. Must be closed, so that nobody writes once a download is over.
pub(super) struct Writer {
    pieces: mpsc::Sender<Piece>,
    thread: JoinHandle<Result<(), StoreError>>,
}

impl Writer {
    /// Starts the thread with what `open` makes.
    pub(super) fn start(open: impl FnOnce() -> Result<FileSink, StoreError> + Send + 'static) -> Self {
        let (pieces, arriving) = mpsc::channel(PIECES_MAX);
        Self { pieces, thread: tokio::task::spawn_blocking(move || write(open()?, arriving)) }
    }

    pub(super) async fn write(&mut self, bytes: Bytes) -> Result<(), FetchError> {
        self.send(Piece::Bytes(bytes)).await
    }

    /// Forgets every byte so far.
    pub(super) async fn restart(&mut self) -> Result<(), FetchError> {
        self.send(Piece::Restart).await
    }

    /// The hashes, once everything is on disk.
    pub(super) async fn finish(&mut self) -> Result<Written, FetchError> {
        let (report, written) = oneshot::channel();
        self.send(Piece::Finish(report)).await?;
        match written.await {
            Ok(written) => Ok(written),
            Err(_) => Err(self.failure().await),
        }
    }

    /// Ends the thread; what is in the file stays.
    pub(super) async fn close(self) {
        drop(self.pieces);
        if !self.thread.is_finished() {
            let _ = self.thread.await;
        }
    }

    async fn send(&mut self, piece: Piece) -> Result<(), FetchError> {
        if self.pieces.send(piece).await.is_ok() {
            return Ok(());
        }
        Err(self.failure().await)
    }

    /// Why the thread ended. Only asked once: its failure ends the download.
    async fn failure(&mut self) -> FetchError {
        match (&mut self.thread).await {
            Ok(Err(error)) => error.into(),
            Ok(Ok(())) | Err(_) => FetchError::Storage { reason: "the writing thread ended early".into() },
        }
    }
}

fn write(mut sink: FileSink, mut arriving: mpsc::Receiver<Piece>) -> Result<(), StoreError> {
    while let Some(piece) = arriving.blocking_recv() {
        match piece {
            Piece::Bytes(bytes) => sink.write(&bytes)?,
            Piece::Restart => sink.restart()?,
            Piece::Finish(report) => {
                let _ = report.send(sink.finish()?); // nobody waits when the download was given up
            }
        }
    }
    Ok(())
}
