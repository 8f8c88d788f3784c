//! What the HTTP side needs of the engine, as a trait: tests put a scripted one in its place.

use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;

use crate::engine::{
    AdapterCheck, AdapterFailure, ContentId, EngineHandle, EngineStatus, Failure, ForgetMode, GenerateEvent,
    GenerateRequest, Generation, MergeAsk, MissingReport, PinLevel, PinRefused, PreparedAdapter,
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
    /// See [`EngineHandle::check_adapter`].
    fn check_adapter(&self, dir: PathBuf) -> BoxFuture<'static, Result<AdapterCheck, AdapterFailure>>;
    /// See [`EngineHandle::merge_adapters`].
    fn merge_adapters(&self, ask: MergeAsk) -> BoxFuture<'static, Result<(), AdapterFailure>>;
    /// See [`EngineHandle::pin_adapter`].
    fn pin_adapter(&self, content: ContentId, level: Option<PinLevel>) -> BoxFuture<'static, Result<(), PinRefused>>;
    /// See [`EngineHandle::forget_adapter`].
    fn forget_adapter(&self, content: ContentId, mode: ForgetMode);
    /// See [`EngineHandle::prefetch_adapter`].
    fn prefetch_adapter(&self, content: ContentId);
    /// See [`EngineHandle::on_missing`].
    fn on_missing(&self, _report: MissingReport) {}
    /// See [`EngineHandle::carry_events_here`].
    fn carry_events_here(&self) {}
    /// See [`EngineHandle::give_up_adapter`].
    fn give_up_adapter(&self, _content: ContentId, _reason: String) {}
    /// See [`EngineHandle::forget_prefixes`].
    fn forget_prefixes(&self) {}
    /// See [`EngineHandle::status`].
    fn status(&self) -> Arc<EngineStatus>;
    /// See [`EngineHandle::begin_drain`].
    fn begin_drain(&self);
}

/// The events of one request. Dropping it cancels the request.
pub trait Events: Send + Sync {
    /// The next event; `None` after the last.
    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<GenerateEvent>>;
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

    fn check_adapter(&self, dir: PathBuf) -> BoxFuture<'static, Result<AdapterCheck, AdapterFailure>> {
        let engine = self.clone();
        Box::pin(async move { Self::check_adapter(&engine, dir).await })
    }

    fn merge_adapters(&self, ask: MergeAsk) -> BoxFuture<'static, Result<(), AdapterFailure>> {
        let engine = self.clone();
        Box::pin(async move { Self::merge_adapters(&engine, ask).await })
    }

    fn pin_adapter(&self, content: ContentId, level: Option<PinLevel>) -> BoxFuture<'static, Result<(), PinRefused>> {
        let engine = self.clone();
        Box::pin(async move { Self::pin_adapter(&engine, content, level).await })
    }

    fn forget_adapter(&self, content: ContentId, mode: ForgetMode) {
        Self::forget_adapter(self, content, mode);
    }

    fn prefetch_adapter(&self, content: ContentId) {
        Self::prefetch_adapter(self, content);
    }

    fn on_missing(&self, report: MissingReport) {
        Self::on_missing(self, report);
    }

    fn carry_events_here(&self) {
        Self::carry_events_here(self);
    }

    fn give_up_adapter(&self, content: ContentId, reason: String) {
        Self::give_up_adapter(self, content, reason);
    }

    fn forget_prefixes(&self) {
        Self::forget_prefixes(self);
    }

    fn status(&self) -> Arc<EngineStatus> {
        Self::status(self)
    }

    fn begin_drain(&self) {
        Self::begin_drain(self);
    }
}

impl Events for Generation {
    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<GenerateEvent>> {
        Self::poll_recv(self, cx)
    }

    fn finish(&mut self, index: u32) {
        Self::finish(self, index);
    }
}
