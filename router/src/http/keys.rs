//! The keys a server accepts: where they are read from, how they are kept, how one is looked up.
//!
//! A key is kept as its SHA-256 alone. It is looked up by that hash, so how long a look-up takes depends on the hash of a
//! guess, which says nothing about any other key; the hit is then compared in constant time.

use std::collections::HashMap;
use std::sync::Arc;

use globset::{Glob, GlobSet, GlobSetBuilder};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::rate::Meter;
use crate::access::{Caller, KeyPolicy};
use crate::adapters::SourceKind;

/// Globs of one key.
const GLOBS_MAX: usize = 1024;
/// Bytes of a namespace.
const NAMESPACE_BYTES_MAX: usize = 128;

/// One accepted key.
#[derive(Clone, Debug)]
pub struct KeySpec {
    /// What logs and lists call it.
    pub name: String,
    /// SHA-256 of the key.
    pub hash: [u8; 32],
    /// Where its adapters and aliases live; empty = shared.
    pub namespace: String,
    /// What it allows.
    pub policy: KeyPolicy,
    /// An admin key: opens the admin API and the routes that load adapters, and nothing else.
    pub is_admin: bool,
}

impl KeySpec {
    /// A key of `--api-key`: everything but administration.
    pub fn plain(key: &SecretString) -> Self {
        let hash = hash_of(key.expose_secret().as_bytes());
        let name = format!("key-{}", hex(hash.get(..4).unwrap_or_default()));
        Self { name, hash, namespace: String::new(), policy: KeyPolicy::default(), is_admin: false }
    }

    /// A key of `--admin-key`.
    pub fn admin(key: &SecretString) -> Self {
        Self { is_admin: true, ..Self::plain(key) }
    }
}

/// What is wrong with a file of keys. Never repeats its content: a line may be a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KeysError(String);

/// Reads a file with one key a line; empty lines and lines that start with `#` are skipped.
pub fn keys_of_lines(text: &str) -> Vec<SecretString> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(SecretString::from).collect()
}

/// Reads `--keys-file`: a list of `[[keys]]`.
///
/// # Errors
/// Not TOML, an unknown field, a bad value, a name or a hash twice.
pub fn keys_of_toml(text: &str) -> Result<Vec<KeySpec>, KeysError> {
    let file: KeysFile = toml::from_str(text).map_err(|error: toml::de::Error| {
        let line = error.span().and_then(|span| text.get(..span.start)).map_or(1, |front| front.lines().count().max(1));
        KeysError(format!("line {line}: {}", error.message()))
    })?;
    let mut keys: Vec<KeySpec> = Vec::with_capacity(file.keys.len());
    for entry in file.keys {
        let at = |what: &str| KeysError(format!("key `{}`: {what}", super::error::cut(&entry.name)));
        let key = entry.spec().map_err(|what| at(&what))?;
        if keys.iter().any(|other| other.name == key.name) {
            return Err(at("another key has this name"));
        }
        if keys.iter().any(|other| other.hash == key.hash) {
            return Err(at("another key has this sha256"));
        }
        keys.push(key);
    }
    Ok(keys)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeysFile {
    #[serde(default)]
    keys: Vec<KeyEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyEntry {
    name: String,
    sha256: String,
    #[serde(default)]
    namespace: String,
    adapters: Option<Vec<String>>,
    sources: Option<Vec<SourceKind>>,
    max_concurrent: Option<u32>,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u64>,
    disk_quota: Option<Bytes>,
    weight: Option<u32>,
    #[serde(default)]
    admin: bool,
}

/// `1073741824` or `"1GiB"`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Bytes {
    Number(u64),
    Text(String),
}

impl KeyEntry {
    fn spec(&self) -> Result<KeySpec, String> {
        let printable =
            |text: &str| !text.is_empty() && text.len() <= 128 && text.bytes().all(|b| b.is_ascii_graphic());
        if !printable(&self.name) {
            return Err("`name` must be 1..128 visible ASCII characters".into());
        }
        let hash = unhex(&self.sha256).ok_or("`sha256` must be the 64 hex digits of the key's SHA-256")?;
        if !is_namespace(&self.namespace) {
            return Err("`namespace` must be letters, digits, `.`, `_`, `-`, and start with a letter or digit".into());
        }
        let positive = [
            ("max_concurrent", self.max_concurrent.map(u64::from)),
            ("requests_per_minute", self.requests_per_minute.map(u64::from)),
            ("tokens_per_minute", self.tokens_per_minute),
            ("weight", self.weight.map(u64::from)),
        ];
        if let Some((field, _)) = positive.iter().find(|(_, value)| *value == Some(0)) {
            return Err(format!("`{field}` must be at least 1; leave it out for no limit"));
        }
        let policy = KeyPolicy {
            adapters: self.adapters.as_deref().map(glob_set).transpose()?,
            sources: self.sources.clone(),
            concurrent_max: self.max_concurrent,
            requests_per_minute: self.requests_per_minute,
            tokens_per_minute: self.tokens_per_minute,
            disk_bytes_max: self.disk_quota.as_ref().map(bytes_of).transpose()?,
            weight: self.weight,
        };
        let (name, namespace) = (self.name.clone(), self.namespace.clone());
        Ok(KeySpec { name, hash, namespace, policy, is_admin: self.admin })
    }
}

/// Empty (shared), or one segment of a name.
pub(crate) fn is_namespace(text: &str) -> bool {
    let inside = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    text.is_empty()
        || (text.len() <= NAMESPACE_BYTES_MAX
            && text.bytes().all(inside)
            && text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
            && !text.contains(".."))
}

/// `*` matches any text, `/` included.
///
/// # Errors
/// Which pattern is wrong.
pub fn glob_set(patterns: &[String]) -> Result<GlobSet, String> {
    if patterns.len() > GLOBS_MAX {
        return Err(format!("{} patterns; at most {GLOBS_MAX} are allowed", patterns.len()));
    }
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        set.add(Glob::new(pattern).map_err(|error| format!("`{pattern}` is no glob: {}", error.kind()))?);
    }
    set.build().map_err(|error| format!("the patterns are too large: {}", error.kind()))
}

fn bytes_of(typed: &Bytes) -> Result<u64, String> {
    let text = match typed {
        Bytes::Number(bytes) => return Ok(*bytes),
        Bytes::Text(text) => text,
    };
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err("`disk_quota` must be bytes, or a size such as \"10GiB\"".into()),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| "`disk_quota` must be bytes, or a size such as \"10GiB\"".into())
}

/// SHA-256.
pub(crate) fn hash_of(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(bytes)
}

/// A key that was found.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    hash: [u8; 32],
    pub(crate) caller: Caller,
    pub(crate) meter: Arc<Meter>,
}

/// All keys of a moment; a reload makes a new ring.
#[derive(Debug, Default)]
pub(crate) struct KeyRing {
    by_hash: HashMap<[u8; 32], Key>,
    /// A key that is no admin key exists or existed: the server is not open.
    pub(crate) has_keys: bool,
    /// An admin key exists.
    pub(crate) has_admin: bool,
}

impl KeyRing {
    /// What a key has used goes on counting over a reload, unless its limits changed.
    pub(crate) fn new(specs: &[KeySpec], before: Option<&Self>) -> Self {
        let mut by_hash: HashMap<[u8; 32], Key> = HashMap::with_capacity(specs.len());
        for spec in specs {
            let tenant = spec.hash.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let caller = Caller {
                tenant,
                name: Arc::from(spec.name.as_str()),
                namespace: Arc::from(spec.namespace.as_str()),
                policy: Arc::new(spec.policy.clone()),
                is_admin: spec.is_admin,
            };
            let old = before.and_then(|ring| ring.by_hash.get(&spec.hash));
            let kept = old.filter(|old| same_limits(&old.caller.policy, &spec.policy));
            let meter = kept.map_or_else(|| Arc::new(Meter::new(&spec.policy)), |old| Arc::clone(&old.meter));
            by_hash.insert(spec.hash, Key { hash: spec.hash, caller, meter });
        }
        // Taking the last key away must not open the door.
        let had_keys = before.is_some_and(|ring| ring.has_keys);
        let has_keys = had_keys || by_hash.values().any(|key| !key.caller.is_admin);
        let has_admin = by_hash.values().any(|key| key.caller.is_admin);
        Self { by_hash, has_keys, has_admin }
    }

    /// The operator set up keys, whatever the files hold at the moment.
    pub(crate) fn requiring(self, requires_key: bool) -> Self {
        Self { has_keys: self.has_keys || requires_key, ..self }
    }

    /// The key behind the text of `Authorization: Bearer`.
    pub(crate) fn find(&self, typed: &[u8]) -> Option<&Key> {
        let hash = hash_of(typed);
        self.by_hash.get(&hash).filter(|key| bool::from(key.hash.as_slice().ct_eq(hash.as_slice())))
    }
}

fn same_limits(a: &KeyPolicy, b: &KeyPolicy) -> bool {
    let limits = |policy: &KeyPolicy| (policy.concurrent_max, policy.requests_per_minute, policy.tokens_per_minute);
    limits(a) == limits(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"; // of `foo`

    #[test]
    fn a_file_of_keys_says_who_may_do_what() {
        let text = format!(
            "[[keys]]\nname = \"acme\"\nsha256 = \"{HASH}\"\nnamespace = \"acme\"\nadapters = [\"sql*\", \"org/*\"]\n\
             sources = [\"hub\", \"s3\"]\nmax_concurrent = 4\nrequests_per_minute = 60\ntokens_per_minute = 1000\n\
             disk_quota = \"2GiB\"\nweight = 2\n[[keys]]\nname = \"root\"\nsha256 = \"{}\"\nadmin = true\n",
            "00".repeat(32)
        );
        let ring = KeyRing::new(&keys_of_toml(&text).unwrap(), None);
        assert!(ring.has_keys && ring.has_admin);
        let caller = &ring.find(b"foo").unwrap().caller;
        assert_eq!((&*caller.name, &*caller.namespace, caller.is_admin), ("acme", "acme", false));
        assert_eq!(caller.policy.disk_bytes_max, Some(2 << 30));
        for (name, may) in [("sql", true), ("sql-2", true), ("org/a", true), ("tone", false), ("SQL", false)] {
            assert_eq!(caller.may_use_adapter(name), may, "{name}");
        }
        assert!(caller.may_use_source(SourceKind::Hub) && !caller.may_use_source(SourceKind::Local));
        assert!(ring.find(b"bar").is_none() && ring.find(b"").is_none());
    }

    #[test]
    fn mistakes_in_a_file_of_keys_are_named_without_its_content() {
        let with = |fields: &str| format!("[[keys]]\nname = \"a\"\nsha256 = \"{HASH}\"\n{fields}\n");
        let secret = "hunter2-hunter2";
        let cases = [
            (format!("[[keys]]\nname = \"a\"\nsha256 = \"{secret}\""), "64 hex"),
            (with(&format!("key = \"{secret}\"")), "line"),
            (with("namespace = \"a/b\""), "namespace"),
            (with("namespace = \"..\""), "namespace"),
            (with("adapters = [\"[\"]"), "no glob"),
            (with("sources = [\"ftp\"]"), "line"),
            (with("max_concurrent = 0"), "max_concurrent"),
            (with("disk_quota = \"lots\""), "disk_quota"),
            (with("disk_quota = \"99999999999TiB\""), "disk_quota"),
            (format!("{}{}", with(""), with("")), "this name"),
            (format!("{}{}", with(""), with("").replace("\"a\"", "\"b\"")), "this sha256"),
            (format!("= {secret}"), "line 1"),
        ];
        for (text, want) in cases {
            let error = keys_of_toml(&text).unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
            assert!(!error.contains(secret), "{error}");
        }
        assert!(keys_of_toml("").unwrap().is_empty());
    }

    #[test]
    fn a_reload_keeps_what_was_used_and_drops_what_is_gone() {
        let key = |limit| {
            let mut key = KeySpec::plain(&SecretString::from("one"));
            key.policy.requests_per_minute = Some(limit);
            key
        };
        let first = KeyRing::new(&[key(1)], None);
        assert!(first.find(b"one").unwrap().meter.admit().is_ok());
        let same = KeyRing::new(&[key(1)], Some(&first));
        assert!(same.find(b"one").unwrap().meter.admit().is_err(), "a reload is no refill");
        let raised = KeyRing::new(&[key(2)], Some(&same));
        assert!(raised.find(b"one").unwrap().meter.admit().is_ok());
        let none = KeyRing::new(&[], Some(&raised));
        assert!(none.find(b"one").is_none() && none.has_keys, "without its last key the server is closed, not open");
        assert!(!KeyRing::new(&[], None).has_keys && KeyRing::new(&[], None).requiring(true).has_keys);
    }

    #[test]
    fn lines_are_keys_and_nothing_shows_them() {
        let keys = keys_of_lines("# ours\n\n  hunter2 \nhunter3\n");
        assert_eq!(keys.len(), 2);
        let spec = KeySpec::plain(&keys[0]);
        assert_eq!(spec.hash, hash_of(b"hunter2"));
        assert!(!format!("{keys:?}{spec:?}").contains("hunter"));
    }
}
