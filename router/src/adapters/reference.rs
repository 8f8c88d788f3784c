//! Text -> [`AdapterRef`] -> text. Everything that a source later puts into a URL, an object key or a path passed here.
//!
//! | text | means |
//! |---|---|
//! | `org/repo[@rev]`, `hf://..`, `huggingface://..` | the hub; `latest` and `main` are the same as no revision |
//! | `s3://bucket/prefix`, `gs://..` = `gcs://..` | object stores |
//! | `https://host/dir`, `http://host/dir` | a directory of a listed host; no user, no query, no fragment |
//! | `/dir`, `file:///dir` | a directory of this machine |
//!
//! What is printed is parsed to the same reference, and two references never print the same.

use std::fmt;

use super::name::is_valid_name;
use super::sources::guard;
use super::types::{AdapterRef, SourceKind};

/// Bytes of a reference as text.
const REF_BYTES_MAX: usize = 1024;
/// Bytes of a revision.
const REVISION_BYTES_MAX: usize = 128;
/// Bytes of an object store's bucket.
const BUCKET_BYTES: std::ops::RangeInclusive<usize> = 3..=63;
/// What is accepted, for messages.
const FORMS: &str = "`org/repo[@revision]`, `hf://`, `s3://`, `gs://`, `https://` or an absolute path";

/// Why a text is no reference. Never repeats the text: it may hold a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RefError {
    /// Longer than any reference.
    #[error("an adapter reference has at most {REF_BYTES_MAX} bytes")]
    TooLong,
    /// None of the known forms.
    #[error("not an adapter reference; accepted are {FORMS}")]
    Form,
    /// The form is known, the rest is wrong.
    #[error("not a {source_name} reference: {reason}")]
    Invalid {
        /// Which source it was meant for.
        source_name: &'static str,
        /// What is wrong, what is accepted.
        reason: &'static str,
    },
    /// `adapter_source` names one source, the reference another.
    #[error("the reference is of source `{found}`, but `adapter_source` is `{asked}`")]
    OtherSource {
        /// The reference's own.
        found: &'static str,
        /// The one asked for.
        asked: &'static str,
    },
    /// `pbase` without a bucket to map it to.
    #[error(
        "`pbase` is not a source of this server; name the object as `s3://bucket/prefix`, or set PREDIBASE_MODEL_BUCKET"
    )]
    Predibase,
}

/// What bare names of object stores mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceDefaults {
    /// Bucket of names without one (PREDIBASE_MODEL_BUCKET).
    pub bucket: Option<String>,
    /// Prefix inside of it (PREDIBASE_MODEL_FOLDER).
    pub folder: Option<String>,
}

impl AdapterRef {
    /// Reads any of the forms above.
    ///
    /// # Errors
    /// [`RefError`], which says what is accepted.
    pub fn parse(text: &str) -> Result<Self, RefError> {
        if text.len() > REF_BYTES_MAX {
            return Err(RefError::TooLong);
        }
        match text.split_once("://") {
            Some(("hf" | "huggingface", rest)) => hub(rest),
            Some(("s3", rest)) => object(SourceKind::S3, rest),
            Some(("gs" | "gcs", rest)) => object(SourceKind::Gcs, rest),
            Some(("https" | "http", _)) => http(text),
            Some(("file", path)) => local(path),
            // What looks like a path is one, never somebody's repository.
            _ if text.starts_with(['/', '.', '~']) => local(text),
            Some(_) => Err(RefError::Form),
            None if text.split('@').next().is_some_and(|id| id.contains('/')) => hub(text),
            None => Err(RefError::Form),
        }
    }

    /// Reads `name` as a name of `source`; full references pass if they are of that source.
    ///
    /// # Errors
    /// [`RefError`], also if `name` is a reference of another source.
    pub fn with_source(name: &str, source: SourceKind, defaults: &SourceDefaults) -> Result<Self, RefError> {
        if name.len() > REF_BYTES_MAX {
            return Err(RefError::TooLong);
        }
        if name.contains("://") || name.starts_with('/') {
            let parsed = Self::parse(name)?;
            return if parsed.source == source {
                Ok(parsed)
            } else {
                Err(RefError::OtherSource { found: parsed.source.name(), asked: source.name() })
            };
        }
        match source {
            SourceKind::Hub => hub(name),
            SourceKind::S3 | SourceKind::Gcs if name.contains('/') => object(source, name),
            SourceKind::S3 => default_object(name, defaults).ok_or(invalid(
                source,
                "a name without a bucket needs PREDIBASE_MODEL_BUCKET; write `bucket/prefix`",
            ))?,
            SourceKind::Gcs => Err(invalid(source, "write `bucket/prefix`")),
            SourceKind::Http => Err(invalid(source, "write the whole URL")),
            SourceKind::Local => Err(invalid(source, "write an absolute path")),
            SourceKind::Merge => Err(invalid(source, "merged adapters are asked for with `merged_adapters`")),
        }
    }

    /// The object that a Predibase name (`name/version`) lies at, in the default bucket.
    ///
    /// # Errors
    /// [`RefError::Predibase`] without a default bucket; [`RefError::Invalid`] if the name is none.
    pub fn predibase(name: &str, defaults: &SourceDefaults) -> Result<Self, RefError> {
        default_object(name, defaults).ok_or(RefError::Predibase)?
    }

    /// True if this could have been parsed: what is read back from a file or a message is checked before it is used.
    pub fn is_valid(&self) -> bool {
        Self::parse(&self.to_string()).as_ref() == Ok(self)
    }
}

impl fmt::Display for AdapterRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source {
            SourceKind::Hub => write!(f, "hf://{}", self.locator)?,
            SourceKind::S3 => write!(f, "s3://{}", self.locator)?,
            SourceKind::Gcs => write!(f, "gs://{}", self.locator)?,
            SourceKind::Http | SourceKind::Local => f.write_str(&self.locator)?,
            SourceKind::Merge => write!(f, "merge:{}", self.locator)?,
        }
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

fn invalid(source: SourceKind, reason: &'static str) -> RefError {
    RefError::Invalid { source_name: source.name(), reason }
}

fn reference(source: SourceKind, locator: impl Into<String>) -> AdapterRef {
    AdapterRef { source, locator: locator.into(), revision: None }
}

fn hub(text: &str) -> Result<AdapterRef, RefError> {
    let (id, revision) = match text.split_once('@') {
        Some((id, revision)) => (id, Some(revision)),
        None => (text, None),
    };
    // The hub itself refuses `--`: its caches write `org/repo` as `org--repo`.
    if !is_valid_name(id) || !id.contains('/') || id.contains("--") {
        return Err(invalid(
            SourceKind::Hub,
            "a repository is `org/name` of letters, digits, `.`, `_` and `-`, without `..` and `--`",
        ));
    }
    let revision = match revision {
        None | Some("latest" | "main") => None,
        Some(revision) if is_valid_revision(revision) => Some(revision.to_owned()),
        Some(_) => {
            return Err(invalid(
                SourceKind::Hub,
                "a revision is 1 to 128 letters, digits, `.`, `_`, `-` and `/`, without `..`",
            ));
        }
    };
    Ok(AdapterRef { revision, ..reference(SourceKind::Hub, id) })
}

fn is_valid_revision(revision: &str) -> bool {
    let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    revision.len() <= REVISION_BYTES_MAX
        && !revision.contains("..")
        && revision.split('/').all(|part| !part.is_empty() && part != "." && part.bytes().all(valid))
}

/// `bucket` or `bucket/prefix`; slashes at the end are dropped.
fn object(source: SourceKind, text: &str) -> Result<AdapterRef, RefError> {
    let locator = text.trim_end_matches('/');
    let mut parts = locator.split('/');
    if !parts.next().is_some_and(is_valid_bucket) {
        return Err(invalid(source, "a bucket is 3 to 63 letters, digits, `.`, `_` and `-`"));
    }
    if !parts.all(is_valid_key_part) {
        return Err(invalid(
            source,
            "a prefix is `/`-separated parts of letters, digits and `!_.'()=+:,@&$;~-`, none of them `.` or `..`",
        ));
    }
    Ok(reference(source, locator))
}

/// A bucket's name is a part of a host name or of a path.
pub(super) fn is_valid_bucket(bucket: &str) -> bool {
    let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let at_the_ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    BUCKET_BYTES.contains(&bucket.len())
        && at_the_ends(bucket.as_bytes().first())
        && at_the_ends(bucket.as_bytes().last())
        && bucket.bytes().all(valid)
        && !bucket.contains("..")
}

fn is_valid_key_part(part: &str) -> bool {
    let valid = |b: u8| b.is_ascii_alphanumeric() || b"!_.'()=+:,@&$;~-".contains(&b);
    !matches!(part, "" | "." | "..") && part.bytes().all(valid)
}

fn default_object(name: &str, defaults: &SourceDefaults) -> Option<Result<AdapterRef, RefError>> {
    let bucket = defaults.bucket.as_deref()?;
    let folder = defaults.folder.as_deref().map(|folder| folder.trim_matches('/')).filter(|folder| !folder.is_empty());
    Some(match folder {
        Some(folder) => object(SourceKind::S3, &format!("{bucket}/{folder}/{name}")),
        None => object(SourceKind::S3, &format!("{bucket}/{name}")),
    })
}

fn http(text: &str) -> Result<AdapterRef, RefError> {
    let url = guard::parse_url(text.trim_end_matches('/')).map_err(|reason| invalid(SourceKind::Http, reason))?;
    Ok(reference(SourceKind::Http, url.as_str().trim_end_matches('/')))
}

/// An absolute path in its shortest spelling: no `.`, no `..`, no doubled or trailing `/`.
fn local(path: &str) -> Result<AdapterRef, RefError> {
    let is_plain =
        |part: &str| !matches!(part, "" | "." | "..") && !part.contains(|c: char| c.is_control() || c == '\\');
    match path.trim_end_matches('/').strip_prefix('/') {
        Some(rest) if rest.split('/').all(is_plain) && !rest.contains("://") => {
            Ok(reference(SourceKind::Local, format!("/{rest}")))
        }
        _ => Err(invalid(
            SourceKind::Local,
            "a path is absolute (`/dir/adapter`), without `.`, `..`, doubled slashes, backslashes and control characters",
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn printed(text: &str) -> String {
        AdapterRef::parse(text).map(|reference| reference.to_string()).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn every_form_has_one_printed_spelling() {
        for (text, canonical) in [
            ("acme/sql", "hf://acme/sql"),
            ("acme/sql@latest", "hf://acme/sql"),
            ("acme/sql@main", "hf://acme/sql"),
            ("acme/sql@refs/pr/3", "hf://acme/sql@refs/pr/3"),
            ("hf://acme/sql@v1.0", "hf://acme/sql@v1.0"),
            ("huggingface://acme/sql", "hf://acme/sql"),
            ("s3://bucket/loras/sql/", "s3://bucket/loras/sql"),
            ("s3://bucket", "s3://bucket"),
            ("gcs://bucket/sql@2", "gs://bucket/sql@2"),
            ("gs://bucket/sql", "gs://bucket/sql"),
            ("https://models.example.com/sql/", "https://models.example.com/sql"),
            ("https://models.example.com:443/sql", "https://models.example.com/sql"),
            ("http://127.0.0.1:8080/sql", "http://127.0.0.1:8080/sql"),
            ("/adapters/sql/", "/adapters/sql"),
            ("file:///adapters/sql", "/adapters/sql"),
        ] {
            assert_eq!(printed(text), canonical, "{text}");
            assert_eq!(printed(canonical), canonical, "{text}");
        }
    }

    #[test]
    fn what_looks_like_a_path_is_never_a_repository() {
        for text in ["./loras/sql", "../sql", "~/loras/sql", "./sql"] {
            let error = AdapterRef::parse(text).unwrap_err().to_string();
            assert!(error.contains("a path is absolute"), "{text}: {error}");
        }
    }

    #[test]
    fn what_could_leave_its_place_or_carry_a_secret_is_no_reference() {
        for text in [
            "",
            "sql",
            "sql@v1",
            "a/b/c",
            "../b",
            "a/..",
            "a/b@",
            "a/b@..",
            "a/b@x/../y",
            "a/b@/x",
            "a/b@x//y",
            "a/b@x y",
            "a/b@%2e%2e",
            "a\\b/c",
            "a/b\0",
            "a--b/c",
            "a/b@x@y",
            "hf:///a/b",
            "hf://gpt2",
            "HF://a/b",
            "hf://user:pw@a/b",
            "ftp://a/b",
            "s3://",
            "s3:///key",
            "s3://b/key",
            "s3://bucket//key",
            "s3://bucket/../key",
            "s3://bucket/a/./b",
            "s3://bucket/%2e%2e/b",
            "s3://bucket/a\\b",
            "s3://bucket/a?versionId=1",
            "s3://bucket/a#b",
            "s3://bucket/a b",
            "s3://-bucket/a",
            "s3://bu..cket/a",
            "s3://key:secret@bucket/a",
            "gs://bucket/\u{202e}a",
            "gs://bücket/a",
            "https://user:pw@host/a",
            "https://host/a?token=x",
            "https://host/a#b",
            "https://host/../a",
            "https://host/%2e%2e/a",
            "https://host\\@other/a",
            "https:/host/a",
            "https://",
            "file://host/a",
            "file://a",
            "/",
            "//a",
            "/a//b",
            "/a/../b",
            "/a/./b",
            "/a\\b",
            "/a\nb",
            "/a\0b",
            "./a",
            "~/a",
            "merge:abc",
            "/hf://a/b",
        ] {
            let error = AdapterRef::parse(text).map(|found| panic!("{text} is {found:?}")).unwrap_err();
            assert!(!error.to_string().contains("pw") && !error.to_string().contains("token=x"), "{error}");
        }
        assert_eq!(AdapterRef::parse(&format!("/{}", "a".repeat(REF_BYTES_MAX))), Err(RefError::TooLong));
    }

    #[test]
    fn a_source_reads_bare_names_its_own_way_and_no_other_sources_references() {
        let defaults = SourceDefaults { bucket: Some("models".into()), folder: Some("/loras/".into()) };
        let read = |name, source| AdapterRef::with_source(name, source, &defaults).map(|found| found.to_string());
        assert_eq!(read("acme/sql@v1", SourceKind::Hub).unwrap(), "hf://acme/sql@v1");
        assert_eq!(read("bucket/acme/sql", SourceKind::S3).unwrap(), "s3://bucket/acme/sql");
        assert_eq!(read("sql", SourceKind::S3).unwrap(), "s3://models/loras/sql");
        assert_eq!(read("bucket/sql", SourceKind::Gcs).unwrap(), "gs://bucket/sql");
        assert_eq!(read("/adapters/sql", SourceKind::Local).unwrap(), "/adapters/sql");
        assert_eq!(read("s3://bucket/sql", SourceKind::Hub), Err(RefError::OtherSource { found: "s3", asked: "hub" }));
        for (name, source) in
            [("sql", SourceKind::Gcs), ("acme/sql", SourceKind::Local), ("acme/sql", SourceKind::Http)]
        {
            assert!(read(name, source).is_err(), "{name}");
        }
        assert_eq!(AdapterRef::predibase("sql/3", &defaults).unwrap().to_string(), "s3://models/loras/sql/3");
        assert!(AdapterRef::predibase("../3", &defaults).is_err());
        let error = AdapterRef::predibase("sql/3", &SourceDefaults::default()).unwrap_err();
        assert!(error.to_string().contains("s3://bucket/prefix"), "{error}");
    }

    /// References as the parts allow them, valid and nearly so.
    fn references() -> impl Strategy<Value = AdapterRef> {
        let source = prop::sample::select(vec![
            SourceKind::Hub,
            SourceKind::S3,
            SourceKind::Gcs,
            SourceKind::Http,
            SourceKind::Local,
            SourceKind::Merge,
        ]);
        let locator = prop_oneof![
            "[a-zA-Z0-9._-]{0,6}/[a-zA-Z0-9._@-]{0,6}",
            "[a-z0-9.-]{2,5}(/[a-zA-Z0-9.@:%_-]{0,4}){0,3}",
            "https?://[a-z0-9.:-]{1,8}(/[a-zA-Z0-9.@:%_-]{0,4}){0,3}",
            "(/[a-z.@\\\\:]{0,4}){0,4}",
            "\\PC{0,12}",
        ];
        let revision = prop::option::of(prop_oneof!["[a-zA-Z0-9._/-]{0,8}", Just("main".to_owned()), "\\PC{0,6}"]);
        (source, locator, revision).prop_map(|(source, locator, revision)| AdapterRef { source, locator, revision })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn a_parsed_reference_prints_and_parses_to_itself(text in "(hf://|s3://|gs://|https://|http://|/|)[a-zA-Z0-9/.@:_%?#\\\\-]{0,20}") {
            if let Ok(reference) = AdapterRef::parse(&text) {
                prop_assert!(reference.is_valid(), "{:?}", reference);
            }
        }

        #[test]
        fn two_valid_references_never_print_the_same(a in references(), b in references()) {
            if a.is_valid() {
                prop_assert_eq!(AdapterRef::parse(&a.to_string()).unwrap(), a.clone());
                prop_assert!(!a.to_string().split('/').any(|part| part == ".."), "{}", a);
                if a != b && b.is_valid() {
                    prop_assert_ne!(a.to_string(), b.to_string());
                }
            }
        }
    }
}
