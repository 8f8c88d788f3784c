//! Streams and events of the emulated device. A stream is a queue; what is in it runs when someone forces it.
//!
//! Each `record` takes a ticket. A wait, of a stream or of the host, is for the ticket that the event had when the wait was
//! asked for, as the driver has it.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use super::work::Work;

/// One `record` of an event.
pub(super) type Ticket = u64;

#[derive(Debug)]
enum Entry {
    Run(Work),
    Record { event: usize, ticket: Ticket },
    Wait(Ticket),
}

/// What a stream does next.
#[derive(Debug)]
pub(super) enum Next {
    /// Nothing is queued.
    Empty,
    /// It waits for this.
    Blocked(Ticket),
    /// It passed a record or a wait.
    Passed,
    /// This is to be run.
    Run(Work),
}

/// The last record of an event.
#[derive(Clone, Copy, Debug, Default)]
struct Recorded {
    ticket: Option<Ticket>,
    at: Option<Instant>,
}

/// All streams and events.
#[derive(Debug, Default)]
pub(super) struct Queues {
    streams: Vec<VecDeque<Entry>>,
    events: Vec<Recorded>,
    /// Tickets that have not come, and the streams they are in.
    pending: HashMap<Ticket, usize>,
    tickets: Ticket,
}

impl Queues {
    pub(super) fn stream(&mut self) -> usize {
        self.streams.push(VecDeque::new());
        self.streams.len() - 1
    }

    pub(super) fn event(&mut self) -> usize {
        self.events.push(Recorded::default());
        self.events.len() - 1
    }

    pub(super) const fn streams(&self) -> usize {
        self.streams.len()
    }

    pub(super) const fn events(&self) -> usize {
        self.events.len()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.streams.iter().all(VecDeque::is_empty)
    }

    pub(super) fn push(&mut self, stream: usize, work: Work) {
        self.streams[stream].push_back(Entry::Run(work));
    }

    pub(super) fn record(&mut self, event: usize, stream: usize) {
        self.tickets += 1;
        let ticket = self.tickets;
        self.events[event] = Recorded { ticket: Some(ticket), at: None };
        self.pending.insert(ticket, stream);
        self.streams[stream].push_back(Entry::Record { event, ticket });
    }

    pub(super) fn wait(&mut self, stream: usize, event: usize) {
        if let Some(ticket) = self.events[event].ticket {
            self.streams[stream].push_back(Entry::Wait(ticket));
        }
    }

    /// The ticket that the host waits for; none if the event has come or was never recorded.
    pub(super) fn awaited(&self, event: usize) -> Option<Ticket> {
        self.events[event].ticket.filter(|ticket| self.is_pending(*ticket))
    }

    pub(super) fn is_pending(&self, ticket: Ticket) -> bool {
        self.pending.contains_key(&ticket)
    }

    /// The stream whose work leads to the ticket.
    pub(super) fn stream_of(&self, ticket: Ticket) -> Option<usize> {
        self.pending.get(&ticket).copied()
    }

    /// When the event came.
    pub(super) fn came_at(&self, event: usize) -> Option<Instant> {
        self.events[event].at
    }

    /// Takes the stream one entry further.
    pub(super) fn next(&mut self, stream: usize) -> Next {
        match self.streams[stream].pop_front() {
            None => Next::Empty,
            Some(Entry::Run(work)) => Next::Run(work),
            Some(Entry::Record { event, ticket }) => {
                self.pending.remove(&ticket);
                let recorded = &mut self.events[event];
                if recorded.ticket == Some(ticket) {
                    recorded.at = Some(Instant::now());
                }
                Next::Passed
            }
            Some(Entry::Wait(ticket)) if self.is_pending(ticket) => {
                self.streams[stream].push_front(Entry::Wait(ticket));
                Next::Blocked(ticket)
            }
            Some(Entry::Wait(_)) => Next::Passed,
        }
    }
}
