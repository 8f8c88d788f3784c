//! Whose turn it is to download: limits in all, by source kind and by tenant, and no one waits behind another's backlog.
//!
//! Who waits stands in a line of his (tenant, source kind). A free place goes to the line whose limits allow it and whose
//! tenant has the fewest downloads running; between equals, to the one that was served longest ago.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::limits::FetchLimits;
use crate::adapters::types::SourceKind;

/// A tenant's downloads from one kind of source.
pub(super) type LineId = (u64, SourceKind);

/// All who wait and how many run.
pub(super) struct Queue {
    limits: FetchLimits,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: usize,
    by_tenant: HashMap<u64, usize>,
    by_source: HashMap<SourceKind, usize>,
    lines: BTreeMap<LineId, Line>,
    /// Places taken in all lines.
    waiting: usize,
    turn: u64,
}

#[derive(Default)]
struct Line {
    waiters: VecDeque<Waiter>,
    served: u64,
}

/// One download's place in line; it may stand in several, and the first that is served counts.
#[derive(Clone)]
pub(super) struct Waiter(Arc<Mutex<Option<oneshot::Sender<Permit>>>>);

impl Waiter {
    fn lock(&self) -> MutexGuard<'_, Option<oneshot::Sender<Permit>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_waiting(&self) -> bool {
        self.lock().as_ref().is_some_and(|sender| !sender.is_closed())
    }
}

/// The right to download one adapter. Dropping it serves the next.
pub(super) struct Permit {
    queue: Arc<Queue>,
    line: LineId,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let (tenant, kind) = self.line;
        let mut state = self.queue.state();
        state.running -= 1;
        leave(&mut state.by_tenant, tenant);
        leave(&mut state.by_source, kind);
        drop(state);
        self.queue.serve();
    }
}

impl Queue {
    pub(super) fn new(limits: FetchLimits) -> Arc<Self> {
        Arc::new(Self { limits, state: Mutex::default() })
    }

    /// A place in line, and what brings the permit. `Err` with the number of those who wait when there are too many.
    pub(super) fn enter(self: &Arc<Self>, line: LineId) -> Result<(Waiter, oneshot::Receiver<Permit>), usize> {
        let (sender, receiver) = oneshot::channel();
        let waiter = Waiter(Arc::new(Mutex::new(Some(sender))));
        self.stand(line, waiter.clone())?;
        self.serve();
        Ok((waiter, receiver))
    }

    /// `waiter` stands in `line` too: its download is wanted on that account as well.
    pub(super) fn also(self: &Arc<Self>, line: LineId, waiter: &Waiter) {
        if waiter.is_waiting() && self.stand(line, waiter.clone()).is_ok() {
            self.serve();
        }
    }

    fn stand(&self, line: LineId, waiter: Waiter) -> Result<(), usize> {
        let mut state = self.state();
        let of_tenant = (line.0, SourceKind::Hub)..=(line.0, SourceKind::Merge);
        let own: usize = state.lines.range(of_tenant).map(|(_, line)| line.waiters.len()).sum();
        if state.waiting >= self.limits.waiting_max || own >= self.limits.waiting_per_tenant_max {
            return Err(state.waiting);
        }
        state.waiting += 1;
        state.lines.entry(line).or_default().waiters.push_back(waiter);
        Ok(())
    }

    /// Gives away every free place that somebody may have.
    fn serve(self: &Arc<Self>) {
        loop {
            let mut state = self.state();
            let Some((line, waiter)) = state.next(&self.limits) else { return };
            let sender = waiter.lock().take().filter(|sender| !sender.is_closed());
            let Some(sender) = sender else { continue }; // served in another line, or given up
            state.running += 1;
            *state.by_tenant.entry(line.0).or_default() += 1;
            *state.by_source.entry(line.1).or_default() += 1;
            drop(state); // a permit that nobody takes comes back through its drop, which locks again
            let _ = sender.send(Permit { queue: Arc::clone(self), line });
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Downloads that run, and places in line.
    pub(super) fn counts(&self) -> (usize, usize) {
        let state = self.state();
        (state.running, state.waiting)
    }
}

impl State {
    /// Takes the next waiter out of its line.
    fn next(&mut self, limits: &FetchLimits) -> Option<(LineId, Waiter)> {
        if self.running >= limits.total {
            return None;
        }
        let of_tenant = |tenant: &u64| self.by_tenant.get(tenant).copied().unwrap_or(0);
        let of_source = |kind: &SourceKind| self.by_source.get(kind).copied().unwrap_or(0);
        let may =
            |(tenant, kind): &LineId| of_tenant(tenant) < limits.per_tenant && of_source(kind) < limits.per_source;
        let lines = self.lines.iter().filter(|(id, _)| may(id));
        let (id, _) = lines.min_by_key(|((tenant, _), line)| (of_tenant(tenant), line.served))?;
        let id = *id;
        let line = self.lines.get_mut(&id)?;
        let waiter = line.waiters.pop_front()?;
        self.turn += 1;
        line.served = self.turn;
        self.waiting -= 1;
        if line.waiters.is_empty() {
            self.lines.remove(&id);
        }
        Some((id, waiter))
    }
}

fn leave<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: K) {
    let Some(count) = counts.get_mut(&key) else { return };
    *count -= 1;
    if *count == 0 {
        counts.remove(&key);
    }
}
