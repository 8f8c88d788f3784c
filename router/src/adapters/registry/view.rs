//! What people and metrics see of the registry.

use super::names::Entry;
use super::*;
use crate::adapters::StoreStatus;
use crate::engine::{ContentStatus, EngineStatus, PinLevel, PreparedAdapter, Tier};
use crate::metrics::LoadTimes;

/// Entries of a page unless the caller says otherwise, and at most.
const PAGE: usize = 100;
const PAGE_MAX: usize = 1000;

pub(super) fn hex(content: &ContentId) -> String {
    content.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Registry {
    /// One registered adapter.
    pub fn get(&self, namespace: &str, name: &str) -> Option<AdapterView> {
        let status = self.inner.engine.status();
        let names = self.names();
        names.get(namespace, name).map(|entry| self.view(namespace, name, entry, &status))
    }

    /// One page of registered adapters by (namespace, name), and what `after` has to be for the next one.
    pub fn list(&self, filter: &ListFilter) -> (Vec<AdapterView>, Option<String>) {
        let limit = if filter.limit == 0 { PAGE } else { filter.limit.min(PAGE_MAX) };
        let after = filter.after.as_deref().map(|after| after.split_once('\n').unwrap_or(("", after)));
        let prefix = filter.prefix.as_deref().unwrap_or("");
        let status = self.inner.engine.status();
        let names = self.names();
        let mut page = Vec::new();
        for space in names.namespaces() {
            if filter.namespace.as_deref().is_some_and(|only| only != &**space)
                || after.is_some_and(|(last, _)| &**space < last)
            {
                continue;
            }
            let from = after.filter(|(last, _)| *last == &**space).map(|(_, name)| name);
            for (name, entry) in names.of(space, from).filter(|(name, _)| name.starts_with(prefix)) {
                if filter.state.is_some_and(|state| state != entry.state()) {
                    continue;
                }
                if page.len() == limit {
                    let next = page.last().map(|last: &AdapterView| match last.namespace.as_str() {
                        "" => last.name.clone(),
                        space => format!("{space}\n{}", last.name),
                    });
                    return (page, next);
                }
                page.push(self.view(space, name, entry, &status));
            }
        }
        (page, None)
    }

    pub(super) fn view(&self, namespace: &str, name: &str, entry: &Entry, status: &EngineStatus) -> AdapterView {
        let clock = &self.inner.clock;
        let facts = entry.current.as_ref().map(|version| &*version.facts);
        let engine: Option<&ContentStatus> = facts.and_then(|facts| status.contents.get(&facts.content));
        let tier = engine.map_or(Tier::Disk, |engine| engine.tier);
        let number = |pick: fn(&PreparedAdapter) -> u32| facts.map_or(0, pick);
        let next = entry.next.as_ref().map(|next| {
            let (bytes_done, bytes_total) = next.stage.bytes();
            NextView { reference: next.reference.to_string(), state: next.stage.state(), bytes_done, bytes_total }
        });
        let error = entry.error.as_ref().map(|noted| ErrorView {
            code: noted.failure.code.clone(),
            message: noted.failure.for_operators().to_owned(),
            retryable: crate::adapters::life::is_retryable(&noted.failure.code),
            next_try: noted.next_try.map(|at| clock.unix_seconds() + at.saturating_sub(clock.now()).as_secs()),
        });
        AdapterView {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            reference: entry.reference.to_string(),
            source: entry.reference.source,
            generation: entry.generation,
            revision: entry.current.as_ref().map(|version| version.revision.to_string()),
            content_id: entry.content().map(|content| hex(&content)),
            state: entry.state(),
            next,
            residency: facts.map(|_| tier.name()),
            pinned: entry.pin.is_some(),
            pin: entry.pin.map(|level| match level {
                PinLevel::Host => "host",
                PinLevel::Device => "device",
            }),
            scale: entry.scale,
            created: entry.created,
            rank_min: number(|facts| facts.ranks.0),
            rank_max: number(|facts| facts.ranks.1),
            bytes: facts.map_or(0, |facts| facts.host_bytes),
            pages: number(|facts| facts.pages_needed),
            running: engine.map_or(0, |engine| engine.running),
            waiting: engine.map_or(0, |engine| engine.waiting),
            last_used: (entry.last_used > 0).then_some(entry.last_used),
            loaded_ms: entry.loaded_ms,
            error,
            own_credential: entry.own_credential,
        }
    }

    /// Adapters and aliases this caller may use and that can serve, by name, and a version that changes when any such
    /// list does.
    pub fn cards(&self, caller: &Caller) -> (u64, Vec<AdapterCard>) {
        let names = self.names();
        let mut cards = Vec::new();
        let spaces = if caller.namespace.is_empty() { vec![""] } else { vec![&*caller.namespace, ""] };
        for space in &spaces {
            let aliases = names.aliases().filter(|(of, ..)| &***of == *space).map(|(_, name, _)| name);
            let all = names.of(space, None).map(|(name, _)| name).chain(aliases);
            cards.extend(all.filter_map(|name| self.card_of(&names, caller, name)));
        }
        cards.sort_by(|a, b| a.name.cmp(&b.name));
        cards.dedup_by(|a, b| a.name == b.name);
        (names.version(), cards)
    }

    /// The card of one name, if this caller may use it and it can serve.
    pub fn card(&self, caller: &Caller, name: &str) -> Option<AdapterCard> {
        self.card_of(&self.names(), caller, name)
    }

    fn card_of(&self, names: &names::Names, caller: &Caller, name: &str) -> Option<AdapterCard> {
        if !caller.may_use_adapter(name) {
            return None;
        }
        let own = names.alias(&caller.namespace, name).map(|alias| (&*caller.namespace, alias));
        let alias = own.or_else(|| names.alias("", name).map(|alias| ("", alias)));
        let (space, target) = match alias {
            Some((space, alias)) => (space, alias.set.versions.first()?.adapter.as_str()),
            None => (&*caller.namespace, name),
        };
        let (_, entry) = names.meant(space, target)?;
        let version = entry.current.as_ref()?;
        Some(AdapterCard {
            name: name.to_owned(),
            root: entry.reference.to_string(),
            created: entry.created,
            prepared: Arc::clone(&version.facts),
        })
    }

    /// Changes when [`Self::cards`] would, for any caller.
    pub fn version(&self) -> u64 {
        self.names().version()
    }

    /// Names whose content is in `contents`, in that order, each content once. What has no name is shown by its content
    /// id: what a caller resolves dynamically is the caller's business.
    pub fn names_of(&self, contents: &[ContentId]) -> Vec<String> {
        let names = self.names();
        let shown = |id: &ContentId| names.name_of(id).map_or_else(|| id.short(), ToString::to_string);
        contents.iter().map(shown).collect()
    }

    /// (namespace, name) of each content as operators see it; `None` for what callers name by reference.
    pub fn keys_of<'a>(&self, contents: impl IntoIterator<Item = &'a ContentId>) -> Vec<Option<(String, String)>> {
        let names = self.names();
        let key = |id| names.key_of(id).map(|(space, name)| (space.to_string(), name.to_string()));
        contents.into_iter().map(key).collect()
    }

    /// How full the disk store is, if this server has one.
    pub fn disk_status(&self) -> Option<StoreStatus> {
        self.inner.supply.as_ref().and_then(|supply| supply.files.disk_status())
    }

    /// True if `--allow-adapters` has this reference, in any of its spellings.
    pub fn may_be_named(&self, reference: &AdapterRef) -> bool {
        let allowed = self.inner.settings.allowed.as_ref();
        allowed.is_none_or(|globs| globs.is_match(reference.to_string()) || globs.is_match(&reference.locator))
    }

    /// True for a name that every caller may know: a registered one of the shared namespace.
    pub fn is_shared_name(&self, name: &str) -> bool {
        self.names().get("", name).is_some()
    }

    /// True if `--adapter` made this entry of the namespace.
    pub fn is_by_flag(&self, namespace: &str, name: &str) -> bool {
        self.names().get(namespace, name).is_some_and(|entry| entry.made == names::Made::Flag)
    }

    /// How many adapters are in each state, attempts for callers' references included.
    pub fn states(&self) -> [(AdapterState, usize); 8] {
        let running = self.inner.contents.running();
        let names = self.names();
        AdapterState::ALL.map(|state| {
            let n = match state {
                AdapterState::Registered | AdapterState::Ready | AdapterState::Failed => names.count(state),
                // A name's load is counted here until its content's attempt runs.
                AdapterState::Resolving => names.count(state).saturating_sub(running.len()),
                _ => running.iter().filter(|running| **running == state).count(),
            };
            (state, n)
        })
    }

    /// Failed attempts by code.
    pub fn failures(&self) -> Vec<(String, u64)> {
        let mut by_code = std::collections::BTreeMap::<String, u64>::new();
        for (_, code, n) in self.inner.contents.failures() {
            *by_code.entry(code).or_default() += n;
        }
        by_code.into_iter().collect()
    }

    /// How long loads took.
    pub fn load_times(&self) -> &LoadTimes {
        self.inner.contents.times()
    }

    /// Failed attempts by source and code.
    pub fn failures_by_source(&self) -> Vec<(SourceKind, String, u64)> {
        self.inner.contents.failures()
    }
}
