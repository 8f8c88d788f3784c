//! Capture: what the capturing stream and the streams joined to it by events are given becomes a graph.

use std::collections::{BTreeSet, HashMap};

use super::super::DeviceError;
use super::super::check::Random;
use super::work::Work;

/// Nodes that come last in a stream: what is given to it next runs after them.
type Frontier = BTreeSet<usize>;

/// Work that runs after other work.
#[derive(Clone, Debug)]
struct Node {
    work: Work,
    after: Vec<usize>,
}

/// A finished capture.
#[derive(Clone, Debug, Default)]
pub(super) struct Recording {
    nodes: Vec<Node>,
}

impl Recording {
    pub(super) const fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// The work in an order that the graph allows: a random one, or that of the capture.
    pub(super) fn order(&self, random: Option<&mut Random>) -> Vec<&Work> {
        let Some(random) = random else { return self.nodes.iter().map(|node| &node.work).collect() };
        let mut waiting: Vec<usize> = self.nodes.iter().map(|node| node.after.len()).collect();
        let mut followers = vec![Vec::new(); self.nodes.len()];
        for (index, node) in self.nodes.iter().enumerate() {
            node.after.iter().for_each(|&before| followers[before].push(index));
        }
        let mut ready: Vec<usize> = (0..self.nodes.len()).filter(|&node| waiting[node] == 0).collect();
        let mut order = Vec::with_capacity(self.nodes.len());
        while !ready.is_empty() {
            let node = ready.swap_remove(random.below(ready.len()));
            order.push(&self.nodes[node].work);
            for &follower in &followers[node] {
                waiting[follower] -= 1;
                if waiting[follower] == 0 {
                    ready.push(follower);
                }
            }
        }
        order
    }
}

/// A capture under way.
#[derive(Debug)]
pub(super) struct Capture {
    origin: usize,
    streams: HashMap<usize, Frontier>,
    events: HashMap<usize, Frontier>,
    recording: Recording,
    /// What the host did that a capture does not allow.
    broken: Option<String>,
}

impl Capture {
    pub(super) fn begin(origin: usize) -> Self {
        Self {
            origin,
            streams: HashMap::from([(origin, Frontier::new())]),
            events: HashMap::new(),
            recording: Recording::default(),
            broken: None,
        }
    }

    /// Notes that the host did what a capture does not allow: the capture is lost.
    pub(super) fn refuse(&mut self, what: &str) -> DeviceError {
        let text = format!("{what} during a capture");
        self.broken.get_or_insert_with(|| text.clone());
        DeviceError::Emulated(text)
    }

    pub(super) fn push(&mut self, stream: usize, work: Work) -> Result<(), DeviceError> {
        let Some(frontier) = self.streams.get_mut(&stream) else {
            return Err(self.refuse(&format!("work for stream {stream}, which was not joined to the capture")));
        };
        let node = self.recording.nodes.len();
        let after = std::mem::replace(frontier, Frontier::from([node]));
        self.recording.nodes.push(Node { work, after: after.into_iter().collect() });
        Ok(())
    }

    pub(super) fn record(&mut self, event: usize, stream: usize) -> Result<(), DeviceError> {
        let Some(frontier) = self.streams.get(&stream) else {
            return Err(self.refuse(&format!("an event of stream {stream}, which was not joined to the capture")));
        };
        self.events.insert(event, frontier.clone());
        Ok(())
    }

    pub(super) fn wait(&mut self, stream: usize, event: usize) -> Result<(), DeviceError> {
        let Some(frontier) = self.events.get(&event) else {
            return Err(self.refuse("a wait for an event from outside"));
        };
        self.streams.entry(stream).or_default().extend(frontier);
        Ok(())
    }

    /// The graph, and the events that were recorded in it: they mean nothing outside.
    pub(super) fn end(self, stream: usize) -> Result<(Recording, Vec<usize>), DeviceError> {
        let refused = |text: String| Err(DeviceError::Emulated(text));
        if let Some(broken) = self.broken {
            return refused(format!("the capture was lost: {broken}"));
        }
        if stream != self.origin {
            return refused("a capture is ended on the stream that began it".into());
        }
        let mut reached = Frontier::new();
        let mut open: Vec<usize> = self.streams.get(&stream).into_iter().flatten().copied().collect();
        while let Some(node) = open.pop() {
            if reached.insert(node) {
                open.extend(&self.recording.nodes[node].after);
            }
        }
        for (other, frontier) in &self.streams {
            if !frontier.is_subset(&reached) {
                return refused(format!("stream {other} was not joined back before the capture ended"));
            }
        }
        Ok((self.recording, self.events.into_keys().collect()))
    }
}
