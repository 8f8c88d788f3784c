//! What the registry is asked and what it answers. Plain data.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use super::contents::{From, Wanted};
use crate::adapters::{AdapterRef, Credential, Origin, SourceKind};
use crate::engine::{ForgetMode, MajoritySign, MergeStrategy, PreparedAdapter};

/// How long a request waits for an adapter that is not prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// At most this long; then `adapter_loading` or `adapter_load_failed`.
    Until(Duration),
    /// Not at all; the load goes on.
    Fail,
}

/// What a request says about the adapter it wants.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Alias, registered name, bare name or reference.
    pub name: &'a str,
    /// `adapter_source`: a registered name counts only if it comes from there, and a bare name is looked for there.
    pub source: Option<SourceKind>,
    /// How long to wait for bytes.
    pub wait: Wait,
    /// The caller's own upstream token. Used for dynamic references only; never kept, never logged.
    pub token: Option<&'a SecretString>,
    /// What an alias that is sticky by user goes by.
    pub sticky: Option<&'a str>,
}

impl<'a> Ask<'a> {
    /// `name` with nothing else said.
    pub fn plain(name: &'a str, wait: Wait) -> Self {
        Self { name, source: None, wait, token: None, sticky: None }
    }
}

/// An adapter that can be used now. While a clone of it lives, the engine keeps its content known and the disk keeps its
/// files: a request holds it until its last token.
#[derive(Clone, Debug)]
pub struct ResolvedAdapter {
    /// The name that was asked for; with an alias, the name the alias chose.
    pub name: String,
    /// What the shard read.
    pub prepared: Arc<PreparedAdapter>,
    /// Where it came from.
    pub source: SourceKind,
    /// Commit, entity tag or time of the files: `x-adapter-revision`.
    pub revision: Arc<str>,
    /// Scale of the registration, multiplied into the request's; 1 for everything else.
    pub scale: f32,
    /// Keeps content and files.
    #[expect(dead_code, reason = "held, never read")]
    pub(super) hold: Hold,
    /// How to load it again.
    pub(super) wanted: Arc<Wanted>,
}

impl ResolvedAdapter {
    /// The exact files it was read from, and the folder of this machine where they lie; `None` for what was downloaded.
    pub fn local_files(&self) -> Option<(&str, &Path)> {
        match &self.wanted.from {
            From::Source(resolved) => match &resolved.origin {
                Origin::Directory(dir) => Some((&self.wanted.identity, dir)),
                Origin::Remote(_) => None,
            },
            From::Merge(_) => None,
        }
    }
}

/// Keeps something alive without saying what.
#[derive(Clone)]
pub(super) struct Hold(#[expect(dead_code, reason = "dropped, never read")] Vec<Arc<dyn Any + Send + Sync>>);

impl Hold {
    pub(super) fn of(parts: Vec<Arc<dyn Any + Send + Sync>>) -> Self {
        Self(parts)
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hold")
    }
}

/// What `/v1/models` shows of an adapter.
#[derive(Clone, Debug)]
pub struct AdapterCard {
    /// Its name.
    pub name: String,
    /// Its reference as printed: no secret, no query string.
    pub root: String,
    /// Unix seconds at which it was first usable.
    pub created: u64,
    /// What the shard read.
    pub prepared: Arc<PreparedAdapter>,
}

/// Where an adapter is in its life (reliability.md section 4). Where its bytes are is no state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterState {
    /// Known, not asked for yet.
    Registered,
    /// Its source is asked what the reference stands for.
    Resolving,
    /// Its bytes are on their way.
    Fetching,
    /// Its bytes are compared with the hashes the source promised.
    Verifying,
    /// The shard reads it.
    Preparing,
    /// Usable.
    Ready,
    /// Its name is gone; requests that run under it finish.
    Draining,
    /// The last attempt failed.
    Failed,
}

impl AdapterState {
    /// All, in the order of a life.
    pub const ALL: [Self; 8] = [
        Self::Registered,
        Self::Resolving,
        Self::Fetching,
        Self::Verifying,
        Self::Preparing,
        Self::Ready,
        Self::Draining,
        Self::Failed,
    ];

    /// As the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Registered => "registered",
            Self::Resolving => "resolving",
            Self::Fetching => "fetching",
            Self::Verifying => "verifying",
            Self::Preparing => "preparing",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Failed => "failed",
        }
    }

    /// The state called `name`.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }
}

/// Registers a name, or gives a registered one new content.
#[derive(Clone, Debug)]
pub struct LoadAsk {
    /// Valid by [`crate::adapters::is_valid_name`].
    pub name: String,
    /// `` = shared by all callers.
    pub namespace: String,
    /// What the name stands for.
    pub reference: AdapterRef,
    /// Multiplies alpha / r of every request; `None` = 1, or as registered.
    pub scale: Option<f32>,
    /// Keep it in host memory, and count it for readiness after the next start; `None` = no, or as registered.
    pub pinned: Option<bool>,
    /// A name that has other content already gets the new one; otherwise that is `adapter_exists`.
    pub in_place: bool,
    /// Go on only if the name's content starts with these hex digits (`` = only if the name is not registered).
    pub if_content_id: Option<String>,
    /// Go on only if the name's generation is this one.
    pub if_generation: Option<u64>,
    /// How long to wait for the outcome. The load goes on beyond it.
    pub wait: Wait,
    /// In whose name the source is asked. [`Credential::Token`] stays in memory: after a restart it is needed again.
    pub credential: Credential,
    /// A name whose first load fails stays registered, with its error (our admin API); otherwise it goes (vLLM's routes).
    pub keep: bool,
}

impl LoadAsk {
    /// A shared name, loaded in the server's name, that must be new.
    pub fn new(name: impl Into<String>, reference: AdapterRef, wait: Wait) -> Self {
        Self {
            name: name.into(),
            namespace: String::new(),
            reference,
            scale: None,
            pinned: None,
            in_place: false,
            if_content_id: None,
            if_generation: None,
            wait,
            credential: Credential::Server,
            keep: false,
        }
    }
}

/// Takes a name away.
#[derive(Clone, Debug)]
pub struct UnloadAsk {
    /// The name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// What happens to requests that run.
    pub mode: ForgetMode,
    /// Also delete the disk copy when no other name has its content.
    pub purge: bool,
}

/// The Adapter object of the admin API.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterView {
    /// Its name.
    pub name: String,
    /// `` = shared.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// The reference as printed.
    #[serde(rename = "ref")]
    pub reference: String,
    /// Where it comes from.
    pub source: SourceKind,
    /// Counts up with every change of the name's content.
    pub generation: u64,
    /// What serves now, or what is being loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// 64 hex digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_id: Option<String>,
    /// Of what serves now, if anything does; else of what is being loaded.
    pub state: AdapterState,
    /// State of the content that will take the place of what serves now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<NextView>,
    /// `disk`, `host` or `device`, while ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residency: Option<&'static str>,
    /// Never evicted from host memory or the device.
    pub pinned: bool,
    /// Where it is pinned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin: Option<&'static str>,
    /// Multiplied into every request's scale.
    pub scale: f32,
    /// Unix seconds of the registration.
    pub created: u64,
    /// Smallest rank over its modules.
    pub rank_min: u32,
    /// Largest rank.
    pub rank_max: u32,
    /// Bytes in host memory.
    pub bytes: u64,
    /// Arena pages while on the device.
    pub pages: u32,
    /// Sequences that run under it.
    pub running: u32,
    /// Sequences that wait.
    pub waiting: u32,
    /// Unix seconds of the last request; absent = never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_used: Option<u64>,
    /// How long the last successful load took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loaded_ms: Option<u64>,
    /// The last failed attempt, until one succeeds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorView>,
    /// Loaded with a credential of its own, which is never written: after a restart it is needed again.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub own_credential: bool,
}

/// See [`AdapterView::next`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NextView {
    /// Its reference as printed.
    #[serde(rename = "ref")]
    pub reference: String,
    /// How far it is.
    pub state: AdapterState,
    /// Bytes downloaded.
    pub bytes_done: u64,
    /// Bytes to download; 0 = not known yet.
    pub bytes_total: u64,
}

/// See [`AdapterView::error`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ErrorView {
    /// The API's code.
    pub code: String,
    /// What was found, what is accepted, what to change.
    pub message: String,
    /// It may go away by itself.
    pub retryable: bool,
    /// Unix seconds of the next try, if there will be one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_try: Option<u64>,
}

/// Which adapters to list.
#[derive(Clone, Debug, Default)]
pub struct ListFilter {
    /// One namespace only.
    pub namespace: Option<String>,
    /// One state only.
    pub state: Option<AdapterState>,
    /// Names that start so.
    pub prefix: Option<String>,
    /// 0 = 100; at most 1000.
    pub limit: usize,
    /// `next` of the page before.
    pub after: Option<String>,
}

/// How a caller gets the same version of an alias again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StickyBy {
    /// By the key's name.
    Key,
    /// By the request's `user`.
    User,
    /// Each request draws anew.
    #[default]
    None,
}

/// One version of an alias.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weighted {
    /// A registered name of the alias's namespace, or a shared one.
    pub adapter: String,
    /// Above 0; the sum is free.
    pub weight: f64,
}

/// The Alias object of the admin API.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AliasView {
    /// Its name.
    pub name: String,
    /// `` = shared.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Counts up with every change, 1 at first.
    pub version: u64,
    /// What it stands for.
    pub versions: Vec<Weighted>,
    /// Who gets the same again.
    pub sticky_by: StickyBy,
}

/// Makes or changes an alias.
#[derive(Clone, Debug)]
pub struct AliasAsk {
    /// Valid by [`crate::adapters::is_valid_name`].
    pub name: String,
    /// `` = shared.
    pub namespace: String,
    /// 1..=16 versions.
    pub versions: Vec<Weighted>,
    /// Who gets the same again.
    pub sticky_by: StickyBy,
    /// Go on only if the alias has this version (0 = only if it does not exist).
    pub expected_version: Option<u64>,
}

/// How several adapters become one (`merged_adapters` of LoRAX).
#[derive(Clone, Debug, PartialEq)]
pub struct MergeSpec {
    /// What is merged: names or references, 1..=8.
    pub ids: Vec<String>,
    /// One for each.
    pub weights: Vec<f64>,
    /// How.
    pub strategy: MergeStrategy,
    /// (0, 1]; every strategy but linear needs it.
    pub density: Option<f64>,
    /// For TIES and DARE-TIES.
    pub sign: MajoritySign,
}
