//! Events on their way to their readers.
//!
//! A step makes an event for each stream. Waking each stream's task from here would cost the engine's thread a wake-up
//! for each, in front of the next step. So the events of a turn of its loop are handed over together, after the step was
//! sent, to one task of the HTTP side, which gives them to their readers.

use std::sync::{Arc, OnceLock};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::types::GenerateEvent;

/// An event and its reader's end.
type Letter = (UnboundedSender<GenerateEvent>, GenerateEvent);

/// Where the letters of a turn go; set once somebody carries them.
#[derive(Debug, Default)]
pub(super) struct Carrier(OnceLock<UnboundedSender<Vec<Letter>>>);

impl Carrier {
    /// From now on a task of the current runtime carries the letters. Only the first call counts.
    pub(super) fn start(&self) {
        let (sender, inbox) = unbounded_channel();
        if self.0.set(sender).is_ok() {
            tokio::spawn(carry(inbox));
        }
    }
}

async fn carry(mut inbox: UnboundedReceiver<Vec<Letter>>) {
    while let Some(letters) = inbox.recv().await {
        deliver(letters);
    }
}

fn deliver(letters: Vec<Letter>) {
    for (reader, event) in letters {
        // A reader that left is cancelled by its own drop.
        let _ = reader.send(event);
    }
}

/// Letters of this turn.
pub(super) struct Outbox {
    letters: Vec<Letter>,
    carrier: Arc<Carrier>,
}

impl Outbox {
    pub(super) fn new(carrier: Arc<Carrier>) -> Self {
        Self { letters: Vec::new(), carrier }
    }

    pub(super) fn push(&mut self, reader: &UnboundedSender<GenerateEvent>, event: GenerateEvent) {
        self.letters.push((reader.clone(), event));
    }

    /// Hands everything over.
    pub(super) fn send(&mut self) {
        if self.letters.is_empty() {
            return;
        }
        let room = self.letters.len();
        let letters = std::mem::replace(&mut self.letters, Vec::with_capacity(room));
        match self.carrier.0.get() {
            None => deliver(letters),
            // The carrier's runtime has ended: its readers too, but there may be others.
            Some(carrier) => carrier.send(letters).unwrap_or_else(|unsent| deliver(unsent.0)),
        }
    }
}
