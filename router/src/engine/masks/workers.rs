//! Threads that move grammars. A grammar is code that depends on what people send, so no other thread waits for one: a worker
//! that is slow gets a stand-in, and one that is stuck costs its own request only.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::run::Message;
use crate::engine::types::{Allowed, Grammar, GrammarFailure, GrammarState};

/// A worker that is at one call for longer gets a stand-in.
pub(super) const STAND_IN_AFTER: Duration = Duration::from_millis(50);
/// Threads at most, those that are stuck included. When all are, asks wait and then fail.
const THREADS_MAX: usize = 16;

/// Which ask an answer belongs to. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::engine) struct Ticket(pub(super) u64);

/// One call's work.
pub(super) enum Work {
    /// Makes a sequence's state, and the mask of its first token.
    Start(Arc<dyn Grammar>),
    /// Moves over a token, and makes the mask of the next.
    Accept(Box<dyn GrammarState>, u32),
    /// Frees a state: a large one takes a while.
    Drop(Box<dyn GrammarState>),
}

pub(super) struct Job {
    pub(super) ticket: Ticket,
    pub(super) work: Work,
    /// Tokens of the model; a mask has no word beyond them.
    pub(super) vocab: u32,
}

/// What a call came to.
pub(in crate::engine) struct Answer {
    pub(super) ticket: Ticket,
    /// None where the grammar failed.
    pub(super) state: Option<Box<dyn GrammarState>>,
    pub(super) outcome: Result<Allowed, GrammarFailure>,
}

/// The threads and their queue. Dropping it ends them, those that are stuck excepted.
pub(super) struct Workers {
    shared: Arc<Shared>,
    inbox: Sender<Message>,
    /// Threads that take jobs.
    count: usize,
}

struct Shared {
    pool: Mutex<Pool>,
    wanted: Condvar,
}

#[derive(Default)]
struct Pool {
    queue: VecDeque<Job>,
    /// By thread: the call it is at.
    busy: HashMap<u64, Call>,
    /// Threads, and how many of them wait for a job.
    threads: usize,
    idle: usize,
    /// Threads that have a stand-in and are still at their call.
    replaced: usize,
    next_thread: u64,
    closed: bool,
}

struct Call {
    ticket: Ticket,
    since: Instant,
    replaced: bool,
}

impl Shared {
    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Workers {
    /// No thread is started before there is something to do.
    pub(super) fn new(inbox: Sender<Message>) -> Self {
        let count = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 4);
        let shared = Arc::new(Shared { pool: Mutex::default(), wanted: Condvar::new() });
        Self { shared, inbox, count }
    }

    /// Queues a job; its answer comes to the inbox, except for [`Work::Drop`].
    pub(super) fn give(&self, job: Job) {
        let mut pool = self.shared.pool();
        pool.queue.push_back(job);
        if pool.idle < pool.queue.len() {
            self.hire(&mut pool);
        }
        self.shared.wanted.notify_one();
    }

    /// Takes a job back that nobody has begun; only its state is freed.
    pub(super) fn withdraw(&self, ticket: Ticket) {
        let mut pool = self.shared.pool();
        let Some(at) = pool.queue.iter().position(|job| job.ticket == ticket) else { return };
        if let Some(Job { work: Work::Accept(state, _), vocab, .. }) = pool.queue.remove(at) {
            pool.queue.push_back(Job { ticket, work: Work::Drop(state), vocab });
        }
    }

    /// Gives slow workers stand-ins, and tells which calls have taken longer than `limit`.
    pub(super) fn watch(&self, limit: Duration) -> Vec<Ticket> {
        let mut late = Vec::new();
        let mut pool = self.shared.pool();
        let Pool { busy, replaced, .. } = &mut *pool;
        for call in busy.values_mut() {
            let took = call.since.elapsed();
            if took > STAND_IN_AFTER && !call.replaced {
                call.replaced = true;
                *replaced += 1;
            }
            if took > limit {
                late.push(call.ticket);
            }
        }
        if pool.idle < pool.queue.len() {
            self.hire(&mut pool);
        }
        late
    }

    /// Starts one more thread if there are fewer than should take jobs.
    fn hire(&self, pool: &mut Pool) {
        if pool.threads - pool.replaced >= self.count || pool.threads >= THREADS_MAX {
            return;
        }
        let name = pool.next_thread;
        let (shared, inbox, count) = (Arc::clone(&self.shared), self.inbox.clone(), self.count);
        let thread = std::thread::Builder::new().name(format!("grammar-{name}"));
        match thread.spawn(move || work(name, &shared, &inbox, count)) {
            Ok(_) => {
                pool.next_thread += 1;
                pool.threads += 1;
            }
            Err(error) => tracing::warn!(%error, "no thread for grammars could be started"),
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let mut pool = self.shared.pool();
        pool.closed = true;
        pool.queue.clear();
        self.shared.wanted.notify_all();
    }
}

fn work(name: u64, shared: &Shared, inbox: &Sender<Message>, count: usize) {
    loop {
        let mut pool = shared.pool();
        let job = loop {
            if pool.closed {
                return;
            }
            if let Some(job) = pool.queue.pop_front() {
                break job;
            }
            pool.idle += 1;
            pool = shared.wanted.wait(pool).unwrap_or_else(PoisonError::into_inner);
            pool.idle -= 1;
        };
        let ticket = job.ticket;
        pool.busy.insert(name, Call { ticket, since: Instant::now(), replaced: false });
        drop(pool);
        let answer = catch_unwind(AssertUnwindSafe(|| call(job)))
            .unwrap_or_else(|_| Some(failed(ticket, "the grammar's code panicked".into())));
        let mut pool = shared.pool();
        if pool.busy.remove(&name).is_some_and(|call| call.replaced) {
            pool.replaced -= 1;
        }
        // Its stand-ins may be enough.
        let leaves = pool.threads - pool.replaced > count;
        pool.threads -= usize::from(leaves);
        drop(pool);
        if let Some(answer) = answer {
            let _ = inbox.send(Message::Masked(Box::new(answer)));
        }
        if leaves {
            return;
        }
    }
}

fn failed(ticket: Ticket, reason: String) -> Answer {
    Answer { ticket, state: None, outcome: Err(GrammarFailure(reason)) }
}

fn call(job: Job) -> Option<Answer> {
    let Job { ticket, work, vocab } = job;
    let (mut state, token) = match work {
        Work::Start(grammar) => (grammar.start(), None),
        Work::Accept(state, token) => (state, Some(token)),
        Work::Drop(state) => {
            drop(state);
            return None;
        }
    };
    let accepted = token.map_or(Ok(()), |token| state.accept(token));
    let outcome = accepted.and_then(|()| state.next()).and_then(|allowed| fit(allowed, vocab));
    Some(match outcome {
        Ok(_) => Answer { ticket, state: Some(state), outcome },
        Err(GrammarFailure(reason)) => failed(ticket, reason),
    })
}

/// Cuts a mask to the model's tokens; one of them must be left.
fn fit(allowed: Allowed, vocab: u32) -> Result<Allowed, GrammarFailure> {
    let Allowed::Tokens(words) = allowed else { return Ok(allowed) };
    let len_words = words.len().min(vocab.div_ceil(32) as usize);
    let spare = (len_words * 32).saturating_sub(vocab as usize);
    let last = words.get(len_words.wrapping_sub(1)).copied().unwrap_or(0) << spare;
    let before = words.get(..len_words.saturating_sub(1)).unwrap_or_default();
    if last == 0 && before.iter().all(|word| *word == 0) {
        return Err(GrammarFailure("no token of the model can follow".into()));
    }
    Ok(match words.get(..len_words) {
        Some(fitting) if len_words < words.len() => Allowed::Tokens(Arc::from(fitting)),
        _ => Allowed::Tokens(words),
    })
}
