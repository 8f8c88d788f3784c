//! What the shard was asked for beside steps, in order, and who waits for the answer.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use loramux_proto::{MergeAdapters, PrepareAdapter, merge_adapters, to_shard};
use tokio::sync::oneshot;

use super::adapters::{AdapterCheck, AdapterFailure, MajoritySign, MergeAsk, MergeStrategy, PreparedAdapter};
use super::types::ContentId;

/// Asked of one shard at a time. More wait here, in order, so that no number of them can flood it.
const SENT_MAX: usize = 256;
/// Shards that may die while something was asked of them, before it is given up: a file that kills its reader must not kill
/// one shard after another.
const DEATHS_MAX: u32 = 3;

pub(super) type Reply<T> = oneshot::Sender<Result<T, AdapterFailure>>;

/// One question.
pub(super) enum Ask {
    Prepare {
        dir: PathBuf,
        reply: Option<Reply<PreparedAdapter>>,
        /// Set when a content that was here before is brought back: nothing else may come out of the directory.
        expected: Option<ContentId>,
    },
    Check {
        dir: PathBuf,
        reply: Reply<AdapterCheck>,
    },
    Merge {
        ask: MergeAsk,
        reply: Reply<()>,
    },
}

impl Ask {
    pub(super) fn fail(self, failure: AdapterFailure) {
        // Whoever does not listen any more left.
        match self {
            Self::Prepare { reply: Some(reply), .. } => drop(reply.send(Err(failure))),
            Self::Prepare { reply: None, .. } => {}
            Self::Check { reply, .. } => drop(reply.send(Err(failure))),
            Self::Merge { reply, .. } => drop(reply.send(Err(failure))),
        }
    }

    /// On the wire.
    fn body(&self, request_id: u64, rank_max: u32) -> to_shard::Body {
        let text = |dir: &Path| dir.to_string_lossy().into_owned();
        match self {
            Self::Prepare { dir, .. } | Self::Check { dir, .. } => {
                let check_only = matches!(self, Self::Check { .. });
                to_shard::Body::Prepare(PrepareAdapter { request_id, dir: text(dir), rank_max, check_only })
            }
            Self::Merge { ask, .. } => {
                use merge_adapters::Strategy;
                let strategy = match ask.strategy {
                    MergeStrategy::Linear => Strategy::Linear,
                    MergeStrategy::Ties => Strategy::Ties,
                    MergeStrategy::DareLinear => Strategy::DareLinear,
                    MergeStrategy::DareTies => Strategy::DareTies,
                };
                to_shard::Body::Merge(MergeAdapters {
                    request_id,
                    dirs: ask.dirs.iter().map(|dir| text(dir)).collect(),
                    weights: ask.weights.clone(),
                    strategy: strategy.into(),
                    density: ask.density,
                    sign_by_frequency: ask.majority_sign == MajoritySign::Frequency,
                    seed: ask.seed,
                    out_dir: text(&ask.out_dir),
                    rank_max,
                })
            }
        }
    }
}

struct Open {
    ask: Ask,
    is_sent: bool,
    deaths: u32,
}

/// Everything that was asked and not answered.
#[derive(Default)]
pub(super) struct Asks {
    open: BTreeMap<u64, Open>,
    unsent: VecDeque<u64>,
    sent: usize,
    last: u64,
}

impl Asks {
    pub(super) fn push(&mut self, ask: Ask) {
        self.last += 1;
        // Requests that run or wait need what is brought back; nobody's first use of an adapter goes before it.
        match &ask {
            Ask::Prepare { expected: Some(_), .. } => self.unsent.push_front(self.last),
            _ => self.unsent.push_back(self.last),
        }
        self.open.insert(self.last, Open { ask, is_sent: false, deaths: 0 });
    }

    /// The last one pushed so far.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// The oldest that is open, or the next one to come.
    pub(super) fn oldest(&self) -> u64 {
        self.open.first_key_value().map_or(self.last + 1, |(id, _)| *id)
    }

    /// The next message for the shard, if it may have one.
    pub(super) fn next(&mut self, rank_max: u32) -> Option<to_shard::Body> {
        if self.sent >= SENT_MAX {
            return None;
        }
        let id = self.unsent.pop_front()?;
        let open = self.open.get_mut(&id)?;
        open.is_sent = true;
        self.sent += 1;
        Some(open.ask.body(id, rank_max))
    }

    /// The shard answered.
    pub(super) fn answered(&mut self, id: u64) -> Option<Ask> {
        let open = self.open.remove(&id)?;
        self.sent -= usize::from(open.is_sent);
        Some(open.ask)
    }

    /// The shard died: all is asked again of the next one, but for contents that are brought back (the engine decides
    /// anew) and what is given up. Returns the latter.
    pub(super) fn shard_lost(&mut self) -> Vec<Ask> {
        self.open.retain(|_, open| !matches!(open.ask, Ask::Prepare { expected: Some(_), .. }));
        for open in self.open.values_mut() {
            open.deaths += u32::from(open.is_sent);
            open.is_sent = false;
        }
        self.sent = 0;
        let fatal: Vec<u64> = self.open.iter().filter(|(_, o)| o.deaths >= DEATHS_MAX).map(|(id, _)| *id).collect();
        let given_up = fatal.into_iter().filter_map(|id| self.open.remove(&id)).map(|open| open.ask).collect();
        self.unsent = self.open.keys().copied().collect();
        given_up
    }
}
