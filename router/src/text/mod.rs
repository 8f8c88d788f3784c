//! Text on both sides of the model: tokenizer, chat template, detokenizer, stop strings.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod adapter;
mod bad_words;
mod chat;
mod detokenizer;
pub mod grammar;
mod growth;
mod python;
mod reasoning;
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
mod thought;
mod tools;

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::Value as Json;
use tokenizers::Tokenizer;
use tokio::sync::Semaphore;

pub use chat::PreparedChat;
pub use detokenizer::Detokenizer;
pub use stop::{StopMatcher, StopOutcome};
pub use template::{ChatPrompt, ChatTemplate, SharedTemplate, TemplateChoice, TemplateError};

pub(crate) use reasoning::{ReasoningDelta, ReasoningReader};
use reasoning::{THINK_END, THINK_START};
pub use tools::ToolFormat;
pub(crate) use tools::{Function, Thought, ToolDelta, ToolReader};

use detokenizer::TokenTable;
use template::{SpecialTokens, Trust};

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
    /// The one for chats with tools, where the model has two.
    tool_template: Option<SharedTemplate>,
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
    grammars: grammar::GrammarStore,
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
        let own = files.chat_template.is_none();
        let compile = |source: String| ChatTemplate::new(&source, tokens.clone(), Trust::Operator).map(Arc::new);
        let tool_template = named_template(&config, "tool_use").filter(|_| own).map(compile).transpose()?;
        let source = files.chat_template.or_else(|| template_of(&config));
        let template = source.map(compile).transpose()?;
        let special_texts =
            tokenizer.get_added_tokens_decoder().into_values().filter(|t| t.special).map(|t| t.content).collect();
        let tokenizer = Arc::new(tokenizer);
        let inner = Inner {
            table: Arc::new(TokenTable::new(Arc::clone(&tokenizer), &tokenizer_json)),
            tokenizer,
            template,
            tool_template,
            adapter_templates: Default::default(),
            special: tokens,
            end_tokens: end_tokens.into_iter().collect(),
            special_texts,
            defaults: generation_defaults(&generation),
            strangers: Arc::new(Semaphore::new(STRANGERS_MAX)),
            workers: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(2, |n| n.get()).max(2))),
            grammars: grammar::GrammarStore::default(),
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
    let templates = member(config, "chat_template");
    let first = || member(templates.get(0)?, "template").as_str().map(str::to_owned);
    templates.as_str().map(str::to_owned).or_else(|| named_template(config, "default")).or_else(first)
}

/// One of a list of named templates.
fn named_template(config: &Json, name: &str) -> Option<String> {
    let templates = member(config, "chat_template").as_array()?;
    let named = templates.iter().find(|template| member(template, "name") == name)?;
    member(named, "template").as_str().map(str::to_owned)
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
