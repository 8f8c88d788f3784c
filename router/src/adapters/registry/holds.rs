//! Who still needs a content. The engine forgets it when nobody does.
//!
//! A name holds the content it stands for, a request the one it runs under. The last one to let go tells the engine. A
//! load that was told about a content before it was forgotten must not believe that the engine still knows it: every
//! forgetting has a number, and a load compares.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::engine::{ContentId, ForgetMode};
use crate::http::Backend;

/// Forgettings that are remembered. A load that began before the oldest of them asks the engine again.
const REMEMBERED_MAX: usize = 4096;

/// All contents that somebody holds.
pub(super) struct Holds {
    engine: Arc<dyn Backend>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    live: HashMap<ContentId, Weak<ContentHold>>,
    /// Number of the latest forgetting.
    latest: u64,
    forgotten: VecDeque<(u64, ContentId)>,
}

/// Keeps one content known to the engine.
pub(super) struct ContentHold {
    pub(super) content: ContentId,
    holds: Arc<Holds>,
}

impl Holds {
    pub(super) fn new(engine: Arc<dyn Backend>) -> Arc<Self> {
        Arc::new(Self { engine, state: Mutex::default() })
    }

    /// To be asked before the engine is: see [`Self::take`].
    pub(super) fn moment(&self) -> u64 {
        self.state().latest
    }

    /// Holds a content that the engine said it has. `None`: it was told to forget it after `asked_at`; ask it again.
    pub(super) fn take(self: &Arc<Self>, content: ContentId, asked_at: u64) -> Option<Arc<ContentHold>> {
        let mut state = self.state();
        let oldest = state.forgotten.front().map_or(0, |(nth, _)| nth - 1);
        let too_old = asked_at < oldest;
        if too_old || state.forgotten.iter().rev().take_while(|(nth, _)| *nth > asked_at).any(|(_, id)| *id == content)
        {
            return None;
        }
        if let Some(hold) = state.live.get(&content).and_then(Weak::upgrade) {
            return Some(hold);
        }
        let hold = Arc::new(ContentHold { content, holds: Arc::clone(self) });
        state.live.insert(content, Arc::downgrade(&hold));
        Some(hold)
    }

    /// Ends every request that runs under it. Whoever still holds it holds nothing.
    pub(super) fn forget_now(&self, content: ContentId) {
        let mut state = self.state();
        if state.live.remove(&content).is_some() {
            self.forget(&mut state, content, ForgetMode::Now);
        }
    }

    fn forget(&self, state: &mut State, content: ContentId, mode: ForgetMode) {
        state.latest += 1;
        let nth = state.latest;
        state.forgotten.push_back((nth, content));
        if state.forgotten.len() > REMEMBERED_MAX {
            state.forgotten.pop_front();
        }
        // Under the lock, so that no `take` comes between the number and the message.
        self.engine.forget_adapter(content, mode);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ContentHold {
    fn drop(&mut self) {
        let mut state = self.holds.state();
        // A hold that was taken meanwhile, or `forget_now`, has put something else (or nothing) in its place.
        let is_last =
            state.live.get(&self.content).is_some_and(|live| std::ptr::eq(live.as_ptr(), std::ptr::from_ref(self)));
        if is_last {
            state.live.remove(&self.content);
            self.holds.forget(&mut state, self.content, ForgetMode::Drain);
        }
    }
}
