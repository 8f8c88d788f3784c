//! Lists for people: part of a name, sorted by what they ask for, from any place on.

use std::cmp::Reverse;
use std::sync::Arc;

use super::names::Entry;
use super::{AdapterView, Registry};
use crate::engine::{EngineStatus, Tier};

/// What a list is sorted by. Equal ones are sorted by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RankBy {
    /// (namespace, name).
    #[default]
    Name,
    /// In the order of a life.
    State,
    /// Largest rank.
    Rank,
    /// Bytes in host memory.
    Bytes,
    /// Disk, host, device.
    Residency,
    /// Sequences that run or wait.
    Sequences,
    /// Time of the last request.
    LastUsed,
}

impl RankBy {
    /// All, as the API spells them.
    pub const ALL: [(&'static str, Self); 7] = [
        ("name", Self::Name),
        ("state", Self::State),
        ("rank", Self::Rank),
        ("bytes", Self::Bytes),
        ("residency", Self::Residency),
        ("sequences", Self::Sequences),
        ("last_used", Self::LastUsed),
    ];

    /// The one called `name`.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(known, _)| *known == name).map(|(_, by)| by)
    }

    fn key(self, entry: &Entry, status: &EngineStatus) -> u64 {
        let facts = entry.current.as_ref().map(|version| &*version.facts);
        let engine = facts.and_then(|facts| status.contents.get(&facts.content));
        match self {
            Self::Name => 0,
            Self::State => entry.state() as u64,
            Self::Rank => facts.map_or(0, |facts| u64::from(facts.ranks.1)),
            Self::Bytes => facts.map_or(0, |facts| facts.host_bytes),
            Self::Residency => facts.map_or(0, |_| 1 + engine.map_or(Tier::Disk, |engine| engine.tier) as u64),
            Self::Sequences => engine.map_or(0, |engine| u64::from(engine.running) + u64::from(engine.waiting)),
            Self::LastUsed => entry.last_used,
        }
    }
}

/// Which adapters, in which order, from where.
#[derive(Clone, Debug, Default)]
pub struct RankedFilter {
    /// One namespace only.
    pub namespace: Option<String>,
    /// One state only.
    pub state: Option<super::AdapterState>,
    /// Names that have this in them, whatever its case (ASCII).
    pub contains: String,
    /// What counts.
    pub by: RankBy,
    /// Largest first.
    pub descending: bool,
    /// How many to leave out.
    pub offset: usize,
    /// How many to list.
    pub limit: usize,
}

impl Registry {
    /// A page of registered adapters, and how many there are in all pages. Looks at every name, makes objects of a page only.
    pub fn ranked(&self, filter: &RankedFilter) -> (Vec<AdapterView>, usize) {
        let status = self.inner.engine.status();
        let names = self.names();
        let wanted = filter.contains.to_ascii_lowercase();
        let mut found: Vec<(u64, &Arc<str>, &Arc<str>, &Entry)> = Vec::new();
        for space in names.namespaces() {
            if filter.namespace.as_deref().is_some_and(|only| only != &**space) {
                continue;
            }
            let all = names.of(space, None);
            let fits = |(name, entry): &(&Arc<str>, &Entry)| {
                filter.state.is_none_or(|state| state == entry.state())
                    && (wanted.is_empty() || name.to_ascii_lowercase().contains(&wanted))
            };
            found.extend(all.filter(fits).map(|(name, entry)| (filter.by.key(entry, &status), space, name, entry)));
        }
        match (filter.by, filter.descending) {
            (RankBy::Name, false) => {} // as they come
            (RankBy::Name, true) => found.reverse(),
            (_, false) => found.sort_by_key(|(key, ..)| *key),
            (_, true) => found.sort_by_key(|(key, ..)| Reverse(*key)),
        }
        let page = found.iter().skip(filter.offset).take(filter.limit);
        let views = page.map(|(_, space, name, entry)| self.view(space, name, entry, &status)).collect();
        (views, found.len())
    }
}
