//! The shard as the engine sees it: something that takes messages and reports back. A child process behind a Unix socket
//! and a thread of this process are the same thing here.

use std::sync::mpsc::Sender;

use loramux_proto::{FromShard, ToShard};

use super::run::Message;

/// A running shard. Everything it answers arrives through the [`Reports`] it was launched with.
pub trait Shard: Send {
    /// Hands over one message; returns before it is executed.
    ///
    /// # Errors
    /// [`ShardGone`] when the shard cannot take messages any more; its exit is reported by [`Reports::gone`] too.
    fn send(&mut self, message: ToShard) -> Result<(), ShardGone>;
    /// Ends it at once, whatever it is doing. A shard that cannot be ended (a thread) is cut off: later reports are lost.
    fn kill(&mut self);
}

/// Starts shards, one after another.
pub trait ShardLauncher: Send {
    /// Starts one and returns before its weights are loaded; [`loramux_proto::Info`] is its first word when it is ready.
    ///
    /// # Errors
    /// A message for people when it could not even be started.
    fn launch(&mut self, reports: Reports) -> Result<Box<dyn Shard>, String>;
}

/// The shard does not take messages any more.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the shard is gone")]
pub struct ShardGone;

/// How a shard ended.
#[derive(Clone, Debug)]
pub struct ShardExit {
    /// For the log.
    pub reason: String,
    /// It was killed by a signal that no program raises on itself (SIGKILL): an operator, or the kernel short of memory.
    /// The work it was doing is then a weaker suspect than after a crash.
    pub killed_from_outside: bool,
}

/// Where one incarnation of the shard reports to. Reports of an earlier incarnation are dropped by the engine.
#[derive(Clone)]
pub struct Reports {
    pub(super) incarnation: u64,
    pub(super) inbox: Sender<Message>,
}

impl Reports {
    /// One message of the shard.
    pub fn message(&self, message: FromShard) {
        // A send fails only when the engine has ended, and then nobody is left to be told.
        let _ = self.inbox.send(Message::Shard { incarnation: self.incarnation, message: Box::new(message) });
    }

    /// The shard's end; nothing may follow.
    pub fn gone(&self, exit: ShardExit) {
        let _ = self.inbox.send(Message::ShardGone { incarnation: self.incarnation, exit });
    }
}
