//! `--adapter` and its kin: names, and what they stand for.

use std::path::{Path, PathBuf};

use loramux_router::adapters::{AdapterRef, is_valid_name};
use serde::Deserialize;

use super::{ConfigError, Env};
use crate::args::AdapterArgs;

/// An adapter as vLLM's flag takes it too.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Typed {
    name: String,
    #[serde(alias = "ref")]
    path: String,
    /// Of vLLM's form; the adapter's own config says what it was trained on.
    #[serde(default, rename = "base_model_name")]
    _base_model_name: Option<String>,
}

/// All adapters that the operator named, each name once. What is typed takes the place of the demo's.
pub(super) fn registered(
    args: &AdapterArgs,
    env: &Env,
    demo: Vec<(String, PathBuf)>,
    served_names: &[String],
) -> Result<Vec<(String, AdapterRef)>, ConfigError> {
    let mut typed = Vec::new();
    for text in &args.adapter {
        typed.extend(parts(text)?);
    }
    let preloaded = if args.preloaded_adapter_ids.is_empty() { env.list("PRELOADED_ADAPTER_IDS") } else { Vec::new() };
    for id in args.preloaded_adapter_ids.iter().chain(&preloaded) {
        typed.push((id.clone(), id.clone()));
    }
    if typed.is_empty() {
        for text in env.first(&["LORA_ADAPTERS"]).into_iter() {
            typed.extend(parts(text)?);
        }
    }
    let mut adapters: Vec<(String, AdapterRef)> = Vec::new();
    for (name, path) in typed {
        if !is_valid_name(&name) {
            return Err(ConfigError::AdapterName(name));
        }
        let reference = reference(&name, &path)?;
        if served_names.contains(&name) {
            return Err(ConfigError::AdapterIsBase { name });
        }
        if adapters.iter().any(|(other, _)| *other == name) {
            return Err(ConfigError::AdapterTwice(name));
        }
        adapters.push((name, reference));
    }
    let mut all: Vec<_> = demo
        .into_iter()
        .filter(|(name, _)| !adapters.iter().any(|(other, _)| other == name))
        .map(|(name, dir)| (name, AdapterRef::directory(&dir)))
        .collect();
    all.append(&mut adapters);
    Ok(all)
}

/// The name of `--adapter-id`, which is registered under its own reference if it is no name yet.
pub(super) fn default_adapter(
    args: &AdapterArgs,
    adapters: &mut Vec<(String, AdapterRef)>,
) -> Result<Option<String>, ConfigError> {
    let Some(id) = args.adapter_id.as_deref().map(str::trim).filter(|id| !id.is_empty()) else { return Ok(None) };
    if adapters.iter().any(|(name, _)| name == id) {
        return Ok(Some(id.to_owned()));
    }
    let reference = reference(id, id)?;
    // A name may hold less than a reference does.
    let name = if is_valid_name(id) { id.to_owned() } else { DEFAULT_ADAPTER.to_owned() };
    if adapters.iter().any(|(other, _)| *other == name) {
        return Err(ConfigError::AdapterTwice(name));
    }
    adapters.push((name.clone(), reference));
    Ok(Some(name))
}

/// How the adapter of `--adapter-id` is called where its reference cannot be a name.
const DEFAULT_ADAPTER: &str = "default-adapter";

/// `NAME=REF[,NAME=REF..]`, or a JSON object or list of objects.
fn parts(text: &str) -> Result<Vec<(String, String)>, ConfigError> {
    let text = text.trim();
    let form = || ConfigError::AdapterForm(text.to_owned());
    if text.starts_with('{') || text.starts_with('[') {
        let list = if text.starts_with('{') { format!("[{text}]") } else { text.to_owned() };
        let typed: Vec<Typed> = serde_json::from_str(&list).map_err(|_| form())?;
        return Ok(typed.into_iter().map(|typed| (typed.name, typed.path)).collect());
    }
    let part = |part: &str| {
        let (name, path) = part.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty())?;
        Some((name.to_owned(), path.to_owned()))
    };
    text.split(',').map(|typed| part(typed.trim()).ok_or_else(form)).collect()
}

/// A folder that exists, wherever it is; else what a request could name too.
pub(crate) fn reference(name: &str, typed: &str) -> Result<AdapterRef, ConfigError> {
    let missing = || ConfigError::AdapterMissing { name: name.to_owned(), path: typed.to_owned() };
    if !typed.contains("://") {
        if let Some(full) = Path::new(typed).canonicalize().ok().filter(|full| full.is_dir()) {
            return Ok(AdapterRef::directory(&full));
        }
        // What looks like a path is one.
        if typed.starts_with(['/', '.', '~']) || typed.matches('/').count() != 1 {
            return Err(missing());
        }
    }
    let refused = |reason: String| ConfigError::AdapterRef { name: name.to_owned(), reason };
    let parsed = AdapterRef::parse(typed).map_err(|error| refused(error.to_string()))?;
    if parsed.source == loramux_router::adapters::SourceKind::Local {
        let full = Path::new(&parsed.locator).canonicalize().ok().filter(|full| full.is_dir());
        return full.map(|full| AdapterRef::directory(&full)).ok_or_else(missing);
    }
    Ok(parsed)
}

/// Folders that exist, absolute.
pub(super) fn directories(flag: &'static str, typed: &[PathBuf]) -> Result<Vec<PathBuf>, ConfigError> {
    let full = |dir: &PathBuf| {
        let missing = || ConfigError::DirMissing { flag, path: dir.display().to_string() };
        dir.canonicalize().ok().filter(|full| full.is_dir()).ok_or_else(missing)
    };
    typed.iter().map(full).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use loramux_router::adapters::SourceKind;

    #[test]
    fn adapters_are_named_in_every_form() {
        let here = env!("CARGO_MANIFEST_DIR");
        let cases = [
            ("a=.", SourceKind::Local, here),
            ("a=acme/sql", SourceKind::Hub, "acme/sql"),
            ("a=hf://acme/sql@v1", SourceKind::Hub, "acme/sql"),
            ("a=s3://bucket/loras/sql", SourceKind::S3, "bucket/loras/sql"),
            ("{\"name\": \"a\", \"path\": \"acme/sql\", \"base_model_name\": \"x\"}", SourceKind::Hub, "acme/sql"),
        ];
        for (typed, source, locator) in cases {
            let (name, path) = parts(typed).unwrap().remove(0);
            let reference = reference(&name, &path).unwrap();
            assert_eq!(
                (name.as_str(), reference.source, reference.locator.as_str()),
                ("a", source, locator),
                "{typed}"
            );
        }
        assert_eq!(parts("a=x/y,b=s3://b/c").unwrap().len(), 2);
        for bad in ["a=./nowhere", "a=/nowhere", "a=ftp://x/y", "a=nowhere", "a=hf://x"] {
            let (name, path) = parts(bad).unwrap().remove(0);
            assert!(reference(&name, &path).is_err(), "{bad}");
        }
    }
}
