//! What the HTTP side needs of the engine, as a trait: tests put a scripted one in its place.

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::engine::{
    AdapterFailure, EngineHandle, EngineStatus, Failure, GenerateEvent, GenerateRequest, Generation, PreparedAdapter,
};

/// The engine, seen from the HTTP side. [`EngineHandle`] is the real one.
pub trait Backend: Send + Sync + 'static {
    /// See [`EngineHandle::submit`].
    ///
    /// # Errors
    /// What is known at once: queue full, draining, too large.
    fn submit(&self, request: GenerateRequest) -> Result<Box<dyn Events>, Failure>;
    /// See [`EngineHandle::prepare_adapter`].
    fn prepare_adapter(&self, dir: PathBuf) -> BoxFuture<'static, Result<PreparedAdapter, AdapterFailure>>;
    /// See [`EngineHandle::status`].
    fn status(&self) -> Arc<EngineStatus>;
    /// See [`EngineHandle::begin_drain`].
    fn begin_drain(&self);
}

/// The events of one request. Dropping it cancels the request.
pub trait Events: Send + Sync {
    /// The next event; `None` after the last.
    fn recv(&mut self) -> BoxFuture<'_, Option<GenerateEvent>>;
    /// Ends one sequence from this side.
    fn finish(&mut self, index: u32);
}

impl Backend for EngineHandle {
    fn submit(&self, request: GenerateRequest) -> Result<Box<dyn Events>, Failure> {
        Self::submit(self, request).map(|generation| Box::new(generation) as Box<dyn Events>)
    }

    fn prepare_adapter(&self, dir: PathBuf) -> BoxFuture<'static, Result<PreparedAdapter, AdapterFailure>> {
        let engine = self.clone();
        Box::pin(async move { Self::prepare_adapter(&engine, dir).await })
    }

    fn status(&self) -> Arc<EngineStatus> {
        Self::status(self)
    }

    fn begin_drain(&self) {
        Self::begin_drain(self);
    }
}

impl Events for Generation {
    fn recv(&mut self) -> BoxFuture<'_, Option<GenerateEvent>> {
        Box::pin(Self::recv(self))
    }

    fn finish(&mut self, index: u32) {
        Self::finish(self, index);
    }
}
