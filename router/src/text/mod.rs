//! Text on both sides of the model: tokenizer, chat template, detokenizer, stop strings.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod adapter;
mod bad_words;
mod detokenizer;
pub mod grammar;
mod growth;
mod python;
mod stop;
mod stranger;
mod strftime;
mod template;
#[cfg(test)]
mod template_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::Value as Json;
use tokenizers::Tokenizer;
use tokio::sync::Semaphore;

pub use detokenizer::Detokenizer;
pub use stop::{StopMatcher, StopOutcome};
pub use template::{ChatPrompt, ChatTemplate, SharedTemplate, TemplateChoice, TemplateError};

use bad_words::BadWords;
use detokenizer::TokenTable;
use template::{SpecialTokens, Trust};

use crate::engine::Grammar;

/// The files of a model directory that concern text, as read.
#[derive(Clone, Debug, Default)]
pub struct TextFiles {
    /// `tokenizer.json`.
    pub tokenizer_json: String,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<String>,
    /// `generation_config.json`.
    pub generation_config: Option<String>,
    /// `chat_template.jinja`, or the operator's own. Wins over the one in `tokenizer_config.json`.
    pub chat_template: Option<String>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<String>,
    /// `eos_token_id` of `config.json`.
    pub config_eos: Vec<u32>,
    /// `bos_token_id` of `config.json`.
    pub config_bos: Option<u32>,
}

/// Why text could not be processed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// A model file is unusable. The server does not start.
    #[error("{file}: {reason}")]
    File {
        /// Which file.
        file: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer refused this text.
    #[error("the tokenizer could not encode this text: {0}")]
    Encode(String),
    /// A library panicked.
    #[error("text processing failed")]
    Panicked,
    /// The base model has none.
    #[error("this model has no chat template; start the server with --chat-template or use /v1/completions")]
    NoTemplate,
    /// See [`TemplateError`].
    #[error(transparent)]
    Template(#[from] TemplateError),
}

/// Sampling defaults of `generation_config.json`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// As in the request.
    pub temperature: Option<f64>,
    /// As in the request.
    pub top_p: Option<f64>,
    /// As in the request.
    pub top_k: Option<i64>,
    /// As in the request.
    pub min_p: Option<f64>,
    /// As in the request.
    pub repetition_penalty: Option<f64>,
}

/// One token as text with its place in the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedToken {
    /// Its id.
    pub id: u32,
    /// First character (Unicode scalar) of the input.
    pub start: usize,
    /// One past the last.
    pub stop: usize,
}

/// Tokenizer, template and vocabulary of the base model. Cheap to clone.
#[derive(Clone)]
pub struct TextModel {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for TextModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextModel").field("len_tokens", &self.len_tokens()).finish_non_exhaustive()
    }
}

struct Inner {
    tokenizer: Arc<Tokenizer>,
    table: Arc<TokenTable>,
    template: Option<SharedTemplate>,
    adapter_templates: adapter::Templates,
    /// As templates know them.
    special: SpecialTokens,
    end_tokens: Vec<u32>,
    special_texts: Vec<String>,
    defaults: GenerationDefaults,
    /// Bounds how many threads of the blocking pool text processing takes.
    workers: Arc<Semaphore>,
    /// The same for templates that are not the operator's.
    strangers: Arc<Semaphore>,
}

/// Templates of adapters and requests that run at the same time. One of them may keep a thread busy for seconds, and then
/// it is in the way of its like alone.
const STRANGERS_MAX: usize = 2;

impl TextModel {
    /// Parses the files of a model directory.
    ///
    /// # Errors
    /// [`TextError::File`] names the file that is unusable.
    pub fn new(files: TextFiles) -> Result<Self, TextError> {
        let tokenizer_json = parse("tokenizer.json", &files.tokenizer_json)?;
        let bad = |reason: String| TextError::File { file: "tokenizer.json", reason };
        let tokenizer = std::panic::catch_unwind(|| Tokenizer::from_bytes(files.tokenizer_json.as_bytes()));
        let mut tokenizer =
            tokenizer.map_err(|_| bad("the tokenizer library panicked".into()))?.map_err(|e| bad(e.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| bad(e.to_string()))?;
        let config = parse_optional("tokenizer_config.json", files.tokenizer_config.as_deref())?;
        let generation = parse_optional("generation_config.json", files.generation_config.as_deref())?;
        let map = parse_optional("special_tokens_map.json", files.special_tokens_map.as_deref())?;

        let tokens = special_tokens(&tokenizer, &config, &map, files.config_bos);
        let mut end_tokens: BTreeSet<u32> = files.config_eos.iter().copied().collect();
        end_tokens.extend(ids(member(&generation, "eos_token_id")));
        end_tokens.extend(tokens.eos.as_deref().and_then(|token| tokenizer.token_to_id(token)));
        let source = files.chat_template.or_else(|| template_of(&config));
        let compile = |source: String| ChatTemplate::new(&source, tokens.clone(), Trust::Operator);
        let template = source.map(compile).transpose()?.map(Arc::new);
        let special_texts =
            tokenizer.get_added_tokens_decoder().into_values().filter(|t| t.special).map(|t| t.content).collect();
        let tokenizer = Arc::new(tokenizer);
        let inner = Inner {
            table: Arc::new(TokenTable::new(Arc::clone(&tokenizer), &tokenizer_json)),
            tokenizer,
            template,
            adapter_templates: Default::default(),
            special: tokens,
            end_tokens: end_tokens.into_iter().collect(),
            special_texts,
            defaults: generation_defaults(&generation),
            strangers: Arc::new(Semaphore::new(STRANGERS_MAX)),
            workers: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(2, |n| n.get()).max(2))),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Token ids of `text`. With `add_special`, what the tokenizer's post-processor adds (usually BOS). Text that spells a
    /// special token becomes that token.
    ///
    /// # Errors
    /// [`TextError::Encode`], [`TextError::Panicked`].
    pub async fn encode(&self, text: String, add_special: bool) -> Result<Vec<u32>, TextError> {
        self.on_worker(move |inner| inner.encode(&text, add_special)).await
    }

    /// As [`Self::encode`], with places.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub async fn encode_placed(&self, text: String, add_special: bool) -> Result<Vec<PlacedToken>, TextError> {
        self.on_worker(move |inner| {
            let encoding =
                inner.tokenizer.encode_char_offsets(text, add_special).map_err(|e| TextError::Encode(e.to_string()))?;
            let places = encoding.get_ids().iter().zip(encoding.get_offsets());
            Ok(places.map(|(&id, &(start, stop))| PlacedToken { id, start, stop }).collect())
        })
        .await
    }

    /// Renders a chat and encodes it. Special tokens of the *template* become tokens; those that a message spells stay
    /// text.
    ///
    /// # Errors
    /// [`TextError::NoTemplate`], [`TextError::Template`], or as [`Self::encode`].
    pub async fn encode_chat(&self, mut chat: ChatPrompt, add_special: bool) -> Result<Vec<u32>, TextError> {
        let (workers, template) = match std::mem::take(&mut chat.template) {
            TemplateChoice::Base => {
                (&self.inner.workers, Ok(self.inner.template.clone().ok_or(TextError::NoTemplate)?))
            }
            TemplateChoice::Compiled(template) => (&self.inner.strangers, Ok(template)),
            TemplateChoice::Source(source) => (&self.inner.strangers, Err(source)),
        };
        self.on_worker_of(workers, move |inner| {
            let template = match template {
                Ok(template) => template,
                Err(source) => Arc::new(ChatTemplate::new(&source, inner.special.clone(), Trust::Stranger)?),
            };
            let mark = inner.guard_specials(&mut chat.messages);
            let text = template.render(&chat)?;
            let Some(mark) = mark else { return inner.encode(&text, add_special) };
            let mut tokens = Vec::new();
            for (i, part) in text.split(mark).enumerate() {
                tokens.extend(inner.encode(part, add_special && i == 0)?);
            }
            Ok(tokens)
        })
        .await
    }

    /// The rule that none of `words` is generated, in addition to `other`. Each word counts with and without a space in
    /// front. `allowed`: the only tokens that may come, unless it is empty. Tokens of the model are below `vocab`.
    ///
    /// # Errors
    /// [`TextError::Encode`].
    pub async fn without_words(
        &self,
        words: Vec<String>,
        allowed: Vec<u32>,
        vocab: u32,
        other: Option<Arc<dyn Grammar>>,
    ) -> Result<Arc<dyn Grammar>, TextError> {
        self.on_worker(move |inner| {
            let mut spelled: Vec<Vec<u32>> = Vec::with_capacity(words.len() * 2);
            for word in &words {
                let alone = inner.encode(word.trim_start(), false)?;
                let inside = inner.encode(&format!(" {}", word.trim_start()), false)?;
                // Behind a space it is another word only if the space is part of its first token.
                if inside.len() == alone.len() && inside.first() != alone.first() {
                    spelled.push(inside);
                }
                spelled.push(alone);
            }
            spelled.retain(|word| !word.is_empty());
            Ok(Arc::new(BadWords::new(spelled, &allowed, vocab, other)) as Arc<dyn Grammar>)
        })
        .await
    }

    /// [`Self::decode`] on a thread that may take its time; special tokens are spelled.
    ///
    /// # Errors
    /// [`TextError::Panicked`].
    pub async fn decode_all(&self, tokens: Vec<u32>) -> Result<String, TextError> {
        let text = self.clone();
        self.on_worker(move |_| Ok(text.decode(&tokens, false))).await
    }

    /// Text of `tokens`, exactly what a stream of them adds up to.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        let mut detokenizer = self.detokenizer(skip_special);
        let mut text = String::new();
        for &token in tokens {
            detokenizer.push(token, &mut text);
        }
        detokenizer.finish(&mut text);
        text
    }

    /// A decoder for one sequence.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.inner.table), skip_special)
    }

    /// Fewest tokens that `bytes` of text can be; 0 if that is not certain. Costs nothing, unlike encoding it.
    pub fn tokens_at_least(&self, bytes: usize) -> usize {
        self.inner.table.tokens_at_least(bytes)
    }

    /// The bytes one token stands for; special tokens spell their name.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        self.inner.table.token_bytes(token)
    }

    /// True for tokens that are no text, such as the end of a turn.
    pub fn is_special(&self, token: u32) -> bool {
        self.inner.table.is_special(token)
    }

    /// Ids that end a sequence unless the request says otherwise.
    pub fn end_tokens(&self) -> &[u32] {
        &self.inner.end_tokens
    }

    /// Ids are below this. The model's own vocabulary may be larger (padding) but not smaller.
    pub fn len_tokens(&self) -> usize {
        self.inner.table.len_tokens()
    }

    /// Sampling defaults of the model.
    pub fn defaults(&self) -> GenerationDefaults {
        self.inner.defaults
    }

    /// True if chats can be rendered.
    pub fn has_template(&self) -> bool {
        self.inner.template.is_some()
    }

    async fn on_worker<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, TextError> + Send + 'static,
    ) -> Result<T, TextError> {
        self.on_worker_of(&self.inner.workers, work).await
    }

    async fn on_worker_of<T: Send + 'static>(
        &self,
        workers: &Arc<Semaphore>,
        work: impl FnOnce(&Inner) -> Result<T, TextError> + Send + 'static,
    ) -> Result<T, TextError> {
        let permit = Arc::clone(workers).acquire_owned().await.map_err(|_| TextError::Panicked)?;
        let inner = Arc::clone(&self.inner);
        let run = move || {
            let _permit = permit; // with the thread, not with the caller: one that leaves does not free the thread
            work(&inner)
        };
        tokio::task::spawn_blocking(run).await.map_err(|_| TextError::Panicked)?
    }
}

impl Inner {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.tokenizer.encode_fast(text, add_special).map_err(|e| TextError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Breaks every special token that a message spells with a mark that occurs nowhere else; the rendered text is encoded
    /// in parts, cut at the marks, so none of them can become the token. `None`: nothing had to be broken.
    fn guard_specials(&self, messages: &mut [Json]) -> Option<char> {
        let spelled = |text: &str| self.special_texts.iter().any(|special| text.contains(special.as_str()));
        let mut texts = Vec::new();
        messages.iter_mut().for_each(|message| collect_texts(message, &mut texts));
        if !texts.iter().any(|text| spelled(text)) {
            return None;
        }
        let mark = ('\u{FDD0}'..='\u{FDEF}').find(|&c| !texts.iter().any(|text| text.contains(c)))?;
        for text in texts {
            for special in &self.special_texts {
                if let Some(first) = special.chars().next() {
                    let (head, tail) = special.split_at(first.len_utf8());
                    *text = text.replace(special.as_str(), &format!("{head}{mark}{tail}"));
                }
            }
        }
        Some(mark)
    }
}

/// All strings of a message but its role.
fn collect_texts<'a>(value: &'a mut Json, texts: &mut Vec<&'a mut String>) {
    match value {
        Json::String(text) => texts.push(text),
        Json::Array(values) => values.iter_mut().for_each(|v| collect_texts(v, texts)),
        Json::Object(map) => {
            map.iter_mut().filter(|(key, _)| key.as_str() != "role").for_each(|(_, v)| collect_texts(v, texts));
        }
        _ => {}
    }
}

/// A member of an object; null if there is none.
fn member<'a>(json: &'a Json, name: &str) -> &'a Json {
    json.get(name).unwrap_or(&Json::Null)
}

fn parse(file: &'static str, text: &str) -> Result<Json, TextError> {
    serde_json::from_str(text).map_err(|e| TextError::File { file, reason: e.to_string() })
}

fn parse_optional(file: &'static str, text: Option<&str>) -> Result<Json, TextError> {
    text.map_or(Ok(Json::Null), |text| parse(file, text))
}

/// A number or a list of them.
fn ids(value: &Json) -> Vec<u32> {
    let one = |v: &Json| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Json::Array(values) => values.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

/// Tokens stand in these files as a string or as `{"content": ".."}`.
fn special_tokens(tokenizer: &Tokenizer, config: &Json, map: &Json, config_bos: Option<u32>) -> SpecialTokens {
    let text = |value: &Json| value.as_str().or_else(|| member(value, "content").as_str()).map(str::to_owned);
    let find = |name: &str| text(member(config, name)).or_else(|| text(member(map, name)));
    SpecialTokens {
        bos: find("bos_token").or_else(|| config_bos.and_then(|id| tokenizer.id_to_token(id))),
        eos: find("eos_token"),
        unk: find("unk_token"),
        pad: find("pad_token"),
    }
}

/// A string, or a list of named ones of which `default` is meant.
fn template_of(config: &Json) -> Option<String> {
    let named = |templates: &Vec<Json>| {
        let default = templates.iter().find(|t| member(t, "name") == "default").or(templates.first())?;
        member(default, "template").as_str().map(str::to_owned)
    };
    match member(config, "chat_template") {
        Json::String(source) => Some(source.clone()),
        Json::Array(templates) => named(templates),
        _ => None,
    }
}

fn generation_defaults(config: &Json) -> GenerationDefaults {
    GenerationDefaults {
        temperature: member(config, "temperature").as_f64().filter(|t| *t >= 0.0),
        top_p: member(config, "top_p").as_f64().filter(|p| (0.0..=1.0).contains(p)),
        top_k: member(config, "top_k").as_i64().filter(|k| *k >= 1),
        min_p: member(config, "min_p").as_f64().filter(|p| (0.0..=1.0).contains(p)),
        repetition_penalty: member(config, "repetition_penalty").as_f64().filter(|p| *p > 0.0 && *p <= 10.0),
    }
}
