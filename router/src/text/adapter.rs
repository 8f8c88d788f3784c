//! Text files that an adapter may bring: its own chat template, and tokens that its tokenizer adds.
//!
//! Both are somebody else's files: they are read up to a bound, and only where they lie in the adapter's own folder.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::template::{ChatTemplate, SharedTemplate, Trust};
use super::{TextError, TextModel, member, template_of};

/// Bytes of one of these files.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Templates of adapters that are kept compiled.
pub(super) const TEMPLATES_MAX: usize = 256;

/// Compiled templates by the identity of their adapter's files; `None`: it brings none.
pub(super) type Templates = std::sync::Mutex<std::collections::HashMap<String, Option<SharedTemplate>>>;

impl TextModel {
    /// Looks for tokens that the adapter's tokenizer adds in `dir`. Fine are those that the base model's tokenizer has under
    /// the same id, and the padding token, which is in no text.
    ///
    /// # Errors
    /// What was found, what is accepted, what to change; [`TextError::Panicked`].
    pub async fn check_added_tokens(&self, dir: PathBuf) -> Result<Result<(), String>, TextError> {
        self.on_worker(move |inner| {
            let config = read_json(&dir, "tokenizer_config.json");
            let padding = member(&config, "pad_token");
            let padding = padding.as_str().or_else(|| member(padding, "content").as_str());
            let known = |token: &str, id: u64| {
                Some(token) == padding || inner.tokenizer.token_to_id(token).map(u64::from) == Some(id)
            };
            let strange = added_tokens(&dir, &config).into_iter().find(|(token, id)| !known(token, *id));
            Ok(strange.map_or(Ok(()), |(token, id)| {
                Err(format!(
                    "its tokenizer adds `{}` as token {id}, which the base model's tokenizer does not have; adapters are \
                     served with the tokenizer of the base model; train it without new tokens, or serve the merged model",
                    crate::http::cut(&token)
                ))
            }))
        })
        .await
    }

    /// The adapter's own chat template, if it brings one. `identity` names the exact files in `dir`.
    ///
    /// # Errors
    /// [`TextError::Template`] for one that is no template.
    pub async fn adapter_template(&self, identity: &str, dir: PathBuf) -> Result<Option<SharedTemplate>, TextError> {
        let kept = |inner: &super::Inner| {
            let kept = inner.adapter_templates.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            kept.get(identity).cloned()
        };
        if let Some(found) = kept(&self.inner) {
            return Ok(found);
        }
        let identity = identity.to_owned();
        self.on_worker(move |inner| {
            let source = read_text(&dir, "chat_template.jinja")
                .or_else(|| template_of(&read_json(&dir, "tokenizer_config.json")));
            let compile = |source: String| ChatTemplate::new(&source, inner.special.clone(), Trust::Stranger);
            let template = source.map(compile).transpose()?.map(std::sync::Arc::new);
            let mut kept = inner.adapter_templates.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if kept.len() >= TEMPLATES_MAX {
                kept.clear();
            }
            kept.insert(identity, template.clone());
            Ok(template)
        })
        .await
    }
}

/// Tokens and ids of `added_tokens.json` and of the config's `added_tokens_decoder`.
fn added_tokens(dir: &Path, config: &Json) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    if let Json::Object(map) = read_json(dir, "added_tokens.json") {
        found.extend(map.into_iter().filter_map(|(token, id)| Some((token, id.as_u64()?))));
    }
    if let Json::Object(map) = member(config, "added_tokens_decoder") {
        let one =
            |(id, token): (&String, &Json)| Some((member(token, "content").as_str()?.to_owned(), id.parse().ok()?));
        found.extend(map.iter().filter_map(one));
    }
    found
}

fn read_json(dir: &Path, name: &str) -> Json {
    read_text(dir, name).and_then(|text| serde_json::from_str(&text).ok()).unwrap_or(Json::Null)
}

/// A file of the folder itself, or one that the hub's cache keeps beside its snapshots. Links to other places are not
/// followed: what a template says comes back in prompts.
fn read_text(dir: &Path, name: &str) -> Option<String> {
    let (dir, full) = (dir.canonicalize().ok()?, dir.join(name).canonicalize().ok()?);
    let blobs = dir.parent().filter(|snapshots| snapshots.ends_with("snapshots")).and_then(Path::parent);
    let is_own = full.starts_with(&dir) || blobs.is_some_and(|repository| full.starts_with(repository.join("blobs")));
    if !is_own {
        return None;
    }
    let file = std::fs::File::open(&full).ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::testing::byte_level;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[tokio::test]
    async fn tokens_that_the_base_does_not_have_are_refused_by_name() {
        let fine = [
            &[][..],
            &[("added_tokens.json", r#"{"<|im_end|>": 2}"#)],
            &[("tokenizer_config.json", r#"{"added_tokens_decoder": {"1": {"content": "<|im_start|>"}}}"#)],
            &[("added_tokens.json", r#"{"[PAD]": 9999}"#), ("tokenizer_config.json", r#"{"pad_token": "[PAD]"}"#)],
            &[("added_tokens.json", "no json")],
        ];
        for files in fine {
            let dir = folder(files);
            assert_eq!(byte_level().check_added_tokens(dir.path().into()).await.unwrap(), Ok(()), "{files:?}");
        }
        let strange = [
            &[("added_tokens.json", r#"{"<tool>": 9999}"#)][..],
            &[("added_tokens.json", r#"{"<tool>": 3}"#)],
            &[("tokenizer_config.json", r#"{"added_tokens_decoder": {"7": {"content": "<tool>"}}}"#)],
        ];
        for files in strange {
            let dir = folder(files);
            let refused = byte_level().check_added_tokens(dir.path().into()).await.unwrap().unwrap_err();
            assert!(refused.contains("`<tool>`"), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_template_is_the_file_or_that_of_the_config_and_no_link() {
        let model = byte_level();
        let of = |dir: &tempfile::TempDir| model.adapter_template("x", dir.path().into());
        assert!(of(&folder(&[])).await.unwrap().is_none());
        let config = r#"{"chat_template": "C"}"#;
        for (i, (files, want)) in [
            (&[("chat_template.jinja", "F"), ("tokenizer_config.json", config)][..], "F"),
            (&[("tokenizer_config.json", config)], "C"),
        ]
        .into_iter()
        .enumerate()
        {
            let dir = folder(files);
            let template = model.adapter_template(&i.to_string(), dir.path().into()).await.unwrap().unwrap();
            let chat = crate::text::ChatPrompt { output_bytes_max: 9, ..Default::default() };
            assert_eq!(template.render(&chat).unwrap(), want);
        }
        let outside = folder(&[("secret", "s")]);
        let dir = folder(&[]);
        std::os::unix::fs::symlink(outside.path().join("secret"), dir.path().join("chat_template.jinja")).unwrap();
        assert!(model.adapter_template("link", dir.path().into()).await.unwrap().is_none());
        let bad = folder(&[("chat_template.jinja", "{% for")]);
        assert!(matches!(model.adapter_template("bad", bad.path().into()).await, Err(TextError::Template(_))));
    }
}
