//! From a chat to the model's tokens, and what its template says about the reply to come.

use std::sync::Arc;

use serde_json::Value as Json;
use sha2::{Digest, Sha256};

use super::template::{ChatTemplate, SharedTemplate, TemplateChoice, Trust};
use super::tools::{self, Thought, ToolFormat};
use super::{ChatPrompt, Function, Inner, TextError, TextModel, member};
use super::{THINK_END, THINK_START};

/// Length of a call's id that Mistral's templates accept.
const SHORT_ID: usize = 9;

/// A chat in tokens.
#[derive(Clone, Debug)]
pub struct PreparedChat {
    /// Of the whole prompt.
    pub tokens: Vec<u32>,
    /// How the model writes calls.
    pub(crate) format: ToolFormat,
    /// Whether it thinks first.
    pub(crate) thought: Thought,
}

impl TextModel {
    /// Renders a chat and encodes it. Special tokens of the *template* become tokens; those that a message spells stay
    /// text.
    ///
    /// # Errors
    /// [`TextError::NoTemplate`], [`TextError::Template`], or as [`Self::encode`].
    pub async fn encode_chat(&self, chat: ChatPrompt, add_special: bool) -> Result<Vec<u32>, TextError> {
        self.prepare_chat(chat, add_special).await.map(|chat| chat.tokens)
    }

    /// As [`Self::encode_chat`], with what is known about the reply.
    ///
    /// # Errors
    /// As [`Self::encode_chat`].
    pub async fn prepare_chat(&self, mut chat: ChatPrompt, add_special: bool) -> Result<PreparedChat, TextError> {
        let (workers, template) = match std::mem::take(&mut chat.template) {
            TemplateChoice::Base => {
                (&self.inner.workers, Ok(self.inner.template_for(&chat).ok_or(TextError::NoTemplate)?))
            }
            TemplateChoice::Compiled(template) => (&self.inner.strangers, Ok(template)),
            TemplateChoice::Source(source) => (&self.inner.strangers, Err(source)),
        };
        self.on_worker_of(workers, move |inner| {
            let template = match template {
                Ok(template) => template,
                Err(source) => Arc::new(ChatTemplate::new(&source, inner.special.clone(), Trust::Stranger)?),
            };
            let format = chat.tool_format.unwrap_or(template.tool_format());
            let mark = inner.guard_specials(&mut chat);
            adapt(&mut chat, &template, format);
            let text = template.render(&chat)?;
            let thought = inner.thought(&template, &chat, &text);
            let tokens = match mark {
                None => inner.encode(&text, add_special)?,
                Some(mark) => {
                    let mut tokens = Vec::new();
                    for (i, part) in text.split(mark).enumerate() {
                        tokens.extend(inner.encode(part, add_special && i == 0)?);
                    }
                    tokens
                }
            };
            Ok(PreparedChat { tokens, format, thought })
        })
        .await
    }

    /// A grammar (Lark) of replies that call `functions`.
    pub(crate) fn tool_grammar(&self, chat: &PreparedChat, functions: &[Function], calls_max: usize) -> String {
        let special = |text: &str| self.inner.special_id(text);
        tools::grammar(chat.format, functions, calls_max, chat.thought, &special)
    }

    /// Special tokens that mark calls or thoughts: who reads a reply has to see them.
    pub(crate) fn mark_tokens(&self, format: Option<ToolFormat>, thoughts: bool) -> Arc<[u32]> {
        let calls = format.map_or(&[][..], ToolFormat::token_texts);
        let thoughts = if thoughts { &[THINK_START, THINK_END][..] } else { &[] };
        calls.iter().chain(thoughts).filter_map(|text| self.inner.special_id(text)).collect()
    }
}

/// Gives the template its tools, in the way it can take them.
fn adapt(chat: &mut ChatPrompt, template: &ChatTemplate, format: ToolFormat) {
    if !template.knows_calls() {
        chat.messages = tools::plain::messages(&chat.messages, format);
    }
    if !template.knows_tools() && !chat.tools.is_empty() {
        return tools::plain::describe(&mut chat.messages, &chat.tools, format);
    }
    if matches!(format, ToolFormat::Mistral | ToolFormat::MistralArgs) {
        chat.messages.iter_mut().for_each(shorten_ids);
    }
    if !chat.tools.is_empty() {
        chat.kwargs.insert("tools".into(), Json::Array(chat.tools.clone()));
    }
}

/// Ids come from whoever answered before; those that are not as Mistral's templates want them are replaced, the same id
/// always by the same.
fn shorten_ids(message: &mut Json) {
    let fits = |id: &str| id.len() == SHORT_ID && id.bytes().all(|b| b.is_ascii_alphanumeric());
    let shorten = |id: &mut Json| {
        if let Json::String(text) = id
            && !fits(text)
        {
            let digest = Sha256::digest(text.as_bytes());
            *text = digest.iter().take(SHORT_ID).map(|byte| char::from(b'a' + byte % 26)).collect();
        }
    };
    if let Some(id) = message.get_mut("tool_call_id") {
        shorten(id);
    }
    if let Some(Json::Array(calls)) = message.get_mut("tool_calls") {
        calls.iter_mut().filter_map(|call| call.get_mut("id")).for_each(shorten);
    }
}

impl Inner {
    /// The model's own.
    fn template_for(&self, chat: &ChatPrompt) -> Option<SharedTemplate> {
        let for_tools = self.tool_template.as_ref().filter(|_| !chat.tools.is_empty());
        for_tools.or(self.template.as_ref()).cloned()
    }

    fn special_id(&self, text: &str) -> Option<u32> {
        self.tokenizer.token_to_id(text).filter(|&id| self.table.is_special(id))
    }

    /// Reads off the prompt whether the reply begins with a thought, or in one.
    fn thought(&self, template: &ChatTemplate, chat: &ChatPrompt, prompt: &str) -> Thought {
        let known = || template.thinks() || self.tokenizer.token_to_id(THINK_START).is_some();
        if !chat.thinks.unwrap_or_else(known) {
            return Thought::Never;
        }
        if chat.continue_final_message {
            let begun = chat.messages.last().and_then(|message| member(message, "content").as_str()).unwrap_or("");
            return match (begun.rfind(THINK_START), begun.rfind(THINK_END)) {
                (Some(start), end) if end.is_none_or(|end| end < start) => Thought::Begun,
                _ => Thought::Never,
            };
        }
        let end = prompt.trim_end();
        if end.ends_with(THINK_START) {
            Thought::Begun
        } else if end.ends_with(THINK_END) {
            Thought::Never
        } else {
            Thought::Possible
        }
    }

    /// Breaks every special token that a message or a tool spells with a mark that occurs nowhere else; the rendered text is
    /// encoded in parts, cut at the marks, so none of them can become the token. `None`: nothing had to be broken.
    fn guard_specials(&self, chat: &mut ChatPrompt) -> Option<char> {
        let spelled = |text: &str| self.special_texts.iter().any(|special| text.contains(special.as_str()));
        let mut texts = Vec::new();
        chat.messages.iter_mut().for_each(|message| collect_texts(message, &mut texts));
        chat.tools.iter_mut().for_each(|tool| collect_texts(tool, &mut texts));
        if let Some(documents) = chat.kwargs.get_mut("documents") {
            collect_texts(documents, &mut texts);
        }
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
